"""Sessions of the web page: random, bounded, ending; and how many wrong tokens an address may try."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from swarmx.core.errors import Forbidden, Unauthorized, Unavailable
from swarmx.gateway.keys import Key, Keyring
from swarmx.gateway.sessions import LIFETIME_S, FailedLogins, Sessions


@dataclass(slots=True)
class Stopped:
    at_s: float = 1000.0

    def now_s(self) -> float:
        return self.at_s


@pytest.fixture
def keys(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys.json")


def a_key(keys: Keyring, name: str = "ann") -> Key:
    return keys.check(f"Bearer {keys.add(name, 'operator', 'red')}")


def test_a_session_finds_its_key(keys: Keyring) -> None:
    sessions, key = Sessions(keys, Stopped()), a_key(keys)
    session_id = sessions.begin(key)
    session, found = sessions.find(session_id)
    assert found == key
    assert session.csrf not in session_id
    assert sessions.find(session_id)[0] is session


def test_two_sessions_share_nothing(keys: Keyring) -> None:
    sessions, key = Sessions(keys, Stopped()), a_key(keys)
    first, second = sessions.begin(key), sessions.begin(key)
    assert first != second
    assert sessions.find(first)[0].csrf != sessions.find(second)[0].csrf


@pytest.mark.parametrize("session_id", [None, "", "guess"])
def test_anything_else_is_no_session(keys: Keyring, session_id: str | None) -> None:
    sessions = Sessions(keys, Stopped())
    sessions.begin(a_key(keys))
    with pytest.raises(Unauthorized):
        sessions.find(session_id)


def test_a_session_ends_when_its_time_is_over_and_makes_room(keys: Keyring) -> None:
    clock = Stopped()
    sessions, key = Sessions(keys, clock), a_key(keys)
    session_id = sessions.begin(key)
    clock.at_s += LIFETIME_S - 1.0
    sessions.find(session_id)
    clock.at_s += 1.0
    with pytest.raises(Unauthorized):
        sessions.find(session_id)
    sessions.begin(key)
    assert len(sessions) == 1


def test_a_session_ends_when_it_is_ended(keys: Keyring) -> None:
    sessions = Sessions(keys, Stopped())
    session_id = sessions.begin(a_key(keys))
    sessions.end(session_id)
    sessions.end(session_id)
    with pytest.raises(Unauthorized):
        sessions.find(session_id)


def test_a_session_ends_with_its_key(keys: Keyring) -> None:
    sessions = Sessions(keys, Stopped())
    session_id = sessions.begin(a_key(keys))
    keys.revoke("ann")
    with pytest.raises(Unauthorized, match="revoked"):
        sessions.find(session_id)
    assert len(sessions) == 0


def test_keys_that_cannot_be_read_are_told_without_their_path(keys: Keyring, tmp_path: Path) -> None:
    sessions = Sessions(keys, Stopped())
    session_id = sessions.begin(a_key(keys))
    keys.revoke("ann")  # the file is looked at again at once
    (tmp_path / "keys.json").write_text("broken")
    with pytest.raises(Unavailable) as caught:
        sessions.find(session_id)
    assert str(tmp_path) not in str(caught.value)


def test_the_oldest_session_makes_room(keys: Keyring) -> None:
    sessions, key = Sessions(keys, Stopped()), a_key(keys)
    ids = [sessions.begin(key) for _ in range(1001)]
    assert len(sessions) == 1000
    with pytest.raises(Unauthorized):
        sessions.find(ids[0])
    sessions.find(ids[1])


def test_ten_wrong_tokens_close_the_door_to_that_address_for_five_minutes() -> None:
    clock = Stopped()
    failed = FailedLogins(clock)
    for _ in range(10):
        failed.check("10.0.0.1")
        failed.count("10.0.0.1")
    with pytest.raises(Forbidden, match="too many"):
        failed.check("10.0.0.1")
    failed.check("10.0.0.2")
    clock.at_s += 300.0
    failed.check("10.0.0.1")


def test_addresses_are_forgotten_so_that_memory_stays_bounded() -> None:
    failed = FailedLogins(Stopped())
    for _ in range(10):
        failed.count("first")
    for number in range(1000):
        failed.count(f"address-{number}")
    failed.check("first")
