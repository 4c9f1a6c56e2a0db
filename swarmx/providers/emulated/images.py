"""The emulated image server: one job after the other, and a small real picture at the end."""

from __future__ import annotations

import base64
import math
import re
import struct
import time
import zlib
from dataclasses import dataclass
from hashlib import blake2b

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from swarmx.providers.emulated.pacing import PacedEngine
from swarmx.providers.emulated.wire import ApiError, Endpoint, json_response, or_gone, read, unknown_model

MAX_IMAGES = 4
MAX_SIDE = 2048
MAX_STEPS = 200
DEFAULT_STEPS = 30
PIXELS_PER_MEGAPIXEL = 1024 * 1024
LABEL = b"Comment\0emulated by SwarmX: no model drew this"


class _ImageBody(msgspec.Struct, kw_only=True):
    """OpenAI's request; `steps` is an extension."""

    model: str
    prompt: str
    n: int | None = None
    size: str | None = None
    steps: int = DEFAULT_STEPS
    response_format: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageServer:
    """Answers image generations when `paced`, a serial engine, has done their steps."""

    model: str
    paced: PacedEngine
    seed: int = 0

    def routes(self) -> list[Route]:
        """The routes that only an image model has."""
        return [Route("/v1/images/generations", Endpoint(self.generate), methods=["POST"])]

    async def generate(self, request: Request, send: Send) -> Response | None:
        """POST /v1/images/generations."""
        body = await read(request, _ImageBody)
        if body.model != self.model:
            raise unknown_model(body.model, self.model)
        images = 1 if body.n is None else body.n
        if not 1 <= images <= MAX_IMAGES:
            raise ApiError(400, f"n is {images}, expected 1 to {MAX_IMAGES}.", param="n")
        if not 1 <= body.steps <= MAX_STEPS:
            raise ApiError(400, f"steps is {body.steps}, expected 1 to {MAX_STEPS}.", param="steps")
        if body.response_format not in (None, "b64_json"):
            raise ApiError(
                400, f"response_format is {body.response_format!r}, expected b64_json.", param="response_format"
            )
        width, height = _size(body.size or "1024x1024")
        work = image_work(images, width, height, body.steps)
        run = self.paced.submit(prompt_tokens=0, output_tokens=work, reason="stop")
        if run is None:
            raise ApiError(400, f"The request needs {work} megapixel-steps, more than this server can hold.")
        try:
            if not await or_gone(run.finished, request.receive):
                return None
        finally:
            self.paced.abort(run)
        pictures = [
            picture(f"{self.model}\x1f{self.seed}\x1f{body.prompt}\x1f{i}", width, height) for i in range(images)
        ]
        data = [{"b64_json": base64.b64encode(png).decode()} for png in pictures]
        return json_response({"created": int(time.time()), "data": data})


def image_work(images: int, width: int, height: int, steps: int) -> int:
    """The work of a request in megapixel-steps, rounded up to whole ones."""
    return math.ceil(images * steps * width * height / PIXELS_PER_MEGAPIXEL)


def picture(key: str, width: int, height: int) -> bytes:
    """A two-coloured PNG of that size, the same for the same key; a text chunk says that it is emulated."""
    digest = blake2b(key.encode(), digest_size=32).digest()
    row_bytes = -(-width // 8)
    bands = [b"\0" + bytes([digest[6 + i]]) * row_bytes for i in range(16)]
    rows = b"".join(bands[y * 16 // height] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)  # one bit a pixel, an index into the palette
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _chunk(b"IHDR", header),
            _chunk(b"tEXt", LABEL),
            _chunk(b"PLTE", digest[:6]),
            _chunk(b"IDAT", zlib.compress(rows, 1)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _size(size: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(1 <= side <= MAX_SIDE for side in sides):
        raise ApiError(400, f"size is {size!r}, expected WxH such as 1024x1024, each at most {MAX_SIDE}.", param="size")
    return sides
