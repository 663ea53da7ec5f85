"""What training asks of the autoencoders, beyond giving back the painting; and the measures of pictures behind it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather

from common.crops import batch_crop
from common.layers import Block, mean_std


def class_log_prior(labels, classes: int) -> torch.Tensor:
    """Log of each class's frequency among the labels (N,), float (classes,); for logit adjustment and class weights."""
    return (torch.bincount(labels, minlength=classes) / len(labels)).log()


def contrast(points, temperature: float = 0.2):
    """NT-Xent (Chen et al. 2020): of all windows, the other one of its painting shall be each one's nearest.

    points (2, B, D): of two windows of each painting; those of all processes count.
    """
    points = F.normalize(of_all_processes(points, 1).flatten(0, 1), dim=1)
    likeness = (points @ points.T / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(len(points), device=points.device).roll(len(points) // 2)
    return F.cross_entropy(likeness, other)


def of_all_processes(values, dim: int = 0):
    """The values of the whole batch, of which every process holds a part; gradients find their way back."""
    return torch.cat(all_gather(values.contiguous()), dim) if dist.is_initialized() else values


def luminance(images):
    """How light a picture is: (N, 3, S, S) to (N, 1, S, S)."""
    return (images * images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def layout(images, side: int = 16):
    """Where a picture is light and where dark, (N, side * side), of length 1; a dot product is a correlation."""
    coarse = F.adaptive_avg_pool2d(luminance(images), side).flatten(1)
    coarse = coarse - coarse.mean(1, keepdim=True)
    return coarse / (coarse.norm(dim=1, keepdim=True) + 1e-4)


class Reverse(torch.autograd.Function):
    """Hands a gradient back with its sign turned (Ganin and Lempitsky 2015): what comes before is trained against what
    comes after, in one step."""

    @staticmethod
    def forward(context, values, weight):
        context.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(context, gradient):
        return -context.weight * gradient, None


class Critic(nn.Module):
    """Tells a style's paintings from what is repainted in it, at each place of a frozen classifier's maps.

    Maps instead of pixels make it small and quick to learn (Sauer et al. 2021, "Projected GANs converge faster"). A
    look at the pixels shows it what these maps are blind to.
    """

    def __init__(self, channels: list[int], styles: int, width: int = 64):
        super().__init__()
        self.eye = nn.Sequential(nn.Conv2d(3, width // 2, 4, 2), nn.LeakyReLU(0.2), nn.Conv2d(width // 2, width, 4, 2))
        self.looks = nn.ModuleList(
            nn.Sequential(nn.Linear(c, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2))
            for c in (width, *channels)
        )
        self.wants = nn.ModuleList(nn.Linear(styles, width) for _ in self.looks)  # a direction for each style

    def forward(self, images, maps, shares):
        """Scores (B, places) of images (B, 3, S, S) with maps [(B, C, H, W), ...] as paintings of the styles."""
        maps = [self.eye(2 * images - 1), *maps]
        scores = [torch.einsum("bhwc,bc->bhw", look(each.movedim(1, 3)), want(shares)).flatten(1)
                  for each, look, want in zip(maps, self.looks, self.wants, strict=True)]  # fmt: skip
        return torch.cat(scores, 1)


class Repaint(nn.Module):
    """Trains a StyleAutoencoder: the own style gives the painting back, another style has to come true.

    What coming true means is said by our classifier, which stays as it is: it names the style asked for
    (`hit_weight`), its maps have the statistics of a real painting of that style (`texture_weight`), and a critic
    cannot tell them from those (`critic_weight`). It looks through windows of random size and scale, or the decoder
    would learn patterns that fool this classifier and nobody else. The layout has to stay (`layout_weight`), and the
    content must not tell a spy the style (`spy_weight`): so the decoder has to ask for it.
    """

    WEIGHTS = ("hit_weight", "texture_weight", "critic_weight", "layout_weight", "spy_weight")

    def __init__(self, model, guide, config, variance: float):
        super().__init__()
        self.model, self.config, self.variance = model, config, variance
        self.guide = [guide.requires_grad_(False)]  # in a list: no part of what is trained and saved
        styles = model.reader.out_features
        if config.critic_weight:
            blocks = [layer for layer in guide.body if isinstance(layer, Block)]
            self.critic = Critic([3, *(block.conv2.out_channels for block in blocks)], styles)
        if config.spy_weight:
            self.spy = nn.Sequential(nn.Linear(len(model.scales), 256), nn.ReLU(), nn.Linear(256, styles))

    def look(self, images):
        """What the guide sees: coarse colours, its maps at three scales, and its logits."""
        guide = self.guide[0]
        maps = guide.normalise(images)
        levels = [F.avg_pool2d(maps, 4)]  # colours, as coarse as the first maps
        for layer in guide.body:
            maps = layer(maps)
            if isinstance(layer, Block):
                levels.append(maps)
        return levels, guide.out(guide.pool(maps))[:, : guide.classes]

    def forward(self, images, labels, others, reals, numbers):
        """The loss, and the mean squared error of what comes back in the own style.

        images (B, 3, crop, crop) with labels (B,), the styles to paint them in (B,), reals: paintings of those styles
        (B, 3, crop, crop), numbers: random ones in [0, 1) (6,) that choose the window.
        """
        side = 4 * round((0.7 + 0.7 * float(numbers[5])) * images.shape[-1] / 4)
        config, half = self.config, -(-len(images) // 2)
        shares, asked = (F.one_hot(each, self.model.reader.out_features).float() for each in (labels, others))
        codes, same, other, read = self.model(images, shares, asked, half)
        error = F.mse_loss(same.float(), images[:half])
        loss = error / self.variance + F.cross_entropy(read.float(), labels)
        if config.layout_weight:
            loss = loss + config.layout_weight * (1 - (layout(other.float()) * layout(images)).sum(1).mean())
        if config.spy_weight:
            told = self.spy(Reverse.apply(codes, config.spy_weight))
            loss = loss + F.cross_entropy(told.float(), labels)
        if config.hit_weight or config.texture_weight or config.critic_weight:
            other, reals = (batch_crop(each, side, numbers, 0.5) for each in (other, reals))
            maps, logits = self.look(other)
            with torch.no_grad():
                aims, _ = self.look(reals)
            loss = loss + config.hit_weight * F.cross_entropy(logits.float(), others)
            loss = loss + config.texture_weight * unlike(maps, aims)
            if config.critic_weight:
                other, *maps = (Reverse.apply(each, config.critic_weight) for each in (other, *maps))
                true, false = self.critic(reals, aims, asked), self.critic(other, maps, asked)
                loss = loss + F.relu(1 - true).mean() + F.relu(1 + false).mean()
        return loss, error


def unlike(maps, aims):
    """How far the textures of maps are from those of others, in deviations of the latter over the batch; a scalar."""
    distances = []
    for one, other in zip(maps, aims, strict=True):
        one, other = mean_std(one.float()).flatten(1), mean_std(other.float()).flatten(1)
        spread = of_all_processes(other).std(0) + 0.05
        distances.append(F.smooth_l1_loss(one / spread, other / spread))
    return sum(distances) / len(distances)


class Copy(nn.Module):
    """Trains an Autoencoder: the code gives the painting back, and windows of one painting are told from others by
    their textures (`manner_weight`)."""

    def __init__(self, model, config, variance: float):
        super().__init__()
        self.model, self.config, self.variance = model, config, variance

    def forward(self, images, glimpses=None):
        """The loss, and the mean squared error; images and other windows of the same paintings (B, 3, crop, crop)."""
        if glimpses is None:
            error = F.mse_loss(self.model(images).float(), images)
            return error / self.variance, error
        painted, points = self.model(images, glimpses)
        error = F.mse_loss(painted.float(), images)
        apart = contrast(points.float().view(2, len(images), -1))
        return error / self.variance + self.config.manner_weight * apart, error
