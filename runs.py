"""How a run works, whatever it computes: settings, devices, checkpoints, facts, and a clean end when things go wrong.

Nothing here knows of paintings. Every script opens with the same two lines:

    config = runs.configure("train", __doc__, HELP, argv)    # config.json, then -c files, then flags
    device = runs.pick_device(config.device)

and closes with `runs.start(main)`, which turns a user's mistake into one line instead of a traceback.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent

SHARED_HELP = {
    "data": "folder of paintings: train/<Style>/* and test/<Style>/*, or <Style>/* alone (split 80/20)",
    "run": "folder for weights, figures and facts.json",
    "size": "side of the cached square pictures, in pixels",
    "resize": ("how a picture becomes a square", ("squash", "crop")),
    "device": "auto, cpu, cuda, cuda:1, mps, ...",
    "seed": "seed of weights, draws and augmentation",
    "split_seed": "seed of the parts that are held out (validation; the test part of a root without train/ and test/)",
    "processes": "processes that decode pictures; 0 takes every core",
    "hide": "what no figure shows: genres of metadata.csv, or parts of file names",
}


class Problem(Exception):
    """Something the user can mend; the message says what is wrong and what to do."""


def start(main) -> None:
    """Run `main`; bad input, a full disk or Ctrl-C end it with one line and a status other than 0."""
    script = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's "stop" is Ctrl-C
    try:
        main()
    except (Problem, OSError) as error:
        sys.exit(f"{script}: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"{script}: out of memory on the device: lower --batch-size")
    except KeyboardInterrupt as stop:
        print(f"{script}: stopped. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)


# Settings ------------------------------------------------------------------------------------------------------------


def configure(script: str, doc: str, help: dict, argv: list[str] | None = None) -> argparse.Namespace:
    """Settings of one script: config.json, under the files given with -c, under the flags.

    `help` maps each key of the script's section to its text, or to (text, choices).
    A key or a type that config.json does not have is an error.
    """
    defaults = _read_json(HERE / "config.json")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("-c", "--config", action="append", default=[], metavar="FILE")
    for path in first.parse_known_args(argv)[0].config:
        _lay_over(defaults, _read_json(path), path)

    values = {key: value for key, value in defaults.items() if not isinstance(value, dict)} | defaults[script]
    parser = argparse.ArgumentParser(
        prog=f"{script}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-c", "--config", action="append", metavar="FILE", help="settings laid over config.json, e.g. cpu.json"
    )
    for key, value in values.items():
        text, choices = _text_and_choices((SHARED_HELP | help)[key])
        flag, text = f"--{key.replace('_', '-')}", f"{text} ({_show(value)})".replace("%", "%%")
        if isinstance(value, bool):
            parser.add_argument(flag, default=value, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(value, list):
            kind = type(value[0]) if value else str
            parser.add_argument(flag, default=value, type=kind, nargs="*", metavar=kind.__name__.upper(), help=text)
        else:
            kind = type(value)
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(flag, default=value, type=kind, choices=choices, metavar=metavar, help=text)
    config = parser.parse_args(argv)
    for key, value in vars(config).items():  # argparse checks flags only, not what came from a file
        choices = _text_and_choices((SHARED_HELP | help).get(key, ""))[1]
        if choices and value not in choices:
            raise Problem(f"{key} is {value!r}, but must be one of {', '.join(choices)}")
    return config


def _text_and_choices(entry):
    return entry if isinstance(entry, tuple) else (entry, None)


def _show(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value) or "none"


def _read_json(path) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise Problem(f"no settings file {path}") from None
    except ValueError as error:
        raise Problem(f"{path} is not valid JSON: {error}") from None


def _lay_over(base: dict, top: dict, path, where: str = "") -> None:
    for key, value in top.items():
        if key not in base:
            raise Problem(f"{path} sets {where}{key}, which config.json does not have")
        if isinstance(base[key], dict) and isinstance(value, dict):
            _lay_over(base[key], value, path, f"{where}{key}.")
            continue
        fits = type(value) is type(base[key]) or (isinstance(base[key], float) and type(value) is int)
        if not fits:
            kind = type(base[key]).__name__
            raise Problem(f"{path} sets {where}{key} to {value!r}, but config.json has a {kind} there")
        base[key] = type(base[key])(value)


# Devices -------------------------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the accelerator that torch finds (CUDA, ROCm, MPS, XPU), else the CPU."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise Problem(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
        return torch.device(name)
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def autocast(device: torch.device):
    """bf16 where the device computes it fast; on CPUs it was measured five times slower than float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


# Files that are whole or absent ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    A reader never sees half a file, and a full disk or `kill -9` leaves the old one as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    os.chmod(temporary, 0o644)  # mkstemp makes it private; results are to be read by others
    try:
        yield Path(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def claim(run) -> object:
    """Lock the run folder until the returned file is closed or the program ends: two trainings in it would mix."""
    path = Path(run) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"another training is writing into {run}: wait for it, or give another --run") from None
    return lock


def save_checkpoint(path, checkpoint: dict) -> None:
    """Write tensors and primitives, whole or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # torch hides "no space left" in its zip writer's RuntimeError
            raise Problem(f"could not write {path}: is the disk full? ({str(error).splitlines()[0]})") from None


def load_checkpoint(path) -> dict:
    """Read a checkpoint onto the CPU; `weights_only` means that no code in the file can run."""
    path = Path(path)
    if not path.exists():
        raise Problem(f"no checkpoint {path}: run the script that trains it, or give another --run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, from EOFError to UnpicklingError
        raise Problem(f"{path} is not a checkpoint of ours ({type(error).__name__}): train again") from None
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise Problem(f"{path} holds no model: is it a checkpoint of this project?")
    return checkpoint


def add_facts(run, name: str, facts: dict) -> None:
    """Merge `{name: facts}` into the run's facts.json; two scripts may do so at once."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".facts.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = run / "facts.json"
        everything = json.loads(path.read_text()) if path.exists() else {}
        everything[name] = facts
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(everything, indent=2) + "\n")


def write_text(path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)
