"""Repaint paintings in other styles, and measure how well that works.

    python style_transfer.py                                          # test paintings x styles, and the scores
    python style_transfer.py --image my.jpg --style Ukiyo_e --strength 0.7
    python style_transfer.py --image my.jpg                           # in every style
    python style_transfer.py --image my.jpg --style Rococo Cubism --steps 7    # from one style to the other
    python style_transfer.py --image holiday/ --style Pointillism     # a folder
    python style_transfer.py --method adain                           # a method to compare with

Needs style.pt of train_style.py; adain and wct need autoencoder.pt, whose feature maps they give the mean statistics of
a style, and magenta (pip install -r requirements/magenta.txt) imitates a painting of the style. Writes style_grid.png,
style_hits.png and style_strength.png into the run folder (style_grid_adain.png, ... for another method), and the scores
into facts.json. With --image, <name>_<style>.png go to --out, and neither paintings nor a judge are needed.
"""

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from common import figures
from common.baselines import Magenta, add_transplants
from common.config import Setting, configure
from common.crops import resize, views
from common.errors import UserError
from common.images import open_rgb, read_image
from common.metrics import layout, ssim
from common.names import display_name, title_of
from common.reconstruction import mean_squared_error, whole_images
from common.run import add_facts, atomic_write, checkpoint_path, load_checkpoint, pick_device, run_script
from wikiart import Classifier, WikiArt, build_model

SHARED = ("data", "run", "device", "seed", "processes", "hide")
SETTINGS = {
    "checkpoint": Setting(str, None, "the model; none: style.pt of the run folder, for other methods autoencoder.pt"),
    "method": Setting(str, ("model", "adain", "wct", "magenta"), "the trained model, or one to compare it with"),
    "image": Setting(str, None, "an image, or a folder of them, to repaint; none: the test paintings, with scores"),
    "style": Setting(list[str], None, "target styles, or the columns of the grid; none: all"),
    "strength": Setting(float, "[0, 1]", "0: the image's own style, 1: the target style; between: a mixture"),
    "steps": Setting(int, "[0, inf)", "images on the way from the first of two styles to the second; 0: none"),
    "detail": Setting(bool, None, "add only the change of style to the image, which stays sharp"),
    "out": Setting(str, None, "folder for the results of --image"),
    "judges": Setting(list[str], None, "one or two classifiers that had no part in training, for the scores"),
    "paintings": Setting(int, "[1, inf)", "test paintings to repaint and score, at most"),
    "name": Setting(str, None, "name of these scores in facts and figures; none: the method"),
}
LONGEST = 1024  # pixels of the longer side of images in --out, at most
BATCH_SIZE = 64
ROWS, COLUMNS = 8, 8  # of style_grid.png, at most
GALLERY = 500  # test paintings among which `source_found` looks for the source


def main(argv=None):
    config = configure("style_transfer", __doc__, SETTINGS, SHARED, argv)
    if config.steps and len(config.style) != 2:
        raise UserError("--steps needs two styles: --style Rococo Cubism")
    if not config.image and (config.steps or config.detail or config.strength < 1):
        raise UserError("--strength, --steps and --detail need --image")
    repainter = Repainter(config, pick_device(config.device))
    if config.image:
        repaint_files(repainter, config)
    else:
        evaluate(repainter, config)


