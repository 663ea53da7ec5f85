"""Fine-tune a pre-trained text-to-image model on styles with LoRA (Hu et al. 2021), and paint with it.

    python lora.py train --base stable-diffusion-v1-5/stable-diffusion-v1-5 --styles Ukiyo_e Cubism
    python lora.py train --base stabilityai/stable-diffusion-xl-base-1.0 --per-style    # one adapter for each style
    python lora.py train -c settings/tiny.json --styles Hatching    # a small base, trained here: no GPU, no network
    python lora.py paint "a harbour at dusk" --style Ukiyo_e --seed 3
    python lora.py paint "a harbour at dusk" --style Ukiyo_e --image my.jpg --strength 0.6
    python lora.py grid                                     # styles x prompts, with and without LoRA
    torchrun --nproc-per-node=2 -- lora.py train ...        # several GPUs; `accelerate launch` works, too

Needs diffusers: pip install -r requirements/lora.txt. `train` writes into the run folder: lora/ (lora/<Style>/ with
--per-style) with the adapter, which `load_lora_weights` of diffusers reads, and samples of each epoch; lora.jsonl,
lora_curve.png, lora.md (losses on test paintings by style), facts.json, and tiny_base/ with --base tiny. An interrupted
training resumes after its last finished epoch (lora.partial.pt) when the same command is run again; --restart starts
anew. `paint` writes to --out. `grid` writes lora_grid.png and, where judge/classifier.pt knows the styles, how often
it predicts the requested style. Where several adapters know a style, the one trained last is used.
"""

import itertools
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
from tqdm import tqdm

