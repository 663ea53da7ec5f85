"""Fetch WikiArt, or another data set with the same columns, from the Hugging Face hub.

    pip install -r requirements-download.txt
    python download.py --data /scratch/wikiart --size 512
    python download.py --data data/small --per-style 200 --size 256
    python download.py --data data/mine --source folder/of/parquet

Makes train/<Style>/<artist>_<row>.jpg, test/..., metadata.csv, and download.json, which remembers how far it came:
after Ctrl-C, a lost connection or a power cut the same command goes on there. The whole of WikiArt is some 30 GB to
read, whatever is kept of it.
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

from PIL import Image, ImageOps
from tqdm import tqdm

import folder
import runs

COLUMNS = ("path", "split", "style", "artist", "genre", "title", "year", "hash")
EVERY = 100  # rows from one saving of download.json to the next
HELP = {
    "source": "a data set on the hub, or a folder of Parquet files, with the columns image, style, artist and genre",
    "per_style": "paintings to keep of each style, the first ones; 0 keeps all",
    "size": "what the shorter side is reduced to, in pixels; 0 keeps the files as they are",
    "test_share": "share of each style's paintings that goes to test/",
}


def resume(data: Path, settings: dict) -> dict:
    """How far an earlier run with the same settings came; the beginning where there was none."""
    try:
        state = json.loads((data / "download.json").read_text())
        before = state["settings"]
    except FileNotFoundError:
        if data.exists() and any(not entry.name.startswith(".") for entry in data.iterdir()):
            raise runs.Problem(f"{data} is there already, not made by download.py: name another --data") from None
        return {"settings": settings, "row": 0, "metadata": 0, "broken": [], "stream": None, "done": False}
    except (ValueError, KeyError, TypeError):
        raise runs.Problem(f"{data / 'download.json'} is damaged: remove {data}, or name another --data") from None
    changed = [f"--{key.replace('_', '-')} {before.get(key)}" for key in settings if settings[key] != before.get(key)]
    if changed:
        raise runs.Problem(f"{data} was made with {' '.join(changed)}: give that again, or name another --data")
    return state


def open_stream(source: str):
    """The rows of a data set as a datasets.IterableDataset; the images stay files. Raises Problem."""
    try:
        import datasets
    except ImportError:
        raise runs.Problem("this needs a package more: pip install -r requirements-download.txt") from None
    for chatty in ("huggingface_hub", "datasets.packaged_modules.parquet.parquet"):  # they log what they then raise
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    print(f"opening {source}", flush=True)
    try:
        stream = datasets.load_dataset(source, split="train", streaming=True)
        stream = stream.reshard()  # by groups of rows, not by files: a resumed run reads at most one group again
    except Exception as error:  # the hub's client raises many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        advice = "check the name and the network, and run the same command again"
        if "gated" in str(error):
            advice = f"accept its terms at https://huggingface.co/datasets/{source}, then run `hf auth login`"
        elif isinstance(error, FileNotFoundError | ValueError):
            advice = "give a data set on the hub, or a folder of Parquet files, with --source"
        raise runs.Problem(f"cannot open {source}: {advice} ({reason})") from None
    missing = {"image", "style", "artist", "genre"} - set(stream.features or ())
    if missing:
        raise runs.Problem(f"{source} has no column {', '.join(sorted(missing))}: see --help for what it must have")
    return stream.cast_column("image", datasets.Image(decode=False))


def read(stream, source: str):
    """The rows; whatever goes wrong on the line, of which there are many kinds, is a Problem."""
    try:
        yield from stream
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise runs.Problem(f"{source} broke off: run the same command again, it goes on from here ({reason})") from None


def plain(name: str, joint: str) -> str:
    """A name that can stand in a path on any disk; "" for an unknown one, and for one of nothing but signs."""
    name = "" if name.startswith("Unknown ") else name.replace("ã\xad", "i")  # the hub's joaquín-sorolla is garbled
    return re.sub(r"[^\w.-]+" if joint == "_" else r"[^\w.-]+|_", joint, name).strip("._-")


def labels(features, row: dict) -> tuple[str, str, str]:
    """Style, artist (without "_") and genre of a row; "" where it has none."""
    found = []
    for column, joint in (("style", "_"), ("artist", "-"), ("genre", "_")):
        names, value = getattr(features[column], "names", None), row[column]
        known = value is not None and value != -1
        found.append(plain(names[value] if names else str(value), joint) if known else "")
    return tuple(found)


def side(seed: int, share: float, style: str, number: int) -> str:
    """Where the number-th painting of a style goes: to test one of every 1 / share, drawn by (seed, style, block)."""
    around = int(number * share)
    for block in (around - 1, around, around + 1):
        draw = random.Random(f"{seed}/{style}/{block}").random()
        if block == 0:
            draw = share + (1 - share) * draw  # never the very first: a style must be in train
        if block >= 0 and int((block + draw) / share) == number:
            return "test"
    return "train"


def picture(content: bytes, size: int) -> tuple[bytes, str]:
    """A picture's file, reduced where it is larger than `size`, and its ending. Raises what Pillow does if broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # big scans and odd metadata only warn
        with Image.open(io.BytesIO(content)) as image:
            ending = image.format.lower().replace("jpeg", "jpg")
            keep = not size or min(image.size) <= size
            image.draft("RGB", (1, 1) if keep else (2 * size, 2 * size))  # a JPEG is checked faster at an eighth
            image.load()
            if keep:
                return content, ending
            image = folder.as_rgb(ImageOps.exif_transpose(image))
    sides = [max(size, round(length * size / min(image.size))) for length in image.size]
    file = io.BytesIO()
    image.resize(sides, Image.Resampling.BICUBIC).save(file, "JPEG", quality=92)
    return file.getvalue(), "jpg"


