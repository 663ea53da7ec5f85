"""label.py: the table of a folder, what the API answers, and what it turns away."""

import asyncio
import csv
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_TRAIN, clear_line, picture, script, served
from gradio_client import Client, handle_file
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

import corrections
import folder as files
import label
import page
import panels
import runs
import scores
import test as evaluation
import train
import uploads
import wikiart
import windows

CPU = ["--device", "cpu", "--processes", "1"]


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A run folder of our own, with the classifier alone."""
    run = tmp_path_factory.mktemp("label")
    shutil.copy(trained / "classifier.pt", run)
    return run


@pytest.fixture(scope="module")
def labeller(run):
    return label.Labeller(run / "classifier.pt", torch.device("cpu"))


def asker(labeller, run, demo, artist=None):
    """Asks a function of the page, by its name, what it says of a picture's bytes; without a server."""
    held = uploads.Uploads()
    config = SimpleNamespace(run=str(run), data=str(demo), hide=[], megapixels=100, batch_size=8)
    blocks = page.build(labeller, artist, corrections.Corrections(run / "corrections.sqlite"), held, config)
    functions = {each.name: each.fn for each in blocks.fns.values()}
    return lambda name, data: functions[name]({"path": held.put("a.png", data)})


@pytest.fixture(scope="module")
def asked(labeller, run, demo):
    return asker(labeller, run, demo)


@pytest.fixture
def folder(demo, tmp_path):
    """Twelve paintings, some of them in folders below, two files that are none, and one without its end."""
    folder = tmp_path / "paintings"
    for number, path in enumerate(sorted((demo / "test").rglob("*.jpg"))[:12]):
        target = folder / ("below" if number % 3 == 0 else "") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no picture")
    (folder / "half.jpg").write_bytes(next(folder.glob("*.jpg")).read_bytes()[:200])
    picture(folder / ".hidden.png")
    return folder


def table(path):
    with open(path, newline="", errors="surrogateescape") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def ran(folder, run, out, *flags):
    label.main([str(folder), "--run", str(run), "--out", str(out), "--batch-size", "4", *CPU, *flags])
    return table(out)


def bytes_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# The command


def test_the_table_says_what_the_network_says(folder, run, labeller, tmp_path):
    rows = ran(folder, run, tmp_path / "labels.csv")
    assert sorted(rows) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                                  if path.is_file() and path.name != ".hidden.png")  # fmt: skip
    for path, row in rows.items():
        if row["problem"]:
            assert path in ("empty.jpg", "text.png", "half.jpg")
            assert not row["style_1"]
            continue
        said = uploads.read_upload((folder / path).read_bytes(), labeller.shape, 1)
        truth = labeller(torch.from_numpy(said)[None])[0]
        three = [(row[f"style_{place}"], float(row[f"style_{place}_probability"])) for place in (1, 2, 3)]
        order = np.argsort(-truth)[:3]
        assert [share for _, share in three] == pytest.approx(truth[order], abs=1e-3)
        assert three[0][0] in labeller.classes
    assert sum(bool(row["problem"]) for row in rows.values()) == 3


def test_it_goes_on_where_it_was_killed(folder, run, tmp_path, monkeypatch, capsys):
    out, asked, whole = tmp_path / "labels.csv", [], label.Labeller.__call__
    complete = ran(folder, run, tmp_path / "complete.csv")

    def stopped(self, pixels):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(pixels))
        return whole(self, pixels)

    monkeypatch.setattr(label.Labeller, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        ran(folder, run, out)
    kept = table(out)
    assert len(kept) == 8
    with open(out, "ab") as file:
        file.write(b'"half a row, with a quote, Cubi')
    monkeypatch.setattr(label.Labeller, "__call__", whole)
    assert ran(folder, run, out) == complete
    assert "8 of 15 files are in" in capsys.readouterr().out
    before = out.read_bytes()
    ran(folder, run, out)
    assert out.read_bytes() == before


def test_a_killed_decoder_loses_nothing(folder, run, tmp_path, monkeypatch):
    out, whole = tmp_path / "labels.csv", files.read_picture
    complete = ran(folder, run, tmp_path / "complete.csv")
    last, lines = sorted(complete)[-1], (tmp_path / "complete.csv").read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:6]))  # what was done before

    def killed(path, *rest):
        if path == folder / last:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, *rest)

    monkeypatch.setattr(files, "read_picture", killed)
    with pytest.raises(OSError, match="a decoding process died, try --processes 1"):
        ran(folder, run, out)
    assert 5 <= len(table(out)) < len(complete)
    monkeypatch.undo()
    assert ran(folder, run, out) == complete


