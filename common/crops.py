"""What a network is shown of a painting, in training and in evaluation, and what is made of its answers.

random_crops(pixels, 96, torch.rand(7, len(pixels)))    # training: uint8 (N, 3, S, S) to float (N, 3, 96, 96)
predict(model, pixels, 96, [1.0, 0.7])                  # evaluation: class probabilities (N, classes)
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn


def random_crops(images, crop: int, random: torch.Tensor, smallest: float = 0.2) -> torch.Tensor:
    """Training: of each picture another window, mirrored half of the time.

    uint8 (B, 3, S, S) and random numbers in [0, 1) (7, B) to float (B, 3, crop, crop) around [0, 1]. A window covers
    between `smallest` and all of the area, up to a third wider or higher than the picture's proportions: small ones
    show the brushwork as it is, large ones the composition. Exposure and contrast vary a little; hues do not, for
    they help to tell styles apart.
    """
    area, stretch = smallest + (1 - smallest) * random[0], torch.exp(0.3 * (random[1] - 0.5))
    side, flip = images.shape[-1], random[4] < 0.5
    width, height = ((side * area.sqrt() * ratio).round().clamp(max=side) for ratio in (stretch, 1 / stretch))
    left, top = (random[2] * (side - width + 1)).floor(), (random[3] * (side - height + 1)).floor()
    if images.device.type == "cpu":
        # One by one and in bytes, which stay in the CPU's cache: seven times as fast as grid_sample on whole batches.
        crops = torch.empty(len(images), 3, crop, crop, dtype=torch.uint8)
        windows = torch.stack([top, top + height, left, left + width]).int().T.tolist()
        for image, (upper, lower, west, east), mirrored, place in zip(images, windows, flip, crops, strict=True):
            window = image[None, :, upper:lower, west:east]
            window = window.flip(3) if mirrored else window.contiguous()
            place.copy_(F.interpolate(window, (crop, crop), mode="bilinear", antialias=True, align_corners=False)[0])
        crops = crops.float().div_(255)
    else:
        crops = windows_at_once(images, crop, left, top, torch.where(flip, -width, width), height)
    contrast, exposure = (0.3 * (random[5:7] - 0.5)).view(2, -1, 1, 1, 1).to(images.device)
    return crops.mul_(1 + contrast).add_(0.25 * exposure - 0.5 * contrast)


def windows_at_once(images, crop: int, left, top, width, height) -> torch.Tensor:
    """Windows of whole batches on a GPU: uint8 (B, 3, S, S) to float (B, 3, crop, crop); a width below 0 mirrors."""
    side, zero = images.shape[-1], torch.zeros_like(width)
    across, down = (2 * left + width.abs()) / side - 1, (2 * top + height) / side - 1  # in affine_grid's [-1, 1]
    theta = torch.stack([width / side, zero, across, zero, height / side, down], 1).view(-1, 2, 3).to(images.device)
    grid = F.affine_grid(theta, (len(images), 3, crop, crop), align_corners=False)
    # A large window has several pixels for one of the crop's, of which grid_sample would skip most: average them first.
    level = (torch.maximum(width.abs(), height) / crop).log2().round().clamp(min=0)
    crops = torch.empty(len(images), 3, crop, crop, device=images.device)
    for each in level.unique():
        chosen = torch.nonzero(level == each).flatten().to(images.device)
        source = F.avg_pool2d(images[chosen].float() / 255, int(2**each))
        crops[chosen] = F.grid_sample(source, grid[chosen], padding_mode="reflection", align_corners=False)
    return crops


def one_window(images, crop: int, random: torch.Tensor, smallest: float = 0.5) -> torch.Tensor:
    """Training where sharpness counts: one window for all pictures of a batch, scaled as `views` scales them.

    uint8, or float in [0, 1], (B, 3, S, S) and random numbers in [0, 1) (5,) to float (B, 3, crop, crop) in [0, 1].
    """
    area, stretch = smallest + (1 - smallest) * random[0], math.exp(0.3 * (random[1] - 0.5))
    side = images.shape[-1]
    height, width = (min(side, round(side * float(area.sqrt()) * ratio)) for ratio in (stretch, 1 / stretch))
    top, left = int(random[2] * (side - height + 1)), int(random[3] * (side - width + 1))
    part = images[:, :, top : top + height, left : left + width]
    if images.is_floating_point() or images.device.type != "cpu":
        part = part if images.is_floating_point() else part.float() / 255
        part = part.flip(3) if random[4] < 0.5 else part
        return F.interpolate(part, (crop, crop), mode="bilinear", antialias=True, align_corners=False)
    part = part.flip(3) if random[4] < 0.5 else part.contiguous()  # bytes that lie apart are scaled more slowly
    return F.interpolate(part, (crop, crop), mode="bilinear", antialias=True, align_corners=False).float().div_(255)


def views(images, crop: int, window: float = 1.0) -> list[torch.Tensor]:
    """Evaluation: the four corner windows of `window` times the picture's side, and their mirror images.

    uint8 (B, 3, S, S) to a list of float (B, 3, crop, crop) in [0, 1]. 1 stands for the whole picture, 1.5 for the
    whole picture at 1.5 times the crop's size.
    """
    if window > 1:
        return views(images, round(crop * window))
    side = round(images.shape[-1] * window)
    starts = (0,) if window == 1 else (0, images.shape[-1] - side)
    shown = []
    for top, left in itertools.product(starts, starts):
        part = images[:, :, top : top + side, left : left + side].float() / 255
        part = F.interpolate(part, (crop, crop), mode="bilinear", antialias=True, align_corners=False)
        shown += [part, part.flip(3)]
    return shown


@torch.no_grad()
def over_views(function, images, crop: int, windows=(1.0,)) -> torch.Tensor:
    """What `function` makes of uint8 pictures, (B, ...): the mean over the windows of the mean over their views."""
    each = [torch.stack([function(view).float() for view in views(images, crop, side)]).mean(0) for side in windows]
    return torch.stack(each).mean(0)


def predict(model: nn.Module, images, crop: int, windows=(1.0,)) -> torch.Tensor:
    """Class probabilities (B, classes) of uint8 pictures."""
    return over_views(lambda view: model(view).float().softmax(1), images, crop, windows)


def calibrate(probabilities, temperature: float):
    """Probabilities (B, classes) made surer by a temperature below 1, less sure by one above (Guo et al. 2017).

    Their order stays.
    """
    return (probabilities.clamp_min(1e-9).log() / temperature).softmax(1)


def fit_temperature(probabilities, labels) -> float:
    """The temperature with which probabilities (N, classes) of a validation part fit its labels (N,) best.

    Averaging over views and smoothed labels make a network less sure than it may be, long training surer. Every class
    weighs the same, as in choosing the epoch. The labels are smoothed by what N of them leave open (Platt 1999):
    else a network that makes no mistake on them would be made sure without end.
    """
    logs, weights = probabilities.clamp_min(1e-9).log(), 1 / torch.bincount(labels)[labels]

    def loss(temperature):
        losses = F.cross_entropy(logs / temperature, labels, label_smoothing=1 / (len(labels) + 2), reduction="none")
        return (weights * losses).sum().item()

    return min(torch.logspace(-2, 1, 301).tolist(), key=loss)
