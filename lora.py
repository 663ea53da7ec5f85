"""Fine-tune a pre-trained text-to-image model on styles with LoRA (Hu et al. 2021), and paint with it.

    python lora.py train --base stable-diffusion-v1-5/stable-diffusion-v1-5 --per-style --style Ukiyo_e Cubism
    python lora.py paint "a harbour at dusk" --style Ukiyo_e --seed 3
    python lora.py grid                                     # styles x prompts, without and with LoRA
    python lora.py compare                                  # image to image, beside style_transfer.py, on the demo
    python lora.py train --help                             # each has flags and examples of its own

Needs diffusers: pip install -r requirements/lora.txt. Where several adapters know a style, the one trained last counts.
"""

import json
import re
import sys
import time
from functools import partial
from pathlib import Path

import common.packages  # noqa: F401

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from common import figures
from common.config import Setting, configure
from common.errors import UserError
from common.images import read_image
from common.metrics import psnr, ssim
from common.names import display_name, file_part, find_style, fit_name
from common.optim import FUSED, linear_warmup_decay
from common.repaint import Repainter, check_model, common_scenes
from common.run import (
    Steps,
    Timer,
    add_facts,
    atomic_write,
    change_facts,
    checkpoint_path,
    claim,
    fixed_settings,
    interruptible,
    join_processes,
    leave_processes,
    load_checkpoint,
    local_share,
    pick_device,
    rank,
    read_facts,
    resume,
    run_script,
    save_epoch,
    sum_over_processes,
    to_device,
    world_size,
    write_text,
)
from wikiart import BalancedSampler, Classifier, WikiArt, build_model

try:
    from safetensors import SafetensorError

    from common import adapters, diffusion, tiny_diffusion
except ModuleNotFoundError as error:
    if error.name.startswith("common"):
        raise
    diffusion = None  # main says what to install; --help works without

SETTINGS = {
    "base": Setting(str, None, "Hugging Face name or diffusers folder of SD 1.x, 2.x or SDXL; tiny: trained here"),
    "resolution": Setting(int, "[0, inf)", "side of the images, a multiple of 8 pixels; 0: what the base is made for"),
    "style": Setting(list[str], None, "styles; none: all (paint: the first); paint mixes, Ukiyo_e=0.6 Cubism=0.4"),
    "per_style": Setting(bool, None, "one adapter for each style instead of one for all"),
    "pictures": Setting(int, "[0, inf)", "training pictures of each style, at most; 0: all"),
    "rank": Setting(int, "[1, inf)", "rank of the LoRA matrices; alpha equals it"),
    "targets": Setting(list[str], None, "layers of the UNet to adapt, by the end of their names"),
    "text_encoder": Setting(bool, None, "adapt the text encoders, too"),
    "epochs": Setting(int, "[1, inf)", "passes of --per-class images of each style"),
    "per_class": Setting(int, "[0, inf)", "images of each style per epoch; 0: the mean number of its paintings"),
    "batch_size": Setting(int, "[1, inf)", "images per step, over all processes"),
    "accumulate": Setting(int, "[1, inf)", "parts in which a process computes its share of a batch, to save memory"),
    "checkpointing": Setting(bool, None, "gradient checkpointing: slower, but needs less memory"),
    "lr": Setting(float, "(0, inf)", "peak learning rate of AdamW"),
    "image": Setting(str, None, "image to start from instead of noise"),
    "strength": Setting(float, "(0, 1]", "fraction of the noise that is added to --image"),
    "negative": Setting(str, None, "what the image should not show"),
    "out": Setting(str, None, "folder for the images"),
    "steps": Setting(int, "[1, inf)", "sampling steps"),
    "guidance": Setting(float, "[0, inf)", "scale of classifier-free guidance; up to 1: none"),
    "prompts": Setting(list[str], None, "prompts of the grid; the first is also sampled after each epoch"),
}
SAMPLING = ("resolution", "batch_size", "steps", "guidance")
LEARNING = ("base", "per_style", "pictures", "rank", "targets", "text_encoder", "epochs", "per_class", "accumulate")
DATA = ("data", "size", "resize", "split_seed", "processes")
SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes", "restart", "tensorboard")
# Of each subcommand: its settings, and those it shares with other scripts.
ACTIONS = {
    "train": (("style", *SAMPLING, *LEARNING, "checkpointing", "lr", "prompts"), SHARED),
    "paint": (("style", *SAMPLING, "image", "strength", "negative", "out"), ("run", "device", "seed")),
    "grid": (("style", *SAMPLING, "negative", "prompts"), ("run", "device", "seed")),
    "compare": (("style", *SAMPLING), (*DATA, "run", "device", "seed")),
}
# Flags that do not change an adapter; its own styles are compared in place of --style, see fit_adapter
FREE_SETTINGS = ("style", "per_style", "accumulate", "checkpointing", "steps", "guidance", "prompts")
JUDGES = ("judge_style", "judge_genre")  # folders in the run folder: classifiers of the style and of the genre
EVAL_IMAGES = 24  # test paintings of each style for the held-out loss, at most
IMAGES_PER_PROMPT = 16  # for each style in the grid's hit rates
STRENGTHS = (0.3, 0.5, 0.7)  # of image to image, and scenes for each style, in the comparison
COMPARED = 16


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    actions = {"train": train, "paint": paint, "grid": grid, "compare": compare}
    action = argv[0] if argv else ""
    if action in ("-h", "--help"):
        print(f"{__doc__}\nsubcommands: {', '.join(actions)}")
        sys.exit(0)
    if action not in actions:
        raise UserError(f"give an action first: {', '.join(actions)}")
    rest = argv[1:]
    flags = next((number for number, word in enumerate(rest) if word.startswith("-")), len(rest))
    own, shared = ACTIONS[action]
    settings = {key: setting for key, setting in SETTINGS.items() if key in own}
    config = configure("lora", actions[action].__doc__, settings, shared, rest[flags:], action)
    if diffusion is None:
        raise UserError("diffusers, transformers or peft is missing: pip install -r requirements/lora.txt")
    prompts = rest[:flags]
    if action != "paint" and prompts:
        raise UserError(f"{action} takes no prompts, but was given {prompts[0]!r}")
    if config.resolution % 8 or not getattr(config, "prompts", True):
        raise UserError("--resolution must be a multiple of 8, and --prompts needs at least one")
    try:
        actions[action](config, *prompts)
    except SafetensorError as error:  # hides "no space left"
        raise UserError(f"could not write into {config.run}: is the disk full? ({error})") from None
    except (torch.OutOfMemoryError, MemoryError):
        advice = "lower --resolution or --batch-size; in training add --checkpointing, raise --accumulate"
        raise UserError(f"out of memory: {advice}") from None