def test_broken_links_and_pipes_are_listed(run, tmp_path):
    odd = tmp_path / "odd"
    picture(odd / "fine.png")
    (odd / "link.png").symlink_to("fine.png")
    (odd / "gone.png").symlink_to("nowhere.png")
    (odd / "loop.png").symlink_to("loop.png")
    os.mkfifo(odd / "pipe.png")
    rows = ran(odd, run, tmp_path / "labels.csv")
    assert {path for path, row in rows.items() if row["problem"]} == {"gone.png", "loop.png", "pipe.png"}
    assert {path for path, row in rows.items() if row["style_1"]} == {"fine.png", "link.png"}


def test_odd_names_come_back(run, tmp_path):
    names = [
        "a,b.png",
        'quo"te.png',
        "line\nbreak.png",
        "ümlaut.png",
        b"latin-\xe9.png".decode(errors="surrogateescape"),
    ]
    for number, name in enumerate(names):
        picture(tmp_path / "odd" / name, number)
    assert sorted(ran(tmp_path / "odd", run, tmp_path / "labels.csv")) == sorted(names)
    before = (tmp_path / "labels.csv").read_bytes()
    ran(tmp_path / "odd", run, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_bytes() == before


def test_copies_are_sorted_by_style(folder, run, tmp_path):
    rows = ran(folder, run, tmp_path / "labels.csv", "--sort", str(tmp_path / "sorted"))
    copies = {path.relative_to(tmp_path / "sorted").as_posix() for path in (tmp_path / "sorted").rglob("*.jpg")}
    assert copies == {f"{row['style_1']}/{path}" for path, row in rows.items() if not row["problem"]}
    for copy in copies:
        source = folder / copy.partition("/")[2]
        assert (tmp_path / "sorted" / copy).read_bytes() == source.read_bytes()
    with pytest.raises(runs.Problem, match="lies in .* itself"):
        ran(folder, run, tmp_path / "labels.csv", "--sort", str(folder / "sorted"))


def test_an_artist_is_guessed_where_a_model_is_given(demo, folder, run, tmp_path):
    train.main([*TINY_TRAIN, "--data", str(demo), "--run", str(tmp_path), "--target", "artist", "--min-images", "1",
                "--epochs", "1"])  # fmt: skip
    artists = runs.load_checkpoint(tmp_path / "classifier.pt")["classes"]
    rows = ran(folder, run, tmp_path / "labels.csv", "--artist-checkpoint", str(tmp_path / "classifier.pt"))
    assert all((row["artist"] in artists) != bool(row["problem"]) for row in rows.values())


def test_another_checkpoint_does_not_go_on_with_the_table(folder, run, trained, tmp_path):
    ran(folder, run, tmp_path / "labels.csv")
    with pytest.raises(runs.Problem, match="is of another checkpoint"):
        ran(folder, trained, tmp_path / "labels.csv", "--checkpoint", str(trained / "mlp/classifier.pt"))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)  # files of the same names, but not the same files
    with pytest.raises(runs.Problem, match="or another folder"):
        ran(elsewhere, run, tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text("my own notes")
    with pytest.raises(runs.Problem, match="not a table"):
        ran(folder, run, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text() == "my own notes"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give a folder of paintings first"),
        (["nowhere"], "no folder nowhere"),
        (["--export", "somewhere"], "nothing was confirmed on the page yet"),
        (["nowhere", "--checkpoint", "missing.pt"], "no checkpoint"),
    ],
)
def test_a_mistake_gets_one_clear_line(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runs.Problem, match=message):
        label.main([*flags, "--run", str(run), "--device", "cpu"])


def test_a_user_sees_that_line():
    assert "no folder nowhere" in clear_line(
        script("label.py", "nowhere", "--device", "cpu", "--checkpoint", ROOT / "report/classifier.pt")
    )


def test_without_gradio_there_is_one_clear_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "page", None)
    with pytest.raises(runs.Problem, match=r"requirements-label\.txt"):
        label.main(["--serve", "--run", str(run), "--device", "cpu"])


# Calibration


