"""Faults: `kill -9` at random moments, full disks, two programs in one folder, clocks that were set back.

docs/reliability.md lists the cases. Programs are forked from one that has imported everything, this file run by itself,
because importing takes seconds. They run the scripts' main() as `python script.py` does, with networks and figures that
are tiny.
"""

import contextlib
import csv
import errno
import functools
import importlib
import itertools
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
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import tqdm
from conftest import ROOT, TINY, clear_line, flags, picture

import cluster
import label
import wikiart
from common import images
from common.errors import UserError
from common.run import claim
from serve import corrections, panels

KILLS, CORRECTIONS = 20, 12
LIMITS = (64, 300, 10_000)  # bytes of a file
FULL = "disk full|disk is full|No space left|File too large|disk I/O error|unable to open database file"
PROGRESS = (".partial.pt", ".jsonl", "facts.json", "labels.csv", ".float32", ".sqlite", "upload.png", ".copying")
TRAIN = flags(model="MLP", tta_scales=1, size=32, crop=32, width=8, epochs=2, batch_size=16, per_class=4)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


# Programs


class Programs:
    """Starts programs, and says how they ended."""

    def __init__(self):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)

    def __call__(self, *commands, **faults) -> list[SimpleNamespace]:
        """Run commands (script, *arguments) at once, to their end; for the faults see run_program()."""
        request = {"commands": [list(map(str, command)) for command in commands], "faults": faults}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return [SimpleNamespace(**end) for end in json.loads(self.process.stdout.readline())]

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
        os.setpgrp()
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
        stderr, _, cpu = file.read().replace("\x1b[A", "").partition("\0")  # of bars above each other
    _, status = os.waitpid(process, 0)
    return {"returncode": os.waitstatus_to_exitcode(status), "stderr": stderr, "cpu": float(cpu or 0)}


def run_program(command: list[str], cpu=None, write=None, limit=None, full=None, clock=False) -> int:
    """Run a script in this process, with a fault; returns its exit status.

    cpu: seconds of CPU time after which it is killed, with its own processes. write: the number of the change of a
    file before which it is. limit: bytes that a file can have, as if the disk were full then. full: the number of the
    change of a file from which on no file can be made. clock: whether it is set back again and again.
    """
    script, *arguments = command
    sys.argv = [f"{script}.py"]
    if cpu is not None:
        threading.Thread(target=kill_after, args=(cpu,), daemon=True).start()
    if write is not None:
        at_change(write, lambda _: os.killpg(0, signal.SIGKILL))
    if full is not None:
        at_change(full, no_space)
    if clock:
        set_clock_back()
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


def at_change(number: int, fault) -> None:
    """Call fault(event) before the change of a file with this number, and each one that follows."""
    left, main = number, os.getpid()

    def hook(event, arguments):
        nonlocal left
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if os.getpid() == main and (changes or event == "open" and (arguments[2] or 0) & WRITES):
            left -= 1
            if left <= 0:
                fault(event)

    sys.addaudithook(hook)


def no_space(event: str) -> None:
    if event in ("open", "os.mkdir"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def set_clock_back() -> None:
    """Each look at the clock shows an hour less."""
    moments = itertools.count(1_700_000_000, -3600)
    time.time = tqdm.std.time = lambda: next(moments)


@pytest.fixture(scope="module")
def programs():
    programs = Programs()
    yield programs
    programs.process.kill()


# What programs leave


TIMES = {"seconds", "cpu_seconds", "minutes", "cpu_minutes", "fit_seconds", "images_per_second"}
TIMES |= {"images_per_cpu_second", "checkpoint"}  # the last is the hash of a file with times


def contents(folder: Path) -> dict:
    """What the files below a folder hold, hidden ones too, by their paths; without locks, logs and times."""
    left_out = ("lock", ".log", ".sqlite-wal", ".sqlite-shm")  # the last two are removed when the database is read
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(left_out)]
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
        with contextlib.closing(sqlite3.connect(path)) as base, contextlib.suppress(sqlite3.OperationalError):
            tables = "PRAGMA integrity_check", "SELECT * FROM pictures", "SELECT number, hash, choice FROM corrections"
            return [base.execute(table).fetchall() for table in tables]
        return None  # a full disk took no table
    return path.read_bytes()


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(part) for part in value]
    return (value.dtype, value.shape, value.numpy().tobytes()) if torch.is_tensor(value) else value


