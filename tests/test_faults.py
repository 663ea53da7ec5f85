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
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_TRAIN, flags

KILLS = 20
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
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(writer, 2)
        os.closerange(3, 1000)
        code = run_program(command, **faults)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    return process, reader


def end_of(process: int, reader: int) -> dict:
    with open(reader, errors="replace") as file:
        stderr = file.read()
    _, status, used = os.wait4(process, 0)
    return {"returncode": os.waitstatus_to_exitcode(status), "stderr": stderr, "cpu": used.ru_utime + used.ru_stime}


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

    figures.plt.rcParams["savefig.dpi"] = 20
    metrics.BOOTSTRAP = 20
    embed.WEIGHT_DECAYS, embed.HIDDEN = (0.3,), 16
    label.SHEET, label.BATCH_SIZE = 4, 16
    tune.call = call
    torch.set_num_threads(1)
    return mains | {"cache": build_caches}


def build_caches(arguments: list[str]) -> None:
    from wikiart import WikiArt

    for split in ("train", "test"):
        WikiArt(arguments[0], split, size=32, processes=1)


def call(script: str, run: Path, arguments: list) -> None:
    """tune.call() with a forked process."""
    from common.errors import UserError

    (run / f"{script}.log").touch()
    process = os.fork()
    if process == 0:
        os._exit(run_program([script.removesuffix(".py"), *map(str, arguments), "--run", str(run)]))
    if os.waitpid(process, 0)[1]:
        raise UserError(f"{script} failed in {run}")


if __name__ == "__main__":
    from common.run import run_script

    PROGRAMS = import_programs()
    serve()
