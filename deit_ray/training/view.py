"""What a trained model sees of an image: the same in evaluations, in `predict` and in `Study.load_model`."""

import numpy as np
import torch
from PIL import Image

from deit_ray.data.crop import Geometry, crop_centre
from deit_ray.data.decode import JPEG, Decoded, decode_file, decode_image
from deit_ray.training.step import Normalise


class EvaluationView:
    """Turns an image into a model's input, float32 [3, size, size]: scaled, cut to its centre, normalised.

    An image is turned as its EXIF says if the model's training images were. Models of earlier versions do
    not say so. For these, all images but JPEGs are turned, as earlier versions did.

    Args:
        description: of the model, as `models.weights.load_described` returns it.

    Attributes:
        classes: names of the model's classes, by label.
    """

    def __init__(self, description: dict):
        self.classes: list[str] = description["classes"]
        self.exif: bool | None = description.get("exif")
        self.size, crop = description["image_size"], description["eval_crop"]
        self.geometry = Geometry(self.size, (1.0, 1.0), (1.0, 1.0), 0.0, crop, 0)
        self.normalise = Normalise(description["mean"], description["std"], torch.device("cpu"))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The input of an image that PIL has opened or made.

        Raises:
            Unreadable: the image is damaged, or does not declare its pixels' range.
        """
        exif = image.format != "JPEG" if self.exif is None else self.exif
        return self._view(decode_image(image, exif))

    def of_file(self, content: bytes) -> tuple[torch.Tensor, tuple[str, ...]]:
        """The input of an image file of any format; and what a person should know about it, see `Decoded`.

        Raises:
            Unreadable: it is no image.
        """
        exif = not content.startswith(JPEG) if self.exif is None else self.exif
        decoded = decode_file(content, exif)
        return self._view(decoded), decoded.remarks

    def _view(self, decoded: Decoded) -> torch.Tensor:
        view = np.empty((self.size, self.size, 3), np.uint8)
        crop_centre(decoded.pixels, self.geometry, view)
        return self.normalise(torch.from_numpy(view).permute(2, 0, 1)[None].float() / 255)[0]
