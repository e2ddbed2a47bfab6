"""The micro-batches of one optimizer step inside somebody else's training loop, and the state kept for its start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Log = Callable[[dict[str, float]], None]


class Gathering:
    """What the callbacks of all trainers and purposes share.

    Args:
        settings: the arguments of what is made when training starts, with ``loss`` and ``closure``.
        callback: the callback's name, for messages.

    Raises:
        ValueError: both loss and closure.
    """

    def __init__(self, settings: dict[str, Any], *, callback: str) -> None:
        if settings["loss"] is not None and settings["closure"] is not None:
            raise ValueError("pass loss= or closure=, not both")
        self.settings, self.callback = settings, callback
        self.batches: list[Any] = []  # since the last optimizer step
        self._losses: list[Tensor] = []
        self._saved: Mapping[str, Any] | None = None

    @property
    def derives_loss(self) -> bool:
        """Whether neither loss nor closure was given."""
        return self.settings["loss"] is None and self.settings["closure"] is None

    def note(self, batch: Any, loss: Tensor | None = None) -> None:
        """One micro-batch whose gradient was added, and its loss."""
        if not any(batch is known for known in self.batches):
            self.batches.append(batch)
        if loss is not None:
            self._losses.append(loss.detach())

    def forget(self) -> None:
        """Drop the micro-batches since the last optimizer step."""
        self.batches, self._losses = [], []

    def take(self, *, scale: float = 1.0, mean: bool = False) -> tuple[list[Any], Tensor | None]:
        """The micro-batches noted, which are then forgotten, and the loss of the whole batch where losses came with them.

        Args:
            scale: that takes the sum (or mean) of the noted losses to the loss of the whole batch.
            mean: whether their mean is meant.
        """
        batches, losses = self.batches, self._losses
        self.forget()
        if not losses:
            return batches, None
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return batches, total * (scale / (len(losses) if mean else 1))

    def state_dict(self) -> dict[str, Any]:
        """Of what was made; what was loaded if training has not begun; empty before."""
        return self._own_state() if self._saved is None else dict(self._saved)

    def _own_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a saved state for the start of training."""
        self._saved = state or None

    def close(self) -> None:
        """Training is over."""
        self.forget()
