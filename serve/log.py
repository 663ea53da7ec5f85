"""The log of `label.py serve`, standard error, which strangers must not fill.

Left alone, Gradio and uvicorn log a traceback for each request that fails, together with the text that the request has:
a file whose path has 50 MB adds 50 MB to the log.
"""

import contextlib
import io
import os
import sys
import threading
import time
import traceback
from pathlib import Path

LINE = 500  # characters
LINES, PERIOD = 100, 3600  # lines that are written within so many seconds


def one_line(text: str) -> str:
    """Text that others have written, in one line that a terminal shows and does not obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:LINE])


def log_failure(where: str, error: Exception) -> None:
    """A line of the log: which request, what was raised, and at which line of code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    print(one_line(f"{where[:200]}: {type(error).__name__} at {place}: {str(error)[:LINE]}"), file=sys.stderr)


class BoundedStream(io.TextIOBase):
    """Passes lines of at most LINE characters on, LINES in a PERIOD; the others are counted, and reported once.

    target: a text stream. Where it cannot be written, as on a full disk, lines are dropped.
    """

    def __init__(self, target):
        self.target, self.lock, self.rest = target, threading.Lock(), ""
        self.start, self.count = time.monotonic(), 0

    def write(self, text: str) -> int:
        with self.lock:
            *lines, self.rest = (self.rest + text).split("\n")
            self.rest = self.rest[:LINE]
            with contextlib.suppress(OSError):
                for line in lines:
                    self.put(line)
                self.target.flush()
        return len(text)

    def put(self, line: str) -> None:
        if time.monotonic() - self.start > PERIOD:
            if self.count > LINES:
                self.target.write(f"{self.count - LINES} lines of the log were left out\n")
            self.start, self.count = time.monotonic(), 0
        self.count += 1
        if self.count <= LINES:
            self.target.write(one_line(line) + "\n")
        elif self.count == LINES + 1:
            self.target.write(f"{LINES} lines within {PERIOD // 60} minutes: the next ones are left out, and counted\n")


@contextlib.contextmanager
def bounded_stderr():
    """Within, all that is written to standard error passes a BoundedStream: also the lines of libtiff, written in C."""
    sys.stderr.flush()
    before, whole, (reader, writer) = sys.stderr, os.dup(2), os.pipe()
    os.set_blocking(writer, False)  # C code that waited for the thread below, with the GIL, would wait for ever
    os.dup2(writer, 2)
    os.close(writer)
    sys.stderr = BoundedStream(open(whole, "w", errors="replace"))
    thread = threading.Thread(target=copy_lines, args=(reader, sys.stderr), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(whole, 2)  # the pipe's last writer: its reader ends
        thread.join()
        sys.stderr = before


def copy_lines(reader: int, target: BoundedStream) -> None:
    with open(reader, errors="replace") as source:
        while piece := source.readline(LINE):
            target.write(piece)
