"""The page of `label.py serve`, for one painting and for the collection, and its HTTP API (Gradio).

Uploads stay in memory (serve/uploads.py); only Corrections writes to the disk, when a label is confirmed.
"""

import contextlib
import functools
import html
import os
import threading
import time
import warnings
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which would send a message

import gradio as gr  # noqa: E402
import httpx  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.responses import JSONResponse  # noqa: E402

from common.config import ROOT  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.metrics import low_confidence  # noqa: E402
from common.names import display_name  # noqa: E402
from serve import collection, panels, uploads  # noqa: E402
from serve.corrections import NO_CLASS  # noqa: E402
from serve.log import bounded_stderr, log_failure, one_line  # noqa: E402

MAX_BATCH = 64  # files in a request to label_batch
CONCURRENT = 2  # requests at work: while one uses the network, another decodes its image
CSS = (Path(__file__).parent / "page.css").read_text()
LOCAL = "http://127.0.0.1:7860/"  # the address in the examples of docs/labelling.md
SHOW_ANSWER = """() => {
    const picture = document.getElementById("picture");
    if (picture && picture.getBoundingClientRect().bottom > innerHeight + 200) picture.scrollIntoView();
}"""


class Page:
    """The functions behind the page and the API.

    file: what Gradio's clients send for an upload; state: what a tab's visitor has done, see new_state. What the
    checkpoint or the run folder lack is left out of the page, and named in `notes`, for who started it.
    """

    def __init__(self, classifier, artist_classifier, corrections, upload_store: uploads.Uploads, config):
        self.classifier, self.artist_classifier = classifier, artist_classifier
        self.corrections, self.uploads = corrections, upload_store
        self.slots = threading.BoundedSemaphore(CONCURRENT)  # bounds the memory for decoded images
        self.examples = panels.paint_examples()
        codes = panels.own_codes(classifier, config.run)
        self.nearest = panels.NearestPaintings(classifier, codes, config) if codes else None
        self.repainter = panels.load_repainter(config.run, classifier)
        self.collection = collection.Collection(config, codes)
        self.notes = self.missing(config)

    def missing(self, config) -> list[str]:
        """A line for each part of the page that is left out."""
        lines, data = [], config.data if Path(config.data).is_dir() else "folder_of_known_paintings"
        if not self.nearest:
            why = f"{self.classifier.model_name} has no features"
            if panels.code_origin(self.classifier):
                why = f"python {panels.code_command(self.classifier)} --data {data} --run {config.run}"
            lines.append(f"no nearest paintings: {why}")
        if not self.repainter:
            lines.append(f"no repainting: {config.run} has no style.pt of these styles, nor has report/")
        return lines

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
                answers.append({"model": self.classifier.hash[:12], "classes": self.classifier.classes})
            except UserError as error:
                answers.append({"error": str(error)})
            self.uploads.drop(token)
        valid = [answer for answer in answers if "error" not in answer]
        for key, classifier in (("styles", self.classifier), ("artists", self.artist_classifier)):
            if classifier and valid:
                predictions = classifier.predict(torch.stack(images))
                for answer, probabilities in zip(valid, predictions, strict=True):
                    top = classifier.top(probabilities)
                    answer[key] = [{"name": name, "probability": round(probability, 4)} for name, probability in top]
                if key == "styles":
                    for answer, unsure in zip(valid, low_confidence(predictions).tolist(), strict=True):
                        answer["unsure"] = unsure
        return answers

    # The page

    def classify(self, file, state=None):
        """The answer to an upload: new values of all that is shown, in the order of `painting_tab`'s `shown`."""
        state, token = state or new_state(), token_of(file)
        self.uploads.drop(state["token"])  # the picture before
        state |= {"token": token, "guess": "", "probability": 0.0}
        try:
            with self.slots:
                name, data = self.uploads.get(token)
                image = self.decode(data)[None]
                probabilities = self.classifier.predict(image)[0]
                state["guess"], state["probability"] = self.classifier.top(probabilities, 1)[0]
                picture = panels.thumbnail(data, panels.SIDE, self.classifier.resize)
                parts = [
                    panels.figure_html(picture, "The uploaded painting", Path(name).name),
                    panels.answer_html(self.classifier, probabilities) + self.artist_html(image),
                    panels.regions_html(self.classifier, image, data, state["guess"]),
                    self.nearest.figures_html(image) if self.nearest else "",
                ]
        except UserError as error:
            self.uploads.drop(token)
            state["token"] = ""
            words = f'<p role="alert" class="problem">{html.escape(str(error))}</p>'
            problem = gr.update(value=words, visible=True)
            return problem, state, None, gr.update(visible=False), "", "", "", "", None, self.saved_html(state), ""
        return gr.update(visible=False), state, None, gr.update(visible=True), *parts, None, self.saved_html(state), ""

    def classify_example(self, state, event: gr.EventData):
        """The answer to a click on one of the examples, whose number the browser sends."""
        number = str(event._data.get("value"))
        caption, picture = self.examples[int(number) if number in map(str, range(len(self.examples))) else 0]
        return self.classify({"path": self.uploads.put(f"{caption}.jpg", picture)}, state)

    def artist_html(self, image) -> str:
        if not self.artist_classifier:
            return ""
        artist, share = self.artist_classifier.top(self.artist_classifier.predict(image)[0], 1)[0]
        return f"<p>Artist: {html.escape(artist.replace('-', ' ').title())}, {share:.0%}</p>"

    def save(self, state, choice):
        """Save the label that was chosen: its message, the state, and whether there is something to undo."""
        if choice is None:
            return '<p role="status">Choose a label first.</p>', state, gr.update()
        with request_errors():
            if choice not in (*self.classifier.classes, *NO_CLASS):
                raise UserError("choose a label first")
            name, data = self.uploads.get(state["token"] if state else "")
            model = self.classifier.hash[:12]
            number = self.corrections.add(name, data, model, state["guess"], state["probability"], choice)
            label = NO_CLASS.get(choice) or display_name(choice)
            state["saved"].append((number, f"{label} for {Path(name).name}"))
            message = f"Saved: {label}."
            return self.saved_html(state, message), state, gr.update(visible=True)

    def undo(self, state):
        """Take the label back that this visitor saved last."""
        if not state or not state["saved"]:
            return "", state, gr.update(visible=False)
        number, what = state["saved"][-1]
        self.corrections.remove(number)
        state["saved"] = [label for label in state["saved"] if label[0] != number]  # now, for the disk may be full
        return self.saved_html(state, f"Undone: {what}."), state, gr.update(visible=bool(state["saved"]))

    def saved_html(self, state, message: str = "") -> str:
        count = len(state["saved"])
        total = f"You have saved {count} label{'s' * (count != 1)}." if count or message else ""
        return f'<p role="status">{html.escape(message)} {total}</p>'

    def repaint(self, state, style, strength) -> str:
        if style is None:  # leaving the list with Tab asks for a repainting, too
            return '<p role="status">Choose a style first.</p>'
        with request_errors(), self.slots:
            if not self.repainter or style not in self.repainter.classes:
                raise UserError("choose a style first")
            name, data = self.uploads.get(state["token"] if state else "")
            share = min(max(0.0, float(strength or 0)), 100.0) / 100  # in this order, NaN is 0
            return panels.repaint_html(self.repainter, data, name, style, share)

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title="Which style is this painting?", analytics_enabled=False) as blocks:
            gr.Markdown("# Which style is this painting?")
            with gr.Tab("A painting"):
                self.painting_tab()
            if self.collection.exists():
                with gr.Tab("The collection") as tab:
                    shown = gr.HTML(js_on_load=collection.SCRIPT)
                    tab.select(self.collection.html, None, shown, api_visibility="private")
            with gr.Tab("API") as tab:
                text = gr.Markdown()
                tab.select(api_text, None, text, api_visibility="private")
            file, files = gr.File(visible=False), gr.File(visible=False, file_count="multiple")
            answer, button = gr.JSON(visible=False), gr.Button(visible=False)
            # Without Gradio's queue, through which clients would have to ask for each answer again.
            button.click(self.label, file, answer, api_name="label", preprocess=False, queue=False)
            button.click(self.label_batch, files, answer, api_name="label_batch", preprocess=False, queue=False)
        # Gradio would fetch a URL, or copy the file, before our code sees it, in whatever input a request names one.
        uploads.replace(gr.blocks.Block, "async_move_resource_to_block_cache", same_resource)
        blocks.process_api = with_short_errors(blocks.process_api)
        return blocks.queue(default_concurrency_limit=None)  # `slots` is the limit

    def painting_tab(self) -> None:
        private = {"api_visibility": "private"}
        state = gr.State(time_to_live=uploads.LIFETIME)
        gr.HTML(panels.introduction_html(self.classifier))
        with gr.Row():
            with gr.Column(min_width=300):
                file = gr.File(label="Picture of a painting", file_types=["image"], height=190)
            with gr.Column(min_width=300):
                examples = gr.HTML(panels.examples_html(self.examples), js_on_load=panels.CLICKS)
        problem = gr.HTML(visible=False)
        with gr.Column(visible=False) as result:
            with gr.Row():
                with gr.Column(min_width=300):
                    picture = gr.HTML(elem_id="picture")
                with gr.Column(min_width=300):
                    answer = gr.HTML()
                    choice, saved = self.correction_controls(state, private)
            with gr.Row():
                regions = self.section("The regions that decided", True, "regions")
                nearest = self.section("The most similar known paintings", self.nearest is not None, "nearest")
            painted = self.repainting_controls(state, private)
        shown = [problem, state, file, result, picture, answer, regions, nearest, choice, saved, painted]
        for event in (
            file.upload(self.classify, [file, state], shown, preprocess=False, **private),
            examples.click(self.classify_example, state, shown, **private),
        ):
            event.then(None, js=SHOW_ANSWER)

    def section(self, title: str, visible: bool, name: str) -> gr.HTML:
        """A part of the result below a title; it stays invisible where it can show nothing."""
        with gr.Column(min_width=300, visible=visible):
            gr.Markdown(f"### {title}")
            return gr.HTML(elem_id=name)

    def correction_controls(self, state, private: dict) -> tuple:
        choices = [(display_name(name), name) for name in self.classifier.classes]
        choices += [(words, name) for name, words in NO_CLASS.items()]
        target = self.classifier.target
        info = "Labels are saved with the picture, for training. Nothing else that you upload is saved."
        choice = gr.Dropdown(choices, value=None, label=f"Its {target} is", info=info)
        with gr.Row():
            save, undo = gr.Button("Save this label", variant="primary"), gr.Button("Undo", visible=False)
        saved = gr.HTML()
        save.click(self.save, [state, choice], [saved, state, undo], **private)
        undo.click(self.undo, state, [saved, state, undo], **private)
        return choice, saved

    def repainting_controls(self, state, private: dict) -> gr.HTML:
        with gr.Column(visible=self.repainter is not None):
            gr.Markdown("### The same picture in another style")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    names = [(display_name(name), name) for name in (self.repainter.classes if self.repainter else [])]
                    style = gr.Dropdown(names, value=None, label="Repaint it as")
                    strength = gr.Slider(0, 100, 100, step=5, label="Strength, %")
                    button = gr.Button("Repaint")
                with gr.Column(scale=3, min_width=300):
                    painted = gr.HTML(elem_id="painted")
            events, inputs = [button.click, style.input, strength.release], [state, style, strength]
            gr.on(events, self.repaint, inputs, painted, trigger_mode="always_last", **private)
        return painted