@pytest.fixture(scope="module")
def few(demo, tmp_path_factory):
    """The demo with half of its styles, without a cache of pixels."""
    root = shutil.copytree(demo, tmp_path_factory.mktemp("few") / "root", ignore=shutil.ignore_patterns(".cache"))
    for style in sorted(path.name for path in (root / "train").iterdir())[::2]:
        shutil.rmtree(root / "train" / style)
        shutil.rmtree(root / "test" / style)
    return root


class Case:
    """A command that writes into `folder`; it is set back by fresh(), and its files are to be those of `whole`."""

    def __init__(self, programs, folder: Path, *command, begin: Path | None = None):
        self.programs, self.folder, self.command, self.begin = programs, folder, command, begin
        self.fresh()
        self.cpu = programs.succeed(*command).cpu
        self.whole = self.contents()

    def fresh(self) -> None:
        """Begin with an empty folder, or with links to the files of `begin`, for none may be changed in its place."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.begin:
            shutil.copytree(self.begin, self.folder, copy_function=os.link)
        else:
            self.folder.mkdir()

    def contents(self) -> dict:
        return contents(self.folder)

    def check(self) -> None:
        found = self.contents()
        assert found.keys() == self.whole.keys()
        assert [name for name in found if found[name] != self.whole[name]] == []

    def try_faults(self, step: int = 1) -> None:
        self.kill_at_random()
        self.kill_at_writes(step)
        self.fill_the_disk(step)
        self.set_the_clock_back()

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

    def fill_the_disk(self, step: int = 1) -> None:
        """At a number of bytes in one file, or from one change of a file on: one clear line, and nothing half-written.

        Then, with space again, the same command goes on.
        """
        self.fresh()
        before = self.contents()
        for limit in LIMITS:
            self.stopped(before, limit=limit)
        for number in itertools.count(1, step):
            if not self.stopped(before, full=number):
                break
        self.programs.succeed(*self.command)
        self.check()

    def stopped(self, before: dict, **fault) -> bool:
        """Run the command until it is stopped or ends; each file is as `before`, as it is to be, or one of progress."""
        end = self.programs.run(*self.command, **fault)
        if end.returncode:
            assert re.search(FULL, clear_line(end))
        for name, value in self.contents().items():
            assert name.endswith(PROGRESS) or value in (before.get(name), self.whole.get(name)), name
        return bool(end.returncode)

    def set_the_clock_back(self) -> None:
        self.fresh()
        end = self.programs.run(*self.command, clock=True)
        assert end.returncode == 0, end.stderr
        self.check()

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


def test_faults_while_pixels_are_cached(programs, few, tmp_path):
    """Also while an older cache is removed."""
    root = shutil.copytree(few, tmp_path / "root", ignore=shutil.ignore_patterns(".cache"))
    case = Case(programs, root / ".cache", "cache", root)
    case.try_faults()
    programs.succeed("cache", root)
    shutil.copytree(root / ".cache", tmp_path / "old")
    os.utime(next(root.glob("train/*/*.jpg")), (1e9, 1e9))
    Case(programs, root / ".cache", "cache", root, begin=tmp_path / "old").kill_at_writes()


def test_faults_while_checkpoints_are_saved(programs, few, tmp_path):
    """Before every change of a file: the last epoch's line in the log needs one kill at one moment to get lost."""
    options = [*TINY, *TRAIN]
    case = Case(programs, tmp_path / "run", "train", *options, "--data", few, "--run", tmp_path / "run")
    case.try_faults()


def test_faults_while_labels_are_corrected_and_exported(programs, tmp_path):
    """A label that was said to be saved is there; the export that was killed is completed."""
    folder = tmp_path / "run"
    case = Case(programs, folder, "correct", folder, "a")
    assert len([name for name in case.whole if name.endswith(".png")]) == CORRECTIONS
    case.try_faults(5)


def test_faults_while_a_folder_is_labelled(programs, few, trained, tmp_path):
    folder = tmp_path / "labels"
    options = ["--device", "cpu", "--processes", "1", "--run", trained, "--sort", folder / "sorted"]
    case = Case(programs, folder, "label", few / "test", "--out", folder / "labels.csv", *options)
    case.try_faults(5)


def test_faults_while_settings_are_tuned(programs, few, tmp_path):
    """Trainings and tests are in tune.py's own process, so that they are killed, too."""
    options = ["--device", "cpu", "--name", "seeds", "--data", few, "--run", tmp_path / "run"]
    options += ["--", *TINY, *TRAIN]
    case = Case(programs, tmp_path / "run", "tune", '{"seed": [0, 1]}', *options)
    case.try_faults(9)


