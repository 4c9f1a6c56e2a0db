"""The web page over a whole SwarmX, without a script: what it shows, to whom, and what its forms refuse."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from msgspec.structs import replace

from swarmx.core.audit import AuditEntry, Report
from swarmx.core.control import Actor, ControlView, Role
from swarmx.core.messages import DecisionMade
from swarmx.core.records import WorkflowRecord
from swarmx.gateway.keys import write_private
from swarmx.gateway.recent import RecentDecisions
from swarmx.gateway.web import _Chain
from tests.gateway.whole import ELASTIC, MODEL, Whole, whole
from tests.gateway.workflow_world import WAITS, ended, submitted, world_in
from tests.llm_coordinator.test_answers import decided

SOMEBODY = Actor(type="key", name="somebody", role="operator")

pytestmark = pytest.mark.process

SECTIONS = ["proposals", "queues", "fleet", "workflows", "decisions", "audit"]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Whole]:
    async with whole(tmp_path / "state") as found:
        yield found


def csrf(page: httpx.Response) -> str:
    found = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert found is not None
    return found[1]


@asynccontextmanager
async def logged_in(world: Whole, role: Role) -> AsyncIterator[httpx.AsyncClient]:
    """A browser with a session, as far as a client without scripts is one."""
    async with world.client() as client:
        token = csrf(await client.get("/login"))
        reply = await client.post("/login", data={"csrf": token, "token": world.token(role)})
        assert (reply.status_code, reply.headers["location"]) == (303, "/")
        yield client


async def asked(client: httpx.AsyncClient, text: str) -> str:
    """The page after a question, its text as a reader sees it."""
    reply = await client.post("/ask", data={"csrf": csrf(await client.get("/")), "text": text})
    assert (reply.status_code, reply.headers["location"]) == (303, "/#console")
    return unescape((await client.get("/")).text)


async def proposed(client: httpx.AsyncClient) -> str:
    page = await asked(client, f"set bounds of {ELASTIC} to 0..3")
    found = re.search(r"pr-[0-9a-f]+", page)
    assert found is not None
    return found[0]


async def test_who_is_not_logged_in_is_sent_to_the_login(world: Whole) -> None:
    async with world.client() as client:
        reply = await client.get("/")
        assert (reply.status_code, reply.headers["location"]) == (303, "/login")
        assert (await client.get("/fragment")).status_code == 401
        for path in ("/ask", "/logout", "/proposals/pr-0/approve", "/proposals/pr-0/deny"):
            assert (await client.post(path, data={"csrf": "x"})).status_code == 401


async def test_a_bearer_token_is_no_session(world: Whole) -> None:
    async with world.client("admin") as client:
        assert (await client.get("/fragment")).status_code == 401


async def test_every_section_is_on_the_page_with_its_heading(world: Whole) -> None:
    async with logged_in(world, "viewer") as client:
        page = (await client.get("/")).text
        fragment = (await client.get("/fragment")).text
    for name in SECTIONS:
        assert f'<section id="{name}" aria-labelledby="{name}-title">' in page
        assert f'<section id="{name}"' in fragment
    assert f"{MODEL}-0" in page
    assert f"{MODEL}-1" in fragment
    assert "Nothing waits for a decision." in page
    assert "No workflow is running." in page
    assert "No call was routed yet." in page
    assert "No control action was taken yet." in page
    assert "The audit log is intact: it is empty." in page
    assert '<html lang="en">' in page
    assert "<form" not in fragment


async def test_every_answer_carries_the_headers_that_fence_it_in(world: Whole) -> None:
    async with logged_in(world, "operator") as client, world.client() as stranger:
        replies = [await client.get(path) for path in ("/", "/fragment", "/assets/page.css", "/assets/page.js")]
        replies += [await stranger.get(path) for path in ("/", "/login", "/fragment", "/assets/nothing.js")]
        replies.append(await client.post("/ask", data={}))
    for reply in replies:
        policy = reply.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "same-origin"
        assert reply.headers["cache-control"] == "no-store"


async def test_nothing_is_inline_and_nothing_comes_from_elsewhere(world: Whole) -> None:
    async with logged_in(world, "operator") as client:
        await proposed(client)
        page = (await client.get("/")).text
        login = (await client.get("/login")).text
        assets = {name: await client.get(f"/assets/{name}") for name in ("page.css", "page.js")}
    for text in (page, login):
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", text)
        assert not re.search(r"(?:src|href|action)=\"(?!/)", text)
    assert assets["page.css"].headers["content-type"].startswith("text/css")
    assert assets["page.js"].headers["content-type"].startswith("text/javascript")
    assert all("http" not in asset.text for asset in assets.values())


async def test_every_field_has_a_label_and_every_form_a_csrf_token(world: Whole) -> None:
    async with logged_in(world, "operator") as client:
        await proposed(client)
        page = (await client.get("/")).text + (await client.get("/login")).text
    fields = re.findall(r"<input id=\"([^\"]+)\"", page)
    assert fields
    assert all(f'for="{field}"' in page for field in fields)
    forms = re.findall(r"<form method=\"post\".*?</form>", page, re.DOTALL)
    assert len(forms) == 7  # log out, ask, log in; approve and deny in the answer and in the list
    ids = re.findall(r" id=\"([^\"]+)\"", page)
    assert len(ids) == len(set(ids))
    assert all('name="csrf"' in form for form in forms)


async def test_the_session_cookie_is_closed_and_never_the_token(world: Whole) -> None:
    async with world.client() as client:
        token = world.token("operator")
        reply = await client.post("/login", data={"csrf": csrf(await client.get("/login")), "token": f" {token} "})
        cookie = next(c for c in reply.headers.get_list("set-cookie") if c.startswith("swarmx_session="))
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Path=/" in cookie
    assert token not in cookie


async def test_over_https_the_session_cookie_is_secure(world: Whole) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(world.app), base_url="https://swarmx.test") as client:
        token = csrf(await client.get("/login"))
        reply = await client.post("/login", data={"csrf": token, "token": world.token("operator")})
        assert "Secure" in next(c for c in reply.headers.get_list("set-cookie") if "swarmx_session=" in c)


async def test_a_wrong_token_is_told_so_and_ten_of_them_close_the_door(world: Whole) -> None:
    async with world.client() as client:
        for _ in range(10):
            token = csrf(await client.get("/login"))
            reply = await client.post("/login", data={"csrf": token, "token": "swx-guess"})
            assert reply.status_code == 401
            assert "This token is unknown" in reply.text
            assert "swarmx_session" not in str(reply.headers.get_list("set-cookie"))
        right = {"csrf": csrf(await client.get("/login")), "token": world.token("operator")}
        reply = await client.post("/login", data=right)
    assert reply.status_code == 403
    assert "too many wrong tokens" in reply.text


async def test_a_login_needs_the_form_that_it_came_with(world: Whole) -> None:
    async with world.client() as client:
        token = world.token("operator")
        assert (await client.post("/login", data={"token": token})).status_code == 403
        await client.get("/login")
        assert (await client.post("/login", data={"csrf": "another", "token": token})).status_code == 403


async def test_the_token_of_a_client_begins_no_session(world: Whole) -> None:
    async with world.client() as client:
        token = csrf(await client.get("/login"))
        page = await client.post("/login", data={"csrf": token, "token": world.token("client")})
        assert page.status_code == 403
        assert "needs one of: viewer, operator, admin" in page.text
        assert "swarmx_session" not in client.cookies
        assert (await client.get("/")).headers["location"] == "/login"


async def test_who_loses_the_right_to_look_is_told_so_and_can_leave(world: Whole) -> None:
    async with logged_in(world, "viewer") as client:
        path = world.folder / "keys.json"
        write_private(path, path.read_bytes().replace(b'"role":"viewer"', b'"role":"client"'))
        async with asyncio.timeout(60.0):
            while (page := await client.get("/")).status_code == 200:  # until the server reads its keys again
                await asyncio.sleep(0.05)
        assert page.status_code == 403
        assert "Not allowed" in page.text
        assert (await client.post("/ask", data={"csrf": csrf(page), "text": "status"})).status_code == 403
        reply = await client.post("/logout", data={"csrf": csrf(page)})
        assert (reply.status_code, reply.headers["location"]) == (303, "/login")


async def test_logging_out_ends_the_session_on_the_server(world: Whole) -> None:
    async with logged_in(world, "operator") as client:
        page = await client.get("/")
        kept = client.cookies["swarmx_session"]
        await client.post("/logout", data={"csrf": csrf(page)})
        client.cookies.set("swarmx_session", kept)
        assert (await client.get("/fragment")).status_code == 401


async def test_a_new_login_ends_the_session_before_it(world: Whole) -> None:
    async with logged_in(world, "operator") as client, world.client() as other:
        before = client.cookies["swarmx_session"]
        form = {"csrf": csrf(await client.get("/login")), "token": world.token("viewer")}
        assert (await client.post("/login", data=form)).status_code == 303
        assert (await client.get("/fragment")).status_code == 200
        other.cookies.set("swarmx_session", before)
        assert (await other.get("/fragment")).status_code == 401


async def test_a_question_is_answered_on_the_page(world: Whole) -> None:
    async with logged_in(world, "viewer") as client:
        page = await asked(client, f"why is {MODEL} slow?")
    assert f"why is {MODEL} slow?" in page
    assert f"{MODEL} is not slow by its figures" in page
    assert f"waiting of {MODEL}: 0 calls" in page
    assert "p95_s" not in page  # no call has ended yet


async def test_a_question_is_streamed_to_a_script(world: Whole) -> None:
    async with logged_in(world, "operator") as client:
        form = {"csrf": csrf(await client.get("/")), "text": f"set bounds of {ELASTIC} to 0..3"}
        reply = await client.post("/ask", data=form, headers={"accept": "text/event-stream"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [dict(line.split(": ", 1) for line in b.split("\n")) for b in reply.text.strip().split("\n\n")]
    assert [block["event"] for block in blocks] == ["item", "item", "done"]
    card = json.loads(blocks[0]["data"])["html"]
    assert f"{ELASTIC}: max_replicas 2 → 3" in card
    assert ">Approve</button>" in card


async def test_an_order_is_approved_with_a_button_and_the_page_tells_it(world: Whole) -> None:
    async with logged_in(world, "operator") as client:
        name = await proposed(client)
        page = await client.get("/")
        assert f"{ELASTIC}: max_replicas 2 → 3" in page.text
        reply = await client.post(f"/proposals/{name}/approve", data={"csrf": csrf(page)})
        assert (reply.status_code, reply.headers["location"]) == (303, "/#proposals")
        after = (await client.get("/")).text
        assert f"{name} is approved; it is applied now." in after
        assert "0..3 of 4" in after
        assert f'action="/proposals/{name}/approve"' not in after
        assert "approved; it is applied now" not in (await client.get("/")).text
        proposal = await world.context.desk.proposal(name)
        assert (proposal.state, proposal.decided_by is not None and proposal.decided_by.name) == ("applied", "operator")
        again = await client.post(f"/proposals/{name}/approve", data={"csrf": csrf(page)})
        assert again.status_code == 303
        assert "Not done:" in (await client.get("/")).text


async def test_a_refusal_is_told_with_its_rule_and_is_in_the_audit_log(world: Whole) -> None:
    async with logged_in(world, "operator") as client:
        page = await asked(client, f"scale {ELASTIC} to 9")
        assert page.count("rule: bounds") == 2
        assert "its bounds are 0 to 2" in page


async def test_a_proposal_is_denied_with_a_reason(world: Whole) -> None:
    async with logged_in(world, "operator") as client:
        name = await proposed(client)
        form = {"csrf": csrf(await client.get("/")), "reason": "not <b>now</b>"}
        await client.post(f"/proposals/{name}/deny", data=form)
        page = (await client.get("/")).text
    assert (await world.context.desk.proposal(name)).state == "denied"
    assert "not &lt;b&gt;now&lt;/b&gt;" in page
    assert "<b>" not in page


async def test_a_viewer_sees_proposals_without_buttons_and_cannot_decide(world: Whole) -> None:
    async with logged_in(world, "operator") as operator, logged_in(world, "viewer") as viewer:
        name = await proposed(operator)
        page = await viewer.get("/")
        assert f"{ELASTIC}: max_replicas 2 → 3" in page.text
        assert "Approve" not in page.text
        assert "Deny" not in page.text
        for verb in ("approve", "deny"):
            reply = await viewer.post(f"/proposals/{name}/{verb}", data={"csrf": csrf(page)})
            assert reply.status_code == 403
        refusals = [r.entry for r in await world.context.audit.tail(limit=10) if r.entry.outcome == "refused"]
        assert [(e.actor.name, e.via, e.verdict and e.verdict.rule) for e in refusals] == [
            ("viewer", "web", "role")
        ] * 2
    assert (await world.context.desk.proposal(name)).state == "open"


async def test_an_open_proposal_stays_on_the_page_however_many_come_after_it(world: Whole) -> None:
    async with logged_in(world, "operator") as client:
        name = await proposed(client)
        old = await world.context.desk.proposal(name)
        for number in range(60):
            denied = replace(old, proposal_id=f"pr-{number:012x}", at_s=old.at_s + 1.0 + number, state="denied")
            await world.context.control.save_proposal(denied)
        async with logged_in(world, "operator") as another:
            page = (await another.get("/")).text
        assert f'action="/proposals/{name}/approve"' in page
        assert page.count("/approve") == 1
        assert name in [proposal.proposal_id for proposal in (await world.context.overview.view()).proposals]
        assert name in await asked(client, "which proposals are open?")


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ({"origin": "https://evil.test"}, "right"),
        ({"origin": "null"}, "right"),
        ({"sec-fetch-site": "cross-site"}, "right"),
        ({}, "wrong"),
        ({}, ""),
    ],
)
async def test_a_form_that_another_site_sent_changes_nothing(world: Whole, headers: dict[str, str], token: str) -> None:
    async with logged_in(world, "operator") as client:
        name = await proposed(client)
        right = csrf(await client.get("/"))
        form = {"csrf": right if token == "right" else token}
        for path in (f"/proposals/{name}/approve", f"/proposals/{name}/deny", "/ask", "/logout"):
            reply = await client.post(path, data=form, headers=headers)
            assert reply.status_code == 403, path
        same = {"origin": "http://swarmx.test", "sec-fetch-site": "same-origin"}
        assert (await world.context.desk.proposal(name)).state == "open"
        await client.post(f"/proposals/{name}/approve", data={"csrf": right}, headers=same)
    assert (await world.context.desk.proposal(name)).state == "applied"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"csrf=x&" + b"a" * 40_000, "application/x-www-form-urlencoded"),
        (b'{"csrf": "x"}', "application/json"),
        (b"&".join(b"f%d=1" % n for n in range(20)), "application/x-www-form-urlencoded"),
    ],
)
async def test_what_is_no_small_form_is_refused(world: Whole, body: bytes, kind: str) -> None:
    async with logged_in(world, "operator") as client:
        reply = await client.post("/ask", content=body, headers={"content-type": kind})
    assert reply.status_code == 400


async def test_what_tenants_named_is_escaped(world: Whole) -> None:
    evil = "<script>alert(1)</script>"
    await world.context.store.accept(
        WorkflowRecord(
            workflow_id="wf-1", tenant="red", mode="transparent", kind=evil, name='"><img src=x onerror=alert(1)>',
            state="running", created_at_s=world.context.clock.now_s(),
        ),
        [],
    )  # fmt: skip
    async with logged_in(world, "viewer") as client:
        page = await asked(client, "how is <b>coder</b>?")
        raw = (await client.get("/")).text
    assert "wf-1" in page
    assert evil not in raw
    assert "<img" not in raw
    assert "<b>" not in raw
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in raw


async def test_recent_decisions_are_shown_with_their_why(world: Whole) -> None:
    world.context.recent.observe(DecisionMade(decision=decided()), 0.0)
    async with logged_in(world, "viewer") as client:
        page = unescape((await client.get("/")).text)
    assert "call-1" in page
    assert "went to coder-0 by least_work" in page


def test_only_the_last_decisions_are_kept() -> None:
    recent = RecentDecisions(limit=3)
    for number in range(5):
        recent.observe(DecisionMade(decision=replace(decided(), attempt=number)), 0.0)
    assert [decision.attempt for decision in recent.newest(2)] == [4, 3]
    assert [decision.attempt for decision in recent.newest(9)] == [4, 3, 2]


async def test_a_tampered_audit_log_is_shouted_about(world: Whole) -> None:
    await world.context.audit.write(AuditEntry(kind="note", actor=SOMEBODY, via="rest", tool="no_op"))
    path = world.folder / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b"somebody", b"nobodyyy"))
    async with logged_in(world, "viewer") as client:
        page = (await client.get("/")).text
    assert '<p class="notice bad">The audit log is NOT as it was written' in page


async def test_many_lookers_have_the_audit_log_checked_once(world: Whole) -> None:
    async with logged_in(world, "viewer") as client:
        checks = 0
        real = world.context.check_audit

        async def counted() -> object:
            nonlocal checks
            checks += 1
            return await real()

        world.context.check_audit = counted  # type: ignore[assignment]
        pages = await asyncio.gather(*(client.get("/fragment") for _ in range(5)))
    assert all(page.status_code == 200 for page in pages)
    assert checks <= 1


async def test_a_check_that_takes_long_is_made_as_much_more_rarely(world: Whole) -> None:
    now_s, checks = 1000.0, 0

    class SlowCheck:
        clock = SimpleNamespace(now_s=lambda: now_s)

        async def check_audit(self) -> Report:
            nonlocal now_s, checks
            checks += 1
            now_s += 4.0
            return await world.context.check_audit()

    chain = _Chain(SlowCheck())  # type: ignore[arg-type]
    for pause_s, made in ((0.0, 1), (199.0, 1), (2.0, 2), (0.0, 2)):
        now_s += pause_s
        await chain.verdict()
        assert checks == made


async def test_all_who_look_share_one_view_for_a_second(world: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    views = 0
    real = world.context.overview.view

    async def counted(call_ids: tuple[str, ...] = ()) -> ControlView:
        nonlocal views
        views += 1
        await asyncio.sleep(0)
        return await real(call_ids)

    now_s = 1e10
    monkeypatch.setattr(world.context.clock, "now_s", lambda: now_s)
    async with logged_in(world, "viewer") as one, logged_in(world, "operator") as other:
        monkeypatch.setattr(world.context.overview, "view", counted)
        await asyncio.gather(*(client.get("/fragment") for client in (one, other) * 4))
        assert views == 1
        now_s += 1.1
        await one.get("/fragment")
        assert views == 2


async def test_a_revoked_key_ends_its_session(world: Whole) -> None:
    async with logged_in(world, "viewer") as client:
        assert (await client.get("/fragment")).status_code == 200
        world.context.keys.revoke("viewer")
        assert (await client.get("/fragment")).status_code == 401


async def test_a_running_workflow_is_cancelled_or_killed_with_a_button(tmp_path: Path) -> None:
    async with world_in(tmp_path / "state") as running, logged_in(running.whole, "operator") as browser:
        async with running.whole.client("admin") as client:
            ids = [await submitted(client, WAITS) for _ in range(2)]
            page = await browser.get("/")
            for verb, workflow_id in zip(("cancel", "kill"), ids, strict=True):
                assert f'action="/workflows/{workflow_id}/{verb}"' in page.text
                reply = await browser.post(f"/workflows/{workflow_id}/{verb}", data={"csrf": csrf(page)})
                assert (reply.status_code, reply.headers["location"]) == (303, "/#workflows")
                assert (await ended(client, workflow_id))["state"] == "cancelled"
                page = await browser.get("/")
                assert workflow_id in page.text, "what was done is told"
            page = await browser.get("/")
            reply = await browser.post("/workflows/wf-none/kill", data={"csrf": csrf(page)})
            assert "Not done: there is no workflow" in unescape((await browser.get("/")).text)
            assert (await browser.post(f"/workflows/{ids[0]}/kill", data={"csrf": "forged"})).status_code == 403
        async with logged_in(running.whole, "viewer") as viewer:
            page = await viewer.get("/")
            assert 'action="/workflows/' not in page.text
            assert (await viewer.post("/workflows/x/kill", data={"csrf": csrf(page)})).status_code == 403
