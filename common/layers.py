"""The layers that the networks of wikiart.py are made of."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce


class Normalise(nn.Module):
    """Pixels in [0, 1] to mean 0 and deviation 1 per channel, by statistics that are stored with the weights."""

    def __init__(self, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images):
        return (images - self.mean).div_(self.std)  # one new tensor instead of two

    def restore(self, images):
        """The way back: to pixels in [0, 1], or a little beyond."""
        return images * self.std + self.mean


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the whole batch of all processes (nn.SyncBatchNorm does so on GPUs only)."""

    def forward(self, x):
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        count = x.numel() / x.shape[1] * dist.get_world_size()
        sums = all_reduce(torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])) / count
        mean, variance = sums[0], sums[1] - sums[0].square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)


class Dropout(nn.Module):
    """Drops this share of the features (Srivastava et al. 2014), drawn for all processes' pictures by each of them, so
    that several processes train like one."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x):
        if not self.training or not self.share:
            return x
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        kept = torch.rand(len(x) * world, *x.shape[1:])[rank::world] >= self.share  # picture i is process i % world's
        return x * kept.to(x.device) / (1 - self.share)


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016); stride 2 halves the picture."""

    def __init__(self, before: int, after: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = BatchNorm(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(after)
        self.shortcut = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(before, after, 1, bias=False), BatchNorm(after)
            )

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def trunk(width: int, depth: int = 1) -> nn.Sequential:
    """Residual blocks at three scales: images (B, 3, S, S) to maps (B, 4 * width, S / 16, S / 16).

    The first layer sees patches of 4 x 4: brushwork is local, and a stride of 4 pays for a larger picture.
    """
    stem = [nn.Conv2d(3, width, 4, stride=4, bias=False), BatchNorm(width), nn.ReLU()]
    blocks, before = [], width
    for after, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        blocks += [Block(before, after, stride)] + [Block(after, after) for _ in range(depth - 1)]
        before = after
    return nn.Sequential(*stem, *blocks)


def texture(maps, deviation: bool = True):
    """Mean and deviation of each map, wherever in the picture: (B, C, H, W) to (B, 2 * C, 1, 1)."""
    places = maps.movedim(1, 3).flatten(1, 2)  # as they lie in memory with channels_last: four times as fast as var()
    means = places.mean(1)
    if deviation:
        spreads = ((places - means[:, None]).square().mean(1) + 1e-5).sqrt()
        means = torch.cat([means, spreads], 1)
    return means[:, :, None, None]


class Up(nn.Upsample):
    """Maps at twice the size."""

    def __init__(self):
        super().__init__(scale_factor=2, mode="bilinear")


class Film(nn.Module):
    """Scales and shifts maps (B, C, H, W), or codes (B, C), as an embedding (B, D) asks for (Perez et al. 2018).

    To begin with it changes nothing.
    """

    def __init__(self, embedding: int, channels: int):
        super().__init__()
        self.ask = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.ask.weight)
        nn.init.zeros_(self.ask.bias)

    def forward(self, maps, embedding):
        gamma, beta = self.ask(embedding).view(len(maps), 2, -1, *[1] * (maps.ndim - 2)).unbind(1)
        return maps * (1 + gamma) + beta
