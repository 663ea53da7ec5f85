"""Train one classifier for each setting of a list, evaluate them all, and write one table.

    python tune.py '{"balance": ["none", "resample", "sampler", "weights", "logit"]}' --name balance -- --per-class 0
    python tune.py '{"seed": [0, 1, 2]}' --name seeds
    python tune.py grid.json --jobs 2 -- -c settings/cpu.json --epochs 10    # what follows -- goes to every train.py

Settings are JSON, or a file of JSON: {key: [values]} for every combination, a list [{key: value, ...}, ...], or
{name: {key: value, ...}, ...}. Each is trained in <run>/<name>/<setting>. Run again, the same command skips finished
trainings and resumes interrupted ones. Writes <run>/<name>.md, sorted by balanced accuracy on validation paintings,
which is what to choose by; more/<name>.png (recall of every class); and facts.json.
"""

import contextlib
import ctypes
import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
from tqdm import tqdm

from common import figures
from common.config import ROOT, Setting, configure, read_settings
from common.errors import UserError
from common.metrics import METRICS
from common.names import display_name
from common.run import add_facts, claim, read_facts, run_script, write_text

SHARED = ("data", "run", "device")
SETTINGS = {
    "name": Setting(str, None, "folder of these trainings in the run folder, and name of their table"),
    "jobs": Setting(int, "[1, inf)", "trainings at a time"),
}
MEASURED = (*METRICS, "ece_after", "unseen_artists_accuracy", "unseen_artists_balanced_accuracy")
MEASURED += ("without_tta_accuracy", "without_tta_balanced_accuracy", "without_tta_unseen_artists_accuracy")
MEASURED += ("unknown_auroc", "unknown_unsure", "unknown_confidence", "unsure")
RUNNING = []  # processes
LIBC = ctypes.CDLL(None)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, train_flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    grid, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    config = configure("tune", __doc__, SETTINGS, SHARED, argv)
    if config.name != "tune" and config.name in read_settings():
        raise UserError(f"--name {config.name} is the name of another script's facts: give another")
    settings = read_grid(grid)
    run, folder = Path(config.run), Path(config.run) / config.name
    lock = claim(folder, "tune")
    common_flags = [part for path in config.config or [] for part in ("-c", path)]
    common_flags += ["--data", config.data, "--device", config.device]
    train_one = partial(train_and_test, folder, settings, common_flags, train_flags)
    with ThreadPoolExecutor(config.jobs) as pool:  # the threads only wait for their processes
        try:
            list(tqdm(pool.map(train_one, settings), config.name, len(settings), unit="training"))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:  # they keep their finished epochs
                process.terminate()
            raise
    facts = {name: read_facts(folder / name) for name in settings}
    write_table(run / f"{config.name}.md", facts)
    plot_recalls(run / "more" / f"{config.name}.png", facts, config.name)
    add_facts(run, config.name, summary(facts))
    lock.close()


