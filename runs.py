"""How a run works, whatever it computes: settings, devices, checkpoints, facts, and a clean end when things go wrong.

Nothing here knows of paintings. Every script opens with the same two lines:

    config = runs.configure("train", __doc__, SHARED, HELP, argv)    # config.json, then -c files, then flags
    device = runs.pick_device(config.device)

and closes with `runs.start(main)`, which turns a user's mistake into one line instead of a traceback.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import math
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

HERE = Path(__file__).resolve().parent

SHARED_HELP = {
    "data": "folder of paintings: train/<Style>/* and test/<Style>/*, or <Style>/* alone (split 80/20)",
    "run": "folder for weights, figures and facts.json",
    "size": "side of the cached square pictures, in pixels",
    "resize": ("how a picture becomes a square", ("squash", "crop")),
    "device": "auto, cpu, cuda, cuda:1, mps, ...",
    "seed": "seed of everything drawn at random: 0, 1, 2, ...",
    "split_seed": "seed of the parts held out, for validation and of a root without train/ and test/: 0, 1, 2, ...",
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


def configure(script: str, doc: str, shared: tuple, help: dict, argv: list[str] | None = None) -> argparse.Namespace:
    """Settings of one script: config.json, under the files given with -c, under the flags.

    `shared` names the shared keys that the script uses; `help` maps each key of its own section to its text, or to
    (text, choices). A key or a type that config.json does not have is an error.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("-c", "--config", action="append", metavar="FILE")
    defaults = settings(first.parse_known_args(argv)[0].config)

    help = {key: SHARED_HELP[key] for key in shared} | help
    values = {key: defaults[key] for key in shared} | defaults[script]
    parser = argparse.ArgumentParser(
        prog=f"{script}.py",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c", "--config", action="append", metavar="FILE", help="settings laid over config.json, e.g. cpu.json"
    )
    for key, value in values.items():
        text, choices = _text_and_choices(help[key])
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
    for key in values:  # argparse checks flags only, not what came from a file
        _check(key, getattr(config, key), *_text_and_choices(help[key]))
    return config


def settings(files: list[str] | None) -> dict:
    """config.json, under the files given with -c: the settings of all scripts."""
    found = _read_json(HERE / "config.json")
    for path in files or []:
        _lay_over(found, _read_json(path), path)
    return found


def _check(key: str, value, text: str, choices) -> None:
    """Numbers are finite and above 0, or 0 where the help text says what 0 does; a "share" is at most 1."""
    if choices and value not in choices:
        raise Problem(f"{key} is {value!r}, but must be one of {', '.join(choices)}")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if not math.isfinite(number) or number < 0 or (number == 0 and not re.search(r"(^|; |: )0[:, ]", text)):
            raise Problem(f"{key} is {number}, which makes no sense: {text}")
        if text.startswith("share") and number > 1:
            raise Problem(f"{key} is {number}, but a share is at most 1")
        if key == "dropout" and number == 1:
            raise Problem("dropout is 1, which drops everything")


def _text_and_choices(entry):
    return entry if isinstance(entry, tuple) else (entry, None)


def _show(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value) or "none"