def test_faults_while_features_are_extracted(programs, few, small, tmp_path):
    case = Case(programs, tmp_path / "run", "embed", *small, "--data", few, "--run", tmp_path / "run")
    case.try_faults(5)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project's documents, and a run folder that has what the committed report shows, and another accuracy."""
    root = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "README.md", root)
    for name in ("report", "run"):
        shutil.copytree(ROOT / "report", root / name)
    for name in ("classes.png", "roc.png"):  # which the committed report does not show
        shutil.copy(ROOT / "report/confusion.png", root / "run" / name)
    (root / "run/demo").mkdir()
    for name in ("demo.png", "style_truth.png", "lora_grid.png", "lora_compare.png"):
        (root / "run" / name).rename(root / "run/demo" / name)
    facts = json.loads((root / "run/facts.json").read_text())
    facts["test"]["accuracy"] = 0.987654
    (root / "run/facts.json").write_text(json.dumps(facts))
    return root


def test_faults_while_the_report_is_built(programs, project, tmp_path):
    """Of a run, and the published one, in a copy of the project."""
    before = contents(project)
    case = Case(programs, tmp_path / "copy", "publish", tmp_path / "copy", begin=project)
    assert "98.8%" in (tmp_path / "copy/README.md").read_text()
    case.try_faults(13)
    assert contents(project) == before


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of embed.py for a small backbone with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save({"state_dict": timm.create_model("test_efficientnet").state_dict()}, path)
    settings = flags(size=32, epochs=2, batch_size=8, backbone="test_efficientnet", target="style", weights=path)
    return [*TINY, *settings]


# Full disks, elsewhere


@pytest.fixture(scope="module")
def finished(trained, small, demo, programs, tmp_path_factory):
    """A run folder with a classifier, features, and a network for repainting with random weights."""
    run = shutil.copytree(trained, tmp_path_factory.mktemp("finished") / "run")
    classes = torch.load(run / "classifier.pt", weights_only=True)["classes"]
    shape = {"styles": len(classes), "width": 8, "mean": [0.5] * 3, "std": [0.25] * 3}
    state = {"model": "StyleAutoencoder", "arguments": shape, "classes": classes, "crop": 32, "config": {}}
    state |= {"data": {"size": 32, "resize": "squash", "split_seed": 0}, "fingerprint": "", "history": []}
    state["weights"] = wikiart.make_model("StyleAutoencoder", shape).state_dict()
    torch.save(state, run / "style.pt")
    programs.succeed("embed", *small, "--data", demo, "--run", run)
    programs.succeed("test", *TINY, "--data", demo, "--run", run)
    programs.succeed("cluster", *TINY, *flags(size=32, codes="colours", data=demo, run=run))
    return run


def commands(demo: Path, run: Path, small: list[str]) -> dict:
    """Commands that write into the run folder, by the names of what they write."""
    paintings, tiny = ["--data", demo, "--run", run], flags(size=32, crop=32, width=8, epochs=2, batch_size=16)
    picture = next((demo / "test").glob("*/*.jpg"))
    repaint = ["--image", picture, "--from-style", picture.parent.name, "--style", "Dots", "--out", run / "repainted"]
    return {
        "classifier": ["train", *TINY, *TRAIN, *paintings],
        "autoencoder": ["train_autoencoder", *TINY, *tiny, "--code", "8", *paintings],
        "style": ["train_style", *TINY, *flags(crop=64, size=64, width=8, per_class=2, batch_size=4), *paintings],
        "embed_test_efficientnet": ["embed", *small, "--batch-size", "7", *paintings],
        "test": ["test", *TINY, *paintings],
        "cluster": ["cluster", *TINY, "--size", "32", "--codes", "pixels", *paintings],
        "style_transfer_model": ["style_transfer", *TINY, "--paintings", "8", "--judges", "classifier.pt", *paintings],
        "tune": ["tune", '{"seed": [0]}', "--name", "seeds", "--data", demo, "--run", run, "--", *TINY, *TRAIN],
        "repainted": ["style_transfer", *TINY, *repaint, "--run", run],
        "safetensors": ["export", "classifier.pt", "--to", "safetensors", "--run", run],
        "demo": ["demo", *flags(data=run / "demo", train_images=8, test_scenes=1, picture=16, processes=1)],
        "stamp": ["stamp", run / "stamps" / "test", "test.py", "--run", run],
    }


