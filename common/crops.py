"""Which part of a painting a network sees: random crops in training, fixed views in evaluation.

random_crops(pixels, 96, torch.rand(7, len(pixels)))          # training: uint8 (N, 3, S, S) to float (N, 3, 96, 96)
predict_probabilities(model, pixels, 96, [1.0, 0.7])          # evaluation: class probabilities (N, classes)
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from common.run import to_device

FEATURE_SCALES = (1.0, 0.7)  # of the views over which features of a classifier are averaged


def random_crops(images, crop: int, random: torch.Tensor, min_area: float = 0.2) -> torch.Tensor:
    """Training: a different random crop of each image, flipped half of the time, with exposure and contrast jitter.

    images: uint8 (B, 3, S, S); random: uniform numbers in [0, 1), (7, B); returns float (B, 3, crop, crop) around
    [0, 1]. A crop covers between `min_area` and all of the area, at aspect ratios up to 4:3: small crops show the
    brushwork, large ones the composition. Exposure and contrast vary a little.
    """
    area, stretch = min_area + (1 - min_area) * random[0], torch.exp(0.3 * (random[1] - 0.5))
    side, flip = images.shape[-1], random[4] < 0.5
    width, height = ((side * area.sqrt() * ratio).round().clamp(max=side) for ratio in (stretch, 1 / stretch))
    left, top = (random[2] * (side - width + 1)).floor(), (random[3] * (side - height + 1)).floor()
    if images.device.type == "cpu":
        crops = crop_each(images, crop, torch.stack([top, top + height, left, left + width]), flip)
    else:
        crops = grid_sample_crops(images, crop, left, top, torch.where(flip, -width, width), height)
    contrast, exposure = to_device((0.3 * (random[5:7] - 0.5)).view(2, -1, 1, 1, 1), images.device)
    return crops.mul_(1 + contrast).add_(0.25 * exposure - 0.5 * contrast)


def colour_cast(images, random: torch.Tensor, strength: float) -> torch.Tensor:
    """Training: contrast and exposure of each colour vary, in place, as between photographs of the same painting.

    images: float (B, 3, H, W); random: uniform numbers in [0, 1), (6, B); strength 0.3 changes contrast by up to 15 %.
    """
    contrast, exposure = to_device((strength * (random - 0.5)).view(2, 3, -1).mT[..., None, None], images.device)
    return images.mul_(1 + contrast).add_(0.5 * exposure)


def crop_each(images, crop: int, boxes, flip) -> torch.Tensor:
    """Crops on the CPU: boxes (4, B) are top, bottom, left and right in pixels; returns float (B, 3, crop, crop).

    One image at a time and in bytes, which fit into the CPU's cache: seven times as fast as grid_sample on a batch.
    """
    crops = torch.empty(len(images), 3, crop, crop, dtype=torch.uint8)
    for image, (top, bottom, left, right), mirrored, target in zip(
        images, boxes.int().T.tolist(), flip, crops, strict=True
    ):
        box = image[None, :, top:bottom, left:right]
        box = box.flip(3) if mirrored else box.contiguous()
        target.copy_(resize(box, crop)[0])
    return crops.float().div_(255)


def grid_sample_crops(images, crop: int, left, top, width, height) -> torch.Tensor:
    """Crops of a whole batch on a GPU: uint8 (B, 3, S, S) to float (B, 3, crop, crop); a negative width flips."""
    side, zero = images.shape[-1], torch.zeros_like(width)
    x, y = (2 * left + width.abs()) / side - 1, (2 * top + height) / side - 1  # centres, in affine_grid's [-1, 1]
    theta = torch.stack([width / side, zero, x, zero, height / side, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(to_device(theta, images.device), (len(images), 3, crop, crop), align_corners=False)
    # grid_sample does not antialias: where a crop is reduced, average its pixels first.
    level = (torch.maximum(width.abs(), height) / crop).log2().round().clamp(min=0)
    crops = torch.empty(len(images), 3, crop, crop, device=images.device)
    for value in level.unique():
        rows = to_device(torch.nonzero(level == value).flatten(), images.device)
        source = F.avg_pool2d(images[rows].float() / 255, int(2**value))
        crops[rows] = F.grid_sample(source, grid[rows], padding_mode="reflection", align_corners=False)
    return crops


def batch_crop(images, crop: int, random: torch.Tensor, min_area: float = 0.5) -> torch.Tensor:
    """Training where sharpness matters: the same random crop for all images of a batch, resized as `views` does.

    images: uint8, or float in [0, 1], (B, 3, S, S); random: uniform numbers in [0, 1), (5,); returns float
    (B, 3, crop, crop) in [0, 1].
    """
    area, stretch = min_area + (1 - min_area) * random[0], math.exp(0.3 * (random[1] - 0.5))
    side = images.shape[-1]
    height, width = (min(side, round(side * float(area.sqrt()) * ratio)) for ratio in (stretch, 1 / stretch))
    top, left = int(random[2] * (side - height + 1)), int(random[3] * (side - width + 1))
    box = images[:, :, top : top + height, left : left + width]
    if images.is_floating_point() or images.device.type != "cpu":
        box = box if images.is_floating_point() else box.float() / 255
        return resize(box.flip(3) if random[4] < 0.5 else box, crop)
    box = box.flip(3) if random[4] < 0.5 else box.contiguous()  # strided bytes are resized more slowly
    return resize(box, crop).float().div_(255)


def windows(images, crop: int, scale, places: torch.Tensor, zoom: float = 1.6) -> torch.Tensor:
    """Training where brushwork matters: windows of one scale for all images of a batch, each at its own place.

    images: uint8 (B, 3, S, S); scale: two uniform numbers in [0, 1), for a size between `crop` and `zoom` times that,
    and for a flip; places (2, B): for top and left. Returns float (B, 3, crop, crop) in [0, 1].
    """
    size, flip = map(float, scale)
    side = round(crop + (min(zoom * crop, images.shape[-1]) - crop) * size)
    tops, lefts = (places * (images.shape[-1] - side + 1)).long().tolist()
    places = zip(images, tops, lefts, strict=True)
    boxes = torch.stack([image[:, top : top + side, left : left + side] for image, top, left in places])
    boxes = boxes.flip(3) if flip < 0.5 else boxes
    boxes = boxes if boxes.device.type == "cpu" else boxes.float()
    boxes = resize(boxes, crop) if side != crop else boxes
    return boxes.float().div_(255).contiguous(memory_format=torch.channels_last)


def center_crop(images) -> torch.Tensor:
    """The largest square in the middle of images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]


