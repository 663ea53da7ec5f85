"""Class prior, reconstruction and contrastive loss, and the losses of style transfer."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather

from common.crops import batch_crop
from common.layers import Block, mean_std
from common.metrics import layout


def class_log_prior(labels, classes: int) -> torch.Tensor:
    """Log of each class's frequency among the labels (N,), float (classes,); for logit adjustment and class weights."""
    return (torch.bincount(labels, minlength=classes) / len(labels)).log()


def gather(values, dim: int = 0):
    """Concatenate a tensor over all processes along `dim`; gradients flow back to each process's own part."""
    return torch.cat(all_gather(values.contiguous()), dim) if dist.is_initialized() else values


class ReconstructionLoss(nn.Module):
    """Trains an Autoencoder: mean squared error over the `variance` of pixels, and NT-Xent of two crops of an image."""

    def __init__(self, model, contrastive_weight: float, variance: float):
        super().__init__()
        self.model, self.contrastive_weight, self.variance = model, contrastive_weight, variance

    def forward(self, images, second_crops=None):
        """The loss and the mean squared error; images, and other crops of them, are float (B, 3, crop, crop)."""
        if second_crops is None:
            mse = F.mse_loss(self.model(images).float(), images)
            return mse / self.variance, mse
        reconstructions, projections = self.model(images, second_crops)
        mse = F.mse_loss(reconstructions.float(), images)
        contrastive = nt_xent(projections.float().view(2, len(images), -1))
        return mse / self.variance + self.contrastive_weight * contrastive, mse


