"""The layers that the networks of wikiart.py are made of."""

import contextlib
import threading

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.run import to_device


class Normalise(nn.Module):
    """Pixels in [0, 1] to mean 0 and standard deviation 1 per channel; the statistics are saved with the weights."""

    def __init__(self, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images):
        return (images - self.mean).div_(self.std)  # one new tensor instead of two

    def inverse(self, images):
        """Back to pixels in [0, 1], or a little beyond."""
        return images * self.std + self.mean


class SumOverProcesses(torch.autograd.Function):
    """The sum of the tensors of all processes, in each of them; its gradient is summed over them, too."""

    @staticmethod
    def forward(_, values):
        values = values.clone()
        dist.all_reduce(values)
        return values

    backward = forward


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batch of all processes, on CPUs too (nn.SyncBatchNorm works on GPUs only).

    Statistics are computed in float32; the output has the type of the input. The variance is the mean of the squares of
    centred values: E[x^2] - E[x]^2 would lose all digits where the mean is much larger than the standard deviation.
    """

    def forward(self, x):
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        values = x.float()
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = SumOverProcesses.apply(values.sum((0, 2, 3))) / count
        centred = values - mean.view(1, -1, 1, 1)
        variance = SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask does not depend on the number of processes.

    Every process draws the mask of the whole batch and uses its share, so that several processes train like one.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or not self.p:
            return x
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mask = torch.rand(len(x) * world_size, *x.shape[1:])[rank::world_size] >= self.p
        return x * to_device(mask, x.device) / (1 - self.p)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016); stride 2 halves the size."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = BatchNorm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(channels_out)
        self.shortcut = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            pool = nn.AvgPool2d(stride, ceil_mode=True)
            self.shortcut = nn.Sequential(
                pool, nn.Conv2d(channels_in, channels_out, 1, bias=False), BatchNorm(channels_out)
            )

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def backbone(width: int, depth: int = 1, stem: str = "patch") -> nn.Sequential:
    """Residual blocks at three scales: images (B, 3, S, S) to maps (B, 4 * width, S / 16, S / 16).

    Brushwork is local, so the stem quarters the size at once: in patches of 4 x 4 pixels or, with stem="convolution",
    by overlapping convolutions (Xiao et al. 2021, "Early convolutions help transformers see better").
    """
    half = width // 2
    layers = {
        "patch": [nn.Conv2d(3, width, 4, stride=4, bias=False)],
        "convolution": [
            *(nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), BatchNorm(half), nn.ReLU()),
            *(nn.Conv2d(half, half, 3, padding=1, bias=False), BatchNorm(half), nn.ReLU()),
            nn.Conv2d(half, width, 4, stride=2, padding=1, bias=False),
        ],
    }[stem]
    layers += [BatchNorm(width), nn.ReLU()]
    channels = width
    for channels_out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        layers.append(Block(channels, channels_out, stride))
        layers += [Block(channels_out, channels_out) for _ in range(depth - 1)]
        channels = channels_out
    return nn.Sequential(*layers)


def mean_std(maps, std: bool = True):
    """Mean and standard deviation of each map over its positions: (B, C, H, W) to (B, 2 * C, 1, 1).

    Without `std`, the means alone: (B, C, 1, 1).
    """
    values = maps.movedim(1, 3).flatten(1, 2)  # the memory order of channels_last: four times as fast as var()
    statistics = values.mean(1)
    if std:
        deviations = ((values - statistics[:, None]).square().mean(1) + 1e-5).sqrt()
        statistics = torch.cat([statistics, deviations], 1)
    return statistics[:, :, None, None]


def covariances(maps):
    """Covariances of all pairs of maps over positions, over the roots of their sizes: (B, C, H, W) to (B, pairs, 1, 1).

    Which features occur together shows the style (Gatys et al. 2016). Without the root, a few large covariances
    outweigh the others (Lin et al. 2015, "Bilinear CNNs").
    """
    values = (maps - maps.mean((2, 3), keepdim=True)).flatten(2).float()
    first, second = torch.triu_indices(maps.shape[1], maps.shape[1], device=maps.device)
    values = (values @ values.mT / values.shape[2])[:, first, second]
    return (values / (values.abs() + 1e-3).sqrt())[:, :, None, None]


class Upsample(nn.Upsample):
    """Maps at twice the size, bilinear."""

    def __init__(self):
        super().__init__(scale_factor=2, mode="bilinear")


class FiLM(nn.Module):
    """Scales and shifts maps (B, C, H, W) by an embedding (B, D) (Perez et al. 2018). It starts as the identity."""

    def __init__(self, embedding: int, channels: int):
        super().__init__()
        self.to_gamma_beta = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.to_gamma_beta.weight)
        nn.init.zeros_(self.to_gamma_beta.bias)

    def forward(self, maps, embedding):
        gamma, beta = self.to_gamma_beta(embedding)[:, :, None, None].to(maps.dtype).chunk(2, 1)
        return torch.addcmul(beta, maps, 1 + gamma)


class ConvNorm(nn.Module):
    """Convolution with reflection at the edges, and batch norm; with an `embedding`, also FiLM.

    Zeros at the edges would tell the layers where they are.
    """

    def __init__(self, channels_in: int, channels: int, kernel: int = 3, stride: int = 1, embedding: int = 0):
        super().__init__()
        padding = {"padding": (kernel - stride + 1) // 2, "padding_mode": "reflect"}
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, bias=False, **padding)
        self.norm = BatchNorm(channels)
        self.film = FiLM(embedding, channels) if embedding else None

    def forward(self, x, embedding=None):
        x = self.norm(self.conv(x))
        return self.film(x, embedding) if self.film else x


class FiLMBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions, both conditioned on an embedding (B, D)."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, embedding=embedding)
        self.conv2 = ConvNorm(channels, channels, embedding=embedding)

    def forward(self, x, embedding):
        return x + self.conv2(F.relu(self.conv1(x, embedding)), embedding)


def parameter_count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def map_evidence(model: nn.Module, image, label: int):
    """How much each region of one image (1, 3, H, W) contributed to a class's logit, float (h, w).

    The last maps of any network that pools maps at its end, times the logit's gradient (HiResCAM, Draelos and Carin
    2020), relative to the mean of all classes. With a linear layer after the mean over the maps, regions sum to the
    logit minus its bias.
    """
    last, thread = {}, threading.get_ident()

    def keep(_, __, output):
        own = thread == threading.get_ident()  # another thread's image is another visitor's
        if own and torch.is_tensor(output) and output.dim() == 4 and output.shape[2:].numel() > 1:
            last["maps"] = output

    with contextlib.ExitStack() as hooks, torch.enable_grad():
        for module in model.modules():
            hooks.callback(module.register_forward_hook(keep).remove)
        logits = model(image)[0].float()
        [slope] = torch.autograd.grad(logits[label] - logits.mean(), last["maps"])
    return (last["maps"].detach() * slope).float().sum(1)[0]


@torch.no_grad()
def occlusion_evidence(model: nn.Module, image, label: int, cells: int = 7):
    """How much each region of one image (1, 3, H, W) contributed to a class's logit, float (cells, cells).

    What the logit, relative to the mean of all, loses where the region is covered with the image's mean colour (Zeiler
    and Fergus 2014). It needs nothing of the network, and cells ** 2 predictions.
    """
    rows, columns = (torch.arange(side, device=image.device) * cells // side for side in image.shape[2:])
    covered = rows[:, None] * cells + columns == torch.arange(cells**2, device=image.device)[:, None, None]
    images = torch.where(covered[:, None], image.mean((2, 3), keepdim=True), image)
    logits = torch.cat([model(part).float() for part in (*images.split(cells), image)])
    relative = logits[:, label] - logits.mean(1)
    return (relative[-1] - relative[:-1]).view(cells, cells)
