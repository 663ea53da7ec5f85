"""Fine-tune a pre-trained text-to-image model on the styles with LoRA (Hu et al. 2021), and paint with it.

    python lora.py train --base stable-diffusion-v1-5/stable-diffusion-v1-5 --styles Ukiyo_e Cubism
    python lora.py train --base stabilityai/stable-diffusion-xl-base-1.0 --per-style    # an adapter for each style
    python lora.py train -c tiny.json --styles Hatching     # no GPU, no network: a small base, taught here first
    python lora.py paint "a harbour at dusk" --style Ukiyo_e --seed 3
    python lora.py paint "a harbour at dusk" --style Ukiyo_e --image my.jpg --strength 0.6
    python lora.py grid                                     # styles x prompts, with and without LoRA
    torchrun --nproc-per-node=2 -- lora.py train ...        # several GPUs; `accelerate launch` does as well

Needs diffusers: pip install -r requirements-lora.txt. A base is a name on the Hugging Face hub or a folder in
diffusers' layout. `train` writes into the run folder: lora/ (lora/<Style>/ with --per-style), which `load_lora_weights`
of any program reads, with pictures painted on the way; lora.jsonl with a line an epoch, lora_curve.png, lora.md with
the loss on test paintings by style, and facts.json; with --tiny also tiny_base/. Until it has finished,
lora.partial.pt; --resume goes on from there. `paint` writes to --out, `grid` lora_grid.png and, where there is a judge,
how often it sees the style asked for. Where several adapters know a style, the one trained last counts.
"""

import itertools
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import diffusion
import figures
import runs
from wikiart import BalancedSampler, WikiArt, build_model
from windows import predict

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes")
HELP = {
    "base": "model to fine-tune: a name on the Hugging Face hub, or a folder in diffusers' layout (SD 1.x, 2.x, SDXL)",
    "tiny": "instead of --base a small model, taught here from scratch on the paintings, without words for styles",
    "tiny_steps": "training steps of the small model's autoencoder, and of the rest",
    "resolution": "side of the pictures in pixels, a multiple of 8; 0: what the base was made for",
    "styles": "styles to learn (train); none: all",
    "per_style": "one adapter for each style instead of one for all",
    "rank": "rank of the matrices that are added",
    "alpha": "what is added counts alpha / rank",
    "targets": "layers of the UNet to adapt, by the end of their names",
    "text_encoder": "adapt the text encoders too",
    "epochs": "epochs of --per-class pictures of each style; a checkpoint after each",
    "per_class": "pictures of each style in an epoch",
    "batch_size": "pictures a step, over all processes",
    "accumulate": "parts that each process computes its share of a batch in: more need less memory",
    "checkpointing": "compute activations again on the way back instead of keeping them: slower, needs less memory",
    "lr": "peak learning rate; it rises for a twentieth of the run, then falls to 0",
    "weight_decay": "weight decay; 0: none",
    "snr": "bound on the signal-to-noise ratio that weighs a step of noise (min-SNR); 0: all weigh the same",
    "drop_words": "share of the captions that lack the genre, and that lack the artist; 0: none",
    "drop_caption": "share of the captions that are empty, for guidance; 0: none",
    "look_every": "steps from one painting of the first prompt to the next; 0: those of an epoch",
    "heldout": "test paintings of each style that the loss is measured on, at most",
    "resume": "go on from lora.partial.pt in the run folder",
    "style": "style to paint in (paint); none: as the prompt says",
    "image": "a picture to paint over (paint); none: start from noise",
    "strength": "share of --image that is painted anew",
    "out": "folder for what paint makes",
    "steps": "steps from noise to picture",
    "guidance": "how much the prompt counts (classifier-free guidance); 1: no more than it has to",
    "prompts": "what to paint in the grid; the first also on the way",
    "pictures": "pictures of each style and prompt (grid)",
    "judge": "classifier without part in training that names their styles: folder in the run folder, or .pt file",
}
FREE = ("data", "run", "device", "processes", "config", "resume", "accumulate", "checkpointing", "prompts", "pictures",
        "judge", "style", "image", "strength", "out", "styles", "steps", "guidance", "look_every")  # fmt: skip
