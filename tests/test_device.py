"""Without a GPU: no training step waits for the device, and no network, loss or batch leaves a tensor on the CPU.

Training steps run on torch's meta device, which has shapes but no numbers, under a dispatch mode that stands in for the
transfers. Forward passes run on a fake `cuda` device, which refuses operands on two devices.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, flags
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import embed
import train
import train_autoencoder
import train_style
import wikiart
from common import run
from common.backbones import Pretrained
from common.crops import batch_crop, predict_probabilities, random_crops, views, windows
from common.losses import FeatureMaps, ReconstructionLoss

META, CUDA = torch.device("meta"), torch.device("cuda", 0)
aten = torch.ops.aten
# Whose result has a size that depends on numbers, or that return a number: the host waits for the device.
READ_BY_THE_HOST = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim)
READ_BY_THE_HOST += (aten.unique_consecutive, aten.bincount, aten.equal, aten.is_nonzero)


class Syncs(TorchDispatchMode):
    """Notes where the host waits for the meta device, `sites`: the functions of this project that made it wait."""

    def __init__(self):
        super().__init__()
        self.sites = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options, packet = options or {}, function.overloadpacket
        tensors = [value for value in flat(arguments) if isinstance(value, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if packet in (aten._to_copy, aten.copy_):
            source, target = arguments[packet is aten.copy_].device, options.get("device") or arguments[0].device
            blocking = not (options.get("non_blocking") or (packet is aten.copy_ and arguments[2:] == (True,)))
            if source.type == "meta" and target.type == "cpu":
                self.note()
                result = torch.ones(arguments[0].shape, dtype=options.get("dtype", arguments[0].dtype))
                return result if packet is aten._to_copy else arguments[0]
            if source.type == "cpu" and target.type == "meta" and blocking:
                self.note()
        elif packet in (aten.index, aten.index_put, aten.index_put_) and "meta" in devices:
            if any(tensor.dtype == torch.bool for tensor in tensors) or "cpu" in devices:
                self.note()
        elif packet in READ_BY_THE_HOST and "meta" in devices:
            self.note()
            if packet is aten._local_scalar_dense:
                return 0.0
        return function(*arguments, **options)

    def note(self):
        frame = sys._getframe()
        while Path(frame.f_code.co_filename).parent not in (ROOT, ROOT / "common"):
            frame = frame.f_back
        self.sites.append([name for name in frame.f_code.co_qualname.split(".") if name.isidentifier()][-1])


def flat(values):
    return torch.utils._pytree.tree_leaves(values)


def settings(module, *more):
    name, own = module.__name__, [*TINY, *flags(size=64, batch_size=16), *more]
    return train.configure(name, module.__doc__, module.SETTINGS, module.SHARED, own)


@pytest.fixture
def paintings(demo, monkeypatch):
    """The tiny demo, 81 paintings; losses are read every other step."""
    monkeypatch.setattr(run, "LOG_STEPS", 2)
    return wikiart.WikiArt(demo, "train", size=64, processes=1)


def test_the_mode_sees_what_waits():
    numbers, index = torch.rand(4, device=META), torch.tensor([0, 1])
    for wait in (
        lambda: numbers.sum().item(),
        lambda: numbers.cpu(),
        lambda: numbers.tolist(),
        lambda: bool(numbers.sum() > 0),
        lambda: numbers[index],
        lambda: numbers.add_(torch.rand(4).to(META)),
        lambda: torch.zeros(4).copy_(numbers),
    ):
        with Syncs() as syncs:
            syncs.note = lambda syncs=syncs: syncs.sites.append("here")
            wait()
        assert syncs.sites == ["here"]
    with Syncs() as syncs:
        (numbers * 2 + run.to_device(torch.rand(4), META)).square().mean()
    assert not syncs.sites


THREE_READS = ["read_losses"] * 3  # of five steps: after the second, the fourth and the last


@pytest.mark.parametrize("model", ["CNN", "MLP"])
@pytest.mark.parametrize("balance", ["logit", "weights"])
def test_a_step_of_the_classifier_does_not_wait(paintings, model, balance):
    config = settings(train, *flags(model=model, balance=balance, crop=32, width=8))
    sampler = wikiart.BalancedSampler(paintings.labels, "none", 0)
    criterion = train.ClassifierLoss(paintings, config, META)
    arguments = train.model_arguments(config, paintings, criterion.aux_classes)
    network = train.new_model(config, arguments).to(META)
    average, optimizers = train.MovingAverage(network, 0.9), train.Optimizers(network, 0.01, 0.1, 5)
    with Syncs() as syncs:
        train.train_epoch(network, average, paintings, sampler, criterion, optimizers, 1, config, META)
    assert syncs.sites == [*THREE_READS, "train_epoch"]  # the last one is for the means, after the steps


@pytest.mark.parametrize(("weight", "conditional"), [(0, False), (0.15, False), (0, True)])
def test_a_step_of_the_autoencoder_does_not_wait(paintings, weight, conditional):
    config = settings(train_autoencoder, *flags(contrastive_weight=weight, crop=32, width=8, code=4))
    config.conditional = conditional
    network, _ = train_autoencoder.new_model(config, paintings, META)
    criterion = ReconstructionLoss(network, weight, 0.06)
    optimizers = train.Optimizers(network, 0.01, 0.0, 5)
    with Syncs() as syncs:
        train_autoencoder.train_epoch(criterion, paintings, optimizers, 1, config, META)
    assert syncs.sites == [*THREE_READS, "train_epoch"]


def test_a_step_of_the_style_model_does_not_wait(paintings):
    config = settings(train_style, *flags(crop=64, width=8, per_class=10))
    network = wikiart.CNN(8, width=8, depth=1, pooling="covariance", dropout=0.0).to(META)
    features = FeatureMaps(network, torch.rand(4, 3, 64, 64, device=META))
    _, parts = train_style.new_networks(features, paintings, 5, config, META)
    sampler = wikiart.BalancedSampler(paintings.labels, "resample", 10)
    with Syncs() as syncs:
        train_style.train_epoch(parts, features, paintings, sampler, 1, config, META)
    assert syncs.sites == [*THREE_READS, "train_epoch"]


@pytest.mark.parametrize("fit", ["fit_mlp", "finetune"])
def test_a_step_on_a_backbone_does_not_wait(paintings, monkeypatch, fit):
    pytest.importorskip("timm")
    monkeypatch.setattr(embed, "FINETUNE_EPOCHS", 1)
    config = settings(embed, *flags(epochs=1, finetune="all"))
    network = Pretrained(8, "test_efficientnet", 32, 256, 0).to(META)
    rows = {path: row for row, path in enumerate(paintings.paths)}
    features = np.zeros((len(rows), 256), np.float32)
    task = embed.Task("style", paintings, paintings, network, features, rows, config, META)
    steps = -(-len(task.rows["training"]) // (16 if fit == "finetune" else 128))
    with Syncs() as syncs:
        getattr(embed, fit)(task, config)
    assert set(syncs.sites) <= {"head", "read_losses", "predict"}  # before the steps, and after an epoch
    assert syncs.sites.count("read_losses") == -(-steps // 2)


def test_a_step_of_lora_waits_for_the_token_ids_only(paintings, monkeypatch):
    pytest.importorskip("diffusers")
    import lora
    from common import diffusion, tiny_diffusion

    config = settings(lora, "-c", str(ROOT / "settings/tiny.json"), *flags(batch_size=40, accumulate=2, rank=2))
    pipe = tiny_diffusion.new_pipeline().to(META)
    adapter = diffusion.Adapter(pipe, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), 0.01)  # two steps
    parts = {"optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu", enabled=False)}
    parts["lr_schedule"] = lora.linear_warmup_decay(optimizer, 2)
    sampler = wikiart.BalancedSampler(paintings.labels, "none", 0)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know meta
    with Syncs() as syncs:
        lora.train_epoch(adapter, paintings, torch.rand(81, 48, 4, 4).half(), sampler, parts, 1, config)
    ours = [site for site in syncs.sites if site != "text_conditions"]  # diffusers sends the ids of each part by itself
    assert ours == ["denoising_loss", "read_losses", "train_epoch"]  # the noise schedule moves to the device once
    assert syncs.sites.count("text_conditions") == 2 * 2


# A fake CUDA device ---------------------------------------------------------------------------------------------------


class FakeCuda(FakeTensorMode):
    """Tensors on `cuda` are fake: they have no numbers. Those on the CPU stay as they are, for crops' coordinates."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        values = flat((arguments, options or {}))
        if any(isinstance(value, FakeTensor) or value == CUDA for value in values if not is_real(value)):
            return super().__torch_dispatch__(function, types, arguments, options)
        return function(*arguments, **(options or {}))


