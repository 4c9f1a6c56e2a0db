"""A workflow being drawn: calls with their truth and the pieces of their prompts, before anything is forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np

from eval.workloads.invented import Inventions, constant
from eval.workloads.text import Piece, key_of, tokens_of
from swarmx.core.nouns import CallKind

SMALL, LARGE = "llama-3.1-8b", "llama-3.1-70b-fp8"
SDXL, FLUX = "sdxl", "flux-dev"
CPU, OCR = "cpu-general", "cpu-ocr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A prompt and what a model answered to it: `text` is what a forecaster reads, `work` the tokens that came.

    `data_model` is the model that was recorded. `hint` is the standardised length of the prompt among its like.
    `source` numbers the recorded prompt or session, None where it is invented.
    """

    text: str
    data_model: str
    prompt_tokens: int
    work: int
    work_limit: float
    hint: float = 0.0
    source: int | None = None


class DrawnImage(NamedTuple):
    """Megapixel-steps of one image, and the number of the recorded flow that made it, None where it is invented."""

    work: int
    source: int | None = None


class Truth(Protocol):
    """Where prompts, their answers and the work of images come from; the same `rng`, the same draws."""

    def llm(self, role: str, model: str, rng: np.random.Generator) -> Drawn:
        """A prompt for this role (`kind/role`), answered by a model that stands for `model`."""
        ...

    def image(self, model: str, rng: np.random.Generator) -> DrawnImage:
        """One image."""
        ...

    def session(self, rng: np.random.Generator) -> Sequence[Turn]:
        """The calls of one agent session, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One call of a session: `drawn.prompt_tokens` is its whole prompt, `gap_s` the time since the answer before it.

    The first `shared_tokens` of a role's first prompt are those of all sessions with the same `shared` name.
    """

    role: str
    drawn: Drawn
    gap_s: float
    shared: str
    shared_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCall:
    """One call. `answer` is the text of its answer.

    A serial server's request tells the work: `expected`, up to a factor whose logarithm has the deviation `doubt`.
    """

    role: str
    model: str
    kind: CallKind
    after: tuple[int, ...]
    gap_s: float
    prompt: tuple[Piece, ...]
    answer: Piece
    work: int
    work_limit: float
    drawn: Drawn | None = None
    expected: float = 0.0
    doubt: float = 0.0


@dataclass(slots=True, kw_only=True)
class Draft:
    """A workflow of one kind; `number` makes its texts its own, `rng` is its alone.

    `source` is the number of what it was drawn from, of its first prompt where a kind says nothing else.
    """

    kind: str
    number: int
    truth: Truth
    inventions: Inventions
    rng: np.random.Generator
    calls: list[DraftCall] = field(default_factory=list)
    source: int | None = None

    def own(self, name: str | int, tokens: int) -> Piece:
        """A text that no other workflow has."""
        return Piece(key_of("own", self.number, name), tokens)

    def ask(
        self,
        role: str,
        model: str,
        *,
        after: Sequence[int] = (),
        context: Sequence[Piece] = (),
        reads: Sequence[int] = (),
        gap_s: float = 0.0,
        drawn: Drawn | None = None,
    ) -> int:
        """Add a call to a language model; returns its position.

        Its prompt is the role's system prompt, `context`, the answers of the calls `reads`, and a prompt of its own.
        """
        name = f"{self.kind}/{role}"
        drawn = drawn or self.truth.llm(name, model, self.rng)
        place = len(self.calls)
        prompt = (
            system_prompt(name, self.inventions.vary),
            *context,
            *(self.calls[i].answer for i in reads),
            self.own(f"prompt {place}", drawn.prompt_tokens),
        )
        return self.put(role, model, prompt, drawn, after=after, gap_s=gap_s)

    def put(
        self,
        role: str,
        model: str,
        prompt: Sequence[Piece],
        drawn: Drawn,
        *,
        after: Sequence[int] = (),
        gap_s: float = 0.0,
    ) -> int:
        """Add a call to a language model with just this prompt; returns its position."""
        place = len(self.calls)
        if not place:
            self.source = drawn.source
        self.calls.append(
            DraftCall(
                role=role, model=model, kind="llm", after=tuple(after), gap_s=gap_s, prompt=tuple(prompt),
                answer=self.own(f"answer {place}", drawn.work), work=drawn.work, work_limit=drawn.work_limit,
                drawn=drawn,
            )
        )  # fmt: skip
        return place

    def work(
        self,
        role: str,
        model: str,
        expected: int,
        *,
        after: Sequence[int] = (),
        gap_s: float = 0.0,
        noise: str = "",
    ) -> int:
        """Add a call to a serial server; returns its position.

        The request tells `expected` units; it comes to as many, but for a factor by the invention `noise` if given.
        """
        place = len(self.calls)
        doubt = self.inventions.deviation(noise) if noise else 0.0
        done = max(1, round(expected * self.inventions.amount(noise, self.rng))) if noise else expected
        limit = float(max(constant("task_limit") * expected, done)) if noise else float(expected)
        self.calls.append(
            DraftCall(
                role=role, model=model, kind="image", after=tuple(after), gap_s=gap_s, prompt=(),
                answer=Piece(0, 0), work=done, work_limit=limit, expected=float(expected), doubt=doubt,
            )
        )  # fmt: skip
        return place

    def prompt_tokens(self, call: int) -> int:
        """Of a call that was added."""
        return tokens_of(self.calls[call].prompt)


@cache
def system_prompt(role: str, vary: float) -> Piece:
    """The text in front of all prompts of a role; its size is invented, and the same in every workload."""
    key = key_of("system", role)
    return Piece(key, Inventions(vary=vary).tokens("system_prompt", np.random.default_rng(key)))
