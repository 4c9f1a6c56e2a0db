"""Learns how long tools take: the seconds from an answer that asks for them to the call that brings their results."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swarmx.core.forecast import LEVELS, Forecast

MOST_TOOLS = 256  # that are told apart; the one that was heard of least recently makes room
MOST_GAPS = 64  # of one tool: the newest count
MOST_OF_ALL = 512
MOST_PAUSED = 10_000  # workflows that wait for tools
MOST_CONVERSATIONS = 16  # of one workflow

_COMMON_WEIGHT = 2.0  # of what is known of all tools, in gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The results of `tools` came `gap_s` after they were asked for, all of them together."""

    tools: tuple[str, ...]
    gap_s: float


class ToolGaps:
    """Empirical quantiles of the newest gaps of each tool, blended with those of all tools while it has few.

    A gap belongs to a conversation of a workflow, so that parallel ones are not mixed up. The gap of an answer that
    asks for several tools is that of the slowest, which nobody can name: it teaches what tools take in general. Names
    of tools are shared by all who use them.
    """

    def __init__(self) -> None:
        self._gaps: OrderedDict[str, deque[float]] = OrderedDict()
        self._all: deque[float] = deque(maxlen=MOST_OF_ALL)
        self._paused: OrderedDict[str, OrderedDict[str, tuple[tuple[str, ...], float]]] = OrderedDict()

    def __len__(self) -> int:
        """How many tools are known."""
        return len(self._gaps)

    def asked(self, workflow_id: str, conversation: str, tools: Sequence[str], now_s: float) -> None:
        """The conversation's newest answer has gone out and asks for these tools, or for none."""
        if not tools:
            self._take(workflow_id, conversation)
            return
        paused = self._paused.setdefault(workflow_id, OrderedDict())
        paused[conversation] = (tuple(tools), now_s)
        paused.move_to_end(conversation)
        if len(paused) > MOST_CONVERSATIONS:
            paused.popitem(last=False)
        self._paused.move_to_end(workflow_id)
        if len(self._paused) > MOST_PAUSED:
            self._paused.popitem(last=False)

    def called(self, workflow_id: str, conversation: str, *, returns_tools: bool, now_s: float) -> Gap | None:
        """The conversation's next call has come; returns and learns the gap if it brings what was asked for."""
        found = self._take(workflow_id, conversation)
        if found is None or not returns_tools:
            return None  # the client went on without the results, or their answer was never seen
        tools, asked_at_s = found
        gap = Gap(tools=tools, gap_s=max(0.0, now_s - asked_at_s))
        self._all.append(gap.gap_s)
        if len(set(tools)) == 1:
            self._gaps.setdefault(tools[0], deque(maxlen=MOST_GAPS)).append(gap.gap_s)
            self._gaps.move_to_end(tools[0])
            if len(self._gaps) > MOST_TOOLS:
                self._gaps.popitem(last=False)
        return gap

    def ended(self, workflow_id: str) -> None:
        """The workflow waits for nothing any more."""
        self._paused.pop(workflow_id, None)

    def expected(self, tools: Iterable[str]) -> Forecast | None:
        """Seconds until the results of all these tools are there; None before any gap was seen.

        Several tools are taken to be slow together: level by level the slowest counts.
        """
        if not self._all:
            return None
        common = _quantiles(np.array(self._all), np.ones(len(self._all)))
        quantiles = np.max([self._quantiles(tool, common) for tool in tools] or [common], axis=0)
        return Forecast(levels=LEVELS, quantiles=tuple(quantiles.tolist()), unit="s", source="empirical")

    def pause(self, workflow_id: str, now_s: float) -> tuple[Forecast, float] | None:
        """What the workflow's newest wait takes in all, and the seconds of it that have gone by; None without one."""
        paused = self._paused.get(workflow_id)
        if not paused:
            return None
        tools, asked_at_s = next(reversed(paused.values()))
        expected = self.expected(tools)
        return None if expected is None else (expected, max(0.0, now_s - asked_at_s))

    def _take(self, workflow_id: str, conversation: str) -> tuple[tuple[str, ...], float] | None:
        paused = self._paused.get(workflow_id)
        if paused is None:
            return None
        found = paused.pop(conversation, None)
        if not paused:
            del self._paused[workflow_id]
        return found

    def _quantiles(self, tool: str, common: NDArray[np.float64]) -> NDArray[np.float64]:
        """[LEVELS]: of the tool's own gaps, and the common ones with the weight of a few."""
        own = self._gaps.get(tool)
        if not own:
            return common
        values = np.concatenate([np.array(own), common])
        weights = np.concatenate([np.ones(len(own)), np.full(len(LEVELS), _COMMON_WEIGHT / len(LEVELS))])
        return _quantiles(values, weights)


def _quantiles(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[LEVELS]: of the weighted values, linear between the middles of their shares."""
    order = np.argsort(values, kind="stable")
    values, weights = values[order], weights[order]
    at = (np.cumsum(weights) - weights / 2.0) / weights.sum()
    return np.asarray(np.interp(LEVELS, at, values))
