"""Label new paintings: a folder of them, or one at a time on a page.

    python label.py paintings/ --out labels.csv         # the three likeliest styles of every picture below a folder
    python label.py paintings/ --sort sorted            # and a copy of each in a folder named after its style
    python label.py --serve                             # a page and an HTTP API, at http://127.0.0.1:7860
    python label.py --export /scratch/wikiart/train     # what was confirmed on the page, as <Style>/<name>: train again
    python label.py paintings/ --measure                # how fast, beside decoding and the network alone

Needs classifier.pt in the run folder, or --checkpoint report/classifier.pt. Stopped in whatever way, the same command
goes on where it was. The table has a row for each file; what could not be read says why in the column `problem`.
--serve needs Gradio: pip install -r requirements-label.txt. Labels that users confirm go to corrections.sqlite in the
run folder, the pictures with them.
"""

import contextlib
import csv
import fcntl
import hashlib
import io
import itertools
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import runs
from corrections import Corrections, export
from folder import Decoder, decoding, read_picture
from wikiart import build_model
from windows import calibrate, over_views, predict, views

SHARED = ("data", "run", "device", "processes", "hide")
HELP = {
    "checkpoint": "classifier of styles: a file in the run folder, or a path such as report/classifier.pt",
    "artist_checkpoint": "a second classifier (train.py --target artist), whose guess is added; none: no artists",
    "out": "table to write, or to go on with",
    "sort": "folder for copies of the pictures, in a folder for each style; none: no copies",
    "batch_size": "pictures at a time, and pictures that one request to label_batch may hold",
    "serve": "serve the page and the API instead",
    "host": "address to listen at; 0.0.0.0 lets other machines in",
    "port": "port to listen at; 0: the first free one from 7860 on",
    "megabytes": "size of an upload, at most",
    "megapixels": "pixels of an upload in millions, at most",
    "corrections": "file of the labels that users confirmed, in the run folder",
    "export": "folder that gets <Style>/<name> of every confirmed picture; none: no export",
    "measure": "label the folder and a few pictures through the API, and put the rates into facts.json",
}
SHOWN = 3  # likeliest classes in a row, and in an answer


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    given, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    config = runs.configure("label", __doc__, SHARED, HELP, flags)
    corrections = Corrections(runs.find_checkpoint(config.run, config.corrections))
    if config.export:
        return export(corrections, Path(config.export))
    if not given and not config.serve:
        raise runs.Problem("give a folder of paintings first, e.g. python label.py paintings/, or --serve, or --export")
    device = runs.pick_device(config.device)
    labeller = Labeller(runs.find_checkpoint(config.run, config.checkpoint), device)
    artist = None
    if config.artist_checkpoint:
        artist = Labeller(runs.find_checkpoint(config.run, config.artist_checkpoint), device)
        if artist.target != "artist":
            raise runs.Problem(f"{config.artist_checkpoint} names a {artist.target}: train one with --target artist")
        if artist.shape != labeller.shape:
            raise runs.Problem(f"{config.artist_checkpoint} sees pictures of another --size or --resize than "
                               f"{config.checkpoint}: train it with the same")  # fmt: skip
    if config.serve:
        page_module().serve(labeller, artist, corrections, config)
    elif config.measure:
        runs.add_facts(config.run, "label", measure(labeller, Path(given), config))
    else:
        label_folder(labeller, artist, Path(given), Path(config.out), config)
        if config.sort:
            sort(Path(given), Path(config.out), Path(config.sort))


def page_module():
    try:
        import page  # only here: the page needs Gradio, labelling a folder does not
    except ImportError as error:
        message = f"no {error.name} here, which the page needs: pip install -r requirements-label.txt"
        raise runs.Problem(message) from None
    return page


