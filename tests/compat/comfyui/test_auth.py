"""Who may ask a front: odd headers are refused like wrong ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from yarl import URL

from swarmx.compat.comfyui.settings import FrontSettings
from swarmx.gateway.keys import Keyring
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import PATIENCE_S, Client, front, until_end

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


@pytest.mark.parametrize(
    ("host", "lets_in"),
    [("127.evil.example", False), ("127.0.0.1.evil.example", False), ("127.0.0.1", True), ("LOCALHOST", True)],
)
async def test_an_open_front_answers_to_names_of_this_machine_only(tmp_path: Path, host: str, lets_in: bool) -> None:
    """A name of another site may lead here: its pages then ask as from the same site."""
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        client.headers = {"Host": f"{host}:8188", "Origin": f"http://{host}:8188"}
        status, _ = await client.ask("GET", "/queue")
    assert status == (200 if lets_in else 403)


def test_without_keys_a_name_that_only_begins_like_an_address_of_this_machine_may_not_be_listened_on() -> None:
    servers = [{"name": "s1", "url": "http://127.0.0.1:1"}]
    with pytest.raises(ValueError, match="loopback"):
        FrontSettings.model_validate({"servers": servers, "auth": False, "host": "127.evil.example"})


@pytest.mark.parametrize("headers", [{"Origin": "http://["}, {"Host": "["}, {"Origin": "null"}])
async def test_an_origin_that_is_no_address_is_another_site(tmp_path: Path, headers: dict[str, str]) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        client.headers = headers
        status, _ = await client.ask("GET", "/queue")
    assert status in (400, 403)


async def test_who_has_no_key_any_more_hears_nothing_more_and_others_do(tmp_path: Path) -> None:
    fake, keys = FakeComfy(), Keyring(tmp_path / "keys.json")
    tokens = {name: keys.add(name, "client", "a") for name in ("ann", "bob")}
    async with serving(fake), front(tmp_path, fake, keys=keys) as client:
        ann, bob = (Client(client.url, client.session, tokens[name]) for name in ("ann", "bob"))
        async with ann.socket() as others, bob.socket() as socket, asyncio.timeout(PATIENCE_S):
            await socket.receive()
            keys.revoke("bob")
            while not socket.closed:
                await socket.receive()
            _, answer = await ann.submit(graph(), client_id=ann.client_id)
            events = await until_end(others, answer["prompt_id"])
    assert "executed" in [kind for kind, _ in events]
