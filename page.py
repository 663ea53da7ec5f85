"""What `label.py --serve` serves: a page for one painting and the collection, and an HTTP API for scripts (Gradio).

Uploads stay in memory (uploads.py); only Corrections writes, when a label is confirmed. Pictures reach the page
inside its HTML, each with its alternative text, so that no file is served at all.
"""

import base64
import contextlib
import html
import io
import json
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nobody is told what is done here

import gradio as gr  # noqa: E402
import httpx  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

import figures  # noqa: E402
import runs  # noqa: E402
from figures import plain  # noqa: E402
from folder import FORMATS, open_rgb, read_metadata, read_picture, title_of  # noqa: E402
from uploads import FORGET, Guard, Uploads, read_upload, upload_routes  # noqa: E402
from wikiart import build_model  # noqa: E402
from windows import views  # noqa: E402

AT_ONCE = 2  # pictures under way: one is decoded while the network looks at the other
NEIGHBOURS = 6
CSS = """
.bars {list-style: none; padding: 0; margin: 0 0 1em} .bars li {margin: .3em 0}
.bars meter {width: 100%; height: 1.2em; display: block}
.pictures {display: flex; flex-wrap: wrap; gap: 1em} figure {margin: 0; max-width: 100%}
.pictures img, figure img {max-width: 100%; height: auto; display: block}
.pictures figure {width: 18em} .pictures.small figure {width: 9em} figcaption {font-size: .9em}
.file-preview .download {display: none}
.wide {overflow-x: auto} .wide td, .wide th {padding: .2em .5em; text-align: right}
.wide th:first-child {text-align: left}
"""


# Requests -------------------------------------------------------------------------------------------------------------


def token_of(file) -> str:
    """The token in what Gradio's clients send for a file."""
    return Path(str(file.get("path", "") if isinstance(file, dict) else "")).name


@contextlib.contextmanager
def said_to_the_user():
    """A Problem is an answer to this request, no more."""
    try:
        yield
    except runs.Problem as problem:
        raise gr.Error(str(problem), print_exception=False, duration=None) from None


# What is shown --------------------------------------------------------------------------------------------------------


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


def small(source, side: int, formats=None) -> Image.Image:
    """A picture file, in its own proportions, of at most `side` pixels a side."""
    image = open_rgb(source, 2 * side, formats)
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
            artist = self.artists[row].replace("-", " ").title() or "unknown"
            words = f"{title_of(self.paths[row]).capitalize() or 'Painting'} by {artist}, {plain(self.styles[row])}"
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
        return painted.resize(small(io.BytesIO(data), 512, FORMATS).size, Image.Resampling.BICUBIC)


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


# The page and the API -------------------------------------------------------------------------------------------------