TINY = "tiny_base"  # in the run folder
CURVES = {"training loss": {"training": "loss"}, "loss on test paintings": {"with LoRA": "heldout_loss"}}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    config = runs.configure("lora", __doc__, SHARED, HELP, argv[len(words) :])
    diffusion.ready()
    if not words or words[0] not in ACTIONS:
        raise runs.Problem(f"say first what to do: {', '.join(ACTIONS)}")
    if words[0] != "paint" and words[1:]:
        raise runs.Problem(f"{words[0]} takes no words of its own, but was given {words[1]!r}")
    if config.resolution % 8 or not config.prompts:
        raise runs.Problem("--resolution must be a multiple of 8, and --prompts needs at least one")
    try:
        ACTIONS[words[0]](config, words[1:])
    except (torch.OutOfMemoryError, MemoryError):
        raise runs.Problem("out of memory: add --checkpointing, raise --accumulate up to --batch-size, "
                           "or lower --resolution") from None  # fmt: skip


# Training -------------------------------------------------------------------------------------------------------------


def train(config, words) -> None:
    if config.tiny and 0 < config.resolution < 32:
        raise runs.Problem("--tiny needs a --resolution of 32 or more: its autoencoder learns from windows that large")
    device, run = runs.join_processes(runs.pick_device(config.device)), Path(config.run)
    lock = runs.claim(run, "lora") if runs.rank() == 0 else None
    shape = {key: getattr(config, key) for key in ("size", "resize", "split_seed")}
    data = WikiArt(config.data, "train", processes=config.processes, **shape)
    test = WikiArt(config.data, "test", processes=config.processes, classes=data.classes, **shape)
    styles = config.styles or data.classes
    unknown = [style for style in styles if style not in data.classes]
    if unknown:
        raise runs.Problem(f"no style {unknown[0]} in {config.data}: it has {', '.join(data.classes)}")
    if config.batch_size % (runs.world() * config.accumulate):
        raise runs.Problem(f"--batch-size must be a multiple of {runs.world()} processes times --accumulate")
    rows = [np.flatnonzero(test.styles == style)[: config.heldout] for style in data.classes]
    sets = [data.subset(np.isin(data.styles, styles)), test.subset(np.sort(np.concatenate(rows)))]
    if config.tiny:
        diffusion.make_tiny(run / TINY, data, config, device)
    for style in styles if config.per_style else [""]:
        fit([style] if style else styles, style, sets, config, device)
    if lock:
        lock.close()
    runs.leave_processes()


