"""Faults: `kill -9` at random moments, full disks, two programs in one folder, clocks that were set back.

docs/reliability.md lists the cases. Programs are forked from one that has imported everything, this file run by itself,
because importing takes seconds. They run the scripts' main() as `python script.py` does, with networks and figures that
are tiny.
"""

import contextlib
import functools
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT, TINY, flags, picture

LOG = []
KILLS, CORRECTIONS = 20, 12
TRAIN = flags(model="MLP", tta_scales=1, size=32, crop=32, width=8, epochs=2, batch_size=16, per_class=4)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# Programs


class Programs:
    """Starts programs, and says how they ended."""

    def __init__(self):
        command, environment = (
            [sys.executable, __file__],
            os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)

    def __call__(self, *commands, **faults) -> list[SimpleNamespace]:
        """Run commands (script, *arguments) at once, to their end; see Fault."""
        request = {"commands": [list(map(str, command)) for command in commands], "faults": faults}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        ends = [SimpleNamespace(**end) for end in json.loads(self.process.stdout.readline())]
        for c, e in zip(commands, ends): LOG.append((c[0], str(faults), e.returncode, round(e.cpu, 2)))
        return ends

    def run(self, *command, **faults) -> SimpleNamespace:
        return self(command, **faults)[0]

    def succeed(self, *command) -> SimpleNamespace:
        done = self.run(*command)
        assert done.returncode == 0, done.stderr
        return done


def serve() -> None:
    """Read requests, and answer each with the ends of its programs."""
    for line in sys.stdin:
        request = json.loads(line)
        started = [start(command, request["faults"]) for command in request["commands"]]
        print(json.dumps([end_of(*each) for each in started]), flush=True)


def start(command: list[str], faults: dict) -> tuple[int, int]:
    """Fork a program; returns its process and the file that its errors come from."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(writer, 2)
        os.closerange(3, 1000)
        code = run_program(command, **faults)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(2, f"\0{time.process_time()}".encode())
        os._exit(code)
    os.close(writer)
    return process, reader


def end_of(process: int, reader: int) -> dict:
    with open(reader, errors="replace") as file:
        stderr, _, cpu = file.read().partition("\0")
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return {"returncode": code, "stderr": stderr, "cpu": float(cpu or 0)}


def run_program(command: list[str], cpu=None, write=None, limit=None) -> int:
    """Run a script in this process, with a fault; returns its exit status.

    cpu: seconds of CPU time after which it is killed, with its own processes. write: the number of the write, rename
    or removal of a file before which it is. limit: bytes that a file can have, as if the disk were full then.
    """
    script, *arguments = command
    sys.argv = [f"{script}.py"]
    if cpu is not None:
        threading.Thread(target=kill_after, args=(cpu,), daemon=True).start()
    if write is not None:
        kill_before_write(write)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        run_script(functools.partial(PROGRAMS[script], arguments))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def kill_after(seconds: float) -> None:
    begin = time.process_time()
    while time.process_time() < begin + seconds:
        time.sleep(0.001)
    os.killpg(0, signal.SIGKILL)


def kill_before_write(number: int) -> None:
    left, main = number, os.getpid()

    def hook(event, arguments):
        nonlocal left
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if os.getpid() == main and (writes or event == "open" and (arguments[2] or 0) & WRITES):
            left -= 1
            if not left:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def programs():
    programs = Programs()
    yield programs
    programs.process.kill()
    open("/tmp/cpu.log", "a").write(f"fixture end {LOG}\n")


# What programs leave


TIMES = {
    "seconds",
    "cpu_seconds",
    "minutes",
    "cpu_minutes",
    "fit_seconds",
    "images_per_second",
    "images_per_cpu_second",
}


def contents(folder: Path) -> dict:
    """What the files below a folder hold, hidden ones too, by their paths; without locks, logs and times."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("lock", ".log"))]
    return {str(path.relative_to(folder)): content(path) for path in files}


