"""Measure against what people use: CPU time and memory, side by side in one run, on pictures that this script paints.

    python benchmark.py -c cpu.json                          # everything; with real paintings an hour on one core
    python benchmark.py -c cpu.json --measures batches cache # only these; the others' figures are kept
    python benchmark.py -c cpu.json --measures resnet18_time --data /scratch/wikiart --run runs/wikiart

Times are CPU time of this process and its children, so that what else runs here matters little (but two_processes,
which takes wall time); whatever is compared is measured in turns, a first round not counted, and the medians are set in
relation (but memory and ResNet-18, which are measured once). All of it runs on the CPU. Only resnet18_time looks at
--data. It takes 4 GB of memory and 2 GB of disk. Writes into the run folder: benchmark.md (a table), benchmark.png and
facts.json.
"""

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import figures
import runs
from measures import MEASURES, Bench, operations

SHARED = ("data", "run", "size", "resize", "seed", "split_seed")
HELP = {
    "measures": "what to measure: some of batches, batches_jitter, memory, cache, gemm_share, epoch_overhead, "
    "resnet18_time, growth, labelling, two_processes",
    "turns": "times that everything is measured; the median counts",
    "side": "side of the pictures in batches, in pixels, where torchvision stands beside",
    "images": "full-size JPEGs to paint",
    "megapixels": "pixels of each of them, in millions",
    "batch_size": "pictures a batch, where torchvision stands beside",
    "memory_images": "pictures of which the course's pattern keeps floats (200 KB each)",
    "growth_images": "sizes of the small and of the large data set, for what an image costs in each",
    "epoch_images": "pictures of the epoch that is measured",
    "resnet_epochs": "epochs of ResNet-18; the reference recipe has 90",
    "budgets": "shares of ResNet-18's CPU time that our network trains for, one after the other until one is enough",
    "gpu_tflops": "assumed peak of a GPU, in 10^12 operations a second, for what is only calculated",
    "gpu_share": "share of that peak which training is assumed to reach",
    "gpus_share": "share of eight GPUs' joint rate that is assumed to be left after they have exchanged gradients",
}
WIKIART, GPUS = 81_444, 8  # for what is only calculated


class Row(NamedTuple):
    """What a measure is, beside what, what it should reach, and how its ratio and the two sides are written."""

    what: str
    beside: str
    reach: float | None
    stretch: float | None
    form: str
    unit: str
    less: bool = False  # is better


FOLDER = "ImageFolder, Resize, ToTensor; full-size JPEGs"
ROWS = {
    "batches": Row("batches with crop, flip, normalise", FOLDER, 60, 90, ".1f", "CPU ms an image"),
    "batches_jitter": Row("the same, each image by itself, with exposure and contrast", FOLDER, 25, 33, ".1f",
                          "CPU ms an image"),
    "memory": Row("memory for the same batches", "the course's pattern: all images as floats", 0.01, None, ".4f", "MB",
                  True),
    "cache": Row("building the cache", "one pass of ImageFolder", 2, 3.3, ".2f", "CPU ms an image"),
    "gemm_share": Row("training step of the CNN", "float32 matrix products", 0.7, 0.78, ".0%", "GFLOP/s"),
    "epoch_overhead": Row("whole epoch, beyond the training steps", "the steps alone", 0.05, 0.02, ".1%",
                          "CPU ms an image", True),
    "resnet18_time": Row("CNN, until it is as good as ResNet-18", "ResNet-18, its reference recipe", 0.25, 0.1, ".2f",
                         "CPU min", True),
    "growth": Row("an image of many", "an image of few", None, None, ".2f", "CPU ms an image", True),
    "labelling": Row("labelling a folder", "the network alone", 0.8, 0.95, ".0%", "images a CPU second"),
    "two_processes": Row("two processes, same batch", "one process", None, None, ".2f", "images a second"),
}  # fmt: skip
LABELS = {"batches_jitter": "batches, varied", "gemm_share": "training step", "epoch_overhead": "whole epoch",
          "resnet18_time": "beside ResNet-18"}  # in the figure  # fmt: skip


