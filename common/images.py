"""Image files: decoding, and a cache of pixels.

Every file is decoded once, into a cache that is then mapped from disk:

    pixels, index = pixel_cache(Path("/scratch/wikiart/train"), Path("/scratch/wikiart/.cache"), 128, "squash")
    pixels[0], index["files"][0]   # uint8 (3, 128, 128), 'Baroque/rembrandt_self-portrait.jpg'
"""

import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.errors import DataError
from common.names import count, printable

# Formats accepted from uploads: no SVG, and nothing for which Pillow starts another program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
EVIDENCE_COLOUR = "#E69F00"
# Part of the name of every cache. To be changed when read_image returns other pixels, so that they are decoded again.
CACHE_VERSION = b"decoded at 1.5 times the size"


def cannot_read(error: OSError):
    """Of os.walk(), which would pass over a folder that it cannot read."""
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")


def files_below(folder: Path) -> list[str]:
    """Sorted paths, relative to the folder, of all files below it; hidden files and folders are left out.

    Links to folders are not followed. Raises DataError for a folder that cannot be read.
    """
    files = []
    for directory, subfolders, names in os.walk(folder, onerror=cannot_read):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = (os.path.join(directory, name) for name in names if not name.startswith("."))
        files += [os.path.relpath(path, folder) for path in paths]
    return sorted(files)


def open_file(path):
    """A regular file, open for reading. Raises OSError for a pipe or a device, which may have no end."""
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


