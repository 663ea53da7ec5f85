"""What strangers send to page.py: held in memory and within limits, and opened by few decoders."""

import asyncio
import io
import secrets
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

import runs
from folder import FORMATS, read_picture

HELD, FILES = 2**30, 1000  # bytes and number of the uploads that are held, at most
FORGET = 3600  # seconds after which an upload is forgotten
PATIENCE = 30  # seconds in which more of a request has to come
MultiPartParser.spool_max_size = 0  # no limit: what is larger would be written to the disk
# Of Gradio's own addresses those that the page and the API need. The rest reads files, or fetches from elsewhere.
OPEN = {"api", "app_id", "call", "cancel", "heartbeat", "info", "login_check", "queue", "reset", "run",
        "startup-events", "theme.css", "upload", "upload_progress"}  # fmt: skip


class Uploads:
    """Uploaded files, in memory, by tokens that nobody can guess: there is no path that could lead elsewhere."""

    def __init__(self):
        self.held, self.lock = {}, threading.Lock()  # the oldest come first

    def put(self, name: str, data: bytes) -> str:
        with self.lock:
            token = secrets.token_urlsafe(24)
            self.held[token] = (name[-255:], data, time.monotonic())
            self.forget()
            return token

    def get(self, token) -> tuple[str, bytes]:
        with self.lock:
            self.forget()
            if token not in self.held:
                raise runs.Problem("this upload is not here, or no longer: upload the picture first")
            return self.held[token][:2]

    def forget(self) -> None:
        """Let go of what is old, and of the oldest where there is too much."""
        size = sum(len(data) for _, data, _ in self.held.values())
        for token, (_, data, since) in list(self.held.items()):
            if size > HELD or len(self.held) > FILES or time.monotonic() - since > FORGET:
                del self.held[token]
                size -= len(data)

    def drop(self, token) -> None:
        with self.lock:
            self.held.pop(token, None)


def upload_routes(uploads: Uploads, folder: str) -> list[Route]:
    """They take the place of Gradio's upload, which writes to the disk: to `folder`, where tokens seem to lie."""

    async def upload(request):
        try:
            async with request.form() as form:
                parts = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
                tokens = [uploads.put(part.filename or "", await part.read()) for part in parts]
        except ClientDisconnect:
            return PlainTextResponse("this was not all", status_code=400)  # which nobody hears
        return JSONResponse([f"{folder}/{token}" for token in tokens])

    async def progress(request):  # whose bar the page shows: none is needed
        return PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    return [Route("/gradio_api/upload", upload, methods=["POST"]), Route("/gradio_api/upload_progress", progress)]


class Guard:
    """Turns away what is larger than it may be, before it is read, and addresses that nobody here needs.

    All requests that are arriving together may have HELD bytes: each is small, but there can be many. Who stops sending
    in the middle keeps them from others for PATIENCE at most.
    """

    def __init__(self, app, megabytes: float):
        self.app, self.limit, self.arriving = app, megabytes * 1e6, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and (refusal := self.refuse(scope)):
            return await PlainTextResponse(refusal[1], status_code=refusal[0])(scope, receive, send)
        own, whole = 0, False

        async def counted():
            nonlocal own, whole
            try:  # once the request is whole, what is waited for is the client's leaving
                message = await (receive() if whole else asyncio.wait_for(receive(), PATIENCE))
            except TimeoutError:
                raise HTTPException(408, "the rest of the request did not come") from None
            whole = not message.get("more_body")
            size = len(message.get("body", b""))
            own, self.arriving = own + size, self.arriving + size
            if self.arriving > HELD:
                raise HTTPException(503, "too much is arriving at once: try again")
            return message

        try:
            await self.app(scope, counted, send)
        finally:
            self.arriving -= own

    def refuse(self, scope):
        parts = scope["path"].strip("/").split("/")
        if parts[0] in ("gradio_api", "custom_component", "monitoring") and not (
            parts[0] == "gradio_api" and len(parts) > 1 and parts[1] in OPEN
        ):
            return 404, "no such address"
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if scope["method"] == "POST" and (b"content-length" not in headers or b"transfer-encoding" in headers):
            return 411, "say how long it is"
        if not length.isdigit() or int(length) > self.limit:
            return 413, f"a request may have {self.limit / 1e6:g} MB at most"


def read_upload(data: bytes, shape: dict, megapixels: float) -> np.ndarray:
    """An uploaded file's bytes as pixels uint8 (3, size, size). Raises Problem for what is no picture, or too large."""
    if not data:
        raise runs.Problem("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
        if width * height <= megapixels * 1e6:  # before anything is decoded: a small file can hold a vast picture
            return read_picture(io.BytesIO(data), **shape, formats=FORMATS).copy()
    except Image.DecompressionBombError:
        raise runs.Problem(f"the picture has more than {megapixels:g} million pixels") from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise runs.Problem(f"this is not a picture that can be read here ({type(error).__name__}): "
                           "JPEG, PNG, WebP, TIFF, BMP and GIF can") from None  # fmt: skip
    raise runs.Problem(f"the picture has {width} x {height} pixels: {megapixels:g} million are the most")
