"""What every test shares: plots without a screen, and proof that no test or measurement disturbs PyTorch's global state."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from sharpkit.optimizers import kinds

os.environ.setdefault("MPLBACKEND", "Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what runs in the background so, and Ctrl-C could not be tested
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What has been imported stays: no collection of garbage need look at it again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _global_state_is_left_alone() -> Iterator[None]:
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    assert torch.get_default_dtype() == dtype, "the test changed torch's default dtype"
    assert torch.is_grad_enabled() == grad, "the test changed torch's gradient mode"


@pytest.fixture
def optimizers_as_known() -> Iterator[None]:
    """The table of optimizers is put back after a test that registers some."""
    before = dict(kinds._KINDS)
    yield
    kinds._KINDS.clear()
    kinds._KINDS.update(before)
