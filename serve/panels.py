"""The panels of label.py's page, as HTML for screen readers, too: pictures come inside, with alternative texts."""

import base64
import html
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import runs
from figures import plain
from folder import FORMATS, open_rgb, painter_and_title, read_metadata, read_picture
from wikiart import build_model
from windows import views

NEIGHBOURS = 6


def figure(image: Image.Image, alternative: str, caption: str) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return (f'<figure><img src="{source}" alt="{html.escape(alternative)}"><figcaption>{html.escape(caption)}'
            "</figcaption></figure>")  # fmt: skip


def bars(rows: list[tuple[str, float, str]], most: float) -> str:
    """Names, heights of at most `most` and what they are in words, as bars that a screen reader can read."""
    items = (f'<li>{html.escape(name)}: <b>{words}</b><meter aria-label="{html.escape(name)}" '
             f'aria-valuetext="{words}" max="{most:g}" value="{height:.4f}"></meter></li>'
             for name, height, words in rows)  # fmt: skip
    return f'<ol class="bars">{"".join(items)}</ol>'


def small(source, side: int, formats=None, resize: str = "squash") -> Image.Image:
    """A picture file, in its own proportions, of at most `side` pixels a side; only its centre where that counts."""
    image = open_rgb(source, 2 * side, formats)
    if resize == "crop":
        image = ImageOps.fit(image, (min(image.size),) * 2)
    image.thumbnail((side, side))
    return image


def place_of(evidence: np.ndarray) -> str:
    """Where the evidence (h, w) is strongest, in words."""
    row, column = np.unravel_index(evidence.argmax(), evidence.shape)
    down, across = (int(3 * (at + 0.5) / size) for at, size in zip((row, column), evidence.shape, strict=True))
    words = f"{('top', 'middle', 'bottom')[down]} {('left', 'centre', 'right')[across]}"
    return words.replace("middle centre", "centre")


class Nearest:
    """The training paintings whose codes are most like a picture's, from what `cluster.py --codes classifier` made."""

    def __init__(self, labeller, config):
        self.labeller, self.root, self.codes, self.why_not = labeller, Path(config.data), None, ""
        path = Path(config.run) / "codes" / "classifier.npz"
        command = f"python cluster.py --codes classifier --renew --data {config.data} --run {config.run}"
        if labeller.kind != "CNN":
            self.why_not = f"They are found for a CNN of train.py alone; this classifier is another ({labeller.kind})."
            return
        if not path.exists():
            self.why_not = f"To see them: {command}"
            return
        with np.load(path) as table:
            if not str(table["made_from"]).startswith(labeller.hash):
                self.why_not = f"{path} was made from another checkpoint. To make it again: {command}"
                return
            codes, self.paths, self.artists = table["train"], table["train_paths"], table["train_artists"]
            self.styles = table["classes"][table["train_labels"]]
        genres = {path: row.get("genre", "") for path, row in read_metadata(self.root / "metadata.csv").items()}
        fit = [not any(word in path or word == genres.get(path) for word in config.hide) for path in self.paths]
        self.shown = np.flatnonzero(fit)
        self.mean, self.deviation = codes.mean(0), codes.std(0) + 1e-6
        self.codes = self.unit(codes[self.shown])

    def unit(self, codes):
        codes = (codes - self.mean) / self.deviation
        return codes / np.linalg.norm(codes, axis=1, keepdims=True)

    def show(self, pixels) -> str:
        if self.codes is None:
            return f"<p>{html.escape(self.why_not)}</p>"
        alike = self.codes @ self.unit(self.labeller.code(pixels))[0]
        found = []
        for row in self.shown[np.argsort(-alike, kind="stable")[:NEIGHBOURS]]:
            artist, title = painter_and_title(self.artists[row], self.paths[row])
            words = f"{title or 'Painting'} by {artist or 'unknown'}, {plain(self.styles[row])}"
            try:
                found.append(figure(small(self.root / self.paths[row], 288), words, words))
            except Exception:  # the codes are here, the paintings need not be
                found.append(f"<p>{html.escape(words)}</p>")
        return f'<div class="pictures small">{"".join(found)}</div>'


