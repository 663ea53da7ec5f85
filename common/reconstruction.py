"""Reconstructions of whole images: their error over a data set, and figures of them.

`reconstruct(images, labels)` returns images like its input, float (B, 3, crop, crop) in [0, 1], with labels (B,).
"""

from pathlib import Path

import numpy as np
import torch

from common import figures
from common.crops import views
from common.errors import UserError
from common.names import display_name
from common.run import autocast

SHOWN = 10  # paintings in a figure


def whole_images(data, items, crop: int, device):
    """Whole images of a data set, float (B, 3, crop, crop) in [0, 1], and their labels (B,), on the device."""
    pixels, labels = data.batch(items, device)
    return views(pixels, crop)[0].contiguous(memory_format=torch.channels_last), labels


@torch.no_grad()
def mean_squared_error(reconstruct, data, crop: int, batch_size: int, device) -> float:
    """Mean squared error of reconstructions, clamped to [0, 1], over a data set's whole images."""
    total = 0.0
    for items in torch.arange(len(data)).split(batch_size):
        images, labels = whole_images(data, items, crop, device)
        with autocast(device):
            reconstructions = reconstruct(images, labels)
        total += (reconstructions.float().clamp(0, 1) - images).square().sum().item()
    return total / (len(data) * 3 * crop**2)


def items_to_show(data, hide: list[str]) -> torch.Tensor:
    """Up to SHOWN paintings, spread evenly over those that figures may show. Raises UserError where there is none."""
    showable = np.flatnonzero(data.showable(hide))
    if not len(showable):
        raise UserError("--hide leaves no painting to show")
    positions = np.linspace(0, len(showable) - 1, min(SHOWN, len(showable))).round().astype(int)
    return torch.tensor(showable[positions])


@torch.no_grad()
def plot_reconstructions(path: Path, functions: dict, data, hide: list[str], crop: int, device, title: str) -> None:
    """Write a PNG of paintings above what each of the functions {row title: reconstruct} makes of them."""
    items = items_to_show(data, hide)
    images, labels = whole_images(data, items, crop, device)
    with autocast(device):
        rows = {"original": images} | {name: function(images, labels) for name, function in functions.items()}
    pictures = [(255 * row.float().clamp(0, 1)).round().byte().cpu().numpy() for row in rows.values()]
    columns = [display_name(data.classes[label]) for label in data.labels[items]]
    figures.grid(path, np.stack(pictures), columns, list(rows), title)
