"""The page's view of a collection: a map of its paintings by likeness, and styles over the years.

Paintings are reduced to thumbnails in one JPEG image, the atlas, which travels inside the HTML: no file is served.
"""

import html
import json
import math
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

from common.codes import SPLITS, code_files, codes_path, read_codes
from common.names import artist_and_title, caption_of, display_name, read_metadata, showable
from common.run import read_facts
from serve.panels import bars_html, inlined, jpeg, thumbnail

MAP_PAINTINGS = 600  # at most, drawn at random
SIDE = 128  # pixels of a thumbnail
TSNE_FROM = 12  # paintings; below, the first two principal components are the map
PREFERRED = ("classifier", "contrastive", "autoencoder")  # codes that tell likeness best, before others
SCRIPT = (Path(__file__).parent / "map.js").read_text()


class Collection:
    """What the run folder and the data have: `codes` is a file of codes or None, `metadata` the rows by path.

    codes: the classifier's own, which are preferred, or None.
    """

    def __init__(self, config, codes: Path | None):
        self.config, self.root, self.lock, self.content = config, Path(config.data), threading.Lock(), None
        self.metadata = read_metadata(self.root / "metadata.csv")
        self.sizes = read_facts(config.run).get("train", {}).get("class_sizes", {})
        self.codes = codes or find_codes(config.run)

    def exists(self) -> bool:
        return bool(self.codes or self.sizes or years_html(self.metadata))

    def html(self) -> str:
        """All that there is to show; computed once, in seconds, for all visitors."""
        with self.lock:
            if self.content is None:
                parts = {
                    "Paintings by likeness": map_html(self.codes, self.root, self.metadata, self.config.hide),
                    "Styles over the years": years_html(self.metadata),
                    "Training paintings by style": sizes_html(self.sizes),
                }
                self.content = "".join(f"<h2>{title}</h2>{part}" for title, part in parts.items() if part)
            return self.content


def find_codes(run) -> Path | None:
    paths = [codes_path(run, source) for source in PREFERRED]
    return next((path for path in [*paths, *code_files(run)] if path.exists()), None)


def sizes_html(sizes: dict[str, int]) -> str:
    rows = [(display_name(name), size, str(size)) for name, size in sorted(sizes.items(), key=lambda item: -item[1])]
    return bars_html(rows, max(sizes.values())) if rows else ""


# The map --------------------------------------------------------------------------------------------------------------


def map_html(codes: Path | None, root: Path, metadata: dict, hide: list[str]) -> str:
    """The map with its filters, which map.js brings to life; "" without codes, or where no picture can be read."""
    if codes is None:
        return ""
    table = read_codes(codes)
    paths = np.concatenate([table[f"{split}_paths"] for split in SPLITS])
    artists = np.concatenate([table[f"{split}_artists"] for split in SPLITS])
    styles = table["classes"][np.concatenate([table[f"{split}_labels"] for split in SPLITS])]
    genres = [metadata.get(path, {}).get("genre", "") for path in paths]
    rows = np.random.default_rng(0).permutation(np.flatnonzero(showable(genres, paths, hide)))
    pictures = {}  # thumbnails by row
    for row in rows:
        if len(pictures) == MAP_PAINTINGS:
            break
        try:
            pictures[row] = thumbnail(root / paths[row], SIDE)
        except Exception:  # Pillow's decoders raise almost anything, and the file may be absent
            continue
    if len(pictures) < 2:
        return ""
    rows = list(pictures)
    places = project(np.concatenate([table[split] for split in SPLITS])[rows])
    names = {"style": sorted(set(styles[rows])), "artist": sorted(set(artists[rows]) - {""})}
    paintings = []
    for row, place in zip(rows, places.tolist(), strict=True):
        years = metadata.get(paths[row], {}).get("year") or ""
        words = caption_of(artists[row], paths[row], styles[row], years)
        artist = names["artist"].index(artists[row]) if artists[row] else -1
        point = {"place": [round(value, 4) for value in place], "style": names["style"].index(styles[row])}
        point |= {"artist": artist, "words": words, "size": pictures[row].size}
        paintings.append(point)
    shown = {"style": [display_name(name) for name in names["style"]]}
    shown |= {"artist": [artist_and_title(name, "")[0] for name in names["artist"]]}
    content = {"side": SIDE, "paintings": paintings, "styles": shown["style"]}
    some = f"{len(rows)} of {len(paths)} paintings" if len(rows) < len(paths) else f"{len(paths)} paintings"
    words = f"{some}. Those that look similar to the network are near each other."
    return map_markup(content, atlas(list(pictures.values())), shown, words)


