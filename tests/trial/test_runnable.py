"""What cannot run is known before Ray starts; no test here starts it."""

import json
import re
from pathlib import Path

import optuna
import pytest
import ray
import torch
from optuna.trial import TrialState

from deit_ray.commands.plan import plan
from deit_ray.data import shards
from deit_ray.errors import UserError
from deit_ray.experiment.load import load_experiment
from deit_ray.results.folders import MODEL
from deit_ray.study.budget import exceeded
from deit_ray.study.observers import Database
from deit_ray.study.search import tune
from deit_ray.study.searcher import StudySearcher
from deit_ray.study.study import Study
from deit_ray.study.trials import Trials
from deit_ray.training.worker import describe
from deit_ray.trial import runnable
from deit_ray.trial.evaluation import check_model
from deit_ray.trial.remarks import remarks_before
from deit_ray.trial.resolve import pin_teacher, resolve
from deit_ray.trial.run import train
from tests.conftest import EXPERIMENTS
from tests.support.data import write_tints

PLAIN = {"distillation.kind": "none", "search.grace_epochs": 1, "train.epochs": 4}
LR = {"optim.lr": {"log": [1e-4, 1e-2]}}
PLAIN_DEIT = "deit_tiny_patch16_224"
REFUSED = [  # settings, and what is said of them
    ({"student.width": 55}, r"student\.width 55 is not divisible by student\.heads \(4\)"),
    ({"data.image_size": 18}, r"the last 2 rows and columns would never be seen; .* 16 or 20"),
    ({"student.model": "test_resnet"}, r"test_resnet takes no student\.depth"),
    ({"student.model": "deit_tny"}, "no model named 'deit_tny'; near: "),
    ({"train.batch_size": 5000}, "1294 training images are fewer than one batch of 5000"),
    ({"search.metric": "val/top1_dist", "student.model": PLAIN_DEIT}, "has one head; measured are val/top1,"),
    ({"augment.policy": "nowhere:f"}, r"augment\.policy: 'nowhere:f' cannot be found"),
    (
        {"student": {"model": "resnet18", "drop_path_rule": "uniform"}},
        "uniform needs the blocks of a transformer such as ViT, which resnet18 does not have",
    ),
    ({"student.init": "nowhere.pth"}, r"student\.init: nowhere\.pth: no such file"),
]
IN_STUDIES = [
    ({"data.holdout": 1e-4}, r"'val/top1' is never measured, .* 0\.0001 of 1438 training images is none"),
    ({"search.space": {"student.depth": {"float": [1, 4]}}}, "valid integer"),
    (
        {"search.space": {"student.width": {"choice": [55, 64]}}},
        r"space\.student\.width: no trial with 55 can run",
    ),
    ({"search.space": {"student.width": {"int": [61, 63]}}}, "not divisible"),
    (
        {"search.space": {"train.batch_size": {"int": [30, 70]}}, "train.workers": 8},
        "of it cannot run, such as",
    ),
]


@pytest.mark.parametrize(("keys", "said"), REFUSED, ids=str)
def test_plan_train_and_tune_refuse_the_same_before_ray_starts(experiment, keys, said):
    run, study = experiment("digits_student", PLAIN | keys), PLAIN | {"search.space": LR} | keys
    for command, subject in ((plan, run), (train, run), (plan, study), (tune, study)):
        with pytest.raises(UserError, match=said) as error:
            command(subject if subject is run else experiment("digits_student", subject))
        assert "\n" not in str(error.value)
    assert not ray.is_initialized()
    assert not Path(run.results.uri).exists()


@pytest.mark.parametrize(("keys", "said"), IN_STUDIES, ids=str)
def test_plan_and_tune_refuse_a_study_of_which_too_little_can_run(experiment, keys, said):
    study = experiment("digits_student", PLAIN | {"search.space": LR} | keys)
    for command in (plan, tune):
        with pytest.raises(UserError, match=said):
            command(study)
    assert not Path(study.results.uri).exists()


def test_a_metric_is_measured_or_refused(experiment, tmp_path, tints):
    keys = {"data.uri": tints, "search.metric": "val/top5"}
    with pytest.raises(UserError, match="the data set has 3 classes; measured are val/top1, val/top1_cls"):
        resolve(experiment("digits_student", PLAIN | keys))
    write_tints(str(tmp_path / "train_only"), {"train": 200})
    keys = {"data.uri": str(tmp_path / "train_only"), "search": {"metric": "test/top1", "rank_on_test": True}}
    with pytest.raises(UserError, match=r"'test/top1' is never measured, since there are no test images"):
        resolve(experiment("digits_student", PLAIN | {"search.space": LR} | keys))


