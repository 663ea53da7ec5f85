"""Optimizers: Muon for convolutions, AdamW for the rest, their learning-rate schedule; a moving average of weights."""

import copy

import torch
from torch import nn

FUSED = ("cuda", "cpu")  # devices where AdamW is one kernel; on a CPU, too, it takes half of the time


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalized updates (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    For convolution weights (out, in, height, width), seen as matrices (out, in * height * width).
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}  # equal ones are orthogonalized together: a GPU works on one small matrix as long as on ten
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            for shape, weights in by_shape.items():
                gradients, momenta = [w.grad for w in weights], [self.state[w]["momentum"] for w in weights]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, gradients)
                updates = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
                updates = orthogonalize(torch.stack([update.flatten(1) for update in updates]))
                updates *= max(1, updates.shape[1] / updates.shape[2]) ** 0.5
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.view(-1, *shape)), alpha=-group["lr"])


def orthogonalize(matrices):
    """Matrices (..., M, N) with the same singular vectors, and singular values near 1: four Newton-Schulz steps."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(4):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x if wide else x.mT


def linear_warmup_decay(optimizer, steps: int, warmup: float = 0.2):
    """Learning-rate schedule: linear warm-up over a fraction of the steps, then linear decay to 0."""

    def factor(step):
        return min((step + 1) / (warmup * steps), (steps - step) / ((1 - warmup) * steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Optimizers:
    """AdamW and, with muon=True, Muon for the convolutions; one `step` also advances their schedules.

    Muon's learning rate is ten times AdamW's, in all recipes of this project.
    """

    def __init__(
        self, model, lr: float, weight_decay: float, steps: int, muon: bool = True, betas=(0.9, 0.999), momentum=0.9
    ):
        convolutions = [p for p in model.parameters() if p.ndim == 4 and muon]
        matrices = [p for p in model.parameters() if p.ndim > 1 and not (p.ndim == 4 and muon)]
        vectors = [p for p in model.parameters() if p.ndim == 1]  # biases and norms are not decayed
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = next(model.parameters()).device.type in FUSED
        self.optimizers = [torch.optim.AdamW(groups, lr, betas, fused=fused)]
        if convolutions:
            self.optimizers.append(Muon(convolutions, 10 * lr, momentum, weight_decay))
        self.schedules = [linear_warmup_decay(optimizer, steps) for optimizer in self.optimizers]

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for part in (*self.optimizers, *self.schedules):
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in (*self.optimizers, *self.schedules)]

    def load_state_dict(self, states):
        for part, state in zip((*self.optimizers, *self.schedules), states, strict=True):
            part.load_state_dict(state)


class MovingAverage(nn.Module):
    """The exponential moving average of a network's weights and buffers, as the network `module`.

    torch's AveragedModel would send its counter to the device at each step, and wait for that.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.module, self.decay = copy.deepcopy(model), decay
        self.register_buffer("n_averaged", torch.tensor(0))

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move towards the weights of `model`; the first call copies them."""
        averages, weights = ([*network.parameters(), *network.buffers()] for network in (self.module, model))
        pairs = list(zip(averages, weights, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), 1 - self.decay if self.n_averaged > 0 else 1.0)
        for average, count in pairs:
            if not average.is_floating_point():  # batches that a norm has seen
                average.copy_(count)
        self.n_averaged += 1
