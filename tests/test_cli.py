"""The command line, against a real server and without one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from swarmx.agents.policies import POLICIES
from swarmx.agents.router import RouterAgent
from swarmx.cli import main
from swarmx.core.messages import PolicyChanged
from swarmx.runtime.journal import FileJournal
from swarmx.runtime.switchboard import Switchboard
from tests.e2e.fleet import Server

ONE = """
name: one
inputs: {question: null}
nodes:
  ask: {kind: llm, model: qwen3-8b, prompt: "{{ inputs.question }}", max_tokens: 12}
outputs: {said: "{{ ask.text }}", question: "{{ inputs.question }}"}
"""
INSTANT = "name: instant\nnodes: {a: {kind: tool, function: upper, args: {text: x}}}\n"
BROKEN = "name: broken\nnodes: {a: {kind: tool, function: first, args: {value: []}}}\n"
WAITS = """
name: waits
signals: {go: {}}
nodes: {a: {kind: tool, function: upper, args: {text: "{{ signals.go.who }}"}}}
"""
SLOW = """
name: slow
nodes:
  draw: {kind: image, model: sdxl, prompt: A bee, steps: 200, width: 2048, height: 2048, n: 3}
"""

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWARMX_URL", "SWARMX_TOKEN", "SWARMX_STATE_DIR", "SWARMX_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(server: Server) -> Run:
    """A command against the shared server."""

    def ask(*arguments: str, **more: Any) -> Result:
        own = ["--url", server.url, "--state-dir", str(server.state_dir)]
        return CliRunner().invoke(main, [*own, *arguments], **more)

    return ask


def alone(*arguments: str, **more: Any) -> Result:
    """A command without a server."""
    return CliRunner().invoke(main, list(arguments), **more)


def told(result: Result) -> Any:
    """What a command that went well printed as JSON."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def at_its_end(run: Run, workflow_id: str) -> str:
    """What `show` prints of a workflow once it has ended."""
    assert run("workflows", "events", workflow_id, "--follow").exit_code == 0
    return run("show", workflow_id).stdout


def complaint(result: Result, *, status: int = 1) -> str:
    """What a command that did not go well said: one message, no traceback."""
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert "Error: " in result.stderr
    return " ".join(result.stderr.split())


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "workflow.yaml"
        path.write_text(text)
        return str(path)

    return write


def finished(run: Run, workflow_id: str) -> Any:
    """The workflow once it has ended and its calls are recorded."""
    end_s = time.monotonic() + 60.0
    while True:
        row = told(run("--json", "show", workflow_id))
        if row["ended_at_s"] is not None and row["calls"]:
            return row
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.process
def test_submit_waits_for_the_end_and_prints_the_outputs(run: Run, file: Callable[[str], str]) -> None:
    result = run("submit", file(ONE), "--input", "question=Why?", "--wait")
    assert result.exit_code == 0, result.output
    assert "finished" in result.stdout
    assert '"question": "Why?"' in result.stdout


@pytest.mark.process
def test_submit_prints_json_and_takes_json_inputs(run: Run, file: Callable[[str], str]) -> None:
    row = told(run("--json", "submit", file(ONE), "--input", 'question=["a", 1]', "--wait"))
    assert row["outputs"]["question"] == ["a", 1]


@pytest.mark.process
def test_submit_reads_standard_input_and_does_not_wait_unless_told(run: Run) -> None:
    accepted = told(run("--json", "submit", "-", input=INSTANT))
    assert accepted["state"] == "running"
    assert set(accepted) == {"workflow_id", "state"}


@pytest.mark.process
def test_submit_that_does_not_wait_says_which_workflow_it_is(run: Run) -> None:
    result = run("submit", "-", input=INSTANT)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("wf-")
    assert "running" in result.output


@pytest.mark.process
def test_submit_exits_with_1_when_the_workflow_fails(run: Run, file: Callable[[str], str]) -> None:
    result = run("submit", file(BROKEN), "--wait")
    assert result.exit_code == 1
    assert "Failed at a:" in result.stdout


@pytest.mark.process
def test_submit_says_what_is_wrong_with_a_workflow_and_where(run: Run, file: Callable[[str], str]) -> None:
    assert "nodes.a" in complaint(run("submit", file(INSTANT.replace("tool", "tol"))))
    assert "must be given" in complaint(run("submit", file(ONE)))


@pytest.mark.process
@pytest.mark.parametrize("text", ["noequals", "=value"])
def test_an_input_without_a_name_is_a_usage_error(run: Run, file: Callable[[str], str], text: str) -> None:
    assert "write NAME=VALUE" in complaint(run("submit", file(ONE), "--input", text), status=2)


@pytest.mark.process
def test_a_file_that_cannot_be_submitted_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "latin"
    path.write_bytes(b"name: \xff")
    assert "is not UTF-8" in complaint(run("submit", str(path)), status=2)
    assert "No such file" in complaint(run("submit", str(tmp_path / "no")), status=2)


