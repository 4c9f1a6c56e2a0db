"""A check of the audit log tells apart what can be done to a file, and keeps quiet about a sound one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmx.core.audit import (
    GENESIS,
    MAX_ARGUMENTS_BYTES,
    MAX_DETAIL,
    MAX_TEXT,
    AuditEntry,
    AuditRecord,
    Head,
    bounded,
    canonical,
    check,
    head_of,
    line_of,
    read_line,
    seal,
)
from swarmx.core.control import Actor, Change, Evidence

slowly = settings(deadline=None)  # a busy machine is no failure
OPERATOR = Actor(type="key", name="ops", role="operator")


def intent(number: int, **changes: Any) -> AuditEntry:
    entry = AuditEntry(
        kind="intent", actor=OPERATOR, via="cli", tool="scale_model", arguments={"model": "coder", "replicas": number}
    )
    return msgspec.structs.replace(entry, **changes)


def note(number: int) -> AuditEntry:
    return intent(number, kind="note")


def chained(entries: Sequence[AuditEntry], *, after: Head | None = None) -> list[AuditRecord]:
    prev, first = (GENESIS, 1) if after is None else (after.hash, after.seq + 1)
    records = []
    for seq, entry in enumerate(entries, start=first):
        records.append(seal(entry, seq=seq, at_s=100.0 + seq, prev=prev))
        prev = records[-1].hash
    return records


RECORDS = chained([note(number) for number in range(1, 13)])
LINES = [line_of(record) for record in RECORDS]
HEADS = [Head(seq=0, hash=GENESIS, at_s=99.0), *(head_of(RECORDS[seq - 1]) for seq in (4, 8, 12))]
EMPTY_HEAD = HEADS[:1]


def split(data: bytes) -> list[bytes]:
    """The lines as a file gives them: they end at \\n alone."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def verdicts(lines: Sequence[bytes], heads: Sequence[Head] = HEADS) -> list[tuple[str, int]]:
    return [(finding.verdict, finding.seq) for finding in check(lines, heads).findings]


def test_a_sound_log_has_no_findings_and_names_its_heads() -> None:
    report = check(LINES, HEADS)
    assert report.findings == ()
    assert report.sound
    assert report.records == 12
    assert report.last == head_of(RECORDS[-1])
    assert report.head == HEADS[-1]


def test_an_empty_log_is_sound() -> None:
    assert check([], HEADS[:1]).sound
    assert check([], []).sound


def test_records_after_the_last_head_are_sound_but_not_covered() -> None:
    report = check(LINES, HEADS[:3])
    assert report.sound
    assert report.head == HEADS[2]
    assert report.last.seq == 12


@slowly
@given(position=st.integers(0, sum(map(len, LINES)) - 1), change=st.integers(1, 255))
def test_a_changed_byte_is_found_where_it_is(position: int, change: int) -> None:
    data = bytearray(b"".join(LINES))
    seq = data[:position].count(b"\n") + 1
    data[position] ^= change
    found = verdicts(split(bytes(data)))
    assert {verdict for verdict, _ in found} <= {"altered", "unreadable"}
    assert found[0][1] == seq
    assert len(found) <= 2  # a byte that became a line end makes two bad lines of one


@slowly
@given(position=st.integers(0, sum(map(len, LINES)) - 1), change=st.integers(1, 255))
def test_a_changed_byte_does_not_pass_without_heads_either(position: int, change: int) -> None:
    data = bytearray(b"".join(LINES))
    data[position] ^= change
    found = {verdict for verdict, _ in verdicts(split(bytes(data)), HEADS[:1])}
    assert found <= {"altered", "unreadable", "torn"}
    assert found
    assert ("torn" in found) == (data[-1] != ord("\n"))


@pytest.mark.parametrize("seq", range(1, 13))
def test_a_changed_line_end_is_one_bad_line(seq: int) -> None:
    data = b"".join([*LINES[: seq - 1], LINES[seq - 1][:-1] + b"#", *LINES[seq:]])
    assert verdicts(split(data)) == [("unreadable" if seq < 12 else "altered", seq)]


def test_what_stands_after_a_bad_line_is_checked_as_before() -> None:
    bad = b"?\n"
    assert verdicts([LINES[0], bad, *LINES[2:5], *LINES[6:]]) == [("unreadable", 2), ("missing", 6)]
    late = [LINES[0], LINES[2], bad, LINES[1], *LINES[4:]]
    assert verdicts(late) == [("unreadable", 4), ("reordered", 2)]


def test_a_record_that_is_moved_and_changed_is_both() -> None:
    forged = line_of(seal(note(99), seq=5, at_s=1.0, prev=RECORDS[3].hash))
    assert verdicts([*LINES[:4], LINES[5], forged, *LINES[6:]]) == [("reordered", 5), ("altered", 5)]


@slowly
@given(first=st.integers(1, 11), count=st.integers(1, 11))
def test_a_cut_out_middle_is_missing(first: int, count: int) -> None:
    last = min(first + count - 1, 11)
    assert verdicts([*LINES[: first - 1], *LINES[last:]]) == [("missing", first)]


