"""Iteration-level continuous batching as a pure state machine: requests and times in, events out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from swarmx.core.engine import EngineProfile
from swarmx.core.kv_blocks import BlockPool

BLOCK_TOKENS = 64


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is asked. `prefix[i]` names the first `i + 1` full blocks of the prompt (a chained hash).

    For a serial server `output_tokens` counts its units of work and `prompt_tokens` is zero.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.output_tokens < 1:
            raise ValueError(
                f"request {self.request_id} has {self.prompt_tokens} prompt and {self.output_tokens} output tokens, "
                "expected at least 0 and 1"
            )


EventKind = Literal["admitted", "preempted", "first_token", "finished"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a request inside the engine."""

    kind: EventKind
    request_id: str
    at_s: float


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine tells about itself; the last four only ever grow."""

    running: int
    waiting: int
    kv_usage: float
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    generated_tokens: int


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    """A request inside the engine. It holds `len(shared) + private` blocks; `computed` tokens of them are filled."""

    request: Request
    ready_s: float
    computed: int = 0
    produced: int = 0
    decoding: bool = False
    admissions: int = 0
    private: int = 0
    shared: list[int] = field(default_factory=list)

    @property
    def target(self) -> int:
        """Tokens that must be in the cache before the next one can be sampled."""
        return self.request.prompt_tokens + self.produced

    @property
    def held(self) -> int:
        return len(self.shared) + self.private


@dataclass(slots=True, kw_only=True)
class _Run:
    """Iterations with the same batch: `steps` pure decodes, or one step of `mixed_s` that also prefills `chunks`."""

    start_s: float
    decodes: list[_Sequence]
    decode_seqs: int
    context: int
    chunks: list[tuple[_Sequence, int]]
    mixed_s: float | None
    steps: int = 1
    done: int = 0


class Engine:
    """A continuous-batching engine on an `EngineProfile`; all times are on the caller's clock and never go back.

    Each iteration decodes every running sequence, then spends what is left of `max_step_tokens` on prefills, first
    come, first served. A request that arrives in an iteration waits for its end; one that arrives at the very start
    joins it unless that start was already asked about (`next_event_s`). Prompts are admitted whole while a slot and
    blocks are free. When a decode finds no block, the sequence admitted last is preempted and computed again later.
    Prompt blocks stay cached until their room is needed; answers are not cached. `call_base_s` is spent before a call
    enters the queue, beside the iterations, or inside the call's first step on a serial server (`max_batch` 1).

    Cost is per event, not per token: decodes with an unchanged batch are summed in closed form.
    """

    def __init__(self, profile: EngineProfile, *, block_tokens: int = BLOCK_TOKENS) -> None:
        self.profile = profile
        self.block_tokens = block_tokens
        self._serial = profile.max_batch == 1
        self._max_running = max(1, min(profile.max_batch, profile.max_step_tokens))
        self._pool = BlockPool(profile.kv_capacity_tokens // block_tokens)
        self._sequences: dict[str, _Sequence] = {}
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._run: _Run | None = None
        self._boundary_s = self._now_s = -math.inf
        self._events: list[Event] = []
        self._query_tokens = self._hit_tokens = self._preemptions = self._generated = 0

    def submit(self, request: Request, now_s: float) -> bool:
        """Queue the request; false if it could not be held even alone.

        Raises ValueError when the engine already has a request of that id.
        """
        if request.request_id in self._sequences:
            raise ValueError(f"request {request.request_id} is already in the engine: give each request its own id")
        if self._blocks(request.prompt_tokens + request.output_tokens - 1) > self._pool.capacity:
            return False
        self._progress(now_s)
        self._cut_short()
        ahead_s = 0.0 if self._serial else self.profile.call_base_s
        sequence = _Sequence(request=request, ready_s=now_s + ahead_s)
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)
        return True

    def abort(self, request_id: str, now_s: float) -> bool:
        """Forget the request and free its blocks; false if it is not here (any more). The step in progress goes on."""
        self._progress(now_s)
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        self._pool.release(sequence.shared, sequence.private)
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return True
        self._running.remove(sequence)
        if self._run is not None:
            self._run.decodes = [s for s in self._run.decodes if s is not sequence]
            self._run.chunks = [(s, n) for s, n in self._run.chunks if s is not sequence]
        self._cut_short()
        return True

    def advance(self, until_s: float) -> list[Event]:
        """Run all iterations that end by `until_s`; the events since the last call, in order of time."""
        self._progress(until_s)
        events, self._events = self._events, []
        return events

    def next_event_s(self) -> float | None:
        """When `advance` next has something to do, if nothing is submitted or aborted before; None while empty."""
        if self._events:
            return self._events[0].at_s
        if self._run is None:
            start_s = self._next_start_s()
            if start_s is None or start_s > self._now_s:
                return start_s
            self._run = self._begin(start_s)
        return self._end_s(self._run, self._run.steps)

    def produced(self, request_id: str) -> int:
        """Tokens that the request has as of the last `advance`. Raises KeyError when it is not in the engine."""
        return self._sequences[request_id].produced

    def clear_cache(self) -> None:
        """Forget cached prompts that nobody holds."""
        self._pool.clear()

    def counters(self) -> Counters:
        return Counters(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_usage=self._pool.used / self._pool.capacity if self._pool.capacity else 0.0,
            prefix_query_tokens=self._query_tokens,
            prefix_hit_tokens=self._hit_tokens,
            preemptions=self._preemptions,
            generated_tokens=self._generated,
        )

    def _progress(self, until_s: float) -> None:
        self._now_s = max(self._now_s, until_s)
        while True:
            if self._run is None:
                start_s = self._next_start_s()
                if start_s is None or start_s >= until_s:
                    return
                self._run = self._begin(start_s)
            run = self._run
            self._decode(run, self._steps_by(run, until_s))
            if run.done < run.steps:
                return
            self._boundary_s = self._end_s(run, run.steps)
            self._run = None
            self._settle(run, self._boundary_s)

    def _next_start_s(self) -> float | None:
        if self._running:
            return self._boundary_s
        return max(self._boundary_s, self._waiting[0].ready_s) if self._waiting else None

    def _begin(self, at_s: float) -> _Run:
        """Form the batch of the iteration that starts at `at_s`, and find how long it stays the same."""
        preempted = self._preemptions
        self._make_room(at_s)
        decodes = [s for s in self._running if s.decoding]
        context = sum(s.target for s in decodes)
        budget = self.profile.max_step_tokens - len(decodes)
        chunks: list[tuple[_Sequence, int]] = []
        extra_s = 0.0
        for sequence in self._running:
            if not sequence.decoding:
                chunks.append((sequence, self._prefill(sequence, budget)))
                budget -= chunks[-1][1]
        while self._waiting and budget > 0 and self._preemptions == preempted and self._admit(self._waiting[0], at_s):
            sequence = self._waiting.popleft()
            if self._serial and sequence.admissions == 1:
                extra_s += self.profile.call_base_s
            chunks.append((sequence, self._prefill(sequence, budget)))
            budget -= chunks[-1][1]
        run = _Run(
            start_s=at_s, decodes=decodes, decode_seqs=len(decodes), context=context, chunks=chunks, mixed_s=None
        )
        if chunks:
            # a chunk of n tokens that ends at token e stands behind e - n, ..., e - 1 tokens
            ahead = sum(n * (2 * s.computed - n - 1) / 2.0 for s, n in chunks)
            prefill = sum(n for _, n in chunks)
            run.mixed_s = extra_s + self.profile.step_s(len(decodes), context, prefill, ahead)
        else:
            run.steps = self._jump(run)
        return run

    def _admit(self, sequence: _Sequence, at_s: float) -> bool:
        request, size = sequence.request, self.block_tokens
        if len(self._running) >= self._max_running or sequence.ready_s > at_s:
            return False
        full = min(len(request.prefix), max(0, request.prompt_tokens - 1) // size)  # the last token is always computed
        hits = request.prefix[: self._pool.cached(request.prefix[:full])]
        fresh = self._blocks(sequence.target) - len(hits)
        if not self._pool.fits(hits, fresh):
            return False
        self._pool.share(hits)
        self._pool.take(fresh)
        sequence.shared, sequence.private = list(hits), fresh
        sequence.computed = len(hits) * size
        sequence.admissions += 1
        self._running.append(sequence)
        if sequence.admissions == 1:
            self._query_tokens += request.prompt_tokens
            self._hit_tokens += sequence.computed
            self._events.append(Event(kind="admitted", request_id=request.request_id, at_s=at_s))
        return True

    def _prefill(self, sequence: _Sequence, budget: int) -> int:
        """Compute the next chunk; its full blocks can be shared at once, by requests of the same iteration too."""
        chunk = min(budget, sequence.target - sequence.computed)
        sequence.computed += chunk
        prefix = sequence.request.prefix
        full = min(len(prefix), min(sequence.computed, sequence.request.prompt_tokens) // self.block_tokens)
        while len(sequence.shared) < full and self._pool.publish(prefix[len(sequence.shared)]):
            sequence.shared.append(prefix[len(sequence.shared)])
            sequence.private -= 1
        return chunk

    def _make_room(self, at_s: float) -> None:
        """Give each decoding sequence the block for its next token, oldest first, at the expense of the youngest."""
        i = 0
        while i < len(self._running):
            sequence = self._running[i]
            fresh = max(0, self._blocks(sequence.computed + 1) - sequence.held) if sequence.decoding else 0
            while fresh > self._pool.available:
                victim = self._running.pop()
                self._preempt(victim, at_s)
                if victim is sequence:
                    return
            self._pool.take(fresh)
            sequence.private += fresh
            i += 1

    def _preempt(self, sequence: _Sequence, at_s: float) -> None:
        self._pool.release(sequence.shared, sequence.private)
        sequence.shared, sequence.private, sequence.computed, sequence.decoding = [], 0, 0, False
        self._waiting.appendleft(sequence)
        self._preemptions += 1
        self._events.append(Event(kind="preempted", request_id=sequence.request.request_id, at_s=at_s))

    def _jump(self, run: _Run) -> int:
        """The number of iterations until someone finishes, blocks run out, or a call becomes ready to be admitted."""
        steps = min(s.request.output_tokens - s.produced for s in run.decodes)
        steps = self._bisect(steps, lambda k: self._growth(run, k) <= self._pool.available)
        if self._waiting and self._waiting[0].ready_s > run.start_s and len(self._running) < self._max_running:
            ready_s = self._waiting[0].ready_s
            steps = min(steps, 1 + self._bisect(steps, lambda k: self._end_s(run, k) < ready_s, least=0))
        return steps

    @staticmethod
    def _bisect(most: int, holds: Callable[[int], bool], *, least: int = 1) -> int:
        """The largest number in [least, most] for which `holds`, which is true at `least` and then never again."""
        if holds(most):
            return most
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if holds(middle) else (least, middle)
        return least

    def _growth(self, run: _Run, steps: int) -> int:
        return sum(max(0, self._blocks(s.computed + steps) - s.held) for s in run.decodes)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _end_s(self, run: _Run, steps: int) -> float:
        if run.mixed_s is not None:
            return run.start_s + run.mixed_s * steps
        return run.start_s + self.profile.steps_s(steps, run.decode_seqs, run.context)

    def _steps_by(self, run: _Run, until_s: float) -> int:
        """How many steps of the run have ended at `until_s`: the root of the arithmetic progression, then exact."""
        if self._end_s(run, run.steps) <= until_s:
            return run.steps
        if run.mixed_s is not None:
            return 0
        growth = self.profile.decode_ctx_token_s * run.decode_seqs / 2.0
        first = self.profile.step_s(run.decode_seqs, run.context) - growth
        left_s = max(0.0, until_s - run.start_s)
        root = (math.sqrt(first * first + 4.0 * growth * left_s) - first) / (2.0 * growth) if growth else left_s / first
        steps = max(run.done, min(run.steps, int(root)))
        while steps < run.steps and self._end_s(run, steps + 1) <= until_s:
            steps += 1
        while steps > run.done and self._end_s(run, steps) > until_s:
            steps -= 1
        return steps

    def _cut_short(self) -> None:
        """End the run with its step in progress: the batch is about to change."""
        if self._run is not None:
            self._run.steps = self._run.done + 1

    def _decode(self, run: _Run, done: int) -> None:
        """Credit the decode steps up to the `done`-th."""
        steps, run.done = done - run.done, done
        if steps == 0:
            return
        for sequence in run.decodes:
            sequence.computed += steps
            sequence.produced += steps
            fresh = max(0, self._blocks(sequence.computed) - sequence.held)
            self._pool.take(fresh)
            sequence.private += fresh
        self._generated += steps * len(run.decodes)

    def _settle(self, run: _Run, at_s: float) -> None:
        """What the end of a run brings: first tokens of finished prefills, and finished requests."""
        for sequence, _ in run.chunks:
            if sequence.computed == sequence.target:
                sequence.produced += 1
                sequence.decoding = True
                self._generated += 1
                if sequence.produced == 1:
                    self._events.append(Event(kind="first_token", request_id=sequence.request.request_id, at_s=at_s))
        for sequence in [s for s in self._running if s.produced == s.request.output_tokens]:
            self._running.remove(sequence)
            del self._sequences[sequence.request.request_id]
            self._pool.release(sequence.shared, sequence.private)
            self._events.append(Event(kind="finished", request_id=sequence.request.request_id, at_s=at_s))
