"""Measure sharpness during training, within a budget of time, without leaving a trace in the training."""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._errors import SharpkitWarning, UnsupportedError
from sharpkit.monitor.events import Event, EventDetector
from sharpkit.monitor.metrics import Memory, MetricLike, Situation, check_settings, chosen_metrics
from sharpkit.monitor.planner import Planner
from sharpkit.monitor.records import Measurement, MonitorHistory, Record
from sharpkit.monitor.schema import RUN, VERSION
from sharpkit.monitor.sinks import as_sink
from sharpkit.objective.batches import Batch
from sharpkit.objective.guard import unwrap
from sharpkit.objective.objective import Closure, ObjectiveMaker
from sharpkit.objective.params import ParamSelector
from sharpkit.optimizers import held_parameters, learning_rate, unwrap_optimizer, update_rule

logger = logging.getLogger(__name__)

_MAX_LOSSES = 4096  # kept between two measurements
_PERMANENT = (TypeError, ValueError, UnsupportedError)  # a metric that fails so will fail again


class Monitor:
    """Curvature beside its stability limit, during training.

    Call :meth:`step` once an optimizer step, after ``backward()`` and before ``optimizer.step()``. Nothing of the training is changed:
    parameters, gradients, buffers, optimizer state, random states and modes are left bit for bit, and an error inside a measurement is
    recorded and warned of once, never raised.

    With ``every="auto"`` the monitor times the training steps and itself, and measures as often as ``budget`` allows: the first record
    comes when its cost, about ten gradients, has been earned (after some 200 to 300 steps at 5 %). 60 % of the budget goes to the first
    metric, the rest to the others in equal parts, each measured on the steps of the first when its own part suffices.

    Args:
        model: what is trained; wrappers are taken off.
        optimizer: its torch optimizer; only read.
        loss: ``loss(output, target)`` on (input, target) batches, as in :class:`sharpkit.Objective`.
        closure: ``closure(model, batch)`` returning the loss, for everything else. Without both, ``model(**batch).loss`` of dict batches.
        count: what a batch's loss averages over, when it cannot be found out.
        params: which parameters; by default those that the optimizer holds.
        metrics: names from ``sharpkit.monitor.metrics.METRICS`` or own functions ``(objective, optimizer) -> float``; the first one is
            the main one. By default lambda_max (of D^-1 H for an adaptive optimizer), batch and critical sharpness.
        every: steps between measurements, or ``"auto"``.
        budget: share of training time for measuring, with ``every="auto"``.
        tol: relative error of eigenvalues to reach; where products run out first, the error says so.
        probe: a fixed set of data, for probe_lambda_max and for trace, ends of the spectrum and means over batches.
        mode: ``"train"``: the function that is trained, dropout masks fixed by the seed and the step, batch statistics of the batch; or
            ``"eval"``.
        autocast: run forward passes under autocast of this type.
        max_samples: measure on the first so many samples of a batch.
        max_interval: where the budget would ask for more steps than this between records, batches are cut in halves first, down to 32
            samples. Smaller batches are sharper: the record says on how many samples it was measured.
        top_k: eigenvalues that the metric ``"top_k"`` gives.
        sinks: where records go: ``sk.sinks`` places, paths ending in .jsonl or .csv, or functions of a record's dict.
        process_group: as in Objective; every process must call :meth:`step` with its own batch.
        seed: of probes and masks.

    Raises:
        TypeError, ValueError, UnsupportedError: arguments that make no sense. Later on nothing is raised.

    Example:
        >>> import torch, sharpkit as sk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = sk.Monitor(model, optimizer, loss=torch.nn.functional.mse_loss, every=1, metrics=["lambda_max"])
        >>> batch = (torch.eye(2), torch.zeros(2, 1))
        >>> for _ in range(3):
        ...     loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        ...     loss.backward()
        ...     record = monitor.step(batch, loss=loss)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> round(monitor.history[-1]["lambda_max"].value, 3), monitor.history[-1]["lambda_max"].limit
        (1.0, 20.0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        closure: Closure | None = None,
        count: Callable[[Batch], float] | None = None,
        params: ParamSelector = None,
        metrics: Sequence[MetricLike] | None = None,
        every: int | str = "auto",
        budget: float = 0.05,
        tol: float = 0.02,
        probe: Any = None,
        mode: str = "train",
        autocast: torch.dtype | None = None,
        max_samples: int | None = None,
        max_interval: int = 1000,
        top_k: int = 5,
        sinks: Iterable[Any] | Any = (),
        process_group: Any = None,
        seed: int = 0,
    ) -> None:
        self.model, self.optimizer = unwrap(model), unwrap_optimizer(optimizer)
        check_settings(every, budget, tol, max_samples, max_interval)
        self.metrics = chosen_metrics(metrics, self.optimizer, probe)
        self.every, self.budget, self.seed, self.mode = every, budget, seed, mode
        settings = {
            "loss": loss,
            "closure": closure,
            "count": count,
            "mode": mode,
            "autocast": autocast,
            "process_group": process_group,
            "seed": seed,
        }
        held = partial(held_parameters, self.optimizer)
        self._maker = ObjectiveMaker(self.model, held, params=params, probe=probe, max_samples=max_samples, settings=settings)
        self._top_k = top_k
        places = [sinks] if callable(sinks) or hasattr(sinks, "write") or isinstance(sinks, (str, os.PathLike)) else list(sinks)
        self._sinks = [as_sink(place) for place in places]
        self._memory, self._detector = Memory(tol=tol, seed=seed), EventDetector()
        gradients = {name: metric.gradients for name, metric in self.metrics.items()}
        self._planner = Planner(gradients, every=every, budget=budget, max_interval=max_interval, process_group=process_group)
        self._step = 0
        self._losses: deque[tuple[int, Tensor | float]] = deque(maxlen=_MAX_LOSSES)
        self._disabled: dict[str, str] = {}
        self._warned: set[str] = set()
        self._opened = False
        self._resumed_at: int | None = None
        self.history = MonitorHistory(self._header())

    # -- the one call in the loop ------------------------------------------------------------------------------------------
    def step(self, batch: Batch, *, loss: Tensor | float | None = None) -> Record | None:
        """Note one training step, and measure if it is time.

        Args:
            batch: that the gradients were computed on; a list of micro-batches where gradients were accumulated.
            loss: of the batch if at hand, for the detection of spikes; not read until the next measurement.

        Returns:
            the record if one was made.
        """
        watch = self._planner.watch
        entered = watch.enter()
        if loss is not None:
            self._losses.append((self._step, loss.detach() if isinstance(loss, Tensor) else float(loss)))
        record = None
        if not self._planner.is_due(self._step):
            watch.leave()
        else:
            self._synchronise()
            watch.enter_again(entered)
            if self._planner.measures:
                record = self._measure(batch)
            watch.leave()
            self._planner.plan(self._step, may_halve=self._maker.may_halve(batch, self._planner.part))
        self._step += 1
        return record

    @property
    def overhead(self) -> float:
        """Time spent measuring over time spent training, so far."""
        return self._planner.watch.overhead

    # -- measuring -----------------------------------------------------------------------------------------------------------
    def _measure(self, batch: Batch) -> Record | None:
        """One record with its events, in the history and the sinks; None where no metric could be asked for yet."""
        values: dict[str, Measurement] = {}
        failed: dict[str, str] = {}
        loss, samples = math.nan, 0
        try:
            situation = self._situation(batch)
            samples = situation.objective.num_samples
            self._ask_all(situation, values, failed)
            loss = self._flush_losses(situation)
        except Exception as error:
            self._fail("objective", error, failed)
        if not values and not failed:
            return None
        self._synchronise()
        watch = self._planner.watch
        spent = watch.mark() - watch.entered
        record = Record(self._step, values, {**self._disabled, **failed}, loss, self._lr(), (), samples, spent, watch.overhead_with(spent))
        events: tuple[Event, ...] = tuple(self._detector.update(record.to_dict()))
        for event in events:
            logger.info("step %d: %s", event.step, event.text)
        record = replace(record, events=events)
        self.history.append(record)
        if self._maker.rank == 0:
            self._write(record.to_dict())
        return record

    def _ask_all(self, situation: Situation, values: dict[str, Measurement], failed: dict[str, str]) -> None:
        begun = self._planner.watch.entered  # the first metric pays for making the objective
        for name, metric in self.metrics.items():
            if name in self._disabled or (metric.live and situation.awaits_state) or not self._planner.affords(name):
                continue
            situation.max_matvecs = self._planner.matvecs(name)
            known = name in self._memory.trackers
            try:
                values.update(metric.compute(situation))
            except Exception as error:
                self._fail(name, error, failed)
            now = self._planner.watch.mark()
            self._planner.pay(name, now - begun, cold=not known and name in self._memory.trackers)
            begun = now

    def _situation(self, batch: Batch) -> Situation:
        objective, samples = self._maker.over(batch, part=self._planner.part, seed=self.seed + self._step)
        return Situation(objective, self._maker.probe, self.optimizer, samples, self._step, self._memory, top_k=self._top_k)

    def _flush_losses(self, situation: Situation) -> float:
        """Hand the losses since the last measurement to the detector; the present one, computed if it was not given."""
        last = math.nan
        for step, loss in self._losses:
            last = float(loss)
            self._detector.update_loss(step, last)
        given = bool(self._losses) and self._losses[-1][0] == self._step
        self._losses.clear()
        if given:
            return last
        try:
            return situation.objective.value()
        except Exception:
            return math.nan

    def _fail(self, name: str, error: Exception, failed: dict[str, str]) -> None:
        reason = f"{type(error).__name__}: {error}"
        failed[name] = reason
        if isinstance(error, _PERMANENT) and name in self.metrics:
            self._disabled[name] = reason
        key = f"{name} {type(error).__name__}"
        if key not in self._warned:
            self._warned.add(key)
            tail = (
                "This metric is left out from now on." if name in self._disabled else "Training goes on; later failures are only recorded."
            )
            warnings.warn(f"the monitor could not measure {name} at step {self._step}: {reason}. {tail}", SharpkitWarning, stacklevel=4)

    def _write(self, document: dict[str, Any]) -> None:
        """To every sink; sinks keep their own failures to themselves, with a warning."""
        first, self._opened = not self._opened, True
        for sink in self._sinks:
            if first:
                sink.open_run(self._header())
            sink.write(document)

    # -- small parts -----------------------------------------------------------------------------------------------------------
    def _lr(self) -> float:
        return learning_rate(self.optimizer)

    def _synchronise(self) -> None:
        if torch.cuda.is_available() and any(p.is_cuda for p in self.model.parameters()):
            torch.cuda.synchronize()

    def _header(self) -> dict[str, Any]:
        from sharpkit import __version__

        try:
            condition = update_rule(self.optimizer).condition
        except UnsupportedError as error:
            condition = f"no limit: {error}"
        header = {
            "kind": RUN,
            "version": VERSION,
            "sharpkit": __version__,
            "model": type(self.model).__name__,
            "num_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "optimizer": type(self.optimizer).__name__,
            "condition": condition,
            "budget": self.budget if self.every == "auto" else None,
            "every": self.every,
            "mode": self.mode,
            "seed": self.seed,
        }
        return header if self._resumed_at is None else {**header, "resumed_at": self._resumed_at}

    # -- saving, ending --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue the series: plain containers and tensors, safe for ``torch.save``."""
        return {
            "version": VERSION,
            "step": self._step,
            "plan": self._planner.state_dict(),
            "memory": self._memory.state_dict(),
            "events": self._detector.state_dict(),
            "losses": [(step, float(loss)) for step, loss in self._losses],
            "disabled": dict(self._disabled),
            "records": [record.to_dict() for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved monitor stopped.

        Raises:
            ValueError: a state of another version.
        """
        if state.get("version") != VERSION:
            raise ValueError(f"a monitor state of version {state.get('version')!r} cannot be loaded by version {VERSION}")
        state = copy.deepcopy(dict(state))
        self._step = int(state["step"])
        self._planner.load_state_dict(state["plan"])
        self._memory.load_state_dict(state["memory"])
        self._detector.load_state_dict(state["events"])
        self._losses = deque(((int(s), float(v)) for s, v in state["losses"]), maxlen=_MAX_LOSSES)
        self._disabled = dict(state["disabled"])
        self._resumed_at = self._step
        self.history = MonitorHistory(self._header(), [Record.from_dict(r) for r in state["records"]])

    def close(self) -> None:
        """Close the sinks."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        when = f"every {self.every} steps" if self.every != "auto" else f"within {self.budget:.0%} of training time"
        return (
            f"Monitor({type(self.model).__name__}, {type(self.optimizer).__name__}, {', '.join(self.metrics)}; {when}; step {self._step}, "
            f"{len(self.history)} records{'' if math.isnan(self.overhead) else f', overhead {self.overhead:.1%}'})"
        )
