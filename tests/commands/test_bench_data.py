"""`bench data` finds what limits a run, and says so in one sentence."""

import dataclasses
import re

from deit_ray.commands.bench_data import Limits, bench_data
from tests.conftest import EXPERIMENTS
from tests.support.commands import call
from tests.support.data import write_colours

STARVED = Limits(step_per_s=1000, stream_per_s=400, both_per_s=390, data_wait=0.6, cpus=1, workers=1)
FED = Limits(step_per_s=100, stream_per_s=4000, both_per_s=99, data_wait=0.01, cpus=2, workers=1)


def test_the_sentence_names_the_limit_and_the_cpus_that_would_feed_the_step():
    assert STARVED.by_stream
    assert STARVED.cpus_needed == 3  # 1 x 1000 / 400 = 2.5, and a task keeps a whole CPU busy
    assert STARVED.sentence() == (
        "the stream is the limit: the step takes 1,000 images/s of synthetic data, 1 stream CPU gives 400, "
        "together they train on 390 and wait 60% of the time; "
        "about 3 for each worker would feed it (data.cpus_per_worker)"
    )
    assert not FED.by_stream
    assert FED.cpus_needed == 0.1  # 2 x 100 / 4000 = 0.05
    assert "the step is the limit" in FED.sentence()
    assert "2 stream CPUs give 4,000" in FED.sentence()
    assert dataclasses.replace(STARVED, workers=2, cpus=4).cpus_needed == 5  # 4 x 2.5 CPUs over 2 workers


def test_a_stream_of_large_images_is_found_to_starve_a_small_student(ray_cluster, experiment, tmp_path):
    # an image of 900 x 900 pixels takes tens of milliseconds to decode; a small student trains on thousands
    # of 16 x 16 crops in a second
    uri = str(tmp_path / "noise")
    write_colours(uri, {"train": 72, "test": 1}, size=900)
    exp = experiment("digits_student", {"data.uri": uri, "distillation.kind": "none"})
    found = bench_data(exp, seconds=0.5)
    assert found.by_stream
    assert found.data_wait > 0.5
    assert found.cpus_needed >= 2
    assert found.both_per_s < found.step_per_s


def test_a_large_student_is_found_to_be_the_limit(ray_cluster, experiment):
    # 12 layers of width 384 take a second for a batch of digits; meanwhile the stream decodes thousands
    large = {"student.width": 384, "student.depth": 12, "student.heads": 6, "distillation.kind": "none"}
    found = bench_data(experiment("digits_student", large), seconds=0.5)
    assert not found.by_stream
    assert found.data_wait < 0.5
    assert found.cpus_needed <= 1


def test_the_command_says_what_limits_a_run(ray_cluster, small_file):
    found = call("bench", "data", small_file(), "--seconds", 0.1)
    assert re.match(r"short: the (stream|step) is the limit: the step takes [\d,]+ images/s", found.out), (
        found
    )
    assert found.status == 0


def test_bad_input_of_the_bench_is_one_message(tmp_path):
    data = f"data.uri={tmp_path}/none"
    refused = call("bench", "data", EXPERIMENTS / "digits_student.yaml", "--set", data)
    assert refused.status == 1
    assert refused.error.startswith("error: data.uri: ")
    assert "no prepared data set there" in refused.error
