"""The page of `label.py serve`, for one painting and for the collection, and its HTTP API (Gradio).

Uploads stay in memory (serve/uploads.py); only Corrections writes to the disk, when a label is confirmed.
"""

import contextlib
import html
import os
import threading
import time
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would send a message

import gradio as gr  # noqa: E402
import httpx  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from common.errors import UserError  # noqa: E402
from common.images import highlight  # noqa: E402
from common.names import display_name  # noqa: E402
from serve import panels, uploads  # noqa: E402

MAX_BATCH = 64  # files in a request to label_batch
CONCURRENT = 2  # requests at work: while one uses the network, another decodes its image
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


class Page:
    """The functions behind the page and the API.

    file: what Gradio's clients send for an upload; state: token, guess and probability of a tab's image, or None.
    """

    def __init__(self, classifier, artist_classifier, corrections, upload_store: uploads.Uploads, config):
        self.classifier, self.artist_classifier = classifier, artist_classifier
        self.corrections, self.uploads = corrections, upload_store
        self.nearest = panels.NearestPaintings(classifier, config)
        self.repainter = panels.load_repainter(config.run, classifier)
        self.slots = threading.BoundedSemaphore(CONCURRENT)  # bounds the memory for decoded images
        self.collection = panels.collection_html(config)

    def decode(self, data: bytes) -> torch.Tensor:
        return torch.from_numpy(uploads.read_upload(data, self.classifier.size, self.classifier.resize))

    # The API

    def label(self, file) -> dict:
        with request_errors(), self.slots:
            answer = self.predict_uploads([file])[0]
            if "error" in answer:
                raise UserError(answer["error"])
            return answer

    def label_batch(self, files) -> list[dict]:
        with request_errors(), self.slots:
            if not isinstance(files, list) or not 0 < len(files) <= MAX_BATCH:
                raise UserError(f"send a list of 1 to {MAX_BATCH} files")
            return self.predict_uploads(files)

    def predict_uploads(self, files: list) -> list[dict]:
        """An answer for each upload, which is then dropped; an invalid one does not affect the others."""
        answers, images = [], []
        for token in map(token_of, files):
            try:
                images.append(self.decode(self.uploads.get(token)[1]))
                answers.append({"model": self.classifier.hash[:12]})
            except UserError as error:
                answers.append({"error": str(error)})
            self.uploads.drop(token)
        valid = [answer for answer in answers if "error" not in answer]
        for key, classifier in (("styles", self.classifier), ("artists", self.artist_classifier)):
            if classifier and valid:
                for answer, probabilities in zip(valid, classifier.predict(torch.stack(images)), strict=True):
                    top = classifier.top(probabilities)
                    answer[key] = [{"name": name, "probability": round(probability, 4)} for name, probability in top]
        return answers

    # The page

    def classify(self, file):
        """The result as HTML, the state, and updates of the controls: the column, the style, and two messages."""
        token = token_of(file)
        with request_errors(), self.slots:
            try:
                name, data = self.uploads.get(token)
                image = self.decode(data)[None]
            except UserError:
                self.uploads.drop(token)
                raise
            probabilities = self.classifier.predict(image)[0]
            guess, probability = self.classifier.top(probabilities, 1)[0]
            result = self.prediction_html(image, probabilities) + self.evidence_html(image, data, name, guess)
            result += "<h3>The most similar training paintings</h3>" + self.nearest.figures_html(image)
        state = {"token": token, "guess": guess, "probability": probability}
        return result, state, gr.update(visible=True), gr.update(value=guess), "", ""

    def prediction_html(self, image, probabilities) -> str:
        top = [(display_name(name), share, f"{share:.0%}") for name, share in self.classifier.top(probabilities)]
        result = f'<div role="status"><h2>{html.escape(top[0][0])}, {top[0][2]}</h2></div>{panels.bars_html(top, 1)}'
        if not self.classifier.calibrated:
            result += "<p>These probabilities are not calibrated.</p>"
        if self.artist_classifier:
            artist, share = self.artist_classifier.top(self.artist_classifier.predict(image)[0], 1)[0]
            result += f"<p>Artist: {html.escape(artist.replace('-', ' ').title())}, {share:.0%}</p>"
        return result

    def evidence_html(self, image, data: bytes, name: str, guess: str) -> str:
        picture = panels.thumbnail(data, panels.SIDE, self.classifier.resize)
        figures = panels.figure_html(picture, "The uploaded painting", Path(name).name)
        if self.classifier.model_name == "CNN":
            evidence = self.classifier.evidence(image, self.classifier.classes.index(guess))
            words = f"Evidence for {display_name(guess)}: strongest {panels.position_of_maximum(evidence)}"
            figures += panels.figure_html(highlight(picture, evidence), words, f"{words}. Grey: none.")
        else:
            figures += f"<p>Regions: only with a CNN of train.py; this is a {self.classifier.model_name}.</p>"
        return f'<h3>Why</h3><div class="pictures">{figures}</div>'

    def save(self, state, choice) -> str:
        with request_errors():
            if choice not in self.classifier.classes:
                raise UserError("choose one of the styles first")
            name, data = self.uploads.get((state or {}).get("token"))
            model = self.classifier.hash[:12]
            self.corrections.add(name, data, model, state["guess"], state["probability"], choice)
            return f'<p role="status">Saved: {html.escape(display_name(choice))}.</p>'

    def repaint(self, state, style) -> str:
        with request_errors(), self.slots:
            if style not in self.repainter.classes:
                raise UserError("choose one of the styles first")
            _, data = self.uploads.get((state or {}).get("token"))
            return panels.repaint_html(self.repainter, data, style)

    def clear(self, state):
        self.uploads.drop((state or {}).get("token"))
        return "", None, gr.update(visible=False)

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="Which style is this painting?", analytics_enabled=False) as blocks:
            gr.Markdown("# Which style is this painting?")
            with gr.Tab("A painting"):
                self.painting_tab()
            with gr.Tab("The collection"):
                gr.HTML(self.collection)
            file, files = gr.File(visible=False), gr.File(visible=False, file_count="multiple")
            answer, button = gr.JSON(visible=False), gr.Button(visible=False)
            # Without Gradio's queue, through which clients would have to ask for each answer again.
            button.click(self.label, file, answer, api_name="label", preprocess=False, queue=False)
            button.click(self.label_batch, files, answer, api_name="label_batch", preprocess=False, queue=False)
        for block in blocks.blocks.values():
            if isinstance(block, gr.File):  # Gradio would fetch a URL, or copy the file, before our code sees it
                block.async_move_resource_to_block_cache = identity
        return blocks.queue(default_concurrency_limit=None)  # `slots` is the limit

    def painting_tab(self) -> None:
        private = {"api_visibility": "private"}
        state = gr.State(time_to_live=uploads.LIFETIME)
        file, result = gr.File(label="Picture of a painting", file_types=["image"]), gr.HTML()
        with gr.Column(visible=False) as controls:
            choices = [(display_name(name), name) for name in self.classifier.classes]
            choice = gr.Dropdown(choices, value=None, label="Its style is")
            button, saved = gr.Button("Save this label", variant="primary"), gr.HTML()
            button.click(self.save, [state, choice], saved, **private)
            painted = gr.HTML(render=False)
            if self.repainter:
                styles = [(display_name(name), name) for name in self.repainter.classes]
                style = gr.Dropdown(styles, label="Repaint it as")
                gr.Button("Repaint").click(self.repaint, [state, style], painted, **private)
            painted.render()
        file.upload(self.classify, file, [result, state, controls, choice, saved, painted], preprocess=False, **private)
        file.clear(self.clear, state, [result, state, controls], **private)