class Painter:
    """Repaints a picture in a style, where the run folder has a style.pt: see style_transfer.py."""

    def __init__(self, config, device):
        path = Path(config.run) / "style.pt"
        self.model, self.classes, self.device = None, [], device
        if path.exists():
            checkpoint = runs.load_checkpoint(path, "StyleAutoencoder")
            self.model = build_model(checkpoint).to(device)
            self.classes, self.crop = checkpoint["classes"], checkpoint["crop"]
            self.shape = {key: checkpoint["data"][key] for key in ("size", "resize")}

    @torch.no_grad()
    def paint(self, data: bytes, style: str) -> Image.Image:
        """The picture in the style, in its own proportions."""
        pixels = read_picture(io.BytesIO(data), **self.shape, formats=FORMATS)
        pixels = torch.from_numpy(pixels.copy())[None].to(self.device)
        wanted = torch.eye(len(self.classes), device=self.device)[[self.classes.index(style)]]
        images = views(pixels, self.crop)[0]
        painted = self.model.decode(self.model.encode(images), wanted, self.model.own_style(images))[0]
        painted = Image.fromarray((255 * painted.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy())
        size = small(io.BytesIO(data), 512, FORMATS, self.shape["resize"]).size
        return painted.resize(size, Image.Resampling.BICUBIC)


def collection(config) -> str:
    """Paintings per style, styles over the years, and the t-SNE map, as far as the run and the data have them."""
    facts_path, shown = Path(config.run) / "facts.json", []
    facts = json.loads(facts_path.read_text()) if facts_path.exists() else {}
    sizes = facts.get("train", {}).get("class_sizes", {})
    rows = [(plain(name), size, str(size)) for name, size in sorted(sizes.items(), key=lambda each: -each[1])]
    shown.append("<h2>Training paintings per style</h2>")
    shown.append(
        bars(rows, max(sizes.values())) if rows else f"<p>{html.escape(config.run)} has no facts of train.py.</p>"
    )
    shown.append("<h2>Styles over the years</h2>" + years(read_metadata(Path(config.data) / "metadata.csv")))
    maps = sorted(Path(config.run).glob("tsne_*.png"), key=lambda path: path.stem != "tsne_classifier")
    shown.append("<h2>Map</h2>")
    if maps:
        words = "Map by t-SNE: paintings that the network finds alike lie together; coloured by style, and by cluster"
        shown.append(figure(small(maps[0], 1600), words, words))
    else:
        shown.append("<p>cluster.py draws it.</p>")
    return "".join(shown)


def years(metadata: dict[str, dict]) -> str:
    """A table of paintings, style by period."""
    dated = []
    for path, row in metadata.items():
        year = re.search(r"\d{4}", row.get("year") or "")
        parts = path.split("/")
        if year and len(parts) > 1:
            dated.append((parts[1] if len(parts) > 2 and parts[0] in ("train", "test") else parts[0], int(year[0])))
    if not dated:
        return "<p>metadata.csv of the data knows no years.</p>"
    spread = max(year for _, year in dated) - min(year for _, year in dated)
    step = next((step for step in (5, 10, 25, 50) if spread / step < 12), 100)
    counts = Counter((style, year // step * step) for style, year in dated)
    periods, most = sorted({period for _, period in counts}), max(counts.values())

    def cell(number):
        share = 0.6 * number / most
        return f'<td style="background: rgb(68 119 170 / {share:.2f})">{number or ""}</td>'

    head = "".join(f'<th scope="col">{period} to {period + step - 1}</th>' for period in periods)
    lines = (f'<tr><th scope="row">{html.escape(plain(style))}</th>'
             + "".join(cell(counts[style, period]) for period in periods) + "</tr>"
             for style in sorted({style for style, _ in counts}))  # fmt: skip
    table = f'<table><tr><th scope="col">Style</th>{head}</tr>{"".join(lines)}</table>'
    return f'<div class="wide" tabindex="0">{table}</div>'
