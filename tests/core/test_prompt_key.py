from __future__ import annotations

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from swarmx.core.prompt_key import prompt_key

SYSTEM = "You are the planner."
JOB = "Write a parser for INI files.\nKeep comments."


def test_the_key_is_the_head_of_a_sha256_over_system_and_job() -> None:
    assert prompt_key(SYSTEM, JOB) == sha256(f"{SYSTEM}\x1f{JOB}".encode()).hexdigest()[:16]


def test_what_follows_the_first_blank_line_does_not_change_the_key() -> None:
    assert prompt_key(SYSTEM, f"{JOB}\n\nNotes of the last step:\n\n- none") == prompt_key(SYSTEM, JOB)


def test_a_single_line_break_stays_inside_the_first_paragraph() -> None:
    assert prompt_key(SYSTEM, JOB) != prompt_key(SYSTEM, JOB.split("\n", maxsplit=1)[0])


def test_space_around_the_job_does_not_change_the_key() -> None:
    assert prompt_key(SYSTEM, f"\n\n  {JOB} \n\nrest") == prompt_key(SYSTEM, JOB)


def test_the_border_between_system_and_job_changes_the_key() -> None:
    assert prompt_key("ab", "c") != prompt_key("a", "bc")


@given(system=st.text(), user=st.text())
def test_any_text_gives_sixteen_hex_digits(system: str, user: str) -> None:
    key = prompt_key(system, user)
    assert len(key) == 16
    assert set(key) <= set("0123456789abcdef")
