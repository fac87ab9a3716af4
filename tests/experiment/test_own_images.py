"""The recipes for a user's own few images: what they promise, and that each starts as it says."""

import pytest

from deit_ray.data import shards
from deit_ray.experiment.load import load_experiment
from deit_ray.trial.reading import make_worklist
from tests.conftest import EXPERIMENTS
from tests.support.data import write_colours

SCRATCH = ("own_images_teacher", "own_images_student", "own_images_search")
PRETRAINED = ("own_images_pretrained_teacher", "own_images_pretrained_student")
IMAGES = 300
KEPT = 5  # `prepare` keeps one image in five for testing, if there is no test folder


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("own") / "data")
    write_colours(uri, {"train": IMAGES - IMAGES // KEPT, "test": IMAGES // KEPT}, size=20)
    return uri


@pytest.mark.parametrize("name", [*SCRATCH, *PRETRAINED])
def test_the_recipes_fit_few_images(name, own):
    experiment = load_experiment(EXPERIMENTS / f"{name}.yaml", {"data.uri": own})
    worklist = make_worklist(experiment, shards.read_manifest(own), own, ("val",))
    assert worklist.steps_per_epoch >= 20
    assert experiment.data.flip == 0
    assert experiment.data.crop_scale[0] >= 0.5
    assert experiment.student.init == ("pretrained" if name in PRETRAINED else "scratch")


def test_teacher_and_student_of_the_pretrained_recipe_name_their_weights():
    teacher, student = (load_experiment(EXPERIMENTS / f"{name}.yaml") for name in PRETRAINED)
    assert teacher.student.model == "tf_efficientnet_lite0.in1k"
    assert student.student.model == "deit_tiny_distilled_patch16_224.fb_in1k"
    assert student.distillation.teacher.weights == f"run:{teacher.name}"
