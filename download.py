"""Download WikiArt, or another data set with the same columns, from the Hugging Face hub.

    pip install -r requirements/download.txt
    python download.py --data /scratch/wikiart --size 512
    python download.py --data data/small --per-style 200 --size 256
    python download.py --data data/mine --source folder/of/parquet

Writes train/<Style>/<artist>_<row>.jpg, test/..., metadata.csv, and download.json with the progress: after Ctrl-C, a
lost connection or a power cut the same command continues. Reading all of WikiArt transfers about 30 GB.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import warnings
from collections import Counter
from pathlib import Path

import common.packages  # noqa: F401

from PIL import Image, ImageOps
from tqdm import tqdm

from common.config import Setting, configure
from common.errors import UserError
from common.images import as_rgb
from common.names import cell_text, count, safe_cell
from common.run import atomic_write, run_script, write_text

SHARED = ("data", "seed")
SETTINGS = {
    "source": Setting(str, None, "data set on the hub, or folder of Parquet files: image, style, artist and genre"),
    "per_style": Setting(int, "[0, inf)", "paintings to keep of each style, the first ones; 0: all"),
    "size": Setting(int, "[0, inf)", "length to which the shorter side is reduced, in pixels; 0: keep the files"),
}
COLUMNS = ("path", "split", "style", "artist", "genre", "title", "year", "hash")
TEST_SHARE = 0.2  # of each style's paintings
SAVE_EVERY = 100  # rows


def main(argv=None):
    config = configure("download", __doc__, SETTINGS, SHARED, argv)
    data, settings = Path(config.data), {key: getattr(config, key) for key in ("seed", *SETTINGS)}
    state = read_state(data, settings | {"test_share": TEST_SHARE})
    if state["done"]:
        print(f"{data} is already there, made with the same settings")
        return
    stream = open_stream(config.source)
    try:
        data.mkdir(parents=True, exist_ok=True)
        with open(data / ".lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in (*data.glob(".download.json.*"), *data.glob("t*/*/.*")):  # of a run that was killed
                leftover.unlink()
            write_text(data / "download.json", json.dumps(state, indent=2) + "\n")  # first, to mark the folder as ours
            if state["stream"]:
                stream.load_state_dict(state["stream"])
            splits = Download(stream, config, data, state).run()
    except BlockingIOError:
        raise UserError(f"another download is writing into {data}: wait for it, or give another --data") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"could not write into {data} ({reason}): fix this and run the same command again") from None
    if state["broken"]:
        rows = ", ".join(map(str, state["broken"][:20])) + (", ..." if len(state["broken"]) > 20 else "")
        print(f"left out: {count(len(state['broken']), 'image')} without a style, or not readable: rows {rows}")
    if not splits.total():
        raise UserError(f"{config.source} holds no readable image: remove {data}, and give another --source")
    print(f"{count(splits.total(), 'painting')} in {data}: {splits['train']} in train, {splits['test']} in test")


def read_state(data: Path, settings: dict) -> dict:
    """The progress of an earlier run with the same settings, or that of a new one. Raises UserError."""
    try:
        state = json.loads((data / "download.json").read_text())
        earlier = state["settings"]
    except FileNotFoundError:
        if data.exists() and any(not entry.name.startswith(".") for entry in data.iterdir()):
            raise UserError(f"{data} exists and was not written by download.py: give another --data") from None
        return {"settings": settings, "row": 0, "metadata": 0, "broken": [], "stream": None, "done": False}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{data / 'download.json'} is damaged: remove {data}, or give another --data") from None
    changed = [f"--{key.replace('_', '-')} {earlier.get(key)}" for key in settings if settings[key] != earlier.get(key)]
    if changed:
        raise UserError(f"{data} was made with {' '.join(changed)}: use these again, or give another --data")
    return state


def open_stream(source: str):
    """The rows of a data set as a datasets.IterableDataset, images not decoded. Raises UserError."""
    try:
        import datasets
    except ImportError:
        raise UserError("this needs datasets: pip install -r requirements/download.txt") from None
    for logger in ("huggingface_hub", "datasets.packaged_modules.parquet.parquet"):  # they log what they then raise
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    print(f"opening {source}", flush=True)
    try:
        stream = datasets.load_dataset(source, split="train", streaming=True)
        stream = stream.reshard()  # by groups of rows, not by files: resuming reads at most one group again
    except Exception as error:  # the hub's client raises many types
        advice = "check the name and the network, and run the same command again"
        if "gated" in str(error):
            advice = f"accept its terms at https://huggingface.co/datasets/{source}, then run `hf auth login`"
        elif isinstance(error, FileNotFoundError | ValueError):
            advice = "give a data set on the hub, or a folder of Parquet files, with --source"
        raise UserError(f"cannot open {source}: {advice} ({first_line(error)})") from None
    missing = {"image", "style", "artist", "genre"} - set(stream.features or ())
    if missing:
        raise UserError(f"{source} has no column {', '.join(sorted(missing))}: see --help for the columns it needs")
    return stream.cast_column("image", datasets.Image(decode=False))


def read_rows(stream, source: str):
    """The rows of a stream. Raises UserError for whatever the hub's client raises."""
    try:
        yield from stream
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{source} broke off: run the same command again to continue from here ({reason})") from None


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def safe_name(name: str, separator: str) -> str:
    """A name that is valid in a path on any disk; "" for an unknown one, and for one of symbols only."""
    name = "" if name.startswith("Unknown ") else name.replace("ã\xad", "i")  # the hub's joaquín-sorolla is garbled
    return re.sub(r"[^\w.-]+" if separator == "_" else r"[^\w.-]+|_", separator, name).strip("._-")


