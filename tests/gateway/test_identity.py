"""Who a call is, by the headers of everybody who sends some."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmx.gateway import identity as room
from swarmx.gateway.identity import Identity, store_id
from swarmx.runtime.requests import BadRequest

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
OWN = {"x-swarmx-workflow-id": "run-7"}
DYNAMO = {"x-dynamo-session-id": "research-42:planner"}
CLAUDE = {"x-claude-code-session-id": "5e55"}
CODEX = {"thread-id": "0199-thread"}
OLDER_CODEX = {"session-id": "0198-session"}
DEEPSEEK = {"x-deepseek-harness-session-id": "ds-1"}
GENERIC = {"x-session-id": "ses_1"}
TRACED = {"traceparent": TRACEPARENT}
# From the first that counts to the last.
PRECEDENCE: list[dict[str, str]] = [OWN, DYNAMO, CLAUDE, CODEX, OLDER_CODEX, DEEPSEEK, GENERIC, TRACED]


def identity_of(headers: dict[str, str], **more: Any) -> Identity | None:
    return room.identity_of([(name.encode(), value.encode()) for name, value in headers.items()], **more)


def of(headers: dict[str, str], **more: Any) -> Identity:
    identity = identity_of(headers, **more)
    assert identity is not None
    return identity


@pytest.mark.parametrize(
    ("headers", "workflow_id", "parent", "kind", "source"),
    [
        (OWN, "run-7", None, "transparent", "swarmx"),
        ({**OWN, "x-swarmx-workflow-parent": "run-6"}, "run-7", "run-6", "transparent", "swarmx"),
        (DYNAMO, "research-42:planner", None, "dynamo", "dynamo"),
        ({**DYNAMO, "x-dynamo-parent-session-id": "p"}, "research-42:planner", "p", "dynamo.subagent", "dynamo"),
        (CLAUDE, "5e55", None, "claude_code", "claude_code"),
        ({**CLAUDE, "x-claude-code-agent-id": "a1"}, "5e55:a1", "5e55", "claude_code.subagent", "claude_code"),
        (
            {**CLAUDE, "x-claude-code-agent-id": "a2", "x-claude-code-parent-agent-id": "a1"},
            "5e55:a2",
            "5e55:a1",
            "claude_code.subagent",
            "claude_code",
        ),
        ({**CLAUDE, "x-claude-code-parent-agent-id": "a1"}, "5e55", None, "claude_code", "claude_code"),
        (CODEX, "0199-thread", None, "codex", "codex"),
        ({**CODEX, "x-codex-parent-thread-id": "up"}, "0199-thread", "up", "codex.subagent", "codex"),
        (OLDER_CODEX, "0198-session", None, "codex", "codex"),
        (DEEPSEEK, "ds-1", None, "deepseek", "deepseek"),
        ({**DEEPSEEK, "x-deepseek-harness-parent-session-id": "ds-0"}, "ds-1", "ds-0", "deepseek.subagent", "deepseek"),
        (GENERIC, "ses_1", None, "session", "session"),
        ({**GENERIC, "x-parent-session-id": "ses_0"}, "ses_1", "ses_0", "session.subagent", "session"),
        (TRACED, TRACE, None, "trace", "trace"),
    ],
)
def test_each_maker_s_headers_are_understood(
    headers: dict[str, str], workflow_id: str, parent: str | None, kind: str, source: str
) -> None:
    identity = of(headers)
    assert (identity.workflow_id, identity.parent, identity.kind, identity.source) == (
        workflow_id,
        parent,
        kind,
        source,
    )
    assert not identity.final


@pytest.mark.parametrize("first", range(len(PRECEDENCE)))
def test_the_more_explicit_header_counts(first: int) -> None:
    headers = {name: value for one in reversed(PRECEDENCE[first:]) for name, value in one.items()}
    assert of(headers) == of(PRECEDENCE[first])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-swarmx-workflow-kind": "k", "x-swarmx-node": "n"},
        {"x-dynamo-session-final": "true"},
        {"x-parent-session-id": "alone"},
        {"x-claude-code-agent-id": "alone"},
        {"x-session-id": ""},
        {"x-session-id": "  "},
        {"x-request-id": "r", "user-agent": "OpenAI/Python"},
        {"traceparent": "junk"},
        {"traceparent": f"ff-{TRACE}-00f067aa0ba902b7-01"},
        {"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"},
        {"traceparent": f"00-{TRACE}-{'0' * 16}-01"},
        {"traceparent": TRACEPARENT.upper()},
    ],
)
def test_what_names_no_session_is_no_workflow(headers: dict[str, str]) -> None:
    assert identity_of(headers) is None


def test_an_empty_session_leaves_the_word_to_the_next_header() -> None:
    assert of({"x-dynamo-session-id": " ", **GENERIC}).source == "session"


def test_traces_can_be_left_alone() -> None:
    assert identity_of(TRACED, traces=False) is None
    assert of({**TRACED, **GENERIC}, traces=False) == of(GENERIC)


@pytest.mark.parametrize("foreign", PRECEDENCE[1:-1])
@pytest.mark.parametrize("odd", ["x" * 10_000, "ä", "a b", "-a", "a/b", "../..", "\x00", "x" * 129, "名前", "a~2"])
def test_an_odd_id_of_others_is_hashed_and_stays_the_same(foreign: dict[str, str], odd: str) -> None:
    (name,) = foreign
    identity = of({name: odd})
    assert re.fullmatch(r"h\.[0-9a-f]{32}", identity.workflow_id)
    assert identity == of({name: odd}) != of({name: odd + "x"})


def test_an_odd_parent_is_hashed_as_it_is_where_it_calls_itself() -> None:
    assert of({**GENERIC, "x-parent-session-id": "ä"}).parent == of({"x-session-id": "ä"}).workflow_id


def test_a_session_is_not_its_own_parent() -> None:
    identity = of({**GENERIC, "x-parent-session-id": " ses_1 "})
    assert (identity.parent, identity.kind) == (None, "session")


@pytest.mark.parametrize("header", ["x-swarmx-workflow-id", "x-swarmx-workflow-parent"])
@pytest.mark.parametrize("bad", ["", " ", "a b", "a/b", "-a", "x" * 129, "ä", "a\nb", "a~2"])
def test_an_id_in_our_own_header_that_cannot_be_one_is_refused(header: str, bad: str) -> None:
    with pytest.raises(BadRequest, match=header):
        identity_of({**OWN, header: bad})


def test_our_own_headers_say_kind_and_node_of_any_session() -> None:
    more = {"x-swarmx-workflow-kind": "support", "x-swarmx-node": "plan"}
    for headers in PRECEDENCE:
        identity = of({**headers, **more})
        assert (identity.kind, identity.node) == ("support", "plan")


@pytest.mark.parametrize("header", ["x-swarmx-workflow-final", "x-dynamo-session-final"])
@pytest.mark.parametrize(
    ("said", "final"),
    [("1", True), ("TRUE", True), (" yes ", True), ("on", True)]
    + [(no, False) for no in ("0", "false", "no", "", "maybe")],
)
def test_only_a_clear_yes_is_final_whoever_says_it_of_any_session(header: str, said: str, final: bool) -> None:
    assert [of({**headers, header: said}).final for headers in PRECEDENCE] == [final] * len(PRECEDENCE)


def test_labels_are_cut_to_a_bounded_length() -> None:
    identity = of({**OWN, "x-swarmx-workflow-kind": "k" * 999, "x-swarmx-node": "n" * 999})
    assert (len(identity.kind), len(identity.node)) == (64, 64)


def test_a_header_that_is_sent_twice_counts_as_it_came_first() -> None:
    identity = room.identity_of([(b"x-session-id", b"a"), (b"x-session-id", b"b")])
    assert identity is not None
    assert identity.workflow_id == "a"


def test_tenants_do_not_share_ids() -> None:
    assert store_id("run-7", "red") != store_id("run-7", "blue")


NAMES = [name for headers in PRECEDENCE[1:] for name in headers] + [
    "x-dynamo-parent-session-id",
    "x-dynamo-session-final",
    "x-claude-code-agent-id",
    "x-claude-code-parent-agent-id",
    "x-codex-parent-thread-id",
    "x-parent-session-id",
    "x-swarmx-workflow-kind",
    "x-swarmx-node",
    "x-swarmx-workflow-final",
]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(st.characters(codec="utf-8"), max_size=200), max_size=6))
def test_nothing_that_others_send_is_an_error_and_every_id_is_one_of_ours(headers: dict[str, str]) -> None:
    identity = identity_of(headers)
    if identity is not None:
        for found in (identity.workflow_id, identity.parent or "none"):
            assert of({"x-swarmx-workflow-id": found}).workflow_id == found
        assert identity.parent != identity.workflow_id
