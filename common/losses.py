"""Class prior, reconstruction and contrastive loss, and the losses of style transfer."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.layers import Block, SumOverProcesses, mean_std
from common.metrics import layout
from common.run import full_precision, to_device


def class_log_prior(labels, classes: int) -> torch.Tensor:
    """Log of each class's frequency among the labels (N,), float (classes,); for logit adjustment and class weights."""
    return (torch.bincount(labels, minlength=classes) / len(labels)).log()


def gather(values, dim: int = 0):
    """Concatenate a tensor over all processes along `dim`; gradients flow back to each process's own part."""
    if not dist.is_initialized():
        return values
    parts = [values if rank == dist.get_rank() else torch.zeros_like(values) for rank in range(dist.get_world_size())]
    return SumOverProcesses.apply(torch.cat(parts, dim))


class ReconstructionLoss(nn.Module):
    """Trains an Autoencoder: mean squared error over the `variance` of pixels, and NT-Xent of two crops of an image."""

    def __init__(self, model, contrastive_weight: float, variance: float):
        super().__init__()
        self.model, self.contrastive_weight, self.variance = model, contrastive_weight, variance

    def forward(self, images, second_crops=None, styles=None):
        """The loss and the mean squared error.

        images, and other crops of them: float (B, 3, crop, crop); styles, for an autoencoder with embeddings of them:
        one-hot (B, styles).
        """
        codes, maps = self.model.encode_with_maps(images)
        mse = F.mse_loss(self.model.decode(codes, styles).float(), images)
        loss = mse / self.variance
        if second_crops is not None:
            projections = self.model.project(maps, second_crops).view(2, len(images), -1)
            loss = loss + self.contrastive_weight * nt_xent(projections)
        return loss, mse