class Labeller:
    """A trained classifier, and what it says of pictures uint8 (B, 3, size, size)."""

    def __init__(self, path, device):
        checkpoint = runs.load_checkpoint(path)
        if "windows" not in checkpoint:
            raise runs.Problem(f"{path} holds a {checkpoint['model']}, not a classifier of train.py")
        self.model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
        self.device, self.kind, self.classes = device, checkpoint["model"], checkpoint["classes"]
        self.crop, self.windows = checkpoint["crop"], checkpoint["windows"]
        self.target = checkpoint["data"].get("target", "style")
        self.shape = {key: checkpoint["data"][key] for key in ("size", "resize")}
        self.calibrated, self.temperature = "temperature" in checkpoint, checkpoint.get("temperature", 1.0)
        if not self.calibrated:  # an older one
            print(f"{path} has no temperature: its probabilities are not calibrated", file=sys.stderr)
        self.hash = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def __call__(self, pixels) -> np.ndarray:
        """Calibrated probabilities (B, classes)."""
        with runs.autocast(self.device):
            found = predict(self.model, pixels.to(self.device, non_blocking=True), self.crop, self.windows)
        return calibrate(found.float().cpu(), self.temperature).numpy()

    def likeliest(self, probabilities) -> list[tuple[str, float]]:
        """The classes of one picture (classes,), likeliest first, SHOWN of them."""
        order = np.argsort(-probabilities, kind="stable")[:SHOWN]
        return [(self.classes[label], float(probabilities[label])) for label in order]

    def code(self, pixels) -> np.ndarray:
        """Codes (B, D) as cluster.py makes them of a classifier."""
        return over_views(self.model.features, pixels.to(self.device), self.crop, [1.0, 0.7]).float().cpu().numpy()

    def evidence(self, pixels, label: int) -> np.ndarray:
        """How far each region of one picture (1, 3, size, size) spoke for a class, float (h, w); only of a CNN."""
        view = views(pixels.to(self.device), self.crop, max(1.0, *self.windows))[0]
        return self.model.evidence(view, label).cpu().numpy()


# A folder -------------------------------------------------------------------------------------------------------------


def label_folder(labeller, artist, folder: Path, out: Path, config) -> float:
    """Write a row for each file below the folder, batch by batch; returns how many a second got a label."""
    runs.keep_memory()
    if not folder.is_dir():
        raise runs.Problem(f"no folder {folder}")
    if config.sort and Path(config.sort).resolve().is_relative_to(folder.resolve()):
        raise runs.Problem(f"--sort {config.sort} lies in {folder} itself: its copies would be labelled next time")
    model = labeller.hash[:12] + (f"+{artist.hash[:12]}" if artist else "") + f" on {folder.resolve()}"
    columns = [f"{labeller.target}_{place}" for place in range(1, min(SHOWN, len(labeller.classes)) + 1)]
    header = ["path", *itertools.chain(*((column, f"{column}_probability") for column in columns))]
    header += ["artist", "artist_probability"] if artist else []
    header += ["problem", "model"]
    below = (path.relative_to(folder) for path in folder.rglob("*")
             if not path.is_dir() and os.path.realpath(path) != os.path.realpath(out))  # fmt: skip
    files = sorted(path.as_posix() for path in below if not any(part.startswith(".") for part in path.parts))
    if not files:
        raise runs.Problem(f"{folder} holds no file")
    with open_table(out, header, model) as (file, done):
        todo = [path for path in files if path not in done]
        if done:
            print(f"{len(files) - len(todo)} of {len(files)} files are in {out} already")
        writer, started, broken = csv.writer(file), time.perf_counter(), []
        pictures, bar = Decoder(folder, todo, **labeller.shape), tqdm(total=len(todo), desc="labelling", unit="picture")
        with bar, decoding(pictures, config.batch_size, config.processes) as batches:
            for number, decoded in enumerate(ahead(batches)):
                paths = todo[number * config.batch_size :][: len(decoded)]
                said = iter(say(labeller, artist, [pixels for pixels, problem in decoded if not problem]))
                for path, (_, problem) in zip(paths, decoded, strict=True):
                    cells = [""] * (len(header) - 3) if problem else next(said)
                    writer.writerow([path, *cells, problem, model])
                    broken += [f"{path} ({problem})"] if problem else []
                file.flush()
                bar.update(len(paths))
        seconds = time.perf_counter() - started
    rate = (len(todo) - len(broken)) / seconds
    print(f"{len(todo) - len(broken)} pictures in {seconds:.1f} s, {rate:.1f} a second: {out}")
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        some = "; ".join(broken[:3])
        print(f"{len(broken)} could not be read, see the column problem: {some}{more}", file=sys.stderr)
    return rate


