"""Which workflow a call belongs to: read from our own headers, or from those that agents of other makers send anyway.

Header names of Dynamo and of coding agents are those that Dynamo's HTTP front recognises (ai-dynamo/dynamo,
lib/llm/src/protocols/agents.rs, docs/agents/session-ids.md); `traceparent` is that of W3C Trace Context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from swarmx.runtime.requests import BadRequest

Source = Literal["swarmx", "dynamo", "claude_code", "codex", "deepseek", "session", "trace"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_TRACE = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_YES = frozenset({"1", "true", "yes", "on"})
_LONGEST_LABEL = 64

_OWN_ID, _OWN_PARENT = "x-swarmx-workflow-id", "x-swarmx-workflow-parent"
_OWN_KIND, _OWN_NODE = "x-swarmx-workflow-kind", "x-swarmx-node"
_FINALS = ("x-swarmx-workflow-final", "x-dynamo-session-final")
_TRACEPARENT = "traceparent"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Headers:
    """How one maker names a session and its parent; `agent` names a subagent within the session."""

    source: Source
    session: str
    parent: str = ""
    agent: str = ""


# The first that is there counts. Codex calls a session `session-id` in its older versions.
_FOREIGN = (
    _Headers(source="dynamo", session="x-dynamo-session-id", parent="x-dynamo-parent-session-id"),
    _Headers(
        source="claude_code",
        session="x-claude-code-session-id",
        parent="x-claude-code-parent-agent-id",
        agent="x-claude-code-agent-id",
    ),
    _Headers(source="codex", session="thread-id", parent="x-codex-parent-thread-id"),
    _Headers(source="codex", session="session-id"),
    _Headers(
        source="deepseek",
        session="x-deepseek-harness-session-id",
        parent="x-deepseek-harness-parent-session-id",
    ),
    _Headers(source="session", session="x-session-id", parent="x-parent-session-id"),
)
_KNOWN = {
    name.encode(): name
    for name in (
        *(_OWN_ID, _OWN_PARENT, _OWN_KIND, _OWN_NODE, *_FINALS, _TRACEPARENT),
        *(name for maker in _FOREIGN for name in (maker.session, maker.parent, maker.agent) if name),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a call says of its workflow. `parent` is the id of the workflow that started this one, as a subagent.

    `final`: no call comes after this one.
    """

    workflow_id: str
    kind: str
    node: str
    final: bool
    source: Source = "swarmx"
    parent: str | None = None


def identity_of(headers: Iterable[tuple[bytes, bytes]], *, traces: bool = True) -> Identity | None:
    """Read the headers as ASGI has them, names in lower case; None where nothing says which calls belong together.

    Raises BadRequest for an id in a header of our own that cannot be one. Odd ids of others are replaced by a hash:
    their clients never asked for our rules. Without `traces` the `traceparent` header is not looked at.
    """
    found: dict[str, str] = {}
    for name, value in headers:
        if name in _KNOWN:
            found.setdefault(_KNOWN[name], value.decode("latin-1"))
    if not found:
        return None
    if _OWN_ID in found:
        parent = _own(found, _OWN_PARENT) if _OWN_PARENT in found else None
        return _identity(found, _own(found, _OWN_ID), parent, "swarmx")
    for maker in _FOREIGN:
        session = found.get(maker.session, "").strip()
        if session:
            return _identity(found, *_session(found, maker, session), maker.source)
    trace = _TRACE.fullmatch(found.get(_TRACEPARENT, "").strip()) if traces else None
    return _identity(found, trace[1], None, "trace") if trace else None


def store_id(name: str, tenant: str) -> str:
    """The id in the store of the workflow that its client calls by this name; two tenants may use the same one."""
    return f"{tenant}:{name}"


def _identity(found: Mapping[str, str], workflow_id: str, parent: str | None, source: Source) -> Identity:
    parent = None if parent == workflow_id else parent
    kind = "transparent" if source == "swarmx" else source if parent is None else f"{source}.subagent"
    return Identity(
        workflow_id=workflow_id,
        kind=found.get(_OWN_KIND, kind)[:_LONGEST_LABEL],
        node=found.get(_OWN_NODE, "")[:_LONGEST_LABEL],
        final=any(found.get(name, "").strip().lower() in _YES for name in _FINALS),
        source=source,
        parent=parent,
    )


def _own(found: Mapping[str, str], header: str) -> str:
    if not _ID.fullmatch(found[header]):
        raise BadRequest(f"{header} {found[header][:140]!r}: use up to 128 letters, digits and . _ : - characters.")
    return found[header]


def _session(found: Mapping[str, str], maker: _Headers, session: str) -> tuple[str, str | None]:
    """The workflow and its parent. The agents of a session are told apart within it, as their ids may be short."""
    parent = found.get(maker.parent, "").strip() or None
    if not maker.agent:
        return _plain(session), _plain(parent) if parent else None
    agent = found.get(maker.agent, "").strip()
    if not agent:
        return _plain(session), None
    return _plain(f"{session}:{agent}"), _plain(f"{session}:{parent}" if parent else session)


def _plain(foreign: str) -> str:
    """An id as ours are: the same one, or a hash where it is too long or has other characters."""
    if _ID.fullmatch(foreign):
        return foreign
    return f"h.{blake2b(foreign.encode(), digest_size=16).hexdigest()}"