# What one program at a time can write, and what else is written.
LOCKED = ("classifier", "autoencoder", "style", "embed_test_efficientnet", "test", "cluster", "tune")
WRITTEN = (*LOCKED, "repainted", "safetensors", "demo", "stamp")
LOCKED += ("style_transfer_model",)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_full_disk_leaves_what_was_there(programs, demo, finished, small, name):
    before = contents(finished)
    end = programs.run(*commands(demo, finished, small)[name], limit=64)
    assert re.search(FULL, clear_line(end))
    after = contents(finished)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after.keys() - before.keys() if not path.endswith((".jsonl", ".log"))]


# Two programs in one folder


@pytest.mark.parametrize("name", LOCKED)
def test_a_second_program_is_told_to_wait(programs, demo, finished, small, name):
    before = contents(finished)
    with claim(finished / "seeds" if name == "tune" else finished, name):
        end = programs.run(*commands(demo, finished, small)[name])
    assert f"another program is writing {name} in {finished}" in clear_line(end)
    assert contents(finished) == before


def at_once(programs, *commands) -> None:
    """Run commands at once, then again those that had to wait."""
    for command, end in zip(commands, programs(*commands), strict=True):
        if end.returncode:
            assert "another program is writing" in clear_line(end)
            programs.succeed(*command)


def test_two_programs_that_cluster_lose_nothing(programs, demo, tmp_path):
    options = [*TINY, *flags(size=32, data=demo, run=tmp_path), "--codes"]
    at_once(programs, ("cluster", *options, "colours"), ("cluster", *options, "pixels"))
    assert set(json.loads((tmp_path / "facts.json").read_text())["cluster"]) == {"colours", "pixels"}
    table = (tmp_path / "clusters.md").read_text()
    assert "| colours |" in table and "| pixels |" in table


def test_two_programs_that_label_write_one_table(programs, demo, trained, tmp_path):
    options = ["--out", tmp_path / "labels.csv", "--device", "cpu", "--processes", "1", "--run", trained, "--no-sheet"]
    command = ("label", demo / "test", *options)
    at_once(programs, command, command)
    paths = [line.split(",")[0] for line in (tmp_path / "labels.csv").read_text().splitlines()]
    assert sorted(paths) == sorted(["path", *(str(path.relative_to(demo / "test")) for path in demo.glob("test/*/*"))])


def test_two_programs_that_correct_lose_no_label(programs, tmp_path):
    for end in programs(("correct", tmp_path, "a"), ("correct", tmp_path, "b")):
        assert end.returncode == 0, end.stderr
    names = [path.name[0] for path in tmp_path.glob("exported/*/*.png")]
    assert sorted(names) == CORRECTIONS * ["a"] + CORRECTIONS * ["b"]
    with contextlib.closing(sqlite3.connect(tmp_path / "corrections.sqlite")) as base:
        assert base.execute("SELECT COUNT(*) FROM corrections").fetchone() == (2 * CORRECTIONS,)


def test_two_programs_that_write_one_file_write_it_whole(programs, tmp_path):
    path = tmp_path / "file.txt"
    for end in programs(("write", path, "a"), ("write", path, "b"), ("write", path, "c")):
        assert end.returncode == 0, end.stderr
    assert len(set(path.read_text())) == 1
    assert os.listdir(tmp_path) == ["file.txt"]


# What a kill leaves


def test_trainings_of_a_killed_tune_end_with_it(tmp_path):
    """They would compute on, and their run folders would be taken."""
    (tmp_path / "train.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    code = "import sys, tune; from pathlib import Path; tune.ROOT = Path(sys.argv[1]); "
    code += "tune.call('train.py', tune.ROOT, [])"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT) as process:
        log = tmp_path / "train.py.log"
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
        process.kill()
    wait_until(lambda: not is_running(int(log.read_text())))


