"""Uploads from untrusted clients: held in memory, limited in size, and decoded by few decoders."""

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

from common.errors import UserError
from common.images import FORMATS, read_image

MAX_REQUEST = 50_000_000  # bytes of a request
MAX_PIXELS = 100_000_000  # pixels of an upload
MAX_HELD, MAX_FILES = 2**30, 1000  # bytes and number of all uploads that are held
LIFETIME = 3600  # seconds for which an upload is held
RECEIVE_TIMEOUT = 30  # seconds to wait for more of a request
MultiPartParser.spool_max_size = 0  # no limit: larger files would be written to the disk
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
            self.files[token] = (name[-255:], data, time.monotonic())
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


class Guard:
    """ASGI middleware that refuses large requests before they are read, and endpoints that are not needed.

    All requests that are arriving at the same time may have MAX_HELD bytes together, and each must send more within
    RECEIVE_TIMEOUT.
    """

    def __init__(self, app):
        self.app, self.arriving = app, 0  # bytes of the requests under way

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and (refusal := self.refuse(scope)):
            status, reason = refusal
            return await PlainTextResponse(reason, status_code=status)(scope, receive, send)
        received, complete = 0, False

        async def counting_receive():
            nonlocal received, complete
            try:  # of a complete request, the next message is the client's disconnect, which may take long
                message = await (receive() if complete else asyncio.wait_for(receive(), RECEIVE_TIMEOUT))
            except TimeoutError:
                raise HTTPException(408, "the rest of the request did not arrive") from None
            complete = not message.get("more_body")
            size = len(message.get("body", b""))
            received, self.arriving = received + size, self.arriving + size
            if self.arriving > MAX_HELD:
                raise HTTPException(503, "too many uploads at the same time: try again")
            return message

        try:
            await self.app(scope, counting_receive, send)
        finally:
            self.arriving -= received

    def refuse(self, scope) -> tuple[int, str] | None:
        """HTTP status and reason for a request that is refused."""
        first, second = (scope["path"].strip("/").split("/") + [""])[:2]
        if first in ("custom_component", "monitoring") or (first == "gradio_api" and second not in ENDPOINTS):
            return 404, "no such endpoint"
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        if scope["method"] == "POST" and (b"content-length" not in headers or b"transfer-encoding" in headers):
            return 411, "Content-Length is required"
        if not length.isdigit() or int(length) > MAX_REQUEST:
            return 413, f"a request may have at most {MAX_REQUEST / 1e6:g} MB"
        return None


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
