"""The models of a run as MLflow must have them, and what is known about them there: immutable values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Weights:
    """The best student of a run that has finished: it becomes MLflow's model of the run.

    Attributes:
        uri: of its model.safetensors.
        version: names these weights among all that the run has ever had, such as epoch-12: a run that was
            continued gets another model.
    """

    uri: str
    version: str


@dataclass(frozen=True)
class Best:
    """The model of a study's best trial, which MLflow has: it is registered under the study's name.

    Attributes:
        identity: of the model; the registered version has it too.
        model_id: MLflow's id of the model.
        location: URI of the model's files.
        run_id, run_name: MLflow's id and name of the trial's run.
        tags: of the version, such as the trial's number.
    """

    identity: str
    model_id: str
    location: str
    run_id: str
    run_name: str
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class FoundModel:
    """The model of a run as MLflow has it: the server's answer, with everything that was delivered since.

    Attributes:
        id: MLflow's id of the model; None if MLflow has none.
        location: URI of its files.
        is_ready: whether MLflow says that it is whole.
        is_uploaded: whether its files were uploaded since.
        is_linked: whether the run lists it as its output.
        metrics: (name, value) of its metrics.
        others: ids of further models of the identity, which are deleted.
        has_file: whether there is a model.safetensors, as far as that was looked for.
    """

    id: str | None = None
    location: str = ""
    is_ready: bool = False
    is_uploaded: bool = False
    is_linked: bool = False
    metrics: frozenset[tuple[str, float]] = frozenset()
    others: tuple[str, ...] = ()
    has_file: bool = True


@dataclass(frozen=True)
class Version:
    """A version of a registered model: its number, and the identity and MLflow's id of its model."""

    number: str
    identity: str
    model_id: str


@dataclass(frozen=True)
class Registered:
    """A study's registered model as MLflow has it, with everything that was delivered since.

    Attributes:
        name: the study's name, or a longer one if that is taken by another study.
        exists: whether it exists.
        versions: those that this package made.
        best: number of the version that has the alias `best`; None if none has it.
        versions_tag: the best model's tag that names its versions, from which MLflow's UI links them.
        is_linked: whether the study's run lists the best model as its output.
    """

    name: str
    exists: bool = False
    versions: tuple[Version, ...] = ()
    best: str | None = None
    versions_tag: str = ""
    is_linked: bool = False
