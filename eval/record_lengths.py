"""Record how long a real model's answers to the demo's prompts are, for the emulator to replay.

The emulator must not invent output lengths: they decide what a scheduler can gain. This sends every task once to an
OpenAI-compatible server and keeps the token counts. It keeps the reply itself only where a role answers in a JSON
schema, because the workflow branches on it; free text would only make the recording large.

    python -m eval.record_lengths --url http://127.0.0.1:8100 --model coordinator \
        --label qwen2.5-coder-0.5b-instruct --tasks swarmx/demo/tasks.jsonl --roles swarmx/demo/roles.yaml \
        --out swarmx/providers/emulated/recorded/qwen2.5-coder-0.5b-instruct.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

from swarmx.core.errors import ConfigError, ReplicaError
from swarmx.core.prompt_key import prompt_key

ATTEMPTS = 3
SEED = 0
REFUSALS = (aiohttp.ClientError, TimeoutError, ReplicaError)


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the tasks file: a job for one role."""

    id: str
    kind: str
    role: str
    difficulty: str
    text: str


class Role(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a role is called; `schema` is the JSON schema of its answer, None for free text."""

    system: str
    max_tokens: int
    temperature: float
    schema: dict[str, Any] | None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the recording. `reply` is None for free text and for JSON that `max_tokens` cut off."""

    key: str
    system_key: str
    task_id: str
    role: str
    difficulty: str
    model: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    reply: Any


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    message: _Message
    finish_reason: str


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    usage: _Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A task joined with its role and its key."""

    key: str
    task: Task
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Who is asked; `model` is the name on the wire, `label` the one in the recording."""

    url: str
    model: str
    label: str
    timeout_s: float


@dataclass(slots=True, kw_only=True)
class Tally:
    """What the run did, for the last lines that people read."""

    recorded: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cut_json: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, job: Job, row: Record) -> None:
        """Count one recorded answer."""
        self.recorded += 1
        self.prompt_tokens += row.prompt_tokens
        self.output_tokens += row.output_tokens
        self.cut_json += job.role.schema is not None and row.reply is None


def read_tasks(path: Path) -> list[Task]:
    """Read the tasks, one JSON object a line.

    Raises:
        ConfigError: a line is not a task.
    """
    tasks = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            tasks.append(msgspec.json.decode(line, type=Task))
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}:{number} is not a task: {error}") from error
    return tasks


def read_roles(path: Path) -> dict[str, Role]:
    """Read the roles by name.

    Raises:
        ConfigError: the file is not a mapping of roles.
    """
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=dict[str, Role])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} does not hold roles: {error}") from error


def join(tasks: Iterable[Task], roles: dict[str, Role]) -> list[Job]:
    """Attach roles and keys; of several tasks that share a key only the first can be looked up, so only it is kept.

    Raises:
        ConfigError: a task names a role that does not exist.
    """
    jobs: dict[str, Job] = {}
    for task in tasks:
        role = roles.get(task.role)
        if role is None:
            raise ConfigError(f"task {task.id} has the role {task.role!r}, expected one of {', '.join(sorted(roles))}")
        key = prompt_key(role.system, task.text)
        jobs.setdefault(key, Job(key=key, task=task, role=role))
    return list(jobs.values())


