"""What programs in the sandbox cannot do, as the user of the tests and as nobody; and that nothing runs without one."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from swarmx.core.errors import ConfigError
from swarmx.core.toolbox import ToolResult
from swarmx.providers.tools import seccomp
from swarmx.providers.tools.jail import Jail
from swarmx.providers.tools.programs import ProgramProvider
from swarmx.providers.tools.settings import CommandTool, PythonTool
from swarmx.providers.tools.toolbox import Toolbox
from tests.providers.tools.workshop import a_call, needs_sandbox, running, until

pytestmark = pytest.mark.process
# ruff: noqa: S108  # paths inside of sandboxes


def shell(name: str = "shell", **more: Any) -> CommandTool:
    """A tool that runs what the argument `script` says: the workflow's author is as hostile as can be."""
    argv = (
        "/usr/bin/python3",
        "-c",
        "import json,os,sys; os.execv('/bin/sh', ['sh', '-c', json.load(sys.stdin)['s']])",
    )
    return CommandTool(name=name, description="", argv=argv, **{"timeout_s": 30.0, **more})


async def opened(*tools: CommandTool | PythonTool, slots: int = 2) -> Toolbox:
    toolbox = Toolbox([ProgramProvider(tools, pool="tools", jail=Jail(slots=slots))])
    await toolbox.open()
    assert toolbox.refused == {}
    return toolbox


@pytest.fixture
async def jailed() -> AsyncIterator[Any]:
    """Runs a script in a sandbox of its own, with the bounds that are given."""
    toolboxes = []

    async def run(script: str, **more: Any) -> ToolResult:
        toolboxes.append(await opened(shell(**more)))
        return await toolboxes[-1].call(a_call("shell", s=script))

    yield run
    for toolbox in toolboxes:
        await toolbox.close()


@needs_sandbox
@pytest.mark.parametrize("path", ["/etc/shadow", "/etc/passwd", "/root/.ssh", "/home", "/work", "/var", "/sys", "/run"])
async def test_files_of_the_host_are_not_there(jailed: Any, path: str) -> None:
    result = await jailed(f"ls {path}")
    assert result.cause == "tool"
    assert "No such file" in result.error


