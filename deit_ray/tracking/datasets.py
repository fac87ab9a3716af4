"""The data sets of a run, as MLflow shows them beside the run."""

import json
from dataclasses import dataclass

from deit_ray import storage

DIGEST_CHARS = 36  # MLflow's limit
CONTEXTS = {"train": "training", "val": "validation", "test": "test"}  # MLflow's words, by split


@dataclass(frozen=True)
class Dataset:
    """A split of a prepared data set. MLflow stores two of equal name and digest once.

    Attributes:
        name: name of the data set and the split.
        digest: identifies the images: the manifest's fingerprint, and the part that is held out.
        uri: where the data set is.
        split: train, val or test.
        rows: number of images; None if it is not known.
    """

    name: str
    digest: str
    uri: str
    split: str
    rows: int | None = None

    @classmethod
    def of(cls, uri: str, fingerprint: str, split: str, holdout: float, rows: int | None) -> "Dataset":
        """A split of the data set at a URI.

        Args:
            fingerprint: of the manifest.
            holdout: the fraction of the training images that is `val`.
        """
        part = f"-{holdout:g}" if holdout and split != "test" else ""
        digest = fingerprint[: DIGEST_CHARS - len(part)] + part
        return cls(f"{uri.rstrip('/').rpartition('/')[2]} {split}", digest, uri, split, rows)

    @property
    def key(self) -> tuple[str, str]:
        """By what MLflow identifies it."""
        return self.name, self.digest

    def as_input(self):
        """The data set as MLflow's `DatasetInput`."""
        from mlflow.data.dataset_source_registry import get_dataset_source_from_json
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag
        from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

        kind = "local" if storage.is_local(self.uri) else self.uri.partition(":")[0]
        source = get_dataset_source_from_json(json.dumps({"uri": storage.absolute(self.uri)}), kind)
        found = MetaDataset(source, self.name, self.digest).to_dict()
        profile = None if self.rows is None else json.dumps({"num_rows": self.rows})
        entity = Entity(**found | {"profile": profile})
        return DatasetInput(entity, [InputTag(MLFLOW_DATASET_CONTEXT, CONTEXTS[self.split])])
