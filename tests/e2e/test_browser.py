"""The web page in a real browser (headless Chromium) over a real server with emulated replicas."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from swarmx.core.control import Role
from tests.e2e.fleet import DEADLINE_S, Server, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]

MODEL, ELASTIC = "qwen3-8b", "qwen3-8b"
SETTINGS = {
    "emulation": {"time_scale": 20.0, "seed": 7},
    "watch": {"every_s": 0.2},
    "coordinator": {"engine": "off"},
    "server": {"drain_s": 1},
    "emulated": [{"model": MODEL, "device": "h100", "count": 1}, {"model": "sdxl", "device": "l40s", "kind": "image"}],
    "elastic": [{"model": ELASTIC, "device": "l40s", "min": 0, "max": 0, "limit": 3}],
}
PATIENCE_MS = 60_000  # only a test that fails waits this long

# The smallest contrast between text and what is behind it, and the text; WCAG AA wants 4.5.
CONTRAST = """() => {
  const parse = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, text];
  }
  return worst;
}"""


def request(server: Server, path: str, body: Any = None, *, token: str | None = None) -> tuple[Any, Mapping[str, str]]:
    """The decoded answer and its headers; Playwright keeps an event loop of its own, so that this one blocks."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {token or server.token}", "content-type": "application/json"}
    asked = urllib.request.Request(server.url + path, data, headers)  # noqa: S310  # our own server
    with urllib.request.urlopen(asked, timeout=DEADLINE_S) as reply:  # noqa: S310
        return json.load(reply), dict(reply.headers)


def honoured(server: Server, role: Role) -> str:
    """The token of a new key, once the server has read the keys again."""
    token, end_s = server.key(role, role), time.monotonic() + DEADLINE_S
    while True:
        try:
            request(server, "/v1/models", token=token)
            return token
        except urllib.error.HTTPError as error:
            error.close()
            if time.monotonic() > end_s:
                raise
            time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, with all its replicas ready: its bounds are moved."""
    with serving(SETTINGS, tmp_path_factory.mktemp("browser")) as running:
        end_s = time.monotonic() + DEADLINE_S
        while any(row["state"] != "ready" for row in request(running, "/api/v1/replicas")[0]["replicas"]):
            assert time.monotonic() < end_s
            time.sleep(0.1)
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        sync_api.expect.set_options(timeout=PATIENCE_MS)  # else it is five seconds
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=2 * PATIENCE_MS)
        yield browser
        browser.close()


def opened(chromium: Any, server: Server, **more: Any) -> Any:
    """A page at the login. Whatever the browser complains of (scripts, styles, security policy) fails the test."""
    context = chromium.new_context(base_url=server.url, **more)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
    page.goto("/")
    return page


def log_in(page: Any, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()


def ask(page: Any, text: str) -> None:
    page.get_by_label("Ask, or give an order").fill(text)
    page.get_by_role("button", name="Ask").click()


def close(page: Any) -> None:
    assert page.complaints == []
    page.context.close()


def test_an_operator_looks_asks_orders_and_approves(chromium: Any, server: Server, tmp_path: Path) -> None:
    page = opened(chromium, server)
    sync_api.expect(page).to_have_url(f"{server.url}/login")
    log_in(page, server.token)
    fleet = page.locator("#fleet")
    sync_api.expect(fleet.get_by_role("row", name=f"{MODEL}-h100-0")).to_contain_text("emulated")
    for heading in ("Console", "Proposals", "Queues", "Fleet", "Running workflows", "Recent decisions", "Audit"):
        sync_api.expect(page.get_by_role("heading", name=heading, exact=True)).to_be_visible()
    sync_api.expect(page.locator("#state")).to_have_text("live")

    ask(page, f"why is {MODEL} slow?")
    answer = page.locator("#answer")
    sync_api.expect(answer).to_contain_text(f"{MODEL}")
    sync_api.expect(answer.locator(".evidence").first).to_contain_text(f"of {MODEL}")

    ask(page, f"set bounds of {ELASTIC} to 0..2")
    sync_api.expect(answer).to_contain_text(f"{ELASTIC}: max_replicas 0 → 2")
    waiting = page.locator("#proposals").get_by_role("article")
    sync_api.expect(waiting).to_contain_text(f"{ELASTIC}: max_replicas 0 → 2")  # without a reload
    page.screenshot(path=tmp_path / "proposal.png", full_page=True)
    waiting.get_by_role("button", name="Approve").click()
    sync_api.expect(page.locator("main > .notice")).to_contain_text("is approved; it is applied now.")
    sync_api.expect(page.locator("#queues").get_by_role("row", name=ELASTIC)).to_contain_text("0..2 of 3")
    sync_api.expect(page.locator("#audit")).to_contain_text("set_replica_bounds")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000

    page.get_by_role("button", name="Log out").click()
    sync_api.expect(page).to_have_url(f"{server.url}/login")
    page.goto("/")
    sync_api.expect(page).to_have_url(f"{server.url}/login")
    close(page)


def test_a_denial_needs_no_reason_and_a_reason_being_typed_is_not_lost(chromium: Any, server: Server) -> None:
    page = opened(chromium, server)
    log_in(page, server.token)
    ask(page, f"set bounds of {ELASTIC} to 0..1")
    waiting = page.locator("#proposals").get_by_role("article")
    reason = waiting.get_by_placeholder("reason (optional)")
    reason.fill("not now")
    with page.expect_response("**/fragment"):
        pass
    with page.expect_response("**/fragment"):
        pass
    sync_api.expect(reason).to_have_value("not now")
    waiting.get_by_role("button", name="Deny").click()
    sync_api.expect(page.locator("main > .notice")).to_contain_text("is denied.")
    page.get_by_text("Decided of late").click()
    sync_api.expect(page.locator("#decided")).to_contain_text("not now")
    close(page)


def called(page: Any, server: Server) -> tuple[str, Any]:
    """The id of a call that was made, and its line on the page."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    call_id = request(server, "/v1/chat/completions", body)[1]["x-swarmx-call-id"]
    return call_id, page.locator("#decisions summary", has_text=call_id)


