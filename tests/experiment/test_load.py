"""Experiment files: allowed values are loaded, others are refused in one message that says where and why."""

import pytest

from deit_ray.errors import UserError
from deit_ray.experiment.load import dump_experiment, load_experiment, parse_override, parse_overrides
from tests.conftest import EXPERIMENTS

MINIMAL = "data: {uri: somewhere}\ndistillation: {kind: none}\n"


def write(tmp_path, text: str, name: str = "x.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "path",
    sorted(EXPERIMENTS.glob("*_*er.yaml")) + sorted(EXPERIMENTS.glob("*_search.yaml")),
    ids=lambda p: p.stem,
)
def test_every_shipped_experiment_loads(path):
    assert load_experiment(path).name == path.stem


def test_a_written_experiment_reads_back_equal(tmp_path):
    experiment = load_experiment(EXPERIMENTS / "digits_search.yaml", {"optim.clip_grad": 1.0})
    assert load_experiment(write(tmp_path, dump_experiment(experiment, "a comment"))) == experiment


def test_a_file_replaces_its_ancestors_values_key_by_key(tmp_path):
    write(tmp_path, MINIMAL + "optim: {lr: 0.5, min_lr: 0.25}\n", "base.yaml")
    experiment = load_experiment(write(tmp_path, "extends: base.yaml\noptim: {lr: 1e-3}\n"))
    assert (experiment.optim.lr, experiment.optim.min_lr, experiment.name) == (1e-3, 0.25, "x")


def test_an_override_beats_the_file():
    assert load_experiment(EXPERIMENTS / "digits_student.yaml", {"optim.lr": 1e-3}).optim.lr == 1e-3


