"""Train one classifier for each setting of a list, evaluate them all, and write one table.

    python tune.py '{"balance": ["none", "resample", "sampler", "weights", "logit"]}' --name balance -- --per-class 0
    python tune.py '{"seed": [0, 1, 2]}' --name seeds
    python tune.py grid.json --jobs 2 -- -c cpu.json --epochs 10    # what follows -- goes to every train.py

The settings are JSON, or a file of JSON: {key: [values]} for every combination, a list [{key: value, ...}, ...], or
{name: {key: value, ...}, ...}.
Each is trained in <run>/<name>/<setting>; what is finished there is not done again, what was stopped goes on. Writes
<run>/<name>.md (sorted by balanced accuracy on whole validation paintings, which is what to choose by), <name>.png
(recall of every class) and facts.json.
"""

import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import figures
import runs
from scores import MEASURES

SHARED = ("data", "run", "device")
HELP = {
    "name": "folder for these trainings inside the run folder, and name of their table",
    "jobs": "trainings at a time",
}
RUNNING = []  # processes under way


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    more = argv[argv.index("--") + 1 :] if "--" in argv else []
    argv = argv[: argv.index("--")] if "--" in argv else argv
    given, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    config = runs.configure("tune", __doc__, SHARED, HELP, flags)
    if config.name != "tune" and config.name in runs.settings(None):
        raise runs.Problem(f"--name {config.name} is what another script calls its facts: give another")
    settings = read_settings(given)
    folder = Path(config.run) / config.name
    layers = [part for path in config.config or [] for part in ("-c", path)]
    lock = runs.claim(folder, "tune")
    common = [*layers, "--data", config.data, "--device", config.device]

    def one(name):
        train_and_test(folder / name, settings[name], common, more)

    with ThreadPoolExecutor(config.jobs) as pool:  # threads that only wait for their processes
        try:
            list(tqdm(pool.map(one, settings), config.name, len(settings), unit="training"))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:  # they keep their finished epochs
                process.terminate()
            raise
    facts = {name: json.loads((folder / name / "facts.json").read_text()) for name in settings}
    write_table(Path(config.run) / f"{config.name}.md", facts)
    draw_recalls(Path(config.run) / f"{config.name}.png", facts, config.name)
    summary = {name: {key: found["test"][key] for key in MEASURES} for name, found in facts.items()}
    for key in MEASURES:
        values = [found["test"][key] for found in facts.values()]
        summary |= {
            key: values,
            f"{key}_mean": float(np.mean(values)),
            f"{key}_min": min(values),
            f"{key}_max": max(values),
        }
    summary["cpu_minutes"] = [found["train"]["cpu_minutes"] for found in facts.values()]
    runs.add_facts(config.run, config.name, summary)
    lock.close()


def read_settings(given: str) -> dict[str, dict]:
    """{name: {key: value}} of every setting that is asked for."""
    if not given:
        raise runs.Problem("give settings first, e.g. python tune.py '{\"seed\": [0, 1]}'")
    try:
        found = json.loads(Path(given).read_text() if given.endswith(".json") else given)
    except (OSError, ValueError) as error:
        raise runs.Problem(f"{given} is neither a file of JSON nor JSON: {error}") from None
    if isinstance(found, dict) and found and all(isinstance(setting, dict) for setting in found.values()):
        return found
    if isinstance(found, dict) and all(isinstance(values, list) for values in found.values()):
        found = [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())]
    if not (isinstance(found, list) and found and all(isinstance(setting, dict) for setting in found)):
        raise runs.Problem("settings must be {key: [values]}, [{key: value}, ...] or {name: {key: value}}")
    varied = {key for setting in found for key in setting}
    return {name_of(setting, varied): setting for setting in found}


def name_of(setting: dict, varied: set) -> str:
    """A folder's name: the bare value where one key varies, else key-value pairs; "as-is" for no change."""
    values = {
        key: "-".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in setting.items()
    }
    return "_".join(value if len(varied) == 1 else f"{key}-{value}" for key, value in values.items()) or "as-is"


def train_and_test(run: Path, setting: dict, common: list, more: list) -> None:
    flags = []
    for key, value in setting.items():
        flag = f"--{key.replace('_', '-')}"
        flags += [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [
            flag, *map(str, value if isinstance(value, list) else [value])]  # fmt: skip
    wanted = json.dumps(list(map(str, [*common, *more, *flags])))
    noted = run / "flags.json"
    if noted.exists() and noted.read_text() != wanted:
        raise runs.Problem(f"{run} was made with other flags, see {noted}: remove it, or give another --name")
    runs.write_text(noted, wanted)
    resume = ["--resume"] if (run / "classifier.partial.pt").exists() else []
    if resume or not (run / "classifier.pt").exists():
        call("train.py", run, [*common, *more, *flags, *resume])
        (run / "report.txt").unlink(missing_ok=True)
    if not (run / "report.txt").exists():
        call("test.py", run, common)


def call(script: str, run: Path, flags: list) -> None:
    """Run a script in a process of its own, its output in a file beside its results."""
    run.mkdir(parents=True, exist_ok=True)
    log = run / f"{script}.log"
    with open(log, "w") as file:
        command = [sys.executable, runs.HERE / script, *flags, "--run", run]
        with subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT) as process:
            RUNNING.append(process)
        RUNNING.remove(process)
    if process.returncode:
        said = log.read_text().strip().splitlines() or [f"ended with status {process.returncode}"]
        raise runs.Problem(f"{script} failed in {run}: {said[-1]} (see {log})")


def write_table(path: Path, facts: dict) -> None:
    order = sorted(facts, key=lambda name: -facts[name]["train"]["val_balanced_accuracy"])
    lines = ["| setting | validation, balanced | test | test, balanced | macro-F1 | CPU-minutes |", "|---" * 6 + "|"]
    for name in order:
        train, test = facts[name]["train"], facts[name]["test"]
        shares = (train["val_balanced_accuracy"], test["accuracy"], test["balanced_accuracy"])
        cells = [name, *(f"{share:.1%}" for share in shares), f"{test['macro_f1']:.3f}", f"{train['cpu_minutes']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    runs.write_text(path, "\n".join(lines) + "\n")
    print("\n".join(lines))


def draw_recalls(path: Path, facts: dict, title: str) -> None:
    """Recall of every class under every setting, the classes in order of their training pictures."""
    sizes = next(iter(facts.values()))["train"]["class_sizes"]
    classes = sorted(sizes, key=sizes.get, reverse=True)
    table = {name: [100 * found["test"]["recalls"].get(label, 0) for label in classes] for name, found in facts.items()}
    labels = [f"{figures.plain(name)} ({sizes[name]})" for name in classes]
    figures.bars(path, table, labels, f"Recall by class and {title}", "recall on test paintings, %")


if __name__ == "__main__":
    runs.start(main)
