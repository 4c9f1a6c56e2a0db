"""Control groups by what is in their folders: where they can be made, and what is written and read there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from swarmx.providers.tools import cgroups

_BUSY = 'echo 0 >"$1" || exit 3; i=0; while [ $i -lt 50000 ]; do i=$((i + 1)); done'


def second(mount: Path, group: str, controllers: str) -> tuple[Path, Path]:
    """A tree of version 2 with this process in a group that hands on these controllers; the group, and that file."""
    folder = mount / group
    folder.mkdir(parents=True)
    (folder / "cgroup.subtree_control").write_text(f"{controllers}\n")
    (folder / "cgroup.procs").touch()
    process = mount / "self"
    process.write_text(f"0::/{group}\n")
    return folder, process


def made(parent: Path, name: str, **files: str) -> Path:
    """A group as the kernel fills it when it is made."""
    folder = parent / f"swarmx-tools-{name}"
    folder.mkdir()
    for file, text in files.items():
        (folder / file.replace("_", ".", 1)).write_text(text)
    return folder


def test_version_2_makes_groups_where_memory_and_processes_are_handed_on(tmp_path: Path) -> None:
    folder, process = second(tmp_path, "app.slice/swarmx.service", "cpu memory pids")
    assert cgroups.parents(mount=tmp_path, process=process) == [folder]


def test_version_2_takes_the_group_around_its_own_where_that_one_hands_them_on(tmp_path: Path) -> None:
    parent, process = second(tmp_path, "app.slice", "memory pids")
    (parent / "swarmx.scope").mkdir()
    (parent / "swarmx.scope/cgroup.subtree_control").write_text("\n")
    process.write_text("0::/app.slice/swarmx.scope\n")
    assert cgroups.parents(mount=tmp_path, process=process) == [parent]


@pytest.mark.parametrize("controllers", ["", "cpu", "memory", "pids cpu"])
def test_version_2_without_both_controllers_makes_none(tmp_path: Path, controllers: str) -> None:
    _, process = second(tmp_path, "app.slice", controllers)
    assert cgroups.parents(mount=tmp_path, process=process) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_version_2_that_this_user_may_not_write_makes_none(tmp_path: Path) -> None:
    folder, process = second(tmp_path, "app.slice", "memory pids")
    folder.chmod(0o555)
    assert cgroups.parents(mount=tmp_path, process=process) == []
    folder.chmod(0o755)


def test_version_1_makes_groups_in_each_hierarchy(tmp_path: Path) -> None:
    for name in ("memory", "pids", "cpuacct"):
        (tmp_path / name / "box").mkdir(parents=True)
        (tmp_path / name / "box/cgroup.procs").touch()
    process = tmp_path / "self"
    process.write_text("".join(f"{n}:{name}:/box\n" for n, name in enumerate(("memory", "pids", "cpuacct"), 2)))
    assert cgroups.parents(mount=tmp_path, process=process) == [
        tmp_path / f"{n}/box" for n in ("memory", "pids", "cpuacct")
    ]
    assert cgroups.parents(mount=tmp_path, process=tmp_path / "missing") == []


def test_a_group_of_version_2_is_bounded_joined_and_its_time_is_what_was_added(tmp_path: Path) -> None:
    files = {
        "pids_max": "max",
        "memory_max": "max",
        "memory_swap.max": "max",
        "cpu_stat": "usage_usec 1000000\nuser_usec 1\n",
    }
    folder = made(tmp_path, "1-60000", **files)
    group = cgroups.ControlGroup([tmp_path], "1-60000", memory_bytes=1 << 20, processes=7)
    assert (folder / "pids.max").read_text() == "7"
    assert (folder / "memory.max").read_text() == str(1 << 20)
    assert (folder / "memory.swap.max").read_text() == "0"
    assert group.join == [str(folder / "cgroup.procs")]
    (folder / "cpu.stat").write_text("usage_usec 3500000\nuser_usec 1\n")
    assert group.cpu_s() == pytest.approx(2.5)


def unified() -> Path:
    """A group of version 2 of this machine in which others may be made; skips where there is none."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, place, kind, *_ in mounts:
        if kind == "cgroup2" and os.access(place, os.W_OK):
            return Path(place)
    pytest.skip("no hierarchy of version 2 may be written here")


@pytest.mark.process
def test_a_real_group_of_version_2_takes_processes_and_counts_their_time() -> None:
    try:
        group = cgroups.ControlGroup([unified()], f"{os.getpid()}-2", memory_bytes=1 << 28, processes=8)
    except OSError as error:
        pytest.skip(f"no group may be made here: {error}")
    try:
        (join,) = group.join
        done = subprocess.run(["/bin/sh", "-c", _BUSY, "sh", join], capture_output=True, text=True, check=False)
        if done.returncode == 3:
            pytest.skip(f"no process may join a group here: {done.stderr}")
        assert group.cpu_s() > 0.0
    finally:
        group.remove()
    assert not Path(join).parent.exists()


def test_what_a_replica_that_was_killed_left_is_taken_away(tmp_path: Path) -> None:
    gone = made(tmp_path, "4194303-1")  # above the largest pid
    here = made(tmp_path, f"{os.getpid()}-1")
    cgroups.sweep([tmp_path])
    assert (gone.exists(), here.exists()) == (False, True)