@contextlib.contextmanager
def request_errors():
    """A UserError is the answer to this request, and is not logged."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False, duration=None) from None


def token_of(file) -> str:
    return Path(str(file.get("path", "") if isinstance(file, dict) else "")).name


async def identity(resource):
    return resource


@contextlib.contextmanager
def running(classifier, artist_classifier, corrections, config):
    """Serve the page and the API during this block; yields the address. Raises UserError where it cannot listen."""
    upload_store = uploads.Uploads()
    blocks = Page(classifier, artist_classifier, corrections, upload_store, config).blocks()
    routes = uploads.upload_routes(upload_store, gr.utils.get_upload_folder())
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1", "localhost"]))
    try:
        _, address, _ = blocks.launch(
            server_name=config.host,
            server_port=config.port or None,
            app_kwargs={"routes": routes, "middleware": [Middleware(uploads.Guard)]},
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # no fonts from other machines
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
        advice = "is the address taken? give another --port, or --host"
        raise UserError(f"cannot listen at {config.host}:{config.port}: {advice} ({error})") from None
    try:
        yield address
    finally:
        blocks.close(verbose=False)


def serve(classifier, artist_classifier, corrections, config) -> None:
    with running(classifier, artist_classifier, corrections, config) as address:
        print(f"serving at {address}; Ctrl-C stops it", flush=True)
        threading.Event().wait()


def request_label(client: httpx.Client, address: str, image: bytes) -> dict:
    """Upload an image file and ask for its label, as the README does with curl."""
    token = client.post(f"{address}gradio_api/upload", files={"files": image}).raise_for_status().json()[0]
    body = {"data": [{"path": token, "meta": {"_type": "gradio.FileData"}}]}
    return client.post(f"{address}gradio_api/run/label", json=body).raise_for_status().json()["data"][0]


def request_times(classifier, files: list[Path], config, requests: int = 40) -> dict:
    """Median milliseconds of an API request, and of decoding and network alone; one at a time, alternating."""
    seconds = []
    with running(classifier, None, None, config) as address, httpx.Client(timeout=60) as client:
        for path in files[: requests + 1]:
            data, start = path.read_bytes(), time.perf_counter()
            try:
                request_label(client, address, data)
            except httpx.HTTPStatusError as error:
                raise UserError(f"the API refuses {path}: {error.response.text}") from None
            middle = time.perf_counter()
            classifier.predict([path])
            seconds.append((middle - start, time.perf_counter() - middle))
    api, alone = 1000 * np.median(seconds[1:], 0)  # the first is a warm-up
    return {"api_ms": api, "alone_ms": alone, "api_ratio": api / alone, "requests": len(seconds) - 1}
