"""A study's Optuna database: a SQLite file in the study's folder, or a log of objects on an object store."""

import contextlib
from collections.abc import Iterator

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage, JournalStorage

from deit_ray import storage
from deit_ray.errors import UnavailableError
from deit_ray.results import lease, lock
from deit_ray.study.object_log import ObjectLog

DATABASE = "study.db"
LOG = "study.log"  # a folder


def is_study(folder: str) -> bool:
    """Whether a folder is a study's."""
    return storage.exists(storage.join(folder, DATABASE if storage.is_local(folder) else LOG))


class StudyDatabase:
    """The database of one study. Reading changes nothing.

    Args:
        folder: the study's folder.
        name: the study's name.

    Attributes:
        place: the database, as Optuna's functions take it.
        optuna: the Optuna study.
    """

    def __init__(self, folder: str, name: str):
        self.folder, self.name = folder, name
        self.log: ObjectLog | None = None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with naming_database(folder):
            if storage.is_local(folder):
                self.place: str | BaseStorage = f"sqlite:///{storage.join(folder, DATABASE)}"
            else:
                storage.check_boto3(folder)
                self.log = ObjectLog(storage.join(folder, LOG), name)
                if not is_study(folder):
                    self.log.begin_writing()
                self.place = JournalStorage(self.log)
            self.optuna = _load_or_create(name, self.place)

    @contextlib.contextmanager
    def driving(self) -> Iterator[None]:
        """Only this process drives the study and writes its database.

        Raises:
            UserError: another process drives it.
            UnavailableError: the folder cannot be written.
        """
        if self.log is None:
            with lock.driving(self.folder, self.name):
                yield
            return
        with lease.driving(self.folder, self.name, lambda: self.log.position) as entries:
            self.log.begin_writing(entries)
            try:
                yield
            finally:
                self.log.end_writing()

    def as_one(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, the driver's writes to an object store are collected, to be one object."""
        return contextlib.nullcontext() if self.log is None else self.log.as_one()

    def driver(self) -> dict | None:
        """The process that drives the study now: its host, pid and start time; None if there is none."""
        return (lock if self.log is None else lease).driver_of(self.folder)


def _load_or_create(name: str, place: str | BaseStorage) -> optuna.Study:
    """The Optuna study in a database, which reading does not change.

    It has the name that its folder had when it was made; people rename folders. There is none if the driver
    was killed before it began: then it is made.
    """
    names = optuna.get_all_study_names(place)
    if not names:
        return optuna.create_study(study_name=name, storage=place, direction="maximize", load_if_exists=True)
    return optuna.load_study(study_name=name if name in names else names[0], storage=place)


@contextlib.contextmanager
def naming_database(folder: str) -> Iterator[None]:
    """Names the database in the message if a study's database cannot be used."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", cause)).splitlines()[0]
        raise UnavailableError(f"{storage.join(folder, DATABASE)}: cannot be used: {reason}") from error


def copy_database(database: StudyDatabase, path: str) -> None:
    """Copies a study's Optuna study into a SQLite file on this machine, for Optuna's own tools."""
    optuna.copy_study(
        from_study_name=database.optuna.study_name,
        from_storage=database.place,
        to_storage=f"sqlite:///{path}",
        to_study_name=database.name,
    )
