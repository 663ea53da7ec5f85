"""What strangers can send to `label.py serve`: each request gets its right answer or one line, and nothing is lost."""

import asyncio
import contextlib
import html
import http.client
import http.server
import io
import json
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from conftest import ROOT, picture, served
from PIL import Image
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from test_uploads import TURNED_AWAY, bytes_of

import label
import wikiart
from common.run import load_checkpoint, save_checkpoint
from serve import log, uploads

META = {"_type": "gradio.FileData"}
WORDS = (uploads.FAILED, "upload the picture first", "choose a label first", "choose a style first")


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A run folder with the MLP, whose answers differ from picture to picture, and an untrained painter."""
    run = tmp_path_factory.mktemp("server")
    shutil.copy(trained / "mlp/classifier.pt", run)
    classes = load_checkpoint(run / "classifier.pt")["classes"]
    arguments = {"styles": len(classes), "width": 8}
    state = {"model": "StyleAutoencoder", "arguments": arguments, "classes": classes}
    state |= {"data": {"size": 32, "resize": "squash"}}
    state |= {"weights": wikiart.make_model("StyleAutoencoder", arguments).state_dict()}
    save_checkpoint(run / "style.pt", state)
    return run


@pytest.fixture(scope="module")
def classifier(run):
    return wikiart.Classifier.load(run / "classifier.pt", "cpu")


@pytest.fixture(scope="module")
def server(run, demo):
    with served(run, "--data", demo) as process:
        yield process


@pytest.fixture(scope="module")
def paintings(demo):
    return [path.read_bytes() for path in sorted((demo / "test").rglob("*.jpg"))]


@pytest.fixture(scope="module")
def functions(server):
    """The number of each function of the page and the API, and how many inputs it has, by its name."""
    config = httpx.get(f"{server.address}config", timeout=60).json()
    return {each["api_name"]: (each["id"], len(each["inputs"])) for each in config["dependencies"]}


class Visitor:
    """Sends what the page's scripts send, in a session of its own."""

    def __init__(self, server, functions):
        self.client = httpx.Client(base_url=f"{server.address}gradio_api/", timeout=120)
        self.functions, self.session = functions, uuid.uuid4().hex

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()

    def upload(self, data, name="a.png") -> dict:
        token = self.client.post("upload", files={"files": (name, data)}).raise_for_status().json()[0]
        return {"path": token, "meta": META}

    def ask(self, name, *data):
        """The response of a function of the page; `data` are its inputs, None for the state, which the server keeps."""
        body = {"data": data, "fn_index": self.functions[name][0], "session_hash": self.session}
        return self.client.post("run/predict", json=body)

    def shown(self, name, *data) -> list:
        return self.ask(name, *data).raise_for_status().json()["data"]


@pytest.fixture
def visitor(server, functions):
    with Visitor(server, functions) as visitor:
        yield visitor


@pytest.fixture
def other(server, functions):
    with Visitor(server, functions) as visitor:
        yield visitor


def truth(classifier, data) -> dict[str, float]:
    """The three likeliest styles with their probabilities, which hardly two pictures share."""
    pixels = uploads.read_upload(data, classifier.size, classifier.resize)
    return dict(classifier.top(classifier.predict(torch.from_numpy(pixels)[None])[0]))


def is_right(answer, truth) -> bool:
    styles = {style["name"]: style["probability"] for style in answer["styles"]}
    return list(styles) == list(truth) and styles == pytest.approx(truth, abs=1e-4)


def error_of(response) -> str:
    """The error of a response, after checking that it is one line, without the request and the server's folders."""
    assert response.status_code >= 400, response.text
    assert len(response.text) < 700 and "\n" not in response.text.strip() and str(ROOT) not in response.text
    with contextlib.suppress(ValueError):
        content = response.json()
        return content.get("error") or content["detail"]
    return response.text


def saved(run):
    with sqlite3.connect(run / "corrections.sqlite") as base:
        query = "SELECT number, guess, choice, name, picture FROM corrections JOIN pictures USING (hash)"
        return base.execute(query).fetchall()


def log_of(server) -> str:
    return Path(server.log.name).read_text()


# Many at once


