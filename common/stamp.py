"""Write what a stage of `make` depends on into a text file, the stage's stamp, but only if it has changed.

    python -m common.stamp runs/demo/stamps/mlp train.py -c settings/mlp.json --data data/demo --run runs/demo/mlp
    python -m common.stamp runs/demo/stamps/bases --code common/painter.py    # of files, without settings

The arguments after the file are the stage's command. Its stamp lists the settings that the script uses, its flags, and
hashes of the code that determines results. Comments, docstrings, help texts, and settings that do not change results
are left out, so changing them repeats no training. Data and checkpoints are prerequisites of their own in the Makefile.
This module does not import torch: `make` runs it for every stage.
"""

import argparse
import ast
import hashlib
import json
import os
import shlex
import sys
import time
from functools import cache
from pathlib import Path

from common.config import FREE_SETTINGS, ROOT, read_settings
from common.errors import UserError
from common.files import write_text

CLOCKS_DIFFER = 60e9  # nanoseconds, at most, between this machine and a file server
# The modules of common/ that determine results. Those OF_SOME scripts count only where a script itself imports them.
# common/run.py is left out on purpose, although autocast and fit_batch_size are there: most of its changes are to
# messages and checks, and each would repeat every training. After a change that counts, remove stamps/ of the run.
SHARED_BY_ALL = ("crops", "images", "layers", "losses", "metrics", "names", "optim", "splits")
OF_SOME = ("adapters", "backbones", "baselines", "benchmarks", "codes", "descriptors", "diffusion", "painter")
OF_SOME += ("reconstruction", "repaint", "tiny_diffusion")


def main(argv: list[str]) -> None:
    if argv[0] == "--clock":
        return mend_times(map(Path, argv[1:]))
    path = Path(argv[0])
    try:
        text = stamp_of_files(argv[2:]) if argv[1] == "--code" else stamp(argv[1:])
        if not path.exists() or path.read_text() != text:
            write_text(path, text)
    except (UserError, OSError) as error:
        sys.exit(f"stamp: {error}")


def mend_times(paths) -> None:
    """Where the clock was set back, set the times of files back as well: make would take what is new for old.

    paths: files, or folders of them. All times are moved by as much as the newest one is ahead.
    """
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    times = {file: file.stat().st_mtime_ns for file in files if file.is_file() and not file.is_symlink()}
    ahead = max(times.values(), default=0) - time.time_ns()
    if ahead > CLOCKS_DIFFER:
        for file, changed in times.items():
            os.utime(file, ns=(changed - ahead, changed - ahead))
        print(f"stamp: the clock was set back, and so are the times of {len(times)} files", file=sys.stderr)


def stamp(command: list[str]) -> str:
    """The stamp of a command such as ["train.py", "-c", "settings/mlp.json", "--data", "data/demo"]."""
    script, *argv = command
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append")
    for key in ("data", "run", "device", "processes"):
        parser.add_argument(f"--{key}")
    options, flags = parser.parse_known_args(argv)
    tree = ast.parse((ROOT / script).read_text())
    sections = read_settings(options.config)
    shared = shared_settings(tree)
    is_training = "restart" in shared  # of other scripts, the figures are results, too
    free = FREE_SETTINGS if is_training else set(FREE_SETTINGS) - {"hide"}
    settings = {key: sections[key] for key in shared if key not in free}
    settings |= sections[Path(script).stem]
    hashes = {script: code_hash(tree)} | module_hashes(tree)
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    lines += [f"{name} {hashes[name]}" for name in sorted(hashes)]
    return "\n".join([shlex.join([script, *flags]), *lines]) + "\n"


def stamp_of_files(names: list[str]) -> str:
    """The stamp of code that no script runs: hashes of these files alone, common/painter.py for example."""
    return "".join(f"{name} {code_hash(ast.parse((ROOT / name).read_text()))}\n" for name in names)


def shared_settings(tree) -> tuple[str, ...]:
    """The value of SHARED, which every script assigns, and perhaps extends, at its top level."""
    assigned = [node.value for node in tree.body if assigned_name(node) == "SHARED"]
    return sum(map(ast.literal_eval, assigned), ())


def module_hashes(tree, names: tuple[str, ...] = SHARED_BY_ALL + OF_SOME) -> dict[str, str]:
    """Hashes of wikiart.py and of the modules of common/ with these names that a file imports, directly or not."""
    hashes = {}
    for module in imported_modules(tree):
        if module == "wikiart" or module.removeprefix("common.") in names:
            hashes |= hashes_of(module)
    return hashes


@cache
def hashes_of(module: str) -> dict[str, str]:
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    return module_hashes(tree, SHARED_BY_ALL) | {module: code_hash(tree)}


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            yield from (f"common.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def code_hash(tree) -> str:
    """A hash of code without comments, docstrings and SETTINGS, whose values are in the stamp. Changes `tree`."""
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [part for part in node.body if not is_string(part) and assigned_name(part) != "SETTINGS"]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def is_string(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def assigned_name(node) -> str:
    """The name that an assignment assigns; "" for other statements."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return getattr(targets[0], "id", "")


if __name__ == "__main__":
    main(sys.argv[1:])