def test_a_part_of_a_space_that_cannot_run_is_said(experiment):
    space = {"train.batch_size": {"int": [32, 64]}}
    exp = experiment("digits_student", PLAIN | {"search.space": space, "train.workers": 2})
    (note,) = resolve(exp).notes
    assert re.search(
        r"about 48% of it cannot run, such as train\.batch_size=33: .* divisible by train\.workers", note
    )
    small = {"student.width": {"choice": [48, 64]}, "student.heads": {"choice": [3, 4]}}
    notes = resolve(experiment("digits_student", PLAIN | {"search.space": small})).notes
    assert "has 4 combinations, fewer than search.trials (20)" in notes[0]
    assert "about 25% of it cannot run, such as student.width=64, student.heads=3" in notes[1]


def test_a_run_without_val_images_says_so_and_runs(experiment):
    (note,) = resolve(experiment("digits_student", PLAIN | {"data.holdout": 0.0})).notes
    assert note.startswith("nothing is measured before the last epoch: data.holdout 0 of 1438")


def test_a_draw_that_cannot_run_ends_its_trial_without_a_start(experiment):
    keys = {"search.space": {"train.batch_size": {"int": [33, 64]}}, "search.trials": 12, "train.workers": 2}
    exp = experiment("digits_student", PLAIN | keys | {"search.budget": {"failures": 1, "same_failure": 1}})
    study = Study.create(exp)
    left = study.optuna.ask({"train.batch_size": optuna.distributions.IntDistribution(33, 33)})
    trials = Trials(study, [Database(study)], resolve(exp).refusal)  # its driver was killed by such a draw
    trials.searcher.put_back(left.number)
    proposed = []
    while isinstance(config := trials.searcher.suggest(f"tune-{len(proposed)}"), dict):
        proposed.append(config)
    refused = study.records(TrialState.FAIL)
    assert refused[0].number == left.number
    assert len(proposed) + len(refused) == 12
    assert all(config["train.batch_size"] % 2 == 0 for config in proposed)
    assert all(trial.params["train.batch_size"] % 2 == 1 for trial in refused)
    assert all(
        trial.outcome.text.startswith("failed: not started: search.space.train.batch") for trial in refused
    )
    assert (
        exceeded(exp, study.records(), study.spent) is None
    )  # the person's values are no failure of a trial


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_no_combination_is_proposed_twice(experiment, sampler):
    space = {"student.depth": {"int": [1, 3]}, "augment.policy": {"choice": ["none", "three_augment"]}}
    exp = experiment("digits_student", PLAIN | {"search.space": space, "search.sampler": sampler})
    searcher = StudySearcher(optuna.create_study(direction="maximize"), exp, str)
    assert searcher.remaining() == 6
    drawn = [searcher.suggest(f"tune-{k}") for k in range(6)]
    assert len({(config["student.depth"], config["augment.policy"]) for config in drawn}) == 6
    assert searcher.is_exhausted()
    assert searcher.suggest("tune-6") is None  # while others run
    for k in range(6):
        searcher.on_trial_complete(f"tune-{k}")
    assert searcher.suggest("tune-7") == "FINISHED"


@pytest.mark.parametrize("key", ["optim.clip_grad", "student.depth", "optim.schedule_epochs"])
def test_none_lies_in_no_range(experiment, key):
    space = {key: {"int": [2, 5]}, **LR}
    exp = experiment("digits_student", PLAIN | {key: None, "optim.warmup_epochs": 1, "search.space": space})
    study = Study.create(exp)  # as an earlier version left it
    drawn = StudySearcher(
        study.optuna, Study.open("digits_student", exp.results.uri).experiment, str
    ).suggest("a")
    assert 2 <= drawn[key] <= 5
    assert plan(exp).sampled[0][key] == drawn[key]