def _read_json(path) -> dict:
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise Problem(f"no settings file {path}") from None
    except ValueError as error:
        raise Problem(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise Problem(f"{path} must hold settings in braces")
    return found


def _lay_over(base: dict, top: dict, path, where: str = "") -> None:
    for key, value in top.items():
        if key not in base:
            raise Problem(f"{path} sets {where}{key}, which config.json does not have")
        if isinstance(base[key], dict) and isinstance(value, dict):
            _lay_over(base[key], value, path, f"{where}{key}.")
            continue
        if not _alike(value, base[key]):
            raise Problem(f"{path} sets {where}{key} to {value!r}, but config.json has a {_kind(base[key])} there")
        base[key] = type(base[key])(value)


def _kind(value) -> str:
    return f"list of {_kind(value[0] if value else '')}" if isinstance(value, list) else type(value).__name__


def _alike(value, known) -> bool:
    """Is a value of the kind of one that is known? Whole numbers may stand for others; lists hold what theirs hold."""
    if isinstance(value, list) and isinstance(known, list):
        return all(_alike(each, known[0] if known else "") for each in value)
    return type(value) is type(known) or (isinstance(known, float) and type(value) is int)


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


def keep_memory() -> None:
    """Let the process keep what it frees.

    glibc gives every large block back at once, and fresh pages for each batch cost half of the CPU time of preparing it
    and a fifteenth of that of training on it.
    """
    with contextlib.suppress(AttributeError):  # another C library
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


# Several processes (torchrun) -----------------------------------------------------------------------------------------


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun, join the others and take a device of one's own; else nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # Gloo for the small sums of measurements, which stand on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def parallel(model, device):
    """The model, with gradients averaged over all processes where there are several."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


# Optimizers -----------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, so that every direction of a layer learns at the same rate.

    Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon; here for convolutions, as out x (in * height * width)
    matrices.
    """

    def __init__(self, parameters, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                update = orthogonal((weight.grad + group["momentum"] * state["momentum"]).flatten(1))
                update *= max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"])


def orthogonal(matrix):
    """The nearest matrix with singular values near 1, by four steps of a quintic Newton-Schulz iteration."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(4):
        square = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * square @ square - 4.775 * square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Optimizers:
    """Muon for the convolutions, AdamW for the rest, and their learning rates: up for a fifth of the steps, then
    down to 0 in a straight line."""

    def __init__(self, model, config, steps: int):
        filters = [p for p in model.parameters() if p.ndim == 4 and config.optimizer == "muon"]
        matrices = [p for p in model.parameters() if p.ndim > 1 and not (p.ndim == 4 and filters)]
        vectors = [p for p in model.parameters() if p.ndim == 1]  # biases and norms: decaying them helps nobody
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.parts = [torch.optim.AdamW(groups, config.lr)]
        if filters:
            self.parts.append(Muon(filters, config.muon_lr, weight_decay=config.weight_decay))

        def shape(step):
            return min((step + 1) / (0.2 * steps), (steps - step) / (0.8 * steps))

        self.parts += [torch.optim.lr_scheduler.LambdaLR(part, shape) for part in self.parts]

    def zero_grad(self):
        for part in self.parts[: len(self.parts) // 2]:
            part.zero_grad()

    def step(self):
        for part in self.parts:  # the optimizers, then their schedules
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


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
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def claim(run, name: str) -> object:
    """Lock `name` in the run folder until the returned file is closed or the program ends: two trainings would mix."""
    path = Path(run) / f".{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(f"another program is writing {name} in {run}: wait for it, or give another --run") from None
    for leftover in Path(run).glob(f".{name}.*pt.*"):  # of a save that was killed
        leftover.unlink(missing_ok=True)
    return lock


def save_checkpoint(path, checkpoint: dict) -> None:
    """Write tensors and primitives, whole or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # torch hides "no space left" in its zip writer's RuntimeError
            raise Problem(f"could not write {path}: is the disk full? ({str(error).splitlines()[0]})") from None


def halved(weights: dict) -> dict:
    """Weights to keep or hand out: matrices and filters in half precision, which changes no result that matters."""
    return {name: value.half() if value.is_floating_point() and value.ndim > 1 else value
            for name, value in weights.items()}  # fmt: skip


def find_checkpoint(run, name: str) -> Path:
    """A bare file name lies in the run folder; anything with a slash is a path of its own."""
    return Path(name) if "/" in name else Path(run) / name


def load_checkpoint(path, model: str = "") -> dict:
    """Read a checkpoint, of a certain `model` where one is named, onto the CPU.

    `weights_only` means that no code in the file can run.
    """
    path = Path(path)
    if not path.exists():
        raise Problem(f"no checkpoint {path}: run the script that trains it, or give another --run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, from EOFError to UnpicklingError
        raise Problem(f"{path} is not a checkpoint of ours ({type(error).__name__}): train again") from None
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise Problem(f"{path} holds no model: is it a checkpoint of this project?")
    if model and checkpoint["model"] != model:
        raise Problem(f"{path} holds a {checkpoint['model']}, but a {model} is needed here")
    return checkpoint


def resume(wanted: bool, partial: Path, fresh: dict, parts: dict) -> dict:
    """What training starts with: `fresh`, or what a stopped run left in `partial`, whose `parts` (name to model,
    optimizers, ...) are loaded in place. It must have had the same settings and paintings.

    All draws depend on (seed, epoch) alone, so the weights end as those of an uninterrupted run.
    """
    if not partial.exists():
        if wanted:
            raise Problem(f"nothing to resume: {partial} is not there; a finished training leaves none")
        return fresh
    if not wanted:
        raise Problem(f"{partial} is an unfinished training: go on with --resume, or delete it to train anew")
    state = load_checkpoint(partial)
    check_same(state, fresh, partial)
    for name, part in parts.items():
        part.load_state_dict(state["resume"][name])
    if rank() == 0:
        print(f"resuming after epoch {len(state['history'])}")
    return state


def check_same(state: dict, fresh: dict, path: Path) -> None:
    """Raise a Problem if the settings or the paintings are other than those that `path` was trained with."""
    for key, value in fresh["config"].items():
        old = state.get("config", {}).get(key)
        if old != value:
            raise Problem(f"{path} was trained with {key} = {old}, now it is {value}: "
                          "give the old setting, or delete the file to train anew")  # fmt: skip
    if state.get("fingerprint") != fresh["fingerprint"]:
        raise Problem(f"the paintings have changed since {path} was written: delete it to train anew")


def add_facts(run, name: str, facts: dict, outdated: tuple[str, ...] = (), merge: bool = False) -> None:
    """Put `{name: facts}` into the run's facts.json; two scripts may do so at once. `outdated` entries go.

    `merge` keeps those of the name's facts that are not given.
    """
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".facts.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = run / "facts.json"
        everything = json.loads(path.read_text()) if path.exists() else {}
        facts = everything.get(name, {}) | facts if merge else facts
        everything = {key: value for key, value in everything.items() if key not in outdated} | {name: facts}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(everything, indent=2) + "\n")


def write_text(path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)
