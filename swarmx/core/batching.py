"""Iteration-level continuous batching as a pure state machine: requests and times in, events out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal

import msgspec

from swarmx.core.decode_batch import DecodeBatch
from swarmx.core.engine import EngineProfile
from swarmx.core.engine_order import GAMMA_PER_TOKEN, OrderName, order_of
from swarmx.core.iterations import Iterations
from swarmx.core.kv_blocks import BlockPool

BLOCK_TOKENS = 64


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an engine is asked. For a serial server `output_tokens` are its units of work, `prompt_tokens` is zero.

    `prefix[i]` names the first `i + 1` full blocks of the prompt followed by the answer (a chained hash: equal only
    where all before is equal). It may end anywhere: blocks without a name are not cached. A lower `priority` goes
    first, in an engine that orders by it.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    priority: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.output_tokens < 1:
            raise ValueError(
                f"request {self.request_id} has {self.prompt_tokens} prompt and {self.output_tokens} output tokens, "
                "expected at least 0 and 1"
            )
        if math.isnan(self.priority):
            raise ValueError(f"request {self.request_id} has the priority nan, expected a number")


EventKind = Literal["admitted", "preempted", "first_token", "finished"]


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Something that happened to a request inside the engine."""

    kind: EventKind
    request_id: str
    at_s: float


class Counters(msgspec.Struct, frozen=True, kw_only=True, gc=False):
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
    """A request inside the engine. While it decodes, its progress is that of the batch, and these stand still."""

    request: Request
    number: int  # by order of arrival
    ready_s: float
    computed: int = 0
    produced: int = 0
    shared: int = 0  # blocks of its prefix that it holds by name
    admissions: int = 0
    decoding: bool = False
    guard_tokens: int = 0

    @property
    def target(self) -> int:
        """Tokens that must be in the cache before the next one can be sampled."""
        return self.request.prompt_tokens + self.produced