# Training -------------------------------------------------------------------------------------------------------------


def train(config) -> None:
    """Train one adapter for all styles, or one for each.

    python lora.py train --base stable-diffusion-v1-5/stable-diffusion-v1-5 --per-style --style Ukiyo_e Cubism
    python lora.py train --base stabilityai/stable-diffusion-xl-base-1.0 --per-style    # all styles
    python lora.py train -c settings/tiny.json --style Hatching    # a small base, trained here: no GPU, no network
    torchrun --nproc-per-node=2 -- lora.py train ...    # several GPUs; `accelerate launch` works, too

    Writes into the run folder: lora/ (lora/<Style>/ with --per-style) with the adapter, which `load_lora_weights` of
    diffusers reads, peft/ for peft, a model card and samples of each epoch; lora.jsonl, more/lora_curve.png, lora.md
    (losses on test paintings by style), facts.json, and tiny_base/ with --base tiny. An interrupted training resumes
    after its last finished epoch (lora.partial.pt) when the same command is run again; --restart starts anew.
    """
    device, run = join_processes(pick_device(config.device)), Path(config.run)
    lock = claim(run, "lora") if rank() == 0 else None
    data, test = load_paintings(config)
    styles = list(dict.fromkeys(find_style(style, data.classes) for style in config.style)) or data.classes
    if config.batch_size % (world_size() * config.accumulate):
        raise UserError(f"--batch-size must be a multiple of {world_size()} processes times --accumulate")
    training = data.subset(np.isin(data.styles, styles))
    if config.per_style and config.restart and rank() == 0:  # or an interrupted restart would find old ones finished
        for style in styles:
            (run / "lora" / style / adapters.NOTE).unlink(missing_ok=True)
    base = config.base
    for name in styles if config.per_style else [""]:
        chosen = [name] if name else styles
        config.base = small_base(chosen, config, device) if base == "tiny" else base
        adapters.check_words(config.prompts, adapters.base_path(config.base, run), chosen)
        fit_adapter(name, chosen, training, test, config, device)
    if lock:
        lock.close()
    leave_processes()


def small_base(styles: list[str], config, device) -> str:
    """The small base that has seen none of these styles; trained where it is not there yet."""
    facts = tiny_diffusion.make_base(Path(config.run, adapters.TINY), styles, device, config.processes)
    add_facts(config.run, "lora", facts, merge=True)
    return f"{adapters.TINY}/{tiny_diffusion.base_name(styles)}"


