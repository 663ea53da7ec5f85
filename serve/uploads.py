"""Requests and uploads of untrusted clients: limited in size and time, held in memory, and decoded by few decoders."""

import asyncio
import io
import ipaddress
import re
import secrets
import socket
import threading
import time
import warnings

import numpy as np
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from common.errors import UserError
from common.images import FORMATS, read_image
from serve.log import log_failure

MAX_REQUEST = 50_000_000  # bytes of an upload
MAX_JSON = 1_000_000  # bytes of any other request; Gradio keeps what 200 sessions have sent
MAX_PIXELS = 100_000_000  # pixels of an upload
MAX_HELD, MAX_FILES = 2**30, 1000  # bytes and number of all uploads that are held
LIFETIME = 3600  # seconds for which an upload is held
RECEIVE_TIMEOUT = 30  # seconds to wait for more of a request, or for the end of its head
REQUEST_TIMEOUT = 600  # seconds for a whole request
FAILED = "this request cannot be answered: it is not as the page or docs/labelling.md sends it, or the server failed"
LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
# The Gradio endpoints that the page and the API need. The others read files, or fetch from other machines.
ENDPOINTS = {"api", "app_id", "call", "cancel", "heartbeat", "info", "login_check", "queue", "reset", "run"}
ENDPOINTS |= {"startup-events", "theme.css", "upload", "upload_progress"}


class Uploads:
    """Uploaded files in memory, by random tokens: a token is no path, so it cannot lead to another file."""

    def __init__(self):
        self.files, self.lock = {}, threading.Lock()  # {token: (name, data, time of arrival)}, oldest first

    def put(self, name: str, data: bytes) -> str:
        with self.lock:
            token = secrets.token_urlsafe(24)
            name = name[-255:].encode(errors="replace").decode()  # a surrogate would fail later, in SQLite
            self.files[token] = (name, data, time.monotonic())
            self.expire()
            return token

    def get(self, token) -> tuple[str, bytes]:
        """Name and content of an upload. Raises UserError."""
        with self.lock:
            self.expire()
            if token not in self.files:
                raise UserError("unknown or expired upload: upload the picture first")
            return self.files[token][:2]

    def expire(self) -> None:
        """Remove what is older than LIFETIME, and the oldest while there is more than MAX_HELD or MAX_FILES."""
        size = sum(len(data) for _, data, _ in self.files.values())
        for token, (_, data, arrival) in list(self.files.items()):
            if size > MAX_HELD or len(self.files) > MAX_FILES or time.monotonic() - arrival > LIFETIME:
                del self.files[token]
                size -= len(data)

    def drop(self, token) -> None:
        with self.lock:
            self.files.pop(token, None)


def upload_routes(uploads: Uploads, folder: str) -> list[Route]:
    """Routes that replace Gradio's upload, which would write to `folder`; answers name tokens as if they lay there."""
    replace(MultiPartParser, "spool_max_size", 0)  # no limit: larger files would be written to the disk

    async def upload(request):
        try:
            async with request.form() as form:
                parts = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
                tokens = [uploads.put(part.filename or "", await part.read()) for part in parts]
        except ClientDisconnect:
            return PlainTextResponse("incomplete request", status_code=400)
        return JSONResponse([f"{folder}/{token}" for token in tokens])

    async def progress(request):  # the page asks for it during an upload
        return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    return [Route("/gradio_api/upload", upload, methods=["POST"]), Route("/gradio_api/upload_progress", progress)]


def replace(owner: type, name: str, value) -> None:
    """Set a class's attribute, which others use. Raises UserError where there is none: it would change nothing then."""
    if not hasattr(owner, name):
        package, missing = owner.__module__.partition(".")[0], f"{owner.__name__}.{name}"
        problem = f"{package} has no {missing} in this version, so uploads would not be safe"
        raise UserError(f"{problem}: install an earlier version")
    setattr(owner, name, value)


