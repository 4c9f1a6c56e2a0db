from __future__ import annotations

import stat
from pathlib import Path

import pytest

from swarmx.core.errors import JournalError
from swarmx.core.messages import CallCancelled, Envelope
from swarmx.runtime.journal import VERSION, Entry, FileJournal, MemoryJournal, read


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


def test_a_memory_journal_forgets_the_oldest_entries() -> None:
    journal = MemoryJournal(limit=2)
    for seq in range(5):
        journal.write(an_entry(seq))
    assert [entry.heard.seq for entry in journal.entries] == [3, 4]