def fit(styles, name: str, sets, config, device) -> None:
    """Train one adapter for these styles; `name` is that of the style with --per-style, else ""."""
    run, first = Path(config.run), runs.rank() == 0
    folder, stem = run / "lora" / name, f"lora_{name}" if name else "lora"
    partial, note = run / f"{stem}.partial.pt", folder / "lora.json"
    learned, own = (np.isin(data.styles, styles) for data in sets)
    data, test = sets[0].subset(learned), sets[1]
    state = {
        "model": "LoRA",
        "config": {key: value for key, value in vars(config).items() if key not in FREE} | {"styles": styles},
        "fingerprint": data.fingerprint,
        "history": [],
    }
    if name and config.resume and note.exists() and not partial.exists():
        runs.check_same(json.loads(note.read_text()), state, note)
        return print(f"{folder} is finished")
    pipe = diffusion.load(run / TINY if config.tiny else config.base, device)
    side = config.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    latents, test_latents = diffusion.latents_of(pipe, sets, side, run / "lora" / "latents.pt", config.processes)
    latents = latents[torch.from_numpy(learned)]
    order = BalancedSampler(data.labels, "resample", config.per_class, config.seed)
    batches = len(order) // config.batch_size
    if not batches or not own.any():
        raise runs.Problem(f"too few pictures of {', '.join(styles)}: raise --per-class, lower --batch-size, or add "
                           "test paintings")  # fmt: skip

    schedule, adapter, steps = diffusion.noise_schedule(pipe), diffusion.Adapter(pipe, config), config.epochs * batches
    optimizer = torch.optim.AdamW(adapter.parameters(), config.lr, weight_decay=config.weight_decay)
    rates = diffusion.warm(optimizer, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=diffusion.precision(device) == torch.float16)
    parts = {"adapter": adapter, "optimizer": optimizer, "rates": rates, "scaler": scaler}
    state = runs.resume(config.resume and (partial.exists() or not name), partial, state, parts)
    size = sum(weight.numel() for weight in adapter.parameters())
    if first:
        print(f"{', '.join(styles)}: {size / 1e6:.2f} million weights beside the base's on {device}, {side} px")

    texts = [diffusion.caption(*said) for said in zip(test.genres, test.artists, test.styles, strict=True)]
    everything = torch.arange(len(test))

    def measure(items, texts=texts):
        return diffusion.heldout(pipe, schedule, test_latents, texts, items, config)

    def look(step):
        if first and step % (config.look_every or batches) == 0:
            prompts = [asked(config.prompts[0], style) for style in styles[:8]]
            pictures = diffusion.make(pipe, prompts, [config.seed], config, height=side, width=side)
            names = [figures.plain(style) for style in styles[:8]]
            figures.grid(folder / f"step-{step:06}.png", pictures[None], names, title=config.prompts[0])

    with adapter.off():
        before = measure(everything)
        plain = measure(everything[own], [diffusion.caption(genre, "", "") for genre in test.genres])
    try:
        for epoch in range(len(state["history"]) + 1, config.epochs + 1):
            started, cpu = time.perf_counter(), time.process_time()
            order.set_epoch(epoch)
            loss = train_epoch(adapter, schedule, data, latents, order, parts, epoch, config, look)
            if not first:
                continue
            spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
            record = {"epoch": epoch, "loss": loss, "heldout_loss": float(measure(everything[own]).mean())} | spent
            state["history"].append({key: round(value, 6) for key, value in record.items()})
            print(json.dumps(state["history"][-1]), flush=True)
            state["resume"] = {part: each.state_dict() for part, each in parts.items()}
            runs.save_checkpoint(partial, state)
    except KeyboardInterrupt:
        kept = len(state["history"])
        advice = f"{kept} finished epochs are kept: go on with --resume" if kept else "no epoch was finished"
        raise KeyboardInterrupt(advice if first else "") from None
    if not first:
        return
    adapter.save(folder)
    history, after = state["history"], measure(everything)
    runs.write_text(run / f"{stem}.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    figures.curves(run / f"{stem}_curve.png", history, CURVES,
                   levels={"loss on test paintings": {"without": float(before[own].mean())}})  # fmt: skip
    facts = {
        "base": TINY if config.tiny else config.base,
        "learned": ", ".join(figures.plain(style) for style in styles),
        "resolution": side,
        **diffusion.losses_by_style(test.styles, styles, before, after),
        "heldout_loss_known_words": round(float(plain.mean()), 6),
        "training_images": len(data),
        "steps": steps,
        "rank": config.rank,
        "weights": size,
        "cpu_minutes": round(sum(line["cpu_seconds"] for line in history) / 60, 2),
        "minutes": round(sum(line["seconds"] for line in history) / 60, 2),
    }
    runs.write_text(run / f"{stem}.md", facts["table"] + "\n")
    known = known_facts(run, lambda key: not key.startswith("tiny_") and not (name and key == "per_style"))
    runs.add_facts(run, "lora", known | ({"per_style": known.get("per_style", {}) | {name: facts}} if name else facts))
    known = {key: facts[key] for key in ("base", "resolution")} | {key: state[key] for key in ("config", "fingerprint")}
    runs.write_text(note, json.dumps(known | {"styles": styles, "finished": time.time()}, indent=2) + "\n")
    partial.unlink(missing_ok=True)  # last, so that a full disk loses nothing
    print(f"{folder}: loss on test paintings of {', '.join(styles)} {facts['heldout_loss_before']:.4f} before, "
          f"{facts['heldout_loss_after']:.4f} after")  # fmt: skip


