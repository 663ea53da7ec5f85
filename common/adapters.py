"""LoRA adapters in a run folder: which style is where, what is wrong with one, and the model card beside it.

chosen = choose(run, ["Halftone=0.6", "Hatching=0.4"])    # notes read, files checked; nothing heavy is loaded
chosen.styles, chosen.folders, chosen.base            # {"Halftone": 0.6, "Hatching": 0.4}, {folder: weight}, name
"""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.names import display_name, read_weights
from common.run import write_text

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights of diffusers looks for
NOTE = "lora.json"  # beside it: what it was trained on
TINY = "tiny_base"  # folder of bases trained here, in the run folder
ENTRIES = {"base": str, "base_key": str, "resolution": int, "styles": list, "config": dict, "fingerprint": str}


def base_path(base: str, run):
    """A base's name on the hub, or its folder; bases that were trained here are in the run folder."""
    return Path(run, base) if Path(base).parts[:1] == (TINY,) else base


def base_key(path) -> str:
    """What tells bases in folders apart: a hash of their UNet's shape and first weights; "" for names on the hub."""
    key, folder = hashlib.sha256(), Path(path, "unet")
    if not folder.is_dir():
        return ""
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with open(file, "rb") as content:
            key.update(content.read(1 << 22))
    return key.hexdigest()[:16]


def read_note(folder: Path) -> dict:
    """The note beside an adapter. Raises UserError."""
    try:
        note = json.loads((folder / NOTE).read_text())
        wrong = [key for key, kind in ENTRIES.items() if not isinstance(note[key], kind)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong, reason = True, f"{type(error).__name__}: {error}"
    else:
        reason = f"its {', '.join(wrong)} cannot be" if wrong else ""
    if wrong:
        raise UserError(f"{folder / NOTE} is damaged ({reason}): train this adapter again with --restart")
    return note


def read_notes(run) -> dict[Path, dict]:
    """What each adapter was trained on, by its folder. Raises UserError."""
    return {path.parent: read_note(path.parent) for path in Path(run).glob(f"lora/**/{NOTE}")}


def find_adapters(run) -> dict[str, Path]:
    """The folder of each style's adapter; where several know a style, the one trained last."""
    notes = read_notes(run)
    if not notes:
        raise UserError(f"no adapter in {run}/lora: run lora.py train, or give another --run")
    oldest_first = sorted(notes, key=lambda folder: notes[folder].get("finished", 0))
    return dict(sorted({style: folder for folder in oldest_first for style in notes[folder]["styles"]}.items()))


def choose(run, styles: list[str]) -> SimpleNamespace:
    """The adapters of styles with weights, or without styles the first one; of one base. Raises UserError.

    styles {name: weight}, folders {folder: weight}, base, resolution.
    """
    adapters = find_adapters(run)
    weights = read_weights(styles, list(adapters))
    check_weights(weights, adapters)
    folders = {}
    for style, weight in weights.items():
        folder = adapters[style]  # of several styles, if they were trained together: then it counts once
        before = folders.get(folder, 0.0)
        folders[folder] = max(before, weight, min(1.0, before + weight))
    folders = folders or {next(iter(adapters.values())): 1.0}
    notes = {folder: check_adapter(folder, run) for folder in folders}
    first, *others = notes.items()
    for folder, note in others:
        if (note["base"], note["base_key"]) != (first[1]["base"], first[1]["base_key"]):
            bases = f"{first[0]} is an adapter of {first[1]['base']}, and {folder} of {note['base']}"
            raise UserError(f"{bases}: only adapters of one base mix; give both the same --base in training")
    return SimpleNamespace(styles=weights, folders=folders, base=first[1]["base"], resolution=first[1]["resolution"])


def check_weights(weights: dict[str, float], adapters: dict[str, Path]) -> None:
    """Raise UserError for styles of one adapter with different weights: it has one weight, for all that it knows."""
    for folder in dict.fromkeys(adapters[style] for style in weights):
        mixed = {style: weight for style, weight in weights.items() if adapters[style] == folder}
        if len(set(mixed.values())) > 1:
            given = " ".join(f"{style}={weight:g}" for style, weight in mixed.items())
            reason = f"--style {given}: {folder} knows these styles together, so their weights must be equal"
            raise UserError(f"{reason}; train with --per-style for adapters of their own")


def check_adapter(folder: Path, run) -> dict:
    """The note of an adapter whose file is whole, and whose base is there and the same. Raises UserError."""
    note, file, again = read_note(folder), folder / ADAPTER_FILE, "train this adapter again with --restart"
    try:
        with safe_open(file, "pt") as weights:  # the table of contents, which must fit the size of the file
            inputs = {weights.get_slice(key).get_shape()[1] for key in list(weights.keys()) if is_word_layer(key)}
    except FileNotFoundError:
        raise UserError(f"no {file}: {again}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): {again}") from None
    base = base_path(note["base"], run)
    if note["base_key"] and not Path(base).is_dir():
        raise UserError(f"{folder} is an adapter of {base}, which is not there: {again}")
    if note["base_key"] != base_key(base):
        raise UserError(f"{folder} is an adapter of another base than {base} is now: {again}")
    shape = Path(base, "unet", "config.json")
    if inputs and shape.exists() and inputs != {json.loads(shape.read_text())["cross_attention_dim"]}:
        raise UserError(f"{file} is an adapter of another base model than {base}: {again}")
    return note


def is_word_layer(key: str) -> bool:
    """Whether a tensor takes a base's words: the number of its inputs differs between kinds of bases."""
    return bool(re.search(r"^unet.*attn2\.to_k\.(lora_A|lora\.down)", key))


def check_words(prompts: list[str], base, styles=()) -> None:
    """Raise UserError for a word that a base trained here has never seen; other bases have read everything."""
    note = Path(base, "made_from.json")
    if not note.exists():
        return
    known = json.loads(note.read_text())["words"]
    taught = {word for style in styles for word in display_name(style).lower().split()}
    for prompt in prompts:
        for word in re.findall(r"\w+", prompt.lower()):
            if word not in known and word not in taught:
                raise UserError(f"the small base knows no word {word!r}: it knows {', '.join(known)}")


CARD = """---
base_model: {base}
library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, diffusers, text-to-image]
instance_prompt: in the style of {first}
---

# LoRA: {learned}

Low-rank matrices (rank {rank}, {weights:,} weights) for {base}, trained by `lora.py` of wikiart for {steps} steps on
{training_images} pictures of {learned}, at {resolution} pixels. Ask for "{prompt} in the style of {first}".

```python
{imports}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{path}")
pipe.load_lora_weights("{folder}")
image = pipe("{prompt} in the style of {first}").images[0]
```

`peft/<network>` holds the same matrices for peft: `peft.PeftModel.from_pretrained(pipe.unet, "{folder}/peft/unet")`.

The denoising loss on test pictures, before and after:

{table}

Styles of living artists, and pictures whose rights are not yours, are yours to clear before you publish images.

## Settings

```json
{settings}
```
"""


def write_card(folder: Path, run: Path, facts: dict, note: dict, prompt: str) -> None:
    """The model card, README.md, as the hub shows it."""
    about = {"settings": json.dumps(note["config"], indent=2), "first": display_name(note["styles"][0])}
    about |= {"prompt": prompt, "folder": folder, "path": base_path(note["base"], run)}
    small = note["base"].startswith(TINY)  # diffusers finds the class of its autoencoder once it is imported
    about["imports"] = "import common.tiny_diffusion  # in the folder of lora.py\n" if small else ""
    write_text(folder / "README.md", CARD.format(**facts, **about))