class Engine:
    """A continuous-batching engine on an `EngineProfile`; all times are on the caller's clock and never go back.

    Each iteration decodes every running sequence, then spends what is left of `max_step_tokens` on prefills, first
    admitted, first served. A request that arrives in an iteration waits for its end; one that arrives at the very
    start joins it unless that start was already asked about (`next_event_s`). Prompts are admitted whole, in the
    given order, while a slot and blocks are free. When a decode finds no block, the last sequence in that order is
    preempted and computed again later. Blocks stay cached until their room is needed: those of a prompt from the
    iteration that computes them, those of an answer once its sequence gives them up. `call_base_s` is spent before a
    call enters the queue, beside the iterations, or inside the call's first step on a serial server (`max_batch` 1).

    Cost is per event, not per token nor per running sequence: decodes with an unchanged batch are summed in closed
    form. Only aborts and preemptions look at the whole batch.

    `gamma_per_token` (1 / tokens of service) is that of the order "uniboost"; engine_order.py has the orders. Raises
    ValueError when it is not above zero.
    """

    def __init__(
        self,
        profile: EngineProfile,
        *,
        block_tokens: int = BLOCK_TOKENS,
        order: OrderName = "arrival",
        gamma_per_token: float = GAMMA_PER_TOKEN,
    ) -> None:
        self.profile = profile
        self.block_tokens = block_tokens
        self._order = order_of(order, gamma_per_token=gamma_per_token, token_s=profile.step_s(1, 0.0))
        self._serial = profile.max_batch == 1
        self._max_running = max(1, min(profile.max_batch, profile.max_step_tokens))
        self._pool = BlockPool(profile.kv_capacity_tokens // block_tokens)
        self._sequences: dict[str, _Sequence] = {}
        self._coming: deque[_Sequence] = deque()  # not ready yet
        self._queue: list[tuple[float, int, _Sequence]] = []  # heap of (key, number, ready to be admitted)
        self._running: dict[int, _Sequence] = {}  # by number
        self._prefilling: list[_Sequence] = []  # of those running, in order of admission
        self._batch = DecodeBatch(block_tokens)  # the others
        self._reserved = 0  # blocks that decodes hold for the step in progress
        self._run: Iterations | None = None
        self._boundary_s = self._now_s = -math.inf
        self._events: list[Event] = []
        self._arrivals = 0
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
        ready_s = now_s if self._serial else now_s + self.profile.call_base_s
        sequence = _Sequence(request=request, number=self._arrivals, ready_s=ready_s)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._coming.append(sequence)
        return True

    def abort(self, request_id: str, now_s: float) -> bool:
        """Forget the request and free its blocks; false if it is not here (any more). The step in progress goes on."""
        self._progress(now_s)
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence.number in self._running:
            self._stop(sequence)
        elif sequence in self._coming:
            self._coming.remove(sequence)
        else:
            self._queue = [waiting for waiting in self._queue if waiting[2] is not sequence]
            heapify(self._queue)
        self._cut_short()  # there may be room now for another
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
        return self._run.end_s

    def produced(self, request_id: str) -> int:
        """Tokens that the request has as of the last `advance`. Raises KeyError when it is not in the engine."""
        sequence = self._sequences[request_id]
        return self._served(sequence) - sequence.request.prompt_tokens

    @property
    def hit_tokens(self) -> int:
        """Prompt tokens that were found in the cache; it only ever grows."""
        return self._hit_tokens

    def clear_cache(self) -> None:
        """Forget cached blocks that nobody holds."""
        self._pool.clear()

    def counters(self) -> Counters:
        return Counters(
            running=len(self._running),
            waiting=len(self._coming) + len(self._queue),
            kv_usage=self._pool.used / self._pool.capacity if self._pool.capacity else 0.0,
            prefix_query_tokens=self._query_tokens,
            prefix_hit_tokens=self._hit_tokens,
            preemptions=self._preemptions,
            generated_tokens=self._generated,
        )

    def _progress(self, until_s: float) -> None:
        if until_s > self._now_s:
            self._now_s = until_s
        while True:
            if self._run is None:
                start_s = self._next_start_s()
                if start_s is None or start_s >= until_s:
                    return
                self._run = self._begin(start_s)
            run = self._run
            done = run.ended_by(until_s)
            if done > run.done:
                self._decode(run, done)
            if done < run.steps:
                return
            self._boundary_s = run.end_s
            self._run = None
            self._settle(self._boundary_s)

    def _next_start_s(self) -> float | None:
        if self._running or self._queue:
            return self._boundary_s
        return max(self._boundary_s, self._coming[0].ready_s) if self._coming else None

    def _begin(self, at_s: float) -> Iterations:
        """Form the batch of the iteration that starts at `at_s`, and find how long it stays the same."""
        profile, batch = self.profile, self._batch
        while self._coming and self._coming[0].ready_s <= at_s:
            self._enqueue(self._coming.popleft())
        preempted = self._make_room(at_s)
        decodes, context = batch.size, batch.context
        budget = profile.max_step_tokens - decodes
        tokens, ahead, extra_s, i = 0, 0.0, 0.0, 0
        begun, prefilling = len(self._prefilling), self._prefilling
        while i < len(prefilling) or (self._queue and not preempted and budget > 0 and self._admit(at_s)):
            sequence = prefilling[i]
            chunk = self._prefill(sequence, budget)
            budget -= chunk
            tokens += chunk
            # a chunk of n tokens that ends at token e stands behind e - n, ..., e - 1 tokens
            ahead += chunk * (2 * sequence.computed - chunk - 1) / 2.0
            if self._serial and i >= begun and sequence.admissions == 1:
                extra_s += profile.call_base_s
            i += 1
        if prefilling:
            return Iterations(at_s, extra_s + profile.step_s(decodes, context, tokens, ahead))
        run = Iterations(at_s, profile.step_s(decodes, context), profile.decode_ctx_token_s * decodes)
        if not preempted:  # else the next iteration admits again
            run.plan(self._jump(run))
        return run

    def _admit(self, at_s: float) -> bool:
        """Let the first of the queue run, if there is a slot and room for all that it must compute."""
        if len(self._running) >= self._max_running:
            return False
        sequence = self._queue[0][2]
        request, target = sequence.request, sequence.target
        most = min(len(request.prefix), max(0, target - 1) // self.block_tokens)  # the last token is always computed
        hits = self._pool.hold(request.prefix, most, self._blocks(target))
        if hits is None:
            return False
        heappop(self._queue)
        sequence.shared, sequence.computed = hits, hits * self.block_tokens
        sequence.guard_tokens = self._order.guard_tokens(target)
        sequence.admissions += 1
        self._running[sequence.number] = sequence
        self._prefilling.append(sequence)
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
        full = min(len(prefix), sequence.computed // self.block_tokens)
        if full > sequence.shared and self._pool.publish(prefix, sequence.shared, full):
            sequence.shared = full
        return chunk

    def _make_room(self, at_s: float) -> bool:
        """Give each decoding sequence the block for its next token; whether someone was preempted for that."""
        need, preempted = self._batch.next_growth, False
        while need > self._pool.available:
            preempted = True
            self._pool.clear()  # the others have taken every idle block by now
            self._preempt(self._victim(), at_s)
            need = self._batch.next_growth
        if need:
            self._pool.take(need)
        self._reserved = need
        return preempted

    def _victim(self) -> _Sequence:
        """The last in the order of those running, guarded ones only if all are."""
        running = self._running.values()
        candidates = [s for s in running if self._served(s) >= s.guard_tokens]
        return max(candidates or running, key=lambda s: (self._key(s), s.number))

    def _preempt(self, sequence: _Sequence, at_s: float) -> None:
        self._stop(sequence)
        self._enqueue(sequence)
        self._preemptions += 1
        self._events.append(Event(kind="preempted", request_id=sequence.request.request_id, at_s=at_s))

    def _stop(self, sequence: _Sequence) -> None:
        """Take a sequence out of those running; what it has computed stays cached as far as it is named."""
        del self._running[sequence.number]
        if sequence.decoding:
            sequence.produced = self._served(sequence) - sequence.request.prompt_tokens
            sequence.decoding = False
            self._batch.leave(sequence.number)
            computed = sequence.target - 1
            held = self._blocks(computed)
            if self._reserved and computed % self.block_tokens == 0:
                self._reserved -= 1
                held += 1
        else:
            self._prefilling.remove(sequence)
            computed, held = sequence.computed, self._blocks(sequence.target)
        prefix = sequence.request.prefix
        self._pool.release(
            prefix, sequence.shared, min(len(prefix), computed // self.block_tokens), held - sequence.shared
        )

    def _enqueue(self, sequence: _Sequence) -> None:
        heappush(self._queue, (self._key(sequence), sequence.number, sequence))

    def _key(self, sequence: _Sequence) -> float:
        return self._order.key(
            priority=sequence.request.priority, ready_s=sequence.ready_s, served_tokens=self._served(sequence)
        )

    def _served(self, sequence: _Sequence) -> int:
        """Tokens of its prompt and of what it has produced."""
        return self._batch.context_of(sequence.number) if sequence.decoding else sequence.target

    def _jump(self, run: Iterations) -> int:
        """The number of iterations until someone finishes, blocks run out, or a call becomes ready to be admitted."""
        steps = self._batch.steps_left
        spare = self._pool.available + self._reserved
        if self._batch.size * (steps // self.block_tokens + 1) > spare:  # at most one block for each begun round
            steps = self._bisect(steps, lambda k: self._batch.growth(k) <= spare)
        if self._coming and len(self._running) < self._max_running:
            ready_s = self._coming[0].ready_s
            steps = min(steps, 1 + self._bisect(steps, lambda k: run.at_s(k) < ready_s, least=0))
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

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _cut_short(self) -> None:
        """End the run with its step in progress: the batch is about to change."""
        if self._run is not None:
            self._run.plan(self._run.done + 1)

    def _decode(self, run: Iterations, done: int) -> None:
        """Credit the decode steps up to the `done`-th."""
        steps, run.done = done - run.done, done
        batch = self._batch
        if steps > 1:
            self._pool.take(batch.growth(steps) - self._reserved)
        batch.advance(steps)
        self._reserved = batch.next_growth if done < run.steps else 0
        if self._reserved:
            self._pool.take(self._reserved)
        self._generated += steps * batch.size

    def _settle(self, at_s: float) -> None:
        """What the end of a run brings: first tokens of finished prefills, and finished requests."""
        if self._prefilling:
            self._prefilling = [s for s in self._prefilling if not self._begin_decoding(s, at_s)]
        while (number := self._batch.done()) is not None:
            sequence = self._running[number]
            self._stop(sequence)
            del self._sequences[sequence.request.request_id]
            self._events.append(Event(kind="finished", request_id=sequence.request.request_id, at_s=at_s))

    def _begin_decoding(self, sequence: _Sequence, at_s: float) -> bool:
        """Sample the first token behind a finished prefill; false if the prefill goes on."""
        request, context = sequence.request, sequence.target + 1
        if sequence.computed + 1 < context:
            return False
        sequence.produced += 1
        sequence.decoding = True
        self._generated += 1
        self._batch.join(sequence.number, context, request.output_tokens - sequence.produced)
        if sequence.produced == 1:
            self._events.append(Event(kind="first_token", request_id=request.request_id, at_s=at_s))
        return True
