"""Compiled models: the same numbers and names, no second compilation, and a way out where compiling fails.

Most tests trace models as `torch.compile` does, and run the traced operations without making machine code,
which takes a minute. The test marked slow makes machine code.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
import torch.distributed
from timm.layers import DropPath
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.nn.parallel import DistributedDataParallel

from bench.step import CLASSES, TINY, our_batches
from deit_ray.data.blocks import Samples
from deit_ray.models.student import create_student
from deit_ray.models.teacher import TeacherWeights
from deit_ray.training.compiled import CannotCompile, CompiledModels, TensorDropPath, is_wanted
from deit_ray.training.evaluate import evaluate
from deit_ray.training.step import TrainStep
from tests.support.training import CPU

SMALL = {"student.depth": 2, "student.width": 24, "student.heads": 2, "optim.warmup_epochs": 0}
SEARCHED = {
    "optim.lr": 0.01,
    "optim.weight_decay": 0.2,
    "augment.strength": 0.3,
    "distillation.kind": "soft",
    "distillation.weight": 0.7,
    "distillation.temperature": 2.0,
    "student.drop_path": 0.4,
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No test finds code that another one has compiled."""
    torch.set_num_threads(1)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced() -> Iterator[None]:
    with torch.compiler.set_stance(force_backend="eager"):
        yield


def make_step(device=CPU, wrap=lambda model: model, model: str = TINY.student, **keys) -> TrainStep:
    """A distilled step with a small convolutional teacher."""
    keys = SMALL | {"student.model": model, "train.compile": "always"} | keys
    experiment = dataclasses.replace(TINY, device=device).experiment.with_overrides(keys)
    torch.manual_seed(0)
    student = create_student(experiment.student, TINY.size, CLASSES).to(device)
    made = timm.create_model("test_resnet", num_classes=CLASSES)
    mean, std = experiment.data.mean, experiment.data.std
    teacher = TeacherWeights("test_resnet", {"num_classes": CLASSES}, made.state_dict(), mean, std)
    return TrainStep(experiment, student, wrap(student), teacher, CLASSES, 1000, 0, device)


def losses(step: TrainStep, count: int = 4) -> list[float]:
    batches = our_batches(dataclasses.replace(TINY, device=step.device))
    return [step(batches[number], number)["loss"].item() for number in range(count)]


@contextlib.contextmanager
def nothing_is_compiled():
    """Fails if a model is traced again."""
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    assert counters["stats"]["unique_graphs"] == before


def test_a_gpu_compiles_by_default_and_a_cpu_does_not():
    devices = (CPU, torch.device("cuda"))
    assert [is_wanted("auto", device) for device in devices] == [False, True]
    assert [is_wanted("always", device) for device in devices] == [True, True]
    assert [is_wanted("never", device) for device in devices] == [False, False]
    assert make_step(**{"train.compile": "auto"}).compiled is None


def test_a_compiled_step_is_close_to_an_uncompiled_one(device):
    """A GPU makes machine code; a CPU runs the traced operations, here to the same bits."""
    keys = {"student.drop_path": 0.0, "train.precision": "float32", "augment.strength": 0.0}
    plain = losses(make_step(device, **keys, **{"train.compile": "never"}))
    force = None if device.type == "cuda" else "aot_eager"
    with torch.compiler.set_stance(force_backend=force):
        found = losses(make_step(device, **keys))
    assert counters["stats"]["unique_graphs"] == 2  # student and teacher, each as a whole
    assert found == pytest.approx(plain, rel=1e-3 if device.type == "cuda" else 1e-6)
    assert plain[0] != plain[3]


