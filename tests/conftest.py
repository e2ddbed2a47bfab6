"""What every test shares: plots without a screen, and proof that no test or measurement disturbs PyTorch's global state."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def _global_state_is_left_alone() -> Iterator[None]:
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    assert torch.get_default_dtype() == dtype, "the test changed torch's default dtype"
    assert torch.is_grad_enabled() == grad, "the test changed torch's gradient mode"
