"""Data that do not fit: passes from one seed are the same batches, which two check sums show, or are refused."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from problems import gaussian, labels, mlp
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import sharpkit as sk
from sharpkit.objective.batches import moved_ahead

X, Y = gaussian(30, 4), labels(30)


class Augmented(Dataset[Any]):
    """Noise on every sample, by torch's, Python's and NumPy's generators."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4).double() + random.gauss(0, 1) + np.random.normal()  # noqa: NPY002
        return X[i] + 0.1 * noise, Y[i]


class Stream(IterableDataset[Any]):
    """Batches of a length, in an order of its own."""

    def __init__(self, *, lasting: bool) -> None:
        self.own = torch.Generator().manual_seed(5) if lasting else None

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        for part in torch.randperm(30, generator=self.own).split(10):
            yield X[part], Y[part]


LOADERS = {
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True),
    "shuffled by its own generator": lambda: DataLoader(
        TensorDataset(X, Y), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "augmented": lambda: DataLoader(Augmented(), batch_size=7, shuffle=True),
    "a stream": lambda: Stream(lasting=False),
}


def hessian(data: Any) -> sk.HessianOperator:
    return sk.HessianOperator(sk.Objective(mlp().model, data, loss=F.cross_entropy), retain=False)


@pytest.mark.parametrize("name", LOADERS)
def test_products_are_those_of_the_batches_of_one_pass(name: str) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].sum()  # type: ignore[union-attr]  # noqa: NPY002
    passes = sk.SeededPasses(LOADERS[name](), seed=4)
    batches, operator, v = list(passes), hessian(passes), gaussian(hessian([(X, Y)]).size)
    expected = hessian(batches) @ v
    torch.testing.assert_close(operator @ v, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(operator @ v, expected, rtol=1e-12, atol=1e-14)
    assert len(passes) == len(batches)
    other = list(sk.SeededPasses(LOADERS[name](), seed=5))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(batches, other, strict=True))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].sum()  # type: ignore[union-attr]  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:], "nobody's generator has moved"


class Shrinking:
    """One batch fewer in each pass."""

    def __init__(self) -> None:
        self.left = 6

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        return iter([(X[:5], Y[:5])] * self.left)


def test_what_a_seed_does_not_fix_is_refused() -> None:
    with pytest.raises(sk.NonDeterministicError, match="although both began from the same seed"):
        hessian(sk.SeededPasses(Stream(lasting=True)))
    with pytest.raises(sk.ObjectiveError, match="batches"):
        hessian(sk.SeededPasses(Shrinking()))
    with pytest.raises(sk.NonDeterministicError, match=r"SeededPasses\(loader\)"):
        hessian(LOADERS["shuffled"]())


class Endless:
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield X, Y


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (Endless(), "a Endless without a length"),
        (iter([(X, Y)]), "can be gone through only once"),
        (TensorDataset(X, Y), "gives single samples, not batches"),
        (3, "got int"),
    ],
)
def test_what_has_no_passes_is_refused(data: Any, said: str) -> None:
    with pytest.raises((TypeError, sk.ObjectiveError), match=said):
        sk.SeededPasses(data)


def test_the_next_batch_is_moved_before_this_one_is_worked_on() -> None:
    asked = list[int]()

    def batches() -> Iterator[Tensor]:
        for i in range(3):
            asked.append(i)
            yield torch.full((2,), float(i))

    going = moved_ahead(batches(), torch.device("meta"))
    next(going)
    assert asked == [0, 1]
    assert len(list(going)) == 2
    asked.clear()
    assert next(moved_ahead(batches(), torch.device("cpu")))[0] == 0 and asked == [0], "on the CPU it would only take memory"
