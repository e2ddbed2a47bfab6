"""Train each size from each seed for a few steps and note, on a fixed batch, how large everything is and what each tensor's change does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._batches import Batch, batch_length, slice_batch, to_device
from sharpkit._guard import unwrap
from sharpkit._loss import call_model
from sharpkit.transfer.observations import Observations, TensorTrack, Track, geometric_mean
from sharpkit.transfer.recording import INPUT, Activation, record, root_mean_square
from sharpkit.transfer.setup import Family, Run
from sharpkit.transfer.stacks import Stacks

Callback = Callable[[int, int], None]
MOST_SAMPLES = 64  # of the fixed batch: sizes are means over all its entries


def observe(
    family: Family, sizes: Sequence[int], *, steps: int, seeds: int, effects: bool, first_seed: int = 0, callback: Callback | None = None
) -> Observations:
    """Train and note; one run after another.

    Args:
        family: of networks.
        sizes: ascending.
        steps: optimizer steps of each run.
        seeds: runs of each size.
        effects: also put back each tensor in turn, one forward pass each.
        first_seed: of the runs of each size; the others follow it.
        callback: called with (size, seed) after each run.
    """
    found = Observations(tuple(sizes), seeds, steps, family.dimension)
    deep = family.dimension == "depth"
    stacks = Stacks.of({size: unwrap(family.start(size).model) for size in sizes}) if deep else Stacks()
    for size in sizes:
        for seed in range(first_seed, first_seed + seeds):
            _Observer(found, family.start(size, seed=seed), stacks).observe(effects=effects)
            if callback is not None:
                callback(size, seed)
    found.keep_common()
    return found


class _Observer:
    """One run."""

    def __init__(self, found: Observations, run: Run, stacks: Stacks) -> None:
        self.found, self.training, self.stacks, self.size = found, run, stacks, run.size
        self.model = unwrap(run.model)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.probe = to_device(probe_batch(run.family), device)
        self.signals: dict[str, list[float]] = {}
        found.adaptive = not isinstance(run.optimizer, torch.optim.SGD)

    def observe(self, *, effects: bool) -> None:
        start = {id(p): p.detach().clone() for p in self.model.parameters()}
        first = self._record()
        self._note(first, first)
        if self.stacks.names:
            self.found.stream.setdefault(self.size, []).append(self._added(first))
        now = first
        for _ in range(self.found.num_steps):
            with self._signals_heard() if effects and not self.found.adaptive else nullcontext():
                self.training.step()
            now = self._record()
            self._note(now, first)
        if self.training.diverged:
            self.found.diverged.append((self.size, self.training.seed))
        if effects:
            self._put_back_each(start, now)

    def _record(self, replaced: Mapping[str, Tensor] | None = None) -> dict[str, Activation]:
        """Activations on the fixed batch, with some parameters replaced for the while."""
        begin = self.stacks.ends(self.size)[0]
        with _replaced(self.model, replaced or {}):
            return record(self.model, lambda: forward(self.training.family, self.model, self.probe), inputs_of=[begin] if begin else [])

    def _note(self, now: dict[str, Activation], first: dict[str, Activation]) -> None:
        for raw, a in now.items():
            for name in self.stacks.aliases(raw, self.size) if a.kind != "input" else []:
                within = name != raw and name.rpartition(".")[2] != "last"
                track = self.found.coordinates.setdefault(name, Track(name, "inside a block" if within else a.kind))
                track.entries[self.size], track.inner[self.size] = a.tensor.numel(), a.inner
                values = {"rms": a.rms, "mean_abs": _mean_abs(a.tensor), "update": _change(a, first.get(raw))}
                values["input_rms"] = math.nan if a.input_rms is None else a.input_rms
                if now is first:
                    track.spread.setdefault(self.size, []).append(a.spread)
                for key, value in values.items():
                    runs = getattr(track, key).setdefault(self.size, [])
                    if now is first:
                        runs.append([])
                    runs[-1].append(math.nan if self.training.diverged else value)

    def _added(self, first: dict[str, Activation]) -> float:
        """RMS of the last block's output minus the first block's input."""
        begin, end = self.stacks.ends(self.size)
        into = first.get(begin + INPUT)
        out = first.get(end) or first.get(f"{end}[0]")
        return math.nan if into is None or out is None else _change(out, into)

    # -- what each tensor's change does -----------------------------------------------------------------------------------

    def _put_back_each(self, start: dict[int, Tensor], now: dict[str, Activation]) -> None:
        settings = group_settings(self.training.optimizer)
        inside = {}
        for raw, p in self.model.named_parameters(remove_duplicate=False):
            if not p.requires_grad:
                continue
            if self.stacks.inside(raw):
                inside[raw] = start[id(p)]
            names = self.stacks.aliases(raw, self.size)
            if names:
                back = self._record({raw: start[id(p)]})
                shown = next((a for a in now.values() if _counts(a) and _change(a, back.get(a.name)) > 0), None)
                if shown is not None and shown.kind == "before output":  # a multiplier outside of the module is part of the readout
                    shown = next((a for a in now.values() if a.kind == "output" and _change(a, back.get(a.name)) > 0), shown)
                for name in names:
                    self._note_effect(name, raw, p, shown, back)
                    track = self.found.tensors[name]
                    track.lr[self.size], track.weight_decay[self.size] = settings.get(id(p), (math.nan, 0.0))
        if inside:
            change = _change(now["output"], self._record(inside).get("output")) if "output" in now else math.nan
            self.found.blocks.setdefault(self.size, []).append(math.nan if self.training.diverged else change)

    def _note_effect(self, name: str, raw: str, p: Tensor, shown: Activation | None, back: dict[str, Activation]) -> None:
        owner = raw.rpartition(".")[0]
        track = self.found.tensors.setdefault(name, TensorTrack(name))
        track.shapes[self.size] = tuple(p.shape)
        track.table = isinstance(self.model.get_submodule(owner), nn.Embedding)
        effect = level = signal = math.nan
        scale = 1.0
        if shown is not None and not self.training.diverged:
            effect, level = _change(shown, back.get(shown.name)), shown.rms
            track.shown_in, track.entries[self.size] = shown.name, shown.tensor.numel()
            signal = geometric_mean(self.signals.get(shown.owner, []))
            if shown.owner == owner and shown.input_rms is not None:
                scale = shown.input_rms
        for values, value in ((track.effect, effect), (track.level, level), (track.input_rms, scale), (track.signal, signal)):
            values.setdefault(self.size, []).append(value)

    @contextmanager
    def _signals_heard(self) -> Iterator[None]:
        """Note the gradient by each module's output in the training step inside."""

        def listener(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, (tuple, list)) and output else output
                if isinstance(first, Tensor) and first.requires_grad:
                    first.register_hook(  # type: ignore[no-untyped-call]
                        lambda g: self.signals.setdefault(name, []).append(root_mean_square(g))
                    )

            return hook

        handles = [module.register_forward_hook(listener(name)) for name, module in self.model.named_modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_counts(*, steps: int, seeds: int) -> None:
    """At least one step and one seed.

    Raises:
        ValueError: fewer.
    """
    for name, value in (("steps", steps), ("seeds", seeds)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")


def probe_batch(family: Family) -> Batch:
    """The fixed batch: the first one, its first 64 samples."""
    batch = family.batches[0]
    length = batch_length(batch)
    return batch if length is None or length <= MOST_SAMPLES else slice_batch(batch, 0, MOST_SAMPLES, length=length)


def forward(family: Family, model: nn.Module, batch: Batch) -> None:
    """One call of the model on a batch, whatever its form."""
    if family.loss is not None:
        call_model(model, batch[0])
    else:
        family.loss_of(model, batch)


def group_settings(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
    """id of a parameter -> its learning rate and decoupled weight decay, which is 0 where decay enters the gradient instead."""
    found = {}
    for group in optimizer.param_groups:
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        decay = float(group.get("weight_decay") or 0.0) if decoupled else 0.0
        found.update({id(p): (float(group["lr"]), decay) for p in group["params"]})
    return found


@contextmanager
def _replaced(model: nn.Module, replaced: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in some places of the model; a tied tensor stays as it is in its other places."""
    before = {name: model.get_parameter(name) for name in replaced}
    try:
        for name, value in replaced.items():
            other = nn.Parameter(value, requires_grad=False)
            other.__dict__.update(before[name].__dict__)  # what libraries note on a parameter (its base shape)
            _set(model, name, other)
        yield
    finally:
        for name, p in before.items():
            _set(model, name, p)


def _set(model: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)


def _counts(a: Activation) -> bool:
    return a.kind not in ("attention logits", "input")


def _change(a: Activation, other: Activation | None) -> float:
    if other is None or other.tensor.shape != a.tensor.shape:
        return math.nan
    return root_mean_square(a.tensor - other.tensor)


def _mean_abs(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, 1, dtype=torch.promote_types(x.dtype, torch.float32))) / x.numel() if x.numel() else 0.0
