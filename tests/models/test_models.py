"""Losses, schedule, student and teacher agree with the paper, the reference's formulas and timm."""

import math

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from timm.loss import BinaryCrossEntropy
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from deit_ray.errors import UserError
from deit_ray.experiment.config import Distillation, Experiment, Optim, Student
from deit_ray.models import losses, student, weights
from deit_ray.models.ema import MovingAverage
from deit_ray.models.optim import lr_at, make_optimizer
from deit_ray.models.teacher import build_teacher, read_teacher

ALL = torch.ones(2)
TINY = Student(
    model="deit_tiny_distilled_patch16_224", patch_size=4, width=48, depth=2, heads=3, drop_path=0.0
)


def section(**values):
    from types import SimpleNamespace

    return SimpleNamespace(
        **{"kind": "hard", "weight": 0.5, "temperature": 3.0, "soft_mean": "elements"} | values
    )


@pytest.mark.parametrize("rate", [0.3, 0.0])
def test_the_stochastic_depth_of_deit_3_is_equal_in_every_block(rate):
    model = student.create_student(
        TINY.model_copy(update={"drop_path": rate, "drop_path_rule": "uniform", "depth": 3}), 16, 3
    )
    drops = [drop for block in model.blocks for drop in (block.drop_path1, block.drop_path2)]
    assert [getattr(drop, "drop_prob", 0.0) for drop in drops] == [rate] * 6


def test_label_loss_is_the_cross_entropy_of_smoothed_targets():
    from timm.loss import LabelSmoothingCrossEntropy

    from deit_ray.augment.mixing import smooth_targets

    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    ours = losses.label_loss(logits, smooth_targets(labels, 5, 0.1), torch.ones(8))
    torch.testing.assert_close(ours, LabelSmoothingCrossEntropy(0.1)(logits, labels))


def test_hard_distillation_is_equation_3():
    # the teacher decides 1, then 0; the softmax of (0, ln 3) is (1/4, 3/4): the mean of -ln 3/4 and -ln 1/4
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    teacher = torch.tensor([[0.0, 1.0], [5.0, 1.0]])
    expected = (-math.log(3 / 4) - math.log(1 / 4)) / 2
    assert losses.hard_distillation_loss(logits, teacher, ALL).item() == pytest.approx(expected, rel=1e-6)


def test_soft_distillation_is_equation_2_with_either_mean():
    # student uniform, teacher (1/4, 3/4) at temperature 2 (its logits are 2 x (0, ln 3)):
    # KL = 1/4 ln(1/4 / 1/2) + 3/4 ln(3/4 / 1/2), times temperature squared
    logits, teacher = torch.zeros(2, 2), torch.tensor([[0.0, 2 * math.log(3)]] * 2)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    by_batch = losses.soft_distillation_loss(logits, teacher, ALL, 2.0, "batch").item()
    by_elements = losses.soft_distillation_loss(logits, teacher, ALL, 2.0, "elements").item()
    assert by_batch == pytest.approx(4 * kl, rel=1e-6)
    assert by_elements == pytest.approx(4 * kl / 2, rel=1e-6)


def test_the_weight_balances_label_and_teacher():
    outputs, targets, teacher = (torch.randn(2, 3), torch.randn(2, 3)), torch.eye(3)[:2], torch.randn(2, 3)
    parts = losses.distilled_loss(outputs, targets, teacher, ALL, section(weight=0.3))
    expected = 0.7 * losses.label_loss(outputs[0], targets, ALL) + 0.3 * losses.hard_distillation_loss(
        outputs[1], teacher, ALL
    )
    torch.testing.assert_close(parts["loss"], expected)


def test_samples_that_are_not_valid_count_nowhere():
    logits, targets = torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 0]]
    valid = torch.tensor([1.0, 0.0, 1.0, 1.0])
    without = losses.label_loss(logits[[0, 2, 3]], targets[[0, 2, 3]], torch.ones(3))
    torch.testing.assert_close(losses.label_loss(logits, targets, valid), without)


def test_the_schedule_is_timms_cosine_with_warm_up():
    optim = Optim(lr=5e-4, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)
    peak = optim.peak_lr(1024)
    assert peak == 1e-3  # DeiT, section 6: 5e-4 x 1024 / 512
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    theirs = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in (0, 1, 4, 5, 6, 100, 299):
        theirs.step(epoch)
        assert lr_at(epoch * 7, 7, optim, 300, peak) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )


