"""What the page shows, as HTML. Images are inlined, each with alternative text, so that no file is served."""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.codes import code_files, made_from, read_codes
from common.config import ROOT
from common.crops import mean_over_views
from common.images import FORMATS, highlight, open_rgb
from common.metrics import low_confidence
from common.names import caption_of, display_name, read_metadata, showable, stem_of
from common.painter import Artist, Scene
from common.repaint import Repainter, check_model, open_picture
from common.run import load_checkpoint
from wikiart import build_model

NEIGHBOURS = 6
SIDE = 720  # pixels of the longer side of an upload on the page
REPAINTED = 1024  # and of a repainting
EXAMPLES = (  # (style, artist, scene) of common/painter.py, none of them in the demo data set
    ("Strokes", "vera-dumont", 4, "A landscape in brush strokes"),
    ("Flat_outlines", "kei-amano", 5, "A portrait in flat areas"),
    ("Facets", "leon-straka", 7, "A town in facets"),
)
EXAMPLE_SEED, EXAMPLE_SIDE = 1, 384
MAX_NAMES = 40  # of classes on the first screen
MAX_BARS = 8  # probabilities that are shown
CLICKS = """element.addEventListener("click", event => {
    const button = event.target.closest("button[data-example]");
    if (button) trigger("click", {value: button.dataset.example});
});"""


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def inlined(picture: bytes) -> str:
    """A JPEG file as an address that contains it."""
    return "data:image/jpeg;base64," + base64.b64encode(picture).decode()


def figure_html(image: Image.Image, alternative: str, caption: str) -> str:
    picture = f'<img src="{inlined(jpeg(image))}" alt="{html.escape(alternative)}">'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def paint_examples() -> list[tuple[str, bytes]]:
    """Caption and JPEG file of each of the EXAMPLES: painted by a program, because the repository has no paintings."""
    pictures = []
    for style, artist, number, caption in EXAMPLES:
        scene = Scene(number, EXAMPLE_SEED, 2 * EXAMPLE_SIDE)
        pictures.append((caption, jpeg(Image.fromarray(Artist(artist).paint(scene, style)).reduce(2), 92)))
    return pictures


def introduction_html(classifier) -> str:
    """What the page does, in a sentence, and the classes that the classifier knows."""
    names = [display_name(name) for name in classifier.classes]
    more = len(names) - MAX_NAMES
    shown = [*names[:MAX_NAMES], f"and {more} more"] if more > 0 else names
    items = "".join(f"<li>{html.escape(name)}</li>" for name in shown)
    count = f"{len(names)} {classifier.target}s"
    sentence = f"Give it a picture of a painting, and it says which of these {count} fits best, and why:"
    return f'<p>{sentence}</p><ul class="names">{items}</ul>'


def examples_html(examples: list[tuple[str, bytes]]) -> str:
    buttons = [
        f'<button type="button" data-example="{number}"><img src="{inlined(picture)}" alt="">{caption}</button>'
        for number, (caption, picture) in enumerate(examples)
    ]
    return f'<div>or try one of these, painted by a program:</div><div class="examples">{"".join(buttons)}</div>'


def bars_html(rows: list[tuple[str, float, str]], maximum: float) -> str:
    """Bars of (name, value, value in words), which screen readers read out."""
    items = [
        f'<li>{name}: <b>{words}</b><meter aria-label="{name}" aria-valuetext="{words}" '
        f'max="{maximum:g}" value="{value:.4f}"></meter></li>'
        for name, value, words in ((html.escape(name), value, html.escape(words)) for name, value, words in rows)
    ]
    return f'<ol class="bars">{"".join(items)}</ol>'


def answer_html(classifier, probabilities) -> str:
    """The likeliest classes of one image, by its probabilities (classes,), and whether the classifier is unsure."""
    rows = classifier.top(probabilities, MAX_BARS)
    rows = [(display_name(name), share, f"{share:.0%}" if share >= 0.005 else "<1%") for name, share in rows]
    (name, _, share), unsure = rows[0], bool(low_confidence(probabilities[None])[0])
    title = f"Unsure: perhaps {name}, {share}" if unsure else f"{name}, {share}"
    parts = [f'<div role="status"><h2>{html.escape(title)}</h2></div>']
    if unsure:
        parts.append(
            f'<p class="unsure">The likeliest {classifier.target} has less than half of the probability: it may well '
            f"be wrong, or the picture of none of the {classifier.target}s.</p>"
        )
    others = len(classifier.classes) - len(rows)
    parts.append(bars_html(rows, 1))
    if others:
        parts.append(f"<p>{others} others: {max(0.0, 1 - sum(row[1] for row in rows)):.0%}</p>")
    if not classifier.calibrated:
        parts.append("<p>These probabilities are not calibrated.</p>")
    return "".join(parts)


