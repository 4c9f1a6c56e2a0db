from __future__ import annotations

import stat
from pathlib import Path

import pytest

from swarmx.core.errors import JournalError
from swarmx.core.messages import CallCancelled, Envelope
from swarmx.runtime.journal import VERSION, Entry, FileJournal, MemoryJournal, read, replay


def an_entry(seq: int) -> Entry:
    envelope = Envelope(sender="world", epoch=1, seq=seq, message=CallCancelled(call_id=f"c{seq}"))
    return Entry(at_s=float(seq), agent="router", heard=envelope, answered=[])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "new" / "a.jsonl", {"router": {"policy": "random"}})
    for seq in range(3):
        journal.write(an_entry(seq))
    journal.close()
    header, entries = read(journal.path)
    assert header.agents == {"router": {"policy": "random"}}
    assert list(entries) == [an_entry(seq) for seq in range(3)]


def test_a_journal_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "a.jsonl", {})
    journal.write(an_entry(1))
    journal.flush()
    _, entries = read(journal.path)
    assert list(entries) == [an_entry(1)]
    journal.close()


def test_a_journal_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "a.jsonl", {})
    journal.close()
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


def test_a_journal_never_overwrites_another(tmp_path: Path) -> None:
    FileJournal(tmp_path / "a.jsonl", {}).close()
    with pytest.raises(FileExistsError):
        FileJournal(tmp_path / "a.jsonl", {})


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_a_journal_of_another_version_says_so_and_is_not_read(version: int, tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "a.jsonl", {})
    journal.close()
    text = journal.path.read_text()
    assert f'"version":{VERSION},' in text
    journal.path.write_text(text.replace(f'"version":{VERSION},', f'"version":{version},'))
    with pytest.raises(JournalError, match=f"another version of swarmx: the journal has version {version}"):
        read(journal.path)


def test_a_journal_goes_on_in_other_files_and_is_read_and_replayed_as_one(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "a.jsonl", {"router": {}}, file_bytes=1000)
    for seq in range(30):
        journal.write(an_entry(seq))
    journal.close()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert len(names) > 3
    assert names[:3] == ["a.2.jsonl", "a.3.jsonl", "a.4.jsonl"]
    assert max(file.stat().st_size for file in tmp_path.iterdir()) < 1500
    header, entries = read(journal.path)
    assert (header.part, list(entries)) == (1, [an_entry(seq) for seq in range(30)])
    assert replay(journal.path).steps == 30


def test_the_oldest_files_make_room_and_what_is_left_of_their_journal_says_so(tmp_path: Path) -> None:
    old = FileJournal(tmp_path / "20260101T000000-1.jsonl", {})
    old.write(an_entry(0))
    old.close()
    new = FileJournal(tmp_path / "20260102T000000-1.jsonl", {}, file_bytes=500, keep_bytes=2000)
    assert old.path.exists()
    for seq in range(100):
        new.write(an_entry(seq))
    new.close()
    left = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert not old.path.exists()
    assert not new.path.exists()
    assert sum(file.stat().st_size for file in left) < 3000
    with pytest.raises(JournalError, match=r"is part \d+ of a journal.*deleted to make room"):
        read(left[-1])
    assert b'"seq":99' in left[-1].read_bytes(), "the newest stay"


def test_no_other_file_makes_room_for_a_journal(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x" * 5000)
    journal = FileJournal(tmp_path / "b.jsonl", {}, keep_bytes=1)
    journal.close()
    assert {file.name for file in tmp_path.iterdir()} == {"notes.txt", "b.jsonl"}


def test_a_memory_journal_forgets_the_oldest_entries() -> None:
    journal = MemoryJournal(limit=2)
    for seq in range(5):
        journal.write(an_entry(seq))
    assert [entry.heard.seq for entry in journal.entries] == [3, 4]
