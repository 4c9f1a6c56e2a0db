"""The web page: what the fleet does, what waits for a decision, and a box to ask in; rendered here, for any browser."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import jinja2
import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from swarmx.agents.explain import explain
from swarmx.core.audit import Report
from swarmx.core.control import ControlView, Proposal, ProposalState
from swarmx.core.errors import (
    ConfigError,
    Forbidden,
    NotFound,
    Refused,
    SwarmXError,
    Unauthorized,
    WorkflowError,
)
from swarmx.gateway.context import Context
from swarmx.gateway.event_feed import server_event
from swarmx.gateway.keys import RIGHTS, Key
from swarmx.gateway.problems import status_of
from swarmx.gateway.sessions import LIFETIME_S, FailedLogins, Session, Sessions
from swarmx.llm_coordinator.answers import ago, call_words, change_words, report_words
from swarmx.runtime.console import MOST_CHARACTERS, ConsoleEvent, Done

_PAGES = Path(__file__).parent / "pages"
_ASSETS = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_SESSION, _LOGIN = "swarmx_session", "swarmx_login"
_MOST_FORM_BYTES = 32 * 1024
_CHECK_EVERY_S = 30.0
_CHECK_REST = 50.0  # times as long as a check took until the next
_VIEW_S = 1.0
_MOST_OPEN = 200  # proposals
_DECIDED = tuple(state for state in get_args(ProposalState) if state != "open")
_MOST_ITEMS = 200  # of one answer
_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}

Handler = Callable[[Request], Awaitable[Response]]


def router(context: Context) -> APIRouter:
    """The page at /, its login, its forms and its two assets."""
    page = _Page(context)
    routes = APIRouter(include_in_schema=False)
    for method, path, handler in (
        ("GET", "/", page.index),
        ("GET", "/fragment", page.fragment),
        ("GET", "/predictor", page.predictor),
        ("GET", "/login", page.login_form),
        ("POST", "/login", page.login),
        ("POST", "/logout", page.logout),
        ("POST", "/ask", page.ask),
        ("POST", "/proposals/{proposal_id}/approve", page.approve),
        ("POST", "/proposals/{proposal_id}/deny", page.deny),
        ("POST", "/workflows/{workflow_id}/cancel", page.cancel),
        ("POST", "/workflows/{workflow_id}/kill", page.kill),
        ("GET", "/assets/{name}", page.asset),
    ):
        routes.add_api_route(path, page.answering(handler), methods=[method], response_model=None)
    return routes


class _Page:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._chain = _Chain(context)
        self._glance = _Glance(context)
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_PAGES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
        )
        environment.filters |= {
            "num": _number,
            "percent": lambda share: "–" if share is None else f"{share:.0%}",
            "iso": lambda at_s: datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds"),
            "clock": lambda at_s: datetime.fromtimestamp(at_s, UTC).strftime("%H:%M:%S UTC"),
            "call": call_words,
            "change": change_words,
            "explain": explain,
        }
        self._pages = environment

    # Building routes reads nothing of the context; only a request does.

    @cached_property
    def _open(self) -> Sessions:
        return Sessions(self._context.keys, self._context.clock)

    @cached_property
    def _failed(self) -> FailedLogins:
        return FailedLogins(self._context.clock)

    def answering(self, handler: Handler) -> Handler:
        """The handler with its errors as pages and the headers of all answers."""

        async def answer(request: Request) -> Response:
            try:
                response = await handler(request)
            except Unauthorized as error:
                if request.method == "GET" and request.url.path in ("/", "/predictor"):
                    response = RedirectResponse("/login", 303)
                else:
                    response = self._message(request, 401, str(error))
            except SwarmXError as error:
                response = self._message(request, status_of(error), str(error))
            response.headers.update(_HEADERS)
            return response

        return answer

    async def index(self, request: Request) -> Response:
        """The whole page."""
        session, key = self._seen(request)
        notice, session.notice = session.notice, ""
        sections = await self._sections(session, key)
        more: dict[str, Any] = {
            "notice": notice,
            "question": session.question,
            "answer": await self._as_now(session.answer),
            "most": MOST_CHARACTERS,
        }
        return self._html("index.html", **sections, **more)

    async def fragment(self, request: Request) -> Response:
        """The sections that change, for a page that is open already."""
        session, key = self._seen(request)
        return self._html("sections.html", **await self._sections(session, key))

    async def predictor(self, request: Request) -> Response:
        """Who forecasts, how well of late, and what adaptation did; reload it to see it anew."""
        session, key = self._seen(request)
        now_s, found = self._context.clock.now_s(), self._context.forecasts.status()
        common = self._common(session, key)
        return self._html("predictor.html", predictor=found, ago=lambda at_s: ago(now_s - at_s), **common)

    async def login_form(self, request: Request) -> Response:
        """Where a token is typed in."""
        return self._login_page("", 200)

    async def login(self, request: Request) -> Response:
        """Begin a session for the token in the form."""
        form = await _form(request)
        _check_csrf(form, request.cookies.get(_LOGIN, ""))
        address = request.client.host if request.client is not None else ""
        self._failed.check(address)
        try:
            key = self._context.keys.check(f"Bearer {form.get('token', '').strip()}")
        except Unauthorized:
            self._failed.count(address)
            return self._login_page("This token is unknown. It may have been revoked.", 401)
        key.require("read_all")
        self._open.end(request.cookies.get(_SESSION))
        response = RedirectResponse("/", 303)
        _set_cookie(response, request, _SESSION, self._open.begin(key), LIFETIME_S)
        response.delete_cookie(_LOGIN, path="/login")
        return response

    async def logout(self, request: Request) -> Response:
        """End the session."""
        session_id = request.cookies.get(_SESSION)
        session, _ = self._open.find(session_id)
        _check_csrf(await _form(request), session.csrf)
        self._open.end(session_id)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(_SESSION)
        return response

    async def ask(self, request: Request) -> Response:
        """Answer as a stream to a script, else keep the answer for the page."""
        session, key = self._seen(request)
        form = await _form(request)
        _check_csrf(form, session.csrf)
        text = form.get("text", "").strip()
        if not text:
            raise ConfigError("the question is empty; type one.")
        events = self._context.console.answer(text, actor=key.actor, via="web")
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(self._stream(events, session, key), media_type="text/event-stream")
        session.question = text[:MOST_CHARACTERS]
        session.answer = [_item(event) async for event in events if not isinstance(event, Done)][:_MOST_ITEMS]
        return RedirectResponse("/#console", 303)

    async def approve(self, request: Request) -> Response:
        """Approve a proposal; what became of it is told on the page."""

        async def decide(key: Key, form: dict[str, str]) -> str:
            proposal_id = request.path_params["proposal_id"]
            done = await self._context.desk.approve(proposal_id, actor=key.actor, via="web")
            return f"{proposal_id} is approved; it is {done.state} now."

        return await self._decided(request, decide)

    async def deny(self, request: Request) -> Response:
        """Deny a proposal."""

        async def decide(key: Key, form: dict[str, str]) -> str:
            proposal_id, reason = request.path_params["proposal_id"], form.get("reason", "")
            await self._context.desk.deny(proposal_id, actor=key.actor, via="web", reason=reason)
            return f"{proposal_id} is denied."

        return await self._decided(request, decide)

    async def cancel(self, request: Request) -> Response:
        """Ask a workflow to end."""

        async def decide(key: Key, form: dict[str, str]) -> str:
            key.require("submit")
            workflow_id, context = request.path_params["workflow_id"], self._context
            if await context.transparent.cancel(workflow_id, key.sees) is None:
                await context.workflows.cancel(workflow_id, key.sees, wait=False)
            return f"{workflow_id} is being cancelled: its calls are let go first."

        return await self._decided(request, decide, "workflows")

    async def kill(self, request: Request) -> Response:
        """End a workflow at once."""

        async def decide(key: Key, form: dict[str, str]) -> str:
            key.require("submit")
            record = await self._context.workflows.kill(request.path_params["workflow_id"], key.sees)
            return f"{record.workflow_id} is {record.state}."

        return await self._decided(request, decide, "workflows")

    async def asset(self, request: Request) -> Response:
        """The style sheet, the script or the icon."""
        name = request.path_params["name"]
        if name not in _ASSETS:
            raise NotFound(f"there is no asset {name!r}.")
        return Response((_PAGES / name).read_bytes(), media_type=_ASSETS[name])

    async def _decided(
        self, request: Request, decide: Callable[[Key, dict[str, str]], Awaitable[str]], section: str = "proposals"
    ) -> Response:
        session, key = self._seen(request)
        form = await _form(request)
        _check_csrf(form, session.csrf)
        try:
            session.notice = await decide(key, form)
            self._glance.forget()
        except (Refused, NotFound, WorkflowError) as error:
            session.notice = f"Not done: {error}"
        return RedirectResponse(f"/#{section}", 303)

    def _seen(self, request: Request) -> tuple[Session, Key]:
        """Who looks. Raises Unauthorized, Forbidden."""
        session, key = self._open.find(request.cookies.get(_SESSION))
        key.require("read_all")
        return session, key

    async def _sections(self, session: Session, key: Key) -> dict[str, Any]:
        context = self._context
        view = await self._glance.view()
        workflows = await context.store.workflows(tenant=key.sees, state="running", limit=20, cursor=None)
        report, checked_at_s = await self._chain.verdict()
        now_s = context.clock.now_s()
        return {
            "view": view,
            "replicas": [r for r in view.replicas.values() if r.state != "gone"],
            "workflows": [(workflow, context.remaining(workflow.workflow_id)) for workflow in workflows.workflows],
            "decisions": context.recent.newest(15),
            "open": await context.desk.proposals(states=("open",), limit=_MOST_OPEN),
            "decided": await context.desk.proposals(states=_DECIDED, limit=8),
            "records": (await context.audit.tail(limit=15))[::-1],
            "sound": report.sound,
            "chain": report_words(report),
            "checked_at_s": checked_at_s,
            "now_s": now_s,
            "ago": lambda at_s: ago(now_s - at_s),
            **self._common(session, key),
        }

    def _common(self, session: Session, key: Key) -> dict[str, Any]:
        return {"key": key, "csrf": session.csrf, "controls": "control" in RIGHTS[key.role]}

    async def _as_now(self, answer: list[dict[str, object]]) -> list[dict[str, object]]:
        """An answer that is shown again, with its proposal as it is by now."""
        shown = []
        for item in answer:
            if isinstance(old := item.get("proposal"), Proposal):
                item = item | {"proposal": await self._context.desk.proposal(old.proposal_id)}
            shown.append(item)
        return shown

    async def _stream(self, events: AsyncIterator[ConsoleEvent], session: Session, key: Key) -> AsyncIterator[bytes]:
        """Each event as a piece of the page, rendered here, so that the script puts nothing together."""
        template = self._pages.get_template("item.html")
        number = 0
        async for event in events:
            number += 1
            html = "" if isinstance(event, Done) else template.render(item=_item(event), **self._common(session, key))
            name = "done" if isinstance(event, Done) else "item"
            yield server_event(name, number, msgspec.json.encode({"html": html}))

    def _login_page(self, problem: str, status: int) -> Response:
        csrf = secrets.token_urlsafe(32)
        response = self._html("login.html", status, problem=problem, csrf=csrf)
        response.set_cookie(_LOGIN, csrf, max_age=3600, path="/login", httponly=True, samesite="strict")
        return response

    def _message(self, request: Request, status: int, text: str) -> Response:
        """A page that says what is wrong; with a way out for whoever is logged in."""
        try:
            csrf = self._open.find(request.cookies.get(_SESSION))[0].csrf
        except SwarmXError:
            csrf = ""
        return self._html("message.html", status, text=text, number=status, csrf=csrf)

    def _html(self, name: str, status: int = 200, **values: Any) -> Response:
        return Response(self._pages.get_template(name).render(**values), status, media_type="text/html")


class _Glance:
    """The view that all who look share for a second: it is not taken anew for each of them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._found: ControlView | None = None
        self._one = asyncio.Lock()

    async def view(self) -> ControlView:
        async with self._one:
            if self._found is None or self._context.clock.now_s() - self._found.at_s > _VIEW_S:
                self._found = await self._context.overview.view()
            return self._found

    def forget(self) -> None:
        """Something was changed, and whoever changed it wants to see it."""
        self._found = None


