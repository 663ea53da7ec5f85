"""Measure CPU time and memory, compared with ImageFolder, float images, features one by one, and ResNet-18.

    python benchmark.py -c settings/cpu.json                             # everything; an hour with real paintings
    python benchmark.py -c settings/cpu.json --measures batches cache    # only these; the other results are kept
    python benchmark.py -c settings/cpu.json --measures resnet18_time --data /scratch/wikiart --run runs/wikiart

Everything runs on the CPU, on synthetic JPEGs except for resnet18_time, which uses --data. Times are CPU times of this
process and its children, so that other programs matter little; both sides take turns, after an uncounted round, and
medians are compared (memory and ResNet-18 are measured once). Needs 4 GB of memory, 2 GB of disk, and timm
(requirements/embed.txt). Writes into the run folder: benchmark.md (a table) and facts.json.
"""

import mmap
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import common.packages  # noqa: F401

import numpy as np
import torch

from common import benchmarks
from common.backbones import append_features
from common.benchmarks import CPU, compare, in_turns, peak_memory
from common.config import ROOT, Setting, configure, read_settings
from common.crops import batch_crop, random_crops
from common.errors import UserError
from common.images import pixel_cache
from common.layers import Normalise
from common.run import (
    add_facts,
    checkpoint_path,
    claim,
    load_checkpoint,
    read_facts,
    reuse_freed_memory,
    run_script,
    write_text,
)
from wikiart import Classifier, WikiArt, channel_statistics, make_model

SHARED = ("data", "run", "size", "resize", "seed", "split_seed", "validation")
SETTINGS = {
    "measures": Setting(list[str], None, "what to measure"),
    "turns": Setting(int, "[1, inf)", "times that everything is measured; the median counts"),
}
SIDE, BATCH_SIZE = 128, 32  # of the images in batches
BACKBONE, BACKBONE_SIDE = "tf_efficientnet_lite0", 224  # of timm, whose features are extracted; side of its images
IMAGES, WIDTH, HEIGHT = 300, 1095, 822  # JPEGs to measure on, about as large as WikiArt's
MEMORY_IMAGES = 20_000  # kept as floats, 200 KB each
FEW, MANY = 1000, 32_000  # images of the small and the large data set of `growth`
EPOCHS = 12  # of ResNet-18 and of our network; the reference recipe has 90
CLASSIFIER = ROOT / "report" / "classifier.pt"  # labels the JPEGs where the run has none


def main(argv=None):
    config = configure("benchmark", __doc__, SETTINGS, SHARED, argv)
    unknown = [name for name in config.measures if name not in MEASURES]
    if unknown or not config.measures:
        raise UserError(f"no measure {' '.join(unknown) or 'given'}: give some of {', '.join(MEASURES)}")
    reuse_freed_memory()  # as in training; for both sides
    run = Path(config.run)
    lock = claim(run, "benchmark")
    for leftover in run.glob(".benchmark.*/"):  # of a run that was killed
        shutil.rmtree(leftover)

    with tempfile.TemporaryDirectory(prefix=".benchmark.", dir=run) as scratch:
        bench = Bench(config, Path(scratch))
        for name in sorted(set(config.measures), key=list(MEASURES).index):
            print(f"measuring {name}", flush=True)
            facts = merge_facts(run, MEASURES[name].function(bench), config.turns)
            print(table_line(name, facts) if facts[name] is not None else f"{name}: not reached", flush=True)
    header = ["| measure | compared with | ratio | range over turns | ours | theirs | in |", "|---" * 7 + "|"]
    table = "\n".join([*header, *(table_line(name, facts) for name in MEASURES if facts.get(name) is not None)])
    write_text(run / "benchmark.md", table + "\n")
    lock.close()
    print(table, f"\n{run / 'benchmark.md'}")


# Facts and table ------------------------------------------------------------------------------------------------------