class Repainter:
    """The model of --method with what it needs: styles `classes`, input size, settings of its images.

    side: of the images that are scored; Magenta repaints images of full size. Raises UserError.
    """

    def __init__(self, config, device):
        self.device, self.conditioned = device, config.method == "model"
        path = checkpoint_path(config.run, config.checkpoint or ("style.pt" if self.conditioned else "autoencoder.pt"))
        checkpoint = load_checkpoint(path, "StyleAutoencoder" if self.conditioned else "Autoencoder")
        self.classes, self.data_settings = checkpoint["classes"], checkpoint["data"]
        self.crop = self.side = checkpoint["crop"]
        for style in config.style:
            if style not in self.classes:
                raise UserError(f"no style {style} in {path}: it has {', '.join(self.classes)}")
        self.model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
        if config.method == "magenta":
            self.model, self.crop = Magenta(self.paintings("train", config), config.seed), self.data_settings["size"]
        elif not self.conditioned:
            paintings = self.paintings("train", config)
            add_transplants(self.model, paintings, self.crop, config.method, BATCH_SIZE, device)

    def paintings(self, split: str, config) -> WikiArt:
        return WikiArt(config.data, split, classes=self.classes, processes=config.processes, **self.data_settings)

    @torch.no_grad()
    def repaint(self, pixels, source, target, strength: float = 1.0):
        """Images uint8 (B, 3, S, S) in the target styles, float (B, 3, crop, crop) in [0, 1].

        source, target: weights (B, styles); source None: the styles that the model predicts for the images.
        """
        images = views(pixels, self.crop)[0].contiguous(memory_format=torch.channels_last)
        if not self.conditioned:
            return self.model.decode(self.model.encode(images), strength * target).float().clamp(0, 1)
        source = self.model.style_probabilities(images) if source is None else source
        mixture = (1 - strength) * source + strength * target
        return self.model.decode(self.model.encode(images), mixture, source).float().clamp(0, 1)

    def repaint_dataset(self, data: WikiArt, source, target, strength: float = 1.0):
        """All paintings in the target styles (N, styles), float (N, 3, side, side) in [0, 1], on the CPU."""
        results = []
        for items in torch.arange(len(data)).split(BATCH_SIZE):
            weights = [None if styles is None else styles[items].to(self.device) for styles in (source, target)]
            images = self.repaint(data.batch(items, self.device)[0], *weights, strength).cpu()
            results.append(images if self.crop == self.side else resize(images, self.side))
        return torch.cat(results)

    def repaint_in_each_style(self, data: WikiArt, source) -> list[torch.Tensor]:
        targets = torch.eye(len(self.classes))[:, None].expand(-1, len(data), -1)
        return [self.repaint_dataset(data, source, target) for target in tqdm(targets, "styles", leave=False)]


# Image files ----------------------------------------------------------------------------------------------------------


def repaint_files(repainter: Repainter, config) -> None:
    """Write each image of --image in each style of --style, in its own proportions."""
    source, broken = Path(config.image), []
    files = list_images(source)
    names, target = target_styles(config, repainter)
    for path in tqdm(files, "pictures", leave=False, disable=len(files) < 2):
        try:
            image, pixels = open_image(path, **repainter.data_settings)
        except Exception as error:  # whatever is wrong with one of many files, the others are repainted
            broken.append(f"{path}: {error}")
            continue
        pixels = pixels.to(repainter.device).expand(len(target), -1, -1, -1)
        results = repainter.repaint(pixels, None, target, config.strength)
        if config.detail:
            results = results - repainter.repaint(pixels[:1], None, target[:1], 0.0)
        results = F.interpolate(results, image.size[::-1], mode="bicubic", align_corners=False).cpu()
        if config.detail:
            results = results + torch.from_numpy(np.asarray(image) / np.float32(255)).permute(2, 0, 1)
        # In a folder, a.jpg and a.png may lie side by side.
        stem = path.relative_to(source) if source.is_dir() else path.stem
        for name, result in zip(names, to_bytes(results.clamp(0, 1)), strict=True):
            with atomic_write(Path(config.out) / f"{stem}_{name}.png") as temporary:
                Image.fromarray(result.transpose(1, 2, 0)).save(temporary)
    done = len(files) - len(broken)
    if broken:
        raise UserError(f"{done} of {len(files)} files repainted; not {'; '.join(broken[:3])}")
    print(f"{done * len(names)} pictures in {config.out}")


def list_images(source: Path) -> list[Path]:
    if not source.exists():
        raise UserError(f"no file and no folder {source}")
    files = [source] if source.is_file() else sorted(path for path in source.rglob("[!.]*") if path.is_file())
    if not files:
        raise UserError(f"{source} holds no image")
    return files


def target_styles(config, repainter: Repainter):
    """Names and weights (N, styles) of what each image is repainted in: styles, or --steps between two."""
    names = config.style or repainter.classes
    weights = torch.eye(len(repainter.classes))[[repainter.classes.index(style) for style in names]]
    if config.steps:
        shares = torch.linspace(0, 1, config.steps)[:, None]
        weights = (1 - shares) * weights[:1] + shares * weights[1:]
        names = [f"{names[0]}_to_{names[1]}_{step + 1}" for step in range(config.steps)]
    return names, weights.to(repainter.device)


def open_image(path, size: int, resize: str, **_):
    """A file as an image of at most LONGEST pixels a side, and as the model sees it, uint8 (3, size, size)."""
    pixels = read_image(path, size, resize).copy()  # torch needs writable memory
    image = open_rgb(path, LONGEST)
    if resize == "crop":
        image = ImageOps.fit(image, (min(image.size),) * 2)
    image.thumbnail((LONGEST, LONGEST))
    return image, torch.from_numpy(pixels)


def to_bytes(images) -> np.ndarray:
    return (255 * images).round().byte().numpy()


# Scores ---------------------------------------------------------------------------------------------------------------


