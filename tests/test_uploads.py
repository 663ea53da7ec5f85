"""serve/uploads.py: what is read, refused and held of uploads."""

import asyncio
import io
import os
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.testclient import TestClient

from common import images
from common.errors import UserError
from serve import uploads


def bytes_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
    with pytest.raises(UserError, match=message):
        uploads.read_upload(data, 32, "squash")


@pytest.mark.parametrize("kind", images.FORMATS)
def test_other_formats_are_read(kind):
    data = bytes_of(Image.effect_noise((50, 40), 50).convert("RGB"), kind)
    assert uploads.read_upload(data, 32, "squash").shape == (3, 32, 32)


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


def test_the_oldest_uploads_go_first(monkeypatch):
    held, now = uploads.Uploads(), [0.0]
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(uploads, "MAX_HELD", 10)
    first, second = (held.put(name, b"12345") for name in "ab")
    assert held.get(first) == ("a", b"12345")
    third = held.put("c", b"1")
    with pytest.raises(UserError, match="upload the picture first"):
        held.get(first)
    assert (held.get(second)[0], held.get(third)[0]) == ("b", "c")
    now[0] = uploads.LIFETIME - 1
    assert held.get(third)
    now[0] = uploads.LIFETIME + 1
    with pytest.raises(UserError, match="upload the picture first"):
        held.get(third)
    assert not held.files
    for number in range(uploads.MAX_FILES + 5):
        held.put(f"{number}" + "x" * 10**4, b"")
    assert len(held.files) == uploads.MAX_FILES
    assert max(len(name) for name, *_ in held.files.values()) < 300


def test_uploads_are_never_written_to_the_disk(monkeypatch):
    def written(*_):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", written)
    held = uploads.Uploads()
    with TestClient(Starlette(routes=uploads.upload_routes(held, "folder"))) as client:
        data = os.urandom(5 * 10**6)
        tokens = client.post("/gradio_api/upload", files={"files": ("a.png", data)}).json()
    assert held.get(Path(tokens[0]).name) == ("a.png", data)


def test_an_attribute_that_a_later_version_renames_is_not_replaced_in_silence(monkeypatch):
    monkeypatch.delattr(uploads.MultiPartParser, "spool_max_size")
    with pytest.raises(UserError, match=r"^starlette has no MultiPartParser\.spool_max_size in this version, so"):
        uploads.upload_routes(uploads.Uploads(), "folder")
    with pytest.raises(UserError, match=r"^test_uploads has no Trap\.renamed in .*: install an earlier version$"):
        uploads.replace(Trap, "renamed", None)
    assert not hasattr(Trap, "renamed")


def test_what_arrives_at_once_has_a_limit(monkeypatch):
    """Requests that are each small enough, sent all but their ends: memory holds no more of them than MAX_HELD."""
    monkeypatch.setattr(uploads, "MAX_HELD", 1000)
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": [(b"content-length", b"999")]}

    async def receive():
        return {"type": "http.request", "body": bytes(300), "more_body": True}

    async def another(scope, receive, send):
        """Each request is still arriving when the next one comes."""
        await receive()
        await guard(scope, receive, send)

    sent = []

    async def send(message):
        sent.append(message)

    guard = uploads.Guard(another)
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == 503 and b"too many uploads" in sent[1]["body"]
    assert guard.arriving == 0


def test_who_stops_in_the_middle_of_an_upload_is_turned_away(monkeypatch):
    monkeypatch.setattr(uploads, "RECEIVE_TIMEOUT", 0.01)
    app = Starlette(routes=uploads.upload_routes(uploads.Uploads(), "folder"))
    guard, answers = uploads.Guard(app), []
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
    monkeypatch.setattr(uploads, "RECEIVE_TIMEOUT", 0.01)
    arriving = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive():
        return next(arriving, None) or await asyncio.sleep(0.1, {"type": "http.disconnect"})

    async def streaming(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"

    asyncio.run(uploads.Guard(streaming)({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, None))
