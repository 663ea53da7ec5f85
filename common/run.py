"""How a script runs, whatever it computes: devices, processes, checkpoints, resuming, facts.

Every script opens and closes with the same lines:

    config = configure("train", __doc__, SETTINGS, shared, argv)    # common/config.py
    device = pick_device(config.device)
    ...
    run_script(main)    # one line instead of a traceback for what the user can fix
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import math
import os
import pickletools
import re
import signal
import sys
import time
import zipfile
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.config import FREE_SETTINGS
from common.errors import UserError
from common.files import atomic_write, write_text
from common.names import count, printable

# Types of a checkpoint's entries, where it has them.
ENTRIES = {"model": str, "arguments": dict, "classes": list, "data": dict, "crop": int, "tta_scales": list}
ENTRIES |= {"temperature": float, "artists": list, "largest_class": int, "fingerprint": str}
ENTRIES |= {"config": dict, "history": list, "resume": dict}
SAFE_GLOBALS = r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"
LARGEST_SIDE = 4096  # pixels of a network's input
SMALLEST_SCALE, LARGEST_SCALE = 0.25, 8  # of test-time views
MIN_STEPS = 4  # of an epoch
LOG_STEPS = 20  # between two looks at the losses, for which the host has to wait for the device


def run_script(main) -> None:
    """Run `main`; wrong input, a full disk or Ctrl-C end it with one line and a non-zero status."""
    script = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's "stop" is handled like Ctrl-C
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid UTF-8
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{script}: {printable(str(error))}")
    except torch.OutOfMemoryError:
        sys.exit(f"{script}: out of memory on the device: lower --batch-size")
    except KeyboardInterrupt as interrupt:
        print(f"{script}: stopped. {interrupt}".rstrip(), file=sys.stderr)
        sys.exit(130)


# Devices --------------------------------------------------------------------------------------------------------------


def find_device(name: str = "auto") -> torch.device:
    """`auto` is the accelerator that torch finds (CUDA, ROCm, MPS, XPU), else the CPU. Raises UserError."""
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"the device {name!r} is not available: {str(error).splitlines()[0]}") from None
        return torch.device(name)
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def pick_device(name: str = "auto") -> torch.device:
    """The device of a script, see find_device(), after setting up the process for it.

    For scripts only: a program that imports this project keeps its own threads and precision.
    """
    device = find_device(name)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves float32, in Muon for example
    if device.type == "cpu":
        use_free_cores()
    return device


@cache
def use_free_cores() -> None:
    """Compute with as many threads as cores are free, and say so where that is fewer; OMP_NUM_THREADS comes first.

    Threads wait for each other after every layer: one that shares its core with another program holds up all of them,
    which spin meanwhile.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    free, threads = free_cores(), torch.get_num_threads()
    if free < threads:
        torch.set_num_threads(free)
        print(f"{count(free, 'thread')} instead of {threads}: other programs use the cores (OMP_NUM_THREADS sets it)")


def free_cores(stat="/proc/stat", quota="/sys/fs/cgroup/cpu.max", seconds: float = 0.25) -> int:
    """Cores, 1 at least, that this process may use and that are idle for the next moment.

    stat, quota: files of Linux with the time that each core was idle, and with a container's share of the cores; where
    there are none, all cores count as free.
    """
    allowed = os.sched_getaffinity(0)
    free = float(len(allowed))
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        limit, period = Path(quota).read_text().split()
        free = free if limit == "max" else min(free, int(limit) / int(period))
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        before = idle_and_total(stat, allowed)
        time.sleep(seconds)
        idle = [(i - i0) / (t - t0) for (i, t), (i0, t0) in zip(idle_and_total(stat, allowed), before, strict=True)]
        free = min(free, sum(idle))
    return max(1, round(free))


def idle_and_total(stat, cores: set[int]) -> list[tuple[int, int]]:
    """For each core, how long it has been idle, and since it was started, in clock ticks."""
    lines = [line.split() for line in Path(stat).read_text().splitlines() if re.match(r"cpu\d", line)]
    ticks = [list(map(int, line[1:9])) for line in lines if int(line[0][3:]) in cores]
    return [(sum(each[3:5]), sum(each)) for each in ticks]