@slowly
@given(kept=st.integers(1, 11))
def test_a_tail_that_is_cut_off_at_a_line_is_found_by_a_head(kept: int) -> None:
    assert verdicts(LINES[:kept]) == [("tail_cut", kept + 1)]


@slowly
@given(position=st.integers(len(LINES[0]), sum(map(len, LINES)) - 1))
def test_a_tail_that_is_cut_off_anywhere_is_found_by_a_head(position: int) -> None:
    data = b"".join(LINES)[:position]
    assert verdicts(split(data)) == [("tail_cut", data.count(b"\n") + 1)]


def test_a_log_that_is_gone_is_found_by_a_head() -> None:
    assert verdicts([]) == [("gone", 1)]


@slowly
@given(pair=st.lists(st.integers(0, 11), min_size=2, max_size=2, unique=True))
def test_two_swapped_records_are_reordered(pair: list[int]) -> None:
    lines = list(LINES)
    a, b = sorted(pair)
    lines[a], lines[b] = lines[b], lines[a]
    found = verdicts(lines)
    assert {verdict for verdict, _ in found} == {"reordered"}
    assert all(a + 1 <= seq <= b for _, seq in found)
    assert check(lines, HEADS).last.seq == 12


@slowly
@given(copied=st.integers(0, 11), place=st.integers(0, 12))
def test_a_record_that_is_played_again_is_repeated(copied: int, place: int) -> None:
    lines = [*LINES[:place], LINES[copied], *LINES[place:]]
    if copied >= place:  # put before its time, it is the first one that counts
        found = verdicts(lines)
        assert ("repeated", copied + 1) in found
        assert {verdict for verdict, _ in found} <= {"repeated", "reordered"}
    else:
        assert verdicts(lines) == [("repeated", copied + 1)]


@slowly
@given(kept=st.integers(0, 11), written=st.integers(0, 14))
def test_a_tail_that_is_written_anew_is_found_by_a_head(kept: int, written: int) -> None:
    after = head_of(RECORDS[kept - 1]) if kept else None
    forged = [line_of(record) for record in chained([note(99)] * written, after=after)]
    lines = [*LINES[:kept], *forged]
    assert verdicts(lines, HEADS[:1]) == []  # the chain itself is fine
    first_head = min(head.seq for head in HEADS if head.seq > kept)
    expected = [("rewritten", first_head)] if len(lines) >= first_head else []
    if len(lines) < 12:
        expected.append(("tail_cut" if lines else "gone", len(lines) + 1))
    assert verdicts(lines) == expected


def test_a_rewrite_is_found_by_one_head_that_was_kept_elsewhere() -> None:
    forged = chained([note(99)] * 12)
    own_heads = [HEADS[0], head_of(forged[-1])]
    assert verdicts([line_of(record) for record in forged], own_heads) == []
    assert verdicts([line_of(record) for record in forged], [*own_heads, HEADS[2]]) == [("altered", 8)]


@pytest.mark.parametrize("seq", range(1, 12))
def test_a_record_with_new_content_and_a_hash_to_match_is_altered(seq: int) -> None:
    forged = seal(note(99), seq=seq, at_s=RECORDS[seq - 1].at_s, prev=RECORDS[seq - 1].prev)
    lines = [*LINES[: seq - 1], line_of(forged), *LINES[seq:]]
    assert verdicts(lines) == [("altered", seq)]


def test_a_second_record_of_the_same_number_is_altered() -> None:
    forged = seal(note(99), seq=12, at_s=1.0, prev=RECORDS[10].hash)
    assert verdicts([*LINES, line_of(forged)]) == [("altered", 12)]


def test_a_wrong_head_is_told_from_a_wrong_log_by_a_later_head() -> None:
    wrong = msgspec.structs.replace(HEADS[1], hash="f" * 64)
    report = check(LINES, [HEADS[0], wrong, *HEADS[2:]])
    assert [(finding.verdict, finding.seq) for finding in report.findings] == [("altered", 4)]
    assert "head" in report.findings[0].detail
    assert report.head == HEADS[-1]


@slowly
@given(length=st.integers(1, len(LINES[-1]) - 1))
def test_a_last_line_that_is_incomplete_and_under_no_head_is_torn_and_sound(length: int) -> None:
    report = check([*LINES[:-1], LINES[-1][:length]], HEADS[:3])
    assert [(finding.verdict, finding.seq) for finding in report.findings] == [("torn", 12)]
    assert report.sound
    assert report.records == 11


