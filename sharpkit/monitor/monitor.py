"""Measure sharpness during training, within a budget of time, without leaving a trace in the training."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharpkit._calls import no_bars
from sharpkit._errors import NonFiniteError, SharpkitWarning, UnsupportedError
from sharpkit._results import State, percent
from sharpkit.monitor.events import EventDetector
from sharpkit.monitor.metrics import UNITS, Memory, MetricLike, Situation, check_monitor_settings, chosen_metrics
from sharpkit.monitor.planner import Planner
from sharpkit.monitor.records import Measurement, MonitorHistory, Record
from sharpkit.monitor.schema import RUN, VERSION
from sharpkit.monitor.sinks import SinkPlace, as_sinks
from sharpkit.objective.batches import Batch
from sharpkit.objective.distributed import find_ranks
from sharpkit.objective.guard import refuse_reentry, unwrap
from sharpkit.objective.loss import checked_reading
from sharpkit.objective.objective import Closure, ObjectiveMaker, check_model, check_settings
from sharpkit.objective.params import ParamSelector, select_params
from sharpkit.optimizers import (
    check_trains,
    has_geometry,
    held_parameters,
    learning_rate,
    learning_rates,
    limit_rule,
    rates_at_hand,
    unwrap_optimizer,
)

logger = logging.getLogger(__name__)

_MAX_LOSSES = 4096  # steps kept between two measurements; by judgement: a few times the longest interval, max_interval
# Out of memory or a NaN may pass; a wrong batch, an unsupported layer or optimizer will not.
_PERMANENT = (TypeError, ValueError, UnsupportedError)  # a metric that fails so will fail again


_SAVED = ("step=_step", "plan=_planner", "memory=_memory", "events=_detector", "losses=_losses", "rates=_rates", "disabled=_disabled")


class Monitor(State, version=VERSION, saved=(*_SAVED, "records=history.records")):
    """Curvature beside its stability limit, during training.

    Call :meth:`step` once an optimizer step, after ``backward()`` and before ``optimizer.step()``. Nothing of the training is changed:
    parameters, gradients, buffers, optimizer state, random states and modes are left bit for bit, and an error inside a measurement is
    recorded and warned about once, never raised.

    With ``every="auto"`` the monitor times the training steps and itself, and measures as often as ``budget`` allows. The first record
    comes by step 40 and costs about ten gradients; the next once the budget has paid for both (after some 200 to 500 steps at 5 %), so
    that a shorter run takes more than its budget, which :meth:`close` warns of. 60 % of the budget goes to the first metric, the rest to
    the others in equal parts; they are measured on the same steps whenever their part suffices.

    Args:
        model: the model that is trained; wrappers are unwrapped.
        optimizer: its torch optimizer; only read.
        loss: ``loss(output, target)`` on (input, target) batches, as in :class:`sharpkit.Objective`.
        closure: ``closure(model, batch)`` returning the loss, for everything else. Without both, ``model(**batch).loss`` of dict batches.
        count: what a batch's loss averages over, if it cannot be determined.
        params: which parameters; by default those that the optimizer holds.
        metrics: names from ``sk.METRICS`` or functions ``(objective, optimizer) -> float``; the first one is the main one. By default
            lambda_max (of D^-1 H for an adaptive optimizer), batch and critical sharpness.
        every: steps between measurements, or ``"auto"``.
        budget: share of the training time that measuring may take, with ``every="auto"``.
        tol: relative error to which eigenvalues are computed; if the budget ends first, the stated error is larger.
        probe: a fixed set of data, for probe_lambda_max and for trace, ends of the spectrum and means over batches.
        mode: ``"train"``: the function that is trained, dropout masks fixed by the seed and the step, batch statistics of the batch; or
            ``"eval"``.
        autocast: run forward passes under autocast of this type.
        max_samples: measure on at most this many samples of a batch, the first ones.
        max_interval: longest interval between records in steps: if the budget asks for a longer one, batches are halved, down to 32
            samples. Smaller batches are sharper: the record says on how many samples it was measured.
        top_k: number of eigenvalues that the metric ``"top_k"`` gives.
        sinks: where records go: ``sk.sinks`` places, paths ending in .jsonl or .csv, or functions of a record's dict; None for nowhere.
        process_group: as in Objective; every process must call :meth:`step` with its own batch.
        seed: seeds the random probes and dropout masks.

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

    # (step, loss, each group's rate) since the last measurement, None where there is none; tensors on a device are read at the next one
    _losses: deque[tuple[int, Tensor | float | None, tuple[float | Tensor, ...] | None]]
    _rates: list[float]  # at the last measurement: the one that limits are stated for, then those of all groups
    _disabled: dict[str, str]

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
        sinks: SinkPlace | Iterable[SinkPlace] | None = None,
        process_group: Any = None,
        seed: int = 0,
    ) -> None:
        check_model(model)
        check_settings(loss=loss, closure=closure, count=count, mode=mode, autocast=autocast, seed=seed)
        self.model, self.optimizer = unwrap(model), unwrap_optimizer(optimizer)
        check_monitor_settings(every, budget, tol, max_samples, max_interval, top_k)
        find_ranks(process_group)
        select_params(self.model, params, may_be_sharded=True)
        check_trains(self.optimizer, self.model)
        self.metrics = chosen_metrics(metrics, self.optimizer, probe)
        self.every, self.budget, self.seed, self.mode = every, budget, seed, mode
        settings: dict[str, Any] = {"loss": loss, "closure": closure, "count": count, "mode": mode}
        settings |= {"autocast": autocast, "process_group": process_group, "seed": seed}
        held = partial(held_parameters, self.optimizer)
        self._maker = ObjectiveMaker(self.model, held, params=params, probe=probe, max_samples=max_samples, settings=settings)
        self._top_k = top_k
        self._sinks = as_sinks(sinks)
        self._resumed_at: int | None = None
        gradients = {name: metric.gradients for name, metric in self.metrics.items()}
        self._planner = Planner(gradients, every=every, budget=budget, max_interval=max_interval, process_group=process_group)
        self._memory, self._detector = Memory(tol=tol, seed=seed), EventDetector(self._header())
        self._step, self._rates = 0, [learning_rate(self.optimizer), *learning_rates(self.optimizer)]
        self._losses, self._disabled = deque(maxlen=_MAX_LOSSES), {}
        self._warned: set[str] = set()
        self._opened = False  # whether the sinks have their header, which goes out with the first step
        self.history = MonitorHistory(self._header())

    # -- the one call in the loop ------------------------------------------------------------------------------------------
    def step(self, batch: Batch, *, loss: Tensor | float | None = None) -> Record | None:
        """Note one training step, and measure if it is time.

        Args:
            batch: the batch that the gradients were computed on; a list of micro-batches if gradients were accumulated.
            loss: loss of the batch if at hand, to notice spikes between measurements; not read until the next measurement.

        Returns:
            the record if one was made.

        Raises:
            ObjectiveError: called by the model itself, as from a forward hook, while it is measured.
        """
        refuse_reentry(self.model)
        if not self._opened:
            self._open()
        loss = checked_reading(loss)
        watch = self._planner.watch
        entered = watch.enter()
        rates = rates_at_hand(self.optimizer)
        on_device = rates is not None and any(isinstance(rate, Tensor) for rate in rates)  # to compare them would be to wait
        if loss is not None or on_device or (self._losses and self._losses[-1][2] != rates):
            self._losses.append((self._step, loss, rates))
        record = None
        if not self._planner.is_due(self._step):  # nearly all steps end here, after two clock readings and little else
            watch.leave()
        else:
            self._synchronise()  # or the training step's work on the device would count as measuring
            watch.enter_again(entered)
            if self._planner.measures:
                with no_bars():  # the training loop has its own
                    record = self._measure(batch)
            watch.leave()  # before the plan, which charges all that was measured
            self._planner.plan(self._step, may_halve=self._maker.may_halve(batch, self._planner.part))
        self._step += 1
        return record

    @property
    def overhead(self) -> float:
        """Time spent measuring so far, divided by the time spent training."""
        return self._planner.watch.overhead

    # -- measuring -----------------------------------------------------------------------------------------------------------
    def _measure(self, batch: Batch) -> Record | None:
        """One record with its events, in the history and the sinks; None if no metric could be measured yet."""
        values: dict[str, Measurement] = {}
        failed: dict[str, str] = {}
        situation, samples = None, 0
        try:
            situation = self._situation(batch)
            samples = situation.objective.num_samples
            self._measure_all(situation, values, failed)
        except Exception as error:
            self._fail("objective", error, failed)
        loss = self._flush_losses(situation)
        if not values and not failed:  # an adaptive optimizer before its first step, or all metrics disabled
            return None
        self._synchronise()
        watch = self._planner.watch
        spent = watch.mark() - watch.entered
        lr, overhead = learning_rate(self.optimizer), watch.overhead_with(spent)
        density = None if situation is None else situation.density
        return self._keep(Record(self._step, values, {**self._disabled, **failed}, loss, lr, (), samples, spent, overhead, density))

    def _keep(self, record: Record) -> Record | None:
        """Put a record with its events into the history and the sinks, unless there is nothing in it."""
        # the detector reads documents, as it does from a file: what it finds here and what it would find there cannot differ
        record = replace(record, events=tuple(self._detector.update(record.to_dict())))
        if not (record.values or record.failed or record.events):
            return None
        for event in record.events:
            logger.info("step %d: %s", event.step, event.text)
        self.history.append(record)
        if self._maker.rank == 0:  # all processes hold the same record; one writes it
            self._write(record.to_dict())
        return record

    def _situation(self, batch: Batch) -> Situation:
        # the seed of the step draws the dropout masks, so that they differ between records and a resumed run has the same
        objective, samples = self._maker.over(batch, part=self._planner.part, seed=self.seed + self._step)
        return Situation(objective, self._maker.probe, self.optimizer, samples, self._step, self._memory, top_k=self._top_k)

    def _measure_all(self, situation: Situation, values: dict[str, Measurement], failed: dict[str, str]) -> None:
        begun = self._planner.watch.entered  # the first metric pays for making the objective
        for name, metric in self.metrics.items():
            if name in self._disabled or (metric.live and situation.awaits_state) or not self._planner.affords(name):
                continue
            situation.max_matvecs = self._planner.matvecs(name)
            known = name in self._memory.trackers
            try:
                rounding = situation.objective.rounding  # which the bounds of eigenvalues hold already
                for key, m in metric.compute(situation).items():
                    values[key] = m if m.error_kind == "residual bound" else m.rounded(rounding)
            except Exception as error:
                self._fail(name, error, failed)
            now = self._planner.watch.mark()
            # the first update of a tracker starts from a random vector: it takes several times as long as the later ones
            self._planner.pay(name, now - begun, cold=not known and name in self._memory.trackers)
            begun = now

    def _flush_losses(self, situation: Situation | None) -> float:
        """Hand losses and rates since the last measurement to the detector, and return the present loss, computed if it was not given."""
        last, at = math.nan, -1  # all are read at once: reading each at its step would wait for the device each time
        for step, loss, rates in self._losses:
            if loss is not None:
                last, at = float(loss), step
                self._detector.update_loss(step, last)
            # a rate that was raised in any group lowers the limit on the matrix last measured by as much
            pairs = zip(map(float, rates or ()), self._rates[1:], strict=False)
            raised = max((now / before for now, before in pairs if before > 0), default=math.nan)
            self._detector.note_rate(step, self._rates[0] * raised)
        self._losses.clear()
        self._rates = [learning_rate(self.optimizer), *learning_rates(self.optimizer)]
        if at == self._step or situation is None:
            return last if at == self._step else math.nan
        try:
            return situation.objective.value()
        except NonFiniteError:
            self._detector.update_loss(self._step, math.nan)
        except Exception:
            logger.debug("the loss at step %d could not be computed", self._step, exc_info=True)
        return math.nan

    def _fail(self, name: str, error: Exception, failed: dict[str, str]) -> None:
        reason = failed[name] = f"{type(error).__name__}: {error}"
        if isinstance(error, _PERMANENT) and name in self.metrics:
            self._disabled[name] = reason
        key = f"{name} {type(error).__name__}"
        if key not in self._warned:
            self._warned.add(key)
            goes_on = "Training goes on; later failures are only recorded."
            tail = "This metric is left out from now on." if name in self._disabled else goes_on
            warnings.warn(f"the monitor could not measure {name} at step {self._step}: {reason}. {tail}", SharpkitWarning, stacklevel=4)

    def _write(self, document: dict[str, Any]) -> None:
        """To every sink; sinks keep their own failures to themselves, with a warning."""
        for sink in self._sinks:
            sink.write(document)

    def _open(self) -> None:
        """Say what will be measured and when, before anything is."""
        self._opened, header = True, self._header()
        when = (
            f"the first record comes by step {header['first_by']}" if self._resumed_at is None else f"goes on from step {self._resumed_at}"
        )
        logger.info("measures %s; %s", ", ".join(self.metrics), when)
        if find_ranks(self._maker.settings["process_group"]).rank == 0:  # all processes hold the same records; one writes them
            for sink in self._sinks:
                sink.open_run(header)

    # -- small parts -----------------------------------------------------------------------------------------------------------
    def _synchronise(self) -> None:
        if torch.cuda.is_available() and any(p.is_cuda for p in self.model.parameters()):
            torch.cuda.synchronize()

    def _header(self) -> dict[str, Any]:
        from sharpkit import __version__

        name = type(self.optimizer).__name__
        try:
            if has_geometry(self.optimizer):
                condition = f"{name}, steps of a fixed length: max d^T H d over ||d|| <= 1 in their norm <= 2 ||g||_* / lr"
            else:
                condition = limit_rule(self.optimizer).condition
        except UnsupportedError as error:
            condition = f"no limit: {error}"
        header = {
            "kind": RUN,
            "version": VERSION,
            "sharpkit": __version__,
            "model": type(self.model).__name__,
            "num_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            "optimizer": name,
            "condition": condition,
            "budget": self.budget if self.every == "auto" else None,
            "every": self.every,
            "mode": self.mode,
            "seed": self.seed,
            "first_by": self._planner.first_by,
            "units": {**UNITS, **{name: metric.unit for name, metric in self.metrics.items()}},
        }
        return header if self._resumed_at is None else {**header, "resumed_at": self._resumed_at}

    # -- saving, ending --------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue the series: plain containers and tensors, safe for ``torch.save``."""
        # as numbers, since tensors would keep their device
        plain = [(s, None if loss is None else float(loss), r and tuple(map(float, r))) for s, loss, r in self._losses]
        self._losses = deque(plain, _MAX_LOSSES)
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a saved monitor stopped.

        Raises:
            DocumentError: a state of another version, or one that lacks something; a ValueError.
        """
        super().load_state_dict(copy.deepcopy(dict(state)))  # the trackers write into their vectors: the caller's state stays as it is
        self._resumed_at = self._step
        self.history = MonitorHistory(self._header(), list(self.history.records))

    def close(self) -> None:
        """Tell what the losses since the last measurement show, if anything, in a record without measurements, and close the sinks.

        Warns where the run was too short for its budget.
        """
        self._flush_losses(None)
        if (overhead := self._planner.exceeds) is not None and self.history.records:
            took = f"measuring took {percent(overhead)} of the training time, more than the budget of {percent(self.budget)}"
            warnings.warn(f"{took}: the run of {self._step} steps was too short to pay for its records", SharpkitWarning, stacklevel=2)
        self._keep(Record(self._step, {}, lr=learning_rate(self.optimizer)))
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        when = f"every {self.every} steps" if self.every != "auto" else f"within {percent(self.budget)} of training time"
        return (
            f"Monitor({type(self.model).__name__}, {type(self.optimizer).__name__}, {', '.join(self.metrics)}; {when}; step {self._step}, "
            f"{len(self.history)} records{'' if math.isnan(self.overhead) else f', overhead {percent(self.overhead)}'})"
        )
