"""Label new paintings: those of a folder, or one at a time on a web page.

    python label.py paintings/                          # labels.csv: the three likeliest styles of every image
    python label.py paintings/ --sort sorted            # and a copy of each in a folder named after its style
    python label.py my.jpg --out my.csv                 # one picture, whose row is printed, too
    python label.py serve                               # a page and an HTTP API, at http://127.0.0.1:7860
    python label.py export /scratch/wikiart/train       # labels confirmed on the page, as <Style>/<name>, to train with
    python label.py measure paintings/                  # throughput, compared with the network alone; into facts.json

Uses classifier.pt of the run folder; where there is none, or in the default run folder the demo's, a network that comes
with the project: on EfficientNet-Lite0 where requirements/embed.txt is installed, otherwise report/classifier.pt. The
table has a row for each file; `unsure` marks paintings whose likeliest style has less than 50 %, and `problem` says why
a file could not be read. It is of one folder and one network: for others, give another --out. labels.png beside it is a
contact sheet. An interrupted run continues when the same command is run again; a file that is newer than the table is
then labelled again. Rows of files that are gone stay. `serve` needs Gradio: pip install -r requirements/label.txt.
Labels confirmed on the page are kept, with their images, in corrections.sqlite in the run folder.
"""

import contextlib
import csv
import fcntl
import io
import itertools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
import torch
from tqdm import tqdm

from common import figures
from common.backbones import installed_weights
from common.config import ROOT, Setting, configure, read_settings
from common.errors import UserError
from common.files import is_at
from common.images import Decoder, decode_in_processes, files_below, open_rgb, read_image
from common.metrics import low_confidence
from common.names import cell_text, count, display_name, file_part, listed, printable, safe_cell
from common.painter import STYLES
from common.run import (
    add_facts,
    checkpoint_path,
    load_checkpoint,
    pick_device,
    read_facts,
    reuse_freed_memory,
    run_script,
)
from serve.corrections import Corrections, export
from wikiart import Classifier

SHARED = ("data", "run", "device", "processes", "hide")
SETTINGS = {
    "checkpoint": Setting(
        str,
        None,
        "classifier: a path, or a file of the run folder; where that has none, one that comes with the project",
    ),
    "artist_checkpoint": Setting(str, None, "classifier of train.py --target artist, whose likeliest artist is added"),
    "out": Setting(str, None, "table to write or to continue"),
    "sort": Setting(str, None, "folder for copies of the images, in one folder per style"),
    "sheet": Setting(bool, None, "draw a contact sheet beside the table"),
    "host": Setting(str, None, "address to listen at; 0.0.0.0 admits other machines"),
    "port": Setting(int, "[0, 65535]", "port to listen at; 0: the first free one from 7860 on"),
}
COMMANDS = ("serve", "export", "measure")  # a folder of this name is ./serve
BATCH_SIZE = 64  # images per forward pass
TOP = 3  # likeliest classes in a row of the table
BACKBONE = "tf_efficientnet_lite0"
COMMITTED = ROOT / "report" / "classifier.pt"
HEAD = ROOT / "report" / f"head_{BACKBONE}.pt"  # of embed.py: more often right, and in need of the backbone
SHEET, COLUMNS, SIDE = 48, 6, 224  # pictures on the contact sheet, at most; in a row; pixels of their longer sides


def main(argv=None):
    config = configure("label", __doc__, SETTINGS, SHARED, argv, words=True)
    command, folder = read_command(config.words)
    corrections = Corrections(Path(config.run) / "corrections.sqlite")
    if command == "export":
        return export(corrections, folder)
    classifier, artist_classifier = load_classifiers(config, to_label=not command)
    if command == "serve":
        import_page().serve(classifier, artist_classifier, corrections, config)
    elif command == "measure":
        add_facts(config.run, "label", measure(classifier, folder, config))
    else:
        out, name = Path(config.out), folder.name if folder.is_file() else ""
        folder = folder.parent if name else folder
        label_folder(classifier, artist_classifier, folder, [name] if name else list_files(folder, out), out, config)
        if name:
            print_row(out, name)
        if config.sheet:
            plot_sheet(folder, out)
        if config.sort:
            copy_by_class(folder, out, Path(config.sort))