def load_paintings(config) -> tuple[WikiArt, WikiArt]:
    """At most --pictures training paintings of each style, and at most EVAL_IMAGES test paintings.

    Scenes that exist in every style, as in the demo, come first: with them, only the style is new to a base that knows
    the scene.
    """
    options = {key: getattr(config, key) for key in ("size", "resize", "split_seed", "processes")}
    data = WikiArt(config.data, "train", **options)
    test = WikiArt(config.data, "test", classes=data.classes, **options)
    everywhere = np.isin(np.arange(len(data)), common_scenes(data))
    order = np.lexsort([np.random.default_rng(config.seed).permutation(len(data)), ~everywhere])
    data = first_of_each(data, order, config.pictures or len(data))
    return data, first_of_each(test, np.arange(len(test)), EVAL_IMAGES)


def first_of_each(data: WikiArt, order, count: int) -> WikiArt:
    """The first `count` paintings of each style in this order (N,)."""
    rows = [order[data.styles[order] == style][:count] for style in data.classes]
    return data.subset(np.sort(np.concatenate(rows)))


def fit_adapter(name: str, styles: list[str], data: WikiArt, test: WikiArt, config, device) -> None:
    """Train one adapter for these styles; `name` is the style with --per-style, else ""."""
    run, stem = Path(config.run), f"lora_{name}" if name else "lora"
    folder = run / "lora" / name
    settings = {key: value for key, value in fixed_settings(config).items() if key not in FREE_SETTINGS}
    settings["styles"] = styles
    state = {"model": "LoRA", "config": settings, "fingerprint": data.fingerprint, "history": []}
    if name and not config.restart and is_finished(folder, run / f"{stem}.partial.pt", state):
        return

    # Data
    base = adapters.base_path(config.base, run)
    pipe = diffusion.load(base, device)
    side = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    cache = run / "lora" / "latents.pt"
    latents, test_latents = diffusion.cached_latents(pipe, (data, test), side, cache, config.processes)
    learned = np.isin(data.styles, styles)
    data, latents = data.subset(learned), latents[torch.from_numpy(learned)]
    sampler = BalancedSampler(data.labels, "resample", config.per_class, config.seed)
    steps = config.epochs * (len(sampler) // config.batch_size)
    if not steps or not np.isin(test.styles, styles).any():
        advice = "raise --per-class, lower --batch-size, or add test paintings"
        raise UserError(f"too few images of {', '.join(styles)}: {advice}")

    # Adapter and optimizer
    adapter = diffusion.Adapter(pipe, config)
    optimizer = torch.optim.AdamW(adapter.parameters(), config.lr, fused=device.type in FUSED)
    lr_schedule = linear_warmup_decay(optimizer, steps, warmup=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=diffusion.precision(device) == torch.float16)
    parts = {"adapter": adapter, "optimizer": optimizer, "lr_schedule": lr_schedule, "scaler": scaler}
    state = resume(config, stem, state, parts)
    weights = sum(parameter.numel() for parameter in adapter.parameters())
    if rank() == 0:
        print(f"{', '.join(styles)}: {weights / 1e6:.2f} million LoRA weights on {device}, {side} px")

    # Train, evaluate, save
    with adapter.disabled():
        evaluation = Evaluation(pipe, test, test_latents, styles, config)
    with interruptible(state):
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            timer = Timer()
            loss = train_epoch(adapter, data, latents, sampler, parts, epoch, config)
            if rank() == 0:
                record = {"epoch": epoch, "loss": loss, **timer.seconds(), "heldout_loss": evaluation.learned_loss()}
                plot_samples(folder / f"step-{epoch * steps // config.epochs:06}.png", pipe, styles, side, config)
                scores = f"loss {loss:.4f}, on test paintings {record['heldout_loss']:.4f}"
                save_epoch(config, stem, state, record, parts, scores)
    if rank() == 0:
        adapter.save(folder)
        write_example(folder / "example.png", data, side)
        facts = {"base": config.base, "base_key": adapters.base_key(base), "resolution": side, "weights": weights}
        facts["learned"] = ", ".join(map(display_name, styles))
        facts |= {"rank": config.rank, "steps": steps, "training_images": len(data)} | evaluation.facts()
        report(name, state, facts, config)
        before, after = facts["heldout_loss_before"], facts["heldout_loss_after"]
        print(f"{folder}: loss on test paintings of {facts['learned']} {before:.4f} before, {after:.4f} after")


def is_finished(folder: Path, partial: Path, state: dict) -> bool:
    """Was an adapter trained with these settings? Raises UserError for other settings."""
    if partial.exists() or not (folder / adapters.NOTE).exists():
        return False
    note = adapters.read_note(folder)
    trained = note["config"] | {"fingerprint": note["fingerprint"]}
    for key, value in (state["config"] | {"fingerprint": state["fingerprint"]}).items():
        if trained.get(key) != value:
            change = f"trained with {key} = {trained.get(key)}, now it is {value}"
            raise UserError(f"{folder} was {change}: give the old setting, or --restart")
    adapters.check_adapter(folder, partial.parent)
    print(f"{folder} is finished")
    return True


def train_epoch(adapter, data: WikiArt, latents, sampler, parts: dict, epoch: int, config) -> float:
    """One pass over the training set; returns the mean denoising loss, all timesteps weighted alike."""
    parameters, optimizer, scaler = adapter.parameters(), parts["optimizer"], parts["scaler"]
    schedule = diffusion.noise_schedule(adapter.pipe)
    sampler.set_epoch(epoch)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)  # see common.run.resume
    batches = torch.tensor(list(sampler)).split(config.batch_size)
    batches = [batch for batch in batches if len(batch) == config.batch_size]
    snr_weights = diffusion.min_snr_weight(schedule, torch.arange(schedule.config.num_train_timesteps))
    steps, sums = Steps(batches, len(batches), epoch, config.epochs), []
    for batch in steps:
        noise = torch.randn(len(batch), *latents.shape[1:], generator=generator)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (len(batch),), generator=generator)
        captions = diffusion.training_captions(data, batch, torch.rand(len(batch), 3, generator=generator))
        for rows in torch.arange(len(batch))[local_share()].chunk(config.accumulate):
            inputs = (latents[batch[rows]], noise[rows], timesteps[rows], [captions[row] for row in rows])
            losses = diffusion.denoising_loss(adapter.pipe, schedule, *inputs)
            loss = (losses * to_device(snr_weights[timesteps[rows]], losses.device)).sum() / len(batch)
            steps.record(loss)
            scaler.scale(loss).backward()
            sums.append(losses.detach().sum())
        for parameter in parameters:
            if parameter.grad is not None:  # SDXL does not use the last layer of its first text encoder
                sum_over_processes(parameter.grad)  # not the mean: each gradient is that of a part of the batch
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        parts["lr_schedule"].step()
        optimizer.zero_grad()
    total = sum_over_processes(torch.stack(sums).cpu().double().sum())
    return total.item() / (len(batches) * config.batch_size)


