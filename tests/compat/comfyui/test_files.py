"""Files of clients: uploads, masks and outputs, each its tenant's, and nothing that a browser would run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
import pytest

from swarmx.gateway.keys import Keyring
from tests.compat.comfyui.fake import FakeComfy, serving
from tests.compat.comfyui.fake_nodes import graph
from tests.compat.comfyui.fronts import Client, eventually, front

pytestmark = pytest.mark.process


async def _send(client: Client, path: str, data: bytes, name: str = "cat.png", **fields: str) -> tuple[int, Any]:
    form = aiohttp.FormData()
    form.add_field("image", data, filename=name)
    for field, value in fields.items():
        form.add_field(field, value)
    async with client.session.post(client.url + path, data=form, headers=client.headers) as response:
        body = await response.read()
        return response.status, json.loads(body) if response.content_type == "application/json" else body


async def _seen(client: Client, name: str) -> bytes:
    async with client.session.get(f"{client.url}/view?type=input&filename={name}", headers=client.headers) as response:
        return await response.read()


async def test_uploads_of_one_name_at_the_same_moment_are_all_kept(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        sent = [str(number).encode() for number in range(5)]
        answers = await asyncio.gather(*(_send(client, "/upload/image", data) for data in sent))
        kept = [await _seen(client, answer["name"]) for _, answer in answers]
    assert kept == sent


async def test_a_copy_that_a_server_lost_is_made_again(tmp_path: Path) -> None:
    fake = FakeComfy()

    def loads(word: str) -> dict[str, Any]:
        save = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": word}}
        return {"1": {"class_type": "LoadImage", "inputs": {"image": "cat.png"}}, "2": save}

    async with serving(fake), front(tmp_path, fake) as client:
        await _send(client, "/upload/image", b"cat")
        first = await client.run(loads("a"))
        fake.files.clear()
        second, third = await client.run(loads("b")), await client.run(loads("c"))
    states = [entry["status"]["status_str"] for _, _, entry in (first, second, third)]
    assert states == ["success"] * 3


@pytest.mark.parametrize("name", ["x.html", "x.svg", "x.xml", "x.xhtml", "x.js", "x.pdf", "x"])
async def test_what_a_browser_might_run_it_is_told_to_save(tmp_path: Path, name: str) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        await _send(client, "/upload/image", b"<script/>", name)
        async with client.session.get(f"{client.url}/view?type=input&filename={name}") as response:
            assert response.content_type == "application/octet-stream"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Content-Security-Policy"].startswith("sandbox")


async def test_an_upload_may_have_the_mark_in_its_name_that_outputs_have_behind_their_server(tmp_path: Path) -> None:
    fake = FakeComfy()
    loads = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "photo~1.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    async with serving(fake), front(tmp_path, fake) as client:
        status, answer = await _send(client, "/upload/image", b"cat", "photo~1.png")
        seen = await _seen(client, "photo~1.png")
        _, _, entry = await client.run(loads)
        refused, why = await _send(client, "/upload/image", b"cat", "s1~1.png")
    assert (status, answer["name"], seen) == (200, "photo~1.png", b"cat")
    assert entry["status"]["status_str"] == "success"
    assert (refused, b"'s1~1.png'" in why) == (400, True)


@pytest.mark.parametrize("how", ["channel=a", "channel=rgb", "preview=webp;50"])
async def test_an_upload_in_another_format_is_as_a_server_makes_it(tmp_path: Path, how: str) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        await _send(client, "/upload/image", b"cat")
        converted = await _seen(client, f"cat.png&{how}")
        plain = await _seen(client, "cat.png&channel=rgba")
        nobodys, _ = await client.ask("GET", f"/view?type=input&filename=dog.png&{how}")
        await fake.die()
        await eventually(lambda: _none_is_up(client))
        away, _ = await client.ask("GET", f"/view?type=input&filename=cat.png&{how}")
    assert converted == b"cat as " + how.replace("=", " ").encode()
    assert (plain, nobodys, away) == (b"cat", 404, 503)


async def _none_is_up(client: Client) -> bool:
    return (await client.ask("GET", "/readyz"))[0] == 503


async def test_what_may_be_got_may_be_asked_about(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        await _send(client, "/upload/image", b"cat")
        _, _, entry = await client.run(graph())
        made = entry["outputs"]["9"]["images"][0]["filename"]
        answers = []
        for path in (
            "/queue",
            "/api/history",
            "/view?type=input&filename=cat.png",
            f"/view?filename={made}",
            "/healthz",
        ):
            async with client.session.get(client.url + path) as response:
                size = len(await response.read())
            async with client.session.head(client.url + path) as response:
                answers.append((response.status, int(response.headers["Content-Length"]) - size, await response.read()))
    assert answers == [(200, 0, b"")] * 5


async def test_a_form_of_many_fields_is_refused(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        status, _ = await _send(client, "/upload/image", b"x", **{f"f{number}": "" for number in range(100)})
    assert status == 400


async def test_a_mask_is_painted_into_an_upload_or_an_output_and_the_outcome_is_an_upload(tmp_path: Path) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        await _send(client, "/upload/image", b"cat")
        about = json.dumps({"filename": "cat.png", "type": "input"})
        status, answer = await _send(client, "/upload/mask", b"mask", "painted.png", original_ref=about)
        painted = await _seen(client, answer["name"])
        _, _, entry = await client.run(graph())
        image = entry["outputs"]["9"]["images"][0]
        await _send(client, "/upload/mask", b"mask", "other.png", original_ref=json.dumps(image))
        other = await _seen(client, "other.png")
        loads = {
            "1": {"class_type": "LoadImage", "inputs": {"image": "painted.png"}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
        _, _, entry = await client.run(loads)
    assert (status, answer) == (200, {"name": "painted.png", "subfolder": "", "type": "input"})
    assert painted == b"cat under mask"
    assert other.endswith(b" under mask")
    assert entry["status"]["status_str"] == "success"


@pytest.mark.parametrize("about", ["", "[]", "{}", '{"filename": "dog.png"}', '{"filename": "../x", "type": "a/b"}'])
async def test_a_mask_for_no_picture_is_refused(tmp_path: Path, about: str) -> None:
    fake = FakeComfy()
    async with serving(fake), front(tmp_path, fake) as client:
        status, _ = await _send(client, "/upload/mask", b"mask", original_ref=about)
    assert status == 400


async def test_pictures_of_another_tenant_are_neither_painted_nor_loaded_by_their_names_at_a_server(
    tmp_path: Path,
) -> None:
    fake, keys = FakeComfy(), Keyring(tmp_path / "keys.json")
    inputs = {"image": ["COMBO", {"image_upload": True, "image_folder": "output"}]}
    fake.info["LoadImageOutput"] = {**fake.info["LoadImage"], "input": {"required": inputs}}
    tokens = {name: keys.add(name, "client", name) for name in ("ann", "bob")}
    async with serving(fake), front(tmp_path, fake, keys=keys) as client:
        ann, bob = (Client(client.url, client.session, tokens[name]) for name in ("ann", "bob"))
        _, _, entry = await ann.run(graph())
        image = entry["outputs"]["9"]["images"][0]
        masks = [await _send(who, "/upload/mask", b"m", original_ref=json.dumps(image)) for who in (ann, bob)]
        there = image["filename"].partition("~")[2]
        answers = []
        for name in (f"{there} [output]", f"{there}#[output]", f"../output/{there}", f"{image['filename']} [output]"):
            loads = {
                "1": {"class_type": "LoadImageOutput", "inputs": {"image": name}},
                "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
            }
            answers.append(await bob.submit(loads))
    assert [status for status, _ in masks] == [200, 400]
    assert [status for status, _ in answers] == [400] * 4


async def test_a_picture_that_was_forgotten_cannot_be_asked_for_by_who_made_it_lately(tmp_path: Path) -> None:
    fake, keys = FakeComfy(), Keyring(tmp_path / "keys.json")
    token = keys.add("ann", "client", "ann")
    async with serving(fake), front(tmp_path / "front", fake, keys=keys) as client:
        ann = Client(client.url, client.session, token)
        _, _, made = await ann.run(graph())
        picture = made["outputs"]["9"]["images"][0]
        path = "/view?" + urlencode(picture)
        before = await ann.ask("GET", path)
        await ann.ask("POST", "/history", {"clear": True})
        after = await ann.ask("GET", path)
    assert (before[0], after[0]) == (200, 404)