def content(path: Path):
    if path.suffix == ".pt":
        return without_times(torch.load(path, weights_only=True))
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name in ("embed.md", "seeds.md"):  # the last columns are times
        return [line.rsplit("|", 3)[0] for line in path.read_text().splitlines()]
    if path.name == "labels.csv":  # the last digits of probabilities depend on the pictures in a batch
        return re.sub(r"(0\.\d\d)\d\d", r"\1", path.read_text())
    if path.suffix == ".sqlite":
        with contextlib.closing(sqlite3.connect(path)) as base:
            tables = "PRAGMA integrity_check", "SELECT * FROM pictures", "SELECT number, hash, choice FROM corrections"
            return [base.execute(table).fetchall() for table in tables]
    return path.read_bytes()


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(part) for part in value]
    return (value.dtype, value.tolist()) if torch.is_tensor(value) else value


def copied(demo: Path, folder: Path) -> Path:
    """The demo without its cache of pixels."""
    return Path(shutil.copytree(demo, folder, ignore=shutil.ignore_patterns(".cache")))


class Case:
    """A command that writes into `folder`; it is set back by fresh(), and its files are to be those of `whole`."""

    def __init__(self, programs, folder: Path, *command):
        self.programs, self.folder, self.command = programs, folder, command
        self.fresh()
        self.cpu = programs.succeed(*command).cpu
        self.whole = self.contents()

    def fresh(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def contents(self) -> dict:
        return contents(self.folder)

    def check(self) -> None:
        found = self.contents()
        assert found.keys() == self.whole.keys()
        assert [name for name in found if found[name] != self.whole[name]] == []

    def kill_at_random(self) -> None:
        """Twenty times; a run that ends before its moment must have the right result, and the next one starts anew."""
        moments, killed = random.Random(0), 0
        self.fresh()
        while killed < KILLS:
            killed += self.killed(cpu=moments.uniform(0, self.cpu))
        self.programs.succeed(*self.command)
        self.check()

    def kill_at_writes(self, step: int = 1) -> None:
        """Before the first change of a file, then the (1 + step)th of the next run, and so on until one ends."""
        self.fresh()
        number = 1
        while self.killed(write=number):
            number += step
        assert number > 1

    def killed(self, **moment) -> bool:
        """Run the command until it is killed, or ends, which is checked."""
        end = self.programs.run(*self.command, **moment)
        if end.returncode == -signal.SIGKILL:
            return True
        assert end.returncode == 0, end.stderr
        self.check()
        self.fresh()
        return False


# kill -9


def test_kill_9_while_pixels_are_cached(programs, demo, tmp_path):
    """Also while an older cache is removed."""
    root = copied(demo, tmp_path / "paintings")
    case = Case(programs, root / ".cache", "cache", root)
    case.kill_at_random()
    programs.succeed("cache", root)
    old = tmp_path / "old"
    shutil.copytree(root / ".cache", old)
    os.utime(next(root.glob("train/*/*.jpg")), (1e9, 1e9))

    def fresh():
        shutil.rmtree(case.folder, ignore_errors=True)
        shutil.copytree(old, case.folder)

    case.fresh = fresh
    fresh()
    programs.succeed("cache", root)
    case.whole = case.contents()
    case.kill_at_writes()


def test_kill_9_while_checkpoints_are_saved(programs, demo, tmp_path):
    options = [*TINY, *TRAIN, "--refit"]
    case = Case(programs, tmp_path / "run", "train", *options, "--data", demo, "--run", tmp_path / "run")
    case.kill_at_random()
    case.kill_at_writes(4)


def test_kill_9_while_labels_are_corrected_and_exported(programs, tmp_path):
    """A label that was said to be saved is there; the export that was killed is completed."""
    folder = tmp_path / "run"
    case = Case(programs, folder, "correct", folder)
    assert len([name for name in case.whole if name.endswith(".png")]) == CORRECTIONS
    case.kill_at_random()
    case.kill_at_writes(4)


def test_kill_9_while_a_folder_is_labelled(programs, demo, trained, tmp_path):
    folder = tmp_path / "labels"
    options = ["--device", "cpu", "--processes", "1", "--run", trained, "--sort", folder / "sorted"]
    case = Case(programs, folder, "label", demo / "test", "--out", folder / "labels.csv", *options)
    case.kill_at_random()
    case.kill_at_writes(5)


def test_kill_9_while_settings_are_tuned(programs, demo, tmp_path):
    """Trainings and tests are in tune.py's own process, so that they are killed, too."""
    options = ["--device", "cpu", "--name", "seeds", "--data", demo, "--run", tmp_path / "run"]
    options += ["--", *TINY, *TRAIN, "--no-refit"]
    case = Case(programs, tmp_path / "run", "tune", '{"seed": [0, 1]}', *options)
    case.kill_at_random()
    case.kill_at_writes(9)


def test_kill_9_while_features_are_extracted(programs, demo, small, tmp_path):
    case = Case(programs, tmp_path / "run", "embed", *small, "--data", demo, "--run", tmp_path / "run")
    case.kill_at_random()
    case.kill_at_writes(4)


class Project(Case):
    """A case with the project's documents in its folder, and a run folder that has what the committed report shows."""

    def fresh(self) -> None:
        super().fresh()
        shutil.copy(ROOT / "README.md", self.folder)
        shutil.copytree(ROOT / "report", self.folder / "report")
        run, facts = self.folder / "run", json.loads((ROOT / "report/facts.json").read_text())
        shutil.copytree(ROOT / "report", run)
        (run / "demo").mkdir()
        for name in ("demo.png", "style_truth.png", "lora_grid.png"):
            (run / name).rename(run / "demo" / name)
        facts["test"]["accuracy"] = 0.987654
        (run / "facts.json").write_text(json.dumps(facts))


def test_kill_9_while_the_report_is_built(programs, tmp_path):
    """Of a run, and the published one, in a copy of the project."""
    case = Project(programs, tmp_path / "project", "publish", tmp_path / "project")
    assert "98.8%" in (tmp_path / "project" / "README.md").read_text()
    case.kill_at_random()
    case.kill_at_writes(4)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of embed.py for a small backbone with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save({"state_dict": timm.create_model("test_efficientnet").state_dict()}, path)
    settings = flags(size=32, epochs=2, batch_size=8, backbone="test_efficientnet", target="style", weights=path)
    return [*TINY, *settings]


# The process that starts programs


def import_programs() -> dict:
    """The programs by name, after importing all that they need; with networks, figures and samples that are small."""
    modules = ("cluster", "embed", "export", "label", "style_transfer", "test", "train", "train_autoencoder")
    mains = {name: importlib.import_module(name).main for name in (*modules, "train_style", "tune")}
    import sklearn.manifold  # noqa: F401
    import timm  # noqa: F401

    import embed
    import label
    import tune
    from common import figures, metrics

    figures.plt.Figure.savefig = tiny_figure
    metrics.BOOTSTRAP = 20
    embed.WEIGHT_DECAYS, embed.HIDDEN = (0.3,), 16
    label.SHEET, label.BATCH_SIZE = 4, 16
    tune.call = call
    torch.set_num_threads(1)
    return mains | {"cache": build_caches, "correct": correct, "publish": publish}


def build_caches(arguments: list[str]) -> None:
    from wikiart import WikiArt

    for split in ("train", "test"):
        WikiArt(arguments[0], split, size=32, processes=1)


def correct(arguments: list[str]) -> None:
    """Save the corrections that are missing, and export all."""
    from serve import corrections

    folder = Path(arguments[0])
    store = corrections.Corrections(folder / "corrections.sqlite")
    known = [name for _, name, *_ in store.latest()]
    for number in range(CORRECTIONS):
        path = picture(folder / "upload.png", number)
        if f"a_{number}.png" not in known:
            store.add(f"a_{number}.png", path.read_bytes(), "model", "Dots", 0.5, ("Dots", "Drips")[number % 2])
    corrections.export(store, folder / "exported")
    path.unlink()


def publish(arguments: list[str]) -> None:
    """Build the report of the run folder in a copy of the project, and publish it there."""
    build, root = importlib.import_module("report.build"), Path(arguments[0])
    build.REPORT, build.README = root / "report", root / "README.md"
    for flag in ([], ["--publish"]):
        sys.argv = ["build.py", "--run", str(root / "run"), *flag]
        build.main()


def tiny_figure(_, file, **__) -> None:
    """Instead of savefig(): drawing takes half a second."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(file, format="PNG")


def call(script: str, run: Path, arguments: list) -> None:
    """tune.call() in the same process."""
    PROGRAMS[script.removesuffix(".py")]([*map(str, arguments), "--run", str(run)])


if __name__ == "__main__":
    from common.run import run_script

    PROGRAMS = import_programs()
    serve()
