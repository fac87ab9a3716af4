"""`data check` finds each kind of damage, names it, and suggests the command that repairs it."""

import hashlib
import json
import shlex
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from deit_ray.cli.main import app
from deit_ray.data import shards
from deit_ray.data.check import check
from deit_ray.data.images import encode
from deit_ray.data.prepare import prepare
from deit_ray.errors import UserError
from tests.data.test_prepare import contents, write_source
from tests.support.commands import call
from tests.support.data import write_colours


@pytest.fixture
def prepared(tmp_path):
    prepare(
        write_source(tmp_path / "source", 250),
        str(tmp_path / "out"),
        shard_images=100,
        command="deit-ray data prepare x --out y",
    )
    return tmp_path / "out"


def test_an_undamaged_data_set_is_reported_as_whole(prepared):
    checked = call("data", "check", prepared)
    assert checked.status == 0
    assert "whole: 260 images, all checksums, counts and labels as the manifest says" in checked.out


def test_damage_is_named_with_the_command_that_repairs_it(prepared):
    (prepared / "train-00000.parquet").unlink()
    whole = (prepared / "train-00001.parquet").read_bytes()
    (prepared / "train-00001.parquet").write_bytes(whole[: len(whole) // 2])
    result = CliRunner().invoke(app, ["data", "check", str(prepared)])
    assert result.exit_code == 1
    assert "train-00000.parquet: is missing" in result.output
    sizes = f"({len(whole) // 2} bytes, the manifest says {len(whole)})"
    assert f"train-00001.parquet: its checksum is not the manifest's {sizes}" in result.output
    assert "train-00001.parquet: is not a whole Parquet file" in result.output
    assert "3 problems in 2 shards" in result.output
    assert f"deit-ray data prepare x --out {prepared}" in result.output  # where it is now, not y


def test_the_suggested_command_repairs_the_data_set(tmp_path):
    source, out = write_source(tmp_path / "source", 50), tmp_path / "out"
    arguments = ["data", "prepare", source, "--out", str(out)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    before = contents(out)
    (out / "train-00000.parquet").write_bytes(b"PAR1")
    assert CliRunner().invoke(app, ["data", "check", str(out)]).exit_code == 1
    assert "1 of 2 shards written" in CliRunner().invoke(app, arguments).output
    assert CliRunner().invoke(app, ["data", "check", str(out)]).exit_code == 0
    assert contents(out) == before


def test_the_suggested_command_repairs_a_copy_and_leaves_the_original_alone(tmp_path):
    source, out, copy = write_source(tmp_path / "source", 50), tmp_path / "out", tmp_path / "a copy"
    for option in (["--out", str(out)], [f"--out={out}"]):
        assert call("data", "prepare", source, *option).status == 0
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        before = contents(out)
        (copy / "train-00000.parquet").unlink()
        command = shlex.split(call("data", "check", copy).out.splitlines()[-1])
        assert command[0] == "deit-ray"
        assert call(*command[1:]).status == 0
        assert contents(copy) == contents(out) == before


def test_a_data_set_of_an_earlier_version_is_repaired_with_its_own_settings(tmp_path):
    """Test images were stored as training images are; the command of that time does not say so."""
    source, out = write_source(tmp_path / "source", 50), tmp_path / "out"
    arguments = ["data", "prepare", source, "--out", out]
    assert call(*arguments, "--short-side", 16, "--test-short-side", 16, "--quality", 91).status == 0
    where = out / "manifest.json"
    content = json.loads(where.read_text())
    settings = {"short_side": 16, "quality": 91, "exif": False, "shard_images": shards.SHARD}
    key = {"source": content["source"]["fingerprint"], "seed": 0, "format": shards.FORMAT, **settings}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()  # as version 0.1 did
    assert content["made_by"]["key"] == digest[:16]
    assert not {"chroma", "test_short_side"} & content["made_by"].keys()
    content["made_by"]["command"] = shlex.join(map(str, ["deit-ray", *arguments, "--quality=91"]))
    where.write_text(json.dumps(content))
    before = contents(out)
    (out / "test-00000.parquet").unlink()
    command = shlex.split(call("data", "check", out).out.splitlines()[-1])
    assert command[-5:] == ["--quality=91", "--short-side", "16", "--test-short-side", "16"]
    assert call(*command[1:]).status == 0
    assert contents(out) == before


def test_images_labels_and_counts_are_checked(tmp_path):
    """Damage from before the checksums were computed: files match the manifest, their content is wrong."""
    write_colours(str(tmp_path), {"train": 60, "test": 10})
    image = encode(np.zeros((20, 20, 3), np.uint8), 0, 90)
    rows = [(b"broken" if i == 5 else image, 7 if i == 6 else i % 3, f"image-{i}") for i in range(60)]
    splits, counts = shards.write_split(str(tmp_path), "train", rows)
    manifest = shards.read_manifest(str(tmp_path))
    shards.write_manifest(
        str(tmp_path), manifest.classes, manifest.splits | {"train": splits}, manifest.class_counts, {}
    )
    assert counts[7] == 1
    assert check(str(tmp_path)).problems == [
        "train-00000.parquet: image-5: cannot be decoded",
        "train-00000.parquet: image-6: label 7 is not in 0 to 2",
    ]


def test_counts_that_differ_from_the_manifest_are_named(tmp_path):
    write_colours(str(tmp_path), {"train": 60, "test": 10})
    where = tmp_path / "manifest.json"
    content = json.loads(where.read_text())
    content["class_counts"]["train"][1] = 21
    where.write_text(json.dumps(content))
    checked = check(str(tmp_path))
    assert checked.problems == ["train: has 20 images of b, the manifest says 21"]
    assert "no shard is damaged" in checked.verdict()


def test_data_is_checked_over_a_cluster(prepared, ray_cluster):
    checked = check(str(prepared), address="local")
    assert (checked.images, checked.problems) == (260, [])


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="no prepared data set there"):
        check(str(tmp_path))