def test_the_rate_of_timms_train_script_is_constant_within_an_epoch():
    """timm's train.py calls the scheduler with epoch + 1 after each epoch, so epoch e has the rate of e."""
    optim = Optim(lr=5e-4, schedule_per="epoch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(300):
        expected = pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert [lr_at(epoch * 7 + step, 7, optim, 300, 1e-3) for step in range(7)] == [expected] * 7
        theirs.step(epoch + 1)


def test_bce_is_the_references_and_timms():
    """engine.py with --bce-loss: targets.gt(0.0), then torch's BCEWithLogitsLoss over batch and classes."""
    logits, one_hot = torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 1]]
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    ours = losses.binary_label_loss(logits, mixed, torch.ones(4))
    reference = torch.nn.BCEWithLogitsLoss()(logits, mixed.gt(0.0).type(mixed.dtype))
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(ours, BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)(logits, mixed))
    some = losses.binary_label_loss(logits, mixed, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(
        some, torch.nn.BCEWithLogitsLoss()(logits[[0, 2, 3]], mixed.gt(0.0)[[0, 2, 3]] * 1.0)
    )
    parts = losses.distilled_loss(
        (logits, -logits), mixed, torch.randn(4, 3), torch.ones(4), section(), "bce"
    )
    torch.testing.assert_close(parts["loss_label"], ours)
    assert losses.binary_label_loss(
        torch.zeros(1, 2), torch.eye(2)[:1], torch.ones(1)
    ).item() == pytest.approx(math.log(2), rel=1e-6)  # -(ln 1/2 + ln 1/2) / 2


def test_bce_with_smoothed_labels_is_refused():
    tree = {"name": "x", "data": {"uri": "x"}, "distillation": {"kind": "none"}}
    with pytest.raises(ValidationError, match=r"0\.1 makes every class a target of optim\.label_loss bce"):
        Experiment.model_validate(tree | {"optim": {"label_loss": "bce"}})


def test_the_first_step_of_lamb_is_the_papers():
    """arXiv:1904.00962, algorithm 2: at the first step, m / sqrt(v) is the sign of the gradient."""
    model = torch.nn.Linear(2, 1)
    model.weight.data, model.bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
    optimizer = make_optimizer(model, Optim(kind="lamb", lr=0.1, weight_decay=0.5))
    model.weight.grad, model.bias.grad = torch.tensor([[0.2, -0.3]]), torch.tensor([0.1])
    optimizer.step()
    # weight: sign + decay = (1 + 1.5, -1 + 2), of norm sqrt(7.25), is taken to the norm of the weight, 5, and
    # to the rate; the bias does not decay, and keeps the plain rate
    scale = 0.1 * 5 / math.sqrt(2.5**2 + 1)
    torch.testing.assert_close(model.weight.data, torch.tensor([[3 - scale * 2.5, 4 - scale * 1.0]]))
    torch.testing.assert_close(model.bias.data, torch.tensor([0.9]))


def test_layer_scale_is_timms():
    scaled = student.create_student(TINY.model_copy(update={"layer_scale": 1e-4}), 16, 10)
    gammas = [p for name, p in scaled.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 2 * TINY.depth
    assert all(torch.equal(gamma, torch.full((48,), 1e-4)) for gamma in gammas)
    assert not [
        name for name, _ in student.create_student(TINY, 16, 10).named_parameters() if "gamma" in name
    ]


def test_a_schedule_of_its_own_length_stays_at_min_lr_behind_it():
    optim = Optim(lr=1e-3, warmup_epochs=2, warmup_lr=1e-6, min_lr=1e-5, schedule_epochs=20, scale_lr=False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=20, lr_min=1e-5, warmup_t=2, warmup_lr_init=1e-6)
    for epoch in (0, 1, 2, 10, 19, 20, 21, 49):
        theirs.step(epoch)
        for epochs in (5, 20, 50):  # a run may be shorter or longer than its schedule
            assert lr_at(epoch * 7, 7, optim, epochs, 1e-3) == pytest.approx(
                optimizer.param_groups[0]["lr"], rel=1e-9
            )
    assert lr_at(20 * 7 + 3, 7, optim, 50, 1e-3) == pytest.approx(1e-5, rel=1e-12)


def test_a_schedule_shorter_than_its_warm_up_is_refused():
    tree = {"name": "x", "data": {"uri": "x"}, "distillation": {"kind": "none"}}
    with pytest.raises(
        ValidationError, match=r"optim.warmup_epochs: 5 must be below optim.schedule_epochs \(4\)"
    ):
        Experiment.model_validate(tree | {"optim": {"warmup_epochs": 5, "schedule_epochs": 4}})
    short = Experiment.model_validate(
        tree | {"optim": {"warmup_epochs": 5, "schedule_epochs": 9}, "train": {"epochs": 3}}
    )
    assert (
        short.train.epochs == 3
    )  # a run may end before its warm-up does, as the first epochs of a longer one


def test_tokens_biases_and_norms_do_not_decay():
    model = student.create_student(TINY, 16, 10)
    groups = make_optimizer(model, Optim(weight_decay=0.05)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) not in decayed}
    assert {
        "cls_token",
        "dist_token",
        "pos_embed",
        "norm.weight",
        "head.bias",
        "blocks.0.attn.qkv.bias",
    } <= names
    assert not {"head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} & names


def test_the_fused_output_is_what_timm_gives():
    model = student.create_student(TINY, 16, 10).eval()
    images = torch.randn(2, 3, 16, 16)
    logits = student.head_logits(model, images)
    torch.testing.assert_close(logits["fused"], model(images))
    assert not torch.equal(logits["cls"], logits["dist"])


def test_a_saved_model_loads_with_plain_timm(tmp_path):
    model = student.create_student(TINY, 16, 10).eval()
    arguments = student.model_arguments(TINY, 16, 10)
    path = tmp_path / "model.safetensors"
    student.save_model(
        path, model.state_dict(), {"model": TINY.model, "arguments": arguments, "classes": list("0123456789")}
    )
    plain = timm.create_model(TINY.model, checkpoint_path=str(path), **arguments).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(images), model(images))
    assert weights.read_description(path)["classes"][9] == "9"


def test_weights_of_another_size_and_class_count_start_a_student(tmp_path):
    donor = student.create_student(TINY, 16, 10)
    path = tmp_path / "donor.safetensors"
    save_file({k: v.contiguous() for k, v in donor.state_dict().items()}, path)
    larger = student.create_student(TINY.model_copy(update={"init": str(path)}), 32, 7)
    assert larger.head.weight.shape == (7, 48)
    assert larger.pos_embed.shape == (1, 2 + 64, 48)  # 2 tokens and 8 x 8 patches, interpolated from 4 x 4
    torch.testing.assert_close(larger.pos_embed[:, :2], donor.pos_embed[:, :2])
    torch.testing.assert_close(larger.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)
    with pytest.raises(UserError, match=r"student.init: .* another architecture"):
        student.create_student(TINY.model_copy(update={"init": str(path), "width": 24}), 32, 7)
    with pytest.raises(UserError, match=r"student.init: nowhere: no such file"):
        student.create_student(TINY.model_copy(update={"init": "nowhere"}), 32, 7)


def test_an_unknown_model_is_named_with_near_ones():
    with pytest.raises(
        UserError,
        match=r"no model named 'deit_tinny_distilled_patch16_224'; near: .*deit_tiny_distilled_patch16_224",
    ):
        student.create_student(TINY.model_copy(update={"model": "deit_tinny_distilled_patch16_224"}), 16, 10)


def test_a_teacher_of_another_class_count_is_refused(tmp_path, teacher_file):
    section = Distillation(teacher={"weights": teacher_file}).teacher
    assert read_teacher(section, teacher_file, 16, 10).arguments["num_classes"] == 10
    with pytest.raises(UserError, match=r"knows 10 classes, but the data set has 3"):
        read_teacher(section, teacher_file, 16, 3)


def test_a_teacher_sees_images_under_its_own_mean_and_std(teacher_file):
    section = Distillation(teacher={"weights": teacher_file}).teacher
    assert read_teacher(section, teacher_file, 16, 10).mean == [0.5, 0.5, 0.5]  # as its file says
    given = Distillation(teacher={"weights": teacher_file, "mean": [0.1, 0.2, 0.3]}).teacher
    assert read_teacher(given, teacher_file, 16, 10).mean == [0.1, 0.2, 0.3]


def test_a_teachers_weights_under_other_names_load_in_order(tmp_path):
    torch.manual_seed(0)
    donor = timm.create_model("test_resnet", num_classes=10)
    named = {
        f"layer{i:03d}": t for i, (n, t) in enumerate(donor.state_dict().items()) if "num_batches" not in n
    }
    torch.save(named, tmp_path / "foreign.pth")
    section = Distillation(teacher={"weights": str(tmp_path / "foreign.pth"), "model": "test_resnet"}).teacher
    with pytest.raises(UserError, match="do not fit"):  # its head has 10 classes, timm's default 1000
        read_teacher(section, str(tmp_path / "foreign.pth"), 16, 10)
    save_file({k: v.contiguous() for k, v in donor.state_dict().items()}, tmp_path / "own.safetensors")
    section = Distillation(
        teacher={"weights": str(tmp_path / "own.safetensors"), "model": "test_resnet"}
    ).teacher
    found = read_teacher(section, str(tmp_path / "own.safetensors"), 16, 10)
    model = build_teacher(found, torch.device("cpu"))
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.fc.weight, load_file(tmp_path / "own.safetensors")["fc.weight"])


def test_the_moving_average_is_timms_to_the_bit():
    model = timm.create_model("test_resnet", num_classes=3)  # with buffers, some of whole numbers
    averages = [kind(model, decay=0.9, use_warmup=True) for kind in (ModelEmaV3, MovingAverage)]
    for step in range(1, 6):
        model(torch.randn(4, 3, 32, 32))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        for average in averages:
            average.update(model, step=step)
    theirs, ours = (average.module.state_dict() for average in averages)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(ours["conv1.0.weight"], model.state_dict()["conv1.0.weight"])
    assert ours["conv1.1.num_batches_tracked"] == 5
