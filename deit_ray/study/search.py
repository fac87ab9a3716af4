"""A study: Optuna proposes, Ray Tune runs, the scheduler stops early, and one database knows it all."""

import contextlib

from deit_ray import storage
from deit_ray.cluster import connect
from deit_ray.errors import Interrupted, UnavailableError, UserError
from deit_ray.experiment.config import Experiment
from deit_ray.results.origin import check_same_inputs, note_origin
from deit_ray.study.driver import Driver
from deit_ray.study.study import Study, naming_database
from deit_ray.terminal.console import Console
from deit_ray.trial.run import check, check_fits, pin_teacher


def tune(
    experiment: Experiment | None,
    address: str | None = None,
    resume: str | None = None,
    console: Console | None = None,
    verbose: bool = False,
    results: str = "results",
    amend: dict | None = None,
) -> "Study":
    """Runs a study to its end.

    Args:
        experiment: what to search; None with `resume`.
        address: of a Ray cluster; by default RAY_ADDRESS, or a local Ray for this study.
        resume: the name of a study that was interrupted, or is to be extended.
        console: what a person sees; by default nothing.
        verbose: shows Ray's own output too.
        results: where the study to resume is.
        amend: dotted keys and values that a resumed study goes on with; see `Study.amend`.

    Returns:
        The study.

    Raises:
        UserError: the experiment cannot run, or has nothing to search.
        Interrupted: by Ctrl-C, or because Ray is gone; the study can be resumed.
        UnavailableError: a disk, data or network is gone; the study can be resumed once that is mended.
    """
    console = console or Console(quiet=True)
    study = Study.open(resume, results) if resume else None
    experiment = study.experiment if study else experiment
    if not experiment.search.space:
        raise UserError(
            f"{experiment.name}: search.space is empty; name what to search, such as optim.lr: {{log: [1e-4, 1e-2]}}"
        )
    if not storage.is_local(experiment.results.uri):
        raise UserError(
            f"results.uri: {experiment.results.uri}: a study's database needs a local path or a shared file system"
        )
    with contextlib.ExitStack() as stack:
        if study:
            stack.enter_context(study.driving())
            study.take_stop_requests()  # of an earlier start
            experiment = study.amended(amend or {})
        ready = check(experiment)
        if study:
            check_same_inputs(study.folder, experiment, ready.manifest.fingerprint, ready.teacher_path)
        with connect.connected(address, verbose, console.warn):
            resources = connect.possible_resources()
            device = check_fits(experiment, resources)
            for key, uri in (("results.uri", experiment.results.uri), ("data.uri", experiment.data.uri)):
                connect.check_reachable(key, uri)
            if study:
                study.amend(amend or {})
            else:
                study = Study.create(experiment := pin_teacher(experiment))
                stack.enter_context(study.driving())
            note_origin(study.folder, experiment, ready.manifest.fingerprint, device, ready.teacher_path)
            how = f"go on with: deit-ray tune --resume {study.name}{storage.results_option(experiment.results.uri)}"
            how += f" --address {address}" if address else ""
            try:
                with naming_database(study.folder):
                    Driver(study, ready, device, resources, console).run()
            except UnavailableError as error:
                raise UnavailableError(
                    f"{study.name}: {error}\nwhat its trials have done is kept; once this is mended, {how}"
                ) from error
            except (KeyboardInterrupt, Interrupted) as error:
                console.close()
                why = str(error) or "interrupted" if connect.is_alive() else "Ray has died"
                raise Interrupted(f"{study.name}: {why}; what its trials have done is kept\n{how}") from error
    return study
