"""On a GPU: what is computed there agrees with the CPU. Skipped where PyTorch finds no CUDA."""

import contextlib
import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, TINY_TRAIN, flags, picture, script
from PIL import Image

if not torch.cuda.is_available():
    pytest.skip("no CUDA here", allow_module_level=True)

import style_transfer
import test as evaluation
import train
import train_style
import wikiart
from common import crops
from common.losses import FeatureMaps, ReconstructionLoss
from common.optim import Optimizers

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ON_GPU = ["--device", "cuda"]
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 2e-2  # relative, in float32 without TF32


@pytest.fixture
def float32(monkeypatch):
    """The GPU computes in float32, as the CPU does."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(train_style, "autocast", lambda *_, **__: contextlib.nullcontext())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def classification(network, images):
    return F.cross_entropy(network(images)[:, :8], torch.arange(len(images), device=images.device) % 8)


NETWORKS = {
    "CNN": ({"classes": 8, "width": 16, "depth": 2, "pooling": "covariance", "dropout": 0.5, "aux_classes": 3}, None),
    "MLP": ({"classes": 8, "width": 16, "crop": 64}, None),
    "resnet18": ({"classes": 8, "mean": [0.5] * 3, "std": [0.2] * 3}, None),
    "Autoencoder": ({"crop": 64, "code": 16, "width": 16, "projection_dim": 16}, ReconstructionLoss),
}


def one_step(network, images, device, reconstruction):
    """The loss and the gradients of one training step, on the CPU."""
    torch.manual_seed(0)  # of dropout
    network = copy.deepcopy(network).train().to(device, memory_format=torch.channels_last)
    optimizers, images = Optimizers(network, 0.001, 0.1, 10), images.to(device)
    if reconstruction:
        loss = reconstruction(network, 0.15, 0.06)(images, images.flip(3))[0]
    else:
        loss = classification(network, images)
    loss.backward()
    gradients = {name: weight.grad.cpu() for name, weight in network.named_parameters() if weight.grad is not None}
    optimizers.step()
    assert all(weight.isfinite().all() for weight in network.parameters())
    return loss.item(), gradients


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_agrees_with_the_cpu(float32, name):
    arguments, reconstruction = NETWORKS[name]
    torch.manual_seed(1)
    network, images = wikiart.make_model(name, arguments), torch.rand(16, 3, 64, 64)
    (loss, gradients), (other, others) = (one_step(network, images, each, reconstruction) for each in (CPU, CUDA))
    assert other == pytest.approx(loss, rel=LOSS_TOLERANCE)
    largest = max(gradient.norm() for gradient in gradients.values())
    for key, gradient in gradients.items():  # small ones are sums that cancel
        assert (gradient - others[key]).norm() < GRADIENT_TOLERANCE * max(gradient.norm(), 0.01 * largest), key


def test_a_step_of_the_style_model_agrees_with_the_cpu(float32, demo):
    own = [*TINY, *flags(size=64, crop=64, width=8, batch_size=8)]
    config = train.configure("train_style", "", train_style.SETTINGS, train_style.SHARED, own)
    data = wikiart.WikiArt(demo, "train", size=64, processes=1)
    torch.manual_seed(1)
    network, images = wikiart.make_model("CNN", NETWORKS["CNN"][0]), torch.rand(8, 3, 64, 64)
    records = []
    for device in (CPU, CUDA):
        inputs, labels = images.to(device), (torch.arange(8) % 8).to(device)
        features = FeatureMaps(copy.deepcopy(network).to(device), inputs)
        _, parts = train_style.new_networks(features, data, 10, config, device)
        torch.manual_seed(2)
        numbers = torch.full((8, train_style.CANDIDATES), 0.5), [0.7, 0.5, 0.5]
        step = (inputs, inputs.flip(0), labels, labels.flip(0), *numbers)
        records.append(train_style.train_step(parts, features, *step))
    for key, value in records[0].items():
        assert records[1][key].item() == pytest.approx(value.item(), rel=5e-3, abs=1e-4), key


def test_pixels_on_the_device_and_streamed_give_the_same_batches(demo):
    streamed, held = (wikiart.WikiArt(demo, "train", size=32, processes=1) for _ in range(2))
    held.move_to(CUDA)
    assert held.on_device.is_cuda and streamed.on_device is None
    batches = torch.randperm(80, generator=torch.Generator().manual_seed(0)).split(16)
    pairs = zip(streamed.batches(batches, CUDA), held.batches(batches, CUDA), batches, strict=True)
    for (_, pixels, labels), (_, others, other_labels), items in pairs:
        assert pixels.is_cuda and others.is_cuda
        assert torch.equal(pixels, others) and torch.equal(labels, other_labels)
        assert torch.equal(pixels.cpu(), streamed.batch(items, CPU)[0])


def test_crops_agree_with_the_cpu():
    smooth = F.interpolate(torch.rand(8, 3, 8, 8), (64, 64), mode="bicubic").clamp(0, 1).mul(255).to(torch.uint8)
    random = torch.rand(7, 8)
    ours, theirs = (crops.random_crops(smooth.to(device), 32, random).cpu() for device in (CPU, CUDA))
    assert (ours - theirs).abs().mean() < 0.01


def test_no_step_makes_the_host_wait(demo):
    """PyTorch's own check of what test_device.py counts without a GPU."""
    config = train.configure("train", "", train.SETTINGS, train.SHARED, [*TINY_TRAIN, *flags(batch_size=4, width=16)])
    data = wikiart.WikiArt(demo, "train", size=32, processes=1)
    data.move_to(CUDA)
    criterion = train.ClassifierLoss(data, config, CUDA)
    network = train.new_model(config, train.model_arguments(config, data, criterion.aux_classes)).to(CUDA)
    parts = train.MovingAverage(network, 0.9), Optimizers(network, 0.01, 0.1, 20)
    sampler, waits = wikiart.BalancedSampler(data.labels[:64], "none", 0), []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as waits:
            train.train_epoch(network, parts[0], data, sampler, criterion, parts[1], 1, config, CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in waits if "synchronizing CUDA operation" in str(each.message)]
    assert len(waits) <= 2, waits  # of 16 steps: their losses, read once, and the means