def autocast(device: torch.device, cpu: bool = False):
    """bf16 where the hardware supports it; emulated on a CPU it was measured five times slower than float32.

    With `cpu`, on CPUs with AVX-512 BF16 too, where convolutions of 64 channels are three times as fast.
    """
    if device.type == "cpu":
        fast = cpu and torch.cpu._is_avx512_bf16_supported()
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16) if fast else contextlib.nullcontext()


def full_precision(device: torch.device):
    """Within autocast(), no bf16; on a device without autocast, such as "meta", nothing."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device. A GPU copies it from pinned memory, and the host goes on without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    # To "mps" the copy may start after the tensor is gone, and to the CPU it may be read before the copy has ended.
    return tensor.to(device, non_blocking=device.type not in ("mps", "cpu"))


def reuse_freed_memory() -> None:
    """Tell glibc to keep freed memory: new pages for every batch took 7 % of the CPU time of training."""
    with contextlib.suppress(AttributeError):  # another C library
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


# Several processes (torchrun) -----------------------------------------------------------------------------------------


def join_processes(device: torch.device) -> torch.device:
    """Under torchrun, join the process group and pick a GPU for this process; otherwise do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # Gloo for the sums of measurements, which are on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_share() -> slice:
    """Which items of a batch this process computes: every world_size-th, from its rank on."""
    return slice(rank(), None, world_size())


