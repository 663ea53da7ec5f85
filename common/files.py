"""Files that are complete or absent."""

import contextlib
import fcntl
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path` that replaces it when the block succeeds, and is removed when it fails.

    A reader never sees half a file, and a full disk or `kill -9` leaves the old one as it was. What a killed program
    leaves, `.<name>.new`, is overwritten when the same file is written again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new{path.suffix}")
    with lock_file(temporary):
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # or a power cut could leave the new name with no content
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def lock_file(path: Path):
    """An empty file of this name, in this block ours alone: wait for other programs, which may rename or remove it."""
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_at(path, file):
                file.truncate(0)
                yield
                return


def is_at(path: Path, file) -> bool:
    """Whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def write_text(path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text)
