"""Kills at random moments: the same as in bench/chaos.py, but only a few."""

import pytest

from bench.chaos import Chaos


@pytest.mark.timeout(900)
def test_nothing_is_lost_or_doubled_when_worker_driver_and_server_are_killed(
    own_ray, digits, teacher_file, tmp_path
):
    chaos = Chaos(tmp_path, seed=0, trials=3, epochs=3, data=digits, teacher=teacher_file)
    cards = [("worker", "step"), ("driver", "checkpoint"), ("server", "delivery")]
    try:
        chaos.prepare()
        chaos.disturb("disturbed", cards)
    finally:
        chaos.finish()
    assert chaos.kills == [("worker", "step"), ("driver", "checkpoint"), ("server", "delivery")]
    assert chaos.counters.notes == []