def read_command(words: list[str]) -> tuple[str, Path | None]:
    """The command, "" to label a folder or one file, and this folder or file, None for serve. Raises UserError."""
    command, folders = (words[0], words[1:]) if words and words[0] in COMMANDS else ("", words)
    if command == "serve" and not folders:
        return command, None
    if command == "serve" or len(folders) != 1:
        usage = "label.py serve, label.py export <root>/train, or label.py measure my_folder"
        raise UserError(f"give one folder of pictures, or one picture, or a command: {usage}")
    return command, Path(folders[0])


def load_classifiers(config, to_label: bool) -> tuple[Classifier, Classifier | None]:
    """The classifiers of --checkpoint and of --artist-checkpoint. Raises UserError where they do not fit together."""
    device, path = pick_device(config.device), checkpoint_path(config.run, config.checkpoint)
    if config.checkpoint == COMMITTED.name and (not path.exists() or (to_label and knows_demo_only(path, config))):
        if path.exists():
            print(f"{path} knows the styles of the demo; to see these: --checkpoint {path}")
        elif Path(config.run) != Path(read_settings()["run"]):
            print(f"no {path}: the project's own network is taken")
        path = HEAD if installed_weights(BACKBONE) else COMMITTED
    classifier = Classifier.load(path, device)
    print(describe(classifier, path), flush=True)
    if path == COMMITTED:
        accuracy = load_checkpoint(HEAD)["unseen_artists_accuracy"]
        better = f"a network on a pre-trained backbone is right for {accuracy:.0%} of them"
        print(f"{better}: .venv/bin/pip install -r requirements/embed.txt", flush=True)
    if not config.artist_checkpoint:
        return classifier, None
    artist_classifier = Classifier.load(checkpoint_path(config.run, config.artist_checkpoint), device)
    if artist_classifier.target != "artist":
        raise UserError(f"{config.artist_checkpoint} is of {artist_classifier.target}: train one with --target artist")
    if artist_classifier.resize != classifier.resize:
        raise UserError("--checkpoint and --artist-checkpoint differ in --resize: train both with the same")
    return classifier, artist_classifier


def knows_demo_only(path: Path, config) -> bool:
    """Whether it is the demo's classifier, in a run folder that nobody asked for: paintings have other styles."""
    default = Path(config.run) == Path(read_settings()["run"])
    return default and set(load_checkpoint(path).get("classes", ())) <= STYLES.keys()


def describe(classifier: Classifier, path: Path) -> str:
    """One line: which checkpoint it is, its classes, and its accuracy on artists that it never saw.

    It was measured by embed.py, which keeps it in the checkpoint, or by test.py, which adds it to facts.json.
    """
    names = listed(list(map(display_name, classifier.classes)), 40)
    accuracy, facts = classifier.checkpoint.get("unseen_artists_accuracy"), read_facts(path.parent).get("test", {})
    if path.name == "classifier.pt" and facts.get("checkpoint", classifier.hash[:12]) == classifier.hash[:12]:
        accuracy = facts.get("unseen_artists_accuracy")
    tested = "not yet tested on artists that it never saw (python test.py)"
    if accuracy is not None:
        tested = f"right for {accuracy:.0%} of test paintings by artists that it never saw"
    shown = os.path.relpath(path) if path.is_relative_to(ROOT) else path
    return f"{shown}: {len(classifier.classes)} {classifier.target}s ({names}), {tested}"


def import_page():
    try:
        from serve import page  # only here: labelling a folder does not need Gradio
    except ImportError as error:
        raise UserError(f"the page needs {error.name}: pip install -r requirements/label.txt") from None
    return page


# A folder -------------------------------------------------------------------------------------------------------------


