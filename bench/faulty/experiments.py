"""Cases of bench/faults.py: experiment files, spaces, teachers, weights, splits, names; before Ray starts."""

import json
import re
import shutil
from pathlib import Path

import numpy as np

from bench.faulty.expect import Expected, either, expect, printed, refused
from bench.faulty.inputs import class_folders, packed, scene, write, write_model
from bench.faulty.stage import Stage, case

SMALL = {
    "name": "small",
    "data.image_size": 16,
    "data.crop_scale": [0.8, 1.0],
    "data.flip": 0.0,
    "data.views": 1,
    "data.eval_crop": 1.0,
    "data.cpus_per_worker": 0.25,
    "augment.policy": "none",
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "student.model": "deit_tiny_distilled_patch16_224",
    "student.patch_size": 4,
    "student.width": 16,
    "student.depth": 1,
    "student.heads": 2,
    "student.drop_path": 0.0,
    "distillation.kind": "none",
    "optim.lr": 0.004,
    "optim.scale_lr": False,
    "optim.warmup_epochs": 1,
    "optim.ema_decay": 0.5,
    "train.epochs": 2,
    "train.batch_size": 64,
    "train.device": "cpu",
    "train.cpus_per_worker": 0.75,
    "results.uri": "results",
    "search.grace_epochs": 1,
}
LR = {"optim.lr": {"log": [0.001, 0.01]}}
DEAD_PROXY = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
ADVICE = (
    "weights_only",
    "add_safe_globals",
    "allowlist",
    "torch.load",
    "strict=",
    "pip install",
    "arbitrary code",
)


def write_experiment(stage: Stage, keys: dict | None = None, name: str = "x.yaml") -> str:
    """Writes an experiment of a small model on the digits, with dotted keys replaced; None removes one."""
    tree = {}
    keys = SMALL | {"data.uri": str(stage.shared / "digits")} | (keys or {})
    for key, value in keys.items():
        *path, leaf = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        if value is not None:
            section[leaf] = value
    while (stage / name).exists():
        name = f"x{name}"
    write(stage / name, json.dumps(tree, indent=1))
    return name


def study(space: dict, **keys) -> dict:
    """The keys of a study over a space."""
    return {"search.space": space, "search.trials": 4, "search.sampler": "random"} | keys


def judge(stage: Stage, keys: dict, expected: Expected, commands=("plan",), **options) -> None:
    """Runs commands on an experiment; a mistake must be reported before Ray starts."""
    file = write_experiment(stage, keys)
    for command in commands:
        expect(stage, [command, file], expected, ends_at_ray=command != "plan", **options)


def distilled(weights, **keys) -> dict:
    return {"distillation.kind": "hard", "distillation.teacher": {"weights": str(weights)}} | keys


def teacher_of(stage: Stage) -> Path:
    return stage.shared / "old/results/teacher-1/model.safetensors"


BOTH = ("plan", "tune")


# spaces


@case(
    "space_over_none",
    "checks",
    clip_grad=("optim.clip_grad", {"float": [0.5, 5.0]}),
    depth=("student.depth", {"int": [1, 3]}),
    log=("optim.clip_grad", {"log": [0.1, 10.0]}),
)
def space_over_none(stage: Stage, key: str, values: dict) -> None:
    """A value that is none in the file lies in no range: trial 0 is drawn."""
    judge(stage, study({key: values}, **{key: None}), printed(re.escape(key.split(".")[1])))


@case(
    "space_changes_nothing",
    "checks",
    device=("train.device", {"choice": ["auto", "cpu"]}),
    results=("results.uri", {"choice": ["a", "b"]}),
    name=("name", {"choice": ["a", "b"]}),
    trials=("search.trials", {"int": [2, 9]}),
    tracking=("tracking.experiment", {"choice": ["a", "b"]}),
    log_every=("train.log_every", {"int": [1, 10]}),
    price=("cost.per_gpu_hour", {"float": [1.0, 2.0]}),
    jitter=("augment.randaugment.magnitude", {"float": [1.0, 9.0]}),
    unknown=("optim.learning_rate", {"float": [0.1, 0.2]}),
)
def space_changes_nothing(stage: Stage, key: str, values: dict) -> None:
    """A space that changes nothing in any trial is refused by its key."""
    judge(stage, study({key: values}), refused(re.escape(key)), BOTH if key == "train.device" else ("plan",))


