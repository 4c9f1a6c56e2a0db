"""The pages for clients are programs that run as they stand, and nothing that they do leaves the machine."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from tests.e2e.fleet import Http, Server

ROOT = Path(__file__).parents[2]
AGENTS = ROOT / ".venv-agents" / "bin" / "python"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
# Ahead of a page's program: a connection that leaves the machine ends it, whoever would have caught an error.
FENCE = """
import os, socket
def _fenced(connect):
    def inside(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            print("tried to reach", address, flush=True)
            os._exit(9)
        return connect(self, address)
    return inside
def _named(host, *more, _found=socket.getaddrinfo, **rest):
    if host not in ("127.0.0.1", "::1", "localhost", None):
        print("tried to find", host, flush=True)
        os._exit(9)
    return _found(host, *more, **rest)
socket.socket.connect = _fenced(socket.socket.connect)
socket.socket.connect_ex = _fenced(socket.socket.connect_ex)
socket.getaddrinfo = _named
"""

pytestmark = pytest.mark.process


async def run(page: str, server: Server, folder: Path, *, python: Path | str = sys.executable) -> str:
    """What the program of the page prints; AssertionError with its traceback if it fails."""
    program = folder / "program.py"
    program.write_text("\n".join([FENCE, *BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))]))
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": server.token,
        "SWARMX_URL": server.url,
        "SWARMX_TOKEN": server.token,
        "LANGSMITH_TRACING": "false",
    }
    process = await asyncio.create_subprocess_exec(
        python, program, cwd=folder, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-3000:]
    return output.decode()


async def test_the_program_of_the_python_client_runs(server: Server, http: Http, tmp_path: Path) -> None:
    output = await run("clients.md", server, tmp_path)
    assert "finished [('sights', 'finished'), ('plan', 'finished')]" in output
    assert re.search(r"^1 Submitted $", output, re.M)
    assert re.search(r"^\d+ NodeFinished plan$", output, re.M)
    assert "finished after a signal" in output
    assert "cancelled as it was asked to be" in output
    assert re.search(r"^422 ", output, re.M)
    assert "3 plans" in output


async def test_a_langgraph_program_runs_unchanged_and_its_calls_are_one_workflow(
    server: Server, http: Http, tmp_path: Path
) -> None:
    output = await run("langgraph.md", server, tmp_path)
    assert "human []" in output
    assert re.search(r"^ai \['(distance_km|weather)'\]$", output, re.M), "the emulated model called a tool"
    assert re.search(r"^ai \[\]$", output, re.M), "and answered in words in the end"
    assert re.search(r"^travel \d+ calls$", output, re.M)


@pytest.mark.skipif(not AGENTS.exists(), reason="there is no .venv-agents; `make setup-agents` makes it")
async def test_an_agent_of_the_openai_sdk_runs_unchanged_and_phones_nobody(
    server: Server, http: Http, tmp_path: Path
) -> None:
    output = await run("openai_agents.md", server, tmp_path, python=AGENTS)
    assert "tool_call_item" in output
    assert "message_output_item" in output
    assert "raw_response_event" in output
    page = await http.get("/api/v1/workflows", params={"limit": 200})
    rows = [row for row in page.body["workflows"] if row["kind"] == "travel"]
    assert any(row["workflow_id"].startswith("default:trip-") for row in rows)