def spread(jobs: Sequence[Job], limit: int) -> list[Job]:
    """Pick `limit` jobs, as many of each role as of any other, and evenly spaced within a role."""
    by_role: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        by_role[job.task.role].append(job)
    quota = dict.fromkeys(by_role, 0)
    left = min(limit, len(jobs))
    while left:
        for role in [role for role in by_role if quota[role] < len(by_role[role])][:left]:
            quota[role] += 1
            left -= 1
    return [  # role by role in turn, so that a run which is stopped early is still even
        group[index * len(group) // quota[role]]
        for index in range(max(quota.values(), default=0))
        for role, group in by_role.items()
        if index < quota[role]
    ]


def recorded_keys(path: Path) -> set[str]:
    """Return the keys in a recording, after dropping the half line that an interrupted run may have left.

    Raises:
        ConfigError: a whole line is not a record.
    """
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    try:
        return {msgspec.json.decode(line, type=Record).key for line in whole.splitlines()}
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is not a recording: {error}; move it away or drop --resume") from error


def request_body(job: Job, model: str) -> dict[str, Any]:
    """Return the chat completion request of a job, in OpenAI's form."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": job.role.system},
            {"role": "user", "content": job.task.text},
        ],
        "max_tokens": job.role.max_tokens,
        "temperature": job.role.temperature,
        "seed": SEED,
    }
    if job.role.schema is not None:
        schema = {"name": job.task.role, "schema": job.role.schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def to_record(job: Job, completion: _Completion, label: str) -> Record:
    """Keep of a completion what the emulator replays."""
    choice = completion.choices[0]
    reply = None
    if job.role.schema is not None:
        try:
            reply = msgspec.json.decode(choice.message.content or "")
        except msgspec.DecodeError:
            if choice.finish_reason != "length":
                raise ReplicaError(
                    f"{job.task.id}: the answer is not JSON: {choice.message.content!r:.200}, expected the schema of "
                    f"role {job.task.role}: does the server constrain its output?"
                ) from None
    return Record(
        key=job.key,
        system_key=prompt_key(job.role.system, ""),
        task_id=job.task.id,
        role=job.task.role,
        difficulty=job.task.difficulty,
        model=label,
        prompt_tokens=completion.usage.prompt_tokens,
        output_tokens=completion.usage.completion_tokens,
        finish_reason=choice.finish_reason,
        reply=reply,
    )


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> _Completion:
    """Send one request.

    Raises:
        ReplicaError: the server refused it or answered something else than a completion.
    """
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        content = await response.read()
        if response.status != 200:
            raise ReplicaError(f"{url} answered HTTP {response.status}: {content[:300]!r}")
    try:
        completion = msgspec.json.decode(content, type=_Completion)
    except msgspec.DecodeError as error:
        raise ReplicaError(f"{url} did not answer with a chat completion: {error}") from error
    if not completion.choices:
        raise ReplicaError(f"{url} answered without choices")
    return completion


@retry(
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_exponential(multiplier=0.5, max=10),
    retry=retry_if_exception_type(REFUSALS),
    reraise=True,
)
async def answer(session: aiohttp.ClientSession, server: Server, job: Job) -> Record:
    """Ask until there is an answer, or raise the last of the `ATTEMPTS` refusals."""
    return to_record(job, await ask(session, server.url, request_body(job, server.model)), server.label)


async def record(jobs: Sequence[Job], server: Server, out: Path, concurrency: int, progress: Progress) -> Tally:
    """Ask for every job, `concurrency` at a time, and append each answer to `out` as soon as it is there."""
    tally = Tally()
    bar = progress.add_task(server.label, total=len(jobs))
    waiting = iter(jobs)  # shared by all streams: each takes the next job when it is free

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=server.timeout_s)) as session:
        with out.open("ab", buffering=0) as sink:

            async def stream() -> None:
                for job in waiting:
                    try:
                        row = await answer(session, server, job)
                    except REFUSALS as error:
                        tally.failures.append(f"{job.task.id}: {error or type(error).__name__}")
                    else:
                        sink.write(msgspec.json.encode(row) + b"\n")
                        tally.add(job, row)
                    progress.advance(bar)

            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(stream())
    return tally


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.record_lengths", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", required=True, help="server to ask, such as http://127.0.0.1:8100")
    parser.add_argument("--model", required=True, help="name under which the server knows the model")
    parser.add_argument("--label", required=True, help="name of the model in the recording")
    parser.add_argument("--tasks", type=Path, required=True, help="jobs, one JSON object a line")
    parser.add_argument("--roles", type=Path, required=True, help="roles, a YAML mapping")
    parser.add_argument("--out", type=Path, required=True, help="recording to append to")
    parser.add_argument("--roles-only", default="", help="only these roles, separated by commas")
    parser.add_argument("--limit", type=int, help="at most this many jobs, spread evenly over the roles")
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight (default: 8)")
    parser.add_argument("--timeout-s", type=float, default=600.0, help="longest wait for one answer (default: 600)")
    parser.add_argument("--resume", action="store_true", help="go on with a recording: skip the keys it has")
    args = parser.parse_args(argv)
    if args.concurrency < 1:
        parser.error(f"--concurrency is {args.concurrency}, expected 1 or more")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}, expected 1 or more")
    return args


def select(args: argparse.Namespace) -> list[Job]:
    """Return the jobs that this run has to do.

    Raises:
        ConfigError: an input cannot be used, or a recording is there and `--resume` is not.
    """
    roles = read_roles(args.roles)
    only = {name.strip() for name in args.roles_only.split(",") if name.strip()}
    if unknown := only - roles.keys():
        raise ConfigError(f"--roles-only has {', '.join(sorted(unknown))}, expected some of {', '.join(sorted(roles))}")
    jobs = [job for job in join(read_tasks(args.tasks), roles) if not only or job.task.role in only]
    if args.limit is not None:
        jobs = spread(jobs, args.limit)
    if args.resume:
        done = recorded_keys(args.out)
        return [job for job in jobs if job.key not in done]
    if args.out.exists():
        raise ConfigError(f"{args.out} exists: pass --resume to go on with it, or delete it")
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recorder; 1 if a job failed, 2 if it could not start."""
    args = parse(argv)
    console = Console(stderr=True)
    try:
        jobs = select(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (ConfigError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        server = Server(url=args.url.rstrip("/"), model=args.model, label=args.label, timeout_s=args.timeout_s)
        tally = asyncio.run(record(jobs, server, args.out, args.concurrency, progress))
        elapsed_s = progress.tasks[0].elapsed or 0.0
    rate = tally.output_tokens / elapsed_s if elapsed_s else 0.0
    console.print(
        f"{tally.recorded} recorded in {elapsed_s:.0f} s: {tally.prompt_tokens:,} prompt and {tally.output_tokens:,} "
        f"output tokens, {rate:.1f} output tokens/s; {tally.cut_json} JSON answers cut by max_tokens",
        soft_wrap=True,
    )
    for failure in tally.failures:
        console.print(f"failed: {failure}", style="red", markup=False, soft_wrap=True)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
