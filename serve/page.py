"""What `label.py --serve` serves: a page for one painting and the collection, and an HTTP API for scripts (Gradio).

Uploads stay in memory (uploads.py); only Corrections writes, when a label is confirmed. Pictures reach the page
inside its HTML, each with its alternative text, so that no file is served at all.
"""

import contextlib
import html
import io
import os
import threading
import time
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nobody is told what is done here

import gradio as gr  # noqa: E402
import httpx  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

import figures  # noqa: E402
import runs  # noqa: E402
from figures import plain  # noqa: E402
from folder import FORMATS  # noqa: E402
from panels import Nearest, Painter, bars, collection, figure, place_of, small  # noqa: E402
from uploads import FORGET, Guard, Uploads, read_upload, upload_routes  # noqa: E402

AT_ONCE = 2  # pictures under way: one is decoded while the network looks at the other
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
            image = small(io.BytesIO(data), 512, FORMATS, labeller.shape["resize"])
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