def test_a_call_appears_among_the_decisions_without_a_reload(chromium: Any, server: Server) -> None:
    page = opened(chromium, server)
    log_in(page, server.token)

    call_id, row = called(page, server)
    row.click()
    why = page.locator("#decisions details[open]")
    sync_api.expect(why).to_contain_text(f"went to {MODEL}-h100-0")
    _, second = called(page, server)
    sync_api.expect(second).to_be_visible()  # although the first is open and has the focus, which it keeps
    sync_api.expect(why).to_contain_text(call_id)
    sync_api.expect(row).to_be_focused()
    ask(page, f"why did call {call_id} go to {MODEL}-h100-0?")
    sync_api.expect(page.locator("#answer")).to_contain_text("went to")
    close(page)


def test_a_paused_page_stands_still(chromium: Any, server: Server) -> None:
    page = opened(chromium, server)
    log_in(page, server.token)
    sync_api.expect(page.locator("#state")).to_have_text("live")
    page.get_by_role("button", name="Pause").click()
    sync_api.expect(page.locator("#state")).to_have_text("paused")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)  # longer than the page waits between two looks
    assert asked == []
    with page.expect_response("**/fragment"):
        page.get_by_role("button", name="Go on").click()
    close(page)


def test_without_scripts_everything_still_works(chromium: Any, server: Server) -> None:
    page = opened(chromium, server, java_script_enabled=False)
    log_in(page, server.token)
    ask(page, "how is the cluster?")
    sync_api.expect(page.locator("#answer")).to_contain_text("replicas of 2 models are ready")
    ask(page, f"set bounds of {ELASTIC} to 1..3")
    page.locator("#proposals").get_by_role("button", name="Deny").click()
    sync_api.expect(page.locator("main > .notice")).to_contain_text("is denied.")
    sync_api.expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    close(page)


def test_a_viewer_gets_no_buttons_and_a_client_no_page(chromium: Any, server: Server) -> None:
    page = opened(chromium, server)
    log_in(page, honoured(server, "viewer"))
    sync_api.expect(page.locator("#fleet")).to_contain_text(f"{MODEL}-h100-0")
    ask(page, f"set bounds of {ELASTIC} to 0..1")
    sync_api.expect(page.locator("#answer").get_by_role("alert")).to_contain_text("viewer")
    sync_api.expect(page.get_by_role("button", name="Approve")).to_have_count(0)
    close(page)
    page = opened(chromium, server)
    log_in(page, honoured(server, "client"))
    sync_api.expect(page.get_by_role("heading", name="Not allowed")).to_be_visible()
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_the_page_reads_well_in_light_and_dark_on_large_and_small_screens(
    chromium: Any, server: Server, tmp_path: Path, scheme: str, width: int
) -> None:
    page = opened(chromium, server, color_scheme=scheme, viewport={"width": width, "height": 900})
    log_in(page, server.token)
    ask(page, f"set bounds of {ELASTIC} to 0..1")
    sync_api.expect(page.locator("#proposals").get_by_role("article").first).to_be_visible()
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
    ratio, text = page.evaluate(CONTRAST)
    assert ratio >= 4.5, text
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement !== document.body")
    page.locator("#proposals").get_by_role("button", name="Deny").first.click()
    sync_api.expect(page.locator("main > .notice")).to_contain_text("is denied.")
    close(page)