def test_machine_code_is_close_and_is_found_again_on_the_disk(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain = losses(make_step(**{"student.drop_path": 0.0, "train.compile": "never"}))
    assert losses(make_step(**{"student.drop_path": 0.0})) == pytest.approx(plain, rel=1e-5)
    assert "fxgraph_cache_hit" not in counters["inductor"]
    first = losses(make_step(**{"student.drop_path": 0.1}))
    torch.compiler.reset()  # as in another trial's process
    counters.clear()
    step = make_step(**SEARCHED)
    assert losses(step) != first
    assert step.compiled.failure is None
    assert counters["inductor"]["fxgraph_cache_hit"] == 3  # the student forwards and backwards, the teacher
    assert "fxgraph_cache_miss" not in counters["inductor"]


@pytest.mark.parametrize("model", [TINY.student, "deit_tiny_patch16_224"])
def test_later_steps_trials_with_other_searched_values_and_evaluations_compile_nothing(traced, model):
    step = make_step(model=model)
    first = losses(step, 1)
    samples = make_samples(3)  # another number than in training
    with nothing_is_compiled():
        losses(step)
        assert losses(make_step(model=model, **SEARCHED), 1) != first
        found = evaluate("val", step.model, None, iter([samples]), 1, step.normalise, step.autocast)
    assert found["val/images"] == 3


def test_a_checkpoint_continues_in_the_same_way_and_fits_an_uncompiled_model(traced):
    whole, resumed, plain = make_step(), make_step(), make_step(**{"train.compile": "never"})
    losses(whole, 2)
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert list(state["model"]) == list(plain.model.state_dict())
    resumed.load_state_dict(state)
    plain.load_state_dict(state)
    batch = our_batches(TINY)[2]
    assert resumed(batch, 2)["loss"] == whole(batch, 2)["loss"] != plain(batch, 2)["loss"]  # other drop paths
    for ours, theirs in zip(resumed.ema.module.parameters(), whole.ema.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_data_parallel_wrapper_calls_the_compiled_model(tmp_path):
    """With buckets below the model's size, torch splits its code, so that gradients are sent while others are
    computed."""
    keys = {"student.drop_path": 0.0, "student.width": 192}
    plain = losses(make_step(**keys, **{"train.compile": "never"}), 2)
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        step = make_step(wrap=lambda model: DistributedDataParallel(model, bucket_cap_mb=1), **keys)
        with torch.compiler.set_stance(force_backend="aot_eager"):
            assert losses(step, 2) == pytest.approx(plain, rel=1e-6)
        assert counters["stats"]["unique_graphs"] == 2
        assert counters["aot_autograd"]["total"] > 3  # the teacher is one piece
    finally:
        torch.distributed.destroy_process_group()


def test_drop_path_with_a_tensor_has_the_distribution_of_timms():
    torch.manual_seed(0)
    original = DropPath(0.3).train()
    ours, x = TensorDropPath(original, CPU).train(), torch.ones(20_000, 1, 2)
    assert torch.equal(ours(x).unique(), original(x).unique())
    assert (ours(x)[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(ours.eval()(x), x)
    assert not ours.state_dict()


@pytest.fixture
def no_compiler() -> Iterator[None]:
    with inductor.patch({"cpp.cxx": (None, "/no/compiler")}):
        yield


def test_without_a_compiler_training_continues_with_one_warning(no_compiler, caplog):
    keys = {"train.compile": "never", "student.drop_path": 0.0}
    step = make_step(**keys)
    step.compiled = CompiledModels([step.model, step.teacher], always=False)  # as `auto` does on a GPU
    assert losses(step) == losses(make_step(**keys))
    (warning,) = (line for line in caplog.messages if "compiling" in line)
    assert warning == f"{step.compiled.failure}; training continues without compiling"
    assert "No working C++ compiler found" in warning


def test_without_a_compiler_always_is_an_error_before_the_first_update(no_compiler):
    step = make_step()
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    with pytest.raises(CannotCompile, match=r"train\.compile: always, but .* No working C\+\+ .* or never$"):
        losses(step)
    assert all(torch.equal(tensor, before[name]) for name, tensor in step.model.state_dict().items())


def make_samples(count: int) -> Samples:
    numbers = np.arange(count)
    images = np.zeros((count, TINY.size, TINY.size, 3), np.uint8)
    arrays = {"images": images, "labels": numbers, "ids": numbers, "views": numbers, "valid": numbers >= 0}
    return Samples(arrays, "val", 0, 0)
