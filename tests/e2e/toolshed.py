"""Tools for workflows of a real server: one of every kind, and looks at what their replicas do."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e.fleet import Http, until

POOL = "tools"
_SHELL = "import json,os,sys; os.execv('/bin/sh', ['sh', '-c', json.load(sys.stdin)['s']])"
_PIPES = Path(__file__).parents[1] / "providers/tools/mcp_pipes.py"


@contextmanager
def shed(*, slots: int = 2, web_port: int = 9, secret: str = "") -> Iterator[Path]:
    """A file of tools: `statistics`, `shell` (which must not be called twice), `again` (which may), `private` (of the
    tenant acme), `brief` (which has a second), `web` (loopback, one port), and an MCP server `pipes`.

    Its folder can be read by every user, since the sandbox is not root.
    """
    folder = Path(tempfile.mkdtemp(prefix="swarmx-tools-"))
    try:
        folder.chmod(0o755)
        shutil.copy(_PIPES, folder / "mcp_pipes.py")
        (folder / "statistics_tool.py").write_text(
            "def main(numbers):\n    return {'mean': sum(numbers) / len(numbers)}\n"
        )
        for path in folder.iterdir():
            path.chmod(0o644)
        secret_line = f'secret_headers = {{ x-secret = "{secret}" }}' if secret else ""
        script = 'parameters = {type = "object", properties = {s = {type = "string"}}, required = ["s"]}'
        shells = "".join(
            f"""
[[command]]
name = "{name}"
description = "Runs a script."
argv = ["/usr/bin/python3", "-c", "{_SHELL}"]
{script}
{more}
"""
            for name, more in (
                ("shell", "timeout_s = 120"),
                ("again", "timeout_s = 120\nidempotent = true"),
                ("private", 'tenants = ["acme"]'),
                ("brief", "timeout_s = 1"),
            )
        )
        file = folder / "tools.toml"
        file.write_text(
            f"""
pool = "{POOL}"
slots = {slots}

[[python]]
name = "statistics"
description = "The mean of numbers."
file = "{folder / "statistics_tool.py"}"
parameters = {{type = "object", properties = {{numbers = {{type = "array"}}}}, required = ["numbers"]}}
idempotent = true
{shells}
[[http]]
name = "web"
description = "Asks a server."
hosts = ["127.0.0.1"]
ports = [{web_port}]
schemes = ["http"]
networks = ["127.0.0.0/8"]
{secret_line}

[[mcp]]
name = "pipes"
argv = ["/usr/bin/python3", "-I", "{folder / "mcp_pipes.py"}"]
mounts = ["{folder}"]
only = ["echo", "key"]
"""
        )
        yield file
    finally:
        shutil.rmtree(folder)


def one(tool: str, *, kind: str = "default", **more: Any) -> dict[str, Any]:
    """A workflow of one node, `use`."""
    return {"name": tool, "kind": kind, "nodes": {"use": {"kind": "tool", "tool": tool, **more}}}


async def offered(http: Http, *names: str) -> dict[str, dict[str, Any]]:
    """The tools by name, once these are among them."""

    async def ask() -> dict[str, dict[str, Any]]:
        body = (await http.get("/api/v1/workflow_tools")).body  # a new key is known within a second
        return {tool["name"]: tool for tool in body.get("tools", ())}

    return await until(ask, lambda found: set(names) <= found.keys())


async def counters(http: Http, replica_id: str) -> dict[str, float]:
    """What a replica counts: calls that run and wait, and those that ended, by how."""
    text = (await http.get((await http.replicas())[replica_id]["url"] + "/metrics", token="")).body.decode()
    gauges = re.findall(r"^swarmx_tools:num_requests_(\w+)\{[^}]*\} ([0-9.]+)$", text, re.M)
    ended = re.findall(r'^swarmx_tools:calls_total\{cause="(\w+)"[^}]*\} ([0-9.]+)$', text, re.M)
    return {name: float(value) for name, value in (*gauges, *ended)}
