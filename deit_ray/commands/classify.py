"""The classes of images by a trained model: for `predict`, and for MLflow, which loads this file by its name.

Models that MLflow has name this file as their loader (`tracking/model_files.py`): it must stay where it is.
"""

from typing import Any

import pandas as pd
import torch

from deit_ray.data.listing import Unreadable
from deit_ray.models.weights import load_described
from deit_ray.training.view import EvaluationView

IMAGE, TOP = "image", 5  # the column of the input; classes of each image, unless the parameter `top` says


class Classifier:
    """A trained model on the CPU.

    Args:
        path: of a model.safetensors.

    Attributes:
        view: makes the model's input of an image.

    Raises:
        UserError: deit-ray did not write the file, or it is damaged.
    """

    def __init__(self, path: str):
        self.network, description = load_described(path)
        self.network.eval()
        self.view = EvaluationView(description)

    def classify(self, content: bytes, top: int) -> tuple[list[tuple[str, float]], tuple[str, ...]]:
        """The most likely classes of an image with their probabilities, most likely first; and its remarks.

        Args:
            content: of an image file of any format.
            top: number of classes; all, if there are fewer.

        Raises:
            Unreadable: it is no image.
        """
        view, remarks = self.view.of_file(content)
        with torch.no_grad():
            probabilities = self.network(view[None]).softmax(1)[0]
        likely = probabilities.topk(min(top, len(self.view.classes)))
        pairs = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
        return [(self.view.classes[label], p) for label, p in pairs], remarks


class MlflowModel:
    """What `mlflow.pyfunc.load_model` wraps: a model that gives the answers of `deit-ray predict`."""

    def __init__(self, path: str):
        self.classifier = Classifier(path)

    def predict(self, images: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row for each image; an image that cannot be read costs only its own answer.

        Args:
            images: with the column `image`, the bytes of image files.
            params: `top`, the number of classes of each image.

        Returns:
            The columns `class` and `probability`, of the most likely class; `classes` and `probabilities`,
            lists of the `top` most likely ones, most likely first; and `problem`, why an image cannot be
            read: then there are no classes. Elsewhere it is None.
        """
        top = max(1, (params or {}).get("top", TOP))
        rows = [self._answer(content, top) for content in images[IMAGE]]
        # objects, so that what is missing is None: JSON has no NaN
        return pd.DataFrame(rows, index=images.index, columns=COLUMNS, dtype=object)

    def _answer(self, content: bytes, top: int) -> list:
        try:
            pairs, _ = self.classifier.classify(content, top)
        except Unreadable as unreadable:
            return [None, None, [], [], str(unreadable)]
        names, probabilities = (list(column) for column in zip(*pairs, strict=True))
        return [names[0], probabilities[0], names, probabilities, None]


COLUMNS = ["class", "probability", "classes", "probabilities", "problem"]


def _load_pyfunc(path: str) -> MlflowModel:
    """The entry point that MLflow requires of a loader.

    Args:
        path: of the model.safetensors in the model's folder.
    """
    return MlflowModel(path)
