"""What benchmark.py measures, and how.

Each measure takes a Bench, which paints its pictures, and returns its facts: `<name>`, a ratio of medians; `<name>_low`
and `<name>_high`, of single turns; `<name>_ours` and `<name>_theirs`, in the unit that the table of benchmark.py gives.

bench = Bench(config, Path("/scratch/tmp"))   # config: the settings of benchmark.py
MEASURES["batches"](bench)                    # {"batches": 61.2, "batches_low": 58.1, ...}
"""

import contextlib
import json
import math
import mmap
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.metrics import balanced_accuracy_score
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.io import read_image
from torchvision.transforms import Compose, Resize, ToTensor
from torchvision.transforms.functional import resize

import runs
from folder import pixel_cache
from layers import Normalise
from wikiart import BalancedSampler, WikiArt, channel_statistics, make_model
from windows import one_window, predict, random_crops

STYLES = ("Dots", "Lines", "Planes", "Washes")
CPU = torch.device("cpu")


# How things are measured ----------------------------------------------------------------------------------------------


def cpu_time() -> float:
    """CPU seconds of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def in_turns(turns: int, works: dict, warm: bool = True) -> dict[str, np.ndarray]:
    """CPU seconds (turns,) of each of the works {name: function}, one after the other, then all of them again."""
    spent = {name: [] for name in works}
    for turn in range(turns + warm):
        for name, work in works.items():
            started = cpu_time()
            work()
            spent[name] += [cpu_time() - started] if turn >= warm else []
    return {name: np.array(seconds) for name, seconds in spent.items()}


def ratio(name: str, above, below, ours, theirs) -> dict:
    """The facts of a measure: its ratio, of the medians, and the lowest and the highest of single turns; both sides."""
    each = np.array(above) / np.array(below)
    return {name: float(np.median(above) / np.median(below)), f"{name}_low": float(each.min()),
            f"{name}_high": float(each.max()), f"{name}_ours": float(np.median(ours)),
            f"{name}_theirs": float(np.median(theirs))}  # fmt: skip


def peak_memory(work, *arguments, first: tuple = ()) -> float:
    """MB by which a fresh process grows, at its peak, while it does the work.

    With `first`, the arguments of a small piece of the same work, that is done before: loading code is not meant.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(growth_of, work, first, arguments).result()
        except BrokenProcessPool:
            raise runs.Problem("there is too little memory for what the course does: lower --memory-images") from None


def growth_of(work, first: tuple, arguments: tuple) -> float:
    runs.keep_memory()
    if first:
        work(*first)
    with contextlib.suppress(OSError):  # nor is the peak until here
        Path("/proc/self/clear_refs").write_text("5")
    before = memory_now("VmRSS")
    work(*arguments)
    return memory_now("VmHWM") - before


def memory_now(kind: str) -> float:
    """MB that this process has in memory (VmRSS), or had at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024 / 1e6


# What it is measured on -----------------------------------------------------------------------------------------------


class Bench:
    """Settings, and pictures that are painted when a measure first asks for them."""

    def __init__(self, config, scratch: Path):
        self.config, self.scratch = config, scratch
        self.settings = runs.settings(config.config)  # of the other scripts
        self.train = SimpleNamespace(**self.settings["train"])
        self.layers = [part for path in config.config or [] for part in ("-c", path)]

    @cached_property
    def scans(self) -> Path:
        """Pictures as large as WikiArt's, which decode as slowly."""
        random = np.random.default_rng(self.config.seed)
        width, height = (round(math.sqrt(self.config.megapixels * 1e6 * part)) for part in (4 / 3, 3 / 4))
        return fill(self.scratch / "scans", self.config.images, partial(paint, width, height, random))

    @cached_property
    def many(self) -> Path:
        """Many small pictures; what a large data set costs from the cache on does not depend on the files' size."""
        random = np.random.default_rng(self.config.seed)
        count = max(*self.config.growth_images, self.config.memory_images)
        return fill(self.scratch / "many", count, partial(dab, random))

    def first(self, count: int) -> Path:
        """A folder with the first so many of them."""
        root, files = self.scratch / f"first-{count}", iter(sorted((self.many / "train").rglob("*.jpg")))
        return root if root.exists() else fill(root, count, lambda path: os.link(next(files), path))

    def data(self, root: Path, side: int = 0) -> WikiArt:
        return WikiArt(root, size=side or self.config.side, processes=1)


def fill(root: Path, count: int, make) -> Path:
    """Make `count` files root/train/<Style>/<name>.jpg."""
    for number in range(count):
        path = root / "train" / STYLES[number % len(STYLES)] / f"painter-{number % 50}_work-{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return root