# Evaluation -----------------------------------------------------------------------------------------------------------


class Evaluation:
    """Losses on test paintings before and after training; to be made while the adapter is disabled."""

    def __init__(self, pipe, test: WikiArt, latents, styles: list[str], config):
        self.styles, self.names, self.learned = styles, test.styles, np.isin(test.styles, styles)
        artists = [""] * len(test)  # prompts rarely name one
        self.captions = [diffusion.caption(*about) for about in zip(test.genres, artists, test.styles, strict=True)]
        self.losses = partial(diffusion.heldout_losses, pipe, latents, config=config)
        self.before = self.losses(self.captions)

    def learned_loss(self) -> float:
        return self.losses(self.captions, chosen=self.learned).mean().item()

    def facts(self) -> dict:
        """Losses of each style, of the learned ones and of the others, and a Markdown table of them."""
        after = self.losses(self.captions)
        by_style, rows = {}, {}
        for style in np.unique(self.names).tolist():
            by_style[style] = paired_change(self.before, after, self.names == style)
            rows[display_name(style) + (", learned" if style in self.styles else "")] = by_style[style]
        learned = paired_change(self.before, after, self.learned)
        facts = {f"heldout_loss_{key}": value for key, value in learned.items()}
        if not self.learned.all():
            rows["the others together"] = others = paired_change(self.before, after, ~self.learned)
            facts |= {f"other_styles_loss_{key}": value for key, value in others.items()}
        row = "| {} | {images} | {before:.4f} | {after:.4f} | {change:+.4f} ({change_low:+.4f} to {change_high:+.4f}) |"
        header = "| style | test paintings | before | after | change, with its 95 % interval |\n|---|---|---|---|---|"
        table = "\n".join([header, *(row.format(name, **values) for name, values in rows.items())])
        return facts | {"by_style": by_style, "table": table}


