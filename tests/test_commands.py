"""The operators' commands, against a real server and on the files that one left."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from swarmx.cli import main
from swarmx.core.audit import AuditEntry
from swarmx.core.control import Actor
from swarmx.memory.audit import AuditLog
from tests.e2e.fleet import Server, all_ready, serving

MODEL = "qwen3-8b"
SETTINGS = {
    "emulation": {"time_scale": 20.0, "seed": 7},
    "watch": {"every_s": 0.2},
    "coordinator": {"engine": "off"},
    "server": {"drain_s": 1},
    "emulated": [{"model": MODEL, "device": "h100", "count": 2}],
    "elastic": [{"model": MODEL, "device": "l40s", "min": 0, "max": 0, "limit": 3}],
}
Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWARMX_URL", "SWARMX_TOKEN", "SWARMX_STATE_DIR", "SWARMX_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(SETTINGS, tmp_path_factory.mktemp("commands")) as running:
        asyncio.run(ready(running))
        yield running


async def ready(server: Server) -> None:
    async with server.http() as http:
        await all_ready(http)


@pytest.fixture
def run(own: Server) -> Run:
    """A command against the server of this module."""

    def invoke(*arguments: str, **more: Any) -> Result:
        top = ["--url", own.url, "--state-dir", str(own.state_dir)]
        return CliRunner().invoke(main, [*top, *arguments], **more)

    return invoke


def data(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.mark.process
def test_a_question_is_answered_with_evidence(run: Run) -> None:
    result = run("ask", "status", "of", MODEL)
    assert result.exit_code == 0, result.output
    assert f"{MODEL}: " in result.output
    assert f"in_flight of {MODEL}: 0 calls" in result.output
    answer = data(run("--json", "ask", f"status of {MODEL}"))
    assert answer["error"] is None
    assert {"in_flight", "waiting"} <= {item["metric"] for item in answer["evidence"]}


@pytest.mark.process
def test_an_order_is_proposed_listed_and_approved(run: Run) -> None:
    said = run("ask", f"set bounds of {MODEL} to 0..2")
    assert said.exit_code == 0, said.output
    assert f"{MODEL}: max_replicas 0 → 2" in said.output
    (waiting,) = data(run("--json", "proposals", "--state", "open"))["proposals"]
    name = waiting["proposal_id"]
    assert name in run("proposals").output
    done = run("proposals", "approve", name)
    assert f"{name} applied: set_replica_bounds" in done.output
    again = run("proposals", "approve", name)
    assert again.exit_code == 1
    assert "Error: " in again.output
    undone = data(run("--json", "rollback", name, "--reason", "enough"))
    assert (undone["state"], undone["via"], undone["reason"]) == ("applied", "cli", "enough")


@pytest.mark.process
def test_a_proposal_is_denied(run: Run) -> None:
    name = data(run("--json", "ask", f"set bounds of {MODEL} to 0..3"))["proposal"]["proposal_id"]
    denied = run("proposals", "deny", name, "--reason", "not today")
    assert f"{name} denied" in denied.output
    assert "not today" in denied.output
    assert run("proposals", "--state", "open").output == "No proposal is open.\n"


@pytest.mark.process
def test_a_refused_sentence_fails_the_command(run: Run, own: Server) -> None:
    viewer = {"SWARMX_TOKEN": own.key("looker", "viewer")}
    while "unknown token" in run("ask", "help", env=viewer).output:  # until the server reads its keys again
        time.sleep(0.1)
    result = run("ask", f"set bounds of {MODEL} to 0..3", env=viewer)
    assert result.exit_code == 1
    assert "Error" in result.output
    assert "viewer" in result.output


@pytest.mark.process
def test_bounds_and_scale_change_a_model_and_can_be_tried_dry(run: Run) -> None:
    dry = run("bounds", MODEL, "0", "3", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.output == f"{MODEL}: max_replicas 0 → 3\nIt is allowed.\n"
    refused = run("bounds", MODEL, "0", "9", "--dry-run")
    assert refused.exit_code == 1
    assert "Refused (" in refused.output
    done = data(run("--json", "bounds", MODEL, "0", "1", "--reason", "try"))
    assert (done["state"], done["via"]) == ("applied", "cli")
    assert data(run("--json", "bounds", MODEL, "0", "0"))["state"] == "applied"
    outside = run("scale", MODEL, "9")
    assert outside.exit_code == 1
    assert "Error: " in outside.output


@pytest.mark.process
def test_a_replica_is_cordoned_and_put_back(run: Run) -> None:
    replica = f"{MODEL}-h100-1"

    def state() -> str:
        rows = data(run("--json", "replicas"))["replicas"]
        return next(row["state"] for row in rows if row["replica_id"] == replica)

    assert data(run("--json", "cordon", replica))["state"] == "applied"
    assert state() == "cordoned"
    last = run("cordon", f"{MODEL}-h100-0")
    assert last.exit_code == 1
    assert "no ready replica left" in last.output
    assert data(run("--json", "uncordon", replica))["state"] == "applied"
    assert state() == "ready"
    missing = run("drain", "nobody-0")
    assert missing.exit_code == 1
    assert "nobody-0" in missing.output


@pytest.mark.process
def test_the_audit_log_is_listed_verified_and_exported_while_the_server_runs(
    run: Run, own: Server, tmp_path: Path
) -> None:
    data(run("--json", "bounds", MODEL, "0", "2"))
    data(run("--json", "bounds", MODEL, "0", "0"))
    listed = data(run("--json", "audit", "list", "--limit", "4"))["records"]
    assert [record["entry"]["kind"] for record in listed] == ["intent", "outcome"] * 2
    assert "set_replica_bounds" in run("audit", "list").output
    verified = run("audit", "verify")
    assert verified.exit_code == 0, verified.output
    assert verified.output.startswith("The audit log is intact: ")
    out = tmp_path / "audit.jsonl"
    assert run("audit", "export", "--out", str(out)).exit_code == 0
    assert [json.loads(line)["seq"] for line in out.read_text().splitlines()][-4:] == [r["seq"] for r in listed]
    assert out.read_bytes() == (own.state_dir / "audit.jsonl").read_bytes(), "byte by byte, so that hashes hold"


def written(folder: Path, records: int) -> Path:
    """A log of some notes, closed."""

    async def write() -> None:
        log = AuditLog(folder / "audit.jsonl", clock=lambda: 1000.0)
        await log.open()
        actor = Actor(type="key", name="ada", role="operator")
        for number in range(records):
            await log.write(AuditEntry(kind="note", actor=actor, via="rest", tool="no_op", detail=f"note {number}"))
        await log.close()

    folder.mkdir()
    asyncio.run(write())
    return folder / "audit.jsonl"


def offline(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--url", "http://127.0.0.1:1", "--state-dir", str(folder), *arguments])


def test_a_log_is_verified_without_a_server(tmp_path: Path) -> None:
    written(tmp_path / "state", 5)
    result = offline(tmp_path / "state", "audit", "verify")
    assert result.exit_code == 0
    assert "intact: 5 records" in result.output
    rows = [json.loads(line) for line in offline(tmp_path / "state", "audit", "export").output.splitlines()]
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5]


def flipped(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[2].replace(b"note 2", b"note X"), *lines[3:]]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (flipped, "altered"),
        (lambda lines: [*lines[:2], *lines[3:]], "missing"),
        (lambda lines: lines[:3], "tail_cut"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "reordered"),
        (lambda lines: [*lines, lines[1]], "repeated"),
        (lambda lines: [*lines[:2], b"nonsense\n", *lines[2:]], "unreadable"),
    ],
)
def test_each_damage_is_named_and_fails_the_command(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], word: str
) -> None:
    path = written(tmp_path / "state", 5)
    path.write_bytes(b"".join(damage(path.read_bytes().splitlines(keepends=True))))
    result = offline(tmp_path / "state", "audit", "verify")
    assert result.exit_code == 1
    assert "NOT as it was written" in result.output
    assert f": {word}: " in result.output
    found = json.loads(offline(tmp_path / "state", "--json", "audit", "verify").output)
    assert found["sound"] is False
    assert word in [finding["verdict"] for finding in found["report"]["findings"]]


def test_a_head_that_was_kept_elsewhere_shows_a_log_that_was_written_anew(tmp_path: Path) -> None:
    written(tmp_path / "old", 5)
    head = json.loads(offline(tmp_path / "old", "audit", "export").output.splitlines()[-1])
    kept = f"{head['seq']}:{head['hash']}"
    assert offline(tmp_path / "old", "audit", "verify", "--head", kept).exit_code == 0
    written(tmp_path / "new", 6)
    assert offline(tmp_path / "new", "audit", "verify").exit_code == 0
    assert offline(tmp_path / "new", "audit", "verify", "--head", f"5:{'0' * 64}").exit_code == 1


@pytest.mark.parametrize("head", ["", "5", "5:", "5:xyz", "x:" + "0" * 64, "5:" + "G" * 64])
def test_a_head_has_a_number_and_a_hash(tmp_path: Path, head: str) -> None:
    written(tmp_path / "state", 1)
    result = offline(tmp_path / "state", "audit", "verify", "--head", head)
    assert result.exit_code == 2
    assert "write SEQ:HASH" in result.output


@pytest.mark.parametrize("command", ["verify", "export"])
def test_a_folder_without_a_log_is_told_so(tmp_path: Path, command: str) -> None:
    result = offline(tmp_path, "audit", command)
    assert result.exit_code == 1
    assert "there is no audit log in" in result.output


def test_an_export_of_a_damaged_log_stops_at_the_damage(tmp_path: Path) -> None:
    path = written(tmp_path / "state", 3)
    path.write_bytes(path.read_bytes() + b"nonsense\n")
    result = offline(tmp_path / "state", "audit", "export")
    assert result.exit_code == 1
    assert "swarmx audit verify" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask"], ["proposals", "approve"], ["scale", "m"], ["scale", "m", "-1"], ["scale", "m", "x"], ["drain"],
        ["bounds", "m", "1"], ["proposals", "--state", "new"], ["audit", "list", "--limit", "0"],
    ],
)  # fmt: skip
def test_a_command_that_is_not_complete_says_what_it_wants(tmp_path: Path, arguments: list[str]) -> None:
    result = offline(tmp_path, *arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.output


@pytest.mark.process
@pytest.mark.parametrize(
    ("status", "kind", "body", "words"),
    [
        (200, "text/html", b"<html>", "Is it a SwarmX server?"),
        (200, "application/json", b"{}", "Is it a SwarmX server?"),
        (409, "application/problem+json", b'{"detail": "it is so"}', "it is so"),
        (200, "text/event-stream", b"event: text\ndata: nonsense\n\n", "Is it a SwarmX server?"),
        (200, "text/event-stream", b'event: text\ndata: {"text": "so far"}\n\n', "broke off"),
    ],
)
def test_an_answer_that_is_no_stream_of_ours_is_told_plainly(
    tmp_path: Path, status: int, kind: str, body: bytes, words: str
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body) + 1000 * (words == "broke off")))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    (tmp_path / "admin.token").write_text("swx-1")
    with HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{other.server_port}"
        result = CliRunner().invoke(main, ["--url", url, "--state-dir", str(tmp_path), "ask", "status"])
        other.shutdown()
        thread.join()
    assert result.exit_code == 1
    assert words in result.output


def test_nobody_at_the_other_end_is_told_plainly(tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text("swx-1")
    for arguments in (["ask", "status"], ["proposals"], ["audit", "list"], ["drain", "a"]):
        result = offline(tmp_path, *arguments)
        assert result.exit_code == 1
        assert "nobody answers at http://127.0.0.1:1" in result.output
