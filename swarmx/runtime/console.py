"""The console: answers an operator's sentence from the figures at hand, or makes an order of it a proposal."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import msgspec

from swarmx.core.audit import AuditRecord, ModelUse, Report
from swarmx.core.control import Actor, ControlView, Evidence, Proposal, ToolCall, Via
from swarmx.core.errors import Refused, SwarmXError
from swarmx.core.ports import AuditTrail
from swarmx.llm_coordinator.answers import Answer, answer, report_words
from swarmx.llm_coordinator.grammar import Policies, parse
from swarmx.llm_coordinator.intents import Ask, Order, Unknown, WhatChanged, WhoScaled, WhyCall
from swarmx.runtime.desk import Desk
from swarmx.runtime.sentence_reader import SentenceReader

log = logging.getLogger(__name__)

MOST_CHARACTERS = 2000
_PAGE = 1000
_MOST_PAGES = 5


class Told(msgspec.Struct, frozen=True, kw_only=True, tag="text"):
    """One line of the answer."""

    text: str


class Shown(msgspec.Struct, frozen=True, kw_only=True, tag="evidence"):
    """One number that the answer rests on."""

    evidence: Evidence


class Proposed(msgspec.Struct, frozen=True, kw_only=True, tag="proposal"):
    """What an order became: it waits for approve or deny, with its dry run."""

    proposal: Proposal


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="error"):
    """Why there is no answer; `rule` names the rule that refused, if one did."""

    detail: str
    rule: str = ""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The last event of every answer."""


ConsoleEvent = Told | Shown | Proposed | Failed | Done


class Console:
    """Works without a model; with a `reader` it is asked what the patterns do not know.

    `overview` gives the view with the decisions about these calls, `check` verifies the audit log.
    """

    def __init__(
        self,
        *,
        overview: Callable[[Sequence[str]], Awaitable[ControlView]],
        desk: Desk,
        audit: AuditTrail,
        check: Callable[[], Awaitable[Report]],
        policies: Policies,
        reader: SentenceReader | None = None,
    ) -> None:
        self._overview = overview
        self._desk = desk
        self._audit = audit
        self._check = check
        self._policies = policies
        self._reader = reader

    async def answer(self, text: str, *, actor: Actor, via: Via) -> AsyncIterator[ConsoleEvent]:
        """The events of one answer. Expected failures are events; Done comes last."""
        try:
            async for event in self._events(text, actor, via):
                yield event
        except Refused as error:
            yield Failed(detail=str(error), rule=error.rule)
        except SwarmXError as error:
            yield Failed(detail=str(error))
        yield Done()

    async def _events(self, text: str, actor: Actor, via: Via) -> AsyncIterator[ConsoleEvent]:
        if len(text) > MOST_CHARACTERS:
            yield Failed(detail=f"the text has {len(text)} characters; {MOST_CHARACTERS} are the most.")
            return
        view = await self._overview(())
        intent = parse(text, view, self._policies)
        use: ModelUse | None = None
        if isinstance(intent, Unknown) and self._reader is not None and text.strip():
            yield Told(text="Asking the language model what you mean.")
            if (read := await self._reader.read(text.strip(), view)) is not None:
                intent, use = read
        if isinstance(intent, Order):
            async for event in self._propose(intent.call, text, actor, via, use):
                yield event
            return
        records: Sequence[AuditRecord] = ()
        chain: tuple[str, ...] = ()
        match intent:
            case WhyCall(call_id=call_id):
                view = await self._overview((call_id,))
            case WhatChanged(window_s=window_s):
                records = await self._records(view.at_s - window_s)
            case WhoScaled():
                records = await self._audit.tail(limit=_PAGE)
            case Ask(about="audit"):
                chain = report_words(await self._check())
            case _:
                pass
        for event in _told(answer(intent, view, records=records, chain=chain)):
            yield event

    async def _propose(
        self, call: ToolCall, text: str, actor: Actor, via: Via, use: ModelUse | None
    ) -> AsyncIterator[ConsoleEvent]:
        proposal = await self._desk.propose(call, actor=actor, via=via, reason=text.strip(), mode="review", model=use)
        yield Proposed(proposal=proposal)
        if proposal.state == "open":
            name = proposal.proposal_id
            yield Told(
                text=f"Nothing has changed yet: {name} waits for `swarmx proposals approve {name}`, or the button on "
                "the web page."
            )
        else:
            yield Told(text=f"{proposal.proposal_id} is {proposal.state}. {proposal.detail}".strip())

    async def _records(self, since_s: float) -> list[AuditRecord]:
        """The records since then, oldest first, 5,000 at most."""
        found = await self._audit.tail(limit=_PAGE)
        for _ in range(_MOST_PAGES - 1):
            if not found or found[0].at_s < since_s or found[0].seq == 1:
                break
            found = [*await self._audit.tail(limit=_PAGE, before=found[0].seq), *found]
        return found


def _told(found: Answer) -> list[ConsoleEvent]:
    return [*(Told(text=line) for line in found.lines), *(Shown(evidence=item) for item in found.evidence)]