def paired_change(before, after, rows) -> dict:
    """Mean losses of the chosen images before and after, and the mean change with its 95 % interval."""
    before, after = before[rows], after[rows]
    change, error = (after - before).mean(), 1.96 * (after - before).std(correction=0) / len(before) ** 0.5
    values = {"before": before.mean(), "after": after.mean(), "change": change}
    values |= {"change_low": change - error, "change_high": change + error}
    return {key: value.item() for key, value in values.items()} | {"images": len(before)}


def report(name: str, state: dict, facts: dict, config) -> None:
    """Write the curve, the table, the facts and the note of a finished adapter; remove its partial checkpoint."""
    run, stem, history = Path(config.run), f"lora_{name}" if name else "lora", state["history"]
    panels = {"training loss": {"training": "loss"}, "loss on test paintings": {"with LoRA": "heldout_loss"}}
    levels = {"loss on test paintings": {"without": facts["heldout_loss_before"]}}
    figures.curves(run / f"more/{stem}_curve.png", history, panels, levels=levels)
    write_text(run / f"{stem}.md", facts["table"] + "\n")
    facts["cpu_minutes"] = sum(record["cpu_seconds"] for record in history) / 60
    facts["minutes"] = sum(record["seconds"] for record in history) / 60
    change_facts(run, "lora", partial(with_adapter, name, facts))
    newest = max((note.get("finished", 0) for note in adapters.read_notes(run).values()), default=0)
    finished = max(time.time(), newest + 1)  # later than all, although the clock may have been set back
    note = {key: facts[key] for key in ("base", "base_key", "resolution")} | {"styles": state["config"]["styles"]}
    note |= {"config": state["config"], "fingerprint": state["fingerprint"], "finished": finished}
    adapters.write_card(run / "lora" / name, run, facts, note, config.prompts[0])
    write_text(run / "lora" / name / adapters.NOTE, json.dumps(note, indent=2) + "\n")
    (run / f"{stem}.partial.pt").unlink(missing_ok=True)  # last, so that a full disk loses nothing


def with_adapter(name: str, facts: dict, earlier: dict) -> dict:
    """The facts of lora.py with those of a new adapter; grids and comparisons are of earlier ones."""
    kept = {key: value for key, value in earlier.items() if key.startswith("tiny_")}
    return kept | ({"per_style": earlier.get("per_style", {}) | {name: facts}} if name else facts)


def write_example(path: Path, data: WikiArt, side: int) -> None:
    """Of some pictures that were learned from, the one whose brushwork shows best, for the grid."""
    pictures = [read_image(data.root / name, side, "crop") for name in data.paths[:16]]
    pixels = max(pictures, key=lambda pixels: np.abs(np.diff(pixels.astype(int))).mean())  # between neighbours
    with atomic_write(path) as temporary:
        Image.fromarray(pixels.transpose(1, 2, 0)).save(temporary)


def plot_samples(path: Path, pipe, styles: list[str], side: int, config) -> None:
    """Write a sample of the first prompt in each of the first eight styles."""
    prompts = [diffusion.with_style(config.prompts[0], style) for style in styles[:8]]
    images = diffusion.sample(pipe, prompts, [config.seed], config, height=side, width=side)
    figures.grid(path, images[None], list(map(display_name, styles[:8])), title=config.prompts[0])


# Painting -------------------------------------------------------------------------------------------------------------


def load_adapters(chosen, config):
    """The base with the chosen adapters, and the side of its images. Raises UserError."""
    pipe = diffusion.load(adapters.base_path(chosen.base, config.run), pick_device(config.device))
    names = [f"adapter_{number}" for number in range(len(chosen.folders))]
    for name, folder in zip(names, chosen.folders, strict=True):
        try:
            pipe.load_lora_weights(folder, weight_name=adapters.ADAPTER_FILE, adapter_name=name)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder} does not fit the base {chosen.base}: {reason}") from None
    pipe.set_adapters(names, list(chosen.folders.values()))
    return pipe, config.resolution or chosen.resolution