def label_one(visitor, number, data, names, choice):
    answer = visitor.client.post("run/label", json={"data": [visitor.upload(data)]}).json()["data"][0]
    assert is_right(answer, names)


def label_two(visitor, number, data, names, choice):
    files = [visitor.upload(b"no picture"), visitor.upload(data)]
    bad, good = visitor.client.post("run/label_batch", json={"data": [files]}).json()["data"][0]
    assert is_right(good, names) and "not a picture" in bad["error"]


def label_what_is_none(visitor, number, data, names, choice):
    data, message = sorted(TURNED_AWAY.items())[number % len(TURNED_AWAY)][1]
    assert message in error_of(visitor.client.post("run/label", json={"data": [visitor.upload(data)]}))


def send_nonsense(visitor, number, data, names, choice):
    response = visitor.client.post("run/label", content=b"{" * 99, headers={"Content-Type": "application/json"})
    assert (response.status_code, "JSON decode error" in error_of(response)) == (422, True)
    assert error_of(visitor.ask("save", None, choice)) == "unknown or expired upload: upload the picture first"


def classify(visitor, number, data, names, choice):
    *_, picture, answer, _, _, _, _, _ = visitor.shown("classify", visitor.upload(data, f"{number}.jpg"), None)
    assert f"<figcaption>{number}.jpg<" in picture
    assert re.findall("<li>(.*?): <b>", answer)[:3] == [name.replace("_", " ") for name in names]


def save(visitor, number, data, names, choice):
    classify(visitor, number, data, names, choice)
    status = visitor.shown("save", None, choice)[0]
    assert f"Saved: {choice.replace('_', ' ')}. You have saved 1 label." in status


def save_and_undo(visitor, number, data, names, choice):
    save(visitor, number, data, names, choice)
    assert f"for {number}.jpg. You have saved 0 labels." in visitor.shown("undo", None)[0]


def repaint(visitor, number, data, names, choice):
    classify(visitor, number, data, names, choice)
    assert f"in the style {choice.replace('_', ' ')}, strength 50%" in visitor.shown("repaint", None, choice, 50)[0]


def test_200_visitors_at_once_each_get_their_own_answer(server, functions, classifier, paintings, run):
    """Pictures to the API and the page, what is none, nonsense, labels saved and undone, repaintings, all together."""
    kinds = [label_one, label_one, label_one, label_two, label_what_is_none, send_nonsense]
    kinds += [classify, save, save_and_undo, repaint]
    chosen = paintings[::5]
    names = [truth(classifier, data) for data in chosen]
    assert len({tuple(f"{share:.3f}" for share in each.values()) for each in names}) > 3  # else a mix-up would not show
    files = [chosen[number % len(chosen)] + b"%d" % number for number in range(200)]  # each with an end of its own
    choices = [classifier.classes[number % len(classifier.classes)] for number in range(200)]
    together = threading.Barrier(200)

    def one(number):
        with Visitor(server, functions) as visitor:
            together.wait()
            kinds[number % len(kinds)](visitor, number, files[number], names[number % len(chosen)], choices[number])

    with ThreadPoolExecutor(200) as pool:
        list(pool.map(one, range(200)))
    expected = [
        (choices[number], f"{number}.jpg", files[number]) for number in range(kinds.index(save), 200, len(kinds))
    ]
    assert sorted(row[2:] for row in saved(run)) == sorted(expected)


# Pictures


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_picture_of_one_pixel_s_height_is_a_picture(visitor, classifier, size):
    data = bytes_of(Image.linear_gradient("L").resize(size).convert("RGB"))
    names = truth(classifier, data)
    label_one(visitor, 0, data, names, None)
    save(visitor, 0, data, names, classifier.classes[0])
    assert "too small" in error_of(visitor.ask("repaint", None, classifier.classes[0], 50))
    visitor.shown("undo", None)


def test_what_is_no_picture_is_a_line_on_the_page(visitor, classifier, paintings):
    """The same files as for the API, one after the other; the label of the picture before cannot be saved any more."""
    visitor.shown("classify", visitor.upload(paintings[0]), None)
    for data, message in TURNED_AWAY.values():
        problem, *_, status, _ = visitor.shown("classify", visitor.upload(data), None)
        assert message in problem["value"] and problem["visible"] and "saved" not in status
        assert "upload the picture first" in error_of(visitor.ask("save", None, classifier.classes[0]))