def train_epoch(adapter, schedule, data, latents, order, parts, epoch: int, config, look) -> float:
    """One pass; returns the mean loss without weights."""
    weights, optimizer, scaler = adapter.parameters(), parts["optimizer"], parts["scaler"]
    draw = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)  # anew for each epoch: see runs.resume
    batches = torch.tensor(list(order)).split(config.batch_size)
    batches = [batch for batch in batches if len(batch) == config.batch_size]
    total = torch.zeros(1, dtype=torch.float64)
    for step, batch in enumerate(tqdm(batches, f"epoch {epoch}/{config.epochs}", leave=False, disable=runs.rank() > 0)):
        noise = torch.randn(len(batch), *latents.shape[1:], generator=draw)
        times = torch.randint(schedule.config.num_train_timesteps, (len(batch),), generator=draw)
        texts = diffusion.captions_of(data, batch, torch.rand(len(batch), 3, generator=draw), config)
        mine = torch.arange(runs.rank(), len(batch), runs.world())  # every process takes its share of each batch
        for part in mine.chunk(config.accumulate):
            said = [texts[row] for row in part]
            each = diffusion.denoising(adapter.pipe, schedule, latents[batch[part]], noise[part], times[part], said)
            weight = diffusion.weigh(schedule, times[part], config.snr).to(each.device)
            loss = (each * weight).sum() / len(batch)
            if not torch.isfinite(loss):
                raise runs.Problem(f"the loss is {loss.item()} at step {step + 1} of epoch {epoch}: lower --lr")
            scaler.scale(loss).backward()
            total += each.detach().sum().cpu() / len(batch)
        for weight in weights:
            if weight.grad is not None:  # SDXL leaves the last layer of its first text encoder out
                runs.sum_over_processes(weight.grad)  # each is a share of the whole batch's mean already
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        parts["rates"].step()
        optimizer.zero_grad()
        look((epoch - 1) * len(batches) + step + 1)
    return float(runs.sum_over_processes(total)) / len(batches)


def known_facts(run: Path, outdated) -> dict:
    """The run's facts of LoRA but for those whose names are outdated."""
    path = run / "facts.json"
    known = json.loads(path.read_text()).get("lora", {}) if path.exists() else {}
    return {key: value for key, value in known.items() if not outdated(key)}


# Painting -------------------------------------------------------------------------------------------------------------


def asked(prompt: str, style: str) -> str:
    return f"{prompt} in the style of {figures.plain(style)}" if style else prompt


def adapters(run) -> dict[str, Path]:
    """The folder of each style's adapter; where several know a style, the one trained last."""
    notes = {path.parent: json.loads(path.read_text()) for path in Path(run).glob("lora/**/lora.json")}
    if not notes:
        raise runs.Problem(f"no adapter in {run}/lora: run lora.py train, or give another --run")
    trained = sorted(notes, key=lambda folder: notes[folder].get("finished", 0))
    found = {style: folder for folder in trained for style in notes[folder]["styles"]}
    return dict(sorted(found.items()))


def load_adapted(folder: Path, config):
    """The base with an adapter on top, and the size of the pictures that it is for."""
    note = json.loads((folder / "lora.json").read_text())
    base = Path(config.run, TINY) if note["base"] == TINY else note["base"]
    pipe, side = diffusion.load(base, runs.pick_device(config.device)), config.resolution or note["resolution"]
    pipe.load_lora_weights(folder)
    return pipe, {"height": side, "width": side}