@pytest.mark.process
def test_workflows_are_listed_in_pages(run: Run) -> None:
    ids = [told(run("--json", "submit", "-", "--wait", input=INSTANT))["workflow_id"] for _ in range(3)]
    page = told(run("--json", "workflows", "--limit", "2"))
    assert [row["workflow_id"] for row in page["workflows"]] == ids[:0:-1]
    rest = told(run("--json", "workflows", "--limit", "1", "--cursor", page["next_cursor"]))
    assert rest["workflows"][0]["workflow_id"] == ids[0]
    table = run("workflows", "--limit", "1")
    assert ids[2] in table.stdout
    assert "More: swarmx workflows --cursor" in table.stdout
    ended = told(run("--json", "workflows", "--state", "finished"))["workflows"]
    assert {row["state"] for row in ended} == {"finished"}


@pytest.mark.process
def test_show_and_why_print_whole_ids(run: Run) -> None:
    envelope = ONE.replace("question: null", "question: Why?")
    workflow_id = told(run("--json", "submit", "-", input=envelope))["workflow_id"]
    row = finished(run, workflow_id)
    call_id = row["calls"][0]["call_id"]
    table = run("show", workflow_id)
    assert table.exit_code == 0
    assert workflow_id in table.stdout
    assert call_id in table.stdout
    why = run("why", call_id)
    assert why.exit_code == 0, why.output
    assert row["calls"][0]["replica_id"] in why.stdout
    assert told(run("--json", "why", call_id))["decisions"][0]["decision"]["replica_id"]
    other = run("why", call_id, "--policy", "least_outstanding")
    assert other.exit_code == 0, other.output
    assert "least_outstanding would have sent it to " in other.stdout
    unknown = run("why", call_id, "--policy", "least")
    assert unknown.exit_code == 1
    assert "unknown policy 'least'" in unknown.output


@pytest.mark.process
def test_cancel_ends_a_workflow(run: Run) -> None:
    workflow_id = told(run("--json", "submit", "-", input=SLOW))["workflow_id"]
    result = run("cancel", workflow_id)
    assert result.exit_code == 0
    assert f"{workflow_id}: cancelled" in result.stdout
    assert told(run("--json", "cancel", workflow_id))["state"] == "cancelled"


@pytest.mark.process
def test_a_workflow_is_killed(run: Run) -> None:
    workflow_id = told(run("--json", "submit", "-", input=SLOW))["workflow_id"]
    result = run("workflows", "kill", workflow_id)
    assert result.exit_code == 0, result.output
    assert f"{workflow_id}: cancelled" in result.stdout


@pytest.mark.process
def test_a_failed_workflow_is_retried_and_one_that_is_not_is_told_to_be_forked(run: Run) -> None:
    ended = run("--json", "submit", "-", "--wait", input=BROKEN)
    assert ended.exit_code == 1
    broken = json.loads(ended.stdout)["workflow_id"]
    again = told(run("--json", "workflows", "retry", broken))["workflow_id"]
    assert again != broken
    assert f"{again}: failed" in at_its_end(run, again)
    whole = told(run("--json", "submit", "-", "--wait", input=INSTANT))["workflow_id"]
    assert "can be forked" in complaint(run("workflows", "retry", whole))
    forked = told(run("--json", "workflows", "fork", whole, "a"))["workflow_id"]
    assert f"{forked}: finished" in at_its_end(run, forked)


@pytest.mark.process
def test_a_signal_is_sent_and_events_are_followed_to_the_end(run: Run) -> None:
    workflow_id = told(run("--json", "submit", "-", input=WAITS))["workflow_id"]
    before = [json.loads(line) for line in run("--json", "workflows", "events", workflow_id).stdout.splitlines()]
    assert before[0]["type"] == "Submitted"
    sent = run("workflows", "signal", workflow_id, "go", '{"who": "ann"}')
    assert f"{workflow_id} has the signal go" in sent.stdout, sent.output
    lines = run("workflows", "events", workflow_id, "--follow", "--after", "1").stdout.splitlines()
    assert [int(line.split()[0]) for line in lines] == list(range(2, len(lines) + 2))
    assert lines[-1].split()[1] == "Finished"


@pytest.mark.process
def test_replicas_are_listed(run: Run) -> None:
    assert len(told(run("--json", "replicas"))["replicas"]) == 4
    table = run("replicas").stdout
    assert "sdxl-l40s-0" in table
    assert "emulated" in table


@pytest.mark.process
def test_policies_are_listed_and_set(run: Run) -> None:
    before = told(run("--json", "policies"))["active"]["policy"]
    try:
        data = told(run("--json", "policies", "--set", "round_robin"))
        assert data["active"] == {"policy": "round_robin", "parameters": {}}
        table = run("policies").stdout
        assert all(name in table for name in POLICIES)
        assert "● │ round_robin" in table.replace("┃", "│")
    finally:
        assert run("policies", "--set", before).exit_code == 0