def fit_batch_size(config, images: int, validation) -> None:
    """Lower config.batch_size where an epoch of so many images would have fewer than MIN_STEPS steps, and say so.

    Raises UserError where no painting is left for validation, or processes cannot have equal shares of a batch.
    """
    if not len(validation):
        raise UserError("too few paintings: none is left for validation; add paintings, or raise --validation")
    if config.batch_size > images // MIN_STEPS:
        wanted, power = config.batch_size, 2 ** int(math.log2(max(2, images // MIN_STEPS)))
        config.batch_size = min(wanted, max(power - power % world_size(), world_size()))
        if rank() == 0 and config.batch_size < wanted:
            batches = f"batches of {config.batch_size} instead of {wanted}"
            print(f"an epoch has {images} images, so {batches}; for validation: {count(len(validation), 'painting')}")
    if config.batch_size % world_size():
        raise UserError(f"--batch-size must be a multiple of the {world_size()} processes")


def data_parallel(model, compile: bool = False):
    """The model, compiled if asked, with gradients averaged over all processes where there are several."""
    if compile:
        model.compile()  # in place, so that weights keep their names
    return DistributedDataParallel(model) if dist.is_initialized() else model


def average_gradients(model) -> None:
    """Average gradients over all processes; for networks that train against each other, which DDP's hooks would mix."""
    if dist.is_initialized():
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


# One program at a time ------------------------------------------------------------------------------------------------


def claim(run, name: str, flag: str = "--run"):
    """Lock `name` in the run folder until the returned file is closed or the program ends.

    Raises UserError where another program holds the lock.
    """
    path = Path(run) / f".{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another program is writing {name} in {run}: wait for it, or give another {flag}") from None
    return lock


# Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoint_path(run, name: str) -> Path:
    """Where a checkpoint lies: `a/b.pt` is a path, `b.pt` a file of the run folder, `b` means b/classifier.pt there."""
    if "/" in name:
        return Path(name)
    return Path(run) / (name if name.endswith(".pt") else f"{name}/classifier.pt")


def save_checkpoint(path, checkpoint: dict) -> None:
    """Write tensors and primitives, completely or not at all."""
    with atomic_write(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # torch's zip writer hides "no space left" in a RuntimeError
            raise UserError(f"could not write {path}: is the disk full? ({str(error).splitlines()[0]})") from None


def load_checkpoint(path, model: str = "") -> dict:
    """Read a checkpoint onto the CPU; of a certain `model`, if given. Raises UserError.

    `weights_only` ensures that no code in the file can run.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint {path}: run the script that trains it, or give another --run")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file: give a checkpoint of this project")
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, from EOFError to UnpicklingError
        raise UserError(f"{path} is not a checkpoint of this project ({type(error).__name__}): train again") from None
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise UserError(f"{path} holds no model: is it a checkpoint of this project?")
    if model and checkpoint["model"] != model:
        raise UserError(f"{path} holds a {checkpoint['model']}, but a {model} is needed here")
    check_entries(checkpoint, path)
    if isinstance(checkpoint.get("weights"), dict):
        check_weights(checkpoint["weights"].values(), path)
    return checkpoint


def check_archive(path: Path) -> None:
    """Raise ValueError for a file that unpacks to more than its own size, or that needs more than tensors.

    torch.load() with weights_only runs no code, but would still make a bytearray of any length that the file gives.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it unpacks to more than its size")
        for entry in entries:
            if entry.filename.lower().endswith("data.pkl"):
                needed = {name for code, name, _ in pickletools.genops(archive.read(entry)) if "GLOBAL" in code.name}
                if not all(re.fullmatch(SAFE_GLOBALS, str(name)) for name in needed):
                    raise ValueError("it holds more than tensors and primitives")


def check_entries(checkpoint: dict, path, required: tuple[str, ...] = ()) -> None:
    """Raise UserError where an entry of a checkpoint has another type than in those of this project, or is missing."""
    for key in required:
        if key not in checkpoint:
            raise UserError(f"{path} has no {key}: train again")
    for key in ENTRIES.keys() & checkpoint.keys():
        if not isinstance(checkpoint[key], ENTRIES[key]):
            raise UserError(f"{path} is damaged: its {key} is not of type {ENTRIES[key].__name__}: train again")
    classes = checkpoint.get("classes", [])
    if len(set(map(str, classes))) < len(classes) or not all(name and printable(str(name)) == name for name in classes):
        raise UserError(f"{path} is damaged: its classes are not different printable names: train again")
    sides = [checkpoint.get("crop", 1), checkpoint.get("data", {}).get("size", 1)]
    if not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in sides):
        raise UserError(f"{path} is damaged: its crop and size must be 1 to {LARGEST_SIDE} pixels: train again")
    if checkpoint.get("data", {}).get("resize", "squash") not in ("squash", "crop"):
        raise UserError(f"{path} is damaged: its resize must be squash or crop: train again")
    scales = checkpoint.get("tta_scales", [1.0])
    sane = [isinstance(scale, float | int) and SMALLEST_SCALE <= scale <= LARGEST_SCALE for scale in scales]
    if not sane or not all(sane):
        message = f"its tta_scales must be numbers from {SMALLEST_SCALE} to {LARGEST_SCALE}"
        raise UserError(f"{path} is damaged: {message}: train again")


def check_weights(weights, path) -> None:
    """Raise UserError where weights are not tensors, would need more memory than the file has, or are not finite."""
    problem = ""
    if not all(map(torch.is_tensor, weights)):
        problem = "are not tensors"
    elif sum(value.nbytes for value in weights) > path.stat().st_size:
        problem = "share memory"
    elif not all(torch.isfinite(value).all() for value in weights):
        problem = "are not finite"
    if problem:
        raise UserError(f"{path} is damaged: its weights {problem}: train again")


def file_hash(path) -> str:
    """SHA-256 of a file, as hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def half_precision(weights: dict) -> dict:
    """A state dict with its matrices and filters in float16, to save and publish."""
    return {
        name: value.half() if value.is_floating_point() and value.ndim > 1 else value for name, value in weights.items()
    }


# Trainings that can be resumed ----------------------------------------------------------------------------------------


def fixed_settings(config) -> dict:
    """The settings that a resumed training must have had from the start."""
    return {key: value for key, value in vars(config).items() if key not in FREE_SETTINGS}


def resume(config, stem: str, state: dict, parts: dict) -> dict:
    """The state of an unfinished training in the run folder, <stem>.partial.pt, or the new `state` where there is none.

    `parts` ({name: model, optimizers, ...}) are loaded in place. Random numbers depend on (seed, epoch) alone, so the
    result is that of an uninterrupted training. --restart discards the unfinished training. Raises UserError if it had
    other settings or paintings.
    """
    partial = Path(config.run) / f"{stem}.partial.pt"
    if config.tensorboard and rank() == 0:
        tensorboard_writer(Path(config.run) / "tensorboard" / stem)  # now: it may not be installed
    if config.restart and rank() == 0:
        partial.unlink(missing_ok=True)
    if config.restart or not partial.exists():
        return state
    saved = load_checkpoint(partial)
    if "resume" not in saved:
        raise UserError(f"{partial} is not an unfinished training: remove it, or start anew with --restart")
    check_same_run(saved, state, partial)
    try:
        for name, part in parts.items():
            part.load_state_dict(saved["resume"][name])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"{partial} does not fit this training ({reason}): start anew with --restart") from None
    if rank() == 0:
        write_log(config.run, stem, saved["history"])  # it lacks an epoch if a kill came between the two files
        print(f"resuming after epoch {len(saved['history'])} ({partial})")
    return saved


def check_same_run(saved: dict, state: dict, path: Path) -> None:
    """Raise UserError if a file was written with other settings or paintings than those of `state`."""
    for key, value in state["config"].items():
        old = saved.get("config", {}).get(key)
        if old != value:
            raise UserError(
                f"{path} is an unfinished training with {key} = {old}, now it is {value}: "
                "give the old setting, or --restart"
            )
    if saved.get("fingerprint") != state["fingerprint"]:
        raise UserError(f"{path} is an unfinished training on other paintings: start anew with --restart")


@contextlib.contextmanager
def interruptible(state: dict):
    """Ctrl-C in this block says how many epochs are kept, and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        epochs = len(state["history"])
        advice = f"{count(epochs, 'finished epoch')} kept: run the same command again to resume"
        raise KeyboardInterrupt((advice if epochs else "no epoch was finished") if rank() == 0 else "") from None


class Timer:
    """Time since construction, as facts: {"seconds": wall time, "cpu_seconds": CPU time of this process}."""

    def __init__(self):
        self.start = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.start[0], "cpu_seconds": time.process_time() - self.start[1]}


def save_epoch(config, stem: str, state: dict, record: dict, parts: dict, scores: str) -> None:
    """Append an epoch's record to the history, and write <stem>.partial.pt and <stem>.jsonl; print a line.

    scores: the loss and how the network does on validation paintings, in words.
    """
    record, run, epochs = rounded(record), config.run, config.epochs
    seconds = [earlier["seconds"] for earlier in (*state["history"], record)][-5:]
    left = (epochs - record["epoch"]) * sum(seconds) / len(seconds)
    print(f"epoch {record['epoch']}/{epochs}: {scores}, {duration(left)} left", flush=True)
    state["resume"] = {name: part.state_dict() for name, part in parts.items()}
    save_checkpoint(Path(run) / f"{stem}.partial.pt", state | {"history": [*state["history"], record]})
    state["history"].append(record)  # after saving, so that interruptible() counts saved epochs only
    write_log(run, stem, state["history"])
    if config.tensorboard:
        writer = tensorboard_writer(Path(run) / "tensorboard" / stem)
        for name, value in record.items():
            writer.add_scalar(name, value, record["epoch"])
        writer.flush()


@cache
def tensorboard_writer(folder: Path):
    """TensorBoard's writer of a folder. Raises UserError where TensorBoard, an extra, is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install -r requirements/tensorboard.txt") from None
    return SummaryWriter(folder)


def duration(seconds: float) -> str:
    """ "40 s", "12 min" or "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def write_log(run, stem: str, history: list[dict]) -> None:
    write_text(Path(run) / f"{stem}.jsonl", "".join(json.dumps(record) + "\n" for record in history))


def finish(run, stem: str, state: dict) -> Path:
    """Write the finished <stem>.pt, its weights in half precision, in place of the partial checkpoint."""
    path = Path(run) / f"{stem}.pt"
    finished = {key: value for key, value in state.items() if key != "resume"}
    save_checkpoint(path, finished | {"weights": half_precision(finished["weights"])})
    (Path(run) / f"{stem}.partial.pt").unlink(missing_ok=True)  # last, so that a full disk loses nothing
    return path


class Steps:
    """The steps of an epoch, with a progress bar: yields its batches, and records the loss of each.

    A GPU works on what the host has queued, and reading a number from it waits until the queue is empty. So losses stay
    on the device for LOG_STEPS steps; then all are read at once, and the bar shows the last one. Raises UserError with
    the step and the `advice` where one was not finite. By default it is to try again, in case it was the hardware, and
    then to lower the learning rate.
    """

    ADVICE = "the same command resumes after the last finished epoch; if it happens again, lower --lr and add --restart"

    def __init__(self, batches, count: int, epoch: int, epochs: int, advice: str = ADVICE):
        self.batches, self.count, self.epoch, self.epochs, self.advice = batches, count, epoch, epochs, advice
        self.step, self.losses = 0, []

    def __iter__(self):
        title = f"epoch {self.epoch}/{self.epochs}"
        with tqdm(self.batches, title, self.count, leave=False, disable=rank() > 0) as bar:
            for self.step, batch in enumerate(bar, 1):
                yield batch
                if self.step % LOG_STEPS == 0 or self.step == self.count:
                    bar.set_postfix(loss=f"{self.read_losses():.3g}", refresh=False)

    def record(self, loss: torch.Tensor) -> None:
        """Note a loss of the present step, a scalar on any device."""
        self.losses.append((self.step, loss.detach()))

    def read_losses(self) -> float:
        """The last loss noted, after checking all since the last call."""
        steps, losses = zip(*self.losses, strict=True)
        self.losses = []
        for step, loss in zip(steps, torch.stack(losses).tolist(), strict=True):
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step} of epoch {self.epoch}: {self.advice}")
        return loss


