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
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.errors import DataError

# What is taken from strangers: no SVG, and nothing that Pillow hands on to another program (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")


def read_picture(source, size: int, resize: str = "squash", formats=None) -> np.ndarray:
    """Any file that Pillow reads, as uint8 (3, size, size) RGB: see open_rgb.

    The whole picture is squashed into the square, or its centre is cropped out.
    """
    image = open_rgb(source, 3 * size // 2, formats)
    if resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def open_rgb(source, side: int, formats=None) -> Image.Image:
    """A picture file upright and as RGB; JPEGs decode at an eighth to the whole of their size, but above `side`.

    No decoder but those of `formats`, where they are given, sees the file. Raises OSError, ValueError and others for
    what is no picture, and Image.DecompressionBombError for more than 179 million pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # big scans and odd metadata only warn; what can't be read still raises
        with Image.open(source, formats=formats) as image:
            image.draft("RGB", (side, side))
            ImageOps.exif_transpose(image, in_place=True)  # without a copy, which takes a tenth of the time
            return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK and 16-bit pictures as RGB; transparent ones on white; of animations the first frame."""
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel, which convert() would clip at 255
        pixels = np.asarray(image, np.float32)
        tops = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)  # what white may be
        white = next((top for top in tops if pixels.max() <= top), pixels.max())
        return Image.fromarray((255 * pixels / white).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


# The pixel cache ------------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below the style folders of `folder`, by its path `<Style>/<name>`, sorted.

    Hidden files are left out. What cannot be looked at, such as a broken link, has 0 and 0.
    """

    def stop(error):
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")

    files, visited, below = {}, set(), len(os.path.join(folder, ""))
    for directory, names, leaves in os.walk(folder, followlinks=True, onerror=stop):
        place = os.path.realpath(directory)
        names[:] = [name for name in names if not name.startswith(".") and place not in visited]
        if Path(directory) == folder or place in visited:  # a link may lead back up; and files beside the style
            visited.add(place)  # folders (a README, say) are not paintings
            continue
        visited.add(place)
        for leaf in leaves:
            path = os.path.join(directory, leaf)  # a string: a Path of every file would take 25 MB of a full WikiArt
            if not leaf.startswith("."):
                stat = os.stat(path) if os.path.isfile(path) else None
                files[path[below:]] = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
    return dict(sorted(files.items()))


def cache_folder(root: Path) -> Path:
    """`<root>/.cache`, or a folder in the user's own cache where `root` may not be written to."""
    # A folder without any write bit is meant to stay as it is, even for root, whom os.access always lets through.
    if root.stat().st_mode & 0o222 and os.access(root, os.W_OK):
        return root / ".cache"
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "wikiart" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]