def nt_xent(projections, temperature: float = 0.2):
    """NT-Xent (Chen et al. 2020) of projections (2, B, D) of two crops of each image; a scalar.

    Each crop's positive is the other crop of its image; all other crops, those of other processes included, are its
    negatives.
    """
    projections = F.normalize(gather(projections, 1).flatten(0, 1), dim=1)
    similarities = (projections @ projections.T / temperature).fill_diagonal_(-torch.inf)
    positives = torch.arange(len(projections), device=projections.device).roll(len(projections) // 2)
    return F.cross_entropy(similarities, positives)


# Style transfer -------------------------------------------------------------------------------------------------------


class GradientReversal(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -weight: trains against an adversary (Ganin, Lempitsky 2015)."""

    @staticmethod
    def forward(context, values, weight):
        context.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(context, gradient):
        return -context.weight * gradient, None


class Critic(nn.Module):
    """A projection discriminator (Miyato and Koyama 2018): is an image a real painting of a style?

    It sees frozen feature maps with the given channels, which makes it quick to train (Sauer et al. 2021, "Projected
    GANs Converge Faster"), and those of a small network on the pixels.
    """

    def __init__(self, channels: list[int], styles: int, width: int = 64):
        super().__init__()
        layers = [nn.Conv2d(3, width // 2, 4, 2), nn.LeakyReLU(0.2), nn.Conv2d(width // 2, width, 4, 2)]
        self.pixel_net = nn.Sequential(*layers)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2))
            for c in (width, *channels)
        )
        self.class_projections = nn.ModuleList(nn.Linear(styles, width) for _ in self.heads)

    def forward(self, images, maps, styles):
        """Scores (B, positions); images float (B, 3, S, S), maps [(B, C, H, W), ...], styles one-hot (B, styles)."""
        scores = []
        maps = [self.pixel_net(2 * images - 1), *maps]
        for features, head, project in zip(maps, self.heads, self.class_projections, strict=True):
            scores.append(torch.einsum("bhwc,bc->bhw", head(features.movedim(1, 3)), project(styles)).flatten(1))
        return torch.cat(scores, 1)


class StyleLoss(nn.Module):
    """Trains a StyleAutoencoder to reconstruct images in their own style and to repaint them in a target style.

    Terms: mean squared error over `variance`; cross-entropy of the style head; and, by weights of the config, 0: off:
    cross-entropy (style_ce_weight) and feature statistics (style_stat_weight) of a frozen CNN, `feature_net`, a critic
    of its maps (critic_weight), the correlation of coarse luminance with the input (layout_weight), and an adversary
    that predicts the source style from the code (adversary_weight).

    The CNN sees crops of random position and scale: with a fixed view, the decoder learned patterns that fool this
    classifier and no other.
    """

    WEIGHTS = ("style_ce_weight", "style_stat_weight", "critic_weight", "layout_weight", "adversary_weight")

    def __init__(self, model, feature_net, config, variance: float):
        super().__init__()
        self.model, self.config, self.variance = model, config, variance
        self.frozen = [feature_net.requires_grad_(False)]  # in a list, so that it is not part of the state dict
        self.styles = model.style_head.out_features
        if config.critic_weight:
            blocks = [layer for layer in feature_net.body if isinstance(layer, Block)]
            self.critic = Critic([3, *(block.conv2.out_channels for block in blocks)], self.styles)
        if config.adversary_weight:
            layers = [nn.Linear(len(model.scales), 256), nn.ReLU(), nn.Linear(256, self.styles)]
            self.adversary = nn.Sequential(*layers)

    def forward(self, images, labels, targets, style_images, random):
        """The loss, and the mean squared error of the reconstructions.

        images: float (B, 3, crop, crop), with labels (B,); targets: the styles to repaint them in (B,); style_images:
        paintings of those styles (B, 3, crop, crop); random: uniform numbers in [0, 1), (6,), for the feature crop.
        """
        config, half = self.config, -(-len(images) // 2)  # half of the reconstructions are enough
        source, target = (F.one_hot(numbers, self.styles).float() for numbers in (labels, targets))
        codes, reconstructions, repainted, style_logits = self.model(images, source, target, half)
        mse = F.mse_loss(reconstructions.float(), images[:half])
        loss = mse / self.variance + F.cross_entropy(style_logits.float(), labels)
        if config.layout_weight:
            correlation = (layout(repainted.float()) * layout(images)).sum(1).mean()
            loss = loss + config.layout_weight * (1 - correlation)
        if config.adversary_weight:
            logits = self.adversary(GradientReversal.apply(codes, config.adversary_weight))
            loss = loss + F.cross_entropy(logits.float(), labels)
        if config.style_ce_weight or config.style_stat_weight or config.critic_weight:
            loss = loss + self.feature_loss(repainted, style_images, targets, target, random)
        return loss, mse

    def feature_loss(self, repainted, style_images, targets, target, random):
        """The terms that compare repainted images with paintings of the target style: `targets` (B,), one-hot too."""
        config = self.config
        side = 4 * round((0.7 + 0.7 * float(random[5])) * repainted.shape[-1] / 4)
        repainted, style_images = (batch_crop(images, side, random, 0.5) for images in (repainted, style_images))
        maps, logits = self.feature_maps(repainted)
        with torch.no_grad():
            style_maps, _ = self.feature_maps(style_images)
        loss = config.style_ce_weight * F.cross_entropy(logits.float(), targets)
        loss = loss + config.style_stat_weight * style_stat_loss(maps, style_maps)
        if config.critic_weight:
            repainted, *maps = (GradientReversal.apply(values, config.critic_weight) for values in (repainted, *maps))
            real, fake = self.critic(style_images, style_maps, target), self.critic(repainted, maps, target)
            loss = loss + F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        return loss

    def feature_maps(self, images):
        """The classifier's coarse input and its maps after each block, [(B, C, H, W), ...]; its logits (B, styles)."""
        feature_net = self.frozen[0]
        maps = feature_net.normalise(images)
        levels = [F.avg_pool2d(maps, 4)]  # colours, at the resolution of the first maps
        for layer in feature_net.body:
            maps = layer(maps)
            if isinstance(layer, Block):
                levels.append(maps)
        return levels, feature_net.out(feature_net.pool(maps))[:, : feature_net.classes]


def style_stat_loss(maps, style_maps):
    """Distance of the mean and standard deviation of feature maps to those of others, [(B, C, H, W), ...]; a scalar.

    In units of their standard deviation over the batch of all processes, by a smooth L1 loss.
    """
    distances = []
    for values, style_values in zip(maps, style_maps, strict=True):
        statistics, style_statistics = (mean_std(v.float()).flatten(1) for v in (values, style_values))
        std = gather(style_statistics).std(0) + 0.05
        distances.append(F.smooth_l1_loss(statistics / std, style_statistics / std))
    return sum(distances) / len(distances)
