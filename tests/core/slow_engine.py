"""What the engine must do, written for reading: it looks at every running sequence and goes one iteration at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from swarmx.core.batching import Counters, Event, Request
from swarmx.core.engine import EngineProfile


class SlowPool:
    """Counts the holders of each block."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.private = 0
        self.holders: dict[int, int] = {}
        self.cached: list[int] = []  # the oldest first

    @property
    def used(self) -> int:
        return self.private + len(self.holders)

    @property
    def available(self) -> int:
        return self.capacity - self.used

    def hits(self, prefix: tuple[int, ...]) -> list[int]:
        found: list[int] = []
        for block in prefix:
            if block not in self.holders and block not in self.cached:
                break
            found.append(block)
        return found

    def share(self, block: int) -> None:
        if block in self.cached:
            self.cached.remove(block)
        self.holders[block] = self.holders.get(block, 0) + 1

    def take(self) -> None:
        self.private += 1
        self.evict()

    def evict(self) -> None:
        while self.cached and self.used + len(self.cached) > self.capacity:
            self.cached.pop(0)

    def release(self, shared: list[int], named: tuple[int, ...], private: int) -> None:
        self.private -= private
        for block in reversed(named):
            if block not in self.holders:
                if block in self.cached:
                    self.cached.remove(block)
                self.cached.append(block)
        for block in reversed(shared):
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                self.cached.append(block)


@dataclass(slots=True, eq=False)
class SlowSequence:
    request: Request
    number: int
    ready_s: float
    computed: int = 0
    produced: int = 0
    decoding: bool = False
    admitted: bool = False
    guard: int = 0
    private: int = 0
    shared: list[int] = field(default_factory=list)

    @property
    def target(self) -> int:
        return self.request.prompt_tokens + self.produced


@dataclass(slots=True)
class Step:
    end_s: float
    decodes: list[SlowSequence]
    chunks: list[SlowSequence]