class _Chain:
    """The verdict on the audit log, taken anew when it is older than half a minute, or, where the check takes long,
    than fifty times as long as that: the log grows, the share of the time that goes into checking it does not."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._found: tuple[Report, float] | None = None
        self._fresh_until_s = 0.0
        self._one = asyncio.Lock()

    async def verdict(self) -> tuple[Report, float]:
        """The report, and when it was begun."""
        clock = self._context.clock
        async with self._one:
            began_s = clock.now_s()
            if self._found is None or began_s > self._fresh_until_s:
                self._found = await self._context.check_audit(), began_s
                ended_s = clock.now_s()
                self._fresh_until_s = ended_s + max(_CHECK_EVERY_S, _CHECK_REST * (ended_s - began_s))
            return self._found


def _item(event: ConsoleEvent) -> dict[str, object]:
    """One event for a template; `type` says which."""
    item: dict[str, object] = {"type": str(type(event).__struct_config__.tag)}
    return item | {name: getattr(event, name) for name in event.__struct_fields__}


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form that this page sent. Raises Forbidden, ConfigError."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Forbidden("this form was sent from another site.")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise Forbidden("this form was sent from another site.")
    body = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if len(body) > _MOST_FORM_BYTES or kind != "application/x-www-form-urlencoded":
        raise ConfigError(f"a form has at most {_MOST_FORM_BYTES} bytes of type application/x-www-form-urlencoded.")
    try:
        fields = parse_qs(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=10)
    except ValueError:
        raise ConfigError("a form has at most 10 fields.") from None
    return {name: values[0] for name, values in fields.items()}


def _check_csrf(form: dict[str, str], wanted: str) -> None:
    if not wanted or not hmac.compare_digest(form.get("csrf", "").encode(), wanted.encode()):
        raise Forbidden("this form is too old, or was not made for you; go back, reload the page and try again.")


def _set_cookie(response: Response, request: Request, name: str, value: str, life_s: float) -> None:
    secure = request.url.scheme == "https"
    response.set_cookie(name, value, max_age=int(life_s), httponly=True, samesite="strict", secure=secure)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