def label_folder(classifier, artist_classifier, folder: Path, files: list[str], out: Path, config) -> float:
    """Append a row to the table for each of the files that it lacks; returns labelled images per second.

    files: paths in the folder.
    """
    reuse_freed_memory()
    if config.sort and Path(config.sort).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--sort {config.sort} is inside {folder}: the next run would label the copies as well")
    model = "+".join(used.hash[:12] for used in (classifier, artist_classifier) if used)
    model += f" on {os.path.relpath(folder.resolve(), out.resolve().parent)}"  # as it is seen from the table
    columns = [f"{classifier.target}_{place + 1}" for place in range(min(TOP, len(classifier.classes)))]
    columns += ["artist"] if artist_classifier else []
    cells = [cell for column in columns for cell in (column, f"{column}_probability")] + ["unsure"]
    header = ["path", *cells, "problem", "model"]
    with open_table(out, header, model, folder, set(files), config.sort) as (file, labelled_paths):
        remaining, broken, start = [path for path in files if path not in labelled_paths], [], time.perf_counter()
        if labelled_paths:
            print(f"in {out} already: {len(files) - len(remaining)} of {count(len(files), 'file')}")
        writer, paths = csv.writer(file), iter(remaining)
        decoder = Decoder(folder, remaining, classifier.size, classifier.resize)
        bar = tqdm(total=len(remaining), desc="labelling", unit="image")
        with bar, decode_in_processes(decoder, BATCH_SIZE, config.processes) as batches:
            for batch in batches:
                predicted = iter(predict_cells(classifier, artist_classifier, batch))
                for path, (_, problem) in zip(itertools.islice(paths, len(batch)), batch, strict=True):
                    row = [path, *([""] * len(cells) if problem else next(predicted)), problem or "", model]
                    writer.writerow(map(safe_cell, row))
                    broken += [f"{path} ({problem})"] if problem else []
                file.flush()
                bar.update(len(batch))
    seconds, labelled = time.perf_counter() - start, len(remaining) - len(broken)
    print(f"{count(labelled, 'image')} in {seconds:.1f} s, {labelled / seconds:.1f} per second: {out}")
    if broken:
        names = printable(listed(broken, 3, "; "))
        print(f"{len(broken)} could not be read (column problem): {names}", file=sys.stderr)
    return labelled / seconds