def test_override_values_are_read_as_yaml():
    assert parse_override("optim.lr=1e-3") == ("optim.lr", 1e-3)
    assert parse_override("data.crop_scale=[0.5, 1]") == ("data.crop_scale", [0.5, 1])
    with pytest.raises(UserError, match="must be KEY=VALUE"):
        parse_override("optim.lr")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: {lrr: 1}", ["x.yaml: optim.lrr", "did you mean optim.lr"]),
        ("optim: {lr: fast}", ["x.yaml: optim.lr", "'fast'", "valid number"]),
        ("optim: {lr: -1}", ["x.yaml: optim.lr", "-1", "greater than 0"]),
        ("optim: {lr: .nan}", ["x.yaml: optim.lr", "finite"]),
        ("train: {epochs: 3.5}", ["x.yaml: train.epochs", "3.5", "integer"]),
        ("train: {epochs: true}", ["x.yaml: train.epochs", "True", "integer"]),
        ("augment: {strength: 3}", ["x.yaml: augment.strength", "3", "less than or equal to 2"]),
        ("augment: {place: gpu}", ["x.yaml: augment.place", "'gpu'", "'auto', 'stream' or 'device'"]),
        ("data: {uri: d, crop_scale: [0.9, 0.1]}", ["x.yaml: data.crop_scale", "[0.9, 0.1]"]),
        ("train: {batch_size: 10, workers: 3}", ["train.batch_size", "10", "divisible by train.workers (3)"]),
        (
            "train: {gpus_per_worker: 0.5, workers: 2}",
            ["train.gpus_per_worker", "0.5", "train.workers 1, not 2"],
        ),
        ("train: {gpus_per_worker: 2}", ["x.yaml: train.gpus_per_worker", "2", "less than or equal to 1"]),
        ("train: {epochs: 2}\noptim: {warmup_epochs: 2}", ["optim.warmup_epochs", "2", "below train.epochs"]),
        ("distillation: {kind: hard}", ["distillation.teacher", "missing"]),
        ("search: {space: {optim.lrr: {log: [1e-4, 1e-2]}}}", ["search.space.optim.lrr", "no such key"]),
        (
            "search: {space: {augment.strength: {float: [0, 3]}}}",
            ["search.space.augment.strength", "3", "equal to 2"],
        ),
        ("search: {space: {optim.lr: {log: [0, 1]}}}", ["search.space.optim.lr", "[0, 1]", "above 0"]),
        ("search: {space: {optim.lr: {log: [1, 0.5]}}}", ["search.space.optim.lr", "low below high"]),
        ("search: {space: {optim.lr: [1, 2]}}", ["search.space.optim.lr", "exactly one of"]),
        ("search: {space: {distillation.weight: {float: [0, 1]}}}", ["distillation.weight", "kind is none"]),
        ("search: {space: {distillation.kind: {choice: [none, warm]}}}", ["distillation", "kind"]),
        (
            "search: {space: {train.batch_size: {choice: [64, 63]}}}\ntrain: {workers: 2}",
            ["train.batch_size", "63"],
        ),
        ("search: {space: {data.uri: {choice: [a, b]}}}", ["search.space.data.uri", "cannot be searched"]),
        (
            "search: {metric: test/top1, space: {optim.lr: {log: [1e-4, 1]}}}",
            ["search.metric", "rank_on_test"],
        ),
        (
            "data: {uri: d, holdout: 0}\nsearch: {space: {optim.lr: {log: [1e-4, 1]}}}",
            ["data.holdout", "no val images"],
        ),
        ("optim: {lr: 1}\noptim: {lr: 2}", ["x.yaml", "'optim' is repeated", "line 4"]),
        ("optim: {lr: !!python/object:os.system x}", ["x.yaml", "python"]),
        ("optim: {lr: [", ["x.yaml", "line"]),
        ("1: 2", ["x.yaml", "must be text"]),
        ("optim: {learning_rate: 1}", ["optim.learning_rate: no such key; did you mean optim.lr?"]),
        ("learning_rate: 1", ["learning_rate: no such key; did you mean optim.lr?"]),
        ("distilation: {kind: none}", ["distilation.kind: no such key; did you mean distillation.kind?"]),
        ("distilation: 1", ["distilation: no such key; did you mean distillation?"]),
        ("optimizer: {lr: 1}", ["optimizer.lr: no such key; did you mean optim.lr?"]),
        ("optimizer: {foo: 1}", ["optimizer: no such key; did you mean optim?"]),
        ("learning_rate: {log: [1, 2]}", ["learning_rate: no such key; did you mean optim.lr?"]),
        ("model: {name: vit}", ["model: no such key; did you mean student.model?"]),
        (
            "teacher: {weights: x}",
            ["teacher.weights: no such key; did you mean distillation.teacher.weights?"],
        ),
        ("optim: {foo: 1}", ["optim.foo: no such key; allowed here: optim.lr, "]),
        ("search: {space: {learning_rate: {log: [1e-4, 1]}}}", ["no such key", "did you mean optim.lr?"]),
        ("optim: {lr: '1e-3'}", ["'1e-3' is not allowed", "write the number without quotes"]),
        ("train: {epochs: 1e2}", ["100.0 is not allowed", "write 100"]),
        ("augment: {policy: off}", ["False is not allowed", "put the word into quotes"]),
        ("name: 5", ["name: 5 is not allowed", "put the text into quotes"]),
        ("name: ../up", ["'../up' is not allowed", "letters, digits, _, . and -"]),
        ("name: größe", ["letters, digits"]),
        (f"name: {'a' * 300}", ["at most 240 characters"]),
        ("seed: 010", ["seed: '010' is not allowed"]),
        ("seed: 1:30", ["seed: '1:30' is not allowed"]),
        ("optim: 5", ["optim: 5 is not allowed: must be a section of keys: lr, scale_lr"]),
        ("optim: {lr: {a: [1, 2]}}", ["{a: [1, 2]} is not allowed"]),
        ("optim:\n\tlr: 1", ["line 4, column 1: a tab; indent with spaces"]),
        ("x: &a {y: *a}", ["x.yaml: not a valid experiment file", "an anchor in itself"]),
        ("extend: base.yaml", ["x.yaml: extend: no such key; did you mean extends?"]),
        ("parent: base.yaml", ["x.yaml: parent: no such key; did you mean extends?"]),
        ("optim: {lr: 0,001}", ["x.yaml", "a comma in a number; write a decimal point, as in 0.5"]),
        ("optim: {lr: 0,5}", ["x.yaml", "a comma in a number; write a decimal point, as in 0.5"]),
        ("optim:\n  lr: 0,001", ["optim.lr: '0,001' is not allowed", "write 0.001: a comma is no part of"]),
        ("train:\n  batch_size: 1,000", ["train.batch_size: '1,000' is not allowed", "write 1000: a comma"]),
        ("optim:\n  lr:0.1", ["optim: 'lr:0.1' is not allowed", "a space is missing after the colon"]),
        (
            "optim:\n  lr: 1\n    ema_decay: 0.5",
            ["x.yaml", "line 5, column 14: a key that is indented further than the key above"],
        ),
        ("optim:\n  lr 1\n  ema_decay: 0.5", ["line 5", "or the line above has no colon"]),
        (
            "optim:\n    lr: 1\n  ema_decay: 0.5",
            ["line 5, column 3: keys of one section must begin in the same"],
        ),
        ("name: a: b", ["line 3, column 8: a second colon; put a value that holds a colon into quotes"]),
        ("name: 'a\nseed: 1", ["a quote is not closed; it begins in line 3"]),
        ("data: {uri: d, crop_scale: [0.5, 1}", ["a bracket is not closed, or a comma is missing"]),
        ("name: @home", ["line 3, column 7: put a value that begins with this character into quotes"]),
        ("name: 'a' b", ["text behind a closing quote"]),
        ("seed: 1\n- b", ["keys and list entries (-) cannot be mixed"]),
        ("optim: {lr: 1}}", ["a closing bracket without an opening one"]),
        ("extends: nowhere.yaml", ["nowhere.yaml: no such file", "x.yaml extends it"]),
        ("extends: [a]", ["extends: must be the path of one file, not [a]"]),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_key_value_and_allowed_values(tmp_path, text, parts):
    rest = [line for line in MINIMAL.splitlines(keepends=True) if line.split(":")[0] != text.split(":")[0]]
    with pytest.raises(UserError) as error:
        load_experiment(write(tmp_path, "".join(rest) + text + "\n"))
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(("text", "what"), [("- 1\n- 2\n", "a list"), ("", "empty"), ("5", "a single value")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, what):
    with pytest.raises(UserError, match=f"a mapping of keys to values.*this one is {what}"):
        load_experiment(write(tmp_path, text))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ((MINIMAL + "name: caf\u00e9\n").encode("latin-1"), "line 3: is not UTF-8; save the file as UTF-8"),
        (MINIMAL.encode() + b"\x00", "special characters are not allowed"),
        (None, "is a folder; name an experiment file"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, said):
    path = tmp_path / "x.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        load_experiment(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff".encode() + MINIMAL.encode() + b"seed: 3\n",
        (MINIMAL + "seed: 3\n").encode("utf-16"),
        (MINIMAL + "seed: 3\n").replace("\n", "\r\n").encode(),
        (MINIMAL + "seed: +3\noptim:\nsearch:\n  budget:\n  # hours: 2\n").encode(),
        b"data: &d {uri: somewhere}\ndistillation: {kind: none}\nseed: 3\noptim: {<<: {lr: 1e-3}, lr: 0.5}\n",
    ],
)
def test_a_file_is_read_as_people_write_it(tmp_path, content):
    path = tmp_path / "2024-01-01.yaml"
    path.write_bytes(content)
    experiment = load_experiment(path)
    assert (experiment.seed, experiment.name) == (3, "2024-01-01")
    assert experiment.optim.lr == (0.5 if b"<<" in content else 5e-4)