def test_bf16_stays_finite_and_the_demo_passes_90_per_cent(tmp_path):
    assert train.autocast(CUDA, cpu=True).fast_dtype == torch.bfloat16
    root, settings = tmp_path / "demo", ["-c", str(ROOT / "settings/demo.json")]
    assert script("demo.py", *settings, "--data", root).returncode == 0
    arguments = [*settings, *ON_GPU, "--data", str(root), "--run", str(tmp_path)]
    train.main(arguments)
    evaluation.main(arguments)
    assert json.loads((tmp_path / "facts.json").read_text())["test"]["accuracy"] >= 0.9


ONE_PROCESS = """
import sys, torch, torch.distributed as dist
sys.path[:1] = [{root!r}]
import train
torch.cuda.set_device(0)
dist.init_process_group("cpu:gloo,cuda:nccl")
train.main()
"""


def test_one_process_under_nccl_trains_like_none(demo, tmp_path):
    (tmp_path / "train.py").write_text(ONE_PROCESS.format(root=str(ROOT)))
    plain = [*TINY_TRAIN, *ON_GPU, *flags(ema_decay=0, optimizer="adamw", pooling="mean_std", data=demo)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--"]
    command = [*torchrun, tmp_path / "train.py", *plain, "--run", tmp_path / "nccl"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    train.main([*plain, "--run", str(tmp_path / "none")])
    one, none = ((tmp_path / name / "classifier.jsonl").read_text().splitlines() for name in ("nccl", "none"))
    for line, other in zip(one, none, strict=True):
        assert json.loads(line)["loss"] == pytest.approx(json.loads(other)["loss"], rel=2e-2)  # bf16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_trains_in_half_precision(demo, tmp_path, monkeypatch, dtype):
    pytest.importorskip("diffusers")
    import lora
    from common import diffusion, tiny_diffusion

    monkeypatch.setattr(tiny_diffusion, "STEPS", 60)
    monkeypatch.setattr(diffusion, "precision", lambda device: dtype if device.type == "cuda" else torch.float32)
    quick = flags(size=32, resolution=32, epochs=2, lr=0.005, per_class=32, batch_size=8, rank=4, steps=3)
    tiny = ["-c", str(ROOT / "settings/tiny.json"), *TINY, *ON_GPU, *quick]
    lora.main(["train", *tiny, "--data", str(demo), "--run", str(tmp_path), "--style", "Hatching"])
    history = [json.loads(line) for line in (tmp_path / "lora.jsonl").read_text().splitlines()]
    assert len(history) == 2  # a loss that is not finite would have stopped it
    assert json.loads((tmp_path / "facts.json").read_text())["lora"]["heldout_loss_change"] < 0


def test_labelling_agrees_with_the_cpu(trained, demo, tmp_path):
    data = wikiart.WikiArt(demo, "test", size=32, processes=1)
    ours, theirs = (
        wikiart.Classifier.load(trained / "classifier.pt", each).predict_dataset(data) for each in ("cpu", "cuda")
    )
    assert (ours - theirs).abs().max() < 0.05  # bf16
    out = tmp_path / "labels.csv"
    arguments = ["--checkpoint", trained / "classifier.pt", "--run", tmp_path, "--out", out, "--no-sheet", *ON_GPU]
    done = script("label.py", demo / "test", *arguments)
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == len(data) + 1


def test_repainting_on_the_gpu(trained, demo, tmp_path):
    (tmp_path / "classifier.pt").write_bytes((trained / "classifier.pt").read_bytes())
    own = flags(size=64, crop=64, width=8, batch_size=8, per_class=4, epochs=1, validation=0.2)
    train_style.main([*TINY, *own, *ON_GPU, "--data", str(demo), "--run", str(tmp_path)])
    image, style = picture(tmp_path / "in.png", size=(70, 50)), wikiart.WikiArt(demo, size=64, processes=1).classes[0]
    outs = {}
    for device in ("cpu", "cuda"):
        out = ["--out", str(tmp_path / device), "--device", device]
        style_transfer.main(["--run", str(tmp_path), "--image", str(image), "--style", style, *out])
        (outs[device],) = (tmp_path / device).glob("*.png")
    ours, theirs = (np.asarray(Image.open(path)).astype(int) for path in outs.values())
    assert ours.shape == theirs.shape and abs(ours - theirs).mean() < 3  # of 255, in bf16
