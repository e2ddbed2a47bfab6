"""Appending lines to a file so that a killed process loses at most the last one and a full disk stops nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharpkit._errors import SharpkitWarning


class LineFile:
    """A text file that only grows, whole lines at a time.

    Each piece is handed to the operating system in one write, so it survives the process; it is forced to the disk every few seconds and on
    close. When the disk is full the pieces wait, bounded in number, and are written once there is room.

    Args:
        path: its folder must exist; an existing file is continued, after a torn last line is cut off.
        is_whole: whether a last line that has no newline is complete all the same.
        sync_seconds: longest time between two forced writes to the disk while lines come in.
        max_waiting: pieces kept while the disk takes none; beyond it the oldest are dropped and counted.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str], *, is_whole: Callable[[bytes], bool], sync_seconds: float, max_waiting: int) -> None:
        self.path = Path(path)
        if not self.path.absolute().parent.is_dir():
            folder = self.path.absolute().parent
            raise FileNotFoundError(f"cannot write {self.path}: the folder {folder} does not exist; make it first or name another place")
        if self.path.is_dir():
            raise IsADirectoryError(f"cannot write {self.path}: it is a folder; name a file in it")
        if self.path.is_file():
            _mend_tail(self.path, is_whole)
        self.num_dropped = 0
        self._waiting: deque[bytes] = deque()
        self._max_waiting, self._sync_seconds = max_waiting, sync_seconds
        self._synced = time.monotonic()
        self._warned = False
        self._file: Any = open(self.path, "ab", buffering=0)  # noqa: SIM115 - it stays open for the whole run

    @property
    def num_waiting(self) -> int:
        """Pieces that the disk has not taken yet."""
        return len(self._waiting)

    def append(self, text: str) -> None:
        """Write whole lines, after any that still wait; never raises for lack of space.

        Args:
            text: ends with a newline.
        """
        self._waiting.append(text.encode())
        while len(self._waiting) > self._max_waiting:
            del self._waiting[1]  # the first may have been begun
            self.num_dropped += 1
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._write_first()
            if time.monotonic() - self._synced >= self._sync_seconds:
                self._sync()
        except OSError as error:
            self._explain(error)

    def _write_first(self) -> None:
        """The first piece that waits; what a full disk left out of it stays in its place and follows later."""
        piece = self._waiting[0]
        done = self._file.write(piece) or 0
        if done == len(piece):
            self._waiting.popleft()
            return
        self._waiting[0] = piece[done:]
        if not done:
            raise OSError(errno.ENOSPC, "the file takes no more bytes")

    def _sync(self) -> None:
        self._synced = time.monotonic()
        if self.path.is_file():  # pipes and devices have nothing to force
            os.fsync(self._file.fileno())

    def _explain(self, error: OSError) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"cannot write {self.path}: {error.strerror or error}. Training goes on. Make room or mend the place: up to "
            f"{self._max_waiting} writes are kept in memory and tried again with every new one; beyond that the oldest are lost.",
            SharpkitWarning,
            stacklevel=2,
        )

    def close(self) -> None:
        """Write what waits, force it to the disk, and say what was lost, if anything."""
        if self._file.closed:
            return
        self._flush()
        try:
            self._sync()
        except OSError as error:
            self._explain(error)
        lost = self.num_dropped + len(self._waiting)
        with contextlib.suppress(OSError):
            self._file.close()
        if lost:
            warnings.warn(f"{lost} writes to {self.path} were lost: the disk did not take them", SharpkitWarning, stacklevel=2)


def _mend_tail(path: Path, is_whole: Callable[[bytes], bool]) -> None:
    """Cut off a last line that was torn by a killed process, or end it where only its newline is missing."""
    with open(path, "rb+") as stream:
        size = stream.seek(0, os.SEEK_END)
        start = _last_line_start(stream, size)
        stream.seek(start)
        tail = stream.read()
        if not tail:
            return
        if is_whole(tail):
            stream.write(b"\n")
            return
        stream.truncate(start)
    warnings.warn(f"the last line of {path} was torn ({len(tail)} bytes of it were there): it was cut off", SharpkitWarning, stacklevel=4)


def _last_line_start(stream: Any, size: int) -> int:
    """Where the text after the last newline begins."""
    end = size
    while end > 0:
        begin = max(0, end - 65536)
        stream.seek(begin)
        found = int(stream.read(end - begin).rfind(b"\n"))
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
