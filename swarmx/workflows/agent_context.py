"""What of a long conversation an agent's model is shown, so that it fits into the model's context.

What tools left goes first and is named by its length, then whole rounds go; the oldest before the newer ones, and those
of the last three rounds only when nothing older is left. Leaving old results out keeps agents as good as summaries do,
at less cost (Lindenbauer et al., 2025, "The Complexity Trap"). A round goes as a whole: engines refuse a result whose
call they were not shown.

An engine reads anew all that comes after the first change to a prompt that it has in its cache. So a prompt grows at
its end only, until it would be too long; it is then made a quarter shorter than it has to be, and what was left out
stays out. The next steps find all that came before them in the cache. Were a prompt made no shorter than it has to be,
each step would read anew whatever is still whole.

What is shown follows from the steps so far and what the model is offered: a replay, a fork and whoever takes a workflow
over send the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from swarmx.workflows.spending import BYTES_PER_TOKEN

Message = dict[str, Any]

_RECENT = 3  # rounds that the model is working on
_ROOM = 0.75  # of what fits: how long a prompt is after something was left out
_TELLING_TOKENS = 1000  # a shorter prompt says more about the engine's template than about the text
_MOST_OFF = 4.0  # no text has more tokens than bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """A finished step of an agent: what the model said, and the messages that followed from it.

    `prompt_tokens` are those of the prompt that the step was asked with, by the engine's count; None if it gave none.
    """

    said: Message
    followed: tuple[Message, ...]
    prompt_tokens: int | None = None


def shown(
    first: Sequence[Message], rounds: Sequence[Round], offered: Sequence[Any], most_tokens: int | None
) -> list[Message]:
    """The conversation that begins with `first`, the task as its last message, in no more than `most_tokens` if given.

    `first` and the last round are always there, also where they alone are more than that. Tokens are estimated from
    bytes, but never fewer to a byte than the engine counted in the prompt before.
    """
    if most_tokens is None:
        return [*first, *(message for item in rounds for message in (item.said, *item.followed))]
    short = [_without_results(item) for item in rounds]
    whole = [_size([item.said, *item.followed]) for item in rounds]
    cuts = _Cuts(fixed=_size(first) + _size(offered), whole=whole, short=[_size(left) for left in short])
    for count, item in enumerate(rounds):  # as each step before was asked
        cuts.fit(count, most_tokens)
        cuts.learn(count, item.prompt_tokens)
    cuts.fit(len(rounds), most_tokens)
    messages = [*first[:-1], _with_note(first[-1], cuts.dropped)]
    for left in short[cuts.dropped : cuts.elided]:
        messages += left
    for item in rounds[cuts.elided :]:
        messages += (item.said, *item.followed)
    return messages


@dataclass(slots=True, kw_only=True)
class _Cuts:
    """How many of the oldest rounds are not shown at all (`dropped`), or without results (`elided`, those included).

    `whole` and `short` are the bytes of each round, with results and without, `fixed` those of what is always there.
    `factor` is how many tokens there are to one that is estimated.
    """

    fixed: int
    whole: list[int]
    short: list[int]
    dropped: int = 0
    elided: int = 0
    factor: float = 1.0

    def tokens(self, count: int) -> int:
        """What a prompt with the first `count` rounds comes to."""
        note = _size(_note(self.dropped)) if self.dropped else 0
        rounds = sum(self.short[self.dropped : self.elided]) + sum(self.whole[self.elided : count])
        return int((self.fixed + note + rounds) * self.factor / BYTES_PER_TOKEN) + 1

    def fit(self, count: int, most_tokens: int) -> None:
        """Leave out what has to be, before the prompt with the first `count` rounds is sent."""
        if self.tokens(count) <= most_tokens:
            return
        before = self.dropped, self.elided
        self._shrink(count, count - _RECENT, int(_ROOM * most_tokens))
        if self.tokens(count) > int(_ROOM * most_tokens):  # the last rounds alone are longer: keep all that fits
            self.dropped, self.elided = before
            self._shrink(count, count - _RECENT, most_tokens)
            self._shrink(count, count - 1, most_tokens)

    def learn(self, count: int, counted: int | None) -> None:
        """Take in how many tokens the engine found in that prompt."""
        estimated = self.tokens(count) / self.factor
        if counted is not None and estimated >= _TELLING_TOKENS:
            self.factor = min(_MOST_OFF, max(1.0, counted / estimated))

    def _shrink(self, count: int, before: int, target_tokens: int) -> None:
        """Leave out of the rounds before that one until the prompt is as short as that, or all of them are left out."""
        while self.elided < before and self.tokens(count) > target_tokens:
            self.elided += 1
        while self.dropped < before and self.tokens(count) > target_tokens:
            self.dropped += 1


def _without_results(item: Round) -> list[Message]:
    return [item.said, *(_named(message) if message["role"] == "tool" else message for message in item.followed)]


def _named(message: Message) -> Message:
    """The result by its length, where that is shorter."""
    text = f"[Left out to save room: {len(message['content'])} characters.]"
    return message | {"content": text} if len(text) < len(message["content"]) else message


def _with_note(task: Message, dropped: int) -> Message:
    """The task, which also says what is missing: two messages of a user in a row are more than some models take."""
    return task | {"content": task["content"] + _note(dropped)} if dropped else task


def _note(dropped: int) -> str:
    steps = "step is" if dropped == 1 else f"{dropped} steps are"
    return f"\n\n[Left out to save room: the first {steps} not shown.]"


def _size(parts: Sequence[Any] | str) -> int:
    return len(msgspec.json.encode(parts))