def fetch(stream, config, data: Path, state: dict) -> Counter:
    """Write the paintings from where `state` stands, and keep it up to date. Returns how many are in each split."""
    with open(data / "metadata.csv", "a+", newline="", encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_size < state["metadata"]:
            raise runs.Problem(f"{data / 'metadata.csv'} has lost lines: remove {data} and start anew")
        file.truncate(state["metadata"])  # what came after the last saving comes again
        file.seek(0)
        rows, table = list(csv.DictReader(file)), csv.DictWriter(file, COLUMNS)
        splits, counts = Counter(row["split"] for row in rows), Counter(row["style"] for row in rows)
        sides = {row["hash"]: row["split"] for row in rows}

        def save(number, **progress):
            file.flush()
            os.fsync(file.fileno())
            state.update(row=number, metadata=os.fstat(file.fileno()).st_size, **progress)
            runs.write_text(data / "download.json", json.dumps(state, indent=2) + "\n")

        if not state["metadata"]:
            table.writeheader()
            save(0)
        limit, styles = config.per_style or math.inf, getattr(stream.features["style"], "names", [""])
        styles = {plain(name, "_") for name in styles}  # where the data set lists none, it is read to its end
        split = (stream.info.splits or {}).get("train")
        bar = tqdm(read(stream, config.source), "downloading", split and split.num_examples, initial=state["row"])
        number = state["row"] - 1  # should nothing be left
        for number, row in enumerate(bar, state["row"]):
            style, artist, genre = labels(stream.features, row)
            content = None
            if counts[style] < limit:
                with contextlib.suppress(Exception):  # Pillow's readers raise almost anything on damaged files
                    content, ending = picture(row["image"]["bytes"], config.size)
                if not content or not style:
                    state["broken"].append(number)
                else:
                    digest = hashlib.sha256(row["image"]["bytes"]).hexdigest()[:16]
                    # Copies of a painting, of which WikiArt has many in two styles, go to one side.
                    split = sides.setdefault(digest, side(config.seed, config.test_share, style, counts[style]))
                    path = f"{split}/{style}/{artist}{'_' if artist else ''}{number}.{ending}"
                    with runs.replacing(data / path) as temporary:
                        temporary.write_bytes(content)
                    values = (path, split, style, artist, genre, number, "", digest)
                    table.writerow(dict(zip(COLUMNS, values, strict=True)))
                    counts[style] += 1
                    splits[split] += 1
            if all(counts[name] >= limit for name in styles):
                break
            if (number + 1) % EVERY == 0:
                save(number + 1, stream=stream.state_dict())
        bar.close()
        save(number + 1, stream=None, done=True)
    return splits


def main(argv=None):
    config = runs.configure("download", __doc__, ("data", "seed"), HELP, argv)
    data, settings = Path(config.data), {key: getattr(config, key) for key in ("seed", *HELP)}
    state = resume(data, settings)
    if state["done"]:
        return print(f"{data} is already there, made with the same settings")
    stream = open_stream(config.source)
    try:
        data.mkdir(parents=True, exist_ok=True)
        with open(data / ".lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in (*data.glob(".download.json.*"), *data.glob("t*/*/.*")):  # of a run that was killed
                leftover.unlink()
            runs.write_text(data / "download.json", json.dumps(state, indent=2) + "\n")  # first: the folder is ours
            if state["stream"]:
                stream.load_state_dict(state["stream"])
            splits = fetch(stream, config, data, state)
    except BlockingIOError:
        raise runs.Problem(f"another download is writing into {data}: wait for it, or name another --data") from None
    except OSError as error:
        reason = error.strerror or error
        raise runs.Problem(f"could not write into {data} ({reason}): mend it, and run the same command again") from None
    broken = state["broken"]
    if broken:
        rows = ", ".join(map(str, broken[:20])) + (", ..." if len(broken) > 20 else "")
        print(f"{len(broken)} pictures cannot be read, or have no style, and are left out: rows {rows}")
    if not splits.total():
        raise runs.Problem(f"{config.source} holds no picture that can be read: remove {data}, give another --source")
    print(f"{splits.total()} paintings in {data}: {splits['train']} in train, {splits['test']} in test")


if __name__ == "__main__":
    runs.start(main)