def nt_xent(projections, temperature: float = 0.2):
    """NT-Xent (Chen et al. 2020) of projections (2, B, D) of two crops of each image; a scalar.

    Each crop's positive is the other crop of its image; all other crops, those of other processes included, are its
    negatives.
    """
    projections = F.normalize(gather(projections, 1).flatten(0, 1).float(), dim=1)
    with full_precision(projections.device):  # bfloat16 would round similarities near 1 alike
        similarities = (projections @ projections.T / temperature).fill_diagonal_(-torch.inf)
    positives = torch.arange(len(projections), device=projections.device).roll(len(projections) // 2)
    return F.cross_entropy(similarities, positives)


# Style transfer -------------------------------------------------------------------------------------------------------


class FeatureMaps(nn.Module):
    """Frozen maps in which styles differ, standardised by channel over `images` (B, 3, S, S); and class logits.

    network: a CNN, or a Pretrained backbone of timm, which has no logits of styles.
    """

    def __init__(self, network, images):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        with torch.no_grad():
            levels = self.levels(images)[0]
        self.channels = [maps.shape[1] for maps in levels]
        self.moments = [torch.std_mean(maps.float(), (0, 2, 3), keepdim=True) for maps in levels]

    def levels(self, images):
        images = self.network.normalise(images)
        if hasattr(self.network, "backbone"):
            first = range(len(self.network.backbone.feature_info))[:4]
            return self.network.backbone.forward_intermediates(images, list(first), intermediates_only=True), None
        levels, maps = [], images
        for layer in self.network.body:
            maps = layer(maps)
            if isinstance(layer, nn.ReLU | Block):
                levels.append(maps)
        return levels, self.network.out(self.network.pool(maps))[:, : self.network.classes].float()

    def forward(self, images):
        """Maps [(B, C, H, W), ...] from fine to coarse, and logits (B, classes) or None, of images (B, 3, S, S)."""
        levels, logits = self.levels(images)
        pairs = zip(levels, self.moments, strict=True)
        return [(maps.float() - mean) / (std + 1e-4) for maps, (std, mean) in pairs], logits


class Critic(nn.Module):
    """A projection discriminator (Miyato and Koyama 2018): is an image a real painting of a style?

    It judges patches of the pixels and of frozen feature maps with the given channels, which makes it quick to train
    (Sauer et al. 2021, "Projected GANs Converge Faster").
    """

    def __init__(self, channels: list[int], styles: int, width: int = 64):
        super().__init__()
        sizes = ((3, width // 2), (width // 2, width), (width, width))
        pixels = nn.Sequential(
            *(layer for c_in, c_out in sizes for layer in (nn.Conv2d(c_in, c_out, 4, 2), nn.LeakyReLU(0.2)))
        )
        levels = [
            nn.Sequential(nn.Conv2d(c, width, 3), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 1), nn.LeakyReLU(0.2))
            for c in channels
        ]
        self.heads = nn.ModuleList([pixels, *levels])
        self.class_projections = nn.ModuleList(nn.Linear(styles, width) for _ in self.heads)

    def forward(self, images, maps, styles):
        """Scores [(B, H, W), ...], one per level; images (B, 3, S, S) in [0, 1], styles one-hot (B, styles)."""
        scores = []
        levels = zip(self.heads, self.class_projections, [4 * images - 2, *maps], strict=True)
        for head, project, x in levels:
            x = head(x)
            scores.append((x * project(styles)[:, :, None, None]).sum(1).float() / x.shape[1] ** 0.5)
        return scores


def generator_loss(scores: list):
    """Minus the critic's mean score of repainted images; each level has the same weight."""
    return -sum(score.mean() for score in scores) / len(scores)


def critic_loss(real: list, repainted: list, mismatched: list):
    """Hinge loss of the critic for its scores of real paintings, repainted ones, and real ones of another style.

    Without the last (Reed et al. 2016), the critic would learn the model's faults, but little about styles.
    """
    losses = [
        F.relu(1 - x).mean() + 0.7 * F.relu(1 + y).mean() + 0.3 * F.relu(1 + z).mean()
        for x, y, z in zip(real, repainted, mismatched, strict=True)
    ]
    return sum(losses) / len(losses)


class StyleQueue(nn.Module):
    """The last `length` rows of each style; a row has shape `shape`."""

    def __init__(self, styles: int, length: int, *shape: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(styles, length, *shape))
        self.register_buffer("counts", torch.zeros(styles, dtype=torch.long))

    @torch.no_grad()
    def add(self, rows, labels) -> None:
        """Add rows (B, ...) of styles `labels` (B,), from all processes, in the order that one process would use."""
        rows, labels = (gather(x).unflatten(0, (-1, len(x))).transpose(0, 1).flatten(0, 1) for x in (rows, labels))
        order = torch.arange(len(labels), device=labels.device)
        earlier = ((labels[:, None] == labels) & (order[:, None] > order)).sum(1)  # of this style in the batch
        places = (self.counts[labels] + earlier) % self.rows.shape[1]
        same_place = (labels[:, None] == labels) & (places[:, None] == places)
        last = (same_place * order).amax(1)  # where a batch fills a style's places more than once, its last rows stay
        self.rows[labels, places] = rows[last]
        self.counts.index_add_(0, labels, torch.ones_like(labels))

    def sample(self, labels, random):
        """Rows (B, n, ...) of styles `labels` (B,), for uniform numbers `random` (B, n)."""
        counts = self.counts[labels].clamp(1, self.rows.shape[1])
        return self.rows[labels[:, None], (to_device(random, labels.device) * counts[:, None]).long()]


def style_statistics(images, maps):
    """Statistics of style (B, D): mean and standard deviation of each map; those of coarse colours, and correlations.

    images (B, 3, S, S) in [0, 1]; maps [(B, C, H, W), ...].
    """
    colours = F.avg_pool2d(4 * images - 2, 4).flatten(2)
    mean = colours.mean(2)
    centred = colours - mean[:, :, None]
    covariance = centred @ centred.mT / colours.shape[2]
    std = (covariance.diagonal(dim1=1, dim2=2) + 1e-4).sqrt()
    correlation = (covariance / std[:, :, None] / std[:, None])[:, [0, 0, 1], [1, 2, 2]]
    return torch.cat([*(mean_std(values).flatten(1) for values in maps), mean, std, correlation], 1)


class StyleStatLoss(nn.Module):
    """Distance of style statistics to those of the nearest of a few real paintings of the style.

    A style has many modes: the statistics of one random painting would ask for their mean.
    """

    def __init__(self, styles: int, channels: list[int]):
        super().__init__()
        self.sizes = [*(2 * count for count in channels), 9]  # of the statistics of each level
        self.queue = StyleQueue(styles, 48, sum(self.sizes))

    def forward(self, statistics, style_statistics, targets, random):
        """Statistics (B, D) of repainted images and of real paintings in the styles `targets` (B,)."""
        self.queue.add(style_statistics, targets)
        candidates = self.queue.sample(targets, random)
        nearest = (candidates - statistics.detach()[:, None]).square().sum(2).argmin(1)
        wanted = candidates[torch.arange(len(nearest), device=nearest.device), nearest]
        pairs = zip(statistics.split(self.sizes, 1), wanted.split(self.sizes, 1), strict=True)
        return sum(F.smooth_l1_loss(x, target) for x, target in pairs) / len(self.sizes)


class PaletteLoss(nn.Module):
    """Distance of an image's coarse colours to those of the nearest of a few real paintings of the style.

    Sliced Wasserstein: the colours are compared in their order along random directions (Rabin et al. 2012).
    """

    def __init__(self, styles: int, crop: int):
        super().__init__()
        self.queue = StyleQueue(styles, 16, (crop // 4) ** 2, 3)

    @staticmethod
    def colours(images):
        return F.avg_pool2d(4 * images - 2, 4).flatten(2).mT  # (B, positions, 3)

    def forward(self, images, style_images, targets, random):
        """Repainted images and real paintings (B, 3, crop, crop) of the styles `targets` (B,)."""
        self.queue.add(self.colours(style_images), targets)
        directions = to_device(F.normalize(torch.randn(3, 16), dim=0), images.device)
        candidates = (self.queue.sample(targets, random) @ directions).sort(2).values
        values = (self.colours(images) @ directions).sort(1).values[:, None]
        return (values - candidates).abs().mean((2, 3)).amin(1).mean()


def feature_loss(maps: list, originals: list):
    """Distance of maps [(B, C, H, W), ...]: a reconstruction by pixels alone is blurred (Johnson et al. 2016)."""
    return sum(F.mse_loss(x, y) for x, y in zip(maps, originals, strict=True)) / len(maps)


def content_loss(maps, originals):
    """Distance of maps (B, C, H, W) without the mean and deviation of each, which are style (Ulyanov et al. 2016)."""
    return F.mse_loss(F.instance_norm(maps), F.instance_norm(originals))


def layout_loss(images, originals):
    """1 minus the correlation of coarse luminance."""
    return 1 - (layout(images) * layout(originals)).sum(1).mean()


def range_loss(images):
    """How far pixels lie outside [0, 1]."""
    return (F.relu(images - 1) + F.relu(-images)).mean()
