"""Where a basis is kept: on the device, in host memory, in a file; what is promised to it, and when it is refused."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from problems_linalg import operator_with

import sharpkit as sk
from sharpkit.linalg.krylov import BasisRows, KrylovSpace, abreast, affordable_rows, checked_offload, place_for
from sharpkit.objective import memory
from sharpkit.objective.memory import Promise, available_memory, is_limited, keeps_memory_limit, limited, used_memory
from sharpkit.operators.base import SymmetricOperator

CPU = torch.device("cpu")
SPECTRUM = np.array([9.0, 5.0, 4.0, *np.linspace(1, 0, 60)])


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 10,000 bytes, of a process that holds 1,000."""
    gc.collect()  # promises of spaces that earlier tests have left
    monkeypatch.setattr(memory, "_free", lambda device: 10_000.0)
    monkeypatch.setattr(memory, "used_memory", lambda device: 1_000.0)


# -- limits and promises ------------------------------------------------------------------------------------------------------
def test_a_limit_counts_from_what_the_process_holds_and_ends_with_the_call(free: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with limited(4_000, CPU):
        assert available_memory(CPU) == 4_000 and is_limited(CPU)
        monkeypatch.setattr(memory, "used_memory", lambda device: 3_500.0)
        assert available_memory(CPU) == 1_500, "what was taken since is taken off"
        with limited(10_000, CPU):
            assert available_memory(CPU) == 1_500, "an inner call may not take more than the outer one"
        monkeypatch.setattr(memory, "used_memory", lambda device: 9_000.0)
        assert available_memory(CPU) == 0, "never less than nothing"
        monkeypatch.setattr(memory, "used_memory", lambda device: 200.0)
        assert available_memory(CPU) == 4_000, "what others have given back is not the call's to take"
    assert available_memory(CPU) == 10_000 and not is_limited(CPU)
    with limited(None, CPU):
        assert available_memory(CPU) == 10_000 and not is_limited(CPU)
    with limited(50_000, CPU):
        assert available_memory(CPU) == 10_000, "no more than the machine has"
    with limited(10, torch.device("meta")):
        assert available_memory(CPU) == 10_000, "of another device"


def test_what_is_promised_is_not_available_to_others(free: None) -> None:
    promise = Promise(CPU, 3_000.0)
    assert available_memory(CPU) == 7_000
    elsewhere = Promise(torch.device("meta"), 5_000.0)
    assert available_memory(CPU) == 7_000
    promise.nbytes = 500.0
    assert available_memory(CPU) == 9_500
    del promise, elsewhere
    assert available_memory(CPU) == 10_000


def test_what_this_process_holds_is_seen() -> None:
    before = used_memory(CPU)
    held = torch.ones(32 * 2**20 // 4)  # 32 MiB that are written to
    assert 30 * 2**20 < used_memory(CPU) - before < 40 * 2**20 and len(held)
    assert used_memory(torch.device("meta")) == 0


def test_a_decorated_function_keeps_the_limit_it_is_given() -> None:
    @keeps_memory_limit
    def call(operator: object, *, memory_limit: float | None = None) -> bool:
        return is_limited(CPU)

    assert call(torch.eye(2), memory_limit=1e9) and call(operator=np.eye(2), memory_limit=1e9)
    assert not call(torch.eye(2)) and not call(torch.eye(2), memory_limit=None)
    for wrong, kind in ((0, ValueError), (-1, ValueError), ("8 GiB", TypeError), (float("nan"), ValueError)):
        with pytest.raises(kind, match=r"memory_limit must be a positive number, got .*: it is in bytes"):
            call(torch.eye(2), memory_limit=wrong)  # type: ignore[arg-type]


def test_four_fifths_of_a_limit_are_for_the_basis(free: None) -> None:
    operator = operator_with(np.arange(10.0))  # 80 bytes a row
    assert affordable_rows(operator) == 10_000 // 2 // 80
    with limited(4_000, CPU):
        assert affordable_rows(operator) == 40
        assert abreast(operator, 7) == 4, "three vectors beside each"


# -- rows ---------------------------------------------------------------------------------------------------------------------
def test_a_promise_is_kept_row_by_row_and_no_more_rows_are_made_room_for(free: None) -> None:
    operator = operator_with(np.arange(10.0))  # 80 bytes a row
    rows = BasisRows(operator, most=18)
    left = [available_memory(CPU)]
    for vector in torch.eye(10, dtype=torch.float64).repeat(2, 1)[:18]:
        rows.append(vector)
        left.append(available_memory(CPU))
    assert left == [10_000 - 80 * (18 - made) for made in range(19)]
    assert [len(chunk) for chunk in rows._chunks] == [16, 2]
    rows.append(torch.ones(10, dtype=torch.float64))  # more than was said: there is room all the same
    assert rows.size == 19 and len(list(rows.parts())) == 3 and available_memory(CPU) == 10_000
    del rows
    other = BasisRows(operator, most=20)
    assert available_memory(CPU) == 10_000 - 1_600 and other.size == 0
    del other
    assert available_memory(CPU) == 10_000


@pytest.mark.parametrize("count", [1, 17, 40])
def test_rows_in_a_file_are_the_same(tmp_path: Path, count: int) -> None:
    operator = operator_with(np.arange(50.0))
    here, there = BasisRows(operator), BasisRows(operator, offload=tmp_path)
    vectors = torch.linalg.qr(torch.randn(50, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0].T
    for vector in vectors:
        here.append(vector)
        there.append(vector)
    x = torch.linspace(-1, 1, 50, dtype=torch.float64)
    assert torch.equal(torch.cat(list(there.parts())), vectors) and torch.equal(there.row(count - 1), vectors[-1])
    assert torch.equal(here.coefficients(x), there.coefficients(x)) and torch.equal(here.orthogonalise(x)[0], there.orthogonalise(x)[0])
    mixing = np.eye(count)[:, ::-1][:, : (count + 1) // 2].copy()
    here.replace(mixing)
    there.replace(mixing)
    assert torch.equal(torch.cat(list(there.parts())), torch.cat(list(here.parts())))
    assert not os.listdir(tmp_path), "the file has no name, and is gone with the rows whatever happens"


def test_eigenpairs_over_a_file_are_those_over_memory(tmp_path: Path) -> None:
    operator = operator_with(SPECTRUM)
    here, there = sk.eigenpairs(operator, k=3), sk.eigenpairs(operator, k=3, offload=tmp_path)
    assert torch.equal(here.values, there.values) and torch.equal(here.vectors, there.vectors) and here.num_matvecs == there.num_matvecs
    assert torch.equal(sk.eigenpairs(operator, k=3, offload=str(tmp_path)).values, here.values)


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(sk.OutOfMemoryError, match=r"has no room for 7\.88 KiB of basis vectors \(No space left on device\): give offload="):
        sk.eigenpairs(operator_with(SPECTRUM), k=3, offload=tmp_path)


def test_offload_is_checked() -> None:
    assert checked_offload(True) is True and checked_offload(np.False_) is False and checked_offload(0) is False
    for wrong, kind in ((2, TypeError), (None, TypeError), ("no/such/folder", ValueError), (__file__, ValueError), ("", ValueError)):
        with pytest.raises(kind, match="offload must be"):
            checked_offload(wrong)  # type: ignore[arg-type]


def test_a_basis_goes_where_it_fits_and_is_refused_where_it_fits_nowhere(free: None, tmp_path: Path) -> None:
    operator = operator_with(np.arange(10.0))
    assert place_for(operator, 62, False) is False, "half of what is free"
    assert place_for(operator, 125, False) is False, "without a limit, all that is free if need be"
    with pytest.raises(
        sk.OutOfMemoryError, match=r"a basis of 126 vectors takes 9\.84 KiB, and 9\.77 KiB may be taken for it on cpu: ask for"
    ):
        place_for(operator, 126, False)
    assert place_for(operator, 10_000, True) is True and place_for(operator, 10_000, tmp_path) == tmp_path
    with limited(4_000, CPU):
        assert place_for(operator, 46, False) is False, "four vectors of fifty are left to the products"
        with pytest.raises(sk.OutOfMemoryError, match=r"a basis of 47 vectors takes 3\.67 KiB, and 3\.59 KiB may be taken for it on cpu"):
            place_for(operator, 47, False)


def test_a_basis_that_the_device_does_not_hold_goes_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_free", lambda device: 1e6 if device.type == "cpu" else 1e3)
    elsewhere = operator_with(np.arange(10.0))
    elsewhere.device = torch.device("meta")
    assert place_for(elsewhere, 6, False) is False and place_for(elsewhere, 7, False) is True
    assert KrylovSpace(elsewhere, offload=True).rows.storage_device == CPU
    rows = BasisRows(elsewhere, offload=True)
    for _ in range(10):
        rows.append(torch.ones(10, dtype=torch.float64))
    assert [len(part) for part in rows.parts()] == [4, 4, 2], "a few rows at a time, not a second basis"


# -- what the process really takes ------------------------------------------------------------------------------------------------
HUGE = 2**22  # numbers of a vector, 32 MB: the C library gives those back at once
LIMITED: dict[str, Callable[[SymmetricOperator, float], object]] = {
    "eigenpairs": lambda A, limit: sk.eigenpairs(A, k=1, max_matvecs=14, memory_limit=limit),
    "spectral_density": lambda A, limit: sk.spectral_density(A, num_probes=3, num_steps=8, memory_limit=limit),
    "trace": lambda A, limit: sk.trace(A, num_matvecs=12, memory_limit=limit),
    "frobenius_norm": lambda A, limit: sk.frobenius_norm(A, max_matvecs=12, memory_limit=limit),
    "diagonal": lambda A, limit: sk.diagonal(A, num_probes=16, memory_limit=limit),
    "power_iteration": lambda A, limit: sk.power_iteration(A, k=2, max_matvecs=8, memory_limit=limit),
}


@pytest.mark.parametrize("name", [name if name == "power_iteration" else pytest.param(name, marks=pytest.mark.slow) for name in LIMITED])
@pytest.mark.filterwarnings("ignore::sharpkit.ConvergenceWarning")
def test_a_limit_holds_for_the_memory_of_the_process(name: str) -> None:
    scale = torch.linspace(0, 1, HUGE).double() ** 8
    operator, limit = sk.as_operator(lambda v: (scale if v.ndim == 1 else scale[:, None]) * v, size=HUGE, check=False), 24.0 * 8 * HUGE
    before, peak, done = used_memory(CPU), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak.append(used_memory(CPU) - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        LIMITED[name](operator, limit)
    finally:
        done.set()
        watcher.join()
    assert 3 * 8 * HUGE < max(peak) <= limit


def test_power_iteration_is_refused_where_its_vectors_do_not_fit() -> None:
    with pytest.raises(sk.OutOfMemoryError, match="a basis of 9 vectors"):
        sk.power_iteration(operator_with(SPECTRUM), k=9, memory_limit=10 * 8 * len(SPECTRUM))