def test_a_killed_demo_leaves_nothing(programs, tmp_path):
    command = ["demo", *flags(data=tmp_path / "demo", train_images=8, test_scenes=1, picture=16, processes=1)]
    assert programs.run(*command, write=20).returncode == -signal.SIGKILL
    assert [path for path in tmp_path.glob(".demo-*/demo")]
    programs.succeed(*command)
    assert sorted(os.listdir(tmp_path)) == [".demo.lock", "demo"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_codes_that_a_kill_left_are_no_source(finished, tmp_path):
    (tmp_path / "codes").mkdir()
    for name in ("whole.npz", ".half.npz.new.npz"):
        shutil.copy(finished / "codes" / "test_efficientnet.npz", tmp_path / "codes" / name)
    assert cluster.find_sources(tmp_path) == ["pixels", *cluster.DESCRIPTORS, "descriptors", "whole"]
    assert panels.code_files(tmp_path) == [tmp_path / "codes" / "whole.npz"]


def test_a_header_that_a_full_disk_cut_is_written_again(tmp_path):
    header, row = ["path", "style", "model"], ["a.png", "Dots", "m"]
    for cut in range(len("path,style,model\r\n") + 1):
        out = tmp_path / f"{cut}.csv"
        out.write_text("path,style,model\r\n"[:cut], newline="")
        with label.open_table(out, header, "m") as (file, paths):
            assert paths == set()
            csv.writer(file).writerow(row)
        assert out.read_bytes() == b"path,style,model\r\na.png,Dots,m\r\n"
    (tmp_path / "other.csv").write_text("path,sty\r\n")
    with pytest.raises(UserError, match="not a table of these columns"):
        label.open_table(tmp_path / "other.csv", header, "m").__enter__()


def test_half_of_a_removed_cache_counts_as_none(folder):
    """Its pixels may be left without their index, and the paintings may be again what they were."""
    first = wikiart.WikiArt(folder, size=16, processes=1)
    pixels, (cache,) = np.array(first.pixels), (folder / ".cache").glob("train-*")
    for left in ("pixels.uint8", "left_out.txt"):
        images.remove_cache(str(folder))
        cache.mkdir()
        (cache / left).write_bytes(b"half")
        assert np.array_equal(wikiart.WikiArt(folder, size=16, processes=1).pixels, pixels)


# A clock that was set back


def test_a_picture_that_is_older_than_its_pixels_is_decoded_again(folder):
    """A cache goes by whether times are equal, not by which is later."""
    (path, other) = sorted(folder.glob("train/Fauvism/*"))
    os.utime(path, (2e9, 2e9))
    wikiart.WikiArt(folder, size=16, processes=1)
    shutil.copy(other, path)
    os.utime(path, (1e9, 1e9))
    data = wikiart.WikiArt(folder, size=16, processes=1)
    assert len(data) == 12
    row = list(data.paths).index(f"train/Fauvism/{path.name}")
    assert np.array_equal(data.pixels[data.rows[row]], images.read_image(path, 16))


def test_the_last_correction_counts_whatever_its_time(tmp_path, monkeypatch):
    store = corrections.Corrections(tmp_path / "corrections.sqlite")
    for choice, moment in (("Dots", 2e9), ("Drips", 1e9)):
        now = datetime.fromtimestamp(moment).timetuple()
        monkeypatch.setattr(corrections.time, "gmtime", lambda now=now: now)
        store.add("a_b.png", b"picture", "model", "Bands", 0.5, choice)
    assert [choice for *_, choice in store.latest()] == ["Drips"]


# The process that starts programs


def import_programs() -> dict:
    """The programs by name, after importing all that they need; with networks, figures and samples that are small."""
    modules = ("cluster", "demo", "embed", "export", "label", "style_transfer", "test", "train", "train_autoencoder")
    mains = {name: importlib.import_module(name).main for name in (*modules, "train_style", "tune")}
    mains |= {"stamp": importlib.import_module("common.stamp").main}
    import sklearn.manifold  # noqa: F401
    import timm  # noqa: F401

    import embed
    import label
    import tune
    from common import figures, metrics

    figures.plt.Figure.savefig = tiny_figure
    metrics.BOOTSTRAP = 20
    embed.WEIGHT_DECAYS, embed.HIDDEN = (0.3,), 16
    label.SHEET, label.BATCH_SIZE = 4, 4
    tune.call = call
    torch.set_num_threads(1)
    return mains | {"cache": build_caches, "correct": correct, "publish": publish, "write": write_often}


def build_caches(arguments: list[str]) -> None:
    from wikiart import WikiArt

    for split in ("train", "test"):
        WikiArt(arguments[0], split, size=32, processes=1)


def correct(arguments: list[str]) -> None:
    """Save the corrections that are missing, and export all."""
    from serve import corrections

    folder, artist = Path(arguments[0]), arguments[1]
    store = corrections.Corrections(folder / "corrections.sqlite")
    known = [name for _, name, *_ in store.latest()]
    for number in range(CORRECTIONS):
        path = picture(folder / f"{artist}.upload.png", number + 100 * ord(artist))
        if f"{artist}_{number}.png" not in known:
            try:
                store.add(f"{artist}_{number}.png", path.read_bytes(), "model", "?", 0.5, ("Dots", "Drips")[number % 2])
            except sqlite3.Error as error:
                raise UserError(str(error)) from None  # as the page does
    corrections.export(store, folder / "exported")
    path.unlink()


def write_often(arguments: list[str]) -> None:
    from common.files import write_text

    for _ in range(100):
        write_text(arguments[0], arguments[1] * 50_000)


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