def merge_facts(run: Path, facts: dict, turns: int) -> dict:
    """Add the facts of a measure to facts.json; returns all. Those measured under other conditions are discarded."""
    conditions = {"turns": turns, "threads": torch.get_num_threads(), "side": SIDE, "batch_size": BATCH_SIZE}
    conditions |= {"megapixels": round(WIDTH * HEIGHT / 1e6, 2), "memory_images": MEMORY_IMAGES}
    conditions |= {"few": FEW, "many": MANY}
    earlier = read_facts(run).get("benchmark", {})
    same = all(earlier.get(key) == value for key, value in conditions.items())
    add_facts(run, "benchmark", conditions | facts, merge=same)
    return read_facts(run)["benchmark"]


def table_line(name: str, facts: dict) -> str:
    measure, low, high = MEASURES[name], facts.get(f"{name}_low"), facts.get(f"{name}_high")
    turns = "" if low is None else f"{low:{measure.form}} to {high:{measure.form}}"
    ours, theirs = (f"{facts[f'{name}_{side}']:.4g}" for side in ("ours", "theirs"))
    cells = [measure.ours, measure.theirs, f"{facts[name]:{measure.form}}", turns, ours, theirs, measure.unit]
    return f"| {' | '.join(cells)} |"


# Measures: each takes a Bench and returns its facts, see benchmarks.compare -------------------------------------------


class Bench:
    """Settings, and synthetic images that are written when a measure first needs them."""

    def __init__(self, config, scratch: Path):
        self.config, self.scratch = config, scratch
        self.train = SimpleNamespace(**read_settings(config.config)["train"])

    def large_images(self) -> Path:
        """JPEGs as large as WikiArt's, which decode as slowly."""
        return benchmarks.write_images(self.scratch / "large", IMAGES, WIDTH, HEIGHT, self.config.seed)

    def small_images(self, count: int) -> Path:
        """Many small JPEGs: the cost of their cached pixels is that of large ones."""
        return benchmarks.write_images(self.scratch / f"small-{count}", count, 48, 48, self.config.seed)

    def compare_with_image_folder(self, name: str, ours, epochs: int = 1) -> dict:
        """The facts of ours(), `epochs` passes over the large images, compared with an epoch of ImageFolder."""
        theirs = partial(benchmarks.image_folder_epoch, self.large_images(), SIDE, BATCH_SIZE)
        seconds = in_turns(self.config.turns, {"ours": ours, "theirs": theirs})
        return compare(name, 1000 * seconds["ours"] / epochs / IMAGES, 1000 * seconds["theirs"] / IMAGES, speedup=True)


def open_cached(root: Path) -> WikiArt:
    return WikiArt(root, size=SIDE, processes=1)


def cached_epoch(data: WikiArt, prepare, unmap: bool = False) -> None:
    """Our pipeline: index the cached pixels, in bytes, and prepare whole batches."""
    normalise = Normalise()
    for items in torch.randperm(len(data)).split(BATCH_SIZE):
        normalise(prepare(data.batch(items, CPU)[0]))
        if unmap:  # the kernel may take the cache's pages back at any time, but counts them as ours
            data.pixels._mmap.madvise(mmap.MADV_DONTNEED)


def common_crop(pixels):
    """The same crop and flip for a whole batch, as in train_autoencoder.py."""
    return batch_crop(pixels, pixels.shape[-1], torch.rand(5))


def individual_crops(pixels):
    """Crop, flip, exposure and contrast of each image, as in train.py."""
    return random_crops(pixels, pixels.shape[-1], torch.rand(7, len(pixels)))


def batches(bench: Bench, name: str = "batches", prepare=common_crop) -> dict:
    data, epochs = open_cached(bench.large_images()), 5

    def ours():
        for _ in range(epochs):
            cached_epoch(data, prepare)

    return bench.compare_with_image_folder(name, ours, epochs)


def batches_jitter(bench: Bench) -> dict:
    return batches(bench, "batches_jitter", individual_crops)


