"""Write what a stage of `make` depends on into a text file, the stage's stamp, but only if it has changed.

    python -m common.stamp runs/demo/stamps/mlp train.py -c settings/mlp.json --data data/demo --run runs/demo/mlp
    python -m common.stamp runs/demo/stamps/bases --code common.tiny_diffusion.train_bases    # of one function

The arguments after the file are the stage's command. Its stamp lists the settings that the script uses, its flags, and
hashes of the code that determines results: of the script, and of each function, class and constant of wikiart.py and
common/ that it uses, directly or through others. Comments, docstrings, help texts, and settings that do not change
results are left out, so changing them repeats no training. Data and checkpoints are prerequisites of their own in the
Makefile. This module does not import torch: `make` runs it for every stage.
"""

import argparse
import ast
import hashlib
import json
import os
import shlex
import sys
import time
from collections import defaultdict
from functools import cache
from pathlib import Path

from common.config import FREE_SETTINGS, ROOT, read_settings
from common.errors import UserError
from common.files import write_text

CLOCKS_DIFFER = 60e9  # nanoseconds, at most, between this machine and a file server
# Modules of common/ that determine no results: common/figures.py is a prerequisite of what is drawn, in the Makefile.
LEFT_OUT = ("config", "errors", "figures", "files", "packages", "stamp")
# What counts of common/run.py, with what these use; the rest is devices, progress, checks, locks and files.
OF_RUN = ("autocast", "average_gradients", "data_parallel", "fit_batch_size", "full_precision", "half_precision")
OF_RUN += ("local_share", "sum_over_processes")


def main(argv: list[str]) -> None:
    if argv[0] == "--clock":
        return mend_times(map(Path, argv[1:]))
    path = Path(argv[0])
    try:
        text = listed(code_hashes(argv[2])) if argv[1] == "--code" else stamp(argv[1:])
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
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join([shlex.join([script, *flags]), *lines]) + "\n" + listed(code_hashes(script))


def listed(hashes: dict[str, str]) -> str:
    return "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))


def shared_settings(tree) -> tuple[str, ...]:
    """The value of SHARED, which every script assigns, and perhaps extends, at its top level."""
    assigned = [node.value for node in tree.body if assigned_name(node) == "SHARED"]
    return sum(map(ast.literal_eval, assigned), ())


# Code -----------------------------------------------------------------------------------------------------------------


class Module:
    """The definitions of a Python file by name, and what it imports from this project.

    definitions: {name: statements}; "" stands for statements that define nothing. imports: {name: (module, name)}, with
    "" for a module as a whole. All imports are `from ... import ...`: tests/test_make.py.
    """

    def __init__(self, name: str):
        tree = ast.parse(path_of(name).read_text())
        self.definitions, self.imports = defaultdict(list), {}
        for node in filter(lambda node: isinstance(node, ast.ImportFrom), ast.walk(tree)):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found = (submodule, "") if path_of(submodule).exists() else (node.module, alias.name)
                self.imports[alias.asname or alias.name] = found
        self.body = [node for node in stripped(tree).body if not isinstance(node, ast.Import | ast.ImportFrom)]
        for node in self.body:
            for defined in defined_names(node):
                self.definitions[defined].append(node)

    def uses(self, nodes: list, own: str):
        """Yield (module, name) of all that statements of this module, whose name is `own`, refer to."""
        for node in (part for statement in nodes for part in ast.walk(statement)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = self.imports.get(node.value.id, ("", "-"))
                if not name:
                    yield module, node.attr
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                yield self.imports.get(node.id, (own, node.id))


def defined_names(node) -> list[str]:
    """The names that a statement at the top level of a file defines, in its branches and loops too; or [""]."""
    if hasattr(node, "name"):
        return [node.name]
    parts = list(ast.walk(node))
    names = [part.name for part in parts if isinstance(part, ast.FunctionDef | ast.ClassDef)]
    names += [part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
    return names or [""]


@cache
def module(name: str) -> Module:
    return Module(name)


def path_of(name: str) -> Path:
    """The file of a module, "common.names" for example."""
    return ROOT / f"{name.replace('.', '/')}.py"


@cache
def code_hashes(root: str) -> dict[str, str]:
    """Hashes of all code that a script, "train.py", or a definition, "common.names.count", uses: {name: hash}.

    Names are those of scripts and definitions; a script counts as a whole.
    """
    own, _, name = root.rpartition(".")
    is_script = name == "py"
    hashes = {root: current_hash(root)} if is_script else {}
    waiting = (
        [used for used in module(own).uses(module(own).body, own) if counts(*used)] if is_script else [(own, name)]
    )
    while waiting:
        home, name = waiting.pop()
        if f"{home}.{name}" in hashes or (is_script and home == own):
            continue
        if name in module(home).imports:
            used = [module(home).imports[name]]
        elif name in module(home).definitions:
            nodes = module(home).definitions[name]
            hashes[f"{home}.{name}"] = hash_of(nodes)
            used = module(home).uses(nodes, home)
        else:  # a local variable, or a name of Python
            continue
        waiting += [other for other in (*used, (home, "")) if counts(*other) or other[0] == home == "common.run"]
    return hashes


def code_key(*roots: str) -> str:
    """One hash of all code that scripts or definitions use, for the keys of caches."""
    return hashlib.sha256("".join(listed(code_hashes(root)) for root in roots).encode()).hexdigest()[:12]


def counts(home: str, name: str) -> bool:
    """Whether a definition of a module can change results, and is of this project."""
    if not path_of(home).exists():
        return False
    return name in OF_RUN if home == "common.run" else home.removeprefix("common.") not in LEFT_OUT


def current_hash(name: str) -> str:
    """The hash of a script, or of a definition of a module; "" if there is none."""
    home, _, definition = name.rpartition(".")
    if not path_of(home).exists():
        return ""
    nodes = module(home).body if definition == "py" else module(home).definitions.get(definition, [])
    return hash_of(nodes)


def hash_of(nodes: list) -> str:
    return hashlib.sha256("\n".join(map(ast.unparse, nodes)).encode()).hexdigest()[:12] if nodes else ""


def stripped(tree):
    """Code without docstrings, SETTINGS, whose values are in the stamp, and the guard of main(). Changes `tree`."""
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            kept = [part for part in node.body if not (is_string(part) or is_guard(part))]
            kept = [part for part in kept if assigned_name(part) != "SETTINGS"]
            node.body = kept or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def is_guard(node) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_string(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def assigned_name(node) -> str:
    """The name that an assignment assigns; "" for other statements."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return getattr(targets[0], "id", "")


if __name__ == "__main__":
    main(sys.argv[1:])