def paint(config, words) -> None:
    if not words:
        raise runs.Problem('say what to paint: lora.py paint "a harbour at dusk" --style Ukiyo_e')
    if config.image and not Path(config.image).exists():
        raise runs.Problem(f"no file {config.image}")
    if config.image and config.steps * config.strength < 1:
        raise runs.Problem("--steps times --strength is less than one step: raise one of them")
    known = adapters(config.run)
    if config.style and config.style not in known:
        raise runs.Problem(f"no style {config.style} in {config.run}/lora: it knows {', '.join(known)}")
    pipe, more = load_adapted(known[config.style or next(iter(known))], config)
    if config.image:
        pipe = diffusion.over_pictures(pipe)
        more = {"image": diffusion.open_picture(config.image, more["height"]), "strength": config.strength}
    for prompt in words:
        name = "-".join([*re.findall(r"\w+", prompt)[:8], *[config.style] * bool(config.style), str(config.seed)])
        with runs.replacing(Path(config.out) / f"{name}.png") as temporary:
            pixels = diffusion.make(pipe, [asked(prompt, config.style)], [config.seed], config, **more)[0]
            Image.fromarray(pixels.transpose(1, 2, 0)).save(temporary)
        print(Path(config.out) / f"{name}.png")


def grid(config, words) -> None:
    """Every style and prompt from the same noise, without and with LoRA."""
    run, known, shown, loaded = Path(config.run), adapters(config.run), {}, None
    seeds = range(config.seed, config.seed + config.pictures)
    for style, folder in tqdm(known.items(), "styles", leave=False):
        if folder != loaded:
            (pipe, size), loaded = load_adapted(folder, config), folder
        prompts = [asked(prompt, style) for prompt in config.prompts]
        pipe.disable_lora()
        without = diffusion.make(pipe, prompts, seeds, config, **size)
        pipe.enable_lora()
        shown[style] = without, diffusion.make(pipe, prompts, seeds, config, **size)
    rows, titles = [], []
    for style, pairs in shown.items():
        for seed in range(min(config.pictures, max(1, 4 // len(shown)))):
            rows.append([pixels[number * config.pictures + seed] for number in range(len(config.prompts))
                         for pixels in pairs])  # fmt: skip
            titles.append(figures.plain(style) + f", noise {seed + 1}" * (len(shown) < 4))
    columns = [title for prompt in config.prompts for title in (prompt, "the same, with LoRA")]
    figures.grid(run / "lora_grid.png", np.array(rows), columns, titles, "Without and with LoRA")
    facts = {"pictures": sum(len(pixels) for pixels, _ in shown.values())} | hit_rates(shown, config)
    runs.add_facts(run, "lora", known_facts(run, lambda key: key.startswith("hit_rate")) | facts)
    said = "; the judge sees the style asked for in {hit_rate_without:.1%} without LoRA, in {hit_rate:.1%} with it"
    print(f"{run / 'lora_grid.png'}{said.format(**facts) if 'hit_rate' in facts else ': no judge of these styles'}")


def hit_rates(shown: dict, config) -> dict:
    """How often the judge sees the style asked for, in pictures {style: uint8 (N, 3, S, S) without and with LoRA}."""
    path = config.judge if config.judge.endswith(".pt") else f"{config.run}/{config.judge}/classifier.pt"
    path = runs.find_checkpoint(config.run, path)
    checkpoint = runs.load_checkpoint(path) if path.exists() else {"classes": []}
    if not set(shown) <= set(checkpoint["classes"]):
        return {}
    model, side, hits = build_model(checkpoint), checkpoint["data"]["size"], [[], []]
    for style, pairs in shown.items():
        for pixels, found in zip(pairs, hits, strict=True):
            pictures = F.interpolate(torch.from_numpy(pixels).float(), (side, side), mode="bilinear", antialias=True)
            said = predict(model, pictures.round().byte(), checkpoint["crop"], checkpoint["windows"]).argmax(1)
            found.append(said == checkpoint["classes"].index(style))
    without, adapted = (float(torch.cat(found).float().mean()) for found in hits)
    return {"hit_rate_without": without, "hit_rate": adapted}


ACTIONS = {"train": train, "paint": paint, "grid": grid}


if __name__ == "__main__":
    runs.start(main)
