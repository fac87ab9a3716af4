"""Weights of another model start a student: other tokens, classes and sizes, and training scripts' files."""

import argparse
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2

from deit_ray.errors import UserError
from deit_ray.experiment.config import Student
from deit_ray.models.student import create_student, head_logits

DISTILLED, PLAIN = "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"
SHAPE = {"patch_size": 4, "width": 12, "depth": 2, "heads": 2, "drop_path": 0.0}
SMALL = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "img_size": 16, "num_classes": 5}
IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def started(tmp_path):
    """Makes a student that starts with the weights of another model."""

    def start(donor: dict, model: str, size: int = 16, classes: int = 5, **shape):
        save_file({name: tensor.contiguous() for name, tensor in donor.items()}, tmp_path / "w.safetensors")
        section = Student(model=model, init=str(tmp_path / "w.safetensors"), **{**SHAPE, **shape})
        return create_student(section, size, classes).eval()

    return start


def random_model(name: str, **arguments) -> torch.nn.Module:
    """A model whose tokens and places are far from zero, so that a mistake with them shows."""
    torch.manual_seed(1)
    model = timm.create_model(name, **SMALL | arguments).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("name", "arguments"), [(PLAIN, {}), ("vit_tiny_patch16_224", {}), (PLAIN, {"no_embed_class": True})]
)
def test_a_plain_transformer_starts_a_distilled_one_with_two_equal_tokens(started, name, arguments):
    """A distilled transformer of equal tokens whose keys count once each would be the plain one."""
    donor = random_model(name, **arguments)
    student = started(donor.state_dict(), DISTILLED)
    logits = head_logits(student, IMAGES)
    torch.testing.assert_close(logits["cls"], logits["dist"])
    features = student.forward_features(IMAGES)
    torch.testing.assert_close(features[:, 0], features[:, 1])
    # the class token is given twice, so its key counts twice: the plain model with a mask that says so
    twice = torch.zeros(1, 1, 1, 17)
    twice[..., 0] = math.log(2)
    torch.testing.assert_close(logits["fused"], plain_logits(donor, twice), rtol=1e-4, atol=1e-4)
    assert (logits["fused"] - donor(IMAGES)).abs().max() > 1e-3  # the mask is needed


def plain_logits(model, mask: torch.Tensor) -> torch.Tensor:
    """The logits of a transformer whose attention logits have a mask added."""
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(IMAGES))))
    for block in model.blocks:
        tokens = block(tokens, attn_mask=mask)
    return model.forward_head(model.norm(tokens))


@pytest.mark.parametrize("arguments", [{}, {"no_embed_class": True}])
def test_a_distilled_transformer_starts_a_plain_one_without_its_token(started, arguments):
    donor = random_model(DISTILLED)
    own = donor.state_dict()
    student = started(own, PLAIN)
    torch.testing.assert_close(student.cls_token, own["cls_token"])
    torch.testing.assert_close(
        student.pos_embed, torch.cat([own["pos_embed"][:, :1], own["pos_embed"][:, 2:]], 1)
    )
    torch.testing.assert_close(student.head.weight, own["head.weight"])
    again = started(student.state_dict(), DISTILLED)
    torch.testing.assert_close(again.blocks[1].mlp.fc1.weight, own["blocks.1.mlp.fc1.weight"])


def test_positions_are_interpolated_and_heads_are_new(started):
    donor = random_model(DISTILLED)
    student = started(donor.state_dict(), DISTILLED, size=24, classes=7)
    places = donor.pos_embed[:, 2:].reshape(1, 4, 4, 12).permute(0, 3, 1, 2)
    larger = F.interpolate(places, size=(6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(student.pos_embed[:, :2], donor.pos_embed[:, :2])
    torch.testing.assert_close(student.pos_embed[:, 2:], larger.flatten(2).transpose(1, 2))
    for head in (student.head, student.head_dist):
        assert head.weight.shape == (7, 12)
        assert head.weight.abs().max() < 0.1  # five standard deviations of 0.02
        assert not head.bias.any()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit", "tf_efficientnet_lite0"])
def test_a_new_head_starts_at_the_loss_of_guessing(tmp_path, name):
    """ln 10 = 2.30 with ten classes. timm's own first head of an EfficientNet has a deviation of 0.18."""
    torch.manual_seed(0)
    donor = timm.create_model(name, num_classes=50).eval()
    save_file(
        {name: tensor.contiguous() for name, tensor in donor.state_dict().items()}, tmp_path / "w.safetensors"
    )
    size = donor.pretrained_cfg["input_size"][-1]
    student = create_student(
        Student(model=name, init=str(tmp_path / "w.safetensors"), drop_path=0.0), size, 10
    ).eval()
    head = student.get_classifier()
    assert head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not head.bias.any()
    features = torch.full((64, head.in_features), 1.0).exponential_()  # as large as trained features are
    loss = F.cross_entropy(head(features), torch.arange(64) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.5)
    if "efficientnet" in name:
        fresh = timm.create_model(name, num_classes=10).get_classifier()
        assert fresh.weight.std().item() > 0.1
    backbone = [n for n in student.state_dict() if n.split(".")[0] not in ("head", "fc", "classifier")]
    assert all(torch.equal(student.state_dict()[n], donor.state_dict()[n]) for n in backbone)


def test_layer_scale_is_read_and_never_lost(started):
    donor = random_model(PLAIN, init_values=1e-3)
    names = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}  # as DeiT III's own files name them
    theirs = {}
    for name, tensor in donor.state_dict().items():
        for ours, reference in names.items():
            name = name.replace(ours, reference)
        theirs[name] = tensor
    student = started(theirs, PLAIN, layer_scale=1e-6)
    torch.testing.assert_close(student(IMAGES), donor(IMAGES))
    with pytest.raises(UserError, match=r"they have LayerScale \(.*gamma\); set student\.layer_scale"):
        started(theirs, PLAIN)
    with pytest.raises(UserError, match=r"leave out student\.layer_scale"):
        started(random_model(PLAIN).state_dict(), PLAIN, layer_scale=1e-6)


def test_the_checkpoints_of_timms_and_the_references_training_are_read_safely(tmp_path):
    """The files of timm's CheckpointSaver and of the reference's main.py: the average is taken."""
    model, average = random_model(DISTILLED), random_model(DISTILLED).requires_grad_(False)
    average.cls_token.mul_(2)
    optimizer = create_optimizer_v2(model, "adamw")
    model(IMAGES).sum().backward()
    optimizer.step()
    args = argparse.Namespace(
        model=DISTILLED, lr=5e-4, distributed=True, aa="rand-m9-mstd0.5-inc1", crop_pct=None
    )
    files = {
        "timm": {"epoch": 3, "arch": DISTILLED, "state_dict": model.state_dict(), "args": args, "version": 2,
                 "optimizer": optimizer.state_dict(), "amp_scaler": {"scale": 65536.0},
                 "state_dict_ema": average.state_dict(), "metric": 74.5},
        "reference": {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3,
                      "lr_scheduler": {"warmup_t": 5}, "model_ema": average.state_dict(),
                      "scaler": {"scale": 65536.0}, "args": args},
    }  # fmt: skip
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        section = Student(model=DISTILLED, init=str(tmp_path / name), **SHAPE)
        torch.testing.assert_close(create_student(section, 16, 5).eval()(IMAGES), average(IMAGES))
        args.hook = print
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=r"has builtins\.print beside the tensors, which may run code"):
            create_student(section, 16, 5)
        del args.hook