def test_the_temperature_undoes_a_wrong_one():
    """Labels drawn from known probabilities: made surer by a factor, they are brought back by it."""
    random = np.random.default_rng(0)
    true = torch.from_numpy(random.dirichlet(np.ones(5), 20000))
    labels = torch.from_numpy(np.array([random.choice(5, p=row) for row in true.numpy()]))
    for factor in (0.4, 2.5):
        shown = windows.calibrate(true, factor)
        temperature = windows.fit_temperature(shown, labels)
        assert temperature == pytest.approx(1 / factor, rel=0.06)
        back = windows.calibrate(shown, temperature)
        before = scores.calibration_error(labels.numpy(), shown.numpy())
        assert scores.calibration_error(labels.numpy(), back.numpy()) < 0.02 < 0.1 < before
        assert torch.equal(shown.argmax(1), true.argmax(1))


def test_a_network_without_mistakes_is_not_made_sure_without_end():
    """On 50 paintings, all of them right: as sure as 50 paintings allow, and surer with 5000."""
    sure = []
    for count in (50, 5000):
        labels = torch.arange(count) % 5
        shown = torch.full((count, 5), 0.1).scatter_(1, labels[:, None], 0.6)
        sure.append(float(windows.calibrate(shown, windows.fit_temperature(shown, labels)).max()))
    assert 0.95 < sure[0] < 0.99 < 0.999 < sure[1] < 1


def test_the_calibration_error_worked_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
    # 0.9: one of two right, 0.4 off; 0.6: right, 0.4 off; 0.55: wrong, 0.55 off; each in a bin of its own
    assert scores.calibration_error(np.array([0, 1, 1, 0]), probabilities, 20) == pytest.approx(
        (2 * 0.4 + 0.4 + 0.55) / 4
    )


def test_the_checkpoint_has_a_temperature_and_older_ones_have_1(trained, demo, run, labeller, tmp_path, capsys):
    checkpoint = torch.load(trained / "classifier.pt", weights_only=True)
    assert labeller.temperature == checkpoint.pop("temperature") > 0
    torch.save(checkpoint, tmp_path / "old.pt")
    assert "calibrated" not in capsys.readouterr().err
    assert label.Labeller(tmp_path / "old.pt", torch.device("cpu")).temperature == 1
    assert "its probabilities are not calibrated" in capsys.readouterr().err
    for name, same in (("old.pt", True), (str(run / "classifier.pt"), labeller.temperature == 1)):
        evaluation.main(["--device", "cpu", "--processes", "1", "--data", str(demo), "--run", str(tmp_path),
                         "--checkpoint", name, "--bootstrap", "5"])  # fmt: skip
        facts = json.loads((tmp_path / "facts.json").read_text())["test"]
        assert (facts["ece_before"] == pytest.approx(facts["ece_after"], abs=1e-4)) == same
        assert 0 <= facts["ece_after"] <= 1


# Why


def test_the_regions_add_up_to_the_logit(labeller):
    """The evidence of all regions is the logit above the mean of all, but for what does not depend on the picture."""
    torch.manual_seed(0)
    model, left = labeller.model, []
    for number in range(3):
        pixels = torch.from_numpy(np.random.default_rng(number).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8))
        pixels[..., : 8 * number] //= 4
        image = windows.views(pixels, labeller.crop, max(1.0, *labeller.windows))[0]
        with torch.no_grad():
            logits = model(image)[0]
        left.append(float(logits[2] - logits.mean()) - labeller.evidence(pixels, 2).sum())
    assert left == pytest.approx([left[0]] * 3, abs=1e-3)


# What is turned away


