"""The GPU's kernel: torch, a whole batch at once."""

import numpy as np
import torch
import torch.nn.functional as F

from deit_ray.augment import table

LUMA = (19595, 38470, 7471)  # / 65536: ITU-R 601-2, in whole numbers as in PIL


def augment_images(images_BHWC: torch.Tensor, stages: list[table.Stage]) -> torch.Tensor:
    """Applies the stages to a copy of the uint8 images [batch, height, width, 3].

    The host does not wait for the device.
    """
    images = images_BHWC.clone()
    for stage in stages:
        chosen = _to(images, stage.chosen)
        images[chosen] = APPLY[type(stage.primitive)](images[chosen], stage.primitive)
    return images


def _lookup(images: torch.Tensor, primitive: table.Lookup) -> torch.Tensor:
    return _look_up(images, _to(images, primitive.tables)[:, None].expand(-1, 3, -1))


def _histogram_lookup(images: torch.Tensor, primitive: table.HistogramLookup) -> torch.Tensor:
    index = _flat_index(images)
    counts = torch.zeros(len(images), 3 * 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, index, torch.ones_like(index))
    return _look_up(images, primitive.rule(counts.view(-1, 3, 256).double(), torch).to(torch.uint8))


def _grey_blend(images: torch.Tensor, primitive: table.GreyBlend) -> torch.Tensor:
    red, green, blue = images.int().unbind(-1)
    grey = (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2] + 0x8000) >> 16
    if primitive.of_mean:  # a sum of whole numbers does not depend on the batch's size, bit for bit
        pixels = grey[0].numel()
        grey = ((2 * grey.sum((1, 2), dtype=torch.int64) + pixels) // (2 * pixels)).view(-1, 1, 1)
    return table.blend(grey[..., None].float(), images.float(), _per_image(images, primitive.factors)).to(
        torch.uint8
    )


def _affine(images: torch.Tensor, primitive: table.Affine) -> torch.Tensor:
    height, width = images.shape[1:3]
    a, b, c, d, e, f = _to(images, primitive.matrices.reshape(-1, 6).astype(np.float32)).T[:, :, None, None]
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]
    grid = torch.stack(
        [(2 * (a * x + b * y + c) + 1) / width - 1, (2 * (d * x + e * y + f) + 1) / height - 1], dim=-1
    )
    fill = _to(images, np.array(primitive.fill, np.float32)).view(3, 1, 1)
    source = images.permute(0, 3, 1, 2).float() - fill
    moved = F.grid_sample(source, grid, mode="bicubic", padding_mode="zeros", align_corners=False) + fill
    return moved.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _filter(images: torch.Tensor, primitive: table.Filter) -> torch.Tensor:
    height, width = images.shape[1:3]
    taps = _to(images, primitive.taps.astype(np.float32)).view(len(images), 1, 1, 1, -1)
    source, half = images.permute(0, 3, 1, 2).float(), taps.shape[-1] // 2
    padded = F.pad(source, (half, half, half, half), mode="replicate")
    along_x = sum(padded[..., k : k + width] * taps[..., k] for k in range(taps.shape[-1]))
    filtered = (
        sum(along_x[:, :, k : k + height] * taps[..., k] for k in range(taps.shape[-1]))
        .permute(0, 2, 3, 1)
        .round()
    )
    filtered = table.blend(filtered, images.float(), _per_image(images, primitive.factors)).to(torch.uint8)
    rim = int(primitive.keep_rim)
    result = images.clone()
    result[:, rim : height - rim, rim : width - rim] = filtered[:, rim : height - rim, rim : width - rim]
    return result


def _look_up(images: torch.Tensor, tables_N3V: torch.Tensor) -> torch.Tensor:
    return tables_N3V.reshape(len(images), -1).gather(1, _flat_index(images)).view_as(images)


def _flat_index(images: torch.Tensor) -> torch.Tensor:
    """The index of each value among the 3 x 256 levels of its image, int64 [n, height x width x 3]."""
    return (images.long() + 256 * torch.arange(3, device=images.device)).view(len(images), -1)


def _per_image(images: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    return _to(images, numbers.astype(np.float32)).view(-1, 1, 1, 1)


def _to(images: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(images.device, non_blocking=True)


APPLY = {
    table.Lookup: _lookup,
    table.HistogramLookup: _histogram_lookup,
    table.GreyBlend: _grey_blend,
    table.Affine: _affine,
    table.Filter: _filter,
}
