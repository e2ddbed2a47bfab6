"""What a user's type checker sees: the real type of everything public, and an error where a name does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sharpkit as sk

pytestmark = pytest.mark.slow  # `make types` runs it, where the type checker has looked at everything already
mypy = pytest.importorskip("mypy.api", reason="the type checker is not installed here")

ROOT = Path(__file__).parents[1]
PACKAGES = {"sk": sk, "sk.transfer": sk.transfer, "sk.sinks": sk.sinks}

SCRIPT = """
import torch
import sharpkit as sk

model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
objective = sk.Objective(model, (torch.randn(8, 3), torch.randn(8, 1)), loss=torch.nn.functional.mse_loss)
sharpness = sk.measure(objective, optimizer=optimizer)
reveal_type(sharpness.lambda_max.value)  # float
reveal_type(sharpness.stable_lr.upper)  # float
reveal_type(sk.eigenpairs(sk.HessianOperator(objective), k=2).values)  # Tensor
reveal_type(sk.HessianOperator(objective) + 0.5)  # SymmetricOperator
reveal_type(sk.learning_rate_curve(objective, optimizer).max_lr(32))  # Bounded
reveal_type(sk.Monitor(model, optimizer, loss=torch.nn.functional.mse_loss).history[0].step)  # int
reveal_type(sk.critical_learning_rate(objective, optimizer).value)  # float
"""


def public_names() -> list[str]:
    names = [f"{package}.{name}" for package, module in PACKAGES.items() for name in getattr(module, "__all__", [])]
    return [name for name in names if name not in PACKAGES]


@pytest.fixture(scope="module")
def revealed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What mypy says of each line of a user's script, by line number."""
    lines = SCRIPT.splitlines() + [f"reveal_type({name})" for name in public_names()] + ["sk.lambda_maxx", "sk.transfer.lambda_maxx"]
    script = tmp_path_factory.mktemp("types") / "script.py"
    script.write_text("\n".join(lines))
    cache = ROOT / ".mypy_cache"
    told, errors, _ = mypy.run(["--config-file=", "--strict", f"--cache-dir={cache}", "--ignore-missing-imports", str(script)])
    assert not errors
    found = re.findall(r"script\.py:(\d+): (?:note|error): (.*)", told)
    return {int(number): text for number, text in found}


def test_no_public_name_is_any_to_a_type_checker(revealed: dict[int, str]) -> None:
    first = len(SCRIPT.splitlines()) + 1
    shown = {name: revealed[first + i] for i, name in enumerate(public_names())}
    assert len(shown) > 80
    assert not {name: text for name, text in shown.items() if re.search(r'(is "|-> )(builtins\.)?Any"', text)}


def test_what_calls_return_has_its_real_type(revealed: dict[int, str]) -> None:
    for number, line in enumerate(SCRIPT.splitlines(), start=1):
        if "reveal_type" in line:
            expected = line.rpartition("# ")[2]
            assert re.search(rf'[".]{expected}"', revealed[number]), f"{line}: {revealed[number]}"


def test_a_misspelt_name_is_an_error_to_a_type_checker(revealed: dict[int, str]) -> None:
    last = max(revealed)
    assert "has no attribute" in revealed[last - 1] and "has no attribute" in revealed[last]