def paint(config, *prompts: str) -> None:
    """Paint each prompt, from noise or from --image, in a style or in several with weights.

    python lora.py paint "a harbour at dusk" --style Ukiyo_e --seed 3
    python lora.py paint "a harbour at dusk" --style Ukiyo_e=0.6 Cubism=0.4 --negative "people"
    python lora.py paint "a harbour at dusk" --style Ukiyo_e --image my.jpg --strength 0.6

    A weight below 1 leaves a style weaker, above 1 exaggerates it; different weights need adapters that were trained
    with --per-style. The images in --out have the seed in their name, and all settings in their metadata, as JSON under
    "parameters".
    """
    if not prompts:
        raise UserError('say what to paint: lora.py paint "a harbour at dusk" --style Ukiyo_e')
    if config.image and not Path(config.image).is_file():
        raise UserError(f"no file {config.image}")
    if config.image and config.steps * config.strength < 1:
        raise UserError("--steps times --strength is less than one step: raise one of them")
    source = diffusion.open_image(config.image) if config.image else None
    chosen = adapters.choose(config.run, config.style)
    adapters.check_words([*prompts, config.negative], adapters.base_path(chosen.base, config.run), chosen.styles)
    pipe, side = load_adapters(chosen, config)
    options = {"height": side, "width": side}
    if config.image:
        pipe = diffusion.image_to_image(pipe)
        options = {"image": [diffusion.fit_image(source, side)], "strength": config.strength}
    names = [style if weight == 1 else f"{style}-{weight:g}" for style, weight in chosen.styles.items()]
    for prompt in prompts:
        words = [*re.findall(r"\w+", prompt)[:8], *map(file_part, names), "seed", str(config.seed)]
        path = Path(config.out, fit_name("-".join(words), ".png"))
        prompt = diffusion.with_style(prompt, " ".join(chosen.styles))
        pixels = diffusion.sample(pipe, [prompt], [config.seed], config, **options)[0]
        about = PngInfo()
        about.add_text("parameters", json.dumps(settings_of(prompt, chosen, side, config)))
        with atomic_write(path) as temporary:
            Image.fromarray(pixels.transpose(1, 2, 0)).save(temporary, pnginfo=about)
        print(path)


def settings_of(prompt: str, chosen, side: int, config) -> dict:
    """All that an image was made with."""
    keys = ("seed", "steps", "guidance", "negative", *(("image", "strength") if config.image else ()))
    about = {"prompt": prompt, "base": chosen.base, "styles": chosen.styles, "side": side}
    about["adapters"] = {str(folder): weight for folder, weight in chosen.folders.items()}
    return about | {key: getattr(config, key) for key in keys}


def grid(config) -> None:
    """Paint every style and prompt from the same noise, without and with LoRA.

    python lora.py grid
    python lora.py grid --style Ukiyo_e --prompts "a harbour at dusk" "a portrait of a woman in a hat"

    Writes lora_grid.png and, where judge_style/classifier.pt knows the styles, lora_grid.md: how often it finds the
    style that was asked for, and judge_genre/classifier.pt the genre that the prompt names.
    """
    run, images, examples = Path(config.run), {}, {}
    known = adapters.find_adapters(run)
    styles = [find_style(style, list(known)) for style in config.style] or list(known)
    chosen = {style: adapters.choose(run, [style]) for style in styles}  # before anything is loaded
    for style in styles:
        adapters.check_words(config.prompts, adapters.base_path(chosen[style].base, run), [style])
    for style in tqdm(styles, "styles", leave=False):
        pipe, side = load_adapters(chosen[style], config)
        prompts = [diffusion.with_style(prompt, style) for prompt in config.prompts]
        seeds = range(config.seed, config.seed + IMAGES_PER_PROMPT)
        pipe.disable_lora()
        without = diffusion.sample(pipe, prompts, seeds, config, height=side, width=side)
        pipe.enable_lora()
        images[style] = without, diffusion.sample(pipe, prompts, seeds, config, height=side, width=side)
        examples[style] = read_image(next(iter(chosen[style].folders)) / "example.png", side, "crop")
    plot_grid(run / "lora_grid.png", images, examples, config.prompts)
    rates = hit_rates(images, config)
    facts = {"grid_pictures": IMAGES_PER_PROMPT * len(config.prompts), "grid": rates}
    if rates:
        facts["grid_table"] = grid_table(rates, read_facts(run).get("lora", {}))
        write_text(run / "lora_grid.md", facts["grid_table"] + "\n")
    change_facts(run, "lora", partial(with_grid, facts))
    print(f"{run / 'lora_grid.png'}: {'see lora_grid.md' if rates else 'no judge of these styles'}")


def with_grid(facts: dict, earlier: dict) -> dict:
    """The facts of lora.py with those of a new grid, in place of the last one's; without a judge there is no table."""
    return {key: value for key, value in earlier.items() if not key.startswith("grid")} | facts