def new_state() -> dict:
    """What one visitor has done: token, guess and probability of the picture, and (number, label) of saved labels."""
    return {"token": "", "guess": "", "probability": 0.0, "saved": []}


def api_text(request: gr.Request) -> str:
    """The section on the API of docs/labelling.md, with the address at which the visitor found the page."""
    text = (ROOT / "docs/labelling.md").read_text().partition("## API\n")[2].partition("\n## ")[0]
    return text.replace(LOCAL, str(request.request.base_url))


@contextlib.contextmanager
def request_errors():
    """A UserError is the answer to this request, and is not logged."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def token_of(file) -> str:
    return Path(str(file.get("path", "") if isinstance(file, dict) else "")).name


async def same_resource(block, resource):
    return resource


def with_short_errors(process_api):
    """Gradio's function for all that the page and the API ask, with a line for errors that are not request_errors().

    Gradio's own messages repeat the request, in the log as well, and name folders of the server.
    """

    @functools.wraps(process_api)
    async def process(*arguments, **options):
        try:
            return await process_api(*arguments, **options)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            log_failure("a request of the page or the API", error)
            raise gr.Error(uploads.FAILED, print_exception=False) from None

    return process


async def answer_invalid(_, error: RequestValidationError) -> JSONResponse:
    """What is wrong with a request's JSON; FastAPI's own answer contains all of it once more."""
    problem = error.errors()[0]
    return JSONResponse({"error": one_line(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")}, 422)


@contextlib.contextmanager
def running(classifier, artist_classifier, corrections, config):
    """Serve the page and the API; yields the address and the Page. Raises UserError where it cannot listen."""
    upload_store = uploads.Uploads()
    page = Page(classifier, artist_classifier, corrections, upload_store, config)
    blocks = page.blocks()
    routes = uploads.upload_routes(upload_store, gr.utils.get_upload_folder())
    os.environ["no_proxy"] = ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1", "localhost"]))
    try:
        _, address, _ = blocks.launch(
            server_name=config.host,
            server_port=config.port or None,
            app_kwargs={
                "routes": routes,
                "middleware": [Middleware(uploads.Guard, host=config.host)],
                "exception_handlers": {RequestValidationError: answer_invalid},
            },
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # no fonts from other machines
            css=CSS,
            show_error=True,
            ssr_mode=False,
            run_history=False,
            share=False,
            quiet=True,
            footer_links=[],
            state_session_capacity=200,
            prevent_thread_lock=True,
        )
    except OSError as error:
        advice, reason = "is the address taken? give another --port, or --host", str(error).partition(". ")[0]
        raise UserError(f"cannot listen at {config.host}:{config.port}: {advice} ({reason})") from None
    settings = blocks.server.config  # uvicorn asks it for the class of every new connection
    settings.http_protocol_class = uploads.with_timeout(settings.http_protocol_class)
    try:
        yield address, page
    finally:
        blocks.close(verbose=False)


def serve(classifier, artist_classifier, corrections, config) -> None:
    warnings.simplefilter("ignore")  # Pillow's, about uploads: catch_warnings() is not safe with several threads
    with bounded_stderr(), running(classifier, artist_classifier, corrections, config) as (address, page):
        for note in page.notes:
            print(f"the page shows {note}")
        print(f"serving at {address}; Ctrl-C stops it", flush=True)
        page.collection.html()  # now, so that no visitor waits for it
        threading.Event().wait()


def request_label(client: httpx.Client, address: str, image: bytes) -> dict:
    """Upload an image file and ask for its label, as docs/labelling.md does with curl."""
    token = client.post(f"{address}gradio_api/upload", files={"files": image}).raise_for_status().json()[0]
    body = {"data": [{"path": token, "meta": {"_type": "gradio.FileData"}}]}
    return client.post(f"{address}gradio_api/run/label", json=body).raise_for_status().json()["data"][0]


def request_times(classifier, files: list[Path], config, requests: int = 40) -> dict:
    """Median milliseconds of an API request, and of decoding and network alone; one at a time, alternating."""
    seconds = []
    with running(classifier, None, None, config) as (address, _), httpx.Client(timeout=60) as client:
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
