"""What goes wrong in a simulation: crashes, drains, returns and slow replicas, by hand or from a spot trace."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

from eval.sim.replicas import SimReplica
from eval.sim.settings import Fault
from swarmx.core.errors import ConfigError
from swarmx.core.messages import ReplicaChanged
from swarmx.core.nouns import FailureReason, ReplicaState

if TYPE_CHECKING:
    from eval.sim.world import World

_COLUMNS = ("trace", "t_s", "event", "node")


class Faults:
    """Makes the faults of the settings happen to the world's replicas."""

    def __init__(self, world: World) -> None:
        self._world = world

    def schedule(self) -> None:
        """Put all of them on the heap. Raises ConfigError for a replica that is not there."""
        known = {replica.replica.replica_id: replica for replica in self._world.machines.all}
        for fault in self._world.settings.faults:
            if (replica := known.get(fault.replica_id)) is None:
                raise ConfigError(f"a fault at {fault.at_s:g} s names the replica {fault.replica_id!r}, which is not.")
            self._world.at(fault.at_s, self._happen, replica, fault)

    def emptied(self, replica: SimReplica) -> None:
        """A replica that drains and has nothing left stops; its last answers may still be on their way."""
        if replica.condition == "draining" and not replica.holds:
            self._lose(replica, "replica_gone")

    def _happen(self, replica: SimReplica, fault: Fault) -> None:
        match fault.kind:
            case "crash":
                self._crash(replica)
            case "drain":
                self._drain(replica, fault.notice_s)
            case "return":
                self._return(replica)
            case "slow":
                if replica.condition in ("up", "draining"):
                    replica.slow_down(fault.factor, self._world.now_s)
                    self._world.machines.stir(replica)
            case _:
                assert_never(fault.kind)

    def _crash(self, replica: SimReplica) -> None:
        if replica.condition != "down":
            self._lose(replica, "connection_lost")

    def _lose(self, replica: SimReplica, reason: FailureReason) -> None:
        """It stops; that it is gone is noticed a while later."""
        self._world.machines.lose(replica, reason)
        at_s = self._world.now_s + self._world.settings.gone_after_s
        self._world.at(at_s, self._tell_gone, replica, replica.epoch)

    def _drain(self, replica: SimReplica, notice_s: float) -> None:
        if replica.condition == "starting":
            self._lose(replica, "replica_gone")
        elif replica.condition == "up":
            replica.condition = "draining"
            self._announce(replica, "draining")
            if math.isfinite(notice_s):
                self._world.at(self._world.now_s + notice_s, self._time_is_up, replica, replica.epoch)
            self.emptied(replica)

    def _time_is_up(self, replica: SimReplica, epoch: int) -> None:
        if replica.epoch == epoch and replica.condition == "draining":
            self._crash(replica)

    def _return(self, replica: SimReplica) -> None:
        if replica.condition == "draining":
            replica.condition = "up"
            self._announce(replica, "ready")
        elif replica.condition == "down":
            self._tell_gone(replica, replica.epoch)
            replica.condition = "starting"
            self._announce(replica, "starting")
            at_s = self._world.now_s + self._world.settings.start_s
            self._world.at(at_s, self._started, replica, replica.epoch)

    def _started(self, replica: SimReplica, epoch: int) -> None:
        if replica.epoch == epoch and replica.condition == "starting":
            replica.condition = "up"
            self._announce(replica, "ready")

    def _tell_gone(self, replica: SimReplica, epoch: int) -> None:
        """Routers learn that the replica is gone, once for each of its deaths."""
        if replica.epoch == epoch and not replica.told_gone:
            replica.told_gone = True
            self._announce(replica, "gone")

    def _announce(self, replica: SimReplica, state: ReplicaState) -> None:
        self._world.tell_routers(ReplicaChanged(replica=replica.replica, state=state))


def spot_faults(
    path: Path, trace: str, replica_ids: Sequence[str], *, notice_s: float = 0.0, stretch: float = 1.0
) -> tuple[Fault, ...]:
    """Faults as the nodes of a trace came and went: a CSV with the columns trace, t_s, event (add, remove) and node.

    A node that is added becomes the first replica that has none, a node that is removed takes its replica with it,
    `notice_s` later; more nodes than replicas stay unused. Times are multiplied by `stretch`. Replicas that have no
    node at the start of the trace are down from second 0 on. Raises ConfigError for a file that is not such a trace.
    """
    free, has = list(replica_ids), dict[str, str]()
    faults: list[Fault] = []
    present = 0
    for t_s, event, node in _events(path, trace):
        at_s = t_s * stretch
        if event == "add" and node not in has:
            if free:
                has[node] = free.pop(0)
                if t_s > 0.0:
                    faults.append(Fault(at_s=at_s, replica_id=has[node], kind="return"))
                else:
                    present += 1
        elif event == "remove" and node in has:
            lost = has.pop(node)
            free.append(lost)
            if notice_s > 0.0:
                faults.append(Fault(at_s=at_s, replica_id=lost, kind="drain", notice_s=notice_s))
            else:
                faults.append(Fault(at_s=at_s, replica_id=lost, kind="crash"))
    absent = [Fault(at_s=0.0, replica_id=replica_id, kind="crash") for replica_id in replica_ids[present:]]
    return (*absent, *faults)


def _events(path: Path, trace: str) -> list[tuple[float, str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path} has no column {missing[0]!r}, expected {', '.join(_COLUMNS)}.")
            rows = [(number, row) for number, row in enumerate(reader, 2) if row["trace"] == trace]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as a spot trace: {error}.") from None
    if not rows:
        raise ConfigError(f"{path} has no events of the trace {trace!r}.")
    found: list[tuple[float, str, str]] = []
    for number, row in rows:
        try:
            t_s = float(row["t_s"])
        except (TypeError, ValueError):
            t_s = math.nan
        if not (0.0 <= t_s < math.inf) or row["event"] not in ("add", "remove") or not row["node"]:
            raise ConfigError(f"line {number} of {path} is {dict(row)}, expected a time, add or remove, and a node.")
        if found and t_s < found[-1][0]:
            raise ConfigError(f"line {number} of {path} goes back in time, to {t_s:g} s from {found[-1][0]:g} s.")
        found.append((t_s, row["event"], row["node"]))
    return found
