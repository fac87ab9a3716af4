"""The GPU's kernel: torch, a whole batch at once."""

import torch

from deit_ray.augment import table


def augment_images(images_BHWC: torch.Tensor, seed: int, epoch: int, ids, views, color_jitter: float) -> torch.Tensor:
    """The uint8 images [batch, height, width, 3] jittered; factors are drawn from 1 +- color_jitter."""
    if color_jitter == 0:
        return images_BHWC
    factors, order = table.draw(seed, epoch, ids, views, color_jitter)
    images = images_BHWC.clone()
    luma = torch.tensor(table.GREY, device=images.device)
    factors = torch.from_numpy(factors).float().to(images.device)
    order = torch.from_numpy(order).to(images.device)
    for place in range(len(table.OPERATIONS)):
        for index, operation in enumerate(table.OPERATIONS):
            chosen = (order[:, place] == index).nonzero().squeeze(1)
            x = images[chosen].float()
            grey = (x @ luma).round().unsqueeze(-1)
            other = {
                "brightness": 0.0,
                "contrast": (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor(),
                "saturation": grey,
            }
            factor = factors[chosen, index].view(-1, 1, 1, 1)
            blended = x * factor + other[operation] * (1 - factor)
            images[chosen] = blended.round().clamp(0, 255).to(torch.uint8)
    return images
