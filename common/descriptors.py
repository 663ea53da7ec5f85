"""Codes of a painting that need neither labels nor a trained network: its colours, its textures, its visual words."""

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from common.crops import resize

PATCH, STRIDE = 6, 4  # pixels
WORDS = 200
IMAGES, PER_IMAGE = 1500, 40  # paintings, and patches of each, that the words are learned from
EPSILON = 0.01  # added to variances, so that even patches and rare directions are not amplified


def colour_histogram(images):
    """Square roots of the shares of 4 x 4 x 4 bins of red, green and blue: (B, 3, H, W) in [0, 1] to (B, 64)."""
    levels = (images * 4).long().clamp(0, 3)
    bins = (levels[:, 0] * 16 + levels[:, 1] * 4 + levels[:, 2]).flatten(1)
    return torch.stack([torch.bincount(row, minlength=64) for row in bins]).div(bins.shape[1]).sqrt()


def texture_statistics(images):
    """How strong edges and lines are, and in which directions they run, at three scales: (B, 3, H, W) to (B, 57).

    Of the grey image: quantiles of the logarithm of its gradient's length and of its Laplacian, and shares of eight
    directions of edges, weighted by the gradient's length.
    """
    grey, statistics = images.mean(1, keepdim=True), []
    for scale in (1, 2, 4):
        x = resize(grey, grey.shape[-1] // scale) if scale > 1 else grey
        across, down = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
        laplacian = 4 * x[..., 1:-1, 1:-1] - x[..., 1:-1, 2:] - x[..., 1:-1, :-2] - x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
        length = torch.hypot(across, down).flatten(1)
        direction = (torch.atan2(down, across) / torch.pi % 1 * 8).long().clamp(max=7).flatten(1)
        shares = torch.stack([(length * (direction == number)).sum(1) for number in range(8)], 1)
        statistics += [log_quantiles(length, (0.1, 0.25, 0.5, 0.75, 0.9, 0.97))]
        statistics += [log_quantiles(laplacian.abs().flatten(1), (0.25, 0.5, 0.75, 0.9, 0.97))]
        statistics += [shares / (shares.sum(1, keepdim=True) + 1e-6)]
    return torch.cat(statistics, 1)


def log_quantiles(values, shares) -> torch.Tensor:
    """Quantiles of each row (B, N), of about 10,000 of its values."""
    step = max(1, values.shape[1] // 10_000)
    return torch.quantile(values[:, ::step], torch.tensor(shares), dim=1).T.add(1e-3).log()


class VisualWords:
    """A bag of visual words (Csurka et al. 2004): how often a painting's patches resemble each of WORDS typical ones.

    The words are the centres of k-means on whitened patches (Coates et al. 2011, "An analysis of single-layer networks
    in unsupervised feature learning"). Words of some pixels are about brushwork.

    data: training paintings, a WikiArt.
    """

    def __init__(self, data, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        patches = []
        for items in torch.randperm(len(data), generator=generator)[:IMAGES].split(32):
            found = cut(data.read(items).float() / 255)
            patches.append(found[:, torch.randperm(found.shape[1], generator=generator)[:PER_IMAGE]].flatten(0, 1))
        patches = torch.cat(patches)
        self.mean = patches.mean(0)
        variances, directions = torch.linalg.eigh(torch.cov(patches.T))
        self.whiten = directions / (variances + EPSILON).sqrt() @ directions.T
        whitened = (patches - self.mean) @ self.whiten
        words = min(WORDS, len(whitened))
        kmeans = KMeans(words, n_init=1, max_iter=30, random_state=seed).fit(whitened.numpy())
        self.words = torch.from_numpy(kmeans.cluster_centers_)

    def __call__(self, images):
        """Square roots of the words' shares: (B, 3, H, W) in [0, 1] to (B, WORDS)."""
        distances = torch.cdist((cut(images) - self.mean) @ self.whiten, self.words.expand(len(images), -1, -1))
        similar = F.relu(distances.mean(2, keepdim=True) - distances).mean(1)  # only to words that are nearer than most
        return (similar / similar.sum(1, keepdim=True).clamp(min=1e-6)).sqrt()


def cut(images):
    """Patches without their brightness and contrast: (B, 3, H, W) in [0, 1] to (B, N, 3 * PATCH * PATCH)."""
    patches = F.unfold(images, PATCH, stride=STRIDE).mT
    variances, means = torch.var_mean(patches, 2, keepdim=True)
    return (patches - means) / (variances + EPSILON).sqrt()
