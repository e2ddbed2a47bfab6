"""The training batch of each step as an objective, made once in full and then only given other data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._batches import Batch, slice_batch
from sharpkit._counting import samples_in
from sharpkit._params import ParamSelector
from sharpkit.objective import Objective

_LEAST_SAMPLES = 32  # a batch is not cut below


class ObjectiveMaker:
    """Makes objectives over batches, by default of the parameters that an optimizer holds.

    How the loss averages is found out on the first batch and again when the set of trained parameters changes.

    Args:
        model: unwrapped.
        optimizer: whose parameters are meant.
        params: other ones.
        probe: data of a fixed second objective; None for none.
        max_samples: measure on the first so many samples of a batch.
        settings: further arguments of Objective.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        params: ParamSelector,
        probe: Any,
        max_samples: int | None,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.optimizer, self.settings = model, optimizer, settings
        self.params: ParamSelector = params if params is not None else self._is_held
        self._max_samples, self._probe_data = max_samples, probe
        self._held: frozenset[int] = frozenset()
        self._template: Objective | None = None
        self.probe: Objective | None = None

    def _is_held(self, _: str, parameter: Tensor) -> bool:
        return id(parameter) in self._held

    @property
    def rank(self) -> int:
        """Of this process, once known."""
        return self._template.ranks.rank if self._template is not None else 0

    def over(self, batch: Batch, *, part: float, seed: int) -> tuple[Objective, int]:
        """The objective of one training batch, or of the first samples of it.

        Args:
            batch: or a list of micro-batches.
            part: share of it that is measured.
            seed: of dropout masks.

        Returns:
            the objective, and the samples of the whole batch on all processes.
        """
        batches = self._listed(batch)
        held = frozenset(id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad)
        if self._template is None or held != self._held:
            self._held = held
            self._template = Objective(self.model, batches, params=self.params, **self.settings)
            if self._probe_data is not None:
                self.probe = Objective(self.model, self._probe_data, params=self.params, **self.settings)
        objective = self._template.with_data(self._cut(batches, part))
        objective.seed = seed
        samples = objective.ranks.sum_numbers([float(self._samples(batches))], device=objective.device)[0]
        return objective, round(samples)

    def samples_of(self, batch: Batch) -> int:
        """Samples of a batch on this process; 0 where they cannot be counted."""
        try:
            return self._samples(self._listed(batch))
        except Exception:  # said when it is measured
            return 0

    def agree(self, value: float) -> float:
        """The largest of all processes' numbers, on every process."""
        if self._template is None or self._template.ranks.size == 1:
            return value
        return float(max(self._template.ranks.gather(value)))

    def may_halve(self, batch: Batch, part: float) -> bool:
        """Whether half of what is measured now would still be enough samples."""
        return self.samples_of(batch) * part >= 2 * _LEAST_SAMPLES

    def _listed(self, batch: Batch) -> list[Batch]:
        pairs = self.settings["loss"] is not None
        if isinstance(batch, list):
            found = [tuple(batch)] if pairs and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch) else batch
        else:
            found = [batch]
        for one in found if pairs else ():
            if not (isinstance(one, (tuple, list)) and len(one) == 2):
                raise TypeError(
                    f"with loss=, batches are (input, target), but this one is a {type(one).__name__}: pass closure=lambda model, batch: "
                    "... instead"
                )
        return found

    def _length(self, batch: Batch) -> int:
        return samples_in(batch, self.settings["loss"] is not None)

    def _samples(self, batches: list[Batch]) -> int:
        return sum(self._length(b) for b in batches)

    def _cut(self, batches: list[Batch], part: float) -> list[Batch]:
        """The same share of each micro-batch, its first samples."""
        total = self._samples(batches)
        most = total if self._max_samples is None else min(self._max_samples, total)
        wanted = max(min(most, _LEAST_SAMPLES), round(most * part))
        if wanted >= total:
            return batches
        lengths = [self._length(b) for b in batches]
        return [slice_batch(b, 0, max(1, round(n * wanted / total)), length=n) for b, n in zip(batches, lengths, strict=True)]