def read_grid(text: str) -> dict[str, dict]:
    """{name: {key: value}} of every setting in JSON, or in a file of JSON. Raises UserError."""
    if not text:
        raise UserError("give settings first, e.g. python tune.py '{\"seed\": [0, 1]}'")
    try:
        grid = json.loads(Path(text).read_text() if text.endswith(".json") else text, object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        raise UserError(f"{text} is neither a file of JSON nor JSON: {error}") from None
    if isinstance(grid, dict) and grid and all(isinstance(setting, dict) for setting in grid.values()):
        return grid
    if isinstance(grid, dict) and all(isinstance(values, list) for values in grid.values()):
        grid = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not (isinstance(grid, list) and grid and all(isinstance(setting, dict) for setting in grid)):
        raise UserError("settings must be {key: [values]}, [{key: value}, ...] or {name: {key: value}}")
    varied = {key for setting in grid for key in setting}
    return unique([(name_of(setting, varied), setting) for setting in grid])


def unique(pairs: list[tuple]) -> dict:
    """A dictionary of (name, value). Raises UserError where a name comes twice, for one would replace the other."""
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise UserError(f"{', '.join(repeated)} is given twice: remove one, or give names, {{name: {{key: value}}}}")
    return dict(pairs)


def name_of(setting: dict, varied: set) -> str:
    """A folder's name: the value alone where one key varies, else key-value pairs; "as-is" for no change."""
    parts = []
    for key, value in setting.items():
        text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
        parts.append(text if len(varied) == 1 else f"{key}-{text}")
    return "_".join(parts) or "as-is"


def train_and_test(folder: Path, settings: dict, common_flags: list, train_flags: list, name: str) -> None:
    """Train and test the setting `name` in its folder, as far as that is not done."""
    run, flags = folder / name, [*common_flags, *train_flags]
    for key, value in settings[name].items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    record, text = run / "flags.json", json.dumps(list(map(str, flags)))
    if record.exists() and record.read_text() != text:
        raise UserError(f"{run} was made with other flags, see {record}: remove it, or give another --name")
    write_text(record, text)
    if (run / "classifier.partial.pt").exists() or not (run / "classifier.pt").exists():
        (run / "report.txt").unlink(missing_ok=True)  # first, or after a kill it would count as that of the new one
        call("train.py", run, flags)
    if not (run / "report.txt").exists():
        call("test.py", run, common_flags)


def call(script: str, run: Path, flags: list) -> None:
    """Run a script in a process of its own, with its output in <run>/<script>.log. Raises UserError if it fails."""
    log = run / f"{script}.log"
    command = [sys.executable, ROOT / script, *flags, "--run", run]
    with open(log, "w") as file:
        options = {"stdout": file, "stderr": file, "preexec_fn": end_with_tune}
        with subprocess.Popen(list(map(str, command)), **options) as process:
            RUNNING.append(process)
    RUNNING.remove(process)
    if process.returncode:
        last_line = (log.read_text().strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise UserError(f"{script} failed in {run}: {last_line} (see {log})")


def end_with_tune() -> None:
    """In a new process: end when tune.py is killed. On Linux; elsewhere it goes on, and holds its run folder."""
    with contextlib.suppress(AttributeError):
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def summary(facts: dict) -> dict:
    """The test metrics of each setting; and of all, in their order, with mean, lowest and highest."""
    metrics = [metric for metric in MEASURED if all(metric in part["test"] for part in facts.values())]
    results = {name: {metric: part["test"][metric] for metric in metrics} for name, part in facts.items()}
    for metric in metrics:
        values = [part["test"][metric] for part in facts.values()]
        results |= {metric: values, f"{metric}_mean": np.mean(values)}
        results |= {f"{metric}_min": min(values), f"{metric}_max": max(values)}
    return results | {"cpu_minutes": [part["train"]["cpu_minutes"] for part in facts.values()]}


def write_table(path: Path, facts: dict) -> None:
    lines = ["| setting | validation, balanced | test | test, balanced | macro-F1 | CPU-minutes |", "|---" * 6 + "|"]
    for name in sorted(facts, key=lambda name: -facts[name]["train"]["val_balanced_accuracy"]):
        train, test = facts[name]["train"], facts[name]["test"]
        shares = (train["val_balanced_accuracy"], test["accuracy"], test["balanced_accuracy"])
        cells = [name, *(f"{share:.1%}" for share in shares), f"{test['macro_f1']:.3f}", f"{train['cpu_minutes']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    write_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))


def plot_recalls(path: Path, facts: dict, title: str) -> None:
    """Recall of every class under every setting, the classes by falling number of training paintings.

    Nothing where settings differ in their classes, as with --holdout.
    """
    sizes = next(iter(facts.values()))["train"]["class_sizes"]
    if any(part["train"]["class_sizes"].keys() != sizes.keys() for part in facts.values()):
        return
    classes = sorted(sizes, key=sizes.get, reverse=True)
    bars = {name: [100 * part["test"]["recalls"].get(label, 0) for label in classes] for name, part in facts.items()}
    labels = [f"{display_name(name)} ({sizes[name]})" for name in classes]
    figures.bars(path, bars, labels, f"Recall by class and {title}", "recall on test paintings, %")


if __name__ == "__main__":
    run_script(main)