@needs_sandbox
async def test_the_environment_is_its_own_and_so_is_that_of_its_init(
    jailed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWARMX_TOOLS_TOKEN", "canary-4711")
    result = await jailed("env; cat /proc/1/environ /proc/self/environ /proc/*/environ 2>/dev/null || true")
    assert "SWARMX_IDEMPOTENCY_KEY=wf/n" in result.output
    for secret in ("canary", "TOKEN", "HOME=/root", "USER"):
        assert secret not in result.output


@needs_sandbox
async def test_it_sees_no_process_but_its_own(jailed: Any) -> None:
    result = await jailed("ls /proc | grep -c '^[0-9]'; ls /proc/" + str(os.getpid()))
    assert "No such file" in result.error


@needs_sandbox
@pytest.mark.parametrize("address", ["169.254.169.254:80", "127.0.0.1:1", "10.0.0.1:443", "1.1.1.1:53"])
async def test_there_is_no_network(jailed: Any, address: str) -> None:
    host, port = address.split(":")
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    if host == "127.0.0.1":
        port = str(server.sockets[0].getsockname()[1])
    result = await jailed(f"python3 -c \"import socket; socket.create_connection(('{host}', {port}), 3)\"")
    server.close()
    assert result.cause == "tool"
    assert "unreachable" in result.error or "refused" in result.error


@needs_sandbox
async def test_abstract_sockets_of_the_host_are_out_of_reach(jailed: Any) -> None:
    name = f"\0swarmx-test-{uuid.uuid4().hex}"
    server = await asyncio.start_unix_server(lambda reader, writer: writer.close(), path=name)
    python = f"import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + '{name[1:]}')"
    result = await jailed(f'python3 -c "{python}"')
    server.close()
    assert "refused" in result.error


@needs_sandbox
@pytest.mark.parametrize("path", ["/", "/usr", "/usr/bin", "/dev", "/etc", "/proc", "/proc/sys/kernel"])
async def test_nothing_can_be_written_outside_of_its_scratch(jailed: Any, path: str) -> None:
    result = await jailed(f"touch {path}/swarmx-escaped")
    assert result.cause == "tool"
    assert not (Path(path) / "swarmx-escaped").exists()


@needs_sandbox
async def test_scratch_is_fresh_for_each_call_and_never_the_hosts(jailed: Any) -> None:
    name = f"swarmx-{uuid.uuid4().hex}"
    first = await jailed(f"echo here > /tmp/{name}; echo x > /dev/shm/{name}; cat /tmp/{name}")
    second = await jailed("ls -A /tmp /dev/shm")
    assert first.output == "here\n"
    assert name not in second.output
    assert not Path(f"/tmp/{name}").exists()
    assert not Path(f"/dev/shm/{name}").exists()


@needs_sandbox
async def test_a_symbolic_link_leads_nowhere_outside(jailed: Any) -> None:
    result = await jailed("ln -s /etc/shadow /tmp/link; ln -s /proc/1/root /tmp/host; cat /tmp/link; ls /tmp/host/root")
    assert result.cause == "tool"
    assert "root:" not in result.error


@needs_sandbox
async def test_no_privilege_is_left_or_to_be_had(jailed: Any) -> None:
    result = await jailed(
        "id -u; grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; unshare -Ur true; mount -t tmpfs x /tmp; true"
    )
    assert result.output.split() == ["1000", "CapEff:", "0" * 16, "CapBnd:", "0" * 16, "NoNewPrivs:", "1"]


@needs_sandbox
async def test_system_calls_that_no_tool_needs_are_refused(jailed: Any) -> None:
    if not seccomp.program():
        pytest.skip("the numbers of this machine's system calls are not known")
    numbers = {"x86_64": (248, 425, 101), "aarch64": (217, 425, 117)}[platform.machine()]  # add_key, io_uring, ptrace
    python = "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True)\n"
    python += "for n in map(int, sys.argv[1:]): print(libc.syscall(n, 0, 0, 0, 0, 0), ctypes.get_errno())"
    result = await jailed(f"grep Seccomp: /proc/self/status; python3 -c '{python}' {' '.join(map(str, numbers))}")
    assert result.output.split() == ["Seccomp:", "2", *(["-1", "1"] * 3)]


def test_a_machine_without_known_numbers_has_no_filter_and_others_have_whole_steps() -> None:
    assert seccomp.program("riscv64") == b""
    for machine in ("x86_64", "aarch64"):
        assert len(seccomp.program(machine)) % 8 == 0


@needs_sandbox
async def test_a_fork_bomb_hits_its_bound_and_is_ended(jailed: Any) -> None:
    marker = uuid.uuid4().hex
    bomb = f"""python3 -c "
import os, time  # {marker}
most = 0
while True:
    try:
        if os.fork() == 0:
            time.sleep(600)
    except OSError:
        print(most)
        break
    most += 1
" """
    result = await jailed(bomb, processes=20)
    assert int(result.output) < 20
    assert running(marker) == []


@needs_sandbox
async def test_who_moves_to_a_session_of_its_own_ends_with_the_call(jailed: Any) -> None:
    marker = uuid.uuid4().hex
    inner = f"import time; time.sleep(600)  # {marker}"
    result = await jailed(
        f"setsid nohup python3 -c '{inner}' >/dev/null 2>&1 & setsid python3 -c '{inner}' & echo done"
    )
    assert result.output == "done\n"
    assert running(marker) == []


@needs_sandbox
async def test_a_memory_hog_is_stopped(jailed: Any) -> None:
    result = await jailed("python3 -c 'x = bytearray(400_000_000)'", memory_mb=100)
    assert result.cause in ("tool", "limit")
    assert "MemoryError" in result.error or "killed" in result.error


@needs_sandbox
async def test_many_processes_together_hold_no_more_memory_than_one_may(jailed: Any) -> None:
    jail = Jail(slots=1)
    await jail.open()
    await jail.close()
    if not jail.grouped:
        pytest.skip("control groups cannot be made here: memory is bounded for each process only")
    hog = "python3 -c 'import time; x = bytearray(60_000_000); time.sleep(3); print(1)'"
    hogs = f"for i in 1 2 3 4; do {hog} & done; wait"
    result = await jailed(hogs, memory_mb=100)
    assert result.cause != "" or result.output.count("1") < 4


@needs_sandbox
@pytest.mark.parametrize("where", ["/tmp/x", "/dev/shm/x"])
async def test_scratch_has_a_size(jailed: Any, where: str) -> None:
    fill = (
        f"dd if=/dev/zero of={where} bs=1M count=3 2>/dev/null; dd if=/dev/zero of={where}2 bs=1M count=3 2>/dev/null"
    )
    result = await jailed(f"{fill}; du -ks {where[:-2]} | cut -f1", file_mb=2)
    assert int(result.output.split()[-1]) <= 2 * 1024


@needs_sandbox
async def test_processors_time_is_bounded(jailed: Any) -> None:
    result = await jailed("exec python3 -c 'while True: pass'", cpu_s=1)
    assert result.cause == "limit"
    assert "processors' time" in result.error or "killed" in result.error


@needs_sandbox
@pytest.mark.parametrize("to", ["1", "2"])
async def test_a_flood_of_output_is_cut_and_its_source_ended(jailed: Any, to: str) -> None:
    marker = uuid.uuid4().hex
    result = await jailed(f"exec yes {marker} >&{to}", result_limit_bytes=10_000)
    assert result.cause == "limit"
    assert running(marker) == []


@needs_sandbox
async def test_a_late_tool_is_ended_and_leaves_nothing(jailed: Any) -> None:
    marker = uuid.uuid4().hex
    result = await jailed(f"python3 -c 'import time; time.sleep(600)  # {marker}' & sleep 600", timeout_s=1.0)
    assert result.cause == "timeout"
    assert running(marker) == []


@needs_sandbox
async def test_cancelling_at_any_moment_leaves_no_process() -> None:
    toolbox = await opened(shell())
    marker = uuid.uuid4().hex
    for wait_s in (0.0, 0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.3):
        task = asyncio.create_task(toolbox.call(a_call("shell", s=f"sleep 600; : {marker}")))
        await asyncio.sleep(wait_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert running(marker) == []
        assert [pid for pid in running("bwrap") if os.getpid() in parents_of(pid)] == []
    assert (await toolbox.call(a_call("shell", s="echo well"))).output == "well\n"
    await toolbox.close()


def parents_of(pid: int) -> set[int]:
    found = set()
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            break
        found.add(pid)
    return found


@needs_sandbox
async def test_no_descriptor_is_left_over() -> None:
    toolbox = await opened(shell())
    await toolbox.call(a_call("shell", s="true"))
    before = len(os.listdir("/proc/self/fd"))
    for script in ("true", "exit 3", "yes"):
        await toolbox.call(a_call("shell", s=script))
    assert len(os.listdir("/proc/self/fd")) == before
    await toolbox.close()


@needs_sandbox
async def test_what_a_killed_replica_left_running_ends_with_it(tmp_path: Path) -> None:
    marker = uuid.uuid4().hex
    program = textwrap.dedent(f"""
        import asyncio
        from swarmx.providers.tools.jail import Jail
        from swarmx.providers.tools.profile import Limits, Program
        async def main():
            jail = Jail(slots=1)
            await jail.open()
            program = Program(argv=["/bin/sh", "-c", "sleep 600; : {marker}"], limits=Limits())
            print("starts", flush=True)
            async with jail.running(program) as inmate:
                await inmate.wait()
        asyncio.run(main())
    """)
    for wait_s in (0.0, 0.01, 0.03, 0.1):
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        assert await process.stdout.readline() == b"starts\n"
        await until(lambda: len(running(f": {marker}")) > 0)
        await asyncio.sleep(wait_s)
        process.kill()
        await process.wait()
        await until(lambda: programs(marker) == [])
    await (await opened(shell())).close()  # takes away sandboxes that were being made
    await until(lambda: running(f": {marker}") == [])


def programs(marker: str) -> list[int]:
    """What runs in sandboxes, without the sandboxes."""
    found = []
    for pid in running(f": {marker}"):
        with suppress(OSError):
            if not os.readlink(f"/proc/{pid}/exe").endswith("bwrap"):
                found.append(pid)
    return found


@needs_sandbox
async def test_two_jails_of_one_host_share_no_user() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has users to spare")
    marker = uuid.uuid4().hex
    toolboxes = [await opened(shell()), await opened(shell())]
    calls = [asyncio.create_task(box.call(a_call("shell", s=f"sleep 600; : {marker}"))) for box in toolboxes * 2]
    await until(lambda: len(set(sleepers(marker))) == 4)  # a shell that forks is seen twice for a moment
    assert 0 not in sleepers(marker)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    for toolbox in toolboxes:
        await toolbox.close()


def sleepers(marker: str) -> list[int]:
    """The users of the shells that run a script with the marker."""
    return [Path(f"/proc/{pid}").stat().st_uid for pid in running(f"sh\0-c\0sleep 600; : {marker}")]


AS_NOBODY = """
import asyncio, os, subprocess
from swarmx.providers.tools.jail import Jail
from swarmx.providers.tools.profile import Limits, Program
from swarmx.providers.tools.pipes import read_some

async def run(jail, script):
    program = Program(argv=["/bin/sh", "-c", script], limits=Limits(processes=10))
    async with jail.running(program) as inmate:
        said = b""
        while chunk := await read_some(inmate.stdout):
            said += chunk
        await inmate.wait()
    return said.decode().strip()

async def main():
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(30)]
    jail = Jail(slots=1)
    await jail.open()
    print(await run(jail, "id -u"))
    print(await run(jail, "cat /etc/shadow /root/.ssh/* 2>/dev/null; touch /usr/x /x 2>/dev/null; echo nothing"))
    print(await run(jail, '''python3 -c "import socket; print(socket.socket().connect_ex(('1.1.1.1', 53)))"'''))
    bomb = "i=0; while [ $i -lt 40 ]; do sleep 30 & i=$((i+1)); done 2>/dev/null"
    print(await run(jail, bomb + "; ls /proc | grep -c '^[0-9]'"))
    await jail.close()
    for other in others:
        other.kill()
        other.wait()

asyncio.run(main())
"""


@needs_sandbox
async def test_the_same_holds_for_a_replica_that_is_not_root() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AS_NOBODY), stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[3]
    )
    said, _ = await process.communicate()
    user_id, files, network, processes = said.decode().split("\n")[:4]
    assert user_id == "1000"
    assert files == "nothing"
    assert network == "101"  # unreachable
    assert int(processes or 0) <= 12


async def test_without_bubblewrap_the_tools_are_refused_by_name_and_nothing_runs(tmp_path: Path) -> None:
    made = tmp_path / "made"
    tool = CommandTool(name="toucher", description="", argv=("/usr/bin/touch", str(made)))
    toolbox = Toolbox([ProgramProvider([tool], pool="tools", jail=Jail(slots=1, bwrap="no-such-bwrap"))])
    await toolbox.open()
    assert toolbox.tools() == []
    result = await toolbox.call(a_call("toucher"))
    assert result.cause == "refused"
    assert "toucher is not offered here" in result.error
    assert "install bubblewrap" in result.error
    assert not made.exists()
    await toolbox.close()


async def test_a_bubblewrap_that_fails_is_as_good_as_none() -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv: that is what is refused first")
    with tempfile.TemporaryDirectory() as folder:
        fake = Path(folder) / "bwrap"
        fake.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
        for path in (Path(folder), fake):
            path.chmod(0o755)  # for the spare user too
        with pytest.raises(ConfigError, match="No permissions to create new namespace"):
            await Jail(slots=1, bwrap=str(fake)).open()