class Guard:
    """ASGI middleware that refuses large and foreign requests before they are read, and endpoints that are not needed.

    All requests that are arriving at the same time may have MAX_HELD bytes together. Each must send more within
    RECEIVE_TIMEOUT, and all of it within REQUEST_TIMEOUT. What fails is answered and logged in a line.

    host: the address that the server listens at. At one of this machine only, other names in the header Host are
    refused: a site of that name would otherwise read the page through a visitor's browser (DNS rebinding).
    """

    def __init__(self, app, host: str = "0.0.0.0"):
        self.app, self.arriving = app, 0  # bytes of the requests under way
        host = host.strip("[]").lower()
        self.names = LOCAL_NAMES | {host} if is_local(host) else None

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and (refusal := self.refuse(scope)):
            status, reason = refusal
            return await PlainTextResponse(reason, status_code=status)(scope, receive, send)
        received, complete, started, deadline = 0, False, False, time.monotonic() + REQUEST_TIMEOUT

        async def counting_receive():
            nonlocal received, complete
            left = min(RECEIVE_TIMEOUT, deadline - time.monotonic())
            try:  # of a complete request, the next message is the client's disconnect, which may take long
                message = await (receive() if complete else asyncio.wait_for(receive(), left))
            except TimeoutError:
                raise HTTPException(408, "the rest of the request did not arrive") from None
            complete = not message.get("more_body")
            size = len(message.get("body", b""))
            received, self.arriving = received + size, self.arriving + size
            if self.arriving > MAX_HELD:
                raise HTTPException(503, "too many uploads at the same time: try again")
            return message

        async def noting_send(message):
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, counting_receive, noting_send)
        except Exception as error:
            if scope["type"] != "http":  # the server's own start and end
                raise
            log_failure(f"{scope['method']} {scope['path']}", error)
            known = isinstance(error, HTTPException)
            status, reason = (error.status_code, error.detail) if known else (500, FAILED)
            if not started:
                await JSONResponse({"error": reason}, status)(scope, receive, send)
        finally:
            self.arriving -= received

    def refuse(self, scope) -> tuple[int, str] | None:
        """HTTP status and reason for a request that is refused."""
        first, second = (scope["path"].strip("/").split("/") + [""])[:2]
        if first in ("custom_component", "monitoring") or (first == "gradio_api" and second not in ENDPOINTS):
            return 404, "no such endpoint"
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"")
        if self.names and host and host_name(host) not in self.names:
            return 421, "not a name of this server, which is for this machine only: open the address that it prints"
        if is_foreign(scope["method"], headers):
            return 403, "a page of another site asked for this: open the server's own page"
        length = headers.get(b"content-length", b"0")
        if scope["method"] == "POST" and (b"content-length" not in headers or b"transfer-encoding" in headers):
            return 411, "Content-Length is required"
        limit = MAX_REQUEST if second == "upload" else MAX_JSON
        if not length.isdigit() or int(length) > limit:
            return 413, f"a request may have at most {limit / 1e6:g} MB here"
        return None


def is_local(host: str) -> bool:
    """Whether a server that listens at this address or name is for this machine only; all of 127.0.0.0/8 is."""
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):  # nor can a server listen there
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def host_name(host: bytes) -> str:
    """The header Host without its port: "localhost", "::1"."""
    name = host.decode("latin-1").lower()
    return re.sub(r":\d+$", "", name).strip("[]") if name.count(":") == 1 or name.startswith("[") else name


def is_foreign(method: str, headers: dict[bytes, bytes]) -> bool:
    """Whether a page of another site has made a visitor's browser send this request; following a link is none.

    As in Go's http.CrossOriginProtection. Browsers send Sec-Fetch-Site where they trust the connection, and Origin
    everywhere; other programs send neither.
    """
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if method in ("GET", "HEAD") and not origin and headers.get(b"sec-fetch-mode", b"navigate") == b"navigate":
        return False
    if site:
        return site not in (b"same-origin", b"none")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


def with_timeout(protocol):
    """uvicorn's class for a connection, made to close one that has no request complete within RECEIVE_TIMEOUT."""

    class Timed(protocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            self.watch()

        def watch(self, before=None):
            """Close the connection if it has answered no request since the last look, and is at none."""
            idle_since = (self.cycle,) if self.cycle is None or self.cycle.response_complete else None
            if idle_since and idle_since == before:
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(RECEIVE_TIMEOUT, self.watch, idle_since)

    return Timed


def read_upload(data: bytes, size: int, resize: str) -> np.ndarray:
    """An uploaded file as pixels uint8 (3, size, size). Raises UserError for one that is too large or not an image."""
    if not data:
        raise UserError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
        if width * height <= MAX_PIXELS:  # checked before decoding: a small file can hold a huge image
            return read_image(io.BytesIO(data), size, resize, FORMATS).copy()
        problem = f"the picture has {width} x {height} pixels"
    except Image.DecompressionBombError:
        problem = "the picture is too large"
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        kind = type(error).__name__
        raise UserError(f"not a picture that can be read ({kind}): send JPEG, PNG, WebP, TIFF, BMP or GIF") from None
    raise UserError(f"{problem}: at most {MAX_PIXELS / 1e6:g} million pixels are allowed")
