"""Codes of paintings: the files codes/<source>.npz of a run folder, which cluster.py and embed.py write.

Arrays of a file, for each <split> of train and test: <split> (N, D) the codes, <split>_labels (N,) the styles' numbers,
<split>_artists and <split>_paths (N,); `classes`, the styles' names; `made_from`, a text that names the weights,
settings and paintings behind the codes.
"""

import zipfile
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.run import atomic_write

SPLITS = ("train", "test")


def codes_path(run, source: str) -> Path:
    return Path(run) / "codes" / f"{source}.npz"


def code_files(run) -> list[Path]:
    """The files of codes of a run folder, without hidden ones, which a killed program has left."""
    return sorted((Path(run) / "codes").glob("[!.]*.npz"))


def write_codes(path: Path, codes: dict, sets: dict, made_from: str) -> None:
    """Write codes {split: (N, D)} of data sets {split: WikiArt}."""
    table = {"classes": np.array(sets["train"].classes), "made_from": made_from}
    for split in SPLITS:
        data = sets[split]
        table |= {split: codes[split], f"{split}_labels": data.labels.numpy()}
        table |= {f"{split}_artists": data.artists, f"{split}_paths": data.paths}
    with atomic_write(path) as temporary:
        np.savez(temporary, **table)


def made_from(path: Path) -> str:
    """What a file of codes was made from, without reading the codes; "" if it is something else."""
    try:
        with np.load(path) as file:
            return str(file["made_from"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return ""


def read_codes(path: Path) -> dict:
    """All arrays of a file of codes. Raises UserError if it is something else."""
    try:
        with np.load(path) as file:
            table = dict(file)
    except (OSError, ValueError, zipfile.BadZipFile):
        table = {}
    parts = {f"{split}{part}" for split in SPLITS for part in ("", "_labels", "_artists", "_paths")}
    if not {"classes", "made_from", *parts} <= table.keys():
        raise UserError(f"{path} is not a file of codes: remove it, and run the command again")
    return table
