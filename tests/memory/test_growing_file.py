"""What is appended to a growing file is there as a whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from swarmx.core.errors import StoreError
from swarmx.memory.growing_file import GrowingFile, lines_of


def opened(path: Path) -> GrowingFile:
    file = GrowingFile(path)
    file.open()
    return file


def test_what_is_appended_is_read_again_and_only_the_owner_can(tmp_path: Path) -> None:
    file = opened(tmp_path / "f")
    file.append(b"one\n")
    file.append(b"two\n")
    assert file.read(4, 8) == b"two\n"
    file.close()
    file.close()
    assert list(lines_of(file.path)) == [b"one\n", b"two\n"]
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    again = opened(file.path)
    assert again.size == 8
    again.cut(4)
    again.append(b"three\n")
    again.close()
    assert file.path.read_bytes() == b"one\nthree\n"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    file = opened(tmp_path / "f")
    with pytest.raises(StoreError, match="another process"):
        opened(tmp_path / "f")
    file.close()
    opened(tmp_path / "f").close()


def test_a_file_takes_the_place_of_another_and_stays_locked(tmp_path: Path) -> None:
    file = opened(tmp_path / "f")
    file.append(b"long and old\n")
    file.replace(b"new\n")
    file.append(b"more\n")
    with pytest.raises(StoreError, match="another process"):
        opened(tmp_path / "f")
    file.close()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert file.path.read_bytes() == b"new\nmore\n"
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


def test_a_file_that_is_not_open_takes_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="not open"):
        GrowingFile(tmp_path / "f").append(b"x")
    with pytest.raises(StoreError, match="cannot be opened"):
        opened(tmp_path / "missing" / "f")
    assert list(lines_of(tmp_path / "missing" / "f")) == []
    with pytest.raises(StoreError, match="cannot be read"):
        list(lines_of(tmp_path))


_FILLER = """
import sys
from pathlib import Path
from swarmx.memory.growing_file import GrowingFile
file = GrowingFile(Path(sys.argv[1]))
file.open()
written = 0
while True:
    try:
        file.append(b"x" * 999 + b"\\n")
    except OSError as error:
        break
    written += 1
print(written, file.size)
file.append(b"it fits\\n")
"""


@pytest.mark.process
def test_what_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_500, 10_500))

    path = tmp_path / "f"
    done = subprocess.run(
        [sys.executable, "-c", _FILLER, str(path)], capture_output=True, text=True, check=True, preexec_fn=small_disk
    )
    assert done.stdout.split() == ["10", "10000"]
    assert path.read_bytes().endswith(b"x\nit fits\n")
    assert os.path.getsize(path) == 10_008
