"""Every store against dicts that do the same: fences hold, keys and inputs count once, ends are final, crash or not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from swarmx.core.errors import KeyReused, NotFound, StoreError
from swarmx.core.ports import WorkflowStore
from swarmx.core.records import TERMINAL, Forgotten, Idempotency, WorkflowRecord
from tests.contract.places import Place
from tests.contract.test_ownership import change
from tests.contract.test_store import call_record, workflow

T = TypeVar("T")
LEASE_S = 1000.0  # the clock of a database goes on by itself while the test runs

_ids = st.sampled_from(["w0", "w1", "w2"])
_bodies = st.lists(st.binary(max_size=2), max_size=2)
_states = st.sampled_from([None, None, "cancelling", "finished", "failed", "cancelled", "running"])


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, place: Place, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.place = place
        self.loop = loop
        self.do(place.emptied())
        self.store: WorkflowStore = self.do(place.opened())
        self.records: dict[str, WorkflowRecord] = {}
        self.events: dict[str, list[bytes]] = {}
        self.inbox: dict[str, dict[str, bytes]] = {}
        self.taken: dict[str, set[str]] = {}
        self.keys: dict[str, tuple[str, str]] = {}
        self.calls: set[str] = set()
        self.owners: dict[int, float] = {}
        self.epochs: list[int] = [0]
        self.time_s = 0.0

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.do(self.store.close())

    def open_ids(self) -> set[str]:
        return {id for id, record in self.records.items() if record.state not in TERMINAL}

    def changed(self, id: str, events: list[bytes], state: Any, **more: Any) -> None:
        """What a write that was stored leaves."""
        record = self.records[id]
        ends = {"ended_at_s": 5.0, "outcome": b"o"} if state in TERMINAL else {}
        now = {"seq": record.seq + len(events), "state": state or record.state, **ends, **more}
        self.records[id] = msgspec.structs.replace(record, **now)
        self.events[id] += events

    @rule(
        id=_ids,
        tenant=st.sampled_from(["a", "b"]),
        events=_bodies,
        key=st.none() | st.sampled_from(["k0", "k1"]),
        print_=st.sampled_from(["f", "g"]),
    )
    def accept(self, id: str, tenant: str, events: list[bytes], key: str | None, print_: str) -> None:
        record = workflow(id, tenant=tenant, owner=self.epochs[-1])
        idempotency = None if key is None else Idempotency(key=key, fingerprint=print_, expires_at_s=1e12)
        accepting = self.store.accept(record, events, idempotency=idempotency)
        name = f"{tenant} {key}"
        known = None if key is None else self.keys.get(name)
        if known is not None and known[1] != print_:
            with pytest.raises(KeyReused):
                self.do(accepting)
        elif known is not None:
            accepted = self.do(accepting)
            assert (accepted.workflow_id, accepted.replayed) == (known[0], True)
        elif id in self.records:
            with pytest.raises(StoreError, match="already exists"):
                self.do(accepting)
        else:
            accepted = self.do(accepting)
            assert (accepted.workflow_id, accepted.replayed) == (id, False)
            self.records[id] = msgspec.structs.replace(record, seq=len(events))
            self.events[id], self.inbox[id], self.taken[id] = list(events), {}, set()
            if key is not None:
                self.keys[name] = (id, print_)

    @precondition(lambda self: self.records)
    @rule(
        data=st.data(),
        events=_bodies,
        behind=st.sampled_from([0, 0, 0, 1]),
        state=_states,
        call=st.none() | st.sampled_from(["c0", "c1"]),
        take=st.booleans(),
    )
    def commit(self, data: Any, events: list[bytes], behind: int, state: Any, call: str | None, take: bool) -> None:
        id = data.draw(st.sampled_from(sorted(self.records)))
        epoch = data.draw(st.sampled_from(self.epochs[-3:]))
        record = self.records[id]
        waiting = self.do(self.store.inputs(id))[:1] if take else []
        more = {"taken": tuple(item.number for item in waiting)}
        calls = () if call is None else (call_record(call, workflow_id=id),)
        done = self.do(
            self.store.commit(
                change(
                    epoch, record.seq + behind, *events, workflow_id=id, state=state, outcome=b"o", calls=calls, **more
                )
            )
        )
        back = record.state == "cancelling" and state == "running"
        ours = record.owner == epoch and not behind and not back
        assert done == ("ended" if record.state in TERMINAL else "stored" if ours else "lost")
        if done == "stored":
            self.changed(id, events, state)
            self.calls |= {call} if call else set()
            for item in waiting:
                self.taken[id] |= {name for name, body in self.inbox[id].items() if body == item.body}

    @precondition(lambda self: self.records)
    @rule(data=st.data(), count=st.integers(2, 6), state=_states)
    def commit_at_once(self, data: Any, count: int, state: Any) -> None:
        """Of several writers with the same place one wins, and what else is in their batch is not disturbed."""
        id = data.draw(st.sampled_from(sorted(self.records)))
        record = self.records[id]
        bodies = [str(i).encode() for i in range(count)]
        changes = [change(record.owner, record.seq, body, workflow_id=id, state=state, outcome=b"o") for body in bodies]

        async def at_once() -> list[Any]:
            others = [self.store.accept(workflow(next(iter(self.records))), []), self.store.take("nix", 1)]
            writes = [self.store.commit(each) for each in changes]
            return await asyncio.gather(*others, *writes, return_exceptions=True)

        exists, nothing, *done = self.do(at_once())
        assert isinstance(exists, StoreError)
        assert nothing is None
        may = id in self.open_ids() and not (record.state == "cancelling" and state == "running")
        assert done.count("stored") == may
        if may:
            self.changed(id, [bodies[done.index("stored")]], state)

    @rule(id=_ids, events=_bodies, behind=st.sampled_from([0, 0, 1]), state=_states)
    def append(self, id: str, events: list[bytes], behind: int, state: Any) -> None:
        record = self.records.get(id)
        seq = behind if record is None else record.seq + behind
        appending = self.store.append(id, events, expected_seq=seq, at_s=5.0, state=state, outcome=b"o")
        if record is None:
            with pytest.raises(NotFound):
                self.do(appending)
            return
        back = record.state == "cancelling" and state == "running"
        may = record.state not in TERMINAL and not behind and not back and record.owner not in self.owners
        assert self.do(appending) == may
        if may:
            self.changed(id, events, state)

    @rule(id=_ids, name=st.sampled_from(["d0", "d1"]))
    def post(self, id: str, name: str) -> None:
        posting = self.store.post(id, name.encode(), dedup=name, tenant=None)
        if id not in self.records:
            with pytest.raises(NotFound):
                self.do(posting)
            return
        new = self.do(posting)
        assert new == (id in self.open_ids() and name not in self.inbox[id])
        if new:
            self.inbox[id][name] = name.encode()

    @rule(exclusive=st.booleans())
    def enlist(self, exclusive: bool) -> None:
        epoch = self.do(self.store.enlist("p", ttl_s=LEASE_S, exclusive=exclusive))
        assert epoch > self.epochs[-1], "also after owners were deleted and the store was opened again"
        self.owners = {} if exclusive else self.owners
        self.owners[epoch] = self.time_s + LEASE_S
        self.epochs.append(epoch)

    @rule(data=st.data())
    def heartbeat(self, data: Any) -> None:
        epoch = data.draw(st.sampled_from(self.epochs))
        assert self.do(self.store.heartbeat(epoch, ttl_s=LEASE_S)) == (epoch in self.owners)
        if epoch in self.owners:
            self.owners[epoch] = self.time_s + LEASE_S

    @rule(data=st.data())
    def retire(self, data: Any) -> None:
        epoch = data.draw(st.sampled_from(self.epochs))
        self.do(self.store.retire(epoch))
        self.owners.pop(epoch, None)

    @rule(seconds=st.sampled_from([0.4 * LEASE_S, 1.1 * LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.do(self.place.passes(seconds))
        self.time_s += seconds

    @rule(data=st.data(), limit=st.integers(1, 3))
    def claim(self, data: Any, limit: int) -> None:
        epoch = data.draw(st.sampled_from(self.epochs[-3:]))
        claimed = self.do(self.store.claim(epoch, limit=limit))
        self.owners = {e: at_s for e, at_s in self.owners.items() if at_s > self.time_s or e == epoch}
        free = sorted(id for id in self.open_ids() if self.records[id].owner not in self.owners)
        expected = free[:limit] if epoch in self.owners else []
        assert [record.workflow_id for record in claimed] == expected
        for id in expected:
            self.changed(id, [], None, owner=epoch)

    @rule(id=_ids, data=st.data())
    def take(self, id: str, data: Any) -> None:
        epoch = data.draw(st.sampled_from(self.epochs[-2:]))
        taken = self.do(self.store.take(id, epoch))
        assert (taken is not None) == (id in self.open_ids())
        if taken is not None:
            self.changed(id, [], None, owner=epoch)

    @rule(limit=st.integers(1, 3))
    def forget(self, limit: int) -> None:
        """What has ended goes, the oldest first, unless a key leads to it. Its id can be used again."""
        known = {id for id, _ in self.keys.values()}
        old = sorted(self.records.keys() - self.open_ids() - known)[:limit]
        forgotten = self.do(self.store.forget(older_than_s=1.0, kept_calls=9, limit=limit))
        assert forgotten == Forgotten(workflows=len(old))
        for id in old:
            for left in (self.records, self.events, self.inbox, self.taken):
                del left[id]
            assert self.do(self.store.workflow(id, tenant=None)) is None
            assert self.do(self.store.events(id)) == []

    @rule()
    def open_again(self) -> None:
        """Another store opens while the first one still has the place."""
        left = self.store
        self.store = self.do(self.place.opened())
        self.do(left.close())

    @rule()
    def crash(self) -> None:
        """What was acknowledged is there afterwards, and nothing else is."""
        left = self.store
        self.do(self.place.crash())
        self.store = self.do(self.place.opened())
        self.do(left.close())

    @invariant()
    def reads_agree(self) -> None:
        for id, record in self.records.items():
            assert self.do(self.store.workflow(id, tenant=record.tenant)) == record
            assert self.do(self.store.workflow(id, tenant="nobody")) is None
            assert [event.body for event in self.do(self.store.events(id))] == self.events[id]
            left = [body for name, body in self.inbox[id].items() if name not in self.taken[id]]
            waiting = [item.body for item in self.do(self.store.inputs(id))]
            assert waiting == (left if id in self.open_ids() else [])
        assert {record.workflow_id for record in self.do(self.store.unfinished())} == self.open_ids()
        for call in ("c0", "c1"):
            assert (self.do(self.store.call(call, tenant="a")) is not None) == (call in self.calls)


def test_a_store_does_what_its_model_does_whatever_comes_in_whatever_order(sync_lasting: Place) -> None:
    loop = asyncio.new_event_loop()
    try:
        run_state_machine_as_test(
            lambda: StoreMachine(sync_lasting, loop),
            settings=settings(
                max_examples=10,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
            ),
        )
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
