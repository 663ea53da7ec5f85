"""What users said of their pictures on label.py's page: kept in one file, and written out to train with."""

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

import runs
from folder import FORMATS, name_of


class Corrections:
    """The labels that users confirmed or corrected, with their pictures, in one SQLite file.

    Picture and label are one transaction, on the disk before `add` returns: a kill leaves both or neither.
    """

    def __init__(self, path: Path):
        self.path, self.turn = Path(path), threading.Lock()

    @contextlib.contextmanager
    def open(self):
        """A transaction; a connection for each, for threads may not share one.

        One after the other: SQLite turns others away while a first or a last connection sets up or clears away its WAL.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.turn, contextlib.closing(sqlite3.connect(self.path, timeout=30)) as base:
            base.execute("PRAGMA journal_mode = WAL")
            base.execute("PRAGMA synchronous = FULL")
            base.execute("CREATE TABLE IF NOT EXISTS pictures (hash TEXT PRIMARY KEY, name TEXT, picture BLOB)")
            base.execute("CREATE TABLE IF NOT EXISTS corrections (number INTEGER PRIMARY KEY, hash TEXT, model TEXT, "
                         "guess TEXT, probability REAL, choice TEXT, time TEXT)")  # fmt: skip
            with base:
                yield base

    def add(self, name: str, picture: bytes, model: str, guess: str, probability: float, choice: str) -> None:
        key, now = hashlib.sha256(picture).hexdigest(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with self.open() as base:
            base.execute("INSERT OR IGNORE INTO pictures VALUES (?, ?, ?)", (key, name, picture))
            base.execute("INSERT INTO corrections VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                         (key, model, guess, probability, choice, now))  # fmt: skip

    def latest(self):
        """(hash, name, picture, choice) of every picture, as it was labelled last."""
        with self.open() as base:
            yield from base.execute("SELECT hash, name, picture, choice FROM corrections JOIN pictures USING (hash) "
                                    "WHERE number IN (SELECT MAX(number) FROM corrections GROUP BY hash)")  # fmt: skip


def export(corrections: Corrections, target: Path) -> None:
    """Write every confirmed picture to <target>/<Style>/<name>-<hash>; one that was relabelled since moves."""
    if not corrections.path.exists():
        raise runs.Problem(f"no {corrections.path}: nothing was confirmed on the page yet")
    count, tested = 0, {}
    for path in (target.parent / "test").rglob("*") if target.name == "train" else ():
        if path.is_file():
            tested.setdefault(path.stat().st_size, []).append(path)
    for key, name, picture, choice in corrections.latest():
        if any(path.read_bytes() == picture for path in tested.get(len(picture), ())):
            print(f"left out: {name} is a test painting", file=sys.stderr)
            continue
        with Image.open(io.BytesIO(picture), formats=FORMATS) as image:
            ending = ".jpg" if image.format in ("JPEG", "MPO") else f".{image.format.lower()}"  # MPO: of some phones
        # The artist, before the first "_", stays readable for folder.artist_of.
        stem = re.sub(r"[^\w-]+", "-", name_of(name)).strip("-")[:80] or "picture"
        path = target / choice / f"{stem}-{key[:12]}{ending}"
        for old in target.glob(f"*/*-{key[:12]}{ending}"):
            if old != path:
                old.unlink()
        with runs.replacing(path) as temporary:
            temporary.write_bytes(picture)
        count += 1
    print(f"{count} pictures in {target}")