def cache(bench: Bench) -> dict:
    def ours():
        pixel_cache(bench.large_images() / "train", bench.scratch / "cache", SIDE, "squash", 1)
        shutil.rmtree(bench.scratch / "cache")

    return bench.compare_with_image_folder("cache", ours)


def open_and_batch(root: Path) -> None:
    cached_epoch(open_cached(root), common_crop, unmap=True)


def extraction(bench: Bench) -> dict:
    """Features of a frozen network, decoding included: ours by the function of embed.py."""
    root = bench.large_images()
    arguments = {"classes": 1, "backbone": BACKBONE, "size": BACKBONE_SIDE, "features": 1, "stages": 0}
    model = make_model("Pretrained", arguments | {"mean": [0.5] * 3, "std": [0.25] * 3}).eval()
    model = model.to(memory_format=torch.channels_last)
    files = sorted((root / "train").rglob("*.jpg"))
    settings = SimpleNamespace(shrink=0, resize="squash", batch_size=BATCH_SIZE, processes=1)

    def ours():
        with open(bench.scratch / "features", "wb") as file:
            append_features(file, model, files, settings, CPU)

    theirs = partial(benchmarks.features_one_by_one, model, root, BACKBONE_SIDE)
    seconds = in_turns(bench.config.turns, {"ours": ours, "theirs": theirs})
    return compare("extraction", *(1000 * seconds[side] / IMAGES for side in ("ours", "theirs")), speedup=True)


def memory_of_epoch(bench: Bench, root: Path) -> float:
    few = bench.small_images(4)
    for folder in (few, root):
        open_cached(folder)  # decodes
    return peak_memory(open_and_batch, root, warm_up=(few,))


def memory(bench: Bench) -> dict:
    root = bench.small_images(MEMORY_IMAGES)
    paths = [str(path) for path in sorted((root / "train").rglob("*.jpg"))]
    ours = memory_of_epoch(bench, root)
    theirs = peak_memory(benchmarks.load_as_floats, paths, SIDE, warm_up=(paths[:4], SIDE))
    return {"memory": ours / theirs, "memory_ours": ours, "memory_theirs": theirs}