def ahead(batches):
    """The same batches, each fetched by a thread while the one before is worked on: to unpickle them takes time too."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def say(labeller, artist, pictures: list[np.ndarray]) -> list[list]:
    """The cells of a row between path and problem, for each of the pictures."""
    if not pictures:
        return []
    pixels = torch.from_numpy(np.stack(pictures))
    rows = [list(itertools.chain(*labeller.likeliest(each))) for each in labeller(pixels)]
    if artist:
        rows = [row + list(artist.likeliest(each)[0]) for row, each in zip(rows, artist(pixels), strict=True)]
    return [[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row] for row in rows]


@contextlib.contextmanager
def open_table(out: Path, header: list[str], model: str):
    """The table, open for appending, and the paths that it has; a row that a kill cut in half is taken off."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Names need not be UTF-8.
    with open(out, "a+", newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise runs.Problem(f"another program is writing {out}: wait for it, or give another --out") from None
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\r\n") + 2] if "\r\n" in text else ""
        rows = list(csv.reader(io.StringIO(whole, newline="")))
        if text and (not rows or rows[0] != header or any(len(row) != len(header) for row in rows)):
            raise runs.Problem(f"{out} is not a table of these columns: give another --out")
        if any(row[-1] != model for row in rows[1:]):
            raise runs.Problem(f"{out} is of another checkpoint or another folder: remove it, or give another --out")
        file.truncate(len(whole.encode("utf-8", "surrogateescape")))
        if not rows:
            csv.writer(file).writerow(header)
        yield file, {row[0] for row in rows[1:]}


def rows_of(out: Path) -> list[list[str]]:
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))[1:]


def sort(folder: Path, out: Path, target: Path) -> None:
    """Copy what the table has to <target>/<Style>/<path>; what is there already is left."""
    copied = 0
    for path, style, *_ in tqdm(rows_of(out), "copying", unit="picture"):
        source, copy = folder / path, target / style / path
        if style and source.exists() and not (copy.exists() and copy.stat().st_size == source.stat().st_size):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            copied += 1
    print(f"{copied} pictures copied to {target}")


# How fast -------------------------------------------------------------------------------------------------------------


def measure(labeller, folder: Path, config) -> dict:
    """Rates of the whole folder and of the network alone; latencies of the API, and of decoding and network alone."""
    forward, whole = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(3):  # in turns: whatever else runs on this machine slows both
            out = Path(scratch, f"{turn}.csv")
            whole.append(label_folder(labeller, None, folder, out, config))
            files = [folder / path for path, *_, problem, _ in rows_of(out)
                     if not problem and path.lower().endswith((".jpg", ".jpeg", ".png"))]  # fmt: skip
            if len(files) < 2 * config.batch_size:
                raise runs.Problem(f"{len(files)} pictures in {folder} are too few to measure: "
                                   f"{2 * config.batch_size} or more")  # fmt: skip
            forward.append(forward_rate(labeller, files, config.batch_size))
    facts = {"pictures": len(files), "forward_rate": np.median(forward), "folder_rate": np.median(whole),
             "folder_share": np.median(np.array(whole) / forward)}  # fmt: skip
    facts |= page_module().latencies(labeller, files, config)
    facts = {key: round(value, 4) if isinstance(value, float) else value for key, value in facts.items()}
    print(f"folder: {facts['folder_rate']:.1f} pictures a second, {facts['folder_share']:.0%} of the "
          f"{facts['forward_rate']:.1f} of the network alone\nAPI: {facts['api_ms']:.0f} ms, {facts['api_ratio']:.2f} "
          f"times the {facts['alone_ms']:.0f} ms of decoding and network alone (medians, warm)")  # fmt: skip
    return facts


def forward_rate(labeller, files: list[Path], size: int) -> float:
    """Pictures a second of the network alone, on a batch that is decoded already."""
    pixels = torch.from_numpy(np.stack([read_picture(path, **labeller.shape) for path in files[:size]]))
    labeller(pixels)  # warm
    turns, started = len(files) // size, time.perf_counter()
    for _ in range(turns):
        labeller(pixels)
    return turns * size / (time.perf_counter() - started)


if __name__ == "__main__":
    runs.start(main)
