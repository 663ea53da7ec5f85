"""What file names, folder names and metadata.csv say about paintings."""

import csv
import hashlib
import os
import re
import unicodedata
from pathlib import Path

import numpy as np

from common.errors import DataError, UserError

LONGEST_NAME = 240  # bytes; file systems allow 255, of which a temporary name needs some


def artist_of(path: str) -> str:
    """WikiArt names its files <artist>_<title>.jpg; "" where a name has no "_"."""
    artist, underscore, _ = os.path.basename(path).partition("_")
    return printable(artist) if underscore else ""


def stem_of(path: str) -> str:
    """A file's name without its ending; Roboflow calls its augmented copies <name>_jpg.rf.<hash>.jpg."""
    return os.path.splitext(os.path.basename(path))[0].partition("_jpg.rf.")[0]


def title_of(path: str) -> str:
    """The title in a file name, with spaces for hyphens; WikiArt numbers works of one title: (1), (2)."""
    return re.sub(r"\(\d+\)$", "", stem_of(path).partition("_")[2]).replace("-", " ")


def printable(text: str) -> str:
    """Text that can be drawn, written and shown on one line of a terminal, from a file name or a cell of metadata.csv.

    Control characters, line breaks, what is not UTF-8 and marks that turn the direction of writing become escapes such
    as \\n, \\x1b and \\udce9.
    """
    return "".join(ascii(letter)[1:-1] if is_hidden(letter) else letter for letter in text)


def is_hidden(letter: str) -> bool:
    category, direction = unicodedata.category(letter), unicodedata.bidirectional(letter)
    return category in ("Cc", "Cs", "Zl", "Zp") or (category == "Cf" and direction != "BN")


def file_part(name: str) -> str:
    """The name of a class as a part of a file name: it cannot lead to another folder."""
    return re.sub(r"^\.+|[/\0]", "_", name) or "_"


def fit_name(stem: str, ending: str) -> str:
    """A file name of this stem and ending; a stem too long for a file system is cut and gets a hash."""
    room = LONGEST_NAME - len(os.fsencode(ending))
    if len(os.fsencode(stem)) > room:
        key = hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]
        stem = os.fsencode(stem)[: room - 9].decode(errors="ignore") + "-" + key
    return stem + ending


def artist_and_title(artist: str, path: str) -> tuple[str, str]:
    """As captions write them: ("Claude Monet", "Water lilies"), ("Hokusai II", ""); "" for what is not known."""
    name = printable(artist).replace("-", " ").title()
    return re.sub(r"\bIii?\b", lambda number: number[0].upper(), name), printable(title_of(path)).capitalize()


def caption_of(artist: str, path: str, style: str, year: str = "") -> str:
    """ "Water lilies by Claude Monet, Impressionism, 1906"; a year that the title ends with is written once."""
    artist, title = artist_and_title(artist, path)
    title = title.removesuffix(f" {year}") if year else title
    words = f"{title or 'Painting'} by {artist or 'unknown'}", display_name(style), printable(year)
    return ", ".join(filter(None, words))


def safe_cell(text: str) -> str:
    """A cell of a CSV file that a spreadsheet takes for text, and not for a formula: with an apostrophe before it."""
    return "'" + text if re.match("'*[=+@-]", text) else text


def cell_text(cell: str) -> str:
    """The text of safe_cell()."""
    return cell[1:] if re.match("'+[=+@-]", cell) else cell


def count(number: int, noun: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def listed(names, most: int, separator: str = ", ") -> str:
    """ "a, b, c and 4 more", or "a; b; c; and 4 more", with at most `most` of the names."""
    more = f"{separator.strip(', ')} and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def display_name(name: str) -> str:
    """A class's folder name as captions write it."""
    return name.replace("Ukiyo_e", "Ukiyo-e").replace("_", " ")


def plain_name(name: str) -> str:
    """A style's name without case, accents, hyphens and underscores: "Ukiyo-e" and "ukiyo_e" are the same."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in letters if letter.isalnum())


def match_style(name: str, classes: list[str]) -> str | None:
    """The class of this name, or the only one that has the same plain name."""
    if name in classes:
        return name
    found = [each for each in classes if plain_name(each) == plain_name(name)]
    return found[0] if len(found) == 1 else None


def find_style(name: str, classes: list[str]) -> str:
    """The class that a user means. Raises UserError."""
    found = match_style(name, classes)
    if found is None:
        raise UserError(f"no style {name}: give one of {', '.join(classes)}")
    return found


def read_weights(texts: list[str], classes: list[str]) -> dict[str, float]:
    """["ukiyo-e=0.7", "Fauvism"] as {class: weight}, 1 where none is given. Raises UserError."""
    weights = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weight = float(number or 1)
        except ValueError:
            weight = -1.0
        if not 0 < weight < 1e6:
            raise UserError(f"{text}: the weight of a style must be a positive number")
        style = find_style(name, classes)
        weights[style] = weights.get(style, 0) + weight
    return weights


def read_metadata(path: Path) -> dict[str, dict]:
    """The rows of metadata.csv by their column `path`; empty where there is no such file. Raises DataError.

    Of several rows of one path the last counts. Cells other than paths are made printable().
    """
    if not os.path.lexists(path):
        return {}
    if not path.is_file():
        raise DataError(f"{path} is not a regular file: remove it, or replace it by a table with a column path")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)  # an open quote would swallow the rows after it
            rows = [{key: cell_text(cell or "") for key, cell in row.items() if key} for row in reader]
            return {row["path"]: {key: printable(cell) for key, cell in row.items()} for row in rows}
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} must be UTF-8 text with a column path ({type(error).__name__}: {error})") from None


def hidden_parts(hide: list[str]) -> list[str]:
    """The parts of file names that no figure shows: the lines of the text files among `hide`. Raises DataError."""
    parts = []
    for path in (Path(entry) for entry in hide if entry.endswith(".txt")):
        if not path.is_file():
            raise DataError(f"no file {path}: --hide takes genres, and text files with a part of a file name a line")
        parts += [line.strip() for line in path.read_text(errors="surrogateescape").splitlines() if line.strip()]
    return parts


def showable(genres, paths, hide: list[str]) -> np.ndarray:
    """Which paintings figures may show, a mask (N,): those without a hidden genre or a hidden part in their path."""
    parts = hidden_parts(hide)
    hidden = [genre in hide or any(part in path for part in parts) for genre, path in zip(genres, paths, strict=True)]
    return ~np.array(hidden, bool)
