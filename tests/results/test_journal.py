"""The journal has whole segments, and no step twice."""

from deit_ray.results.journal import JournalWriter, iterate_points


def read(uri) -> list[tuple]:
    return [(p.name, p.value, p.step) for p in iterate_points(str(uri))]


def test_points_are_read_back_in_order(tmp_path):
    journal = JournalWriter(str(tmp_path))
    journal.add({"train/loss": 2.0}, 10)
    journal.flush()
    journal.add({"train/loss": 1.0, "val/top1": 0.5}, 20)
    assert read(tmp_path) == [("train/loss", 2.0, 10)]  # points that were not flushed are missing
    journal.flush()
    assert read(tmp_path) == [("train/loss", 2.0, 10), ("train/loss", 1.0, 20), ("val/top1", 0.5, 20)]


def test_a_resumed_run_writes_no_step_again(tmp_path):
    first = JournalWriter(str(tmp_path))
    for step in (10, 20, 30):
        first.add({"train/loss": float(step)}, step)
    first.flush()
    resumed = JournalWriter(str(tmp_path))  # from the checkpoint of step 20
    for step in (30, 40):
        resumed.add({"train/loss": float(step)}, step)
    resumed.flush()
    assert [step for _, _, step in read(tmp_path)] == [10, 20, 30, 40]


def test_old_points_are_flushed_though_nothing_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("deit_ray.results.journal.FLUSH_S", 0.0)
    JournalWriter(str(tmp_path)).add({"train/loss": 1.0}, 10)
    assert read(tmp_path) == [("train/loss", 1.0, 10)]


def test_a_step_that_is_measured_again_keeps_what_was_measured_first(tmp_path):
    first = JournalWriter(str(tmp_path))
    for step, value in ((20, 0.5), (40, 0.6)):
        first.add({"val/top1": value}, step)
        first.flush()
    resumed = JournalWriter(str(tmp_path))  # from a checkpoint before step 20
    resumed.add({"val/top1": 0.51}, 20)
    assert resumed.at(["val/top1"], 20) == {"val/top1": 0.5}
    resumed.add({"val/top1": 0.7}, 60)
    assert resumed.at(["val/top1"], 60) == {"val/top1": 0.7}


def test_a_process_that_outlives_its_kill_doubles_no_point(tmp_path):
    stale, fresh = JournalWriter(str(tmp_path)), JournalWriter(str(tmp_path))
    stale.add({"train/loss": 1.0}, 10)
    fresh.add({"train/loss": 1.0}, 10)
    stale.flush()
    fresh.add({"train/loss": 2.0}, 20)
    fresh.flush()
    stale.add({"train/loss": 2.0}, 20)
    stale.flush()
    assert read(tmp_path) == [("train/loss", 1.0, 10), ("train/loss", 2.0, 20)]