from common import figures
from common.config import Setting, configure
from common.errors import UserError
from common.names import display_name, find_style
from common.optim import FUSED, linear_warmup_decay
from common.run import (
    Steps,
    Timer,
    add_facts,
    atomic_write,
    checkpoint_path,
    claim,
    fixed_settings,
    interruptible,
    join_processes,
    leave_processes,
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
from wikiart import BalancedSampler, Classifier, WikiArt

try:
    from safetensors import SafetensorError

    from common import diffusion, tiny_diffusion
except ModuleNotFoundError as error:
    if error.name.startswith("common"):
        raise
    diffusion = None  # main says what to install; --help works without

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes", "restart", "tensorboard")
SETTINGS = {
    "base": Setting(str, None, "Hugging Face name or diffusers folder of SD 1.x, 2.x or SDXL; tiny: trained here"),
    "resolution": Setting(int, "[0, inf)", "side of the images, a multiple of 8 pixels; 0: what the base is made for"),
    "styles": Setting(list[str], None, "styles to learn (train); none: all"),
    "per_style": Setting(bool, None, "one adapter for each style instead of one for all"),
    "rank": Setting(int, "[1, inf)", "rank of the LoRA matrices; alpha equals it"),
    "targets": Setting(list[str], None, "layers of the UNet to adapt, by the end of their names"),
    "text_encoder": Setting(bool, None, "adapt the text encoders, too"),
    "epochs": Setting(int, "[1, inf)", "passes of --per-class images of each style"),
    "per_class": Setting(int, "[0, inf)", "images of each style per epoch; 0: the mean number of its paintings"),
    "batch_size": Setting(int, "[1, inf)", "images per step, over all processes"),
    "accumulate": Setting(int, "[1, inf)", "parts in which a process computes its share of a batch, to save memory"),
    "checkpointing": Setting(bool, None, "gradient checkpointing: slower, but needs less memory"),
    "lr": Setting(float, "(0, inf)", "peak learning rate of AdamW"),
    "eval_images": Setting(int, "[1, inf)", "test paintings of each style for the held-out loss, at most"),
    "style": Setting(str, None, "style to paint in (paint); none: as the prompt says"),
    "image": Setting(str, None, "image to start from instead of noise (paint)"),
    "strength": Setting(float, "(0, 1]", "fraction of the noise that is added to --image"),
    "out": Setting(str, None, "folder for the images of paint"),
    "steps": Setting(int, "[1, inf)", "sampling steps"),
    "guidance": Setting(float, "[0, inf)", "scale of classifier-free guidance; up to 1: none"),
    "prompts": Setting(list[str], None, "prompts of the grid; the first is also sampled after each epoch"),
}
# Flags that do not change an adapter; its own styles are compared in place of --styles, see fit_adapter
FREE_SETTINGS = ("styles", "per_style", "accumulate", "checkpointing", "style", "image", "strength", "out", "steps")
FREE_SETTINGS += ("guidance", "prompts")
TINY, JUDGE = "tiny_base", "judge"  # folders in the run folder
NOTE = "lora.json"  # beside an adapter: what it was trained on
IMAGES_PER_PROMPT = 8  # for each style in the grid's hit rates


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    config = configure("lora", __doc__, SETTINGS, SHARED, argv[len(words) :])
    if diffusion is None:
        raise UserError("diffusers, transformers or peft is missing: pip install -r requirements/lora.txt")
    actions = {"train": train, "paint": paint, "grid": grid}
    if not words or words[0] not in actions:
        raise UserError(f"say first what to do: {', '.join(actions)}")
    action, *prompts = words
    if action != "paint" and prompts:
        raise UserError(f"{action} takes no prompts, but was given {prompts[0]!r}")
    if config.resolution % 8 or not config.prompts:
        raise UserError("--resolution must be a multiple of 8, and --prompts needs at least one")
    try:
        actions[action](config, *prompts)
    except SafetensorError as error:  # hides "no space left"
        raise UserError(f"could not write into {config.run}: is the disk full? ({error})") from None
    except (torch.OutOfMemoryError, MemoryError):
        advice = "add --checkpointing, raise --accumulate up to --batch-size, or lower --resolution"
        raise UserError(f"out of memory: {advice}") from None


# Training -------------------------------------------------------------------------------------------------------------


def train(config) -> None:
    """Train one adapter for all styles, or one for each."""
    device, run = join_processes(pick_device(config.device)), Path(config.run)
    lock = claim(run, "lora") if rank() == 0 else None
    data, test = load_paintings(config)
    styles = list(dict.fromkeys(find_style(style, data.classes) for style in config.styles)) or data.classes
    if config.batch_size % (world_size() * config.accumulate):
        raise UserError(f"--batch-size must be a multiple of {world_size()} processes times --accumulate")
    if config.base == "tiny":
        if 0 < config.resolution < tiny_diffusion.VAE_CROP:
            raise UserError(f"--base tiny needs a --resolution of {tiny_diffusion.VAE_CROP} or more")
        side = config.resolution or 64
        facts = tiny_diffusion.make_base(run / TINY, data, side, config.seed, device, config.processes)
        add_facts(run, "lora", facts, merge=True)
    training = data.subset(np.isin(data.styles, styles))
    if config.per_style and config.restart and rank() == 0:  # or an interrupted restart would find old ones finished
        for style in styles:
            (run / "lora" / style / NOTE).unlink(missing_ok=True)
    for name in styles if config.per_style else [""]:
        fit_adapter(name, [name] if name else styles, training, test, config, device)
    if lock:
        lock.close()
    leave_processes()


def load_paintings(config) -> tuple[WikiArt, WikiArt]:
    """The training set, and at most --eval-images test paintings of each style."""
    options = {key: getattr(config, key) for key in ("size", "resize", "split_seed", "processes")}
    data = WikiArt(config.data, "train", **options)
    test = WikiArt(config.data, "test", classes=data.classes, **options)
    rows = [np.flatnonzero(test.styles == style)[: config.eval_images] for style in data.classes]
    return data, test.subset(np.sort(np.concatenate(rows)))


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
    base = TINY if config.base == "tiny" else config.base
    pipe = diffusion.load(base_path(base, run), device)
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
        facts = {"base": base, "learned": ", ".join(map(display_name, styles)), "resolution": side, "weights": weights}
        facts |= {"rank": config.rank, "steps": steps, "training_images": len(data)} | evaluation.facts()
        report(name, state, facts, config)
        before, after = facts["heldout_loss_before"], facts["heldout_loss_after"]
        print(f"{folder}: loss on test paintings of {facts['learned']} {before:.4f} before, {after:.4f} after")


def base_path(base: str, run):
    return Path(run, TINY) if base == TINY else base


def is_finished(folder: Path, partial: Path, state: dict) -> bool:
    """Was an adapter trained with these settings? Raises UserError for other settings."""
    if partial.exists() or not (folder / NOTE).exists():
        return False
    note = json.loads((folder / NOTE).read_text())
    trained = note["config"] | {"fingerprint": note["fingerprint"]}
    for key, value in (state["config"] | {"fingerprint": state["fingerprint"]}).items():
        if trained.get(key) != value:
            change = f"trained with {key} = {trained.get(key)}, now it is {value}"
            raise UserError(f"{folder} was {change}: give the old setting, or --restart")
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
        self.captions = list(map(diffusion.caption, test.genres, test.artists, test.styles))
        self.losses = partial(diffusion.heldout_losses, pipe, latents, config=config)
        self.before = self.losses(self.captions)
        genres = [diffusion.caption(genre, "", "") for genre in test.genres]
        self.loss_without_style = self.losses(genres, chosen=self.learned).mean().item()

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
        return facts | {"heldout_loss_known_words": self.loss_without_style, "by_style": by_style, "table": table}


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
    figures.curves(run / f"{stem}_curve.png", history, panels, levels=levels)
    write_text(run / f"{stem}.md", facts["table"] + "\n")
    facts["cpu_minutes"] = sum(record["cpu_seconds"] for record in history) / 60
    facts["minutes"] = sum(record["seconds"] for record in history) / 60
    earlier = read_facts(run).get("lora", {})
    kept = {key: value for key, value in earlier.items() if key.startswith("tiny_")}
    add_facts(run, "lora", kept | ({"per_style": earlier.get("per_style", {}) | {name: facts}} if name else facts))
    newest = max((note.get("finished", 0) for note in read_notes(run).values()), default=0)
    finished = max(time.time(), newest + 1)  # later than all, although the clock may have been set back
    note = {"base": facts["base"], "resolution": facts["resolution"], "styles": state["config"]["styles"]}
    note |= {"config": state["config"], "fingerprint": state["fingerprint"], "finished": finished}
    write_text(run / "lora" / name / NOTE, json.dumps(note, indent=2) + "\n")
    (run / f"{stem}.partial.pt").unlink(missing_ok=True)  # last, so that a full disk loses nothing


def plot_samples(path: Path, pipe, styles: list[str], side: int, config) -> None:
    """Write a sample of the first prompt in each of the first eight styles."""
    prompts = [diffusion.with_style(config.prompts[0], style) for style in styles[:8]]
    images = diffusion.sample(pipe, prompts, [config.seed], config, height=side, width=side)
    figures.grid(path, images[None], list(map(display_name, styles[:8])), title=config.prompts[0])


# Painting -------------------------------------------------------------------------------------------------------------


def read_notes(run) -> dict[Path, dict]:
    """What each adapter was trained on, by its folder."""
    return {path.parent: json.loads(path.read_text()) for path in Path(run).glob(f"lora/**/{NOTE}")}


def find_adapters(run) -> dict[str, Path]:
    """The folder of each style's adapter; where several know a style, the one trained last."""
    notes = read_notes(run)
    if not notes:
        raise UserError(f"no adapter in {run}/lora: run lora.py train, or give another --run")
    oldest_first = sorted(notes, key=lambda folder: notes[folder].get("finished", 0))
    return dict(sorted({style: folder for folder in oldest_first for style in notes[folder]["styles"]}.items()))


def load_adapter(folder: Path, config):
    """The base with an adapter, and the side of its images."""
    note = json.loads((folder / NOTE).read_text())
    pipe = diffusion.load(base_path(note["base"], config.run), pick_device(config.device))
    pipe.load_lora_weights(folder)
    return pipe, config.resolution or note["resolution"]


def paint(config, *prompts: str) -> None:
    """Paint each prompt, from noise or from --image."""
    if not prompts:
        raise UserError('say what to paint: lora.py paint "a harbour at dusk" --style Ukiyo_e')
    if config.image and not Path(config.image).exists():
        raise UserError(f"no file {config.image}")
    if config.image and config.steps * config.strength < 1:
        raise UserError("--steps times --strength is less than one step: raise one of them")
    adapters = find_adapters(config.run)
    if config.style:
        config.style = find_style(config.style, list(adapters))
    pipe, side = load_adapter(adapters[config.style or next(iter(adapters))], config)
    options = {"height": side, "width": side}
    if config.image:
        pipe = diffusion.image_to_image(pipe)
        options = {"image": diffusion.open_image(config.image, side), "strength": config.strength}
    for prompt in prompts:
        words = [*re.findall(r"\w+", prompt)[:8], config.style, str(config.seed)]
        path = Path(config.out, "-".join(filter(None, words)) + ".png")
        prompt = diffusion.with_style(prompt, config.style)
        pixels = diffusion.sample(pipe, [prompt], [config.seed], config, **options)[0]
        with atomic_write(path) as temporary:
            Image.fromarray(pixels.transpose(1, 2, 0)).save(temporary)
        print(path)


def grid(config) -> None:
    """Paint every style and prompt from the same noise, without and with LoRA; write the grid and the hit rates."""
    run, images, loaded = Path(config.run), {}, None
    for style, folder in tqdm(find_adapters(run).items(), "styles", leave=False):
        if folder != loaded:
            (pipe, side), loaded = load_adapter(folder, config), folder
        prompts = [diffusion.with_style(prompt, style) for prompt in config.prompts]
        seeds = range(config.seed, config.seed + IMAGES_PER_PROMPT)
        pipe.disable_lora()
        without = diffusion.sample(pipe, prompts, seeds, config, height=side, width=side)
        pipe.enable_lora()
        images[style] = without, diffusion.sample(pipe, prompts, seeds, config, height=side, width=side)
    plot_grid(run / "lora_grid.png", images, config.prompts)
    facts = {key: value for key, value in read_facts(run).get("lora", {}).items() if not key.startswith("hit_rate")}
    facts["pictures"] = sum(len(without) for without, _ in images.values())
    facts |= hit_rates(images, config)
    add_facts(run, "lora", facts)
    result = "no judge of these styles"
    if "hit_rate" in facts:
        result = (
            "the judge predicts the requested style for {hit_rate_without:.1%} without LoRA, {hit_rate:.1%} with it"
        )
    print(f"{run / 'lora_grid.png'}: {result.format(**facts)}")


def plot_grid(path: Path, images: dict, prompts: list[str]) -> None:
    """A row per style, or a few of different noise; two columns per prompt: {style: (without, with) LoRA}."""
    rows, titles = [], []
    for style, pair in images.items():
        by_prompt = [pixels.reshape(len(prompts), IMAGES_PER_PROMPT, *pixels.shape[1:]) for pixels in pair]
        for number in range(min(IMAGES_PER_PROMPT, max(1, 4 // len(images)))):
            rows.append([pixels[prompt, number] for prompt in range(len(prompts)) for pixels in by_prompt])
            titles.append(display_name(style) + (f", noise {number + 1}" if len(images) < 4 else ""))
    columns = [title for prompt in prompts for title in (prompt, "the same, with LoRA")]
    figures.grid(path, np.array(rows), columns, titles, "Without and with LoRA")


def hit_rates(images: dict, config) -> dict:
    """How often the judge predicts the requested style; {} without a judge of these styles."""
    path = checkpoint_path(config.run, JUDGE)
    judge = Classifier.load(path, config.device) if path.exists() else None
    if judge is None or not set(images) <= set(judge.classes):
        return {}
    hits = {"hit_rate_without": [], "hit_rate": []}
    for style, pair in images.items():
        for name, pixels in zip(hits, pair, strict=True):
            hits[name].append(judge.predict(torch.from_numpy(pixels)).argmax(1) == judge.classes.index(style))
    return {name: torch.cat(values).float().mean().item() for name, values in hits.items()}


if __name__ == "__main__":
    run_script(main)
