"""Labels that users confirm or correct on the page: kept in an SQLite file, and exported as a folder to train with."""

import contextlib
import hashlib
import io
import re
import sqlite3
import sys
import threading
import time
from pathlib import Path

from PIL import Image

from common.errors import UserError
from common.images import FORMATS
from common.names import count, file_part, stem_of
from common.run import atomic_write
from serve.log import one_line

SETUP = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS pictures (hash TEXT PRIMARY KEY, name TEXT, picture BLOB);
CREATE TABLE IF NOT EXISTS corrections (
    number INTEGER PRIMARY KEY, hash TEXT, model TEXT, guess TEXT, probability REAL, choice TEXT, time TEXT
);
"""


# Choices that are no class, with their words on the page; brackets, because folders of styles are not called so.
NO_CLASS = {"(none)": "None of these", "(no painting)": "Not a painting"}


class Corrections:
    """Confirmed labels and their images, in one SQLite file. An image and its label are one transaction."""

    def __init__(self, path: Path):
        self.path, self.lock = Path(path), threading.Lock()

    @contextlib.contextmanager
    def transaction(self):
        """A transaction, one at a time: SQLite refuses others while a connection creates or removes its log."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.lock, contextlib.closing(sqlite3.connect(self.path, timeout=30)) as database:
            database.executescript(SETUP)
            with database:
                yield database

    def add(self, name: str, image: bytes, model: str, guess: str, probability: float, choice: str) -> int:
        """Save an image file and its label; they are on the disk when this returns. Returns the label's number."""
        key, now = hashlib.sha256(image).hexdigest(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = (key, model, guess, probability, choice, now)
        with self.transaction() as database:
            database.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?, ?)", (key, name, image))
            return database.execute("INSERT INTO corrections VALUES (NULL, ?, ?, ?, ?, ?, ?)", row).lastrowid

    def remove(self, number: int) -> None:
        """Take a label back, and its image where no other label is about it."""
        with self.transaction() as database:
            database.execute("DELETE FROM corrections WHERE number = ?", (number,))
            database.execute("DELETE FROM pictures WHERE hash NOT IN (SELECT hash FROM corrections)")

    def latest(self):
        """(hash, name, image, choice) of every image, with the label that was given last. Raises UserError."""
        try:
            with self.transaction() as database:
                yield from database.execute(
                    "SELECT hash, name, picture, choice FROM corrections JOIN pictures USING (hash) "
                    "WHERE number IN (SELECT MAX(number) FROM corrections GROUP BY hash)"
                )
        except sqlite3.Error as error:
            raise UserError(f"could not read {self.path}: {error}") from None


def export(corrections: Corrections, target: Path) -> None:
    """Write every image with a label to <target>/<class>/<name>-<hash>; one whose label has changed since moves.

    Images that are of none of the classes, or no paintings, are left out. If `target` is a root's folder train/, images
    of its test paintings are left out, too.
    """
    if not corrections.path.exists():
        raise UserError(f"no {corrections.path}: no label was confirmed on the page yet")
    written, of_no_class, test_files = 0, 0, {}  # test_files: files of test/ by their size
    for path in (target.parent / "test").rglob("*") if target.name == "train" else ():
        if path.is_file():
            test_files.setdefault(path.stat().st_size, []).append(path)
    for key, name, data, choice in corrections.latest():
        if any(path.read_bytes() == data for path in test_files.get(len(data), ())):
            print(f"left out: {one_line(name)} is a test painting", file=sys.stderr)
            continue
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            ending = ".jpg" if image.format in ("JPEG", "MPO") else f".{image.format.lower()}"  # MPO: of some phones
        # The artist, before the first "_", stays readable for artist_of().
        stem = re.sub(r"[^\w-]+", "-", stem_of(name)).strip("-")[:80] or "picture"
        path = target / file_part(choice) / f"{stem}-{key[:12]}{ending}"
        for outdated in target.glob(f"*/*-{key[:12]}{ending}"):
            if outdated != path:
                outdated.unlink()
        if choice in NO_CLASS:
            of_no_class += 1
            continue
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
        written += 1
    if of_no_class:
        print(f"left out: {of_no_class} that are of none of the styles, or no paintings")
    print(f"{count(written, 'image')} in {target}")
