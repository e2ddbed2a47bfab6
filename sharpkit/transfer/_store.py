"""Finished training runs of a sweep in a file of JSON lines, so that a killed sweep continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sharpkit._batches import Batch
from sharpkit._batches import fingerprint as batch_fingerprint
from sharpkit._errors import SharpkitError
from sharpkit._json import json_ready
from sharpkit.transfer.setup import Run

KIND = "transfer_run"
Document = dict[str, Any]


class RunStore:
    """Documents by key, in memory and, with a path, in a file to which each new one is appended and flushed at once.

    A last line torn by a kill is left out and the next begins on a line of its own.

    Attributes:
        path: of the file; None for memory alone.
        found: how many runs the file held at the start.

    Args:
        path: an existing file of runs, or where to begin one; its folder must exist.

    Raises:
        SharpkitError: the file holds something else than runs.

    Example:
        >>> store = RunStore(None)
        >>> store.add("a", {"loss": 1.0})
        >>> store.get("a")["loss"], store.get("b")
        (1.0, None)
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = Path(path) if path is not None else None
        self._documents: dict[str, Document] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)
        self.found = len(self._documents)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for i, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                document = json.loads(line)
                key, right = document["key"], document["kind"] == KIND
            except (ValueError, KeyError, TypeError):
                document, key, right = {}, "", i == len(lines) - 1  # only the last line may be torn
            if not right:
                raise SharpkitError(f"line {i + 1} of {path} is no finished run of a sweep: pass a file that a sweep wrote, or a new name")
            if key:
                self._documents[key] = document

    def get(self, key: str) -> Document | None:
        """The run with this key, if it is there."""
        return self._documents.get(key)

    def add(self, key: str, document: Mapping[str, Any]) -> None:
        """Keep a finished run.

        Raises:
            OSError: the file cannot be written.
        """
        whole = {"kind": KIND, "version": 1, "key": key, **document}
        self._documents[key] = whole
        if self.path is None:
            return
        with open(self.path, "ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    self._end_torn_line(stream)
            stream.write((json.dumps(json_ready(whole), allow_nan=False) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())

    @staticmethod
    def _end_torn_line(stream: Any) -> None:
        """Cut the file after its last whole line."""
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)


def fingerprint(run: Run, *, data: str, first_loss: float, **settings: Any) -> str:
    """What determines a run, as a short key: the model's shapes and first loss, the optimizer's settings, the data and ``settings``.

    Args:
        run: not trained yet.
        data: of :func:`data_fingerprint`.
        first_loss: of this model on the first batch; a changed model or loss shows here.
        settings: the rest: steps, seed, factor, criterion.

    Example:
        >>> from torch import nn, optim, zeros
        >>> from sharpkit.transfer.setup import Family
        >>> family = Family(lambda w: nn.Linear(2, w), lambda m, w: optim.SGD(m.parameters(), lr=0.1), (zeros(1, 2), zeros(1, 4)),
        ...                 loss=nn.functional.mse_loss)
        >>> one, two = (fingerprint(family.start(4, lr_factor=f), data="", first_loss=1.0) for f in (1.0, 2.0))
        >>> one == two
        False
    """
    shapes = [(name, tuple(p.shape), p.requires_grad) for name, p in run.model.named_parameters()]
    groups = [
        {k: v for k, v in group.items() if k != "params" and isinstance(v, (int, float, str, tuple, bool, type(None)))}
        for group in run.optimizer.param_groups
    ]
    counts = [len(group["params"]) for group in run.optimizer.param_groups]
    parts = (type(run.optimizer).__name__, groups, counts, shapes, data, f"{first_loss:.5e}", run.size, run.seed, sorted(settings.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def data_fingerprint(batches: Iterable[Batch]) -> str:
    """A short key of all batches together."""
    return hashlib.sha256("".join(map(batch_fingerprint, batches)).encode()).hexdigest()[:16]