def plot_grid(path: Path, images: dict, examples: dict, prompts: list[str]) -> None:
    """A row per style, or a few of different noise: {style: (without, with) LoRA}; first a picture that was learned."""
    rows, names, several = [], [], len(images) > 3
    for style, pair in images.items():
        by_prompt = [pixels.reshape(len(prompts), IMAGES_PER_PROMPT, *pixels.shape[1:]) for pixels in pair]
        for number in range(1 if several else min(IMAGES_PER_PROMPT, 3)):
            rows.append((examples[style], np.stack([pixels[:, number] for pixels in by_prompt], 1)))
            names.append(display_name(style))
    figures.pair_grid(path, rows, prompts, names)


def hit_rates(images: dict, config) -> dict:
    """How often judges find the style and the genre that were asked for, by style; {} without a judge of the styles."""
    style_judge, scene_judge = (load_judge(name, config) for name in JUDGES)
    if style_judge is None or not set(images) <= set(style_judge.classes):
        return {}
    genres = [genre_of(prompt, scene_judge) for prompt in config.prompts]
    rates = {}
    for style, pair in images.items():
        rates[style] = {}
        for ending, pixels in zip(("_without", ""), map(torch.from_numpy, pair), strict=True):
            found = style_judge.predict(pixels).argmax(1) == style_judge.classes.index(style)
            rates[style]["hit_rate" + ending] = found.float().mean().item()
            if None not in genres:
                asked = torch.tensor(genres).repeat_interleave(IMAGES_PER_PROMPT)
                scenes = scene_judge.predict(pixels).argmax(1) == asked
                rates[style]["scene_rate" + ending] = scenes.float().mean().item()
    return rates


def load_judge(name: str, config) -> Classifier | None:
    """The classifier in this folder of the run folder, if it is there."""
    path = checkpoint_path(config.run, name)
    return Classifier.load(path, config.device) if path.exists() else None


def genre_of(prompt: str, judge) -> int | None:
    """The number of the judge's genre that a prompt names."""
    found = [number for number, genre in enumerate(judge.classes if judge else ()) if display_name(genre) in prompt]
    return found[0] if len(found) == 1 else None