def map_markup(content: dict, picture: Image.Image, names: dict[str, list[str]], words: str) -> str:
    filters = "".join(
        f'<label>{key.capitalize()} <select data-filter="{key}"><option value="">all</option>'
        + "".join(f'<option value="{number}">{html.escape(name)}</option>' for number, name in enumerate(values))
        + "</select></label>"
        for key, values in names.items()
    )
    buttons = "".join(
        f'<button type="button" data-zoom="{factor}" aria-label="{name}">{sign}</button>'
        for factor, name, sign in (("1.5", "Zoom in", "+"), ("0.667", "Zoom out", "−"), ("0", "Whole map", "⤢"))
    )
    label = "Map of paintings by likeness: arrow keys go from painting to painting, plus and minus zoom, 0 shows all."
    return (
        f'<div class="map" data-content="{html.escape(json.dumps(content))}"><p>{html.escape(words)} Point at one '
        "or tap it to see it larger. Zoom with the wheel, two fingers or + and −, and drag to move; arrow keys go from "
        f'one to the next.</p><div class="filters">{filters}<span class="zoom">{buttons}</span><output></output></div>'
        f'<div class="sheet"><canvas tabindex="0" role="img" aria-label="{label}"></canvas>'
        '<div class="card" aria-live="polite" hidden><canvas aria-hidden="true"></canvas><p></p></div></div>'
        f'<ul class="names legend"></ul><img class="atlas" alt="" hidden src="{inlined(jpeg(picture, 80))}"></div>'
    )


def project(codes: np.ndarray) -> np.ndarray:
    """Places in the unit square, (N, 2), of codes (N, D), by t-SNE of their first principal components."""
    codes = StandardScaler().fit_transform(codes)
    codes = PCA(min(50, *codes.shape), random_state=0).fit_transform(codes)
    if len(codes) >= TSNE_FROM:
        codes = TSNE(perplexity=min(30, (len(codes) - 1) / 3), init="pca", random_state=0).fit_transform(codes)
    places = np.pad(codes, ((0, 0), (0, max(0, 2 - codes.shape[1]))))[:, :2]
    low, high = places.min(0), places.max(0)
    return (places - low) / np.maximum(high - low, 1e-9)


def atlas(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of at most SIDE x SIDE pixels in rows of ceil(sqrt(N)), each in the top left corner of its cell."""
    columns = math.ceil(len(pictures) ** 0.5)
    sheet = Image.new("RGB", (columns * SIDE, math.ceil(len(pictures) / columns) * SIDE))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * SIDE, number // columns * SIDE))
    return sheet


# The years ------------------------------------------------------------------------------------------------------------


def years_html(metadata: dict[str, dict]) -> str:
    """A table of the number of paintings by style and period; "" where the metadata has no years."""
    dated = []  # (style, year)
    for path, row in metadata.items():
        year = re.search(r"\d{4}", row.get("year") or "")
        folders = path.split("/")[:-1]
        if year and folders:
            dated.append((folders[folders[0] in ("train", "test") and len(folders) > 1], int(year[0])))
    if not dated:
        return ""
    first, last = (function(year for _, year in dated) for function in (min, max))
    period = next((period for period in (5, 10, 25, 50) if (last - first) / period < 12), 100)
    counts = Counter((style, year // period * period) for style, year in dated)
    starts, maximum = sorted({start for _, start in counts}), max(counts.values())
    header = "".join(f'<th scope="col">{start} to<br>{start + period - 1}</th>' for start in starts)
    table = f'<tr><th scope="col">Style</th>{header}</tr>'
    for style in sorted({style for style, _ in counts}):
        cells = [
            f'<td style="background: rgb(68 119 170 / {0.6 * count / maximum:.2f})">{count or ""}</td>'
            for count in (counts[style, start] for start in starts)
        ]
        table += f'<tr><th scope="row">{html.escape(display_name(style))}</th>{"".join(cells)}</tr>'
    return f'<div class="wide" tabindex="0"><table>{table}</table></div>'
