"""Timers, synthetic JPEGs and reference implementations for benchmark.py."""

import contextlib
import multiprocessing
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import read_image
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.transforms.functional import resize

from common.crops import predict_probabilities, random_crops
from common.errors import UserError
from common.losses import class_log_prior
from common.metrics import balanced_accuracy
from common.run import autocast, reuse_freed_memory

CPU = torch.device("cpu")

# CPU time and memory --------------------------------------------------------------------------------------------------


def cpu_time() -> float:
    """CPU seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_turns(turns: int, functions: dict) -> dict[str, np.ndarray]:
    """CPU seconds (turns,) of each function {name: function}; they take turns, after an uncounted warm-up round."""
    seconds = {name: [] for name in functions}
    for _ in range(turns + 1):
        for name, function in functions.items():
            start = cpu_time()
            function()
            seconds[name].append(cpu_time() - start)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def compare(name: str, ours, theirs, speedup: bool = False) -> dict:
    """Facts of a measure (turns,): medians, their ratio ours / theirs (or theirs / ours), and its range over turns."""
    over, under = (theirs, ours) if speedup else (ours, theirs)
    facts = {name: np.median(over) / np.median(under)}
    facts |= {f"{name}_low": (over / under).min(), f"{name}_high": (over / under).max()}
    return facts | {f"{name}_ours": np.median(ours), f"{name}_theirs": np.median(theirs)}


def peak_memory(function, *arguments, warm_up: tuple = ()) -> float:
    """MB by which a new process grows at its peak while it calls the function.

    `warm_up`: arguments of a small call before, which loads code that is not to be counted.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(memory_growth, function, warm_up, arguments).result()
        except BrokenProcessPool:
            raise UserError("too little memory for all images as floats: leave memory out of --measures") from None


def memory_growth(function, warm_up: tuple, arguments: tuple) -> float:
    reuse_freed_memory()
    if warm_up:
        function(*warm_up)
    with contextlib.suppress(OSError):  # resets the peak, where the kernel can
        Path("/proc/self/clear_refs").write_text("5")
    before = memory_now("VmRSS")
    function(*arguments)
    return memory_now("VmHWM") - before


def memory_now(kind: str) -> float:
    """MB that this process has in memory (VmRSS), or had at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024 / 1e6


def call(command: list) -> None:
    """Run a Python script in a process of its own. Raises UserError with its last line if it fails."""
    command = [sys.executable, *map(str, command)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise UserError((process.stderr.strip().splitlines() or [f"{command} failed"])[-1])


# Synthetic JPEGs ------------------------------------------------------------------------------------------------------


def write_images(root: Path, count: int, width: int, height: int, seed: int) -> Path:
    """Write `count` files root/train/<class>/<artist>_<title>.jpg where `root` does not exist; returns `root`."""
    random = np.random.default_rng(seed)
    for number in range(0 if root.exists() else count):
        path = root / "train" / "ABCD"[number % 4] / f"painter-{number % 50}_work-{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        synthetic_image(random, width, height).save(path, quality=90)
    return root


def synthetic_image(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise of all scales, the fine ones grey: as JPEG two bits per pixel, like photographs of paintings."""
    canvas = np.full((height, width, 3), 128, np.float32)
    for octave in range(2, width.bit_length() - 1):
        noise = random.integers(0, 256, (3 * 2**octave // 4, 2**octave, 3 if octave < 5 else 1), dtype=np.uint8)
        layer = Image.fromarray(noise.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
        canvas += (np.asarray(layer, np.float32).reshape(height, width, -1) - 128) / octave
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


# Other software -------------------------------------------------------------------------------------------------------


def image_folder_epoch(root: Path, side: int, batch_size: int) -> None:
    """torchvision's usual pipeline: decode every JPEG again in each epoch."""
    transform = Compose([Resize((side, side)), ToTensor()])
    for _ in DataLoader(ImageFolder(root / "train", transform), batch_size, shuffle=True):
        pass


@torch.inference_mode()
def features_one_by_one(model, root: Path, side: int) -> None:
    """Features by a frozen Pretrained of one picture after the other, as many scripts extract them."""
    transform = Compose([Resize((side, side)), ToTensor()])
    for picture, _ in ImageFolder(root / "train", transform):
        model.features(picture[None])


def load_as_floats(paths: list[str], side: int) -> None:
    """A list of all images as floats."""
    images = []
    for path in paths:
        images.append(resize(read_image(path).float(), [side, side], antialias=True))


def train_reference(model, training, validation, crop: int, batch_size: int, epochs: int) -> list[tuple[float, float]]:
    """Train by torchvision's references/classification, but with the logit-adjusted loss (Menon et al. 2021).

    SGD with momentum, a learning rate of 0.1 per 256 images that falls to a tenth after each third of the epochs,
    crops of at least 8 % of the image, flipped half of the time. Returns the balanced accuracy on `validation` after
    each epoch, and the CPU seconds until then, without those of validation.
    """
    prior, records, seconds = class_log_prior(training.labels, len(training.classes)), [], 0.0
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1 * batch_size / 256, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, epochs // 3), 0.1)
    images_per_epoch = len(training) // batch_size * batch_size
    for _ in range(epochs):
        start = cpu_time()
        model.train()
        for items in torch.randperm(len(training))[:images_per_epoch].split(batch_size):
            pixels, labels = training.batch(items, CPU)
            random = torch.rand(7, len(items))
            random[5:] = 0.5  # no jitter of exposure and contrast
            images = random_crops(pixels, crop, random, 0.08)
            with autocast(CPU, cpu=True):  # as train.py
                logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float() + prior, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        seconds += cpu_time() - start
        records.append((reference_score(model, validation, crop, batch_size), seconds))
    return records


def reference_score(model, validation, crop: int, batch_size: int) -> float:
    """Balanced accuracy on whole images and their mirror images."""
    model.eval()
    batches = (validation.batch(items, CPU)[0] for items in torch.arange(len(validation)).split(batch_size))
    predictions = torch.cat([predict_probabilities(model, images, crop).argmax(1) for images in batches])
    return balanced_accuracy(validation.labels, predictions)
