"""One suggested learning rate from what a trainer holds: a LightningModule and its loader, or a Hugging Face Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from sharpkit._errors import ObjectiveError, UnsupportedError
from sharpkit.learner.suggest import SuggestedLearningRate, suggest_learning_rate
from sharpkit.objective.counting import samples_in
from sharpkit.objective.guard import random_states_kept
from sharpkit.objective.objective import Objective

_MOST = 4096  # samples of the loader that the runs draw from, by judgement: they see no more in a tenth of a thousand steps of 256
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
    "cosine_with_min_lr": "cosine",
}  # of transformers, and what they are here


def for_lightning(
    module: Any, loader: Any, *, steps: int, schedule: str = "linear", optimizer: int | None = None, **settings: Any
) -> SuggestedLearningRate:
    """:func:`sharpkit.suggest_learning_rate` for a LightningModule, in place of Lightning's own finder.

    Args:
        module: with ``training_step`` and ``configure_optimizers``; neither logs nor counts anything meanwhile.
        loader: the training DataLoader; samples are drawn anew from its first 4096.
        steps: optimizer steps of the run, such as ``trainer.estimated_stepping_batches``.
        schedule: as there.
        optimizer: which of several.
        settings: further arguments of it, such as ``batch_size`` (by default the loader's) or ``validation``.

    Raises:
        ValueError: several optimizers, or a module that optimizes manually.
        ObjectiveError, UnsupportedError: as there.
    """
    from sharpkit.integrations.lightning import check_training_step, chosen_optimizer, training_step_loss

    check_training_step(module, callback="sk.Objective")
    made = chosen_optimizer(_optimizers(module.configure_optimizers()), optimizer, callback="for_lightning")
    batches, size, total = _first_batches(loader)
    settings = {"batch_size": size, "num_samples": total, **settings}
    objective = Objective(module, batches, closure=lambda model, batch: training_step_loss(model, batch, 0), process_group=False)
    return suggest_learning_rate(objective, made, steps=steps, schedule=schedule, **settings)


def for_trainer(trainer: Any, *, schedule: str | None = None, **settings: Any) -> SuggestedLearningRate:
    """:func:`sharpkit.suggest_learning_rate` for a Hugging Face Trainer that has not trained yet.

    Batch size (with accumulation, on one process), steps, schedule, loss, optimizer and its groups are the Trainer's own.

    Args:
        trainer: only read.
        schedule: where the Trainer's is none that is known here.
        settings: further arguments, such as ``steps`` or ``validation``.

    Raises:
        UnsupportedError: the Trainer's schedule is not known.
        ObjectiveError: as there.
    """
    from sharpkit.integrations.transformers import trained_loss

    arguments = trainer.args
    if schedule is None:
        kind = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
        if kind not in _SCHEDULES:
            raise UnsupportedError(f"the Trainer's schedule, {kind}, is not known: pass schedule=, a name or a function of the share done")
        schedule = _SCHEDULES[kind]
    with random_states_kept():  # a shuffling sampler draws its seed from the global state
        loader = trainer.get_train_dataloader()
        batches, size, total = _first_batches(loader)
    accumulated = int(arguments.gradient_accumulation_steps)
    epoch = max(1, math.ceil(total / (size * accumulated)))
    steps = int(arguments.max_steps) if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * epoch)
    objective = Objective(trainer.model, batches, closure=partial(trained_loss, trainer), process_group=False)
    before = trainer.optimizer
    try:
        made = before if before is not None else trainer.create_optimizer()
    finally:
        trainer.optimizer = before
    settings = {"batch_size": min(size * accumulated, objective.num_samples), "num_samples": total, "steps": steps, **settings}
    return suggest_learning_rate(objective, made, schedule=schedule, **settings)


def _optimizers(configured: Any) -> list[torch.optim.Optimizer]:
    """Of what configure_optimizers may return: an optimizer, several, pairs of lists, dicts."""
    if isinstance(configured, torch.optim.Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers(configured["optimizer"])
    if isinstance(configured, Sequence):
        lists = len(configured) == 2 and all(isinstance(part, (list, tuple)) for part in configured)
        return [optimizer for part in (configured[0] if lists else configured) for optimizer in _optimizers(part)]
    raise ObjectiveError(f"configure_optimizers returned {type(configured).__name__}, no optimizer: there is nothing to suggest a rate for")


def _first_batches(loader: Iterable[Any]) -> tuple[list[Any], int, int]:
    """Batches of up to 4096 samples, the samples of a batch, and of all the data as far as it says how many they are."""
    batches, count, size = [], 0, 0
    with random_states_kept():
        for batch in loader:
            batches.append(batch)
            size = max(size, samples_in(batch, False))
            count += samples_in(batch, False)
            if count >= _MOST:
                break
    if not batches:
        raise ObjectiveError("the loader gave no batch")
    try:
        total = len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):  # a stream does not say
        total = count
    return batches, size, max(total, count)