@contextlib.contextmanager
def named_errors(path):
    """Raise DataError, with the file's name, where a picture that could be read before no longer can."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        message = f"{path} could be read before, and now cannot: run the command again ({reason_of(error)})"
        raise DataError(message) from None


def reason_of(error: Exception) -> str:
    """Why a file could not be read as an image, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    if getattr(error, "errno", None) is None and "truncated" in str(error).lower():
        return "incomplete: the file ends too early"
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def read_image(source, size: int, resize: str = "squash", formats=None) -> np.ndarray:
    """An image file as uint8 (3, size, size), RGB: squashed into the square, or its centre cropped. See open_rgb."""
    image = open_rgb(source, 3 * size // 2, formats)
    if resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def open_rgb(source, side: int, formats=None) -> Image.Image:
    """An image file, upright and in RGB; JPEGs are decoded at a fraction of their size that is still above `side`.

    `formats`: the decoders that may be used, all by default. Raises OSError, ValueError and others for what is not an
    image, and Image.DecompressionBombError for more than 179 million pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large scans and odd metadata only warn; unreadable files still raise
        file = contextlib.nullcontext(source) if hasattr(source, "read") else open_file(source)
        with file as content, Image.open(content, formats=formats) as image:
            image.draft("RGB", (side, side))
            ImageOps.exif_transpose(image, in_place=True)  # a copy would add a tenth to the time
            return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and 16-bit images in RGB; transparent ones on white; of animations the first frame."""
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel, which convert() would clip at 255
        pixels = np.asarray(image, np.float32)
        whites = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
        white = next((value for value in whites if pixels.max() <= value), pixels.max())
        return Image.fromarray((255 * pixels / white).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def highlight(image: Image.Image, evidence: np.ndarray) -> Image.Image:
    """The picture in light grey, tinted orange where the evidence (h, w) is positive."""
    share = Image.fromarray((200 * (evidence.clip(0) / max(evidence.max(), 1e-9)) ** 0.5).astype(np.uint8))
    share = share.resize(image.size, Image.Resampling.BICUBIC)
    grey = image.convert("L").point(lambda level: 90 + level * 165 // 255).convert("RGB")  # on black no tint is seen
    return Image.composite(Image.new("RGB", image.size, EVIDENCE_COLOUR), grey, share)


# The pixel cache ------------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file in the style folders of `folder`, by its path `<Style>/<name>`, sorted.

    Hidden files are left out. A broken link has size and time 0. Raises DataError for unreadable folders.
    """
    files, visited, prefix = {}, {os.path.realpath(folder)}, len(os.path.join(folder, ""))
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=cannot_read):
        targets = {name: os.path.realpath(os.path.join(directory, name)) for name in sorted(subfolders)}
        subfolders.clear()
        for name, target in targets.items():
            if not name.startswith(".") and target not in visited:  # links may lead back up, or to another style
                visited.add(target)
                subfolders.append(name)
        if Path(directory) == folder:  # files beside the style folders, a README for example, are not paintings
            continue
        for name in names:
            path = os.path.join(directory, name)  # a string: Paths of all files would take 25 MB for full WikiArt
            if not name.startswith("."):
                files[path[prefix:]] = size_and_time(path)
    return dict(sorted(files.items()))


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes, and nanoseconds of the last change, of a regular file; 0 for others, and for one that has just gone."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, 0)


def cache_folder(root: Path) -> Path:
    """`<root>/.cache`, or a folder in the user's cache where `root` is read-only."""
    # A folder without any write bit is meant to stay unchanged, even for root, for whom os.access is always true.
    if root.stat().st_mode & 0o222 and os.access(root, os.W_OK):
        return root / ".cache"
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "wikiart" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]


def pixel_cache(folder: Path, caches: Path, size: int, resize: str, processes: int = 0) -> tuple[np.ndarray, dict]:
    """Decode every file of `folder` once into a cache below `caches`; later calls map the pixels from disk.

    Returns the pixels, uint8 (N, 3, size, size), and an index: `files` (N paths), `hashes` (of each file's pixels),
    `broken` (path to reason) and `fingerprint`. The cache is named after the files' names, sizes and modification
    times, so that a changed folder gets a new one. It is built in a temporary folder under a lock, then renamed: a
    second program waits for it, and what a killed build leaves is removed by the next. Raises DataError where it cannot
    be written.

    Scripts that run with one size share one cache. Sizes do not: 224 pixels reduced from 256 differ from decoded ones
    (by 1.6 of 255 on average, which moved predictions by 0.02), so results would depend on which caches are there.
    """
    files = list_files(folder)
    key = hashlib.sha256(CACHE_VERSION)
    for path, status in files.items():
        key.update(os.fsencode(path) + f"\0{status}\n".encode())
    prefix = f"{folder.name[:40]}-{resize}-{size}-"  # a folder's name may be as long as a file's
    cache = caches / (prefix + key.hexdigest()[:16])
    try:
        with lock_caches(caches):
            if not (cache / "index.json").exists() or readable_again(folder, cache, size, resize):
                for start in (prefix, f"building-{prefix}"):
                    for stale in caches.glob(f"{glob.escape(start)}*"):
                        remove(stale)
                needed = len(files) * 3 * size * size
                decoding = f"decoding {count(len(files), 'file')} of {folder} once"
                print(f"{decoding}, into {caches}: {file_size(needed)} (make clean-cache removes it)", flush=True)
                temporary = caches / f"building-{prefix}"
                temporary.mkdir()
                try:
                    build_cache(folder, list(files), temporary, size, resize, processes)
                    temporary.rename(cache)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
            index = json.loads((cache / "index.json").read_text()) | {"fingerprint": cache.name}
            pixels = np.empty((0, 3, size, size), np.uint8)
            if files:
                pixels = np.memmap(cache / "pixels.uint8", np.uint8, "r", shape=(len(files), 3, size, size))
    except OSError as error:
        raise DataError(f"could not write the pixel cache in {caches}: {error.strerror or error}") from None
    except ValueError as error:  # of json and NumPy
        raise DataError(f"the pixel cache {cache} is damaged: remove that folder ({error})") from None
    if index["broken"]:
        names = cache / "left_out.txt"
        counts = f"{len(index['broken'])} of {count(len(files), 'file')}"
        print(f"{counts} in {folder} left out: see {names}", file=sys.stderr)
    return pixels, index


def readable_again(folder: Path, cache: Path, size: int, resize: str) -> bool:
    """Whether the system could not read a file when the cache was built, for lack of permission perhaps, and now can.

    Permission is no part of a cache's name.
    """
    broken = json.loads((cache / "index.json").read_text())["broken"]
    refused = [path for path, reason in broken.items() if "[Errno " in reason]
    decoder = Decoder(folder, refused, size, resize)
    return any(decoder[row][1] is None for row in range(len(refused)))


def remove(cache: Path) -> None:
    """Delete a cache, first its index: without, what a kill leaves of it counts as none."""
    (cache / "index.json").unlink(missing_ok=True)
    shutil.rmtree(cache)


def remove_cache(root: str) -> None:
    """Delete the decoded pixels of a root, and nothing else in that folder: for `make clean-cache`."""
    caches = cache_folder(Path(root)) if Path(root).is_dir() else Path(root)
    files = [*caches.glob("*-*-*/pixels.uint8")]
    size = sum(path.stat().st_size for path in files)
    for path in files:
        remove(path.parent)
    print(f"removed from {caches}: {count(len(files), 'cache')}, {file_size(size)}")


def file_size(size: float) -> str:
    """Bytes in words: "4.6 GB", "120 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{-(-size // 1e6):.0f} MB"


@contextlib.contextmanager
def lock_caches(caches: Path):
    """Wait until no other program builds a cache in this folder."""
    caches.mkdir(parents=True, exist_ok=True)
    with open(caches / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked children would keep
        except BlockingIOError:
            print(f"waiting for another program that decodes into {caches}", file=sys.stderr)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def build_cache(folder: Path, files: list[str], target: Path, size: int, resize: str, processes: int) -> None:
    """Decode `files` in several processes into target/pixels.uint8; write index.json and left_out.txt beside it."""
    hashes, broken = [], {}
    with (
        open(target / "pixels.uint8", "wb") as file,
        decode_in_processes(Decoder(folder, files, size, resize), 32, processes) as batches,
        tqdm(itertools.chain.from_iterable(batches), f"decoding {folder.name}", len(files)) as decoded,
    ):
        for path, (pixels, reason) in zip(files, decoded, strict=True):
            if reason:
                broken[path] = reason
                pixels = np.zeros((3, size, size), np.uint8)
            hashes.append("" if reason else hashlib.sha256(pixels).hexdigest()[:16])
            file.write(pixels)
    left_out = "".join(f"{printable(path)}\t{printable(reason)}\n" for path, reason in broken.items())
    (target / "left_out.txt").write_text(left_out)
    (target / "index.json").write_text(json.dumps({"files": files, "hashes": hashes, "broken": broken}))


@contextlib.contextmanager
def decode_in_processes(dataset: Dataset, batch_size: int, processes: int, collate=list):
    """Iterate over the batches of a data set that reads files, in worker processes.

    Raises DataError where a worker dies.
    """
    batches = max(1, -(-len(dataset) // batch_size))
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=min(processes or len(os.sched_getaffinity(0)), batches),
        collate_fn=collate,  # lists of arrays travel through a pipe; tensors would need a large /dev/shm
        multiprocessing_context=WorkerContext(),
        worker_init_fn=partial(begin_decoding, os.getpid()),
    )
    iterator = iter(loader)
    try:
        yield iterator
    except DataError as error:  # of a worker, with its traceback
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None
    except (RuntimeError, EOFError, ConnectionError) as error:  # the last two come from the pipe of a killed worker
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, RuntimeError) and not reason.startswith("DataLoader worker (pid"):
            raise
        raise DataError(f"a decoding process died, perhaps for lack of memory: try --processes 1 ({reason})") from None
    finally:
        iterator._shutdown_workers()  # now: it would wait for the last reference, which may be in a traceback


class Worker(multiprocessing.context.ForkProcess):
    """A process that starts at once, because it needs Pillow and NumPy only."""

    def terminate(self):  # what the loader does with a worker that does not end, for which SIGTERM is not enough
        self.kill()


class WorkerContext(multiprocessing.context.ForkContext):
    Process = Worker


def end_with(parent: int) -> None:
    """In a worker: exit when the parent process is gone."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def begin_decoding(parent: int, _) -> None:
    """In a worker: leave Ctrl-C and SIGTERM to the parent process."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with(parent)


class Decoder(Dataset):
    """Image files as (pixels uint8 (3, size, size), None), or (None, reason) where a file cannot be read."""

    def __init__(self, folder: Path, files: list[str], size: int, resize: str):
        self.folder, self.files, self.size, self.resize = folder, files, size, resize

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        try:
            return np.ascontiguousarray(read_image(self.folder / self.files[row], self.size, self.resize)), None
        except Exception as error:  # Pillow's decoders raise almost anything on damaged files
            return None, reason_of(error)
