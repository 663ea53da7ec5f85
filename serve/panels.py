"""What the page shows, as HTML. Images are inlined, each with alternative text, so that no file is served."""

import base64
import html
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.codes import codes_path, read_codes
from common.images import FORMATS, open_rgb
from common.names import artist_and_title, display_name, read_metadata, showable
from common.repaint import Repainter, check_model, open_picture
from common.run import load_checkpoint, read_facts
from wikiart import build_model

NEIGHBOURS = 6
SIDE = 512  # pixels of the longer side of an upload on the page


def figure_html(image: Image.Image, alternative: str, caption: str) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    source = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    picture = f'<img src="{source}" alt="{html.escape(alternative)}">'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def bars_html(rows: list[tuple[str, float, str]], maximum: float) -> str:
    """Bars of (name, value, value in words), which screen readers read out."""
    items = [
        f'<li>{html.escape(name)}: <b>{words}</b><meter aria-label="{html.escape(name)}" aria-valuetext="{words}" '
        f'max="{maximum:g}" value="{value:.4f}"></meter></li>'
        for name, value, words in rows
    ]
    return f'<ol class="bars">{"".join(items)}</ol>'


def thumbnail(source, side: int, resize: str = "squash") -> Image.Image:
    """An image in its own proportions, at most `side` pixels wide and high; with resize="crop" its centre.

    source: a file's path, or the content of an upload, for which only the decoders of FORMATS are used.
    """
    upload = isinstance(source, bytes)
    image = open_rgb(io.BytesIO(source) if upload else source, 2 * side, FORMATS if upload else None)
    if resize == "crop":
        image = ImageOps.fit(image, (min(image.size),) * 2)
    image.thumbnail((side, side))
    return image


def position_of_maximum(evidence: np.ndarray) -> str:
    """Where the evidence (h, w) is strongest, in words: "top left", ..., "centre", ..."""
    position = np.unravel_index(evidence.argmax(), evidence.shape)
    row, column = (int(3 * (index + 0.5) / size) for index, size in zip(position, evidence.shape, strict=True))
    words = f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"
    return words.replace("middle centre", "centre")


class NearestPaintings:
    """The training paintings whose classifier features are most similar to an image's, by cosine similarity.

    Their features are those of `cluster.py --codes classifier`; `unavailable` says why there are none.
    """

    def __init__(self, classifier, config):
        self.classifier, self.root, self.unavailable = classifier, Path(config.data), ""
        path = codes_path(config.run, "classifier")
        table = read_codes(path) if path.exists() else {"made_from": ""}
        if classifier.model_name != "CNN":
            self.unavailable = f"Only with a CNN of train.py; this is a {classifier.model_name}."
        elif str(table["made_from"]).startswith(classifier.hash):
            self.load(table, config.hide)
        else:
            command = f"python cluster.py --codes classifier --data {config.data} --run {config.run}"
            self.unavailable = f"This needs {path}, computed with this classifier: {command}"

    def load(self, table, hide: list[str]) -> None:
        metadata = read_metadata(self.root / "metadata.csv")
        genres = [metadata.get(path, {}).get("genre", "") for path in table["train_paths"]]
        shown = showable(genres, table["train_paths"], hide)
        self.paths, self.artists = table["train_paths"][shown], table["train_artists"][shown]
        self.styles = table["classes"][table["train_labels"]][shown]
        self.mean, self.std = table["train"].mean(0), table["train"].std(0) + 1e-6
        self.codes = self.normalise(table["train"][shown])

    def normalise(self, features):
        features = (features - self.mean) / self.std
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def figures_html(self, image) -> str:
        """The NEIGHBOURS most similar paintings to an image, uint8 (1, 3, size, size)."""
        if self.unavailable:
            return f"<p>{html.escape(self.unavailable)}</p>"
        similarity = self.codes @ self.normalise(self.classifier.features(image).numpy())[0]
        figures = []
        for row in np.argsort(-similarity, kind="stable")[:NEIGHBOURS]:
            artist, title = artist_and_title(self.artists[row], self.paths[row])
            caption = f"{title or 'Painting'} by {artist or 'unknown'}, {display_name(self.styles[row])}"
            try:
                figures.append(figure_html(thumbnail(self.root / self.paths[row], 288), caption, caption))
            except Exception:  # the features are here, but the file may be absent or damaged
                figures.append(f"<p>{html.escape(caption)}</p>")
        return f'<div class="pictures small">{"".join(figures)}</div>'


def load_repainter(run, classifier) -> Repainter | None:
    """What repaints uploads, where the run folder has a style.pt for the classifier's styles. Raises UserError."""
    path = Path(run) / "style.pt"
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path, "StyleAutoencoder")
    check_model(checkpoint, path)
    if checkpoint["classes"] != classifier.classes:
        return None
    return Repainter(build_model(checkpoint), checkpoint["classes"], classifier, classifier.device)


def repaint_html(repainter: Repainter, data: bytes, style: str) -> str:
    """An uploaded file in a style, in its own proportions."""
    words = f"The painting in the style {display_name(style)}"
    return figure_html(repainter.repaint(open_picture(data, SIDE), {style: 1.0}), words, words)


def collection_html(config) -> str:
    """Paintings per style, styles over the years, and the t-SNE map, where the run and the data have them."""
    sizes = read_facts(config.run).get("train", {}).get("class_sizes", {})
    rows = [(display_name(name), size, str(size)) for name, size in sorted(sizes.items(), key=lambda item: -item[1])]
    missing = f"<p>{html.escape(config.run)}/facts.json has no facts of train.py.</p>"
    parts = ["<h2>Training paintings per style</h2>", bars_html(rows, max(sizes.values())) if rows else missing]
    parts += ["<h2>Styles over the years</h2>", years_html(read_metadata(Path(config.data) / "metadata.csv"))]
    parts.append("<h2>Map</h2>")
    maps = sorted(Path(config.run).glob("tsne_*.png"), key=lambda path: path.stem != "tsne_classifier")
    if maps:
        caption = "Map by t-SNE: paintings with similar features are close together; coloured by style, and by cluster"
        parts.append(figure_html(thumbnail(maps[0], 1600), caption, caption))
    else:
        parts.append("<p>cluster.py draws it.</p>")
    return "".join(parts)


def years_html(metadata: dict[str, dict]) -> str:
    """A table of the number of paintings by style and period."""
    dated = []  # (style, year)
    for path, row in metadata.items():
        year = re.search(r"\d{4}", row.get("year") or "")
        folders = path.split("/")[:-1]
        if year and folders:
            dated.append((folders[folders[0] in ("train", "test") and len(folders) > 1], int(year[0])))
    if not dated:
        return "<p>metadata.csv of the data has no years.</p>"
    first, last = (function(year for _, year in dated) for function in (min, max))
    period = next((period for period in (5, 10, 25, 50) if (last - first) / period < 12), 100)
    counts = Counter((style, year // period * period) for style, year in dated)
    starts, maximum = sorted({start for _, start in counts}), max(counts.values())
    header = "".join(f'<th scope="col">{start} to {start + period - 1}</th>' for start in starts)
    table = f'<tr><th scope="col">Style</th>{header}</tr>'
    for style in sorted({style for style, _ in counts}):
        cells = [
            f'<td style="background: rgb(68 119 170 / {0.6 * count / maximum:.2f})">{count or ""}</td>'
            for count in (counts[style, start] for start in starts)
        ]
        table += f'<tr><th scope="row">{html.escape(display_name(style))}</th>{"".join(cells)}</tr>'
    return f'<div class="wide" tabindex="0"><table>{table}</table></div>'
