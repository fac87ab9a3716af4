"""What a model answered for each image of a split: accuracy by class, confusions, and its worst mistakes."""

from dataclasses import dataclass

import numpy as np

from deit_ray.accuracy import interval


@dataclass(frozen=True)
class ClassAccuracy:
    """How a model answered the images of a class.

    Attributes:
        name: the class.
        images, right: number of its images, and of those answered correctly.
        taken_for: the class that was most often answered instead, and how often; None without a mistake.
    """

    name: str
    images: int
    right: int
    taken_for: tuple[str, int] | None

    @property
    def top1(self) -> float:
        """Fraction of its images that were answered correctly; NaN if it has none."""
        return self.right / self.images if self.images else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `top1`; from 0 to 1 if the class has no images."""
        return interval(self.top1, self.images) if self.images else (0.0, 1.0)


@dataclass(frozen=True)
class Answers:
    """A model's answers on a split, as arrays [images] in the order of the image ids.

    Attributes:
        classes: names, by label.
        ids: int64, each image's place in its split of the prepared data set (`val` is a part of `train`).
        labels, answers: int64, the label, and the class that the model finds most likely.
        probabilities, of_labels: float32, the model's probabilities of its answer and of the label.
    """

    classes: list[str]
    ids: np.ndarray
    labels: np.ndarray
    answers: np.ndarray
    probabilities: np.ndarray
    of_labels: np.ndarray

    @classmethod
    def of(cls, classes: list[str], parts: list[dict[str, np.ndarray]]) -> "Answers":
        """The answers that workers gave in parts; see `training.evaluate`."""
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(whole["id"], kind="stable")
        names = ("id", "label", "answer", "probability", "of_label")
        return cls(classes, *(whole[name][order] for name in names))

    @property
    def confusion(self) -> np.ndarray:
        """Number of images by label and answer, int64 [classes, classes]."""
        count = len(self.classes)
        places = self.labels * count + self.answers
        return np.bincount(places, minlength=count * count).reshape(count, count)

    def by_class(self) -> list[ClassAccuracy]:
        """Each class, by label."""
        confusion = self.confusion
        images, right = confusion.sum(1), confusion.diagonal().copy()
        np.fill_diagonal(confusion, 0)
        found = []
        for label, name in enumerate(self.classes):
            other = int(confusion[label].argmax())
            times = int(confusion[label, other])
            taken_for = (self.classes[other], times) if times else None
            found.append(ClassAccuracy(name, int(images[label]), int(right[label]), taken_for))
        return found

    def mistakes(self) -> np.ndarray:
        """The places of the wrong answers, the worst first: those with the least probability of the label."""
        wrong = np.flatnonzero(self.labels != self.answers)
        return wrong[np.lexsort((self.ids[wrong], -self.probabilities[wrong], self.of_labels[wrong]))]