# Paths and addresses


@pytest.fixture
def canary():
    """A server of this machine, which nothing should visit: its address, and the paths that were asked for."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/", paths
        listening.shutdown()


def test_no_input_of_the_page_is_opened_or_fetched(visitor, functions, canary, run, tmp_path):
    """A file of the server or an address, wherever a request may name one, also where the page has a list of styles."""
    address, visited = canary
    (tmp_path / "secret.txt").write_text("nobody else may read this")
    places = [str(tmp_path / "secret.txt"), "/etc/passwd", f"{run}/classifier.pt", "../config.json"]
    places += [address, f"file://{tmp_path}/secret.txt", "http://name.invalid/a.png"]
    for name, (_, inputs) in functions.items():
        for number in range(inputs):
            for place in places:
                for file in ({"path": place}, {"path": "a.png", "url": place}):
                    data = [None] * inputs
                    data[number] = file | {"meta": META}
                    if name == "label_batch":
                        data = [data]
                    response = visitor.ask(name, *data)
                    assert not re.search("nobody else|root:|validation|secret|Name or service", response.text)
                    if response.status_code != 200:
                        assert error_of(response).endswith(WORDS)
                    elif name == "classify":
                        assert "upload the picture first" in response.text
    assert visited == []


# Other visitors


def test_a_state_that_a_visitor_sends_is_not_believed(visitor, other, classifier, paintings, run):
    """Another's token or label in the place of the server's own record: neither picture nor label can be had."""
    file, choice = visitor.upload(paintings[0], "mine.png"), classifier.classes[0]
    visitor.shown("classify", file, None)
    visitor.shown("save", None, choice)
    before = saved(run)
    folder, token = Path(file["path"]).parent, Path(file["path"]).name
    forged = {"token": token, "guess": choice, "probability": 1.0, "saved": [[row[0], "x"] for row in before]}
    for session in (other.session, "", visitor.session[:-1], visitor.session.upper(), None):
        other.session = session
        for name, rest in (("save", [choice]), ("repaint", [choice, 100])):
            assert "upload the picture first" in error_of(other.ask(name, forged, *rest))
        assert other.shown("undo", forged)[0] == ""
        for guess in (token[:-1], token.upper(), "*", ".", ""):
            answer = other.ask("classify", {"path": f"{folder}/{guess}", "meta": META}, forged).text
            assert any(words in answer for words in WORDS)
    assert saved(run) == before
    assert "for mine.png. You have saved 0 labels." in visitor.shown("undo", None)[0]


# Pages of other sites


ELSEWHERE = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},  # another program of this machine
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
]


@pytest.mark.parametrize("headers", ELSEWHERE)
def test_a_page_of_another_site_can_ask_for_nothing(visitor, functions, paintings, classifier, run, headers):
    """Not with the JSON of our page, and not with a form, for which browsers ask no permission."""
    before, data = saved(run), {"data": [None, classifier.classes[0]], "fn_index": functions["save"][0]}
    visitor.shown("classify", visitor.upload(paintings[0]), None)
    data["session_hash"] = visitor.session
    form = headers | {"Content-Type": "text/plain"}
    for response in (
        visitor.client.post("run/predict", json=data, headers=headers),
        visitor.client.post("queue/join", json=data, headers=headers),
        visitor.client.post("run/predict", content=json.dumps(data), headers=form),
        visitor.client.post("upload", files={"files": paintings[0]}, headers=headers),
        visitor.client.get("queue/data?session_hash=x", headers={"Sec-Fetch-Mode": "cors"} | headers),
    ):
        assert (response.status_code, "another site" in error_of(response)) == (403, True)
    assert saved(run) == before


def test_the_page_s_own_requests_and_links_to_it_are_answered(server, visitor, paintings):
    own = server.address.rstrip("/")
    for headers in ({"Origin": own}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert visitor.client.post("upload", files={"files": paintings[0]}, headers=headers).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert httpx.get(server.address, headers=link, timeout=60).status_code == 200


def test_names_of_other_servers_are_refused_and_not_kept(server, visitor):
    """DNS rebinding: for a browser, evil.example is this server then, and its own origin."""
    port = server.address.rstrip("/").rpartition(":")[2]
    for host in (f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.evil", "[::2]:80", "<script>", "a b"):
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        for response in (
            visitor.client.get(server.address, headers=headers),
            visitor.client.post("run/label", json={"data": []}, headers=headers),
        ):
            assert response.status_code in (400, 421) and "evil" not in error_of(response)
    for host in (f"localhost:{port}", f"LOCALHOST:{port}", f"[::1]:{port}", "127.0.0.1"):
        assert visitor.client.get("app_id", headers={"Host": host}).status_code == 200
    httpx.get(server.address, headers={"X-Forwarded-Host": "evil.example"}, timeout=60)
    assert "evil.example" not in httpx.get(server.address, timeout=60).text


def test_a_server_for_other_machines_has_any_name():
    guard = uploads.Guard(None, "0.0.0.0")
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"gpu.example:7860")]}
    assert guard.refuse(scope) is None
    assert uploads.Guard(None, "127.0.0.1").refuse(scope)[0] == 421


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.1.1", "Localhost", "LOCALHOST", "::1", "[::1]", "127.1"])
def test_every_address_of_this_machine_is_guarded(host):
    def refusal(name):
        return guard.refuse({"type": "http", "method": "GET", "path": "/", "headers": [(b"host", name.encode())]})

    guard = uploads.Guard(None, host)
    assert refusal("evil.example:7860")[0] == 421
    own = f"[{host}]" if ":" in host and "[" not in host else host
    assert refusal(f"{own}:7860") is refusal("localhost:7860") is refusal("127.0.0.1") is None


# Slow clients


def test_clients_that_stop_in_the_middle_keep_nobody_waiting(server, visitor, classifier, paintings):
    """100 that stop in the head, in the body, or do not read their answer; they are still there at the end."""
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {server.address.split('/')[2]}\r\nContent-Length: 999\r\n"
    form = "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    unread = f"GET /config HTTP/1.1\r\nHost: {server.address.split('/')[2]}\r\n\r\n" * 5
    with contextlib.ExitStack() as lines:
        for number in range(100):
            line = lines.enter_context(socket.create_connection(server.address.split("/")[2].split(":")))
            line.sendall(("", "P", head, head + form, unread)[number % 5].encode())
        repaint(visitor, 0, paintings[0], truth(classifier, paintings[0]), classifier.classes[0])


@contextlib.contextmanager
def small_server():
    """One that answers anything with "fine", in the class for connections that serve() uses; yields its port."""
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("fine"))])
    settings = uvicorn.Config(app, port=0, log_level="warning")
    settings.load()
    settings.http_protocol_class = uploads.with_timeout(settings.http_protocol_class)
    running = uvicorn.Server(settings)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join()


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ", b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET"]
)
def test_a_connection_without_a_whole_request_is_closed(monkeypatch, sent):
    monkeypatch.setattr(uploads, "RECEIVE_TIMEOUT", 0.2)
    with small_server() as port, socket.create_connection(("127.0.0.1", port), timeout=60) as line:
        line.sendall(sent)
        while line.recv(9999):  # up to the end of the connection
            pass


def test_a_request_that_arrives_byte_by_byte_has_an_end(monkeypatch):
    """Each byte in time, but not all of them."""
    now, answers = [0.0], []
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now[0])
    guard = uploads.Guard(Starlette(routes=uploads.upload_routes(uploads.Uploads(), "folder")))
    headers = [(b"content-length", b"9999"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers, "query_string": b""}

    async def receive():
        now[0] += uploads.RECEIVE_TIMEOUT - 1
        return {"type": "http.request", "body": b"--x\r\n" if now[0] < 30 else b"", "more_body": True}

    async def send(message):
        answers.append(message)

    asyncio.run(guard(scope, receive, send))
    assert answers[0]["status"] == 408 and now[0] < 2 * uploads.REQUEST_TIMEOUT


# JSON


NONSENSE = {
    "nested": b"[" * 900_000,
    "nested in the data": b'{"data": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a long path": b'{"data": [{"path": "' + b"a" * 900_000 + b'", "meta": {"_type": "gradio.FileData"}}]}',
    "a path of a list": b'{"data": [{"path": ["a"], "meta": {"_type": "gradio.FileData"}}]}',
    "half a character": b'{"data": [{"path": "\\ud800", "meta": {"_type": "gradio.FileData"}}]}',
    "no UTF-8": b'{"data": ["\xff\xfe"]}',
    "a long number": b'{"data": [' + b"9" * 5000 + b"]}",
    "NaN": b'{"data": [NaN]}',
    "many": b'{"data": [' + b"0," * 400_000 + b"0]}",
    "none": b'{"data": []}',
    "no data": b"{}",
    "a list": b"[1, 2]",
    "an object": b'{"data": {"a": "' + b"a" * 900_000 + b'"}}',
    "an odd session": b'{"data": [null], "session_hash": {"a": 1}}',
    "too large": b'{"data": ["' + b"a" * 2_000_000 + b'"]}',
    "half": b'{"data": [',
    "nothing": b"",
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_answered_in_a_line_and_hardly_logged(server, visitor, functions, name):
    before, headers = len(log_of(server)), {"Content-Type": "application/json"}
    for where in ("run/label", "run/predict", "call/label", "call/v2/label", "queue/join", "cancel", "run/nothing"):
        response = visitor.client.post(where, content=NONSENSE[name], headers=headers)
        if response.status_code != 200:  # of some, the answer is to be asked for in a second request
            assert error_of(response)
    assert "Traceback" not in log_of(server)
    assert len(log_of(server)) - before < 10 * log.LINE


@pytest.mark.parametrize(
    ("name", "data"),
    [("save", [[]]), ("save", [{"a": 1}]), ("save", ["'); DROP TABLE corrections; --"]), ("save", ["../../etc"])]
    + [("save", ["<script>"]), ("save", [True]), ("repaint", [["Dots"], 1]), ("repaint", ["Dots", [1]])]
    + [("repaint", ["Dots", "<b>"]), ("repaint", ["Dots", 1e300]), ("repaint", ["../Dots", 1])],
)
def test_choices_that_the_page_does_not_have_are_errors(visitor, paintings, run, name, data):
    before = saved(run)
    visitor.shown("classify", visitor.upload(paintings[0]), None)
    assert error_of(visitor.ask(name, None, *data)).endswith(WORDS)
    assert saved(run) == before


def test_a_strength_that_is_no_number_is_none(visitor, functions, paintings):
    visitor.shown("classify", visitor.upload(paintings[0]), None)
    body = b'{"data": [null, "Dots", NaN], "fn_index": %d, "session_hash": "%s"}'
    body %= functions["repaint"][0], visitor.session.encode()
    response = visitor.client.post("run/predict", content=body, headers={"Content-Type": "application/json"})
    assert "strength 0%" in response.json()["data"][0]


# What a correction contains


NAMES = [
    b"'); DROP TABLE corrections; --.png",
    b'<img src=x onerror="alert(1)">.png',
    b"../../../tmp/evil.png",
    b"/etc/cron.d/evil",
    b"\x1b]0;title\x07\x1b[2J.png",
    b"=cmd|' /C calc'!A0.png",
    b"..",
    b"caf\xe9.png",
    b"+2AA-.png",  # half a character, in UTF-7
]


def upload_as(visitor, name: bytes, data: bytes) -> dict:
    """An upload whose name is sent as these bytes, and is said to be in UTF-7."""
    quoted = name.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=utf-7"}
    reply = visitor.client.post("upload", content=part % (quoted, data), headers=headers)
    return {"path": reply.raise_for_status().json()[0], "meta": META}


def test_a_full_disk_loses_no_label(visitor, run, paintings):
    """SQLite's error, raised by triggers: the page says that it failed, and a label can still be taken back later."""
    visitor.shown("classify", visitor.upload(paintings[0]), None)
    visitor.shown("save", None, "Dots")
    before = saved(run)
    with contextlib.closing(sqlite3.connect(run / "corrections.sqlite")) as base:
        full = "ON corrections BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END;"
        base.executescript(f"CREATE TRIGGER a BEFORE INSERT {full} CREATE TRIGGER b BEFORE DELETE {full}")
        for request in (("save", None, "Drips"), ("undo", None)):
            assert error_of(visitor.ask(*request)) == uploads.FAILED
        base.executescript("DROP TRIGGER a; DROP TRIGGER b;")
    assert saved(run) == before
    assert "You have saved 0 labels." in visitor.shown("undo", None)[0]
    assert saved(run) == before[:-1]


