"""Keys: tokens are kept as hashes in a private file, which a running server reads again when it changes."""

from __future__ import annotations

import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest

from swarmx.core.control import Role
from swarmx.core.errors import ConfigError, Forbidden, NotFound, Unauthorized, Unavailable
from swarmx.gateway.keys import RIGHTS, Key, Keyring, Right, write_private


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.json"


def test_a_token_is_its_key(path: Path) -> None:
    ring = Keyring(path)
    token = ring.add("ann", "operator", "red")
    key = ring.check(f"Bearer {token}")
    assert (key.name, key.role, key.tenant) == ("ann", "operator", "red")
    assert ring.check(f"bearer  {token} ") == key


def test_no_token_is_kept(path: Path) -> None:
    token = Keyring(path).add("ann", "client", "red")
    assert token not in path.read_text()
    assert token.removeprefix("swx-") not in path.read_text()


def test_two_tokens_are_never_the_same(path: Path) -> None:
    ring = Keyring(path)
    assert len({ring.add(f"k{number}", "client", "red") for number in range(20)}) == 20


def test_the_file_and_its_folder_are_private(path: Path) -> None:
    Keyring(path).add("ann", "client", "red")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic abc", "swx-abc", "Bearer swx-nobody's"])
def test_anything_else_is_unauthorized(path: Path, header: str | None) -> None:
    ring = Keyring(path)
    ring.add("ann", "client", "red")
    with pytest.raises(Unauthorized, match="swarmx keys add"):
        ring.check(header)


def test_the_hash_of_a_token_is_not_a_token(path: Path) -> None:
    ring = Keyring(path)
    ring.add("ann", "client", "red")
    with pytest.raises(Unauthorized):
        ring.check(f"Bearer {ring.all()[0].sha256}")


def test_a_name_is_taken_once(path: Path) -> None:
    ring = Keyring(path)
    ring.add("ann", "client", "red")
    with pytest.raises(ConfigError, match="'ann' already"):
        ring.add("ann", "admin", "red")


@pytest.mark.parametrize("bad", ["", "a b", "a/b", "a:b", "-a", "x" * 65, "ä"])
def test_names_and_tenants_are_plain(path: Path, bad: str) -> None:
    ring = Keyring(path)
    with pytest.raises(ConfigError, match="name"):
        ring.add(bad, "client", "red")
    with pytest.raises(ConfigError, match="tenant"):
        ring.add("ann", "client", bad)
    assert ring.all() == []


def test_a_revoked_token_is_unknown(path: Path) -> None:
    ring = Keyring(path)
    token = ring.add("ann", "client", "red")
    ring.revoke("ann")
    with pytest.raises(Unauthorized):
        ring.check(f"Bearer {token}")
    with pytest.raises(NotFound, match="no key 'ann'"):
        ring.revoke("ann")


def test_another_process_changes_the_keys_of_a_running_server(path: Path) -> None:
    running, other = Keyring(path), Keyring(path)
    assert running.all() == []
    token = other.add("ann", "client", "red")
    poll(lambda: [key.name for key in running.all()] == ["ann"])
    assert running.check(f"Bearer {token}").name == "ann"
    other.revoke("ann")
    poll(lambda: running.all() == [])
    with pytest.raises(Unauthorized):
        running.check(f"Bearer {token}")


def test_a_deleted_file_means_no_keys(path: Path) -> None:
    ring = Keyring(path)
    ring.add("ann", "client", "red")
    assert ring.all()
    path.unlink()
    poll(lambda: ring.all() == [])


def test_a_broken_file_lets_nobody_in_and_tells_clients_no_paths(path: Path) -> None:
    token = Keyring(path).add("ann", "client", "red")
    path.write_text("{")
    ring = Keyring(path)
    for _ in range(2):
        with pytest.raises(Unavailable, match="the server's log") as caught:
            ring.check(f"Bearer {token}")
        assert str(path) not in str(caught.value)
    with pytest.raises(Unavailable, match=r"keys\.json is not a file of keys"):
        ring.add("eve", "admin", "red")
    assert path.read_text() == "{"


def test_keys_are_listed_by_name(path: Path) -> None:
    ring = Keyring(path)
    for name in ("b", "a", "c"):
        ring.add(name, "client", "red")
    assert [key.name for key in ring.all()] == ["a", "b", "c"]


@pytest.mark.parametrize("role", get_args(Role))
@pytest.mark.parametrize("right", get_args(Right))
def test_a_role_has_its_rights_and_no_others(role: Role, right: Right) -> None:
    key = Key(name="ann", role=role, tenant="red", sha256="")
    if right in RIGHTS[role]:
        key.require(right)
    else:
        with pytest.raises(Forbidden, match=f"'{role}'; this needs one of"):
            key.require(right)


@pytest.mark.parametrize(("role", "sees"), [("client", "red"), ("viewer", None), ("operator", None), ("admin", None)])
def test_only_a_client_is_held_to_its_tenant(role: Role, sees: str | None) -> None:
    assert Key(name="ann", role=role, tenant="red", sha256="").sees == sees


FIRST = """
import os, signal, sys
from pathlib import Path
from swarmx.core import failpoints
from swarmx.gateway import keys

write = keys.write_private

def step(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def written(path, data):
    step()
    write(path, data)
    step()

failpoints.hit, keys.write_private = step, written
for left in range(1, 7):
    path = Path(sys.argv[1], str(left), "keys.json")
    if (child := os.fork()) == 0:
        keys.Keyring(path).add_first()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.process
def test_a_crash_at_any_point_of_the_first_start_leaves_a_token_that_works_after_the_next(tmp_path: Path) -> None:
    """Killed before, between and after any two of its writes; the last one of six is not killed."""
    died = subprocess.run([sys.executable, "-c", FIRST, tmp_path], capture_output=True, text=True, check=True)
    assert died.stdout.split() == ["-9"] * 5 + ["0"], died.stderr
    for folder in tmp_path.iterdir():
        ring = Keyring(folder / "keys.json")
        ring.add_first()
        token = (folder / "admin.token").read_text()
        assert ring.check(f"Bearer {token}").role == "admin", f"died at point {folder.name}"
        assert len(ring.all()) == 1


def test_the_first_key_is_made_once(path: Path) -> None:
    ring = Keyring(path)
    ring.add_first()
    token = path.with_name("admin.token").read_text()
    Keyring(path).add_first()
    assert path.with_name("admin.token").read_text() == token
    assert stat.S_IMODE(path.with_name("admin.token").stat().st_mode) == 0o600


def test_keys_that_are_added_and_revoked_at_once_are_all_counted(path: Path) -> None:
    ring = Keyring(path)
    for number in range(8):
        ring.add(f"old{number}", "client", "red")

    def change(number: int) -> str:
        other = Keyring(path)
        other.all()
        other.revoke(f"old{number}")
        return other.add(f"new{number}", "client", "red")

    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(change, range(8)))
    assert [key.name for key in Keyring(path).all()] == [f"new{number}" for number in range(8)]
    assert [Keyring(path).check(f"Bearer {token}").name for token in tokens] == [f"new{n}" for n in range(8)]


def test_a_private_file_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def poll(holds: object) -> None:
    """Wait until the condition holds: a keyring looks at its file once in a while."""
    assert callable(holds)
    end_s = time.monotonic() + 20.0
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.02)
