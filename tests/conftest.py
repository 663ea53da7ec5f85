"""Tiny settings and a tiny painted data set, shared by all tests."""

import contextlib
import faulthandler
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--seed", "0", "--device", "cpu", "--processes", "1"]


def flags(**settings) -> list[str]:
    """Flags of a script: flags(batch_size=16) gives ["--batch-size", "16"]."""
    return [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]


TINY_TRAIN = [*TINY, *flags(size=32, crop=32, width=8, epochs=2, batch_size=16, per_class=12)]


def script(name, *arguments, **options):
    """Run a script as a user does; returns the finished process with its output as text."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def clear_line(process) -> str:
    """The one line of a failed script, after checking that it is one line and no traceback."""
    assert process.returncode not in (0, None)
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.splitlines() if line.strip() and not re.search(r"%\||/s\]", line)]  # bars
    assert len(lines) == 1, process.stderr
    return lines[0]


def stop_in_epoch_2(module, monkeypatch, place=3):
    """Interrupt a script's training there, until `monkeypatch.undo()`; the epoch is train_epoch's argument `place`."""
    whole = module.train_epoch

    def stopped(*arguments):
        if arguments[place] == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(module, "train_epoch", stopped)


def picture(path, seed=0, size=(24, 20), mode="RGB", **options):
    """Write a random picture, a different one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@contextlib.contextmanager
def served(run, *flags):
    """`label.py serve` of a run folder as a process of its own; yields the process, with its `address`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "label.py", "serve", "--run", run, "--port", port, "--device", "cpu", *flags]
    log = open(Path(run) / "serve.log", "a+")
    process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    process.log, process.address = log, f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 600  # importing takes long on a busy machine
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            log.seek(0)
            assert process.poll() is None and time.monotonic() < deadline, log.read()
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def pytest_sessionfinish(exitstatus):
    """Where the interpreter cannot end, say after a minute what it waits for, and end with the status of the tests."""

    def end():
        time.sleep(60)
        faulthandler.dump_traceback(sys.__stderr__)
        os._exit(exitstatus)

    threading.Thread(target=end, daemon=True).start()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """A worker of pytest-xdist for each core: more threads would only wait for each other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    """A root of three styles, 6, 4 and 2 training pictures, one test picture each."""
    seed = 0
    for style, count in (("Cubism", 6), ("Baroque", 4), ("Fauvism", 2)):
        for split, number in (("train", count), ("test", 1)):
            for _ in range(number):
                seed += 1
                picture(tmp_path / "root" / split / style / f"painter-{seed % 3}_work-{seed}.png", seed)
    return tmp_path / "root"


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo data set, tiny."""
    root = tmp_path_factory.mktemp("demo") / "paintings"
    done = script("demo.py", "--data", root, "--train-images", 80, "--test-scenes", 4, "--picture", 32)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="session")
def trained(demo, tmp_path_factory):
    """A run folder with a classifier and the MLP, trained for two epochs on the tiny demo."""
    import train

    run = tmp_path_factory.mktemp("run")
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(run)])
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(run / "mlp"), "--model", "MLP", "--tta-scales", "1"])
    return run