def test_what_a_correction_contains_is_text_everywhere(visitor, run, tmp_path, capfd):
    """SQL, HTML, paths and codes for terminals as names: shown, saved, undone and exported as names."""
    before, test_files = saved(run), []
    for number, name in enumerate(NAMES):
        data = picture(tmp_path / "new.png", 100 + number, (90, 80)).read_bytes()
        pieces = visitor.shown("classify", upload_as(visitor, name, data), None)
        pieces += visitor.shown("save", None, "Dots") + (
            visitor.shown("repaint", None, "Dots", 100) if number < 3 else []
        )
        shown = "".join(piece for piece in pieces if isinstance(piece, str))
        assert not re.search('<script|<img src=x|onerror="', html.unescape(shown) if number != 1 else shown)
        assert saved(run)[-1][2:] == ("Dots", saved(run)[-1][3], data)
        if number % 2:
            visitor.shown("undo", None)
            assert len(saved(run)) == len(before) + 1 + number // 2
        else:
            test_files.append(data)
    target = tmp_path / "root" / "train"
    (tmp_path / "root/test/Dots").mkdir(parents=True)
    for number, data in enumerate(test_files[2:4]):
        (tmp_path / f"root/test/Dots/{number}.png").write_bytes(data)
    (tmp_path / "new.png").unlink()
    label.main(["export", str(target), "--run", str(run)])
    output = capfd.readouterr()
    assert "is a test painting" in output.err
    assert all(letter.isprintable() or letter == "\n" for letter in output.out + output.err)
    exported = [path.read_bytes() for path in target.rglob("*.*")]
    assert set(exported) == {row[4] for row in saved(run)} - set(test_files[2:4])
    outside = [path for path in tmp_path.rglob("*.png") if not path.is_relative_to(tmp_path / "root")]
    assert outside == [] and all(re.fullmatch(r"[\w-]+\.\w+", path.name) for path in target.rglob("*.*"))


