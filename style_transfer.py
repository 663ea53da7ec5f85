"""Repaint paintings in other styles, and measure whether it happened.

    python style_transfer.py                                          # test paintings x styles, and the scores
    python style_transfer.py --image my.jpg --style Ukiyo_e --strength 0.7
    python style_transfer.py --image my.jpg                           # in every style
    python style_transfer.py --image my.jpg --style Rococo Cubism --steps 7    # from one style to the other
    python style_transfer.py --image holiday/ --style Pointillism     # a folder
    python style_transfer.py --method adain                           # without training: see below

`--method model` needs style.pt, from `train_autoencoder.py --model StyleAutoencoder`; adain and wct need autoencoder.pt
and the paintings, and give its feature maps the mean statistics of a style. magenta, to compare with, is a pre-trained
net of others (pip install -r requirements-magenta.txt) and imitates a painting of the style. Without --image the scores
need a judge, from `train.py -c judge.json --run <run>/judge`; this writes style_grid.png, style_hits.png,
style_strength.png, style_transfer.md (a table) and facts.json into the run folder; the figures of other methods are
style_grid_adain.png and so on. With --image the model needs its checkpoint alone; <name>_<style>.png go to --out.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import figures
import runs
from baselines import Magenta, transplant
from folder import open_rgb, read_picture, title_of
from losses import layout
from scores import similarity
from wikiart import WikiArt, build_model
from windows import predict, views

SHARED = ("data", "run", "size", "resize", "device", "seed", "split_seed", "processes", "hide")
HELP = {
    "checkpoint": "the model; none: style.pt in the run folder, for adain and wct autoencoder.pt",
    "method": ("the trained model; statistics of a style's feature maps given to those of a painting by the plain "
               "autoencoder: means and deviations (adain), or covariances (wct); or magenta's",
               ("model", "adain", "wct", "magenta")),
    "image": "a picture, or a folder of them, to repaint; none: the test paintings, with scores",
    "style": "styles to paint in, in the grid those of the columns; none: all",
    "strength": "0: the painting's own style, 1: the style asked for; between them a mixture",
    "steps": "pictures on the way from the first of two styles to the second; 0: none",
    "detail": "add only what changes to the picture itself, which stays sharp",
    "out": "folder for what is made of --image",
    "judges": "classifiers without part in training: folders in the run folder or .pt files; the first gives hit_rate",
    "paintings": "test paintings that are repainted and scored, at most",
    "rows": "paintings in the grid",
    "columns": "styles in the grid",
    "name": "what to call these scores in facts and figures; none: the method",
    "batch_size": "pictures at a time",
}  # fmt: skip
LONGEST = 1024  # pixels of a picture's longer side in --out, at most


def main(argv=None):
    config = runs.configure("style_transfer", __doc__, SHARED, HELP, argv)
    device = runs.pick_device(config.device)
    if config.strength > 1:
        raise runs.Problem(f"--strength {config.strength} is more than 1: the style itself")
    plain = config.method != "model"
    name = config.checkpoint or ("autoencoder.pt" if plain else "style.pt")
    path = runs.find_checkpoint(config.run, name)
    checkpoint = runs.load_checkpoint(path, "Autoencoder" if plain else "StyleAutoencoder")
    unknown = [style for style in config.style if style not in checkpoint["classes"]]
    if unknown:
        raise runs.Problem(f"no style {unknown[0]} in {path}: it knows {', '.join(checkpoint['classes'])}")
    if config.steps and len(config.style) != 2:
        raise runs.Problem("--steps needs two styles: --style Rococo Cubism")
    if not config.image and (config.steps or config.detail or config.strength < 1):
        raise runs.Problem("--strength, --steps and --detail need --image")
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    if plain:
        data = WikiArt(config.data, "train", processes=config.processes, classes=checkpoint["classes"],
                       **checkpoint["data"])  # fmt: skip
        if config.method == "magenta":
            model = Magenta(data, config.seed)  # at the full size, but scored at ours
            checkpoint |= {"crop": checkpoint["data"]["size"], "scored": checkpoint["crop"]}
        else:
            transplant(model, data, checkpoint["crop"], config.method, config.batch_size, device)
    if config.image:
        repaint_files(model, checkpoint, config, device)
    else:
        study(model, checkpoint, config, device)


# Painting -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def repaint(model, pixels, own, wanted, strength: float, crop: int):
    """Pictures uint8 (B, 3, S, S) as float (B, 3, crop, crop) in [0, 1], in the styles wanted (B, styles).

    `own` (B, styles) are the styles that they are in; None: what the model reads from them.
    """
    images = views(pixels, crop)[0].contiguous(memory_format=torch.channels_last)
    told = hasattr(model, "own_style")
    if own is None:
        own = model.own_style(images) if told else torch.zeros_like(wanted)
    styles = ((1 - strength) * own + strength * wanted, *[own] * told)
    return model.decode(model.encode(images), *styles).float().clamp(0, 1)


# New pictures ---------------------------------------------------------------------------------------------------------


def repaint_files(model, checkpoint, config, device) -> None:
    """Every picture of --image in every style of --style, in its own proportions."""
    source, out, classes = Path(config.image), Path(config.out), checkpoint["classes"]
    if not source.exists():
        raise runs.Problem(f"no file and no folder {source}")
    files = [source]
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise runs.Problem(f"{source} holds no picture")
    styles, broken = config.style or classes, []
    for path in tqdm(files, "pictures", leave=False, disable=len(files) < 2):
        try:
            picture, pixels = open_picture(path, checkpoint["data"])
        except Exception as error:  # whatever is wrong with one of many files, the others go on
            broken.append(f"{path}: {error}")
            continue
        target = out / path.relative_to(source).parent if source.is_dir() else out
        target.mkdir(parents=True, exist_ok=True)
        wanted = torch.eye(len(classes), device=device)[[classes.index(style) for style in styles]]
        names = styles
        if config.steps:
            share = torch.linspace(0, 1, config.steps, device=device)[:, None]
            wanted = (1 - share) * wanted[:1] + share * wanted[1:]
            names = [f"{styles[0]}_to_{styles[1]}_{step + 1}" for step in range(config.steps)]
        pixels = torch.from_numpy(pixels).to(device).expand(len(wanted), -1, -1, -1)
        painted = repaint(model, pixels, None, wanted, config.strength, checkpoint["crop"])
        plain = repaint(model, pixels[:1], None, wanted[:1], 0.0, checkpoint["crop"]) if config.detail else None
        # In a folder a.jpg and a.png may lie side by side.
        stem = path.name if source.is_dir() else path.stem
        for name, each in zip(names, painted, strict=True):
            result = finish(picture, each, plain)
            with runs.replacing(target / f"{stem}_{name}.png") as temporary:
                result.save(temporary)
    made = len(files) - len(broken)
    if broken:
        raise runs.Problem(f"{made} of {len(files)} files repainted; not {'; '.join(broken[:3])}")
    print(f"{made * len(names)} pictures in {out}")


def open_picture(path, shape: dict) -> tuple[Image.Image, np.ndarray]:
    """A file as the model is to see it, uint8 (3, S, S), and as a picture of at most LONGEST pixels a side."""
    pixels = read_picture(path, shape["size"], shape["resize"]).copy()  # torch wants memory that it may write to
    picture = open_rgb(path, LONGEST)
    if shape["resize"] == "crop":
        picture = ImageOps.fit(picture, (min(picture.size),) * 2)
    picture.thumbnail((LONGEST, LONGEST))
    return picture, pixels


def finish(picture: Image.Image, painted, plain) -> Image.Image:
    """A painting (3, crop, crop) in the proportions of the picture; where `plain` (1, 3, crop, crop) is given, only the
    change from there, added to the picture."""
    across, down = picture.size
    change = painted[None] if plain is None else painted - plain
    change = F.interpolate(change, (down, across), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).cpu()
    if plain is not None:
        change = change + torch.from_numpy(np.asarray(picture) / np.float32(255))
    return Image.fromarray((255 * change.clamp(0, 1)).round().byte().numpy())


# Scores ---------------------------------------------------------------------------------------------------------------


def study(model, checkpoint, config, device) -> None:
    """Repaint test paintings in every style; score and show the result."""
    run, classes, crop = Path(config.run), checkpoint["classes"], checkpoint["crop"]
    side = checkpoint.get("scored", crop)
    data = WikiArt(config.data, "test", classes=classes, processes=config.processes, **checkpoint["data"])
    items = torch.from_numpy(np.linspace(0, len(data) - 1, min(config.paintings, len(data))).round().astype(int))
    labels, styles = data.labels[items], len(classes)
    if len(config.judges) not in (1, 2):
        raise runs.Problem("--judges needs one or two classifiers: the first gives hit_rate")
    paths = [name if name.endswith(".pt") else f"{run}/{name}/classifier.pt" for name in config.judges]
    judges = [runs.load_checkpoint(runs.find_checkpoint(run, path)) for path in paths]
    for judge, name in zip(judges, config.judges, strict=True):
        if judge["classes"] != classes:
            raise runs.Problem(f"{name} knows other styles than the model: train it on the same paintings")
    eye = torch.eye(styles)
    rows = choose(data.fit_to_show(config.hide)[items], labels, config.rows)
    if not rows:
        raise runs.Problem("--hide leaves no painting to show")

    def paint(wanted, strength=1.0, chosen=slice(None), known=config.method == "model"):
        """The chosen paintings in the wanted styles (N, styles), as float (N, 3, side, side); are their own known?"""
        parts = (each.split(config.batch_size) for each in (items[chosen], labels[chosen], wanted))
        made = []
        for batch, mine, asked in zip(*parts, strict=True):
            own = eye[mine].to(device) if known else None
            pictures = repaint(model, data.batch(batch, device)[0], own, asked.to(device), strength, crop)
            made.append(scaled(pictures.cpu(), side))
        return torch.cat(made)

    def untouched(items):
        return torch.cat([views(data.batch(batch, torch.device("cpu"))[0], side)[0]
                          for batch in items.split(config.batch_size)])  # fmt: skip

    originals = untouched(items)
    rebuilt = paint(eye[labels], 0.0)
    painted = [paint(eye[[style]].expand(len(items), -1)) for style in tqdm(range(styles), "styles", leave=False)]

    facts = {
        "paintings": len(items),
        "shown": data.named(items[rows]),
        "strength_shown": data.named(items[rows[:5]]),
        "strength": 1.0,
        "own_mse": float((rebuilt - originals).square().mean()),
    }
    asked = labels[:, None] != torch.arange(styles)  # (N, styles): the mismatched pairs
    for judge, prefix in zip(judges, ("", "second_"), strict=False):
        says = [verdicts(judge, pictures, config, device) for pictures in (originals, rebuilt, *painted)]
        hits = torch.stack([said == style for style, said in enumerate(says[2:])], 1)
        guesses = says[0][:, None] == torch.arange(styles)
        facts |= {
            f"{prefix}judge_accuracy": float((says[0] == labels).float().mean()),
            f"{prefix}judge_hit_rate" if prefix else "hit_rate": float(hits[asked].float().mean()),
            f"{prefix}originals_rate": float(guesses[asked].float().mean()),
            f"{prefix}own_kept": float((says[1] == labels).float().mean()),
        }
        if not prefix:
            rates = np.array([[float(hits[labels == mine, style].float().mean()) for style in range(styles)]
                              for mine in range(styles)])  # fmt: skip
            facts["hits"] = {name: float(hits[asked[:, style], style].float().mean())
                             for style, name in enumerate(classes)}  # fmt: skip
    if config.method == "model":  # as for a painting of unknown style
        blind = [paint(eye[[style]].expand(len(items), -1), known=False) for style in range(styles)]
        says = torch.stack([verdicts(judges[0], pictures, config, device) for pictures in blind], 1)
        facts["own_unknown_hit_rate"] = float((says == torch.arange(styles))[asked].float().mean())
    rest = torch.from_numpy(np.setdiff1d(np.arange(len(data)), items))[: max(0, 500 - len(items))]
    where = layout(torch.cat([originals, untouched(rest)]) if len(rest) else originals)
    found = [(layout(pictures) @ where.T).argmax(1) == torch.arange(len(items)) for pictures in painted]
    facts["source_found"] = float(torch.stack(found, 1)[asked].float().mean())
    alike = [similarity(originals, pictures) for pictures in painted]
    facts["ssim"] = float(torch.stack(alike, 1)[asked].mean())
    facts |= against_plain(originals, facts["own_mse"], checkpoint["arguments"]["code"], config, device)
    facts |= truth(data, items, originals, painted)

    name = config.name or ("" if config.method == "model" else config.method)
    ending = f"_{name}" if name else ""
    title = "How often the judge sees the style asked for"
    axes = ("style asked for", "style of the painting")
    figures.heat(run / f"style_hits{ending}.png", 100 * rates, classes, classes, title, "% of the paintings", axes)
    write_grid(run / f"style_grid{ending}.png", classes, labels, originals, rebuilt, painted, rows, config)
    write_strengths(run / f"style_strength{ending}.png", classes, labels, paint, rows[:5])
    known = {key: round(value, 5) if isinstance(value, float) else value for key, value in facts.items()}
    runs.add_facts(run, "style_transfer", {name: known} if name else known, merge=True)
    write_table(run / "style_transfer.md", json.loads((run / "facts.json").read_text())["style_transfer"])
    print(f"the judge, right on {facts['judge_accuracy']:.1%} of the originals, sees the style asked for in "
          f"{facts['hit_rate']:.1%} (in the originals {facts['originals_rate']:.1%}); "
          f"source found first for {facts['source_found']:.1%}")  # fmt: skip


def verdicts(judge, pictures, config, device):
    """The styles (N,) that a classifier sees in pictures (N, 3, crop, crop), at the size that it was fitted at."""
    network, side = build_model(judge).to(device, memory_format=torch.channels_last), judge["data"]["size"]
    said = []
    for batch in pictures.split(config.batch_size):
        pixels = (255 * scaled(batch, side).clamp(0, 1)).round().byte().to(device)
        said.append(predict(network, pixels, judge["crop"], judge["windows"]).argmax(1).cpu())
    return torch.cat(said)


def scaled(pictures, side: int):
    if pictures.shape[-1] == side:
        return pictures
    return F.interpolate(pictures, (side, side), mode="bilinear", antialias=True, align_corners=False)


def against_plain(originals, error: float, code: int, config, device) -> dict:
    """How much more is lost than by the plain autoencoder in the same run folder, if its code is as long."""
    path = Path(config.run) / "autoencoder.pt"
    if config.method != "model" or not path.exists():
        return {}
    checkpoint = runs.load_checkpoint(path, "Autoencoder")
    if checkpoint["crop"] != originals.shape[-1] or checkpoint["arguments"]["code"] != code:
        return {}
    model, total = build_model(checkpoint).to(device), 0.0
    with torch.no_grad():
        for batch in originals.split(config.batch_size):
            total += float((model(batch.to(device)).clamp(0, 1).cpu() - batch).square().sum())
    return {"reconstruction_ratio": error / (total / originals.numel())}


def truth(data, items, originals, painted) -> dict:
    """Where the test set holds the same scenes in every style, as the demo does: how much nearer to the true picture
    the repainting is than its source."""
    place = {(title_of(data.paths[item]), int(data.labels[item])): row for row, item in enumerate(items)}
    once = Counter(title for title, _ in place) if len(place) == len(items) else {}  # one title for two is no scene
    scenes = {title for title, styles in once.items() if title and styles == len(painted)}
    pairs = [(row, style, place[title, style]) for (title, mine), row in place.items() if title in scenes
             for style in range(len(painted)) if style != mine]  # fmt: skip
    if not pairs:
        return {}
    copied = np.array([float((originals[row] - originals[true]).square().mean()) for row, _, true in pairs])
    made = np.array([float((painted[style][row] - originals[true]).square().mean()) for row, style, true in pairs])
    return {
        "truth_pairs": len(pairs),
        "truth_gain_db": float(10 * np.log10(copied.mean() / made.mean())),
        "truth_gain_median_db": float(np.median(10 * np.log10(copied / made))),  # pairs that differ most weigh no more
        "truth_nearer": float((made < copied).mean()),
    }


def choose(fit, labels, most: int) -> list[int]:
    """Paintings to show, as many different styles as there is room for, in the order of the styles."""
    rows = np.flatnonzero(fit)
    turn = {row: int((labels[rows[:place]] == labels[row]).sum()) for place, row in enumerate(rows)}
    return sorted(sorted(rows, key=lambda row: (turn[row], labels[row]))[:most], key=lambda row: labels[row])


def write_grid(path, classes, labels, originals, rebuilt, painted, rows, config) -> None:
    names = [figures.plain(name) for name in classes]
    columns = [classes.index(style) for style in config.style] or range(min(len(painted), config.columns))
    shown = [originals, rebuilt, *(painted[column] for column in columns)]
    pictures = torch.stack([torch.stack([each[row] for each in shown]) for row in rows])
    titles = ["original", "own style", *(names[column] for column in columns)]
    figures.grid(path, as_bytes(pictures), titles, [names[labels[row]] for row in rows], "Test paintings, repainted")


def write_strengths(path, classes, labels, paint, rows) -> None:
    """Some paintings on their way from their own style to another."""
    strengths, styles = (0.0, 0.25, 0.5, 0.75, 1.0), len(classes)
    others = (labels[rows] + 1 + torch.arange(len(rows)) % (styles - 1)) % styles
    pictures = torch.stack([paint(torch.eye(styles)[others], strength, rows) for strength in strengths], 1)
    titles = [f"{figures.plain(classes[mine])} to {figures.plain(classes[other])}"
              for mine, other in zip(labels[rows], others, strict=True)]  # fmt: skip
    columns = [f"{strength:.0%}" for strength in strengths]
    figures.grid(path, as_bytes(pictures), columns, titles, "Strength of the style")


def as_bytes(pictures) -> np.ndarray:
    return (255 * pictures).round().byte().numpy()


def write_table(path: Path, facts: dict) -> None:
    """The scores of all methods that were measured."""
    lines = ["| method | style hit rate | of the originals | source found | SSIM | second judge |", "|---" * 6 + "|"]
    found = {"model": facts} | {name: each for name, each in facts.items() if isinstance(each, dict) and name != "hits"}
    for name, scores in found.items():
        if "hit_rate" in scores:
            second = f"{scores['second_judge_hit_rate']:.1%}" if "second_judge_hit_rate" in scores else ""
            lines.append(f"| {name} | {scores['hit_rate']:.1%} | {scores['originals_rate']:.1%} | "
                         f"{scores['source_found']:.1%} | {scores['ssim']:.3f} | {second} |")  # fmt: skip
    runs.write_text(path, "\n".join(lines) + "\n")


if __name__ == "__main__":
    runs.start(main)