class SlowEngine:
    """The same answers as `Engine`, at most one step at a time; "uniboost" and "priority" by sorting."""

    def __init__(
        self, profile: EngineProfile, *, block_tokens: int, order: str = "arrival", gamma_per_token: float = 2e-3
    ) -> None:
        self.profile, self.size, self.order, self.gamma = profile, block_tokens, order, gamma_per_token
        self.pool = SlowPool(profile.kv_capacity_tokens // block_tokens)
        self.serial = profile.max_batch == 1
        self.slots = max(1, min(profile.max_batch, profile.max_step_tokens))
        self.sequences: dict[str, SlowSequence] = {}
        self.running: list[SlowSequence] = []
        self.waiting: list[SlowSequence] = []
        self.step: Step | None = None
        self.boundary_s = self.now_s = -math.inf
        self.events: list[Event] = []
        self.arrivals = self.query_tokens = self.hit_tokens = self.preemptions = self.generated = 0

    def submit(self, request: Request, now_s: float) -> bool:
        assert request.request_id not in self.sequences
        if self.blocks(request.prompt_tokens + request.output_tokens - 1) > self.pool.capacity:
            return False
        self.progress(now_s)
        ready_s = now_s + (0.0 if self.serial else self.profile.call_base_s)
        sequence = SlowSequence(request, self.arrivals, ready_s)
        self.arrivals += 1
        self.sequences[request.request_id] = sequence
        self.waiting.append(sequence)
        return True

    def abort(self, request_id: str, now_s: float) -> bool:
        self.progress(now_s)
        sequence = self.sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return True
        self.running.remove(sequence)
        self.release(sequence)
        if self.step is not None:
            self.step.decodes = [s for s in self.step.decodes if s is not sequence]
            self.step.chunks = [s for s in self.step.chunks if s is not sequence]
        return True

    def advance(self, until_s: float) -> list[Event]:
        self.progress(until_s)
        events, self.events = self.events, []
        return events

    def start(self) -> None:
        """What asking about the next event does: the iteration that starts now is closed to newcomers."""
        if not self.events and self.step is None:
            start_s = self.next_start_s()
            if start_s is not None and start_s <= self.now_s:
                self.step = self.begin(start_s)

    def produced(self, request_id: str) -> int:
        return self.sequences[request_id].produced

    def clear_cache(self) -> None:
        self.pool.cached.clear()

    def counters(self) -> Counters:
        return Counters(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_usage=self.pool.used / self.pool.capacity if self.pool.capacity else 0.0,
            prefix_query_tokens=self.query_tokens,
            prefix_hit_tokens=self.hit_tokens,
            preemptions=self.preemptions,
            generated_tokens=self.generated,
        )

    def progress(self, until_s: float) -> None:
        self.now_s = max(self.now_s, until_s)
        while True:
            if self.step is None:
                start_s = self.next_start_s()
                if start_s is None or start_s >= until_s:
                    return
                self.step = self.begin(start_s)
            if self.step.end_s > until_s:
                return
            step, self.step = self.step, None
            self.boundary_s = step.end_s
            self.settle(step)

    def next_start_s(self) -> float | None:
        if self.running:
            return self.boundary_s
        return max(self.boundary_s, min(s.ready_s for s in self.waiting)) if self.waiting else None

    def begin(self, at_s: float) -> Step:
        profile = self.profile
        preempted = self.make_room(at_s)
        decodes = [s for s in self.running if s.decoding]
        chunks = [s for s in self.running if not s.decoding]
        budget = profile.max_step_tokens - len(decodes)
        tokens, ahead, extra_s = 0, 0.0, 0.0
        queue = sorted((s for s in self.waiting if s.ready_s <= at_s), key=self.key)
        for sequence in [*chunks, *queue]:
            if sequence in queue:
                if preempted or budget <= 0 or not self.admit(sequence, at_s):
                    break
                chunks.append(sequence)
            chunk = min(budget, sequence.target - sequence.computed)
            sequence.computed += chunk
            budget -= chunk
            tokens += chunk
            ahead += chunk * (2 * sequence.computed - chunk - 1) / 2.0
            self.publish(sequence)
        if self.serial and any(s in queue for s in chunks):
            extra_s = profile.call_base_s
        context = sum(s.target for s in decodes)
        took_s = extra_s + profile.step_s(len(decodes), context, tokens, ahead)
        return Step(at_s + took_s, decodes, chunks)

    def admit(self, sequence: SlowSequence, at_s: float) -> bool:
        request = sequence.request
        if len(self.running) >= self.slots:
            return False
        hits = self.pool.hits(request.prefix[: max(0, sequence.target - 1) // self.size])
        fresh = self.blocks(sequence.target) - len(hits)
        if fresh + sum(block in self.pool.cached for block in hits) > self.pool.available:
            return False
        for block in hits:
            self.pool.share(block)
        for _ in range(fresh):
            self.pool.take()
        sequence.shared, sequence.private, sequence.computed = hits, fresh, len(hits) * self.size
        sequence.guard = 256
        while self.order == "uniboost" and sequence.guard <= sequence.target:
            sequence.guard *= 2
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if not sequence.admitted:
            sequence.admitted = True
            self.query_tokens += request.prompt_tokens
            self.hit_tokens += sequence.computed
            self.events.append(Event(kind="admitted", request_id=request.request_id, at_s=at_s))
        return True

    def publish(self, sequence: SlowSequence) -> None:
        for block in sequence.request.prefix[len(sequence.shared) : sequence.computed // self.size]:
            if block in self.pool.holders or block in self.pool.cached:
                return
            self.pool.private -= 1
            sequence.private -= 1
            self.pool.share(block)
            sequence.shared.append(block)

    def make_room(self, at_s: float) -> bool:
        preempted = False
        while True:
            lacking = [
                s for s in self.running if s.decoding and self.blocks(s.computed + 1) > len(s.shared) + s.private
            ]
            if not lacking:
                return preempted
            if self.pool.available:
                self.pool.take()
                lacking[0].private += 1
                continue
            preempted = True
            running = [s for s in self.running if s.target >= s.guard] if self.order == "uniboost" else []
            victim = max(running or self.running, key=self.key)
            self.running.remove(victim)
            self.release(victim)
            victim.shared, victim.private, victim.computed, victim.decoding = [], 0, 0, False
            self.waiting.append(victim)
            self.preemptions += 1
            self.events.append(Event(kind="preempted", request_id=victim.request.request_id, at_s=at_s))

    def release(self, sequence: SlowSequence) -> None:
        named = sequence.request.prefix[len(sequence.shared) : sequence.computed // self.size]
        self.pool.release(sequence.shared, named, sequence.private)

    def settle(self, step: Step) -> None:
        for sequence in step.decodes:
            sequence.computed += 1
            sequence.produced += 1
        self.generated += len(step.decodes)
        for sequence in step.chunks:
            if sequence.computed == sequence.target:
                sequence.produced += 1
                sequence.decoding = True
                self.generated += 1
                if sequence.produced == 1:
                    self.events.append(
                        Event(kind="first_token", request_id=sequence.request.request_id, at_s=step.end_s)
                    )
        done = [s for s in self.running if s.produced == s.request.output_tokens]
        for sequence in sorted(done, key=lambda s: s.number):
            self.running.remove(sequence)
            del self.sequences[sequence.request.request_id]
            self.release(sequence)
            self.events.append(Event(kind="finished", request_id=sequence.request.request_id, at_s=step.end_s))

    def key(self, sequence: SlowSequence) -> tuple[float, int]:
        match self.order:
            case "priority":
                return sequence.request.priority, sequence.number
            case "uniboost":
                boost = math.log(1.0 / (1.0 - math.exp(-self.gamma * max(1, sequence.target)))) / self.gamma
                return sequence.ready_s - self.profile.step_s(1, 0.0) * boost, sequence.number
        return 0.0, sequence.number

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.size)