# Facts ----------------------------------------------------------------------------------------------------------------


def rounded(facts):
    """Facts with floats at five decimals or five significant digits, whichever is finer, and without NumPy's types."""
    if isinstance(facts, dict):
        return {key: rounded(value) for key, value in facts.items()}
    if isinstance(facts, (list, tuple)):
        return [rounded(value) for value in facts]
    facts = facts.item() if hasattr(facts, "item") else facts
    if not isinstance(facts, float) or not math.isfinite(facts) or facts == 0:
        return facts
    return round(facts, max(5, 4 - math.floor(math.log10(abs(facts)))))


def read_facts(run) -> dict:
    """The run folder's facts.json; empty where there is none. Raises UserError."""
    path = Path(run) / "facts.json"
    try:
        facts = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: repair or remove it ({error})") from None
    if not (isinstance(facts, dict) and all(isinstance(entry, dict) for entry in facts.values())):
        raise UserError(f"{path} must hold an object of objects: repair or remove it")
    return facts


def add_facts(run, name: str, facts: dict, outdated: tuple[str, ...] = (), merge: bool = False) -> None:
    """Put `{name: facts}`, rounded, into the run's facts.json; two scripts may do so at once.

    `outdated` entries are removed. With `merge`, the name's other facts are kept.
    """
    change_facts(run, name, lambda earlier: (earlier if merge else {}) | facts, outdated)


def change_facts(run, name: str, change, outdated: tuple[str, ...] = ()) -> None:
    """Replace the facts of `name` by change(earlier facts), so that no other script can write between the two."""
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".facts.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        all_facts = {key: value for key, value in read_facts(run).items() if key not in outdated}
        facts = rounded(change(all_facts.get(name, {})))
        write_text(run / "facts.json", json.dumps(all_facts | {name: facts}, indent=2) + "\n")