def evaluate(repainter: Repainter, config) -> None:
    """Repaint test paintings in every style; score and plot the results."""
    run, classes, data = Path(config.run), repainter.classes, repainter.paintings("test", config)
    judges = load_judges(config, classes, repainter.device)
    chosen = np.linspace(0, len(data) - 1, min(config.paintings, len(data))).round().astype(int)
    others = np.setdiff1d(np.arange(len(data)), chosen)[: max(0, GALLERY - len(chosen))]
    gallery = all_images(data.subset(np.concatenate([chosen, others])), repainter.side)
    data, originals = data.subset(chosen), gallery[: len(chosen)]
    labels, source, rows = data.labels, F.one_hot(data.labels, len(classes)).float(), rows_to_show(data, config.hide)
    own_style = repainter.repaint_dataset(data, source, source, 0.0)
    repainted = repainter.repaint_in_each_style(data, source)

    facts = {"paintings": len(data), "shown": data.captions(rows), "strength_shown": data.captions(rows[:5])}
    facts |= {"strength": 1.0, "own_mse": F.mse_loss(own_style, originals).item()}
    hits = [predict_hits(judge, repainted) for judge in judges]
    facts |= judge_facts(judges[0], hits[0], "", "", labels, originals, own_style)
    facts["hits"] = {name: hits[0][style][labels != style].float().mean() for style, name in enumerate(classes)}
    for judge, judge_hits in zip(judges[1:], hits[1:], strict=True):
        facts |= judge_facts(judge, judge_hits, "second_", "second_judge_", labels, originals, own_style)
    if repainter.conditioned:
        blind_hits = predict_hits(judges[0], repainter.repaint_in_each_style(data, None))
        facts["own_unknown_hit_rate"] = mean_over_pairs(blind_hits, labels)
        facts |= reconstruction_ratio(run / "autoencoder.pt", repainter, data, facts["own_mse"])
    layouts, sources = layout(gallery), torch.arange(len(data))
    found = [(layout(images) @ layouts.T).argmax(1) == sources for images in repainted]
    facts["source_found"] = mean_over_pairs(found, labels)
    facts["ssim"] = mean_over_pairs([ssim(originals, images) for images in repainted], labels)
    facts |= true_image_facts([title_of(path) for path in data.paths], labels, originals, repainted)

    name = config.name or ("" if repainter.conditioned else config.method)
    suffix = f"_{name}.png" if name else ".png"
    plot_hits(run / f"style_hits{suffix}", hits[0], labels, classes)
    plot_grid(run / f"style_grid{suffix}", data, rows, originals, own_style, repainted, config.style)
    plot_strengths(run / f"style_strength{suffix}", repainter, data.subset(rows[:5]))
    add_facts(run, "style_transfer", {name: facts} if name else facts, merge=True)
    print(
        f"the judge, right on {facts['judge_accuracy']:.1%} of the originals, predicts the target style for "
        f"{facts['hit_rate']:.1%} (for the originals {facts['originals_rate']:.1%}); "
        f"source found first for {facts['source_found']:.1%}, SSIM {facts['ssim']:.3f}"
    )


def load_judges(config, classes: list[str], device) -> list[Classifier]:
    if len(config.judges) not in (1, 2):
        raise UserError("--judges needs one or two classifiers: the first gives hit_rate")
    judges = [Classifier.load(checkpoint_path(config.run, name), device) for name in config.judges]
    for judge, name in zip(judges, config.judges, strict=True):
        if judge.classes != classes:
            raise UserError(f"{name} has other styles than the model: train it on the same paintings")
    return judges


def all_images(data: WikiArt, side: int):
    """All paintings of a data set, float (N, 3, side, side) in [0, 1]."""
    batches = torch.arange(len(data)).split(BATCH_SIZE)
    return torch.cat([whole_images(data, items, side, torch.device("cpu"))[0] for items in batches])


def predict_styles(judge: Classifier, images):
    """The styles (N,) that a judge predicts for float images (N, 3, any, any) in [0, 1]."""
    pixels = [(255 * resize(batch, judge.size).clamp(0, 1)).round().byte() for batch in images.split(BATCH_SIZE)]
    return judge.predict(torch.cat(pixels), calibrated=False).argmax(1)


def predict_hits(judge: Classifier, repainted) -> list[torch.Tensor]:
    """For each target style: does the judge predict it for the images (N, 3, side, side)? (N,)"""
    return [predict_styles(judge, images) == style for style, images in enumerate(repainted)]


def mean_over_pairs(values, labels) -> float:
    """The mean of values, (N,) for each target style, over the paintings of other styles."""
    return float(torch.cat([row[labels != style] for style, row in enumerate(values)]).float().mean())