def pixel_cache(folder: Path, where: Path, size: int, resize: str, processes: int = 0) -> tuple[np.ndarray, dict]:
    """Decode every file below `folder` once; from then on map the pixels from disk.

    Returns the pixels, uint8 (N, 3, size, size), and an index: `files` (N paths), `hashes` (of each one's pixels),
    `broken` (path to reason) and `fingerprint`. The cache is named after the files' names, sizes and times of change,
    so that a changed folder gets a new one. It is built in a temporary folder under a lock, then renamed: a second
    program waits and finds it whole, and what a killed build left behind goes. Raises DataError where it cannot be
    written.
    """
    files = list_files(folder)
    key = hashlib.sha256(b"decoded at 1.5 times the size")  # to be changed with read_picture
    for path, stat in files.items():
        key.update(os.fsencode(path) + f"\0{stat}\n".encode())
    prefix = f"{folder.name}-{resize}-{size}-"
    ready = where / (prefix + key.hexdigest()[:16])
    try:
        where.mkdir(parents=True, exist_ok=True)
        with open(where / "lock", "w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked children would go on holding
            except BlockingIOError:
                print(f"waiting for another program that decodes into {where}", file=sys.stderr)
                fcntl.lockf(lock, fcntl.LOCK_EX)
            if not ready.exists():
                for stale in where.glob(f"*{glob.escape(prefix)}*"):
                    shutil.rmtree(stale, ignore_errors=True)
                building = where / f"building-{prefix}"
                building.mkdir()
                try:
                    build_cache(folder, list(files), building, size, resize, processes)
                    building.rename(ready)
                finally:
                    shutil.rmtree(building, ignore_errors=True)
            index = json.loads((ready / "index.json").read_text()) | {"fingerprint": ready.name}
            pixels = np.empty((0, 3, size, size), np.uint8)
            if files:
                pixels = np.memmap(ready / "pixels.uint8", np.uint8, "r", shape=(len(files), 3, size, size))
    except OSError as error:
        raise DataError(f"could not write the pixel cache in {where}: {error.strerror or error}") from None
    if index["broken"]:
        names = ready / "left_out.txt"
        print(f"{len(index['broken'])} of {len(files)} files in {folder} are left out: see {names}", file=sys.stderr)
    return pixels, index


def build_cache(folder: Path, files: list[str], target: Path, size: int, resize: str, processes: int) -> None:
    """Decode `files`, in several processes, into target/pixels.uint8, and write index.json and left_out.txt there."""
    hashes, broken = [], {}
    with decoding(Decoder(folder, files, size, resize), 32, processes) as batches:
        decoded = tqdm(itertools.chain.from_iterable(batches), f"decoding {folder.name}", len(files))
        with open(target / "pixels.uint8", "wb") as file:
            for path, (picture, reason) in zip(files, decoded, strict=True):
                if reason:
                    broken[path] = reason
                pixels = np.zeros((3, size, size), np.uint8) if reason else picture
                hashes.append("" if reason else hashlib.sha256(pixels).hexdigest()[:16])
                file.write(pixels)
    names = "".join(f"{path}\t{reason}\n" for path, reason in broken.items())
    (target / "left_out.txt").write_text(names, errors="surrogateescape")  # names need not be UTF-8
    (target / "index.json").write_text(json.dumps({"files": files, "hashes": hashes, "broken": broken}))


@contextlib.contextmanager
def decoding(pictures: Dataset, batch_size: int, processes: int, collate=list):
    """Batches of what a data set reads from files, in processes of their own; DataError where one of them dies."""
    loader = DataLoader(
        pictures,
        batch_size=batch_size,
        num_workers=processes or len(os.sched_getaffinity(0)),
        collate_fn=collate,  # lists of arrays come through a pipe; tensors would need a large /dev/shm
        multiprocessing_context="fork",  # children that start at once: all they need is Pillow and numpy
        worker_init_fn=partial(end_with, os.getpid()),
    )
    try:
        yield iter(loader)
    except RuntimeError as error:  # raised wherever the program is when a child is killed, for its memory most likely
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(f"a decoding process died, try --processes 1 ({str(error).splitlines()[0]})") from None


def end_with(parent: int, _) -> None:
    """In a decoding process: stop when the program that started it is gone, and leave Ctrl-C and SIGTERM to that."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


class Decoder(Dataset):
    """The files as (pixels, None), or (None, the reason) where a file cannot be read."""

    def __init__(self, folder: Path, files: list[str], size: int, resize: str):
        self.folder, self.files, self.size, self.resize = folder, files, size, resize

    def __len__(self):
        return len(self.files)

    def __getitem__(self, row):
        try:
            if not (self.folder / self.files[row]).is_file():
                raise FileNotFoundError("no regular file")  # a broken link, or a pipe that would never end
            picture = read_picture(self.folder / self.files[row], self.size, self.resize)
            return np.ascontiguousarray(picture), None
        except Exception as error:  # Pillow's readers raise almost anything on damaged files
            return None, f"{type(error).__name__}: {error}".replace("\n", " ")