def labels_of(features, row: dict) -> tuple[str, str, str]:
    """Style, artist (without "_") and genre of a row; "" where it has none."""
    labels = []
    for column, separator in (("style", "_"), ("artist", "-"), ("genre", "_")):
        names, value = getattr(features[column], "names", None), row[column]
        name = "" if value is None or value == -1 else names[value] if names else str(value)
        labels.append(safe_name(name, separator))
    return tuple(labels)


def choose_split(seed: int, style: str, number: int) -> str:
    """Split of the number-th painting of a style: one of each block of 1 / TEST_SHARE is drawn for the test set."""
    nearest = int(number * TEST_SHARE)
    for block in (nearest - 1, nearest, nearest + 1):
        draw = random.Random(f"{seed}/{style}/{block}").random()
        if block == 0:
            draw = TEST_SHARE + (1 - TEST_SHARE) * draw  # never the first painting: train needs one of every style
        if block >= 0 and int((block + draw) / TEST_SHARE) == number:
            return "test"
    return "train"


def encode(content: bytes, size: int) -> tuple[bytes, str]:
    """An image file, reduced where it is larger than `size`, and its suffix. Raises what Pillow does if broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large scans and odd metadata only warn
        with Image.open(io.BytesIO(content)) as image:
            suffix = image.format.lower().replace("jpeg", "jpg")
            keep = not size or min(image.size) <= size
            image.draft("RGB", (1, 1) if keep else (2 * size, 2 * size))  # a JPEG is checked faster at an eighth
            image.load()
            if keep:
                return content, suffix
            image = as_rgb(ImageOps.exif_transpose(image))
    sides = [max(size, round(length * size / min(image.size))) for length in image.size]
    file = io.BytesIO()
    image.resize(sides, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue(), "jpg"


class Download:
    """Writes the paintings of a stream and their rows of metadata.csv, and keeps download.json up to date."""

    def __init__(self, stream, config, data: Path, state: dict):
        self.stream, self.config, self.data, self.state = stream, config, data, state

    def run(self) -> Counter:
        """Continue from `state` to the end; returns the number of paintings in each split."""
        with open(self.data / "metadata.csv", "a+", newline="", encoding="utf-8") as self.file:
            self.read_metadata()
            limit = self.config.per_style or math.inf
            styles = {safe_name(name, "_") for name in getattr(self.stream.features["style"], "names", [""])}
            total = (self.stream.info.splits or {}).get("train")
            rows, count = read_rows(self.stream, self.config.source), self.state["row"]
            with tqdm(rows, "downloading", total and total.num_examples, initial=count) as bar:
                for row in bar:
                    self.add(count, row, limit)
                    count += 1
                    if all(self.counts[name] >= limit for name in styles):  # {""}: none listed, read to the end
                        break
                    if count % SAVE_EVERY == 0:
                        self.save(count, stream=self.stream.state_dict())
            self.save(count, stream=None, done=True)
        return self.splits

    def read_metadata(self) -> None:
        """Read the rows that are complete, and drop the others, which come again."""
        if os.fstat(self.file.fileno()).st_size < self.state["metadata"]:
            raise UserError(f"{self.data / 'metadata.csv'} has lost lines: remove {self.data} and start anew")
        self.file.truncate(self.state["metadata"])
        self.file.seek(0)
        rows, self.table = list(csv.DictReader(self.file)), csv.DictWriter(self.file, COLUMNS)
        self.splits, self.counts = (Counter(cell_text(row[key]) for row in rows) for key in ("split", "style"))
        self.split_of = {row["hash"]: row["split"] for row in rows}
        if not self.state["metadata"]:
            self.table.writeheader()
            self.save(0)

    def add(self, number: int, row: dict, limit: float) -> None:
        """Write a row's painting, unless its style has enough; note it if it is broken."""
        style, artist, genre = labels_of(self.stream.features, row)
        if self.counts[style] >= limit:
            return
        content = None
        with contextlib.suppress(Exception):  # Pillow's decoders raise almost anything on damaged files
            content, suffix = encode(row["image"]["bytes"], self.config.size)
        if not content or not style:
            self.state["broken"].append(number)
            return
        digest = hashlib.sha256(row["image"]["bytes"]).hexdigest()[:16]
        # Copies of a painting, many of them in two styles of WikiArt, go to the same split.
        split = self.split_of.setdefault(digest, choose_split(self.config.seed, style, self.counts[style]))
        path = f"{split}/{style}/{artist}{'_' if artist else ''}{number}.{suffix}"
        with atomic_write(self.data / path) as temporary:
            temporary.write_bytes(content)
        values = (path, split, style, artist, genre, number, "", digest)
        cells = [safe_cell(value) if isinstance(value, str) else value for value in values]
        self.table.writerow(dict(zip(COLUMNS, cells, strict=True)))
        self.counts[style] += 1
        self.splits[split] += 1

    def save(self, row: int, **progress) -> None:
        """Write metadata.csv to the disk, then the progress."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.state.update(row=row, metadata=os.fstat(self.file.fileno()).st_size, **progress)
        write_text(self.data / "download.json", json.dumps(self.state, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