def list_files(folder: Path, out: Path) -> list[str]:
    """The files below a folder, by their paths in it, without hidden ones and those written here. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder" if folder.exists() else f"no file and no folder {folder}")
    written = {os.path.realpath(path) for path in (out, out.with_suffix(".png"))}
    files = [path for path in files_below(folder) if os.path.realpath(folder / path) not in written]
    if not files:
        raise UserError(f"{folder} holds no file")
    return files


def predict_cells(classifier, artist_classifier, batch: list[tuple]) -> list[list[str]]:
    """For each image (pixels, None) of a batch: likeliest classes and artist, the probability of each, and "unsure"."""
    arrays = [pixels for pixels, problem in batch if not problem]
    if not arrays:
        return []
    images = torch.from_numpy(np.stack(arrays))
    predictions = classifier.predict(images)
    rows = [classifier.top(probabilities, TOP) for probabilities in predictions]
    unsure = ["unsure" if doubt else "" for doubt in low_confidence(predictions)]
    if artist_classifier:
        for row, probabilities in zip(rows, artist_classifier.predict(images), strict=True):
            row += artist_classifier.top(probabilities, 1)
    cells = [[cell for name, probability in row for cell in (name, f"{probability:.4f}")] for row in rows]
    return [[*row, doubt] for row, doubt in zip(cells, unsure, strict=True)]


def leads_out(path: str) -> bool:
    """Whether a path of the table, which others may have written, is outside the folder."""
    return ".." in Path(path).parts or Path(path).is_absolute()


def is_newer(path: Path, other: Path) -> bool:
    """Whether a file was modified later than another one; not where one of them is gone."""
    try:
        return path.stat().st_mtime_ns > other.stat().st_mtime_ns
    except OSError:
        return False


@contextlib.contextmanager
def lock_table(out: Path):
    """The table, opened for reading and appending, in this block ours alone. Raises UserError where it is not."""
    with open(out, "a+", newline="", encoding="utf-8", errors="surrogateescape") as file:  # names need not be UTF-8
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = is_at(out, file)  # another program may have replaced it since it was opened
        except BlockingIOError:
            ours = False
        if not ours:
            raise UserError(f"another program is writing {out}: wait for it, or give another --out")
        yield file


def read_table(file, header: list[str], model: str) -> tuple[int, list[list[str]]]:
    """The bytes that complete rows take, and these rows, the header first. Raises UserError for another table."""
    file.seek(0)
    text = file.read()
    complete = text[: text.rfind("\r\n") + 2] if "\r\n" in text else ""
    try:
        rows = [list(map(cell_text, row)) for row in csv.reader(io.StringIO(complete, newline=""))]
    except csv.Error:
        rows = []
    start = io.StringIO(newline="")
    csv.writer(start).writerow(header)
    if start.getvalue().startswith(text):  # nothing, or as much of the header as a full disk took
        return 0, []
    if not rows or rows[0] != header or any(len(row) != len(header) for row in rows):
        raise UserError(f"{file.name} is not a table of these columns: give another --out")
    if any(row[-1] != model for row in rows[1:]):
        advice = "give another --out, or delete it"
        raise UserError(f"{file.name} holds labels of another folder or checkpoint: {advice}")
    return len(complete.encode("utf-8", "surrogateescape")), rows


@contextlib.contextmanager
def open_table(out: Path, header: list[str], model: str, folder=Path(), files=frozenset(), sort=None):
    """The table, opened for appending, and the paths that it has; a row that a kill left incomplete is removed.

    So are the rows of those of the files that are newer than the table, and their copies in the folder `sort`. Raises
    UserError where others of the table are: once it is written again, nobody would see that they have changed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock_table(out) as file, contextlib.ExitStack() as stack:
        complete, rows = read_table(file, header, model)
        changed = {row[0]: row[1] for row in rows[1:] if is_newer(folder / row[0], out)}
        others = [path for path in changed if path not in files and not path.startswith(".")]  # hidden: never listed
        if others:
            which = printable(listed(others, 3))
            raise UserError(f"changed since {out} was written: {which}; label the folder first, or give another --out")
        outdated = changed.keys() & files
        if outdated:
            print(f"changed since {out} was written, and labelled again: {count(len(outdated), 'file')}")
            for path in outdated:  # copies before rows: after a kill, the next run finds the rows again
                if sort and changed[path]:
                    (Path(sort) / file_part(changed[path]) / path).unlink(missing_ok=True)
            rows, target = [row for row in rows if row[0] not in outdated], out.resolve()
            temporary = target.with_name(f".{target.name}.new")
            file = stack.enter_context(lock_table(temporary))  # before others can see it
            file.truncate(0)
            csv.writer(file).writerows(map(safe_cell, row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        elif complete < os.fstat(file.fileno()).st_size:  # else the table would be newer for nothing
            file.truncate(complete)
        if not rows:
            csv.writer(file).writerow(header)
        yield file, {row[0] for row in rows[1:]}


def read_rows(out: Path) -> list[list[str]]:
    with open(out, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [list(map(cell_text, row)) for row in csv.reader(file)][1:]


def print_row(out: Path, path: str) -> None:
    """Print what the table has for a file: its styles, or why it could not be read."""
    for _, *cells, unsure, problem, _ in (row for row in read_rows(out) if row[0] == path):
        pairs = zip(cells[::2], cells[1::2], strict=True)
        words = [f"{display_name(name)} {float(probability):.0%}" for name, probability in pairs if name]
        words += ["unsure"] if unsure else []
        print(f"{printable(path)}: {f'could not be read: {problem}' if problem else ', '.join(words)}")


def plot_sheet(folder: Path, out: Path) -> None:
    """A contact sheet beside the table: pictures evenly chosen from it, each with its likeliest class."""
    rows = [row for row in read_rows(out) if row[1] and (folder / row[0]).is_file()]
    chosen, images, captions = rows[:: -(-len(rows) // SHEET) or 1], [], []
    for path, name, probability, *rest in chosen:
        try:
            image = open_rgb(folder / path, 2 * SIDE)
        except Exception as error:  # it has changed since it was labelled
            print(f"not on the contact sheet: {printable(path)} ({printable(str(error))})", file=sys.stderr)
            continue
        image.thumbnail((SIDE, SIDE))
        images.append(np.asarray(image).transpose(2, 0, 1))
        caption = f"{sheet_name(path)}\n{display_name(name)} {float(probability):.0%}"
        captions.append(caption + "\nunsure" * ("unsure" in rest))
    if images:
        sheet, pictures = out.with_suffix(".png"), count(len(rows), "picture")
        title = pictures if len(images) == len(rows) else f"{len(images)} of {pictures}"
        figures.contact_sheet(sheet, images, captions, min(COLUMNS, len(images)), title)
        print(f"contact sheet: {sheet}")


def sheet_name(path: str) -> str:
    """A file's path for the contact sheet, its folder on a line of its own; what is too long is shortened."""
    folder, file = map(printable, os.path.split(path))
    file = file if len(file) < 61 else f"{file[:29]}…{file[-29:]}"
    folder = folder if len(folder) < 25 else f"…{folder[-23:]}"
    return f"{folder}/\n{file}" if folder else file


def copy_by_class(folder: Path, out: Path, target: Path) -> None:
    """Copy the labelled images to <target>/<class>/<path>, except for those that are there already, and no older."""
    copied = 0
    for path, name, *_ in tqdm(read_rows(out), "copying", unit="image"):
        source, copy = folder / path, target / file_part(name) / path
        if leads_out(path):
            raise UserError(f"{out} has the path {path}, which is not below {folder}: give another --out")
        if not name or not source.exists():
            continue
        if not copy.exists() or copy.stat().st_size != source.stat().st_size or is_newer(source, copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy.with_name(".copying"))
            copy.with_name(".copying").replace(copy)  # whole, also after a kill
            copied += 1
    print(f"{count(copied, 'image')} copied to {target}")


# Throughput -----------------------------------------------------------------------------------------------------------


def measure(classifier, folder: Path, config) -> dict:
    """Images per second of the folder and of the network alone; milliseconds of an API request and of its parts."""
    page, forward_rates, folder_rates = import_page(), [], []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(3):  # alternating, so that other programs on the machine slow both
            out = Path(scratch, f"{turn}.csv")
            folder_rates.append(label_folder(classifier, None, folder, list_files(folder, out), out, config))
            labelled = [folder / path for path, *_, problem, _ in read_rows(out) if not problem]
            files = [path for path in labelled if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
            if len(files) < 2 * BATCH_SIZE:
                raise UserError(
                    f"{folder} holds {count(len(files), 'JPEG or PNG image')}: measure needs {2 * BATCH_SIZE}"
                )
            forward_rates.append(forward_rate(classifier, files))
    facts = {
        "pictures": len(files),
        "forward_rate": np.median(forward_rates),
        "folder_rate": np.median(folder_rates),
        "folder_share": np.median(np.divide(folder_rates, forward_rates)),
    } | page.request_times(classifier, files, config)
    rates = "{folder_rate:.1f} images per second, {folder_share:.0%} of the {forward_rate:.1f} of the network alone"
    times = "{api_ms:.0f} ms, {api_ratio:.2f} times the {alone_ms:.0f} ms of decoding and network alone (medians, warm)"
    print(f"folder: {rates}\nAPI: {times}".format(**facts))
    return facts


def forward_rate(classifier, files: list[Path]) -> float:
    """Images per second of the network alone, on a decoded batch."""
    arrays = [read_image(path, classifier.size, classifier.resize) for path in files[:BATCH_SIZE]]
    images = torch.from_numpy(np.stack(arrays))
    classifier.predict(images)  # warm-up
    repeats, start = len(files) // BATCH_SIZE, time.perf_counter()
    for _ in range(repeats):
        classifier.predict(images)
    return repeats * BATCH_SIZE / (time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main)