@pytest.mark.process
def test_a_policy_that_does_not_exist_is_named_with_the_nearest(run: Run) -> None:
    assert "Did you mean 'least_work'?" in complaint(run("policies", "--set", "least_wrok"))
    assert "no parameter 'x'" in complaint(run("policies", "--set", "random", "--param", "x=1"))
    assert "write NAME=NUMBER" in complaint(run("policies", "--set", "random", "--param", "x=y"), status=2)
    assert "--param needs --set" in complaint(run("policies", "--param", "x=1"), status=2)


@pytest.mark.process
@pytest.mark.parametrize("command", [("show", "wf-no"), ("cancel", "wf-no"), ("why", "call_no")])
def test_an_unknown_id_is_said_to_be_unknown(run: Run, command: tuple[str, ...]) -> None:
    assert command[1] in complaint(run(*command))


@pytest.mark.process
def test_a_token_of_the_environment_is_used_and_its_role_counts(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMX_TOKEN", "swx-wrong")
    assert "unknown token" in complaint(run("workflows"))
    monkeypatch.setenv("SWARMX_TOKEN", server.key("cli-client", "client"))
    end_s = time.monotonic() + 30.0
    while run("workflows").exit_code:  # the server looks at its keys once in a while
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert "needs one of: viewer, operator, admin" in complaint(run("replicas"))


@pytest.mark.process
def test_what_clients_name_is_printed_as_it_is(run: Run, server: Server) -> None:
    body = {"model": "qwen3-8b", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    headers = {
        "authorization": f"Bearer {server.token}",
        "x-swarmx-workflow-id": "odd",
        "x-swarmx-workflow-kind": "[/bold] :bee:",
        "x-swarmx-role": "[/red]",
    }
    request = urllib.request.Request(  # noqa: S310  # loopback
        f"{server.url}/v1/chat/completions", data=json.dumps(body).encode(), headers=headers
    )
    with urllib.request.urlopen(request) as response:  # noqa: S310
        call_id = response.headers["x-swarmx-call-id"]
    assert "[/bold] :bee:" in run("workflows").stdout
    end_s = time.monotonic() + 30.0
    while (result := run("why", call_id)).exit_code:
        assert time.monotonic() < end_s, result.output
        time.sleep(0.05)
    assert "[/red]" in result.stdout


@pytest.mark.process
def test_the_module_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "swarmx", "--version"], capture_output=True, text=True, check=True)
    assert "0.1.0" in result.stdout


def test_help_lists_every_command_with_a_sentence() -> None:
    result = alone("-h")
    assert result.exit_code == 0
    for name, command in main.commands.items():
        assert name in result.stdout
        assert (command.help or "").strip(), name


def test_an_unknown_command_is_told_those_that_there_are() -> None:
    said = complaint(alone("submitt"), status=2)
    assert "No such command 'submitt'" in said
    assert "submit" in said.split("There are:")[1]
    assert "There are: add, list, revoke." in complaint(alone("keys", "ad"), status=2)


def test_without_a_server_commands_say_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWARMX_TOKEN", "x")
    with socket.socket() as taken:  # bound, not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said = complaint(alone("--url", url, "workflows"))
    assert f"nobody answers at {url}. Start a server with `swarmx up`" in said
    assert "is not an address" in complaint(alone("--url", "nonsense", "workflows"))


def test_without_a_token_commands_say_how_to_get_one(tmp_path: Path) -> None:
    said = complaint(alone("--state-dir", str(tmp_path), "workflows"))
    assert "no token: $SWARMX_TOKEN is not set" in said
    assert "swarmx keys add" in said


def test_up_without_replicas_says_how_to_have_some(tmp_path: Path) -> None:
    said = complaint(alone("--state-dir", str(tmp_path / "state"), "up"))
    assert "there are no replicas" in said
    assert "swarmx up --emulated" in said
    assert not (tmp_path / "state").exists()


