"""The CPU's kernel: OpenCV, image by image."""

import cv2
import numpy as np

from deit_ray.augment import table

LUMA = np.array([[19595, 38470, 7471]]) / 65536  # ITU-R 601-2, as PIL rounds it to 16 bits
CUT = -0.499  # makes OpenCV round down, as PIL's blends do


def augment_images(images_BHWC: np.ndarray, stages: list[table.Stage]) -> None:
    """Applies the stages to uint8 images [batch, height, width, 3] in place."""
    for stage in stages:
        apply = APPLY[type(stage.primitive)]
        for row, place in enumerate(stage.chosen):
            apply(images_BHWC[place], stage.primitive, row)


def _lookup(image: np.ndarray, primitive: table.Lookup, row: int) -> None:
    cv2.LUT(image, primitive.tables[row], dst=image)


def _histogram_lookup(image: np.ndarray, primitive: table.HistogramLookup, row: int) -> None:
    histograms = np.stack(
        [cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel() for channel in range(3)]
    )
    tables = primitive.rule(histograms[None].astype(np.float64), np)[0]
    cv2.LUT(image, np.ascontiguousarray(tables.T.astype(np.uint8))[None], dst=image)


def _grey_blend(image: np.ndarray, primitive: table.GreyBlend, row: int) -> None:
    grey, factor = cv2.transform(image, LUMA), primitive.factors[row]
    if primitive.of_mean:
        mean = np.float32(int(cv2.sumElems(grey)[0] / grey.size + 0.5))
        tables = table.blend(mean, table.VALUES.astype(np.float32), np.float32(factor)).astype(np.uint8)
        cv2.LUT(image, tables, dst=image)
    else:
        cv2.addWeighted(image, factor, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 1 - factor, CUT, dst=image)


def _affine(image: np.ndarray, primitive: table.Affine, row: int) -> None:
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    image[:] = cv2.warpAffine(
        image, primitive.matrices[row], image.shape[1::-1], flags=flags, borderValue=primitive.fill
    )


def _filter(image: np.ndarray, primitive: table.Filter, row: int) -> None:
    taps, factor = primitive.taps[row], primitive.factors[row]
    filtered = cv2.sepFilter2D(image, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    filtered = cv2.addWeighted(image, factor, filtered, 1 - factor, CUT)
    rim = int(primitive.keep_rim)
    inner = slice(rim, image.shape[0] - rim), slice(rim, image.shape[1] - rim)
    image[inner] = filtered[inner]


APPLY = {
    table.Lookup: _lookup,
    table.HistogramLookup: _histogram_lookup,
    table.GreyBlend: _grey_blend,
    table.Affine: _affine,
    table.Filter: _filter,
}
