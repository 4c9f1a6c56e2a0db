"""Who may ask a front: odd headers are refused like wrong ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from yarl import URL

from swarmx.gateway.keys import Keyring
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fronts import front

pytestmark = pytest.mark.process


@pytest.mark.parametrize("header", [b"Bearer \xff", b"Basic \xff", b"Basic !", b"Basic //8=", b"Basic", b"x"])
async def test_credentials_that_cannot_be_read_are_none(tmp_path: Path, header: bytes) -> None:
    fake, keys = FakeComfy(), Keyring(tmp_path / "keys.json")
    keys.add("ann", "client", "a")
    async with serving(fake), front(tmp_path, fake, keys=keys) as client:
        url = URL(client.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"GET /queue HTTP/1.1\r\nHost: localhost\r\nAuthorization: " + header + b"\r\n\r\n")
        status = await reader.readline()
        writer.close()
    assert status.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("headers", [{"Origin": "http://["}, {"Host": "["}, {"Origin": "null"}])
async def test_an_origin_that_is_no_address_is_another_site(tmp_path: Path, headers: dict[str, str]) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        client.headers = headers
        status, _ = await client.ask("GET", "/queue")
    assert status in (400, 403)