def paint(width: int, height: int, random: np.random.Generator, path: Path) -> None:
    """Shapes under noise of all scales, fine ones without colour: its JPEG takes two bits a pixel, as paintings' do."""
    image = Image.new("RGB", (width, height), "gray")
    brush = ImageDraw.Draw(image)
    for _ in range(12):
        points, colour = random.integers(0, width, (3, 2)).tolist(), tuple(random.integers(0, 256, 3).tolist())
        brush.polygon([tuple(point) for point in points], fill=colour)
    canvas = np.asarray(image, np.float32) / 2 + 64
    for octave in range(2, 10):
        noise = random.integers(0, 256, (3 * 2**octave // 4, 2**octave, 3 if octave < 5 else 1), dtype=np.uint8)
        layer = Image.fromarray(noise.squeeze()).resize((width, height), Image.Resampling.BICUBIC)
        canvas += (np.asarray(layer, np.float32).reshape(height, width, -1) - 128) / octave
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def dab(random: np.random.Generator, path: Path) -> None:
    image = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image.resize((48, 48), Image.Resampling.BICUBIC).save(path)


# Pictures into batches ------------------------------------------------------------------------------------------------


def image_folder(bench) -> None:
    """What people do: decode every JPEG, again in each epoch."""
    transform = Compose([Resize((bench.config.side, bench.config.side)), ToTensor()])
    loader = DataLoader(ImageFolder(bench.scans / "train", transform), bench.config.batch_size, shuffle=True)
    for _ in loader:
        pass


def from_cache(data: WikiArt, batch_size: int, prepare, passes: int = 1, forget: bool = False) -> None:
    """What we do: index the cache, in bytes; then prepare whole batches."""
    normalise = Normalise()
    for _ in range(passes):
        for items in torch.randperm(len(data)).split(batch_size):
            normalise(prepare(data.batch(items, CPU)[0]))
            if forget:  # the cache's pages, which the kernel may take back whenever it likes, else count as ours
                data.pixels._mmap.madvise(mmap.MADV_DONTNEED)


def one_for_all(pixels):
    """Crop and flip, by one draw for the whole batch, as train_autoencoder.py does."""
    return one_window(pixels, pixels.shape[-1], torch.rand(5))


def each_its_own(pixels):
    """Crop, flip, exposure and contrast of each picture by itself, as train.py does."""
    return random_crops(pixels, pixels.shape[-1], torch.rand(7, len(pixels)))


def beside_image_folder(name: str, bench, prepare) -> dict:
    data, passes, count = bench.data(bench.scans), 5, bench.config.images
    ours = partial(from_cache, data, bench.config.batch_size, prepare, passes)
    spent = in_turns(bench.config.turns, {"ours": ours, "theirs": partial(image_folder, bench)})
    ours, theirs = 1000 * spent["ours"] / passes / count, 1000 * spent["theirs"] / count
    return ratio(name, theirs, ours, ours, theirs)


def batches(bench) -> dict:
    return beside_image_folder("batches", bench, one_for_all)


def batches_jitter(bench) -> dict:
    return beside_image_folder("batches_jitter", bench, each_its_own)


def cache(bench) -> dict:
    config, where = bench.config, bench.scratch / "cache"

    def build():
        pixel_cache(bench.scans / "train", where, config.side, "squash", 1)
        shutil.rmtree(where)

    spent = in_turns(config.turns, {"ours": build, "theirs": partial(image_folder, bench)})
    ours, theirs = (1000 * spent[name] / config.images for name in ("ours", "theirs"))
    return ratio("cache", theirs, ours, ours, theirs)


# Memory and size ------------------------------------------------------------------------------------------------------


def course(paths: list[str], side: int) -> None:
    """The course's pattern: every picture as floats, and all of them at once."""
    kept = []
    for path in paths:
        kept.append(resize(read_image(path).float(), [side, side], antialias=True))


def epoch_from_cache(root: Path, side: int, batch_size: int, count: int) -> None:
    """Everything that we do for an epoch: open the folder, draw the paintings, prepare batches."""
    data = WikiArt(root, size=side, processes=1)
    from_cache(data.subset(np.arange(min(count, len(data)))), batch_size, one_for_all, forget=True)


def memory(bench) -> dict:
    """Peaks differ by next to nothing from one time to the next, so one time is enough."""
    config, root = bench.config, bench.first(bench.config.memory_images)
    paths = [str(path) for path in sorted((root / "train").rglob("*.jpg"))]
    for each in (root, bench.scans):
        bench.data(each)  # decodes them
    ours = peak_memory(epoch_from_cache, root, config.side, config.batch_size, len(paths),
                       first=(bench.scans, config.side, 4, 4))  # fmt: skip
    theirs = peak_memory(course, paths, config.side, first=(paths[:4], config.side))
    found = ratio("memory", [ours], [theirs], [ours], [theirs])
    return {key: value for key, value in found.items() if key not in ("memory_low", "memory_high")}


def growth(bench) -> dict:
    config, facts, decoding = bench.config, {}, {}
    counts = dict(zip(("small", "large"), config.growth_images, strict=True))
    roots = {name: bench.first(count) for name, count in counts.items()}
    bench.data(bench.scans)
    for name, root in roots.items():
        shutil.rmtree(root / ".cache", ignore_errors=True)  # of another measure
        started = cpu_time()
        decoding[name] = (len(bench.data(root)), cpu_time() - started)
        facts[f"growth_memory_{name}"] = peak_memory(epoch_from_cache, root, config.side, config.batch_size,
                                                     counts[name], first=(bench.scans, config.side, 4, 4))  # fmt: skip
    again = max(1, counts["large"] // counts["small"] // 4)  # or the small one is over too soon to be measured

    def epochs(name, times):
        for _ in range(times):
            data = bench.data(roots[name])
            from_cache(data, config.batch_size, one_for_all)

    works = {"small": partial(epochs, "small", again), "large": partial(epochs, "large", 1)}
    spent = in_turns(config.turns, works)
    small, large = 1000 * spent["small"] / again / counts["small"], 1000 * spent["large"] / counts["large"]
    (few, few_seconds), (many, many_seconds) = decoding["small"], decoding["large"]
    facts["growth_cache"] = many_seconds / many / (few_seconds / few)
    return facts | ratio("growth", large, small, large, small)


# Training -------------------------------------------------------------------------------------------------------------


def make_cnn(settings, classes: int = len(STYLES)):
    shape = {key: getattr(settings, key) for key in ("width", "depth", "pooling", "dropout")}
    return make_model("CNN", {"classes": classes, **shape})


class Step:
    """A training step, as train.py takes it, but for naming artists and genres."""

    def __init__(self, settings):
        self.model = make_cnn(settings).to(memory_format=torch.channels_last)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(settings.average), use_buffers=True)
        self.optimizers = runs.Optimizers(self.model, settings, 10**9)
        self.smoothing = settings.label_smoothing

    def __call__(self, images, labels):
        outputs = self.model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(outputs, labels, label_smoothing=self.smoothing)
        self.optimizers.zero_grad()
        loss.backward()
        self.optimizers.step()
        self.averaged.update_parameters(self.model)
        return torch.stack([loss.detach() * len(labels), (outputs.argmax(1) == labels).sum()])


def operations(settings, crop: int) -> float:
    """Floating point operations of one picture in training, forward and backward; the optimizer's do not count."""
    with torch.device("meta"):  # shapes without numbers
        model, images = make_cnn(settings), torch.zeros(2, 3, crop, crop)
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
    return counter.get_total_flops() / 2


def gemm_share(bench) -> dict:
    settings, side = bench.train, 1024
    step = Step(settings)
    images, labels = torch.rand(settings.batch_size, 3, settings.crop, settings.crop), torch.arange(settings.batch_size)
    labels %= len(STYLES)
    work = operations(settings, settings.crop) * settings.batch_size
    one, other, product = torch.randn(3, side, side)
    times = math.ceil(work / (2 * side**3))

    def products():
        for _ in range(times):
            torch.mm(one, other, out=product)

    spent = in_turns(bench.config.turns, {"step": partial(step, images, labels), "products": products})
    ours, theirs = work / spent["step"] / 1e9, times * 2 * side**3 / spent["products"] / 1e9
    return ratio("gemm_share", ours, theirs, ours, theirs) | {"operations": work / settings.batch_size}


def epoch_overhead(bench) -> dict:
    """Validation is apart: how much of it there is, the user says."""
    settings, data = bench.train, bench.data(bench.scans, bench.config.size)
    order = BalancedSampler(data.labels, "resample", max(1, bench.config.epoch_images // len(STYLES)))
    step, size = Step(settings), min(settings.batch_size, len(order))
    drawn = [items for items in torch.tensor(list(order)).split(size) if len(items) == size]

    def prepare(items):
        pixels, labels = data.batch(items, CPU)
        return random_crops(pixels, settings.crop, torch.rand(7, len(items)), settings.smallest), labels

    def epoch():
        total = torch.zeros(2, dtype=torch.float64)
        order.set_epoch(order.epoch + 1)
        for items in torch.tensor(list(order)).split(size)[: len(drawn)]:
            total += step(*prepare(items))

    def steps(images, labels):
        for _ in drawn:
            step(images, labels)

    spent = in_turns(bench.config.turns, {"epoch": epoch, "steps": partial(steps, *prepare(drawn[0]))})
    count = len(drawn) * size
    ours, theirs = 1000 * spent["epoch"] / count, 1000 * spent["steps"] / count
    found = ratio("epoch_overhead", ours, theirs, ours, theirs)
    return found | {key: found[key] - 1 for key in ("epoch_overhead", "epoch_overhead_low", "epoch_overhead_high")}


def resnet18_time(bench) -> dict:
    """Our CPU time until we are as good as ResNet-18 at its end, on validation paintings, over its own."""
    config, settings = bench.config, bench.train
    shape = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    data = WikiArt(config.data, "train", processes=1, **shape)
    training, validation = data.set_apart(settings.validation, config.split_seed)
    if not len(validation) or settings.batch_size > len(training):
        raise runs.Problem(f"{config.data} has too few paintings for ResNet-18: give another --data")
    accuracy, theirs = train_resnet(training, validation, bench)
    print(f"ResNet-18: {accuracy:.1%} balanced after {theirs / 60:.1f} CPU-minutes", flush=True)

    step, images = Step(settings), torch.rand(settings.batch_size, 3, settings.crop, settings.crop)
    seconds = np.median(in_turns(3, {"step": lambda: step(images, training.labels[: len(images)] % 2)})["step"])
    order = BalancedSampler(training.labels, settings.balance, settings.per_class)
    for share in sorted(config.budgets):
        epochs = max(1, int(share * theirs / (seconds * (len(order) // settings.batch_size))))
        run = bench.scratch / f"cnn-{share}"
        history = train_cnn(bench, run, config.data, ["--epochs", epochs, "--size", config.size])
        spent = np.cumsum([record["cpu_seconds"] for record in history])  # with validation, which ResNet-18 is spared
        good = [record["val_balanced_accuracy"] >= round(accuracy, 5) for record in history]
        best = max(record["val_balanced_accuracy"] for record in history)
        print(f"our network: {best:.1%} balanced in {spent[-1] / 60:.1f} CPU-minutes", flush=True)
        if any(good):
            break
    ours = spent[good.index(True)] if any(good) else None
    return {
        "resnet18_time": ours and float(ours / theirs),
        "resnet18_time_ours": ours and float(ours / 60),
        "resnet18_time_theirs": theirs / 60,
        "resnet18_balanced_accuracy": accuracy,
        "resnet18_our_balanced_accuracy": best,
        "resnet18_our_minutes": float(spent[-1] / 60),
        "resnet18_epochs": config.resnet_epochs,
        "resnet18_budgets": ", ".join(f"{share:.0%}" for share in sorted(config.budgets)),
    }


def train_resnet(training, validation, bench) -> tuple[float, float]:
    """Balanced accuracy of ResNet-18 on validation paintings, and the CPU seconds of its training.

    The recipe is that of torchvision's references/classification: SGD with momentum, a rate of 0.1 for 256 pictures
    that falls to a tenth after each third, windows of 8 % of the picture or more, mirrored half of the time.
    """
    config, settings = bench.config, bench.train
    mean, std = channel_statistics(training)
    torch.manual_seed(config.seed)
    arguments = {"classes": len(training.classes), "mean": mean, "std": std}
    model = make_model("resnet18", arguments).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1 * settings.batch_size / 256, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, max(1, config.resnet_epochs // 3), 0.1)
    started = cpu_time()
    for _ in range(config.resnet_epochs):
        for items in torch.randperm(len(training)).split(settings.batch_size):
            if len(items) < settings.batch_size:
                continue
            pixels, labels = training.batch(items, CPU)
            draws = torch.rand(7, len(items))
            draws[5:] = 0.5  # exposure and contrast stay
            images = random_crops(pixels, settings.crop, draws, 0.08)
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    spent = cpu_time() - started
    chunks = torch.arange(len(validation)).split(settings.batch_size)
    model.eval()
    guesses = torch.cat([predict(model, validation.batch(items, CPU)[0], settings.crop).argmax(1) for items in chunks])
    return float(balanced_accuracy_score(validation.labels, guesses)), spent


def train_cnn(bench, run: Path, data, flags: list, start=(), processes=1) -> list[dict]:
    """train.py in processes of its own, with our threads in all; returns what it noted of each epoch."""
    config = bench.config
    common = ["--data", data, "--run", run, "--device", "cpu", "--processes", 1, "--resize", config.resize,
              "--seed", config.seed, "--split-seed", config.split_seed]  # fmt: skip
    call([*start, runs.HERE / "train.py", *bench.layers, *common, *flags], processes)
    return [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]


def call(command: list, processes: int = 1) -> None:
    """Run a Python script, which may start so many processes; the error of one that fails is handed on."""
    command = [sys.executable, *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise runs.Problem((done.stderr.strip().splitlines() or [f"{command} failed"])[-1])


def two_processes(bench) -> dict:
    """Wall time, for the sum of CPU times says nothing of it; on a machine with one core there is nothing to gain."""
    config, settings = bench.config, bench.train
    # AdamW and no averaging: nothing that would hide or blow up a difference; one epoch, or each may keep another.
    flags = ["--balance", "resample", "--per-class", max(1, config.epoch_images // len(STYLES)), "--epochs", 1,
             "--average", 0, "--optimizer", "adamw", "--size", config.size, "--validation", 0.1]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    last, weights = {1: [], 2: []}, {}
    for turn in range(config.turns):
        for processes, start in ((1, ()), (2, torchrun)):
            run = bench.scratch / f"processes-{processes}-{turn}"
            last[processes].append(train_cnn(bench, run, bench.scans, flags, start, processes)[-1])
            weights[processes] = runs.load_checkpoint(run / "classifier.pt")["weights"]
    learned = dict(make_cnn(settings).named_parameters())  # and not what is merely counted or averaged
    seconds, cpu = ({count: np.array([record[key] for record in records]) for count, records in last.items()}
                    for key in ("seconds", "cpu_seconds"))  # fmt: skip
    pictures = config.epoch_images // settings.batch_size * settings.batch_size
    both = [torch.cat([weight.float().flatten() for name, weight in weights[count].items() if name in learned])
            for count in (1, 2)]  # fmt: skip
    return ratio("two_processes", seconds[1], seconds[2], pictures / seconds[2], pictures / seconds[1]) | {
        "two_processes_difference": float((both[0] - both[1]).norm() / both[0].norm()),
        "two_processes_cpu": float(np.median(cpu[1]) / np.median(2 * cpu[2])),  # of both, over one's
    }


def labelling(bench) -> dict:
    """label.py on the full-size JPEGs, but for its start, beside the network on the same pictures, decoded already."""
    config, settings, scratch = bench.config, bench.train, bench.scratch
    model = make_cnn(settings).eval()
    state = {
        "model": "CNN",
        "arguments": {key: getattr(settings, key) for key in ("width", "depth", "pooling")} | {"classes": len(STYLES)},
        "weights": model.state_dict(),
        "classes": list(STYLES),
        "data": {"size": config.size, "resize": config.resize, "target": "style"},
        "crop": settings.crop,
        "windows": settings.windows,
    }
    runs.save_checkpoint(scratch / "labeller.pt", state)
    model = model.to(memory_format=torch.channels_last)
    data, size = bench.data(bench.scans, config.size), bench.settings["label"]["batch_size"]
    first = scratch / "first"
    first.mkdir()
    shutil.copy(next((bench.scans / "train").rglob("*.jpg")), first)

    def forward():
        for items in torch.arange(len(data)).split(size):
            predict(model, data.batch(items, CPU)[0], settings.crop, settings.windows)

    def label(folder):
        (scratch / "labels.csv").unlink(missing_ok=True)
        call([runs.HERE / "label.py", folder, *bench.layers, "--out", scratch / "labels.csv", "--processes", 1,
              "--run", scratch, "--checkpoint", scratch / "labeller.pt", "--device", "cpu"])  # fmt: skip

    works = {"forward": forward, "folder": partial(label, bench.scans), "start": partial(label, first)}
    forward()  # a first round, not counted
    spent = in_turns(config.turns, works, warm=False)
    ours = (len(data) - 1) / (spent["folder"] - spent["start"]).clip(1e-9)
    theirs = len(data) / spent["forward"]
    return ratio("labelling", ours, theirs, ours, theirs)


MEASURES = {
    "batches": batches,
    "batches_jitter": batches_jitter,
    "memory": memory,
    "cache": cache,
    "gemm_share": gemm_share,
    "epoch_overhead": epoch_overhead,
    "resnet18_time": resnet18_time,
    "growth": growth,
    "labelling": labelling,
    "two_processes": two_processes,
}