def main(argv=None):
    config = runs.configure("benchmark", __doc__, SHARED, HELP, argv)
    unknown = [name for name in config.measures if name not in MEASURES]
    if unknown or not config.measures:
        raise runs.Problem(f"no measure {' '.join(unknown) or 'given'}: give some of {', '.join(MEASURES)}")
    if len(config.growth_images) != 2 or config.growth_images[0] >= config.growth_images[1]:
        raise runs.Problem("--growth-images needs two numbers, the smaller one first")
    runs.keep_memory()  # as in training; so it is for what stands beside
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    lock = runs.claim(run, "benchmark")  # noqa: F841
    for left in run.glob(".benchmark.*/"):  # by one that was killed
        shutil.rmtree(left)
    how = {key: getattr(config, key) for key in ("turns", "side", "batch_size", "megapixels", "memory_images")}
    how |= {"threads": torch.get_num_threads(), "few": config.growth_images[0], "many": config.growth_images[1]}
    with tempfile.TemporaryDirectory(prefix=".benchmark.", dir=run) as scratch:  # a disk as the user's
        bench = Bench(config, Path(scratch))
        for name in MEASURES:
            if name in config.measures:
                print(f"measuring {name}", flush=True)
                facts = note(run, MEASURES[name](bench), how)
                print(line_of(name, facts) if name in facts else f"{name}: not reached", flush=True)
    measured = [name for name, row in ROWS.items() if row.reach and f"{name}_theirs" in facts]
    short = [ROWS[name].what for name in measured if name not in facts or reached(name, facts[name]) < 1]
    facts = note(run, on_paper(config, facts) | {"short_of_goal": "; ".join(short) or "nothing"}, how)
    header = [
        "| measure | beside | ratio | from turn to turn | to reach | stretch | ours | theirs | in |",
        "|---" * 9 + "|",
    ]
    table = "\n".join([*header, *(line_of(name, facts) for name in ROWS if name in facts)])
    runs.write_text(run / "benchmark.md", table + "\n")
    if any(name in facts for name in ROWS):
        draw(run / "benchmark.png", facts)
    print(table, f"\n{run / 'benchmark.md'}")


def note(run: Path, found: dict, how: dict) -> dict:
    """Put what was found among the facts of earlier measures, and return them all; what is None is taken away.

    Those that were measured with other settings than `how` are forgotten.
    """
    path = run / "facts.json"
    known = json.loads(path.read_text()).get("benchmark", {}) if path.exists() else {}
    if any(known.get(key) != value for key, value in how.items()):
        known = how
    found = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in found.items()}
    facts = {key: value for key, value in (known | found).items() if value is not None}
    runs.add_facts(run, "benchmark", facts)
    return facts


def line_of(name: str, facts: dict) -> str:
    row = ROWS[name]
    turns = f"{facts[f'{name}_low']:{row.form}} to {facts[f'{name}_high']:{row.form}}" if f"{name}_low" in facts else ""
    sides = (f"{facts[f'{name}_{side}']:.4g}" for side in ("ours", "theirs"))
    aims = (f"{aim:{row.form}}" if aim else "" for aim in (row.reach, row.stretch))
    return f"| {' | '.join([row.what, row.beside, f'{facts[name]:{row.form}}', turns, *aims, *sides, row.unit])} |"


def reached(name: str, value: float) -> float:
    """The share of its goal that a measure reaches; 1 and more are good."""
    return ROWS[name].reach / max(value, 1e-9) if ROWS[name].less else value / ROWS[name].reach


def draw(path: Path, facts: dict) -> None:
    """Every measure in per cent of what it should reach."""
    shown = [name for name in ROWS if name in facts and ROWS[name].reach]
    most = 300

    def share(name, value):
        return min(100 * reached(name, value), most)

    groups = {"measured": [share(name, facts[name]) for name in shown],
              "a further goal": [share(name, ROWS[name].stretch or ROWS[name].reach) for name in shown]}  # fmt: skip
    title = f"How fast, in per cent of what was to be reached ({most} and more end there)"
    names = [LABELS.get(name, figures.plain(name)) for name in shown]
    figures.bars(path, groups, names, title, "% of what was to be reached", True, 100)


def on_paper(config, facts: dict) -> dict:
    """What WikiArt would cost at `side` pixels with the settings of config.json, by counting; see gpu_tflops."""
    settings = SimpleNamespace(**runs.settings(None)["train"])
    each = operations(settings, config.side)
    total = each * WIKIART * settings.epochs
    minutes = total / (config.gpu_tflops * 1e12 * config.gpu_share) / 60
    paper = {
        "images": WIKIART,
        "operations_per_image": each,
        "crop": settings.crop,
        "crop_operations": operations(settings, settings.crop) / each,
        "epochs": settings.epochs,
        "operations": total,
        "pixels_gb": WIKIART * 3 * config.side**2 / 1e9,
        "one_gpu_minutes": minutes,
        "eight_gpus_minutes": minutes / GPUS / config.gpus_share,
        "gpu_tflops": config.gpu_tflops,
        "gpu_share": config.gpu_share,
        "gpus_share": config.gpus_share,
    }
    if "cache" in facts:
        paper["decoding_cpu_minutes"] = facts["cache_ours"] / 1000 * WIKIART / 60
    if "gemm_share" in facts:
        paper["cpu_core_days"] = total / (facts["gemm_share_ours"] * 1e9) / 86_400
    return {
        "paper": {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in paper.items()}
    }


if __name__ == "__main__":
    runs.start(main)
