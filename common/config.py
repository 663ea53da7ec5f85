"""Settings: config.json holds every default; files given with -c and then flags override it.

    SETTINGS = {
        "epochs": Setting(int, "[1, inf)", "passes over the training set"),
        "balance": Setting(str, ("none", "logit"), "how to treat class imbalance"),
    }
    config = configure("train", __doc__, SETTINGS, ("data", "run"), argv)

This module does not import torch, so that `make` can compare settings quickly.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple, get_args, get_origin

from common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# Settings that do not change what a training computes, so they may differ when it is resumed.
FREE_SETTINGS = ("data", "run", "device", "processes", "config", "restart", "hide", "tensorboard", "compile")
# Those that --help lists first.
COMMON = (
    "data",
    "run",
    "model",
    "target",
    "split",
    "checkpoint",
    "epochs",
    "batch_size",
    "lr",
    "codes",
    "method",
    "base",
)
COMMON += ("backbone", "image", "style", "styles", "from_style", "strength", "out", "source", "name", "to", "device")
LONGEST_DEFAULT = 40  # characters of a default in --help


class Setting(NamedTuple):
    """Type, allowed values and help text of one setting.

    type: str, int, float, bool, or list[...] of one of them. allowed: an interval such as "[0, 1)" for numbers, a
    tuple of choices for strings, or None.
    """

    type: type
    allowed: str | tuple[str, ...] | None
    help: str


SHARED = {
    "data": Setting(str, None, "folder of paintings: train/<Style>/* and test/<Style>/*, or <Style>/* (split 80/20)"),
    "run": Setting(str, None, "folder for weights, figures and facts.json"),
    "size": Setting(int, "[16, inf)", "side of the cached square images, in pixels"),
    "resize": Setting(str, ("squash", "crop"), "how an image becomes a square"),
    "device": Setting(str, None, "auto, cpu, cuda, cuda:1, mps, ..."),
    "seed": Setting(int, "[0, inf)", "random seed"),
    "split_seed": Setting(
        int, "[0, inf)", "random seed of the validation split, and of roots without train/ and test/"
    ),
    "validation": Setting(float, "(0, 1)", "fraction of the training paintings used for validation"),
    "min_images": Setting(int, "[1, inf)", "training paintings an artist or genre needs to count as a class"),
    "processes": Setting(int, "[0, inf)", "processes that decode images; 0: one per core"),
    "hide": Setting(list[str], None, "genres that no figure shows, and text files with further parts of file names"),
    "tensorboard": Setting(bool, None, "write each epoch's record for TensorBoard, too: requirements/tensorboard.txt"),
    "compile": Setting(bool, None, "compile the networks before training: a minute or more that pays on a GPU"),
    "restart": Setting(bool, None, "discard an unfinished training in the run folder instead of resuming it"),
}


def configure(
    script: str, doc: str, settings: dict[str, Setting], shared: tuple, argv=None, action: str = "", words=False
) -> argparse.Namespace:
    """Settings of one script: its section of config.json and the `shared` keys it uses; `action` is a subcommand.

    With `words`, what is no flag or its value, a folder for example, is in `words`, whether it comes first or last.

    Raises UserError for unknown keys, wrong types and values out of range; argparse exits for wrong flags.
    """
    settings = {key: SHARED[key] for key in shared} | settings
    layered = argparse.ArgumentParser(add_help=False)
    layered.add_argument("-c", "--config", action="append", metavar="FILE")
    sections = read_settings(layered.parse_known_args(argv)[0].config)
    defaults = {key: sections[key] if key in shared else sections[script][key] for key in settings}

    formatter = argparse.RawDescriptionHelpFormatter
    options = {"usage": "%(prog)s [flags]; --help has examples", "formatter_class": formatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(f"{script}.py {action}".strip(), description=doc, add_help=False, **options)
    first, own, rest = map(parser.add_argument_group, ("common flags", f"more flags of {script}.py", "shared flags"))
    layers = "settings that override config.json, e.g. settings/cpu.json"
    first.add_argument("-h", "--help", action="help", help="show this text")
    first.add_argument("-c", "--config", action="append", metavar="FILE", help=layers)
    for key, setting in settings.items():
        add_flag(first if key in COMMON else rest if key in shared else own, key, setting, defaults[key])
    if words:
        parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    config = parser.parse_intermixed_args(argv) if words else parser.parse_args(argv)
    for key, setting in settings.items():
        check(key, getattr(config, key), setting)
    return config


def add_flag(parser, key: str, setting: Setting, default) -> None:
    shown = (" ".join(map(str, default)) if isinstance(default, list) else str(default)) or "none"
    shown = shown if len(shown) <= LONGEST_DEFAULT else "see config.json"
    text = f"{setting.help} (default: {shown})".replace("%", "%%")
    options = {"default": default, "help": text}
    if setting.type is bool:
        options |= {"action": argparse.BooleanOptionalAction}
    elif isinstance(setting.allowed, tuple):
        options |= {"choices": setting.allowed}
    else:
        element = element_type(setting.type)
        options |= {"type": element, "metavar": element.__name__.upper()}
        options |= {"nargs": "*"} if get_origin(setting.type) is list else {}
    parser.add_argument(f"--{key.replace('_', '-')}", **options)


def element_type(kind: type) -> type:
    return get_args(kind)[0] if get_origin(kind) is list else kind


def check(key: str, value, setting: Setting) -> None:
    """Raise UserError if a value is not allowed; argparse has checked flags, but not values from files."""
    values = value if isinstance(value, list) else [value]
    if isinstance(setting.allowed, tuple) and value not in setting.allowed:
        raise UserError(f"{key} is {value!r}, but must be one of {', '.join(setting.allowed)}")
    if isinstance(setting.allowed, str):
        for number in values:
            if not in_interval(number, setting.allowed):
                raise UserError(f"{key} is {number}, but must be in {setting.allowed}: {setting.help}")


def in_interval(number: float, interval: str) -> bool:
    """Whether a number is inside an interval such as "[0, 1)" or "(0, inf)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number > low or (number == low and interval[0] == "[")
    below = number < high or (number == high and interval[-1] == "]")
    return math.isfinite(number) and above and below


def read_settings(files: list[str] | None = None) -> dict:
    """config.json, overridden by the given files: the settings of all scripts, by section."""
    settings = read_json(ROOT / "config.json")
    for path in files or []:
        override(settings, read_json(path), path)
    return settings


def read_json(path) -> dict:
    try:
        settings = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"no settings file {path}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold a JSON object")
    return settings


def override(base: dict, top: dict, path, section: str = "") -> None:
    """Replace the values of `base` by those of `top`, in place; keys and types must be known."""
    for key, value in top.items():
        if key not in base:
            raise UserError(f"{path} sets {section}{key}, which config.json does not have")
        if isinstance(base[key], dict) and isinstance(value, dict):
            override(base[key], value, path, f"{section}{key}.")
        elif same_type(value, base[key]):
            base[key] = type(base[key])(value)
        else:
            expected = type_name(base[key])
            raise UserError(f"{path} sets {section}{key} to {value!r}, but config.json has a {expected} there")


def same_type(value, default) -> bool:
    """Whether `value` may replace `default`. An int may stand for a float; elements of lists are compared too."""
    if isinstance(value, list) and isinstance(default, list):
        return all(same_type(element, default[0] if default else "") for element in value)
    return type(value) is type(default) or (isinstance(default, float) and type(value) is int)


def type_name(value) -> str:
    return f"list of {type_name(value[0] if value else '')}" if isinstance(value, list) else type(value).__name__