def bomb(side):
    """A PNG of a few bytes that says it has side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
TURNED_AWAY = {
    "a bomb": (bomb(60_000), "million pixels"),
    "20,000 x 20,000": (bomb(20_000), "million"),
    "11,000 x 11,000": (bomb(11_000), "11000 x 11000"),
    "text": (b"no picture at all", "not a picture"),
    "nothing": (b"", "empty"),
    "SVG": (SVG, "not a picture"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "half a JPEG": (bytes_of(Image.effect_noise((200, 200), 50), "JPEG")[:900], "not a picture"),
}


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_what_is_no_picture_is_turned_away(name):
    data, message = TURNED_AWAY[name]
    with pytest.raises(runs.Problem, match=message):
        uploads.read_upload(data, {"size": 32, "resize": "squash"}, 100)


@pytest.mark.parametrize("kind", uploads.FORMATS)
def test_other_formats_are_read(kind):
    data = bytes_of(Image.effect_noise((50, 40), 50).convert("RGB"), kind)
    assert uploads.read_upload(data, {"size": 32, "resize": "squash"}, 1).shape == (3, 32, 32)


class Trap:
    """A decoder that takes everything, and comes first; it notes what it was shown."""

    def __enter__(self):
        self.shown, self.before = [], (Image.ID[:], Image.OPEN.copy())
        Image.register_open("TRAP", lambda file, name: None, lambda start: self.shown.append(start))
        Image.ID.insert(0, Image.ID.pop())
        return self

    def __exit__(self, *_):
        Image.ID[:] = self.before[0]
        del Image.OPEN["TRAP"]


def test_no_other_decoder_sees_an_upload(asked, paintings, tmp_path):
    picture(tmp_path / "a.png")
    with Trap() as trap:
        Image.open(tmp_path / "a.png").close()
        assert len(trap.shown) == 1
        for name in ("look", "label"):
            asked(name, paintings[0])
        store = corrections.Corrections(tmp_path / "corrections.sqlite")
        store.add("a.png", paintings[0], "m", "Cubism", 0.5, "Rococo")
        corrections.export(store, tmp_path / "exported")
        for name, (data, _) in TURNED_AWAY.items():
            with pytest.raises(page.gr.Error):
                asked("look", data)
            assert len(trap.shown) == 1, name


def test_a_stylist_sees_uploads_of_the_same_formats(paintings, tmp_path):
    arguments = {"styles": 2, "embedding": 8, "crop": 32, "code": 8, "width": 8}
    runs.save_checkpoint(tmp_path / "style.pt", {
        "model": "StyleAutoencoder", "arguments": arguments, "classes": ["A", "B"], "crop": 32,
        "data": {"size": 32, "resize": "squash"},
        "weights": wikiart.make_model("StyleAutoencoder", arguments).state_dict()})  # fmt: skip
    with Trap() as trap:
        painted = panels.Painter(SimpleNamespace(run=tmp_path), torch.device("cpu")).paint(paintings[0], "B")
    assert painted.size == Image.open(io.BytesIO(paintings[0])).size
    assert not trap.shown


def test_the_oldest_uploads_go_first(monkeypatch):
    held, now = uploads.Uploads(), [0.0]
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(uploads, "HELD", 10)
    first, second = (held.put(name, b"12345") for name in "ab")
    assert held.get(first) == ("a", b"12345")
    third = held.put("c", b"1")
    with pytest.raises(runs.Problem, match="upload the picture first"):
        held.get(first)
    assert (held.get(second)[0], held.get(third)[0]) == ("b", "c")
    now[0] = uploads.FORGET - 1
    assert held.get(third)
    now[0] = uploads.FORGET + 1
    with pytest.raises(runs.Problem, match="upload the picture first"):
        held.get(third)
    assert not held.held
    for number in range(uploads.FILES + 5):
        held.put(f"{number}" + "x" * 10**4, b"")
    assert len(held.held) == uploads.FILES
    assert max(len(name) for name, *_ in held.held.values()) < 300


def test_uploads_are_never_written_to_the_disk(monkeypatch):
    def written(*_):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", written)
    held = uploads.Uploads()
    with TestClient(Starlette(routes=uploads.upload_routes(held, "folder"))) as client:
        data = os.urandom(5 * 10**6)
        tokens = client.post("/gradio_api/upload", files={"files": ("a.png", data)}).json()
    assert held.get(Path(tokens[0]).name) == ("a.png", data)


def test_what_arrives_at_once_has_a_limit(monkeypatch):
    """Requests that are each small enough, sent all but their ends: memory holds no more of them than HELD."""
    monkeypatch.setattr(uploads, "HELD", 1000)
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": [(b"content-length", b"999")]}

    async def receive():
        return {"type": "http.request", "body": bytes(300), "more_body": True}

    async def another(scope, receive, send):
        """Each request is still arriving when the next one comes."""
        await receive()
        await guard(scope, receive, send)

    guard = uploads.Guard(another, 1)
    with pytest.raises(uploads.HTTPException) as error:
        asyncio.run(guard(scope, receive, None))
    assert error.value.status_code == 503
    assert guard.arriving == 0


def test_who_stops_in_the_middle_of_an_upload_is_turned_away(monkeypatch):
    monkeypatch.setattr(uploads, "PATIENCE", 0.01)
    app = Starlette(routes=uploads.upload_routes(uploads.Uploads(), "folder"))
    guard, answers = uploads.Guard(app, 1), []
    headers = [(b"content-length", b"999"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": headers, "query_string": b""}
    arriving = iter([{"type": "http.request", "body": b"--x\r\n", "more_body": True}])

    async def receive():
        return next(arriving, None) or await asyncio.Event().wait()

    async def send(message):
        answers.append(message)

    asyncio.run(guard(scope, receive, send))
    assert answers[0]["status"] == 408
    assert guard.arriving == 0


def test_who_waits_for_an_answer_is_not(monkeypatch):
    monkeypatch.setattr(uploads, "PATIENCE", 0.01)
    arriving = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive():
        return next(arriving, None) or await asyncio.sleep(0.1, {"type": "http.disconnect"})

    async def streaming(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"

    asyncio.run(
        uploads.Guard(streaming, 1)({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, None)
    )


# The API


@pytest.fixture(scope="module")
def server(run, demo):
    with served(run, "--data", demo, "--megabytes", "2", "--batch-size", "8") as process:
        yield process


@pytest.fixture(scope="module")
def paintings(demo):
    return [path.read_bytes() for path in sorted((demo / "test").rglob("*.jpg"))]


def truth(labeller, data):
    pixels = uploads.read_upload(data, labeller.shape, 100)
    return [name for name, _ in labeller.likeliest(labeller(torch.from_numpy(pixels)[None])[0])]


def still_right(server, labeller, data):
    with httpx.Client(timeout=60) as client:
        found = page.ask(client, server.address, data)
    assert [each["name"] for each in found["styles"]] == truth(labeller, data)


def test_gradio_client_gets_one_answer_and_many(server, labeller, paintings, demo, tmp_path):
    client = Client(server.address, verbose=False, analytics_enabled=False)
    files = sorted((demo / "test").rglob("*.jpg"))[:3]
    one = client.predict(handle_file(files[0]), api_name="/label")
    assert [each["name"] for each in one["styles"]] == truth(labeller, paintings[0])
    (tmp_path / "text.png").write_text("no picture")
    many = client.predict([handle_file(path) for path in (files[1], tmp_path / "text.png", files[2])],
                          api_name="/label_batch")  # fmt: skip
    assert [[each["name"] for each in answer.get("styles", [])] for answer in many] == [
        truth(labeller, paintings[1]), [], truth(labeller, paintings[2])]  # fmt: skip
    assert "not a picture" in many[1]["error"]
    with pytest.raises(Exception, match="1 to 8 files"):
        client.predict([handle_file(files[0])] * 9, api_name="/label_batch")


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here: apt-get install curl, as .ci/run does")
def test_curl_as_the_readme_has_it(server, labeller, paintings, demo):
    text = (ROOT / "README.md").read_text().partition("### API")[2].partition("\n## ")[0]
    command = text.partition("```sh\n")[2].partition("```")[0]
    assert command.count("curl") == 2
    command = command.replace("http://127.0.0.1:7860/", server.address)
    command = command.replace("my.jpg", str(min((demo / "test").rglob("*.jpg"))))
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(done.stdout)["data"][0]["styles"]
    assert [each["name"] for each in found] == truth(labeller, paintings[0])


def test_the_readme_s_python(server, demo):
    text = (ROOT / "README.md").read_text().partition("### API")[2].partition("\n## ")[0]
    code = text.partition("```python\n")[2].partition("```")[0]
    for name, path in zip(("my.jpg", "other.jpg"), sorted((demo / "test").rglob("*.jpg")), strict=False):
        code = code.replace(name, str(path))
    names = {}
    exec(code.replace("http://127.0.0.1:7860/", server.address), names)
    assert set(names["one"]) == {"model", "styles"}
    assert [set(each) for each in names["many"]] == 2 * [set(names["one"])]


def test_an_upload_is_good_for_one_answer(server, paintings):
    with httpx.Client(timeout=60) as client:
        token = client.post(f"{server.address}gradio_api/upload", files={"files": paintings[0]}).json()[0]
        file = {"path": token, "meta": {"_type": "gradio.FileData"}}
        replies = [client.post(f"{server.address}gradio_api/run/label", json={"data": [file]}) for _ in range(2)]
    assert [reply.status_code for reply in replies] == [200, 500]
    assert "upload the picture first" in replies[1].json()["error"]


def test_artists_are_answered_where_there_is_a_model_of_them(labeller, run, demo, paintings):
    answer = asker(labeller, run, demo, artist=labeller)("label", paintings[0])
    assert answer["artists"] == answer["styles"]


def test_the_page_says_what_only_a_cnn_has(trained, run, demo, paintings):
    mlp = label.Labeller(trained / "mlp/classifier.pt", torch.device("cpu"))
    shown = asker(mlp, run, demo)("look", paintings[0])[0]
    assert shown.count("for a CNN of train.py alone") == 2
    assert "cluster.py" not in shown  # which would not help


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_a_bad_upload_is_an_error_of_its_request_only(server, labeller, paintings, name):
    data, message = TURNED_AWAY[name]
    with httpx.Client(timeout=60) as client, pytest.raises(httpx.HTTPStatusError) as error:
        page.ask(client, server.address, data)
    assert message in error.value.response.json()["error"]
    still_right(server, labeller, paintings[0])


def test_what_is_too_large_is_turned_away_before_it_is_read(server, labeller, paintings):
    with httpx.Client(timeout=60) as client:
        large = client.post(f"{server.address}gradio_api/upload", files={"files": bytes(3 * 10**6)})
        assert large.status_code == 413
        endless = client.post(f"{server.address}gradio_api/upload", content=iter([b"a"] * 9))
        assert endless.status_code == 411
        both = {"Content-Length": "5", "Transfer-Encoding": "chunked"}  # the second is the one that would count
        assert (
            client.post(f"{server.address}gradio_api/upload", content=iter([b"a"] * 9), headers=both).status_code == 411
        )
        assert client.post(f"{server.address}gradio_api/run/label", content=bytes(3 * 10**6)).status_code == 413
    still_right(server, labeller, paintings[0])


SECRET = "nobody else may read this"


@pytest.mark.parametrize("how", ["file=", "file/", "proxy=", "file=%2e%2e/", "../", "stream/", "component_server/",
                                 "custom_component/", "static/", "assets/../../", "svelte/..%2f..%2f",
                                 "run/../file=", "upload/..%2ffile="])  # fmt: skip
def test_no_file_is_served(server, tmp_path, how):
    (tmp_path / "secret.txt").write_text(SECRET)
    for path in (tmp_path / "secret.txt", "/etc/passwd", "config.json", "classifier.pt"):
        for prefix in ("", "gradio_api/"):
            line = http.client.HTTPConnection(server.address.split("/")[2], timeout=30)
            line.request("GET", f"/{prefix}{how}{path}")  # as it is: httpx would tidy the path up
            said = line.getresponse().read()
            line.close()
            for secret in (SECRET.encode(), b"root:", b'"train_autoencoder"', b"PK\x03\x04"):
                assert secret not in said


def test_no_path_is_opened_for_an_api_request(server, labeller, paintings, demo):
    """A path, a URL, another's token: only what this client was given by the upload is looked at."""
    own = str(min((demo / "test").rglob("*.jpg")))
    file = {"meta": {"_type": "gradio.FileData"}}
    with httpx.Client(timeout=60) as client:
        token = client.post(f"{server.address}gradio_api/upload", files={"files": paintings[0]}).json()[0]
        for path in (own, "/etc/passwd", f"{token}/../../../../etc/passwd", f"file://{own}", f"{server.address}config",
                     str(Path(token).parent), "", token[:-1]):  # fmt: skip
            for data in ({**file, "path": path}, {**file, "path": token[:-1], "url": path}, path, None):
                for name, sent in (("label", data), ("label_batch", [data])):
                    reply = client.post(f"{server.address}gradio_api/run/{name}", json={"data": [sent]})
                    assert "styles" not in reply.text
                    assert "root:" not in reply.text
    still_right(server, labeller, paintings[0])


