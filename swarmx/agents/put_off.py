"""What a decision leaves to be done: its record, its timers and the books, none of which its call has to wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from swarmx.core.actions import StartTimer
from swarmx.core.ports import Output

TIMER = "put_off"


class PutOff:
    """Steps that are done in the order in which they were put off; what they give is kept until it is taken.

    Whatever happens next does them first, and where nothing does, a timer `most_s` later. 0: nothing is put off beyond
    the end of the message that is being handled.
    """

    def __init__(self, most_s: float = 0.0) -> None:
        self._most_s = most_s
        self._is_timed = False
        self._steps: list[tuple[Callable[..., Sequence[Output]], tuple[Any, ...]]] = []
        self._given: list[Output] = []

    def __bool__(self) -> bool:
        """Whether there is anything to do, or to take."""
        return bool(self._steps or self._given)

    def add(self, step: Callable[..., Sequence[Output]], *arguments: Any) -> None:
        """Do this later."""
        self._steps.append((step, arguments))

    def do(self) -> None:
        """Do all that was put off. A step that raises is not done again."""
        while self._steps:
            step, arguments = self._steps.pop(0)
            self._given += step(*arguments)

    def done(self) -> list[Output]:
        """Do all that was put off; what it has given since this was asked last."""
        self.do()
        given, self._given = self._given, []
        return given

    def handled(self, now_s: float) -> Sequence[Output]:
        """A message has been handled: what is left is done, or will be."""
        if not self._most_s:
            return self.done()
        if self._is_timed:
            return ()
        self._is_timed = True
        return (StartTimer(key=TIMER, at_s=now_s + self._most_s),)

    def timer_fired(self) -> None:
        """The next time, another one is needed."""
        self._is_timed = False