def regions_html(classifier, image, data: bytes, guess: str) -> str:
    """An upload with the regions highlighted that spoke for a class; image: uint8 (1, 3, size, size)."""
    evidence = classifier.evidence(image, classifier.classes.index(guess))
    words = f"Evidence for {display_name(guess)}: strongest {position_of_maximum(evidence)}"
    picture = thumbnail(data, SIDE, classifier.resize)
    return figure_html(highlight(picture, evidence), words, f"{words}. Orange regions count for it, grey ones do not.")


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


def code_origin(classifier) -> str:
    """How `made_from` starts in the file of codes that are the classifier's own features; "" where it has none.

    A CNN's are written by cluster.py --codes classifier, those of a frozen backbone by embed.py.
    """
    if classifier.model_name == "CNN":
        return classifier.hash
    settings = classifier.checkpoint.get("config", {})
    if classifier.model_name != "Pretrained" or settings.get("finetune") != "none":
        return ""
    origin = {"weights": classifier.checkpoint["backbone_weights"].split()[-1], "size": classifier.model.size}
    origin |= {"stages": classifier.model.stages, "resize": classifier.resize, "shrink": settings["shrink"]}
    return json.dumps(origin)[:-1]


def code_command(classifier) -> str:
    """The script and flags that write the codes of code_origin()."""
    if classifier.model_name == "CNN":
        return "cluster.py --codes classifier"
    model, shrink = classifier.checkpoint["arguments"], classifier.checkpoint["config"]["shrink"]
    return f"embed.py --backbone {model['backbone']} --stages {model['stages']}" + f" --shrink {shrink}" * bool(shrink)


def own_codes(classifier, run) -> Path | None:
    """The run folder's file with the classifier's features of the paintings, if there is one."""
    origin = code_origin(classifier)
    for path in code_files(run) if origin else ():
        if made_from(path).startswith(origin):
            return path
    return None


class NearestPaintings:
    """The training paintings whose features are most similar to an image's, by cosine similarity.

    path: a file of the classifier's own features, see own_codes.
    """

    def __init__(self, classifier, path: Path, config):
        self.classifier, self.root, table = classifier, Path(config.data), read_codes(path)
        metadata = read_metadata(self.root / "metadata.csv")
        genres = [metadata.get(path, {}).get("genre", "") for path in table["train_paths"]]
        years = np.array([metadata.get(path, {}).get("year") or "" for path in table["train_paths"]])
        shown = showable(genres, table["train_paths"], config.hide)
        self.paths, self.artists = table["train_paths"][shown], table["train_artists"][shown]
        self.styles, self.years = table["classes"][table["train_labels"]][shown], years[shown]
        self.mean, self.std = table["train"].mean(0), table["train"].std(0) + 1e-6
        self.codes = self.normalise(table["train"][shown])

    def normalise(self, features):
        features = (features - self.mean) / self.std
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    def features(self, image) -> np.ndarray:
        """Features (1, D) of an image, as the codes were computed: embed.py shows a backbone the whole picture only."""
        if self.classifier.model_name == "CNN":
            return self.classifier.features(image).numpy()
        pixels = self.classifier.prepare(image)
        return mean_over_views(self.classifier.model.features, pixels, self.classifier.crop).cpu().numpy()

    def figures_html(self, image) -> str:
        """The NEIGHBOURS most similar paintings to an image, uint8 (1, 3, size, size)."""
        similarity = self.codes @ self.normalise(self.features(image))[0]
        figures = []
        for row in np.argsort(-similarity, kind="stable")[:NEIGHBOURS]:
            caption = caption_of(self.artists[row], self.paths[row], self.styles[row], self.years[row])
            try:
                figures.append(figure_html(thumbnail(self.root / self.paths[row], 288), caption, caption))
            except Exception:  # the features are here, but the file may be absent or damaged
                figures.append(f"<p>{html.escape(caption)}</p>")
        return f'<div class="pictures">{"".join(figures)}</div>'


def load_repainter(run, classifier) -> Repainter | None:
    """What repaints uploads: a style.pt for the classifier's styles, of the run folder or of report/.

    Raises UserError.
    """
    for path in (Path(run) / "style.pt", ROOT / "report" / "style.pt"):
        if path.exists():
            checkpoint = load_checkpoint(path, "StyleAutoencoder")
            check_model(checkpoint, path)
            if checkpoint["classes"] == classifier.classes:
                return Repainter(build_model(checkpoint), checkpoint["classes"], classifier, classifier.device)
    return None


def repaint_html(repainter: Repainter, data: bytes, name: str, style: str, strength: float) -> str:
    """An uploaded file, called `name`, in a style, in its own proportions, with a link that saves it."""
    painted = repainter.repaint(open_picture(data, REPAINTED), {style: 1.0}, strength=strength)
    source, words = inlined(jpeg(painted, 92)), f"The painting in the style {display_name(style)}"
    file = html.escape(f"{stem_of(name)}_{style}.jpg")
    return (
        f'<figure><img src="{source}" alt="{html.escape(words)}"><figcaption>{html.escape(words)}, strength '
        f'{strength:.0%}. <a class="download" download="{file}" href="{source}">Download, {painted.width} x '
        f"{painted.height} pixels</a></figcaption></figure>"
    )
