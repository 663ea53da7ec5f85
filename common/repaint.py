"""Repaint a picture of any size: what style_transfer.py and the page share.

repainter = Repainter(model, classes, classifier, device)
painted = repainter.repaint(open_picture("my.jpg", 1024), {"Ukiyo_e": 0.7, "Fauvism": 0.3})    # a PIL image
"""

import io
import math
import warnings
from collections import Counter
from itertools import permutations

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from common.images import FORMATS, open_file, open_rgb
from common.names import read_weights, title_of
from common.run import autocast

SMALLEST = 32  # pixels of a picture's shorter side
LARGEST = 100e6  # pixels of a picture
TILE, MARGIN = 768, 80  # pixels; no output pixel depends on input pixels further away than the margin


def open_picture(source, longest: int) -> Image.Image:
    return read_picture(source, longest)[0]


def read_picture(source, longest: int) -> tuple[Image.Image, tuple[int, int]]:
    """A picture in RGB, upright and reduced to at most `longest` pixels a side, and its width and height before that.

    source: a file's path, or the content of an upload (bytes), for which only the decoders of FORMATS are used. Raises
    UserError where it is too small or large.
    """
    upload = isinstance(source, bytes)
    name, formats = ("the picture", FORMATS) if upload else (source, None)
    with io.BytesIO(source) if upload else open_file(source) as file:
        width, height = stored_size(file, formats)
        if width * height > LARGEST:
            raise UserError(f"{name} has more than {LARGEST / 1e6:.0f} megapixels")
        if min(width, height) < SMALLEST:
            raise UserError(f"{name} is too small: {width} x {height} pixels, {SMALLEST} a side are needed")
        image = open_rgb(file, longest, formats)
    if (width > height) != (image.width > image.height):  # it was turned upright
        width, height = height, width
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    if min(image.size) < SMALLEST:
        raise UserError(f"{name} is too narrow: reduced to {image.width} x {image.height} pixels; raise --longest")
    return image, (width, height)


def stored_size(file, formats) -> tuple[float, float]:
    """Width and height in an image file's header; infinite from 179 megapixels on, where Pillow refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from 89 megapixels on
        try:
            return Image.open(file, formats=formats).size
        except Image.DecompressionBombError:
            return math.inf, math.inf


def to_tensor(image: Image.Image) -> torch.Tensor:
    """A picture in RGB as uint8 (1, 3, H, W)."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]


def read_mixture(texts: list[str], classes: list[str]) -> dict[str, float]:
    """["ukiyo-e=0.7", "Fauvism=0.3"] as weights {class: weight} that add up to 1. Raises UserError."""
    weights = read_weights(texts, classes)
    return {style: weight / sum(weights.values()) for style, weight in weights.items()}


def common_scenes(data) -> list[list[int]]:
    """Rows of the scenes that exist in every style, as in the demo: of each, the row of every style.

    A scene is a title that occurs once in each style. Empty if there is none, or if a title occurs twice in one style.
    """
    titles, labels = [title_of(path) for path in data.paths], data.labels.tolist()
    row_of = {key: row for row, key in enumerate(zip(titles, labels, strict=True))}
    unique, styles = len(row_of) == len(titles), range(len(data.classes))
    scenes = [title for title, count in Counter(titles).items() if title and unique and count == len(styles)]
    return [[row_of[title, style] for style in styles] for title in scenes]


def true_pairs(data) -> list[tuple[int, int, int]]:
    """Source and true image in the target style (rows), and that style, of all scenes that exist in every style."""
    styles = range(len(data.classes))
    return [(rows[a], rows[b], b) for rows in common_scenes(data) for a, b in permutations(styles, 2)]


def check_model(checkpoint: dict, path) -> None:
    """Raise UserError for a checkpoint of the repainter before this one, whose code was a vector."""
    if "crop" in checkpoint["arguments"]:  # before, it was made for one size of image
        raise UserError(f"{path} holds a StyleAutoencoder of an earlier version: train again with train_style.py")


class Repainter:
    """A trained StyleAutoencoder, and the classifier that tells it which style a picture is in.

    model: StyleAutoencoder, in evaluation mode; classifier: Classifier of the same classes, or None where callers give
    the source style.
    """

    def __init__(self, model, classes: list[str], classifier, device):
        if classifier is not None and classifier.classes != classes:
            raise UserError("the classifier knows other styles than the model that repaints: give another")
        self.model = model.to(device, memory_format=torch.channels_last).eval()
        self.classes, self.classifier, self.device = classes, classifier, device

    def vector(self, weights: dict[str, float]) -> torch.Tensor:
        """Style weights {name: weight} as a tensor (styles,)."""
        return torch.tensor([weights.get(name, 0.0) for name in self.classes])

    def source(self, image: Image.Image) -> torch.Tensor:
        """The classifier's calibrated probabilities of a picture's own style, (styles,)."""
        return self.classifier.predict(to_tensor(image))[0]

    def repaint(self, image, target: dict, source: dict | None = None, strength: float = 1.0) -> Image.Image:
        """A picture in the mixture of styles `target`, at its own size; strength 0: in its own style.

        The own style is `source`, or what the classifier says.
        """
        own = self.source(image) if source is None else self.vector(source)
        target = own + strength * (self.vector(target) - own)
        painted = self.paint(to_tensor(image) / 255, target[None], own[None])[0]
        return Image.fromarray((255 * painted).round().byte().permute(1, 2, 0).numpy())

    @torch.inference_mode()
    def paint(self, images, target, source, tile: int = TILE) -> torch.Tensor:
        """Images float (B, 3, H, W) in [0, 1] in the target instead of the source styles (B, styles), on the CPU.

        Large ones are painted in tiles with margins as wide as the receptive field, so that there are no seams.
        """
        styles = target.to(self.device), source.to(self.device)
        height, width = images.shape[-2:]
        painted = torch.empty_like(images, device="cpu")
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                above, before = min(top, MARGIN), min(left, MARGIN)
                bottom, right = min(top + tile, height), min(left + tile, width)
                box = images[:, :, top - above : bottom + MARGIN, left - before : right + MARGIN].to(self.device)
                with autocast(self.device, cpu=True):
                    result = self.model(box.contiguous(memory_format=torch.channels_last), *styles)
                result = result[:, :, above : above + bottom - top, before : before + right - left]
                painted[:, :, top:bottom, left:right] = result.clamp(0, 1).cpu()
        return painted