def resize(images, side: int) -> torch.Tensor:
    """Images (B, 3, H, W) at another size, (B, 3, side, side)."""
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


def views(images, crop: int, scale: float = 1.0) -> list[torch.Tensor]:
    """Evaluation: the whole image and its mirror image; or crops of `scale` times its side, evenly spaced.

    images: uint8 (B, 3, S, S); returns a list of float (B, 3, side, side) in [0, 1], of `crop` pixels a side. Scale 1.5
    is the whole image at 1.5 times the size, and its mirror image; 0.7 a grid of 3 x 3 crops, and 0.5 of 4 x 4.
    """
    if scale >= 1:
        whole = resize(images.float() / 255, round(crop * scale))
        return [whole, whole.flip(3)]
    side, steps = round(images.shape[-1] * scale), round(2 / scale)  # neighbours share half or more of their side
    starts = [round(step * (images.shape[-1] - side) / (steps - 1)) for step in range(steps)]
    places = itertools.product(starts, starts)
    return [resize(images[:, :, top : top + side, left : left + side].float() / 255, crop) for top, left in places]


@torch.no_grad()
def mean_over_views(function, images, crop: int, scales=(1.0,)) -> torch.Tensor:
    """The mean over scales of the mean over views of function(view), (B, ...), for uint8 images."""
    by_scale = [
        torch.stack([function(view).float() for view in views(images, crop, scale)]).mean(0) for scale in scales
    ]
    return torch.stack(by_scale).mean(0)


def predict_probabilities(model: nn.Module, images, crop: int, scales=(1.0,)) -> torch.Tensor:
    """Class probabilities (B, classes) of uint8 images (B, 3, S, S), averaged over views."""
    return mean_over_views(lambda view: model(view).float().softmax(1), images, crop, scales)