@case(
    "invalid_combinations",
    "checks",
    width=({"student.width": {"int": [15, 33]}}, {"student.heads": 2}),
    batch=({"train.batch_size": {"int": [32, 64]}}, {"train.workers": 2}),
    image_size=({"data.image_size": {"int": [16, 20]}}, {}),
    warmup=({"optim.warmup_epochs": {"int": [0, 6]}}, {}),
    ema=({"optim.ema_decay": {"choice": [0.0, 0.9]}}, {"search.metric": "val/top1_ema"}),
)
def invalid_combinations(stage: Stage, space: dict, keys: dict) -> None:
    """Values that do not fit together, also between the corners: refused by a key, or not drawn."""
    key = next(iter(space))
    judge(stage, study(space, **keys), either(printed(), refused(key.split(".")[1])))


@case(
    "bad_spaces",
    "checks",
    reversed=({"optim.lr": {"float": [1, 0.1]}}, r"optim\.lr"),
    zero=({"optim.lr": {"log": [0, 1.0]}}, r"optim\.lr"),
    empty=({"optim.lr": {"choice": []}}, r"optim\.lr"),
    kind=({"optim.lr": {"uniform": [0, 1]}}, "uniform|choice"),
    number=({"optim.lr": 0.1}, r"optim\.lr"),
    words=({"optim.lr": {"choice": ["fast", "slow"]}}, r"optim\.lr"),
    model=({"student.model": {"choice": ["deit_tny", "vit"]}}, "deit_tny|student.model"),
    depth=({"student.depth": {"int": [0, 3]}}, r"student\.depth"),
    policy=({"augment.policy": {"choice": ["none", "randaugmnt"]}}, "randaugmnt"),
    batch=({"train.batch_size": {"choice": [64, 100_000]}}, "batch_size"),
    section=({"optim": {"choice": [1, 2]}}, "optim"),
)
def bad_spaces(stage: Stage, space: dict, word: str) -> None:
    """Spaces with a mistake are refused by key."""
    judge(stage, study(space), refused(word))


# teachers


@case(
    "teacher_classes",
    "checks",
    permuted=(["1", "0", "2", "3", "4", "5", "6", "7", "8", "9"], "0", "1"),
    renamed=([*"012345678", "nine"], "9", "nine"),
    text=(["zero", *"123456789"], "0", "zero"),
)
def teacher_classes(stage: Stage, classes: list, one: str, other: str) -> None:
    """A teacher, or a model to evaluate, of as many classes in another order or of other names."""
    file = write_model(teacher_of(stage), stage / "teacher.safetensors", classes=classes)
    named = refused("class", one, other)
    said = printed("class.*names")  # numbers and words cannot be compared
    judge(stage, distilled(file), either(named, printed("order|permut", one, other), said))
    if classes[0] == "1":
        judge(stage, distilled(file), named, ("train",))
        evaluate = ["evaluate", file, "--data", stage.shared / "digits"]
        expect(stage, evaluate, named, ends_at_ray=True)


@case("teacher_count", "checks", more=(11,))
def teacher_count(stage: Stage, count: int) -> None:
    """A model of another number of classes is refused before Ray starts."""
    file = write_model(
        teacher_of(stage),
        stage / "t.safetensors",
        resize_heads(count),
        classes=[str(i) for i in range(count)],
        arguments={**arguments_of(16), "num_classes": count},
    )
    judge(stage, distilled(file), refused("teacher", str(count), "10"))
    expect(
        stage,
        ["evaluate", file, "--data", stage.shared / "digits"],
        refused(str(count), "10"),
        ends_at_ray=True,
    )


