"""A study from start to end: Optuna proposes, Ray Tune runs, and the scheduler stops weak trials early.

Modules that take long to import are imported where they are used, so that a mistake is answered early.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from deit_ray import hints
from deit_ray.data.shards import rows_of
from deit_ray.errors import Interrupted, UnavailableError, UnexpectedError, UserError, explain_os_error
from deit_ray.experiment.config import Experiment
from deit_ray.results.origin import check_numerics, check_same_inputs, note_origin
from deit_ray.terminal.session import Session
from deit_ray.trial.needs import MODULES

if TYPE_CHECKING:
    from deit_ray.study.resume import Preview
    from deit_ray.study.study import Study
    from deit_ray.trial.resolve import Resolved


def tune(experiment: Experiment, session: Session | None = None) -> Study:
    """Runs a study to its end.

    Args:
        experiment: an experiment whose `search.space` is not empty; see `load_experiment`.
        session: see `Session`.

    Raises:
        UserError: the experiment cannot run, or has nothing to search.
        Interrupted: Ctrl-C was pressed, or Ray died; the study can be resumed.
        UnavailableError: a disk, data or network is unavailable; the study can be resumed once it is back.
    """
    session = session or Session()
    check_searchable(experiment)
    from deit_ray.trial.resolve import pin_teacher, pin_tracking, resolve

    experiment = pin_tracking(pin_teacher(experiment), session)
    resolved = resolve(experiment)
    session.warn_of(resolved.notes)
    from deit_ray.study.study import Study
    from deit_ray.trial.launch import check_cluster, check_machine

    check_machine(experiment, session.address)
    with contextlib.ExitStack() as lock, session.connected(MODULES):
        device = check_cluster(experiment)
        study = Study.create(resolved.experiment)
        lock.enter_context(study.driving())
        _drive(study, resolved, device, session)
    return study


def resume_study(
    name: str,
    overrides: dict[str, Any] | None = None,
    more_trials: int = 0,
    session: Session | None = None,
) -> Study:
    """Resumes a study that was interrupted, or extends one that has ended, and runs it to its end.

    Args:
        name: name of the study, such as digits_search-1, or digits_search for the newest.
        overrides: dotted keys and values to change from now on; `Study.amended` says which keys may change.
        more_trials: trials to add to `search.trials`.
        session: see `Session`; the study is looked up in its `results`.

    Raises:
        UserError: there is no such study, it is running, its data or teacher have changed, a version with
            other numbers has begun it, or an override is refused.
        Interrupted: as for `tune`.
        UnavailableError: as for `tune`.
    """
    from deit_ray.study.study import Study

    session = session or Session()
    study = Study.open(name, session.results)
    check_numerics(study.name, study.folder)
    overrides = _with_more_trials(study, overrides, more_trials)
    check_searchable(study.experiment)
    with study.driving():
        study.take_stop_requests()  # requests to an earlier driver
        experiment = study.amended(overrides)
        from deit_ray.trial.resolve import resolve

        resolved = resolve(experiment, continues=True)
        session.warn_of(resolved.notes)
        from deit_ray.trial.launch import check_cluster, check_machine

        check_same_inputs(study.folder, experiment, resolved.manifest.fingerprint, resolved.teacher_path)
        check_machine(experiment, session.address)
        with session.connected(MODULES):
            device = check_cluster(experiment)
            study.amend(overrides)
            _drive(study, resolved, device, session)
    return study


def plan_resume(
    name: str,
    overrides: dict[str, Any] | None = None,
    more_trials: int = 0,
    session: Session | None = None,
) -> Preview:
    """What `resume_study` would do with each trial of a study; nothing is done.

    Raises:
        UserError: there is no such study, it is running, or an override is refused.
    """
    from deit_ray.study.resume import dry_run
    from deit_ray.study.study import Study

    session = session or Session()
    study = Study.open(name, session.results)
    check_numerics(study.name, study.folder)
    overrides = _with_more_trials(study, overrides, more_trials)
    return dry_run(study, overrides)


def _with_more_trials(study: Study, overrides: dict[str, Any] | None, more_trials: int) -> dict[str, Any]:
    overrides = dict(overrides or {})
    if more_trials:
        overrides["search.trials"] = study.experiment.search.trials + more_trials
    return overrides


def check_searchable(experiment: Experiment) -> None:
    """Refuses an experiment that searches nothing. Raises UserError."""
    if not experiment.search.space:
        raise UserError(
            f"{experiment.name}: search.space is empty; name what to search, such as "
            "optim.lr: {log: [1e-4, 1e-2]}"
        )


def _drive(study: Study, resolved: Resolved, device: str, session: Session) -> None:
    """Runs the open trials of a study; if something fails, the message says how to resume."""
    from deit_ray.cluster import connect
    from deit_ray.study.database import naming_database
    from deit_ray.study.driver import Driver

    experiment = resolved.experiment
    manifest, rows = resolved.manifest, rows_of(resolved.manifest, experiment.data.holdout)
    note_origin(study.folder, experiment, manifest.fingerprint, device, resolved.teacher_path, rows=rows)
    results, address = experiment.results.uri, session.address
    how = hints.command("tune", "--resume", study.name, results=results, address=address)
    kept = "what its trials have done is kept"
    try:
        with naming_database(study.folder):
            Driver(study, resolved, device, connect.possible_resources(), session.console).run()
    except (UnavailableError, OSError) as error:
        reason = error if isinstance(error, UserError) else explain_os_error(error)
        raise UnavailableError(
            f"{study.name}: {reason}\n{kept}; once this is fixed, resume with: {how}"
        ) from error
    except (KeyboardInterrupt, Interrupted) as error:
        why = str(error) or "interrupted"
        if not connect.is_alive():
            why = "Ray has died"
        raise Interrupted(f"{study.name}: {why}; {kept}\nresume with: {how}") from error
    except UserError:
        raise
    except Exception as error:
        raise UnexpectedError(f"{study.name}: ended unexpectedly; {kept}\nresume with: {how}") from error
