"""The file of runs: what is there is not run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from eval.experiment.grounds import Grounds
from eval.experiment.jobs import Job, Run, code_of, key_of
from swarmx.core.errors import ConfigError


class RunFile:
    """Runs by key, in a file with one line each; a line that a crash has cut off is run again."""

    def __init__(self, path: Path, *, any_code: bool = False) -> None:
        self.path = path
        self.stale = 0
        self._runs: dict[str, Run] = {}
        decode = msgspec.json.Decoder(Run).decode
        try:
            lines = path.read_bytes().splitlines() if path.exists() else []
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}; remove it, or choose another --out.") from None
        for line in lines:
            try:
                run = decode(line)
            except msgspec.DecodeError:
                continue
            if any_code or run.code == code_of(run.job.policy):
                self._runs[run.key] = run
            else:
                self.stale += 1
        if lines and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")

    def get(self, job: Job, grounds: Grounds) -> Run | None:
        """The run of this job, if there is one."""
        return self._runs.get(key_of(job, grounds))

    def missing(self, jobs: Sequence[Job], grounds: Grounds) -> list[Job]:
        """The jobs without a run, each once."""
        found = {key_of(job, grounds): job for job in jobs}
        return [job for key, job in found.items() if key not in self._runs]

    def add(self, run: Run) -> None:
        """Keep it, on disk at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(msgspec.json.encode(run) + b"\n")
        self._runs[run.key] = run