def grid_table(rates: dict, facts: dict) -> str:
    """A row per style: what the judges found without and with LoRA, and how the losses on test paintings changed."""
    header = ["style", "style found", "with LoRA", "scene found", "with LoRA", "loss on the style", "on the others"]
    rows = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for style, rate in rates.items():
        losses, cells = facts.get("per_style", {}).get(style, facts), [display_name(style)]
        for name in ("hit_rate_without", "hit_rate", "scene_rate_without", "scene_rate"):
            cells.append(f"{rate[name]:.0%}" if name in rate else "")
        for name in ("heldout_loss", "other_styles_loss"):
            known = f"{name}_change" in losses
            cells.append(f"{losses[f'{name}_change'] / losses[f'{name}_before']:+.1%}" if known else "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


# Comparing ------------------------------------------------------------------------------------------------------------


def compare(config) -> None:
    """Repaint test pictures of the demo, whose true repainting is known, with LoRA and as style_transfer.py does.

    python lora.py compare -c settings/tiny.json

    Needs adapters; style.pt of train_style.py and judge_style/classifier.pt in the run folder are used where they are.
    Writes lora_compare.md and lora_compare.png: the source, repaintings, and the true picture.
    """
    if config.steps * min(STRENGTHS) < 1:
        fewest, smallest = 1 / min(STRENGTHS), min(STRENGTHS)
        raise UserError(f"--steps must be {fewest:.0f} or more: the smallest strength is {smallest:g}")
    run, known = Path(config.run), adapters.find_adapters(config.run)
    styles = [find_style(style, list(known)) for style in config.style] or list(known)
    chosen = {style: adapters.choose(run, [style]) for style in styles}
    options = {key: getattr(config, key) for key in ("size", "resize", "split_seed", "processes")}
    test = WikiArt(config.data, "test", **options)
    scenes = common_scenes(test)[:COMPARED]
    missing = [style for style in styles if style not in test.classes]
    if not scenes or missing:
        raise UserError(f"{config.data} has no scenes in every style, {', '.join(missing) or 'as the demo has'}")
    transfer, judge = load_repainter(config), load_judge(JUDGES[0], config)
    judge = judge if judge and set(styles) <= set(judge.classes) else None
    results = {}
    for style in tqdm(styles, "styles", leave=False):
        target = test.classes.index(style)
        pairs = [(rows[(target + 1 + number) % len(rows)], rows[target]) for number, rows in enumerate(scenes)]
        results[style] = repaint_pairs(style, pairs, test, chosen[style], transfer, config)
    rows = compare_rows(results, judge)
    write_text(run / "lora_compare.md", compare_table(rows) + "\n")
    add_facts(run, "lora", {"compare": rows, "compare_table": compare_table(rows)}, merge=True)
    plot_compare(run / "lora_compare.png", results)
    print(compare_table(rows))


def load_repainter(config) -> Repainter | None:
    """The model of train_style.py in the run folder, if it is there."""
    path, device = Path(config.run, "style.pt"), pick_device(config.device)
    if not path.exists():
        print(f"no {path}: without style_transfer.py's row")
        return None
    checkpoint = load_checkpoint(path, "StyleAutoencoder")
    check_model(checkpoint, path)
    return Repainter(build_model(checkpoint, path), checkpoint["classes"], None, device)


def repaint_pairs(style: str, pairs: list, test: WikiArt, chosen, transfer, config) -> dict:
    """Pictures uint8 (N, 3, S, S) of (source, truth) pairs by method, and "seconds" {method: of one picture}."""
    pipe, side = load_adapters(chosen, config)
    pipe = diffusion.image_to_image(pipe)
    files = [[test.root / test.paths[row] for row in rows] for rows in zip(*pairs, strict=True)]
    source, truth = (diffusion.read_images(paths, side, config.processes) for paths in files)
    results, seconds = {"source": source.numpy()}, {}
    prompts = [diffusion.with_style(diffusion.caption(test.genres[row], "", ""), style) for row, _ in pairs]
    for strength in STRENGTHS:
        timer, name = Timer(), f"LoRA, strength {strength:g}"
        images = [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in source.numpy()]
        results[name] = diffusion.sample_each(pipe, prompts, config, image=images, strength=strength)
        seconds[name] = timer.seconds()["seconds"] / len(pairs)
    if transfer and style in transfer.classes:
        timer, painted = Timer(), []
        for path, (row, _) in zip(files[0], pairs, strict=True):
            with Image.open(path) as image:
                own = {test.styles[row]: 1.0}
                painted.append(transfer.repaint(image.convert("RGB"), {style: 1.0}, own).resize((side, side)))
        results["style_transfer.py"] = np.stack([np.asarray(image).transpose(2, 0, 1) for image in painted])
        seconds["style_transfer.py"] = timer.seconds()["seconds"] / len(pairs)
    return results | {"truth": truth.numpy(), "seconds": seconds}


def compare_rows(results: dict, judge) -> list[dict]:
    """Of each method, over all styles: how near it comes to the truth, and how often the judge finds the style."""
    rows = []
    for method in [name for name in next(iter(results.values())) if name != "seconds"]:
        errors, likeness, hits, seconds = [], [], [], []
        for style, pictures in results.items():
            painted, truth = (torch.from_numpy(pictures[name]) for name in (method, "truth"))
            errors.append((painted / 255 - truth / 255).square().mean((1, 2, 3)))
            likeness.append(ssim(painted / 255, truth / 255))
            seconds.append(pictures["seconds"].get(method, 0.0))
            if judge:
                hits.append(judge.predict(painted).argmax(1) == judge.classes.index(style))
        row = {"method": method, "seconds": float(np.mean(seconds)), "pictures": sum(map(len, errors))}
        row |= {"psnr": psnr(torch.cat(errors).mean().item()), "ssim": torch.cat(likeness).mean().item()}
        rows.append(row | ({"hit_rate": torch.cat(hits).float().mean().item()} if judge else {}))
    return rows


def compare_table(rows: list[dict]) -> str:
    lines = ["| pictures | PSNR to the truth | SSIM to the truth | style found | seconds each |", "|---" * 5 + "|"]
    for row in rows:
        near = ["", ""] if row["method"] == "truth" else [f"{row['psnr']:.1f} dB", f"{row['ssim']:.2f}"]
        found = f"{row['hit_rate']:.0%}" if "hit_rate" in row else ""
        seconds = f"{row['seconds']:.2f}" if row["seconds"] else ""
        lines.append(f"| {' | '.join([row['method'], *near, found, seconds])} |")
    return "\n".join(lines)


def plot_compare(path: Path, results: dict) -> None:
    """A row per style: the source, each repainting, the truth."""
    methods = [name for name in next(iter(results.values())) if name != "seconds"]
    number = [index % len(next(iter(results.values()))["truth"]) for index in range(len(results))]  # another scene each
    pictures = [[results[style][name][row] for name in methods] for style, row in zip(results, number, strict=True)]
    names = list(map(display_name, results))
    figures.painting_grid(path, np.array(pictures), methods, names, "The same scene, repainted", side=144)


if __name__ == "__main__":
    run_script(main)
