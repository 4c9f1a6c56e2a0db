"""Has one turn's tool call chosen: by the language model, asked again where that helps, or by the rules."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from tenacity import AsyncRetrying, retry_if_result, stop_after_attempt, wait_fixed

from swarmx.core.audit import ModelUse
from swarmx.core.control import ControlView, Episode, Evidence, Prompt, Reply, ToolCall
from swarmx.core.ports import LanguageModel
from swarmx.llm_coordinator.aliases import Aliases
from swarmx.llm_coordinator.prompt import Prompts, advised, offered, recalled, schemas_of
from swarmx.llm_coordinator.reply import Parsed, read_reply
from swarmx.llm_coordinator.rules import choose, evidence_about
from swarmx.llm_coordinator.situation import Situation, Trigger
from swarmx.llm_coordinator.snapshot import every_word, snapshot
from swarmx.tools.catalogue import Catalogue
from swarmx.tools.tool import Tool

log = logging.getLogger(__name__)

_SHARE = 0.6  # of the time left that one attempt may take, so that a server that hangs leaves time for the next
_ASKED_AT_MOST = 2  # times that a reply is waited for; the second time with what was wrong


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A valid tool call, who chose it, and the figures behind it.

    `fallback` says why the rules stood in for the model, empty when they did not. `unusable` counts the replies that
    came and could not be used; a model that could not be reached sent none.
    """

    source: Literal["model", "rules"]
    call: ToolCall
    reason: str
    evidence: tuple[Evidence, ...]
    fallback: str = ""
    unusable: int = 0
    replies: tuple[Reply, ...] = ()
    model: ModelUse | None = None


class Chooser:
    """`step` is how far a change of the rules may move a bound; `deadline_s` is for all that one turn asks a model."""

    def __init__(
        self,
        *,
        model: LanguageModel | None,
        prompts: Prompts,
        tools: Mapping[str, Tool],
        catalogue: Catalogue,
        step: int,
        deadline_s: float,
    ) -> None:
        self._model = model
        self._prompts = prompts
        # The situation tells what the reading tools would: a turn that only looks would be lost.
        self._tools = {name: tool for name, tool in tools.items() if tool.effect != "read" or name == "no_op"}
        self._schemas = schemas_of(self._tools.values(), catalogue)
        self._words = every_word(self._schemas)
        self._step = step
        self._deadline_s = deadline_s

    def situation(self, view: ControlView, trigger: Trigger) -> tuple[Situation, Aliases]:
        """What there is to choose from."""
        return snapshot(view, trigger, self._words)

    async def choose(
        self,
        view: ControlView,
        situation: Situation,
        aliases: Aliases,
        nearest: Sequence[tuple[Episode, float]],
    ) -> Choice:
        """The model's call; the rules' when there is no model, or when it gave none that can be used."""
        if self._model is None:
            return self._by_the_rules(view, "there is no model")
        schemas = offered(self._schemas, situation)
        advice = advised(choose(view, step=self._step).call, aliases, self._words)
        like = [recalled(episode, similarity, aliases, self._words) for episode, similarity in nearest]
        loop = asyncio.get_running_loop()
        ends_at_s = loop.time() + self._deadline_s
        replies: tuple[Reply, ...] = ()
        problem, unusable = "", 0
        while len(replies) < _ASKED_AT_MOST:
            prompt = self._prompts.render(situation, like, schemas, advice, problem=problem)
            reply = await ask(self._model, prompt, deadline_s=ends_at_s - loop.time())
            replies += (reply,)
            read = read_reply(reply, self._tools, aliases, schemas)
            if isinstance(read, Parsed):
                return Choice(
                    source="model",
                    call=read.call,
                    reason=read.reason,
                    evidence=evidence_about(view, read.call),
                    unusable=unusable,
                    replies=replies,
                    model=use_of(self._model.name, prompt, reply),
                )
            problem = read.why
            log.warning("the reply of %s cannot be used: %s %s", self._model.name, read.why, reply.detail)
            if reply.error in ("unreachable", "late", "refused"):
                break
            unusable += 1
        return self._by_the_rules(view, problem, unusable, replies)

    def _by_the_rules(
        self, view: ControlView, fallback: str, unusable: int = 0, replies: tuple[Reply, ...] = ()
    ) -> Choice:
        chosen = choose(view, step=self._step)
        return Choice(
            source="rules",
            call=chosen.call,
            reason=chosen.reason,
            evidence=chosen.evidence,
            fallback=fallback,
            unusable=unusable,
            replies=replies,
        )


async def ask(model: LanguageModel, prompt: Prompt, *, deadline_s: float) -> Reply:
    """Ask, and once more when the model could not be reached or was late, within one deadline for both.

    A model that breaks its own deadline, or raises, has replied like any other that gives nothing to use.
    """
    loop = asyncio.get_running_loop()
    ends_at_s = loop.time() + deadline_s
    attempts = AsyncRetrying(
        stop=stop_after_attempt(2),
        wait=wait_fixed(min(0.5, 0.05 * deadline_s)),
        retry=retry_if_result(lambda reply: reply.error in ("unreachable", "late")),
        retry_error_callback=lambda state: state.outcome and state.outcome.result(),
    )

    async def attempt() -> Reply:
        left_s = max(0.0, _SHARE * (ends_at_s - loop.time()))
        try:
            async with asyncio.timeout(left_s):
                return await model.reply(prompt, deadline_s=left_s)
        except TimeoutError:
            return Reply(error="late", detail=f"no answer within {left_s:.3g} s", seconds=left_s)
        except Exception:
            log.exception("the model %s broke down", model.name)
            return Reply(error="not_a_reply", detail="the client of the model broke down; the log says how")

    reply: Reply = await attempts(attempt)
    return reply


def use_of(name: str, prompt: Prompt, reply: Reply) -> ModelUse:
    """The model with the hashes of what it was asked and of what it said."""
    said = msgspec.json.encode([reply.tool, reply.arguments, reply.text])
    return ModelUse(
        name=name,
        prompt_sha256=hashlib.sha256(msgspec.json.encode(prompt)).hexdigest(),
        reply_sha256=hashlib.sha256(said).hexdigest(),
    )