def is_real(value) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)


def move(module, device, **_):
    """Module.to, which cannot exchange a real tensor for a fake one."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            part.register_parameter(name, torch.nn.Parameter(weight.detach().to(device), weight.requires_grad))
        for name, value in part.named_buffers(recurse=False):
            part.register_buffer(name, value.to(device))
    return module


def pinned(tensor):
    """Tensor.pin_memory, without pinning."""
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin a tensor on {tensor.device}: only dense CPU tensors can be pinned")
    return tensor


@pytest.fixture
def cuda(monkeypatch):
    """The device `cuda`, faked. Autocast and backward need a real one, so they are switched off; so is pinned memory,
    but for what CUDA refuses to pin."""
    for module in (train, train_autoencoder, train_style, embed, wikiart):
        monkeypatch.setattr(module, "autocast", lambda *_, **__: contextlib.nullcontext(), raising=False)
    monkeypatch.setattr(train_style, "update", lambda *_, **__: None)
    monkeypatch.setattr(torch.nn.Module, "to", move)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 10**9))
    with FakeCuda(allow_non_fake_inputs=True):
        yield CUDA


def on(device, *values) -> bool:
    return all(value.device == device for value in flat(values))


def test_the_fake_device_refuses_tensors_of_the_cpu(cuda):
    with pytest.raises(RuntimeError, match="two devices"):
        torch.rand(4).to(cuda) + torch.rand(4)


def test_a_tensor_on_the_device_is_not_pinned(cuda):
    numbers = run.to_device(torch.rand(4), cuda)
    assert on(cuda, numbers, run.to_device(numbers, cuda))


def test_latents_of_the_small_base_are_on_the_device_before_the_loss(cuda, monkeypatch):
    pytest.importorskip("diffusers")
    from common import diffusion, tiny_diffusion

    monkeypatch.setattr(diffusion, "precision", lambda device: torch.float32)
    pipe = tiny_diffusion.new_pipeline()
    for part in diffusion.networks(pipe):
        part.to(cuda)
    latents = pipe.vae.encode(torch.rand(2, 3, 64, 64).to(cuda)).latent_dist.mean
    arguments = (diffusion.noise_schedule(pipe), latents, torch.randn(latents.shape), torch.tensor([1, 500]))
    assert on(cuda, latents, diffusion.denoising_loss(pipe, *arguments, ["a town", ""]))


NETWORKS = {
    "CNN": {"classes": 8, "width": 8, "depth": 1, "pooling": "covariance", "dropout": 0.5, "aux_classes": 3},
    "MLP": {"classes": 8, "width": 8, "crop": 64},
    "Autoencoder": {"crop": 64, "code": 4, "width": 8, "projection_dim": 16, "styles": 8},
    "StyleAutoencoder": {"styles": 8, "width": 8},
    "Pretrained": {"classes": 8, "backbone": "test_efficientnet", "size": 32, "features": 256, "stages": 0},
    "resnet18": {"classes": 8, "mean": [0.5] * 3, "std": [0.2] * 3},
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_a_network_leaves_nothing_on_the_cpu(cuda, name, training):
    if name == "Pretrained":
        pytest.importorskip("timm")
    network = wikiart.make_model(name, NETWORKS[name]).train(training).to(cuda)
    styles = [torch.eye(8)[:4].to(cuda)] * 2 if name == "StyleAutoencoder" else []
    images = torch.rand(4, 3, 64, 64).to(cuda)
    assert on(cuda, network(images, *styles))
    if name == "Autoencoder":
        maps = network.encode_with_maps(images)[1]
        assert on(
            cuda, network(images, torch.eye(8)[:4].to(cuda)), network.project(maps, images), network.features(images)
        )
    if name == "CNN":
        assert on(cuda, network.features(images), network.evidence(images[:1], 2))


@pytest.mark.parametrize("held", [True, False])
def test_a_batch_is_on_the_device_completely(paintings, cuda, held):
    if held:
        paintings.move_to(cuda)
    assert (paintings.on_device is not None) == held
    batches = torch.arange(80).split(16)
    count = 0
    for items, pixels, labels in paintings.batches(batches, cuda):
        assert torch.equal(items, batches[count])
        crops = random_crops(pixels, 32, torch.rand(7, 16)), batch_crop(pixels, 32, torch.rand(5))
        assert on(cuda, pixels, labels, crops, windows(pixels, 32, torch.rand(2), torch.rand(2, 16)), views(pixels, 32))
        count += 1
    assert count == 5


@pytest.mark.parametrize("balance", ["logit", "weights"])
def test_the_losses_are_on_the_device(paintings, cuda, balance):
    config = settings(train, *flags(balance=balance))
    criterion, items = train.ClassifierLoss(paintings, config, cuda), torch.arange(16)
    outputs = torch.rand(16, 8 + criterion.aux_classes).to(cuda)
    assert criterion.auxiliary
    assert on(cuda, criterion(outputs, paintings.labels[items].to(cuda), items))
    network = wikiart.make_model("Autoencoder", NETWORKS["Autoencoder"]).to(cuda)
    images = torch.rand(4, 3, 64, 64).to(cuda)
    assert on(cuda, ReconstructionLoss(network, 0.15, 0.06)(images, images))


def test_a_step_of_the_style_model_is_on_the_device(paintings, cuda):
    config = settings(train_style, *flags(crop=64, width=8))
    images, labels = torch.rand(4, 3, 64, 64).to(cuda), torch.arange(4).to(cuda)
    features = FeatureMaps(wikiart.make_model("CNN", NETWORKS["CNN"]).to(cuda), images)
    _, parts = train_style.new_networks(features, paintings, 5, config, cuda)
    numbers = torch.rand(4, train_style.CANDIDATES), [0.2, 0.5, 0.5]
    record = train_style.train_step(parts, features, images, images, labels, labels.flip(0), *numbers)
    assert len(record) == 11 and on(cuda, record)


def new_classifier(device):
    checkpoint = {"model": "CNN", "arguments": NETWORKS["CNN"] | {"aux_classes": 0}, "classes": list("abcdefgh")}
    checkpoint |= {"data": {"size": 64, "resize": "squash"}, "crop": 32, "tta_scales": [1.0, 1.5, 0.7]}
    checkpoint["weights"] = wikiart.make_model("CNN", checkpoint["arguments"]).state_dict()
    return wikiart.Classifier(checkpoint, device)


def test_images_are_there_before_mps_copies_them(monkeypatch):
    """It may start to copy after the tensor is gone, so the host has to wait."""
    classifier, copies = new_classifier(torch.device("cpu")), []

    def to(tensor, device, non_blocking=False):
        copies.append((device.type, non_blocking))
        return tensor

    classifier.device = torch.device("mps")
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert classifier.prepare(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 3, 64, 64)
    assert copies == [("mps", False)]


def test_labelling_is_on_the_device(cuda):
    classifier = new_classifier(cuda)
    images = torch.zeros(2, 3, 80, 70, dtype=torch.uint8)
    prepared = classifier.prepare(images)
    assert on(cuda, prepared, predict_probabilities(classifier.model, prepared, 32, [1.0, 1.5, 0.7]))