def growth(bench: Bench) -> dict:
    few, many = bench.small_images(FEW), bench.small_images(MANY)
    facts = {"growth_memory_small": memory_of_epoch(bench, few), "growth_memory_large": memory_of_epoch(bench, many)}
    repeats = max(1, MANY // FEW // 4)  # an epoch of few is too short to be measured

    def epochs(root, count):
        for _ in range(count):
            cached_epoch(open_cached(root), common_crop)

    seconds = in_turns(bench.config.turns, {"few": partial(epochs, few, repeats), "many": partial(epochs, many, 1)})
    return facts | compare("growth", 1000 * seconds["many"] / MANY, 1000 * seconds["few"] / repeats / FEW)


def resnet18_time(bench: Bench) -> dict:
    """CPU time until our network is as good as ResNet-18 in the end, by balanced accuracy, relative to ResNet-18's.

    Both sides count until the first epoch that is as good as that.
    """
    config, settings = bench.config, bench.train
    split = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    data = WikiArt(config.data, "train", processes=1, **split)
    training, validation = data.split_off(config.validation, config.split_seed)
    if not len(validation) or settings.batch_size > len(training):
        raise UserError(f"{config.data} has too few paintings for ResNet-18: give another --data")
    mean, std = channel_statistics(training)
    torch.manual_seed(config.seed)
    resnet = make_model("resnet18", {"classes": len(data.classes), "mean": mean, "std": std})
    sizes = settings.crop, settings.batch_size, EPOCHS
    reference = benchmarks.train_reference(resnet, training, validation, *sizes)
    accuracy = reference[-1][0]
    theirs = next(seconds for score, seconds in reference if score >= accuracy)
    print(f"ResNet-18: {accuracy:.1%} balanced accuracy, first after {theirs / 60:.1f} CPU-minutes", flush=True)

    history = train_cnn(bench, bench.scratch / "cnn")
    seconds = np.cumsum([record["cpu_seconds"] for record in history])  # with validation, which is not in `theirs`
    scores = np.array([record["val_balanced_accuracy"] for record in history])
    as_good = seconds[scores >= round(accuracy, 5)]  # records are rounded
    facts = {"resnet18_time": None, "resnet18_time_ours": None, "resnet18_time_theirs": theirs / 60}
    if len(as_good):
        facts |= {"resnet18_time": theirs / as_good[0], "resnet18_time_ours": as_good[0] / 60}
    facts |= {"resnet18_balanced_accuracy": accuracy, "resnet18_epochs": EPOCHS}
    return facts | {"resnet18_our_balanced_accuracy": scores.max(), "resnet18_our_minutes": seconds[-1] / 60}


def train_cnn(bench: Bench, run: Path) -> list[dict]:
    """Train our network with train.py, on the paintings of ResNet-18; returns the records of its epochs."""
    flags = ["--run", run, "--device", "cpu", "--processes", 1, "--epochs", EPOCHS]
    for path in bench.config.config or []:
        flags += ["-c", path]
    for key in ("data", "size", "resize", "seed", "split_seed", "validation"):
        flags += [f"--{key.replace('_', '-')}", getattr(bench.config, key)]
    benchmarks.call([ROOT / "train.py", *flags])
    return load_checkpoint(run / "classifier.pt")["history"]


def labelling(bench: Bench) -> dict:
    """Images per CPU second of label.py on JPEGs, without its start, compared with its network on decoded images."""
    root, single, table = bench.large_images(), bench.scratch / "single", bench.scratch / "labels.csv"
    path = checkpoint_path(bench.config.run, CLASSIFIER.name)
    path = path if path.exists() else CLASSIFIER
    classifier = Classifier.load(path, CPU)
    data = WikiArt(root, size=classifier.size, resize=classifier.resize, processes=1)
    single.mkdir()
    shutil.copy(data.root / data.paths[0], single)

    def label(folder):
        table.unlink(missing_ok=True)
        flags = ["--checkpoint", path, "--run", bench.scratch, "--device", "cpu", "--processes", 1]
        flags.append("--no-sheet")
        benchmarks.call([ROOT / "label.py", folder, "--out", table, *flags])

    network = partial(classifier.predict_dataset, data, batch_size=64)  # as label.py
    functions = {"network": network, "folder": partial(label, root), "start": partial(label, single)}
    seconds = in_turns(bench.config.turns, functions)
    ours = (len(data) - 1) / (seconds["folder"] - seconds["start"]).clip(1e-9)
    return compare("labelling", ours, len(data) / seconds["network"])


class Measure(NamedTuple):
    """A line of the table: what is compared with what, how the ratio is written, and the unit of both sides."""

    function: Callable[[Bench], dict]
    ours: str
    theirs: str
    form: str
    unit: str


MEASURES = {
    "batches": Measure(batches, "batches: crop, flip", "ImageFolder", ".1f", "CPU ms per image"),
    "batches_jitter": Measure(batches_jitter, "batches: also jitter", "ImageFolder", ".1f", "CPU ms per image"),
    "memory": Measure(memory, "memory for batches", "list of float images", ".4f", "MB"),
    "cache": Measure(cache, "building the cache", "an epoch of ImageFolder", ".2f", "CPU ms per image"),
    "extraction": Measure(extraction, "features in batches", "one picture at a time", ".2f", "CPU ms per image"),
    "growth": Measure(growth, "image of a large data set", "image of a small one", ".2f", "CPU ms per image"),
    "resnet18_time": Measure(resnet18_time, "CNN, until it is as good", "ResNet-18", ".1f", "CPU minutes"),
    "labelling": Measure(labelling, "labelling a folder", "the network alone", ".0%", "images per CPU second"),
}


if __name__ == "__main__":
    run_script(main)
