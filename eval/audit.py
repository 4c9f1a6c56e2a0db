"""How many audit records a second reach the disk, by how many write at once: `python -m eval.audit --out DIR`.

The log lies in the folder of the result, so the disk under that folder is the one that is measured. Each writer waits
for its record to be on disk before it writes the next one, as whoever is about to act does.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eval.result import Row, table, write_result
from swarmx.core.audit import AuditEntry
from swarmx.core.control import Actor, Change, Evidence
from swarmx.memory.audit import LOG_NAME, AuditLog, verify_files

WRITERS = (1, 16, 256)
WARM_UP_S = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(prog="python -m eval.audit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="time measured for each number of writers")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--quick", action="store_true", help="half a second each, once")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and result.md")
    options = parser.parse_args(arguments)
    seconds, repeats = (0.5, 1) if options.quick else (options.seconds, options.repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [
        asyncio.run(_measure(options.out, writers=writers, seconds=seconds, repeat=repeat))
        for repeat in range(repeats)
        for writers in WRITERS
    ]
    command = " ".join(["python -m eval.audit", *(sys.argv[1:] if arguments is None else arguments)])
    path = write_result(options.out, command, rows, claims=[], seeds=[])
    print(table(rows))
    print(f"Written to {path}.")
    return 0


async def _measure(folder: Path, *, writers: int, seconds: float, repeat: int) -> Row:
    """Write for a while, then check what was written."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="log-") as name:
        log = AuditLog(Path(name) / LOG_NAME, clock=time.time)
        await log.open()
        await asyncio.gather(*(_write(log, WARM_UP_S) for _ in range(writers)))
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        waits = await asyncio.gather(*(_write(log, seconds) for _ in range(writers)))
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
        await log.close()
        bytes_written = (Path(name) / LOG_NAME).stat().st_size
        started_s = time.perf_counter()
        report = verify_files(name)
        check_s = time.perf_counter() - started_s
    waits_ms = 1000 * np.concatenate([np.array(each) for each in waits])
    assert not report.findings
    return {
        "experiment": "audit",
        "writers": writers,
        "repeat": repeat,
        "records": len(waits_ms),
        "records_per_s": len(waits_ms) / wall_s,
        "wait_p50_ms": float(np.percentile(waits_ms, 50)),
        "wait_p99_ms": float(np.percentile(waits_ms, 99)),
        "cpu_us_per_record": 1e6 * cpu_s / len(waits_ms),
        "bytes_per_record": bytes_written / report.records,
        "checked_per_s": report.records / check_s,
    }


async def _write(log: AuditLog, seconds: float) -> list[float]:
    """Write one record after another; how long each took to be on disk, in seconds."""
    waits: list[float] = []
    end_s = time.perf_counter() + seconds
    while (before_s := time.perf_counter()) < end_s:
        await log.write(_entry(len(waits)))
        waits.append(time.perf_counter() - before_s)
    return waits


def _entry(number: int) -> AuditEntry:
    """A record of the usual size: one change, one figure behind it."""
    return AuditEntry(
        kind="note",
        actor=Actor(type="coordinator", name="coordinator", role="operator"),
        via="coordinator",
        tool="scale_model",
        arguments={"model": "qwen3-8b", "replicas": number % 8},
        changes=(Change(subject="qwen3-8b", what="replicas", before=2, after=3),),
        evidence=(Evidence(metric="p95_s", subject="qwen3-8b", value=4.2, unit="s", window_s=60.0),),
    )


if __name__ == "__main__":
    sys.exit(main())