def test_a_log_without_any_head_proves_nothing_of_its_end() -> None:
    assert verdicts(LINES, []) == [("unanchored", 1)]


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        (b"\n", "unreadable"),
        (b"null\n", "unreadable"),
        (b"[" * 100_000 + b"\n", "unreadable"),
        (b"\xff\n", "unreadable"),
        (b"{}\n", "altered"),
        (LINES[2].replace(b":", b": ", 1), "altered"),
        (LINES[2].replace(b"\n", b"\r\n"), "altered"),
    ],
)
def test_a_line_that_swarmx_did_not_write_is_found(line: bytes, verdict: str) -> None:
    assert verdicts([*LINES[:2], line, *LINES[3:]]) == [(verdict, 3)]


def test_a_record_of_another_version_fits_its_hash_and_may_be_unreadable() -> None:
    fields = msgspec.json.decode(LINES[0])
    del fields["hash"]
    fields["entry"]["kind"] = "dream"
    fields["hash"] = sha256(canonical(fields)).hexdigest()
    assert read_line(canonical(fields)) == "unreadable"


def test_findings_are_limited_and_the_check_goes_on() -> None:
    report = check([b"x\n"] * 1000, HEADS)
    assert len(report.findings) == 100


def test_intents_are_open_until_an_outcome_names_them() -> None:
    done = intent(2, kind="outcome", intent_seq=1, outcome="applied")
    later = intent(2, kind="outcome", intent_seq=1, outcome="kept")
    report = check(map(line_of, chained([intent(1), intent(2), done, later, note(3)])), HEADS[:1])
    assert [record.seq for record in report.open_intents] == [2]


def test_records_of_older_and_newer_versions_are_read() -> None:
    """This line lacks fields that have a default now, and has one that this version does not know."""
    line = (
        b'{"at_s":1.5,"entry":{"actor":{"name":"ops","role":"operator","type":"key"},"kind":"note","tool":"no_op",'
        b'"via":"cli","weather":"fine"},"hash":"%s",'
        b'"prev":"0000000000000000000000000000000000000000000000000000000000000000","seq":1}'
    ) % b"0d354305ba1d9de4d671afe36d9868e714e19ca51c1bbee5c8db215d45edd37d"
    record = read_line(line)
    assert isinstance(record, AuditRecord)
    assert record.entry == AuditEntry(kind="note", actor=OPERATOR, via="cli", tool="no_op")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=30,
)


@slowly
@given(
    arguments=st.dictionaries(st.text(max_size=8), anything, max_size=4),
    value=st.none() | st.floats() | st.integers() | st.text(),
    detail=st.text(),
)
def test_whatever_is_recorded_is_read_back_the_same(arguments: dict[str, Any], value: Any, detail: str) -> None:
    entry = bounded(
        intent(
            1,
            arguments=arguments,
            detail=detail,
            changes=(Change(subject="coder", what="replicas", before=value, after=None),),
            evidence=(Evidence(metric="p95", subject="coder", value=value),),
        )
    )
    record = seal(entry, seq=1, at_s=1.0, prev=GENESIS)
    line = line_of(record)
    assert line.count(b"\n") == 1
    assert read_line(line[:-1]) == record


@slowly
@given(text=st.text(st.characters(codec=None), max_size=50), times=st.integers(1, 10_000))
def test_texts_are_cut(text: str, times: int) -> None:
    long = text * times
    actor = msgspec.structs.replace(OPERATOR, name=long)
    kept = bounded(intent(1, actor=actor, detail=long, arguments={"reason": long}))
    assert len(kept.actor.name) <= MAX_TEXT + 30
    assert len(kept.arguments["reason"]) <= MAX_TEXT + 30
    assert len(kept.detail) <= MAX_DETAIL + 30
    if len(long) <= MAX_TEXT:
        assert kept.detail == long.encode("utf-8", "replace").decode()


def test_large_arguments_leave_their_size_hash_and_beginning() -> None:
    kept = bounded(intent(1, arguments={f"key{number}": "x" * 300 for number in range(100)}))
    assert set(kept.arguments) == {"bytes", "sha256", "start"}
    assert kept.arguments["bytes"] > MAX_ARGUMENTS_BYTES
    assert len(line_of(seal(kept, seq=1, at_s=1.0, prev=GENESIS))) < 2000


def test_integers_beyond_64_bits_and_deep_nests_are_told_in_words() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    sizes = {"most": 2**63 - 1, "least": -(2**63), "more": 2**63, "less": -(2**63) - 1}
    kept = bounded(intent(1, arguments={"deep": deep, **sizes})).arguments
    assert kept == {
        "deep": [[[[[[["(deeper)"]]]]]]],
        "most": 2**63 - 1,
        "least": -(2**63),
        "more": "0x8000000000000000",
        "less": "-0x8000000000000001",
    }


def test_numbers_of_numpy_are_plain_numbers() -> None:
    change = Change(subject="coder", what="replicas", before=np.int64(2), after=np.float32(0.5))  # type: ignore[arg-type]
    kept = bounded(intent(1, arguments={"n": np.int64(3), "x": np.float64(0.25), "nan": math.nan}, changes=(change,)))
    assert kept.arguments == {"n": 3, "x": 0.25, "nan": None}
    assert (kept.changes[0].before, kept.changes[0].after) == (2, 0.5)
