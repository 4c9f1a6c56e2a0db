"""A real MCP server for the tests: `python mcp_server.py`, by its pipes or, with a port, by HTTP."""

import asyncio
import os
import sys
import time

from mcp.server import MCPServer

server = MCPServer("tests")


@server.tool()
def add(a: int, b: int) -> int:
    """The sum."""
    return a + b


@server.tool()
def fail(why: str) -> str:
    """Fails."""
    raise ValueError(why)


@server.tool()
async def wait(seconds: float) -> str:
    """Answers late."""
    await asyncio.sleep(seconds)
    return "waited"


@server.tool()
def block(seconds: float) -> str:
    """Hears nothing for a while."""
    time.sleep(seconds)
    return "woke"


@server.tool()
def much(size: int) -> str:
    """A long answer."""
    return "x" * size


@server.tool()
def die() -> str:
    """Never answers."""
    os._exit(3)


@server.tool()
def pid() -> int:
    """Of this process, as it sees itself."""
    return os.getpid()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
