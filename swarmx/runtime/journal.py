"""The journal: every message that an agent was handed, and what it answered; enough to replay its decisions."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import IO, Any, Protocol, get_args

import msgspec

from swarmx.agents.learner import LearnerAgent
from swarmx.agents.router import RouterAgent
from swarmx.agents.scaler import ScalerAgent
from swarmx.core.actions import Action, Dispatch
from swarmx.core.errors import JournalError
from swarmx.core.messages import Envelope, Message
from swarmx.core.ports import Output, SchedulerAgent
from swarmx.runtime.journal_files import make_room, part_of

FORMAT = "swarmx-journal"
VERSION = 4  # raise it when agents answer the same messages otherwise, or with other fields
_OUTPUTS = frozenset(get_args(Message) + get_args(Action))

AgentFactory = Callable[[dict[str, Any]], SchedulerAgent]
AGENT_FACTORIES: Mapping[str, AgentFactory] = {
    "router": RouterAgent.from_config,
    "scaler": ScalerAgent.from_config,
    "learner": LearnerAgent.from_config,
}


def load_factory(text: str) -> tuple[str, AgentFactory]:
    """Read "name=module:factory", as `swarmx replay --agent` takes it. Raises JournalError."""
    name, _, path = text.partition("=")
    module, _, attribute = path.partition(":")
    try:
        factory: AgentFactory = attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise JournalError(f"--agent {text!r}: {error}. Write NAME=MODULE:FACTORY.") from None
    return name, factory


class Header(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """First line of each file of a journal: which agents wrote it, from which settings, and which part it is."""

    format: str
    version: int
    agents: dict[str, dict[str, Any]]
    part: int = 1


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One step of one agent. `raised` names the exception type where the agent failed instead of answering."""

    at_s: float
    agent: str
    heard: Envelope
    answered: list[Message | Action]
    raised: str | None = None


class Journal(Protocol):
    """Where a shell writes the steps of its agents."""

    def write(self, entry: Entry) -> None: ...


class MemoryJournal:
    """Keeps the last `limit` entries in memory."""

    def __init__(self, *, limit: int | None = None) -> None:
        self.entries: deque[Entry] = deque(maxlen=limit)

    def write(self, entry: Entry) -> None:
        self.entries.append(entry)


class FileJournal:
    """JSON lines in files of their own per process life, readable by their owner only.

    Lines are buffered; `flush` puts them on the way to the disk. A crash may lose the last ones: the journal explains,
    the database remembers. A file that has `file_bytes` is followed by another part; whenever one begins, the oldest
    files in the folder go, of this or earlier lives, so that all of them have about `keep_bytes`. None: no bound.
    """

    def __init__(
        self,
        path: Path,
        agents: Mapping[str, Mapping[str, Any]],
        *,
        file_bytes: int | None = None,
        keep_bytes: int | None = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._agents = {name: dict(settings) for name, settings in agents.items()}
        self._file_bytes = file_bytes
        self._keep_bytes = keep_bytes
        self._encoder = msgspec.json.Encoder()
        self._part = 1
        self._file, self._size = self._begun()

    def write(self, entry: Entry) -> None:
        if self._file_bytes is not None and self._size >= self._file_bytes:
            self._file.close()
            self._part += 1
            self._file, self._size = self._begun()
        self._size += self._file.write(self._encoder.encode(entry) + b"\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _begun(self) -> tuple[IO[bytes], int]:
        path = part_of(self.path, self._part)
        file = path.open("xb", buffering=1 << 16)
        path.chmod(0o600)
        header = Header(format=FORMAT, version=VERSION, agents=self._agents, part=self._part)
        size = file.write(self._encoder.encode(header) + b"\n")
        if self._keep_bytes is not None:
            make_room(path, self._keep_bytes)
        return file, size


def read(path: Path) -> tuple[Header, Iterator[Entry]]:
    """The header and the entries of a journal, by its first file. A last line that a crash cut short is left out."""
    header = _header(path)
    if header.part != 1:
        raise JournalError(
            f"{path} is part {header.part} of a journal, which is read from its first file on; if that was deleted to "
            "make room (state.journal_keep_mb), its agents cannot be replayed."
        )
    return header, _entries(path)


def _header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            first = file.readline()
    except OSError as error:
        raise JournalError(
            f"cannot read the journal {path}: {error.strerror}. Give a file written by swarmx."
        ) from None
    try:
        header = msgspec.json.decode(first, type=Header)
    except msgspec.MsgspecError as error:
        raise JournalError(f"{path} does not begin with a journal header ({error}).") from None
    if header.format != FORMAT:
        raise JournalError(
            f"{path} is {header.format!r} version {header.version}; this swarmx reads {FORMAT!r} version {VERSION}."
        )
    if header.version != VERSION:  # an older one can be decoded, but its answers would differ
        raise JournalError(
            f"{path} was written by another version of swarmx: the journal has version {header.version}, "
            f"this swarmx reads version {VERSION}. Replay it with the swarmx that wrote it."
        )
    return header


def _entries(first: Path) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(Entry)
    path, part = first, 1
    while path.exists():
        with path.open("rb") as file:
            file.readline()
            for number, line in enumerate(file, start=2):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield decoder.decode(line)
                except msgspec.MsgspecError as error:
                    raise JournalError(f"{path}, line {number}: not a journal entry ({error}).") from None
        part += 1
        path = part_of(first, part)


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """The first step at which a replay answered otherwise than the journal says."""

    step: int
    entry: Entry
    replayed: list[Output]
    raised: str | None = None


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found."""

    steps: int
    decisions: int
    divergence: Divergence | None


def step(agent: SchedulerAgent, message: Message, now_s: float) -> tuple[list[Output], Exception | None]:
    """One step of an agent, the same in a shell and in a replay: what it answered, or what it raised."""
    try:
        answered = list(agent.handle(message, now_s))
        for output in answered:
            if type(output) not in _OUTPUTS:
                raise TypeError(f"agent {agent.name} answered {output!r}, which is neither a message nor an action")
        return answered, None
    except Exception as error:  # noqa: BLE001  # agents are plug-ins: the caller counts and logs what they raise
        return [], error


def replay(path: Path, factories: Mapping[str, AgentFactory] = AGENT_FACTORIES) -> Replay:
    """Feed the journal to fresh agents and compare every answer; stops at the first divergence."""
    header, entries = read(path)
    missing = sorted(set(header.agents) - set(factories))
    if missing:
        raise JournalError(
            f"{path} was written by agents that this replay does not know: {', '.join(missing)}. "
            f"Known are {', '.join(sorted(factories))}; name your own with --agent NAME=MODULE:FACTORY."
        )
    agents = {name: factories[name](config) for name, config in header.agents.items()}
    steps = decisions = 0
    for entry in entries:
        steps += 1
        agent = agents.get(entry.agent)
        if agent is None:
            raise JournalError(f"{path}, step {steps}: the agent {entry.agent!r} is missing from the header.")
        answered, error = step(agent, entry.heard.message, entry.at_s)
        raised = type(error).__name__ if error else None
        decisions += sum(isinstance(output, Dispatch) for output in answered)
        if answered != entry.answered or raised != entry.raised:
            return Replay(
                steps=steps,
                decisions=decisions,
                divergence=Divergence(step=steps, entry=entry, replayed=answered, raised=raised),
            )
    return Replay(steps=steps, decisions=decisions, divergence=None)