def judge_facts(judge: Classifier, hits, prefix: str, hit_prefix: str, labels, originals, own_style) -> dict:
    predictions = predict_styles(judge, originals)
    return {
        f"{prefix}judge_accuracy": (predictions == labels).float().mean(),
        f"{hit_prefix}hit_rate": mean_over_pairs(hits, labels),
        f"{prefix}originals_rate": mean_over_pairs([predictions == style for style in range(len(hits))], labels),
        f"{prefix}own_kept": (predict_styles(judge, own_style) == labels).float().mean(),
    }


def reconstruction_ratio(path: Path, repainter: Repainter, data: WikiArt, own_mse: float) -> dict:
    """The error in the own style relative to that of the plain autoencoder, if there is one with the same code size."""
    plain = load_checkpoint(path, "Autoencoder") if path.exists() else None
    if not plain or plain["crop"] != repainter.side or plain["arguments"]["code"] != len(repainter.model.scales):
        return {}
    model = build_model(plain).to(repainter.device)
    mse = mean_squared_error(lambda images, _: model(images), data, repainter.side, BATCH_SIZE, repainter.device)
    return {"reconstruction_ratio": own_mse / mse}


def true_image_facts(titles: list[str], labels, originals, repainted) -> dict:
    """How much nearer to the true image in the target style repaintings are than their sources.

    For test sets with the same scenes in every style, such as the demo: a scene is a title that occurs once in each
    style. Empty if there is none, or if a title occurs twice in one style.
    """
    row_of = {(title, int(label)): row for row, (title, label) in enumerate(zip(titles, labels, strict=True))}
    styles, unique = len(repainted), len(row_of) == len(titles)
    scenes = [title for title, count in Counter(titles).items() if title and unique and count == styles]
    pairs = [(row_of[title, a], row_of[title, b], b) for title in scenes for a, b in permutations(range(styles), 2)]
    if not pairs:
        return {}
    before = np.array([F.mse_loss(originals[row], originals[true]).item() for row, true, _ in pairs])
    after = np.array([F.mse_loss(repainted[style][row], originals[true]).item() for row, true, style in pairs])
    return {
        "truth_pairs": len(pairs),
        "truth_gain_db": 10 * np.log10(before.mean() / after.mean()),
        "truth_gain_median_db": np.median(10 * np.log10(before / after)),
        "truth_nearer": (after < before).mean(),
    }


# Figures --------------------------------------------------------------------------------------------------------------


def rows_to_show(data: WikiArt, hide: list[str]) -> list[int]:
    """ROWS paintings that figures may show, of as many different styles as possible, sorted by style."""
    rows, labels = np.flatnonzero(data.showable(hide)), data.labels
    if not len(rows):
        raise UserError("--hide leaves no painting to show")
    occurrence = {row: int((labels[rows[:place]] == labels[row]).sum()) for place, row in enumerate(rows)}
    chosen = sorted(rows, key=lambda row: (occurrence[row], labels[row]))[:ROWS]
    return sorted(chosen, key=lambda row: labels[row])


def plot_hits(path, hits, labels, classes: list[str]) -> None:
    rates = np.array([[row[labels == source].float().mean() for row in hits] for source in range(len(classes))])
    title, axes = "How often the judge predicts the target style", ("target style", "style of the painting")
    figures.heat(path, 100 * rates, classes, classes, title, "% of the paintings", axes)


def plot_grid(path, data: WikiArt, rows, originals, own_style, repainted, styles: list[str]) -> None:
    labels = [data.classes.index(style) for style in styles] or range(len(data.classes))[:COLUMNS]
    images = torch.stack([originals[rows], own_style[rows], *(repainted[label][rows] for label in labels)], 1)
    columns = ["original", "own style", *(display_name(data.classes[label]) for label in labels)]
    row_titles = [display_name(data.classes[label]) for label in data.labels[rows]]
    figures.grid(path, to_bytes(images), columns, row_titles, "Test paintings, repainted")


def plot_strengths(path, repainter: Repainter, data: WikiArt) -> None:
    """Paintings on the way from their own style to another."""
    names, strengths = [display_name(name) for name in data.classes], (0.0, 0.25, 0.5, 0.75, 1.0)
    labels = (data.labels + 1 + torch.arange(len(data)) % (len(names) - 1)) % len(names)
    source, target = (F.one_hot(values, len(names)).float() for values in (data.labels, labels))
    images = [repainter.repaint_dataset(data, source, target, strength) for strength in strengths]
    rows = [f"{names[start]} to {names[end]}" for start, end in zip(data.labels, labels, strict=True)]
    columns = [f"{strength:.0%}" for strength in strengths]
    figures.grid(path, to_bytes(torch.stack(images, 1)), columns, rows, "Strength of the style")


if __name__ == "__main__":
    run_script(main)
