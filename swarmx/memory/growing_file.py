"""A file of lines that only grows: what is appended is on disk as a whole, or not there at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from swarmx.core.errors import StoreError


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines with their line ends; none if there is no such file. Raises StoreError."""
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}; check the file and its permissions") from error


class GrowingFile:
    """One process at a time has it open, its owner alone can read it. Methods raise OSError unless they say more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._size = 0
        self._broken: OSError | None = None

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    def open(self) -> None:
        """Open or create it. Raises StoreError: it cannot be opened, or another process has it."""
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be opened: {error}; check the folder and its permissions") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise StoreError(f"another process writes {self.path}; stop it, one server owns a state folder") from error
        self._file, self._size, self._broken = file, os.fstat(file).st_size, None

    def close(self) -> None:
        """Closing twice is fine."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def append(self, data: bytes) -> None:
        """Returns once the bytes are on disk. After an error the file is as it was before."""
        if self._broken is not None:
            raise self._broken
        file, view = self._open_file(), memoryview(data)
        try:
            while view:
                view = view[os.write(file, view) :]
            os.fsync(file)
        except OSError:
            self.cut(self._size)
            raise
        self._size += len(data)

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes. A file that cannot be cut takes nothing more until it is opened again."""
        file = self._open_file()
        try:
            os.ftruncate(file, size)
            os.fsync(file)
        except OSError as error:
            self._broken = error
            raise
        self._size = size

    def replace(self, data: bytes) -> None:
        """Put a new file with these bytes in its place; after a crash it is either the old one or the new one."""
        fresh = GrowingFile(self.path.with_name(f"{self.path.name}.new"))
        fresh.open()
        try:
            fresh.cut(0)
            fresh.append(data)
            os.replace(fresh.path, self.path)
        except OSError:
            fresh.close()
            raise
        self.close()
        self._file, self._size = fresh._file, fresh._size
        self.sync_folder()

    def go_on(self, full: Path) -> None:
        """Leave the file under the name `full`, and go on in a new one. After an error it is as it was before."""
        fresh = GrowingFile(self.path.with_name(f"{self.path.name}.new"))
        fresh.open()
        try:
            fresh.cut(0)
            os.rename(self.path, full)
            try:
                os.rename(fresh.path, self.path)
            except OSError:
                os.rename(full, self.path)
                raise
        except OSError:
            fresh.close()
            raise
        self.close()
        self._file, self._size = fresh._file, 0
        self.sync_folder()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`."""
        return os.pread(self._open_file(), stop - start, start)

    def sync_folder(self) -> None:
        """Make sure that the name of a new file outlives a crash."""
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _open_file(self) -> int:
        if self._file is None:
            raise OSError(f"{self.path} is not open")
        return self._file