def test_a_client_that_hangs_up_leaves_the_service_as_it_was(server, labeller, paintings):
    with httpx.Client(timeout=60) as client:
        token = client.post(f"{server.address}gradio_api/upload", files={"files": paintings[0]}).json()[0]
    host, port = server.address.split("//")[1].strip("/").split(":")
    body = json.dumps({"data": [{"path": token, "meta": {"_type": "gradio.FileData"}}]}).encode()
    head = f"POST /gradio_api/run/label HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    for sent, length in ((body, len(body)), (body[:20], len(body)), (b"", 10**6)):
        with socket.create_connection((host, int(port))) as line:
            line.sendall(head.encode() + f"Content-Length: {length}\r\n\r\n".encode() + sent)
    still_right(server, labeller, paintings[0])


@pytest.mark.parametrize("part", ["head", "middle", "end"])
def test_a_client_that_hangs_up_in_the_middle_of_an_upload_is_forgotten(server, labeller, paintings, part):
    host, port = server.address.split("//")[1].strip("/").split(":")
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + paintings[0]
    sent = {"head": body[:20], "middle": body[: len(body) // 2], "end": body}[part]
    head = (f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body) + 9}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n")  # fmt: skip
    log = Path(server.log.name)
    before = log.read_text().count("Traceback")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.encode() + sent)
    still_right(server, labeller, paintings[0])
    assert log.read_text().count("Traceback") == before


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"[" * 10**6),
        ("application/json", b'{"data": [{"path": "' + b"a" * 10**6 + b'"}]}'),
        ("application/json", b'{"data": [{"path": ["a"], "meta": {"_type": "gradio.FileData"}}]}'),
        ("application/json", b'{"data": []}'),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=" + b"a" * 10**6),
        ("multipart/form-data", b"no boundary"),
        ("multipart/form-data; boundary=x", 1100 * b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"'
                                            b"\r\n\r\n\r\n" + b"--x--\r\n"),
    ],
    ids=["nested", "long path", "odd path", "no file", "long header", "no boundary", "1100 files"],
)  # fmt: skip
def test_odd_requests_are_errors_of_their_own_only(server, labeller, paintings, kind, body):
    where = "upload" if kind.startswith("multipart") else "run/label"
    with httpx.Client(timeout=60) as client:
        reply = client.post(f"{server.address}gradio_api/{where}", content=body, headers={"Content-Type": kind})
    assert 400 <= reply.status_code < 600
    assert "Traceback" not in reply.text
    still_right(server, labeller, paintings[0])