def test_values_lie_in_a_space_by_value_and_kind(experiment):
    space = experiment(
        "digits_student",
        PLAIN
        | {"search.space": {"optim.weight_decay": {"int": [0, 2]}, "train.batch_size": {"choice": [32, 64]}}},
    ).search.space
    contained = [space["optim.weight_decay"].contains(value) for value in (0.05, 1.0, 1, 3, None, True)]
    assert contained == [False, True, True, False, False, False]
    assert [space["train.batch_size"].contains(value) for value in (64, 48, None)] == [True, False, False]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("poor_teachr", "did you mean run:poor_teacher?"),
        (
            "begun",
            "begun-2 has not finished; continue it with: .*train --continue begun-2",
        ),
        ("own_images_teachr", "did you mean run:own_images_teacher?"),
        (
            "own_images_teacher",
            "train one first: .*train {}/experiments/own_images_teacher.yaml --set data.uri={}/pictures "
            "--set data.image_size=16 --set results.uri={}/results",
        ),
        ("nobody", "train one first, and name it as run:NAME"),
    ],
)
def test_a_teacher_that_no_run_has_gets_a_remedy(tmp_path, monkeypatch, named, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    for run, file in (("poor_teacher-1", MODEL), ("begun-2", "experiment.yaml")):
        (tmp_path / "results" / run).mkdir(parents=True)
        (tmp_path / "results" / run / file).write_bytes(b"")
    keys = {
        "data.uri": "pictures",
        "data.image_size": 16,
        "distillation.teacher.weights": f"run:{named}",
        "results.uri": str(tmp_path / "results"),
    }
    student = load_experiment(EXPERIMENTS / "digits_student.yaml", keys)
    with pytest.raises(UserError, match=said.replace("{}", str(tmp_path))):
        pin_teacher(student)


def test_a_teacher_at_chance_is_said(experiment, teacher_file, tmp_path):
    folder = tmp_path / "results" / "poor-1"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(Path(teacher_file).read_bytes())
    for top1, doubted in ((0.11, True), (0.9, False)):
        ended = {"outcome": "finished", "metrics": {"test/top1": top1, "test/images": 359}}
        (folder / "run.json").write_text(json.dumps(ended))
        resolved = resolve(experiment("digits_student", {"distillation.teacher": {"weights": "run:poor"}}))
        assert resolved.notes == ()  # it is said once
        remarks = [
            remark
            for remark in remarks_before(resolved.experiment, resolved.manifest)
            if "the teacher poor-1 has test/top1 0.1100" in remark
            and "its test/top1 is not better than always answering the largest class" in remark
        ]
        assert bool(remarks) is doubted


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, None),
        ({"student": {"model": PLAIN_DEIT, "depth": 1}}, f"{PLAIN_DEIT} has no distillation token: its one"),
        ({"student": {"model": PLAIN_DEIT, "depth": 1}, "distillation.kind": "none"}, None),
        (
            {"search.space": {"student.model": {"choice": [PLAIN_DEIT, "deit_tiny_distilled_patch16_224"]}}},
            f"{PLAIN_DEIT} has no distillation token: its one head learns from the labels and from the",
        ),
    ],
    ids=str,
)
def test_a_student_whose_only_head_learns_from_the_teacher_is_named_once(
    experiment, teacher_file, keys, said
):
    own = experiment("digits_student", {"distillation.teacher": {"weights": teacher_file}} | keys)
    remarks = [remark for remark in plan(own).remarks if "distillation token" in remark]
    assert len(remarks) == (said is not None)
    assert said is None or remarks[0].startswith(said)


def test_a_model_whose_classes_have_another_order_teaches_nobody(experiment, tints, tmp_path):
    from deit_ray.models.student import create_student, save_model

    exp = experiment("digits_teacher", {"data.uri": tints})
    manifest = shards.read_manifest(tints)
    path = tmp_path / "model.safetensors"
    model = create_student(exp.student, 16, 3)
    save_model(path, model.state_dict(), describe(exp, manifest.classes[::-1], manifest.exif))
    for keys in ({"distillation.teacher": {"weights": str(path)}}, PLAIN | {"student.init": str(path)}):
        with pytest.raises(UserError, match="order: class 0 is bluish, in the data set reddish"):
            resolve(experiment("digits_student", {"data.uri": tints} | keys))
    with pytest.raises(UserError, match="order: class 0 is bluish"):
        check_model(str(path), tints, manifest)


def test_bfloat16_is_refused_where_torch_computes_it_wrongly(experiment, monkeypatch):
    keys = {"student": {"model": "test_resnet"}, "student.drop_path": 0.0, "train.precision": "bfloat16"}
    exp = experiment("digits_student", PLAIN | keys)
    monkeypatch.setattr(runnable, "_processor_flags", lambda: ["avx2"])
    runnable.check_precision(exp, "cpu")
    monkeypatch.setattr(runnable, "_processor_flags", lambda: ["avx512_bf16"])
    runnable.check_precision(exp, "cuda")
    runnable.check_precision(experiment("digits_student", PLAIN | {"train.precision": "bfloat16"}), "cpu")
    with pytest.raises(
        UserError, match="wrong gradients of convolutions over a single pixel, which test_resnet"
    ):
        runnable.check_precision(exp, "cpu")
    space = {"train.precision": {"choice": ["float32", "bfloat16"]}}
    searched = experiment(
        "digits_student", PLAIN | keys | {"train.precision": "float32", "search.space": space}
    )
    with pytest.raises(UserError, match="use float32"):
        runnable.check_precision(searched, "cpu")


def test_torch_still_computes_such_gradients_wrongly():
    torch.manual_seed(0)
    wrong = 0
    for _ in range(300):
        junk = [torch.full((size,), float("nan")) for size in (1024, 16384, 262144)]
        del junk
        layer = torch.nn.Conv2d(64, 96, 2, 2, 1, bias=False)
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(torch.randn(1, 64, 1, 1))
        output.float().square().sum().backward()
        gradient = layer.weight.grad.clone()
        gradient[:, :, 1, 1] = 0  # the one place that saw a pixel; the others saw padding
        wrong += bool(gradient.abs().nan_to_num(1.0).max() > 0)
    has_flag = runnable.BROKEN_BFLOAT16 in runnable._processor_flags()
    assert wrong or not has_flag, "the refusal in check_precision is no longer needed"