def build(labeller, artist, corrections, uploads: Uploads, config) -> gr.Blocks:
    nearest, painter = Nearest(labeller, config), Painter(config, labeller.device)
    turns = threading.BoundedSemaphore(AT_ONCE)  # whatever is asked at once, memory holds two batches of pictures

    def pixels_of(data):
        return torch.from_numpy(read_upload(data, labeller.shape, config.megapixels))

    def named(model, pixels):
        likeliest = map(model.likeliest, model(pixels))
        return [[{"name": name, "probability": round(share, 4)} for name, share in each] for each in likeliest]

    def answers(files: list) -> list[dict]:
        """What the API says of uploads, which are forgotten; what is wrong with one does not touch the others."""
        found, good = [], []
        for token in map(token_of, files):
            try:
                good.append(pixels_of(uploads.get(token)[1]))
                found.append({"model": labeller.hash[:12]})
            except runs.Problem as problem:
                found.append({"error": str(problem)})
            uploads.drop(token)
        models = ({"styles": labeller} | ({"artists": artist} if artist else {})) if good else {}
        for key, model in models.items():
            said = iter(named(model, torch.stack(good)))
            found = [each if "error" in each else each | {key: next(said)} for each in found]
        return found

    def label(file):
        with said_to_the_user(), turns:
            answer = answers([file])[0]
            if "error" in answer:
                raise runs.Problem(answer["error"])
            return answer

    def label_batch(files):
        with said_to_the_user(), turns:
            if not isinstance(files, list) or not 0 < len(files) <= config.batch_size:
                raise runs.Problem(f"give a list of 1 to {config.batch_size} files")
            return answers(files)

    def look(file):
        """The result, what later clicks need, and which controls are there now."""
        with said_to_the_user(), turns:
            token = token_of(file)
            try:
                name, data = uploads.get(token)
                pixels = pixels_of(data)[None]
            except runs.Problem:
                uploads.drop(token)
                raise
            probabilities = labeller(pixels)[0]
            (guess, probability), *_ = likeliest = labeller.likeliest(probabilities)
            image = small(io.BytesIO(data), 512, FORMATS)
            shown = [f'<div role="status"><h2>{html.escape(plain(guess))}, {probability:.0%}</h2></div>',
                     bars([(plain(style), share, f"{share:.0%}") for style, share in likeliest], 1),
                     "" if labeller.calibrated else "<p>These percentages are not calibrated.</p>"]  # fmt: skip
            if artist:
                (painter_name, share), *_ = artist.likeliest(artist(pixels)[0])
                words = f"Painter: {painter_name.replace('-', ' ').title()}, {share:.0%}"
                shown.append(f"<p>{html.escape(words)}</p>")
            pictures = [figure(image, "The painting as it was uploaded", Path(name).name)]
            if labeller.kind == "CNN":
                evidence = labeller.evidence(pixels, int(probabilities.argmax()))
                where = f"What spoke for {plain(guess)}: most of all the {place_of(evidence)}"
                pictures.append(figure(figures.highlight(image, evidence), where, f"{where}. Grey: nothing."))
            else:
                pictures.append("<p>Regions that spoke for it are shown for a CNN of train.py alone: the answer of "
                                f"this classifier ({labeller.kind}) is no sum over regions.</p>")  # fmt: skip
            shown.append(f'<h3>Why</h3><div class="pictures">{"".join(pictures)}</div>')
            shown.append("<h3>The nearest training paintings</h3>" + nearest.show(pixels))
            seen = {"token": token, "guess": guess, "probability": probability}
            return "".join(shown), seen, gr.update(visible=True), gr.update(value=guess), "", ""

    def save(seen, choice):
        with said_to_the_user():
            if choice not in labeller.classes:
                raise runs.Problem("choose one of the styles first")
            name, data = uploads.get((seen or {}).get("token"))
            corrections.add(name, data, labeller.hash[:12], seen["guess"], seen["probability"], choice)
            return f'<p role="status">Saved: {html.escape(plain(choice))}.</p>'

    def repaint(seen, style):
        with said_to_the_user(), turns:
            if style not in painter.classes:
                raise runs.Problem("choose one of the styles first")
            _, data = uploads.get((seen or {}).get("token"))
            words = f"The painting in the style {plain(style)}"
            return figure(painter.paint(data, style), words, words)

    def forget(seen):
        uploads.drop((seen or {}).get("token"))
        return "", None, gr.update(visible=False)

    with gr.Blocks(title="Which style is this painting?", analytics_enabled=False) as page:
        gr.Markdown("# Which style is this painting?")
        seen = gr.State(time_to_live=FORGET)
        with gr.Tab("A painting"):
            file = gr.File(label="Picture of a painting", file_types=["image"])
            result = gr.HTML()
            with gr.Column(visible=False) as more:
                choices = [(plain(name), name) for name in labeller.classes]
                choice = gr.Dropdown(choices, value=None, label="Its style is")
                button, saved = gr.Button("Save this label", variant="primary"), gr.HTML()
                button.click(save, [seen, choice], saved, api_visibility="private")
                painted = gr.HTML(render=False)
                if painter.model:
                    style = gr.Dropdown([(plain(name), name) for name in painter.classes], label="Repaint it as")
                    gr.Button("Repaint").click(repaint, [seen, style], painted, api_visibility="private")
                painted.render()
            file.upload(look, file, [result, seen, more, choice, saved, painted], preprocess=False,
                        api_visibility="private")  # fmt: skip
            file.clear(forget, seen, [result, seen, more], api_visibility="private")
        with gr.Tab("The collection"):
            gr.HTML(collection(config))
        one, many = gr.File(visible=False), gr.File(visible=False, file_count="multiple")
        answer, hidden = gr.JSON(visible=False), gr.Button(visible=False)
        # Answered directly: Gradio's queue would make every answer wait for its turn to be asked for.
        hidden.click(label, one, answer, api_name="label", preprocess=False, queue=False)
        hidden.click(label_batch, many, answer, api_name="label_batch", preprocess=False, queue=False)
    for each in (file, one, many):  # Gradio would fetch a URL, or copy the file, before our code sees it
        each.async_move_resource_to_block_cache = as_it_is
    return page.queue(default_concurrency_limit=None)  # `turns` is the limit


async def as_it_is(path):
    return path


def launch(labeller, artist, corrections, config) -> tuple[gr.Blocks, str]:
    """Start to serve; returns the page and its address."""
    uploads = Uploads()
    page = build(labeller, artist, corrections, uploads, config)
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1", "localhost"]))
    try:
        _, address, _ = page.launch(
            server_name=config.host,
            server_port=config.port or None,
            app_kwargs={
                "routes": upload_routes(uploads, gr.utils.get_upload_folder()),
                "middleware": [Middleware(Guard, megabytes=config.megabytes)],
            },
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # no fonts from elsewhere
            css=CSS,
            show_error=True,
            ssr_mode=False,
            run_history=False,
            share=False,
            quiet=True,
            footer_links=["api"],
            state_session_capacity=200,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise runs.Problem(f"cannot listen at {config.host}:{config.port}: {error}") from None
    return page, address


def serve(labeller, artist, corrections, config) -> None:
    page, address = launch(labeller, artist, corrections, config)
    print(f"serving at {address}; Ctrl-C stops it", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def ask(client: httpx.Client, address: str, picture: bytes) -> dict:
    """What curl does: upload a picture, and ask for its label."""
    token = client.post(f"{address}gradio_api/upload", files={"files": picture}).raise_for_status().json()[0]
    file = {"path": token, "meta": {"_type": "gradio.FileData"}}
    return client.post(f"{address}gradio_api/run/label", json={"data": [file]}).raise_for_status().json()["data"][0]


def latencies(labeller, files: list[Path], config, requests: int = 40) -> dict:
    """Milliseconds of one request at a time through the API, and of decoding and network alone; in turns, warm."""
    page, address = launch(labeller, None, None, config)
    spent = {"api": [], "alone": []}
    try:
        with httpx.Client(timeout=60) as client:
            for picture in [path.read_bytes() for path in files[: requests + 1]]:
                started = time.perf_counter()
                ask(client, address, picture)
                between = time.perf_counter()
                labeller(torch.from_numpy(read_upload(picture, labeller.shape, config.megapixels))[None])
                spent["api"].append(between - started)
                spent["alone"].append(time.perf_counter() - between)
    except httpx.HTTPStatusError as error:
        raise runs.Problem(f"the API turns a picture away: {error.response.text}") from None
    finally:
        page.close(verbose=False)
    api, alone = (1000 * float(np.median(times[1:])) for times in spent.values())  # the first warms up
    return {"api_ms": api, "alone_ms": alone, "api_ratio": api / alone, "requests": len(spent["api"]) - 1}
