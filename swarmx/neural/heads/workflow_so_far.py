"""What a workflow has shown so far, in constant room: every event changes a few numbers, no text is kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from swarmx.neural.heads.text_marks import Marks

# Names come from clients, so how many of them one workflow may bring is bounded; the rest share the last place.
MOST_NAMES = 32
OTHERS = ""


@dataclass(slots=True, kw_only=True)
class Share:
    """One model's part of a workflow; `last` is the number of the workflow's call that was its last one, from 1."""

    arrived: int = 0
    output_tokens: float = 0.0
    last: int = 0


@dataclass(slots=True, kw_only=True)
class WorkflowSoFar:
    """One workflow on its way. Times are seconds on any one clock; they are only subtracted.

    `arrived`, `done` and `failed` count calls; a call in flight has arrived and is neither. `turns` counts changes of
    the role; `answers` those answers that somebody looked into: so many asked for a tool, `tool_run` of them in a row
    (negative: messages in a row), `repeats` for one that had been asked for before. `closings` counts prompts that end
    in words of farewell.
    """

    kind: str
    submitted_at_s: float
    arrived: int = 0
    done: int = 0
    failed: int = 0
    most_in_flight: int = 0
    prompt_tokens: float = 0.0
    output_tokens: float = 0.0
    first_prompt_tokens: float = 0.0
    last_prompt_tokens: float = 0.0
    prompt_growth: float = 0.0
    last_output_tokens: float = 0.0
    longest_output_tokens: float = 0.0
    first_at_s: float | None = None
    last_at_s: float | None = None
    gaps_s: float = 0.0
    last_gap_s: float = 0.0
    last_role: str = ""
    last_model: str = ""
    turns: int = 0
    roles: dict[str, int] = field(default_factory=dict)
    models: dict[str, Share] = field(default_factory=dict)
    answers: int = 0
    tool_calls: int = 0
    tool_run: int = 0
    last_tool: str | None = None
    repeats: int = 0
    tools: dict[str, int] = field(default_factory=dict)
    marks: Marks | None = None
    earlier_marks: Marks | None = None
    closings: int = 0

    @property
    def in_flight(self) -> int:
        """Calls that have arrived and not ended."""
        return self.arrived - self.done - self.failed

    def call_arrived(
        self, *, role: str, model: str, prompt_tokens: float, at_s: float, marks: Marks | None = None
    ) -> None:
        """A call wants a replica; `marks` are those of its prompt's end (`text_marks`)."""
        if self.first_at_s is None:
            self.first_at_s = at_s
            self.first_prompt_tokens = prompt_tokens
        elif self.last_at_s is not None and self.in_flight == 0:
            self.last_gap_s = max(0.0, at_s - self.last_at_s)
            self.gaps_s += self.last_gap_s
        self.arrived += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.prompt_growth = prompt_tokens - self.last_prompt_tokens if self.arrived > 1 else 0.0
        self.last_prompt_tokens = prompt_tokens
        self.prompt_tokens += prompt_tokens
        self.turns += self.arrived > 1 and role != self.last_role
        self.last_role, self.last_model = role, model
        self.last_at_s = at_s
        _count(self.roles, role)
        share = self._share(model)
        share.arrived += 1
        share.last = self.arrived
        self.marked(marks)

    def marked(self, marks: Marks | None) -> None:
        """What the end of the newest prompt says."""
        if marks is not None:
            self.earlier_marks, self.marks = self.marks, marks
            self.closings += marks[1] > 0.0

    def call_finished(self, *, model: str, output_tokens: float, at_s: float, tool: str | None = None) -> None:
        """A call has been answered; `tool` is what the answer asks to run ("" nothing, None unknown)."""
        self.done += 1
        self.last_output_tokens = output_tokens
        self.longest_output_tokens = max(self.longest_output_tokens, output_tokens)
        self.output_tokens += output_tokens
        self._share(model).output_tokens += output_tokens
        self.last_at_s = at_s
        self.answered(tool)

    def answered(self, tool: str | None) -> None:
        """What the last answer asks for."""
        if tool is None:
            return
        self.answers += 1
        if tool:
            self.repeats += tool in self.tools
            _count(self.tools, tool)
            self.tool_calls += 1
            self.tool_run = max(0, self.tool_run) + 1
        else:
            self.tool_run = min(0, self.tool_run) - 1
        self.last_tool = tool

    def call_failed(self, at_s: float) -> None:
        """A call has ended without an answer."""
        self.failed += 1
        self.last_at_s = at_s

    def call_retried(self) -> None:
        """The call whose failure was the last news is tried again after all."""
        self.failed = max(0, self.failed - 1)

    def _share(self, model: str) -> Share:
        if model not in self.models and len(self.models) >= MOST_NAMES:
            model = OTHERS
        return self.models.setdefault(model, Share())


def _count(counts: dict[str, int], name: str) -> None:
    if name not in counts and len(counts) >= MOST_NAMES:
        name = OTHERS
    counts[name] = counts.get(name, 0) + 1
