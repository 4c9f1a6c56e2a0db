"""What the guard lets through, what it does not, and that nothing between its look and the socket changes that."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from swarmx.core.errors import ConfigError
from swarmx.providers.tools.egress import Denied, Guard, is_public
from swarmx.providers.tools.http_tool import HttpProvider
from swarmx.providers.tools.settings import HttpTool
from swarmx.providers.tools.toolbox import Toolbox
from tests.providers.tools.workshop import a_call

OPEN = Guard(hosts=["*"], ports=[80, 443], schemes=["http", "https"])

ALLOWED = [
    "https://example.org",
    "https://example.org/",
    "http://example.org:80/a/b?c=d#e",
    "https://EXAMPLE.org/x",
    "https://a-b.c_d.example.org:443/",
    "https://xn--bcher-kva.example/",
    "https://example.org/a@b:c",
    "https://example.org/?next=http://127.0.0.1/",
    "https://1.1.1.1/",
    "https://[2606:4700:4700::1111]/",
    "https://example.org?x",
    "https://example.org#x",
]

REFUSED = [
    # not the internet
    "http://127.0.0.1/",
    "http://127.1.2.3/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://168.63.129.16/metadata",
    "http://192.0.0.192/opc/v2/",
    "http://100.100.100.200/latest",
    "http://198.18.0.1/",
    "http://224.0.0.1/",
    "http://255.255.255.255/",
    "http://[::1]/",
    "http://[::]/",
    "http://[fe80::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:8.8.8.8]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::1]/",
    "http://[2002:7f00:1::]/",
    "http://[2001:0:7f00:1::]/",
    "http://[2001:db8::1]/",
    # addresses in disguise
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://127.1/",
    "http://127.0.1/",
    "http://127.0.0.1./",
    "http://127.0.0.0x1/",
    "http://1.2.3.4.5/",
    "http://256.256.256.256/",
    "http://[fe80::1%25eth0]/",
    "http://[::1",
    # names that only a local resolver knows
    "http://localhost/",
    "http://LOCALHOST/",
    "http://localhost./",
    "http://a.localhost/",
    "http://metadata/",
    "http://metadata.google.internal/",
    "http://printer.local/",
    "http://example.org./",
    # two parsers, two hosts
    "http://example.org\\@127.0.0.1/",
    "http://127.0.0.1\\@example.org/",
    "http://example.org@127.0.0.1/",
    "http://user:pass@example.org/",
    "http://@example.org/",
    "http://example.org%2f@127.0.0.1/",
    "http://127.0.0.1%00.example.org/",
    "http://example.org:80@127.0.0.1/",
    "http://example.org:@127.0.0.1:81/",
    "http:///127.0.0.1/",
    "http:/127.0.0.1/",
    "http:127.0.0.1",
    "//127.0.0.1/",
    "http://exa mple.org/",
    "http://example.org\t.evil.org/",
    "http://example.org\r\nHost: x/",
    "http://bücher.example/",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
    "http://example.org\u200b/",
    "http://-example.org/",
    "http://exa..mple.org/",
    # not HTTP, or not there
    "ftp://example.org/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_",
    "javascript:alert(1)",
    "data:text/plain,x",
    "unix:///run/docker.sock",
    "http+unix://%2frun%2fdocker.sock/",
    "",
    "http://",
    "https://example.org:22/",
    "https://example.org:0/",
    "https://example.org:65536/",
    "https://example.org:-1/",
    "https://example.org:8443/",
    "https://example.org:080/",
    "https://example.org:/",
    "https://example.org:four/",
    "https://example.org/" + "a" * 3000,
]


@pytest.mark.parametrize("text", ALLOWED)
def test_a_plain_public_url_is_let_through(text: str) -> None:
    url = OPEN.read(text)
    assert url.raw_host is not None
    assert url.raw_host in text.lower()


@pytest.mark.parametrize("text", REFUSED)
def test_a_url_that_leads_elsewhere_or_may_is_refused(text: str) -> None:
    with pytest.raises(Denied):
        OPEN.read(text)


@given(st.text(max_size=60) | st.from_regex(r"https?://[0-9a-fx.:@\[\]%\\]{1,30}(/.*)?", fullmatch=True))
def test_whatever_is_written_is_read_as_something_allowed_or_refused(text: str) -> None:
    try:
        url = OPEN.read(text)
    except Denied:
        return
    assert url.scheme in ("http", "https")
    assert url.port in (80, 443)
    assert url.user is None
    try:
        address = ipaddress.ip_address(str(url.raw_host))
    except ValueError:
        return
    assert is_public(address)
    assert address.is_global


@given(st.ip_addresses())
def test_no_address_passes_as_public_that_python_knows_as_special(address: Any) -> None:
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
        assert not address.is_private


@pytest.mark.parametrize(
    ("rule", "host", "fits"),
    [
        ("example.org", "example.org", True),
        ("example.org", "a.example.org", False),
        ("*.example.org", "a.b.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "evilexample.org", False),
        ("example.org", "1.1.1.1", False),
        ("intern", "intern", True),
    ],
)
def test_a_host_fits_its_rule(rule: str, host: str, fits: bool) -> None:
    guard = Guard(hosts=[rule], ports=[443], schemes=["https"])
    if fits:
        assert guard.read(f"https://{host}/").host == host
    else:
        with pytest.raises(Denied, match="not one of the hosts"):
            guard.read(f"https://{host}/")


@pytest.mark.parametrize(
    "bad", ["127.0.0.1", "::1", "::ffff:10.0.0.1", "169.254.169.254", "fe80::1%eth0", "no address"]
)
async def test_one_bad_address_of_a_name_spoils_all(bad: str) -> None:
    async def both(name: str) -> Sequence[str]:
        return ["1.1.1.1", bad]

    guard = Guard(hosts=["*"], ports=[443], schemes=["https"], resolve=both)
    with pytest.raises(Denied):
        await guard.addresses("example.org")


async def test_a_name_that_does_not_resolve_is_refused() -> None:
    async def nothing(name: str) -> Sequence[str]:
        return []

    async def failing(name: str) -> Sequence[str]:
        raise socket.gaierror(-2, "Name or service not known")

    for resolve in (nothing, failing):
        with pytest.raises(Denied, match="does not resolve"):
            await Guard(hosts=["*"], ports=[443], schemes=["https"], resolve=resolve).addresses("example.org")


@pytest.mark.parametrize("where", [("127.0.0.1", 443), ("169.254.169.254", 80), ("1.1.1.1", 25), ("::1", 443, 0, 0)])
def test_the_look_at_the_socket_alone_stops_an_address_or_port(where: tuple[Any, ...]) -> None:
    family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    with pytest.raises(Denied):
        OPEN.open_socket((family, socket.SOCK_STREAM, 0, "", where))
    OPEN.open_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("1.1.1.1", 443))).close()


class Peer:
    """A server on loopback that records who was asked for."""

    def __init__(self) -> None:
        self.port = 0
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.gone = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(
            (request.method, request.host, {k.lower(): v for k, v in request.headers.items()}, await request.read())
        )
        match request.path:
            case "/redirect":
                return web.Response(status=302, headers={"location": f"http://127.0.0.1:{self.port}/secret"})
            case "/json":
                return web.json_response({"a": [1, 2]}, headers={"set-cookie": "x=y", "etag": '"1"'})
            case "/endless":
                stream = web.StreamResponse()
                await stream.prepare(request)
                while True:
                    await stream.write(b"x" * 65536)
            case "/bomb":
                return web.Response(body=b"\x1f\x8b", headers={"content-encoding": "gzip"})
            case "/hang":
                try:
                    await asyncio.sleep(600)
                finally:
                    self.gone.set()
            case "/busy":
                return web.Response(status=503, text="later")
            case "/missing":
                return web.Response(status=404, text="no such thing")
        return web.Response(text="well")


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    peer = Peer()
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", peer.answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    peer.port = runner.addresses[0][1]
    yield peer
    await runner.cleanup()


@asynccontextmanager
async def fetching(peer: Peer, *, networks: Sequence[str] = ("127.0.0.1/32",), **more: Any) -> AsyncIterator[Any]:
    """A tool that may ask the peer by the name peer.example, and others by others."""
    asked: list[str] = more.pop("asked", [])
    answers = {"peer.example": ["127.0.0.1"], **more.pop("names", {})}

    async def resolve(name: str) -> Sequence[str]:
        asked.append(name)
        found = answers[name]
        return found.pop(0) if isinstance(found[0], list) else found

    tool = HttpTool(
        **{
            "name": "fetch",
            "description": "",
            "hosts": ["*"],
            "schemes": ["http"],
            "ports": [peer.port],
            "methods": ["GET", "POST"],
            "networks": networks,
            "timeout_s": 20.0,
            **more,
        }
    )
    toolbox = Toolbox([HttpProvider([tool], pool="tools", resolve=resolve)])
    await toolbox.open()
    assert toolbox.refused == {}

    async def fetch(path: str, *, host: str = "peer.example", **arguments: Any) -> Any:
        return await toolbox.call(a_call("fetch", url=f"http://{host}:{peer.port}{path}", **arguments))

    yield fetch
    await toolbox.close()


async def test_a_request_goes_to_the_checked_address_with_its_own_host(peer: Peer) -> None:
    async with fetching(peer) as fetch:
        result = await fetch("/json?x=1")
    assert result.output == {
        "status": 200,
        "headers": {"content-type": "application/json; charset=utf-8", "etag": '"1"'},
        "json": {"a": [1, 2]},
    }
    assert peer.requests[0][:2] == ("GET", f"peer.example:{peer.port}")


async def test_a_name_is_resolved_once_and_never_again_however_it_changes(peer: Peer) -> None:
    asked: list[str] = []
    rebinding = {"peer.example": [["127.0.0.1"], ["10.0.0.1"], ["10.0.0.1"]]}
    async with fetching(peer, names=rebinding, asked=asked) as fetch:
        first = await fetch("/")
        second = await fetch("/")
    assert first.output["body"] == "well"
    assert asked == ["peer.example"] * 2
    assert second.cause == "refused"
    assert len(peer.requests) == 1


async def test_a_name_in_other_letters_is_resolved_as_it_is_written(peer: Peer) -> None:
    asked: list[str] = []
    name = "xn--fa-hia.example"  # decoded and encoded again by an older rule, it would be another one
    async with fetching(peer, names={name: ["127.0.0.1"]}, asked=asked) as fetch:
        assert (await fetch("/", host=name)).output["body"] == "well"
    assert asked == [name]


async def test_a_name_that_leads_inside_is_refused_and_nothing_is_sent(peer: Peer) -> None:
    async with fetching(peer, networks=()) as fetch:
        for host in ("peer.example", "127.0.0.1"):
            result = await fetch("/", host=host)
            assert result.cause == "refused"
            assert "not a public address" in result.error
    assert peer.requests == []


async def test_a_redirect_is_told_and_not_followed(peer: Peer) -> None:
    async with fetching(peer) as fetch:
        result = await fetch("/redirect")
    assert result.cause == "refused"
    assert "/secret" in result.error
    assert len(peer.requests) == 1


async def test_an_endless_answer_is_cut(peer: Peer) -> None:
    async with fetching(peer, result_limit_bytes=100_000) as fetch:
        assert (await fetch("/endless")).cause == "limit"


async def test_a_compressed_answer_is_not_unpacked(peer: Peer) -> None:
    async with fetching(peer) as fetch:
        assert (await fetch("/bomb")).cause == "tool"
    assert peer.requests[0][2]["accept-encoding"] == "identity"


@pytest.mark.parametrize(("path", "cause"), [("/busy", "unavailable"), ("/missing", "tool")])
async def test_a_status_of_failure_is_an_error_with_the_answer(peer: Peer, path: str, cause: str) -> None:
    async with fetching(peer) as fetch:
        result = await fetch(path)
    assert result.cause == cause
    assert "later" in result.error or "no such thing" in result.error


async def test_cancelling_closes_the_connection(peer: Peer) -> None:
    async with fetching(peer) as fetch:
        task = asyncio.create_task(fetch("/hang"))
        while not peer.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(10):
            await peer.gone.wait()


async def test_a_hanging_answer_times_out(peer: Peer) -> None:
    async with fetching(peer, timeout_s=0.2) as fetch:
        assert (await fetch("/hang")).cause == "timeout"


@pytest.mark.parametrize("header", ["Host", "content-length", "Transfer-Encoding", "connection", "Proxy-Authorization"])
async def test_headers_of_the_connection_are_not_theirs_to_set(peer: Peer, header: str) -> None:
    async with fetching(peer) as fetch:
        result = await fetch("/", headers={header: "x"})
    assert result.cause == "refused"
    assert peer.requests == []


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "a\0b"])
async def test_a_header_cannot_smuggle_another(peer: Peer, value: str) -> None:
    async with fetching(peer) as fetch:
        result = await fetch("/", headers={"x-mine": value})
    assert result.cause == "refused"
    assert peer.requests == []


async def test_a_post_carries_its_key_and_the_secret_header(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_SECRET", "s3cret")
    async with fetching(peer, hosts=["peer.example"], secret_headers={"authorization": "API_SECRET"}) as fetch:
        await fetch("/", method="POST", json={"a": 1}, headers={"Authorization": "mine"})
    method, _, headers, body = peer.requests[0]
    assert method == "POST"
    assert headers["authorization"] == "s3cret"
    assert headers["idempotency-key"] == "wf/n"
    assert body == b'{"a":1}'


async def test_a_secret_that_is_missing_keeps_the_tool_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("API_SECRET", raising=False)
    tool = HttpTool(name="f", description="", hosts=["a.example"], secret_headers={"authorization": "API_SECRET"})
    with pytest.raises(ConfigError, match="API_SECRET"):
        await HttpProvider([tool], pool="tools").open()


def test_a_secret_for_any_host_is_no_setting() -> None:
    with pytest.raises(ValueError, match="would go to any host"):
        HttpTool(name="f", description="", hosts=["*"], secret_headers={"authorization": "API_SECRET"})


async def test_proxies_of_the_environment_are_not_used(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with fetching(peer) as fetch:
        assert (await fetch("/")).output["body"] == "well"


def test_the_url_that_was_read_is_the_url_that_is_used() -> None:
    assert OPEN.read("http://example.org/a%2Fb?c=%20") == URL("http://example.org/a%2Fb?c=%20")