# The log


class FullDisk(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_the_log_has_an_end(monkeypatch):
    """So many lines an hour, of so many characters, without codes for terminals; what is left out is counted."""
    now, target = [0.0], io.StringIO()
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    stream = log.BoundedStream(target)
    stream.write("a\x1b[2Jb\u202ec\n" + "x" * 10**6)
    stream.write("y" * 10**6 + "\n")
    for _ in range(10**4):
        stream.write("again\n")
    lines = target.getvalue().splitlines()
    assert lines[0] == "a\ufffd[2Jb\ufffdc" and lines[1] == "x" * log.LINE
    assert len(lines) == log.LINES + 1 and "left out" in lines[-1] and "60 minutes" in lines[-1]
    now[0] = log.PERIOD + 1
    stream.write("news\n")
    assert target.getvalue().splitlines()[-2:] == [f"{10**4 + 2 - log.LINES} lines of the log were left out", "news"]
    log.BoundedStream(FullDisk()).write("nothing\nhappens\n")


def test_what_c_code_writes_has_the_same_end():
    """As libtiff does about damaged files; the streams are as before at the end."""
    code = (
        "import os, sys\nfrom serve.log import bounded_stderr\n"
        "with bounded_stderr():\n"
        "    for number in range(2000):\n"
        "        os.write(2, b'C %d\\n' % number) if number % 10 == 0 else print('Python', number, file=sys.stderr)\n"
        "print('after', file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stderr.splitlines()
    assert len(lines) == log.LINES + 2 and lines[-1] == "after"


def test_bad_requests_do_not_fill_the_log(server, visitor, classifier, paintings):
    """As when it grew to 205 MB: requests that fail, and whose traceback would repeat what they contain."""
    before = len(log_of(server))
    body = {"data": [{"path": "a" * 20_000, "meta": META}]}
    for _ in range(log.LINES + 20):
        assert error_of(visitor.client.post("run/label", json=body)) == uploads.FAILED
    assert len(log_of(server)) - before < (log.LINES + 1) * (log.LINE + 1)
    assert "left out" in log_of(server)
    label_one(visitor, 0, paintings[0], truth(classifier, paintings[0]), None)