def test_a_searched_key_is_set_from_the_command_line(tmp_path):
    key, value = parse_override("search.space.optim.lr={log: [1e-4, 1e-2]}")
    assert list(load_experiment(write(tmp_path, MINIMAL), {key: value}).search.space) == ["optim.lr"]


def test_the_callers_overrides_stay_as_they_are(tmp_path):
    overrides = {"optim": {"lr": 1e-3}, "optim.lr": 2e-3}
    assert load_experiment(write(tmp_path, MINIMAL), overrides).optim.lr == 2e-3
    assert overrides == {"optim": {"lr": 1e-3}, "optim.lr": 2e-3}


def test_files_that_contain_one_another_are_refused(tmp_path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match=r"extend one another: a.yaml -> b.yaml -> a.yaml"):
        load_experiment(tmp_path / "a.yaml")


def test_a_missing_file_is_named_with_the_nearest_one():
    with pytest.raises(
        UserError, match=r"digits_serch.yaml: no such file; did you mean .*digits_search.yaml"
    ):
        load_experiment(EXPERIMENTS / "digits_serch.yaml")


def test_an_error_names_the_file_that_set_the_value(tmp_path):
    write(tmp_path, MINIMAL + "optim: {lr: fast}\n", "base.yaml")
    with pytest.raises(UserError, match=r"base.yaml: optim.lr"):
        load_experiment(write(tmp_path, "extends: base.yaml\ntrain: {epochs: 10}\n"))
    with pytest.raises(UserError, match=r"--set optim.lr: 'slow'"):
        load_experiment(tmp_path / "x.yaml", {"optim.lr": "slow"})


def test_an_override_of_a_section_replaces_its_keys_one_by_one():
    texts = ["optim={lr: 1e-3}", "search={trials: 3, space: {optim.lr: {log: [1e-4, 1e-2]}}}"]
    assert parse_overrides(texts) == {
        "optim.lr": 1e-3,
        "search.trials": 3,
        "search.space": {"optim.lr": {"log": [1e-4, 1e-2]}},
    }
