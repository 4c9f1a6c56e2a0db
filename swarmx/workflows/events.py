"""What happened to a workflow: one closed union of events, and their bytes in the store."""

from __future__ import annotations

import msgspec

from swarmx.core.errors import WorkflowError
from swarmx.workflows.values import Json

EVENTS_VERSION = 3  # 2 added fields with defaults, 3 also events; events of 1 and 2 are read as they are


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type", omit_defaults=True):
    pass


class Spent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What calls used up: attempts at them (`steps`), tokens, money by the prices of then, seconds of replicas."""

    steps: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    money: float = 0.0
    replica_s: float = 0.0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            steps=self.steps + other.steps,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            money=self.money + other.money,
            replica_s=self.replica_s + other.replica_s,
        )

    def __sub__(self, other: Spent) -> Spent:
        return Spent(
            steps=self.steps - other.steps,
            prompt_tokens=self.prompt_tokens - other.prompt_tokens,
            output_tokens=self.output_tokens - other.output_tokens,
            money=self.money - other.money,
            replica_s=self.replica_s - other.replica_s,
        )


class Submitted(_Event, frozen=True, kw_only=True):
    """The workflow was accepted: its definition as JSON text with the hash that pins it, and its bound inputs.

    A fork names the workflow whose beginning it took over, and the node from which on it runs on its own.
    `workflow_id` is its own id; what version 1 and 2 submitted does not say it.
    """

    spec: str
    inputs: dict[str, Json]
    workflow_id: str = ""
    spec_sha256: str = ""
    deadline_at_s: float | None = None
    forked_from: str | None = None
    fork_path: str | None = None


class NodeStarted(_Event, frozen=True, kw_only=True):
    """A call of this node is about to be made. The attempt is given up at `timeout_at_s`, Unix seconds.

    `reserved` is the most that it is expected to use up, where a budget wants to know. One that is not `idempotent` is
    not made again when nobody knows whether it was.
    """

    path: str
    kind: str
    attempt: int = 1
    timeout_at_s: float | None = None
    reserved: Spent | None = None
    idempotent: bool = True


class NodeRetried(_Event, frozen=True, kw_only=True):
    """The attempt failed with a cause that passes; the next one starts at `not_before_s`, Unix seconds."""

    path: str
    attempt: int
    not_before_s: float
    error: str
    reason: str
    call_id: str | None = None
    spent: Spent | None = None


class NodeExpanded(_Event, frozen=True, kw_only=True):
    """A map got its items (`items`), a loop began its next iteration with the last result (`previous`), a branch
    took its case (`case`, from 0; the number of cases for its else), or a sub-workflow got its `inputs`.

    An agent began a `step`, from 1 (the `last` one has to answer), or the `uses` of tools that this step asked for.
    """

    path: str
    items: list[Json] | None = None
    iteration: int | None = None
    previous: Json = None
    case: int | None = None
    inputs: dict[str, Json] | None = None
    step: int | None = None
    last: bool = False
    uses: int | None = None


class NodeFinished(_Event, frozen=True, kw_only=True):
    """A node left its output. `call_id` names the model call that gave it, if one did."""

    path: str
    output: Json
    call_id: str | None = None
    spent: Spent | None = None


class NodeFailed(_Event, frozen=True, kw_only=True):
    """A node cannot have an output, and so its workflow cannot finish. `reason` is the cause in one word."""

    path: str
    error: str
    call_id: str | None = None
    reason: str = "failed"
    spent: Spent | None = None


class SignalAwaited(_Event, frozen=True, kw_only=True):
    """Something waits for signals only, this one among them, which is given up at `timeout_at_s`, Unix seconds."""

    name: str
    timeout_at_s: float | None = None


class SignalReceived(_Event, frozen=True, kw_only=True):
    """A signal has its value, for the rest of the run. `signal_id` is its sender's; None: its default, none came."""

    name: str
    value: Json
    signal_id: str | None = None


class CancelRequested(_Event, frozen=True, kw_only=True):
    """Somebody no longer wants the workflow."""


class Cancelled(_Event, frozen=True, kw_only=True):
    """Terminal: ended on request; `killed` without waiting for anything."""

    killed: bool = False


class Finished(_Event, frozen=True, kw_only=True):
    """Terminal: every node is finished."""

    outputs: dict[str, Json]


class Failed(_Event, frozen=True, kw_only=True):
    """Terminal: ended by an error, of the node `path` if it names one."""

    error: str
    path: str | None = None


Event = (
    Submitted
    | NodeStarted
    | NodeRetried
    | NodeExpanded
    | NodeFinished
    | NodeFailed
    | SignalAwaited
    | SignalReceived
    | CancelRequested
    | Cancelled
    | Finished
    | Failed
)
Terminal = Cancelled | Finished | Failed


class NewerEvent(WorkflowError):
    """A newer version of SwarmX wrote the event: what it means is not known here, so its workflow is left alone."""


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    v: int
    event: Event


class _Version(msgspec.Struct, frozen=True, kw_only=True):
    v: int


_version = msgspec.json.Decoder(_Version)
_decoder = msgspec.json.Decoder(_Stored)
_encoder = msgspec.json.Encoder()


def encode_event(event: Event) -> bytes:
    """The event as JSON with its version."""
    return _encoder.encode(_Stored(v=EVENTS_VERSION, event=event))


def decode_event(body: bytes) -> Event:
    """The event from its JSON. Raises NewerEvent for one of a newer version, else WorkflowError."""
    try:
        version = _version.decode(body).v
        if version > EVENTS_VERSION:
            raise NewerEvent(f"an event has version {version}, this program knows {EVENTS_VERSION}; use a newer one")
        return _decoder.decode(body).event
    except (msgspec.DecodeError, RecursionError) as error:
        raise WorkflowError(f"an event of the workflow cannot be read: {error}") from error