def test_up_with_bad_settings_names_them(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("[server]\nprot = 1\n")
    assert "unknown setting server.prot. Did you mean 'port'?" in complaint(alone("up", "--config", str(path)))


def test_config_prints_every_setting_with_its_value_and_meaning(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[server]\nport = 4321\n[[replicas]]\nid = "a"\nmodel = "m"\nurl = "http://127.0.0.1:1"\n')
    data = told(alone("--json", "config", "--config", str(path)))
    assert data["server"]["port"] == 4321
    assert data["replicas"][0]["id"] == "a"
    table = alone("config", "--config", str(path)).stdout
    assert "server.port" in table
    assert "4321" in table
    assert "Port to listen on" in table
    path.write_text("[servre]\n")
    assert "Did you mean 'server'?" in complaint(alone("config", "--config", str(path)))


def test_keys_are_added_listed_and_revoked(tmp_path: Path) -> None:
    own = ("--state-dir", str(tmp_path / "state"))
    token = alone(*own, "keys", "add", "ann", "--role", "client", "--tenant", "red").stdout.strip()
    assert token.startswith("swx-")
    assert "\n" not in token
    data = told(alone(*own, "--json", "keys", "add", "bob", "--role", "viewer"))
    assert (data["name"], data["role"], data["tenant"]) == ("bob", "viewer", "default")
    listed = told(alone(*own, "--json", "keys", "list"))
    assert listed == [
        {"name": "ann", "role": "client", "tenant": "red"},
        {"name": "bob", "role": "viewer", "tenant": "default"},
    ]
    table = alone(*own, "keys", "list").stdout
    assert "ann" in table
    assert token not in table
    assert told(alone(*own, "--json", "keys", "revoke", "ann")) == {"revoked": "ann"}
    assert "no key 'ann'; there are: bob" in complaint(alone(*own, "keys", "revoke", "ann"))
    assert "'bob' already" in complaint(alone(*own, "keys", "add", "bob", "--role", "admin"))
    assert "Invalid value for '--role'" in complaint(alone(*own, "keys", "add", "eve", "--role", "king"), status=2)
    assert "use up to 64 letters" in complaint(alone(*own, "keys", "add", "a b", "--role", "admin"))


@contextmanager
def a_journal(tmp_path: Path, name: str = "router") -> Iterator[tuple[Path, list[str]]]:
    """A journal of a router that changed its policy twice, and its lines."""
    agent = RouterAgent()
    path = tmp_path / "j.jsonl"
    journal = FileJournal(path, {name: msgspec.to_builtins(agent.settings)})
    board = Switchboard([agent], epoch=1, journal=journal)
    board.deliver(PolicyChanged(policy="random", parameters={}), 1.0)
    board.deliver(PolicyChanged(policy="nonsense", parameters={}), 2.0)
    journal.close()
    yield path, path.read_text().splitlines(keepends=True)


def test_replay_reproduces_a_good_journal(tmp_path: Path) -> None:
    with a_journal(tmp_path) as (path, _):
        assert "2 steps, 0 dispatches: all reproduced." in alone("replay", str(path)).stdout
        assert told(alone("--json", "replay", str(path))) == {"steps": 2, "decisions": 0, "divergence": None}


def test_replay_shows_where_a_tampered_journal_diverges(tmp_path: Path) -> None:
    with a_journal(tmp_path) as (path, lines):
        path.write_text("".join(lines).replace('"subject":"nonsense"', '"subject":"[/red]"'))
        result = alone("replay", str(path))
        assert result.exit_code == 1
        assert "Step 2 diverges, on PolicyChanged." in result.stdout
        assert "[/red]" in result.stdout
        result = alone("--json", "replay", str(path))
        assert result.exit_code == 1
        assert json.loads(result.stdout)["divergence"]["step"] == 2


def test_replay_leaves_out_a_last_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    with a_journal(tmp_path) as (path, lines):
        path.write_text("".join(lines)[:-9])
        assert told(alone("--json", "replay", str(path)))["steps"] == 1


def test_replay_says_what_is_wrong_with_a_foreign_file(tmp_path: Path) -> None:
    with a_journal(tmp_path) as (path, lines):
        path.write_text(lines[0] + "{}\n")
        assert "line 2: not a journal entry" in complaint(alone("replay", str(path)))
        path.write_text("hello\n")
        assert "does not begin with a journal header" in complaint(alone("replay", str(path)))
        path.write_bytes(b"\x00\xff\n")
        assert "does not begin with a journal header" in complaint(alone("replay", str(path)))
        path.write_text(lines[0].replace("swarmx-journal", "other"))
        assert "is 'other' version" in complaint(alone("replay", str(path)))
    assert "cannot read the journal" in complaint(alone("replay", str(tmp_path / "no")))


def test_replay_of_an_agent_that_it_does_not_know_says_how_to_name_it(tmp_path: Path) -> None:
    with a_journal(tmp_path, name="mine") as (path, _):
        assert "--agent NAME=MODULE:FACTORY" in complaint(alone("replay", str(path)))
        assert "Write NAME=MODULE:FACTORY" in complaint(alone("replay", str(path), "--agent", "nonsense"))


@pytest.mark.process
def test_replay_reproduces_the_journal_of_a_running_server(run: Run, server: Server) -> None:
    told(run("--json", "submit", "-", "--wait", input=INSTANT))
    (path,) = (server.state_dir / "journals").glob("*.jsonl")
    assert told(alone("--json", "replay", str(path)))["divergence"] is None