def arguments_of(image_size: int) -> dict:
    return {
        "num_classes": 10,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "img_size": image_size,
    }


def resize_heads(count: int):
    def change(tensors: dict) -> dict:
        heads = [name for name in tensors if name.startswith("head")]
        return tensors | {name: np.resize(tensors[name], (count, *tensors[name].shape[1:])) for name in heads}

    return change


@case("teacher_image_size", "checks", larger=(32,), smaller=(8,))
def teacher_image_size(stage: Stage, size: int) -> None:
    """A transformer as teacher at another image size: said before Ray starts."""
    tokens = (size // 4) ** 2 + 2

    def change(tensors: dict) -> dict:
        return tensors | {"pos_embed": np.resize(tensors["pos_embed"], (1, tokens, 16))}

    file = write_model(
        teacher_of(stage), stage / "t.safetensors", change, image_size=size, arguments=arguments_of(size)
    )
    judge(
        stage,
        distilled(file),
        refused("teacher", str(size), r"\b16\b"),
        ("plan", "train") if size == 32 else ("plan",),
    )


@case(
    "image_size",
    "checks",
    not_divided=({"data.image_size": 18}, "18", "4"),
    patch=({"student.patch_size": 5}, "16", "5"),
    default_patch=({"student.patch_size": None, "data.image_size": 40}, "40", "16"),
)
def image_size(stage: Stage, keys: dict, *words: str) -> None:
    """An image size that the patch does not divide is refused."""
    judge(stage, keys, refused("image_size|patch", *words), ("plan", "train") if "18" in words else ("plan",))


@case("teacher_at_chance", "checks", plan=("plan",))
def teacher_at_chance(stage: Stage, command: str) -> None:
    """plan warns of a teacher whose own test accuracy is that of chance."""
    shutil.copytree(stage.shared / "old/results/teacher-1", stage / "results/weak-1")
    run = json.loads((stage / "results/weak-1/run.json").read_text())
    run["metrics"] |= {"test/top1": 0.1, "val/top1": 0.1, "test/top1_ema": 0.1}
    write(stage / "results/weak-1/run.json", json.dumps(run))
    judge(
        stage,
        distilled("run:weak"),
        printed(r"warning.*teacher|teacher.*(chance|guess|0\.1000|10\.0 ?%)"),
        (command,),
    )


# weights


def broken_weights(stage: Stage, how: str) -> str:
    source = teacher_of(stage).read_bytes()
    name = {
        "cut": "cut.safetensors",
        "html": "model.pth",
        "empty": "empty.safetensors",
        "numpy": "numpy.pth",
        "foreign": "foreign.safetensors",
        "folder": "folder.safetensors",
    }[how]
    path = stage / name
    if how == "cut":
        write(path, source[: len(source) // 2])
    elif how in ("html", "empty"):
        write(path, {"html": "<html>404</html>", "empty": ""}[how])
    elif how == "foreign":
        from safetensors.numpy import save_file

        save_file({"layer.weight": np.ones((3, 3), np.float32)}, path)
    elif how == "folder":
        path.mkdir()
        write(path / "readme", "x")
    else:
        import torch

        torch.save({"model": {"head.weight": torch.ones(3, 4)}, "accuracy": np.float64(0.5)}, path)
    return name


@case(
    "broken_weights",
    "checks",
    **{how: (how,) for how in ("cut", "html", "empty", "numpy", "foreign", "folder")},
)
def broken(stage: Stage, how: str) -> None:
    """Broken or foreign weights: key and file in one sentence, wherever weights are named."""
    file = broken_weights(stage, how)
    named = refused(re.escape(file), never=ADVICE)
    teacher = distilled(file) | {
        "distillation.teacher": {"weights": file, "model": "deit_tiny_distilled_patch16_224"}
    }
    judge(stage, teacher, refused("distillation.teacher", re.escape(file), never=ADVICE))
    write(stage / "x.png", packed(scene(1)))
    expect(stage, ["predict", file, "x.png"], named)
    if how in ("cut", "numpy"):
        judge(stage, {"student.init": file}, refused("student.init", re.escape(file), never=ADVICE))
        expect(stage, ["evaluate", file, "--data", stage.shared / "digits"], named, ends_at_ray=True)


@case(
    "no_network",
    "checks",
    teacher=(
        {"distillation.kind": "hard", "distillation.teacher": {"weights": "pretrained", "model": "resnet18"}},
    ),
    student=(
        {
            "student.init": "pretrained",
            "student.model": "vit_tiny_patch16_224",
            "student.patch_size": None,
            "student.width": None,
            "student.depth": None,
            "student.heads": None,
            "data.image_size": 32,
        },
    ),
)
def no_network(stage: Stage, keys: dict) -> None:
    """Named weights without a network: one sentence with the way offline, within 20 s."""
    unreachable = refused("pretrained", "network|download|reach|offline|connect|fetch")
    sooner = refused("pretrained", "1000 classes")
    judge(stage, keys, either(unreachable, sooner), env=DEAD_PROXY, within_s=60)


@case("other_deit_weights", "checks", plain_into_distilled=(True,), distilled_into_plain=(False,))
def other_deit_weights(stage: Stage, into_distilled: bool) -> None:
    """Plain DeiT weights into a distilled student, and back: loaded, or refused by name."""

    def plain(tensors: dict) -> dict:
        kept = {name: value for name, value in tensors.items() if "dist" not in name}
        return kept | {"pos_embed": np.delete(tensors["pos_embed"], 1, axis=1)}

    keep = plain if into_distilled else dict
    name = "deit_tiny_patch16_224" if into_distilled else "deit_tiny_distilled_patch16_224"
    write_model(teacher_of(stage), stage / "other.safetensors", keep, model=name)
    student = "deit_tiny_distilled_patch16_224" if into_distilled else "deit_tiny_patch16_224"
    keys = {"student.model": student, "student.init": "other.safetensors"}
    judge(
        stage,
        keys,
        either(
            printed(),
            refused("student.init", "other.safetensors", "dist|token", never=("invalid for input",)),
        ),
    )


# splits and metrics


@case("no_val", "checks", zero=(0.0,), rounds_to_none=(0.0001,))
def no_val(stage: Stage, holdout: float) -> None:
    """A study without val images is refused; a run is not."""
    judge(stage, study(LR, **{"data.holdout": holdout}), refused("holdout"), BOTH)
    if holdout == 0:
        judge(stage, {"data.holdout": holdout}, printed())


@case(
    "unmeasured_metric",
    "checks",
    top5=("val/top5", {}),
    one_head=("val/top1_dist", {"student.model": "deit_tiny_patch16_224"}),
    cls=("val/top1_cls", {"student.model": "vit_tiny_patch16_224"}),
    ema=("val/top1_ema", {"optim.ema_decay": 0.0}),
)
def unmeasured_metric(stage: Stage, metric: str, keys: dict) -> None:
    """A metric that is never measured is refused at the start."""
    if metric == "val/top5":
        class_folders(stage / "mine", "abc", each=40)
        stage.setup("data", "prepare", "mine", "--out", "three")
        keys = {"data.uri": "three"}
    judge(stage, study(LR, **{"search.metric": metric}, **keys), refused(r"search\.metric", metric), BOTH)


@case("unmeasured_metric", "checks", searched_model=("val/top1_dist",))
def unmeasured_in_space(stage: Stage, metric: str) -> None:
    """A metric that some trials would never measure."""
    models = ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"]
    space = {"student.model": {"choice": models}}
    judge(
        stage,
        study(space, **{"search.metric": metric}),
        refused(r"search\.metric|student\.model", "deit_tiny_patch16_224|top1_dist"),
    )


@case("wrong_split", "checks", unknown=("validation",), upper=("TEST",), empty=("",))
def wrong_split(stage: Stage, split: str) -> None:
    """A split that does not exist is an error, before Ray starts."""
    words = ["evaluate", teacher_of(stage), "--data", stage.shared / "digits", "--split", split]
    expect(stage, words, refused("split", "test|val"), ends_at_ray=True)


# files and keys


@case(
    "unknown_key",
    "checks",
    learning_rate=("optim.learning_rate=1", r"optim\.lr\b"),
    batchsize=("train.batchsize=8", "batch_size"),
    wd=("optim.weightdecay=0.1", "weight_decay"),
    num_epochs=("train.num_epochs=3", r"train\.epochs"),
    lr_at_top=("lr=0.1", r"optim\.lr\b"),
    mixup=("augment.mix_up=1", "mixup"),
    section=("optimizer.lr=0.1", r"optim\b"),
)
def unknown_key(stage: Stage, override: str, suggestion: str) -> None:
    """An unknown key is refused with the key that is meant."""
    file = write_experiment(stage)
    key = re.escape(override.partition("=")[0].partition(".")[0])
    expect(stage, ["plan", file, "--set", override], refused(key, suggestion, never=("clip_grad",)))


FILES = {
    "empty": ("", "empty|name|missing|mapping"),
    "list": ("- name: x\n- seed: 1\n", "mapping|key"),
    "tab": ("name: x\n\tseed: 1\n", "tab|line 2|YAML"),
    "twice": ("name: x\ndata: {uri: d}\nseed: 1\nseed: 2\n", "twice|again|duplicate|repeat"),
    "latin1": ("name: caf\udce9\n", "UTF-8|encod|text"),
    "loop": ("extends: x.yaml\nname: x\n", "extends|itself|loop"),
    "missing_base": ("extends: base.yaml\nname: x\n", r"base\.yaml"),
    "python_tag": ("name: !!python/object/apply:os.getcwd []\n", "tag|python|YAML"),
    "two_documents": ("name: x\n---\nname: y\n", "document|YAML|one"),
    "number_name": ("name: 5\ndata: {uri: d}\n", "name"),
}


@case("experiment_file", "checks", **FILES)
def experiment_file(stage: Stage, content: str, word: str) -> None:
    """A file with a mistake is refused with its name and the mistake."""
    write(stage / "x.yaml", content.encode(errors="surrogateescape"))
    expect(stage, ["plan", "x.yaml"], refused(r"x\.yaml|base\.yaml", word))


@case(
    "not_a_file",
    "checks",
    folder=("folder",),
    missing=("gone.yaml",),
    image=("x.png",),
    model=("model.safetensors",),
)
def not_a_file(stage: Stage, name: str) -> None:
    """What is no experiment file is refused by name."""
    (stage / "folder").mkdir()
    write(stage / "x.png", b"\x89PNG\r\n\x1a\n\0\0\0")
    write(stage / "model.safetensors", teacher_of(stage).read_bytes())
    expect(stage, ["plan", name], refused(re.escape(name)))


@case("unprepared_data", "checks", images=("mine",), missing=("gone",), file=("x.txt",))
def unprepared_data(stage: Stage, uri: str) -> None:
    """Data that is not prepared is refused, with the command that prepares it."""
    class_folders(stage / "mine")
    write(stage / "x.txt", "x")
    judge(stage, {"data.uri": uri}, refused(re.escape(uri), "prepare"), ("plan", "train"))


@case(
    "too_much",
    "checks",
    batch=({"train.batch_size": 4000}, "batch_size"),
    device=({"train.device": "cuda"}, r"train\.device"),
    workers=({"train.workers": 64, "train.batch_size": 64}, "workers|CPU"),
)
def too_much(stage: Stage, keys: dict, word: str) -> None:
    """More than there is: batch, device, workers."""
    judge(stage, keys, refused(word))