def test_200_requests_at_once_are_all_answered_and_right(server, labeller, paintings):
    expected = [truth(labeller, data) for data in paintings]
    assert len({tuple(each) for each in expected}) > 1  # else a mix-up would not show
    together = threading.Barrier(200)

    def one(number):
        with httpx.Client(timeout=120) as client:
            together.wait()
            found = page.ask(client, server.address, paintings[number % len(paintings)])
        return [each["name"] for each in found["styles"]]

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(one, range(200)))
    assert answers == [expected[number % len(paintings)] for number in range(200)]


def test_it_listens_on_loopback_alone(server):
    port = int(server.address.strip("/").rpartition(":")[2])
    lines = Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines()
    listening = [line.split()[1] for line in lines if f":{port:04X} " in line and line.split()[3] == "0A"]
    assert [each.partition(":")[0] for each in listening] == ["0100007F"]


# How fast


def test_measuring_gives_the_facts(demo, run):
    label.main([str(demo / "test"), "--measure", "--run", str(run), "--batch-size", "8", *CPU, "--port", "0"])
    facts = json.loads((run / "facts.json").read_text())["label"]
    assert facts["folder_share"] > 0
    assert facts["api_ratio"] == pytest.approx(facts["api_ms"] / facts["alone_ms"], rel=0.01)
    assert (facts["pictures"], facts["requests"]) == (32, 31)


def test_the_collection_is_a_table_of_years(demo, run, trained):
    shutil.copy(trained / "facts.json", run)
    shown = panels.collection(SimpleNamespace(run=str(run), data=str(demo)))
    sizes = json.loads((trained / "facts.json").read_text())["train"]["class_sizes"]
    for name, size in sizes.items():
        assert f"{name.replace('_', ' ')}: <b>{size}</b>" in shown
    rows = [{"path": f"train/A/{number}.jpg", "year": year} for number, year in enumerate((1601, "c. 1622", "", 1910))]
    found = panels.years({row["path"]: row | {"year": str(row["year"])} for row in rows})
    assert "1600 to 1649" in found
    assert ">2<" in found
    assert panels.years({}) == "<p>metadata.csv of the data knows no years.</p>"
