"""How bubblewrap is called: the root, limits and user that a program gets, and the gate before its beginning."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from swarmx.core.errors import ConfigError

_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
HOSTNAME = "swarmx-sandbox"
STDIN = "/stdin"
OWN_PROCESSES = 2  # bubblewrap outside, and its init inside
INSTALL = "install bubblewrap 0.8 or newer (`make sandbox`, or `apt-get install bubblewrap`) and util-linux"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one call may use. `memory_bytes` and `processes` bound all its processes together where control groups can
    be made; elsewhere memory is bounded for each process, and processes for each user.
    """

    memory_bytes: int = 512 * 1024 * 1024
    cpu_s: int = 60
    processes: int = 64
    open_files: int = 256
    file_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What is run: `argv` as seen inside, `files` and folders (`mounts`) that are laid into the root, read only.

    `stdin` is all that it can read, or None for a pipe.
    """

    argv: Sequence[str]
    limits: Limits
    stdin: bytes | None = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    mounts: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def command(program: Program, *, bwrap: str, laid: Sequence[str], user: int | None, groups: Sequence[str]) -> list[str]:
    """The whole command line. `laid` are the arguments of files that are laid into the root, `groups` the control
    groups to join, `user` whom to run as instead of root.
    """
    return [
        *_entry(groups),
        *_as_user(user),
        bwrap,
        *_profile(program),
        *laid,
        *("--remount-ro", "/", "--"),
        *_bounded(program.limits),
        *gate(program.stdin is not None),
        *program.argv,
    ]


def found(name: str) -> str:
    """Where a program of the host is. Raises ConfigError when it is not."""
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"programs are not run here without a sandbox, and there is no {name}: {INSTALL}")
    return path


def _entry(groups: Sequence[str]) -> list[str]:
    """Join control groups before anything else is done."""
    if not groups:
        return []
    script = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 125; shift; done; shift; exec "$@"'
    return ["/bin/sh", "-c", script, "sandbox", *groups, "--"]


def _as_user(user: int | None) -> list[str]:
    """Not as root: the kernel does not bound root's processes."""
    if user is None:
        return []
    return [found("setpriv"), f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"]


def _bounded(limits: Limits) -> list[str]:
    """Set inside: outside, the bound on processes would count all that the user has on this host."""
    return [
        "/usr/bin/prlimit",
        f"--as={limits.memory_bytes}",
        f"--cpu={limits.cpu_s}",
        f"--nproc={limits.processes + OWN_PROCESSES}",
        f"--nofile={limits.open_files}",
        f"--fsize={limits.file_bytes}",
        "--core=0",
        "--",
    ]


def gate(given: bool) -> list[str]:
    """Wait for a word before the program begins.

    Bubblewrap binds the life of a sandbox to that of its parent, but only once it is at work: a parent that is killed
    right after it started a sandbox would leave it behind for ever. Whoever says the word is alive when all is bound;
    if nobody does, the sandbox ends. `given` standard input is a file, otherwise it is what follows the word.
    """
    return ["/bin/sh", "-c", f'echo; read go || exit 125; exec "$@"{f" <{STDIN}" if given else ""}', "gate"]


def _profile(program: Program) -> list[str]:
    """The arguments of bubblewrap, but for the files and the program."""
    scratch = ["--size", str(program.limits.file_bytes), "--tmpfs"]
    arguments = [
        "--unshare-all", "--unshare-user", "--disable-userns",
        "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--uid", "1000", "--gid", "1000", "--hostname", HOSTNAME,
        "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp",  # noqa: S108
        "--setenv", "LANG", "C.UTF-8",
        "--ro-bind", "/usr", "/usr",
        "--proc", "/proc", "--dev", "/dev", *scratch, "/dev/shm", "--remount-ro", "/dev",  # noqa: S108
        *scratch, "/tmp", "--chdir", "/tmp",  # noqa: S108
    ]  # fmt: skip
    for name in _SYSTEM:
        host = Path("/") / name
        if host.is_symlink():
            arguments += ["--symlink", os.readlink(host), str(host)]
        elif host.is_dir():
            arguments += ["--ro-bind", str(host), str(host)]
    for path in ("/etc/ld.so.cache", "/etc/alternatives"):
        arguments += ["--ro-bind-try", path, path]
    for mount in program.mounts:
        arguments += ["--ro-bind", str(mount), str(mount)]
    for name, value in program.environment.items():
        arguments += ["--setenv", name, value]
    return arguments
