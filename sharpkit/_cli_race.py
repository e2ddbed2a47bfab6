"""``sharpkit race file.py:setup``: the learner against other ways to a learning rate, at equal cost, as a table and on a page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharpkit.training.race import RaceProblem

Document = dict[str, Any]
Answer = tuple[list[Document], Document, int]

_EXAMPLE = """a TARGET of race is file.py:function, where the function takes no arguments and returns what to train, for example
    def setup():
        return make_model, make_optimizer, data, loss      # make_model(seed), make_optimizer(params, lr), batches, loss(output, target)
or a dict with the keys model, optimizer, data, loss or closure, and test_data, or a sharpkit.training.race.RaceProblem"""
_KEYS = ("model", "optimizer", "data", "loss", "closure", "test_data")
_STEPS, _QUICK_STEPS = 1000, 200
_SEEDS, _QUICK_SEEDS = 3, 1
_QUICK_RATES = 5


def add_race_arguments(command: argparse.ArgumentParser, *, count: Callable[[str], Any], amount: Callable[[str], Any]) -> None:
    """The command's own arguments.

    Args:
        command: its parser.
        count, amount: parse a positive whole number, a positive number.
    """
    command.add_argument(
        "target", metavar="TARGET", help="file.py:function that returns (make_model, make_optimizer, data, loss), or a dict"
    )
    command.add_argument(
        "--steps", type=count, help=f"gradients that each way may spend, a seed (default: {_STEPS}; quick: {_QUICK_STEPS})"
    )
    command.add_argument("--seeds", type=count, help=f"runs of each way (default: {_SEEDS}; quick: {_QUICK_SEEDS})")
    command.add_argument("--rates", type=amount, nargs="+", metavar="LR", help="the grid (default: half decades that suit the optimizer)")
    command.add_argument("--quick", action="store_true", help=f"fewer steps and seeds, {_QUICK_RATES} rates")
    command.add_argument("--html", metavar="OUT", help="also write a self-contained page")


def run_race_command(arguments: argparse.Namespace) -> Answer:
    """Race, and give the table; exit code 0."""
    from sharpkit._cli_commands import _check_folder
    from sharpkit._cli_output import say
    from sharpkit.reporting import report
    from sharpkit.training.race import default_rates, race

    if arguments.html:
        _check_folder(arguments.html)
    problem = load_problem(arguments.target)
    quick = arguments.quick
    seeds = arguments.seeds or (_QUICK_SEEDS if quick else _SEEDS)
    rates = arguments.rates or default_rates(problem, points=_QUICK_RATES if quick else 9)
    result = race(
        problem,
        steps=arguments.steps or (_QUICK_STEPS if quick else _STEPS),
        seeds=range(arguments.seed, arguments.seed + seeds),
        rates=rates,
        callback=None if arguments.quiet else say,
    )
    document, extra = result.to_dict(), {"target": arguments.target, "text": str(result)}
    if arguments.html:
        title = f"Ways to a learning rate, raced on {arguments.target}"
        extra["page"] = str(report(arguments.html, [document], title=title, command=shlex.join(arguments.argv)))
    return [document], extra, 0


def load_problem(target: str) -> RaceProblem:
    """Import the file, call the function, check what it returns.

    Args:
        target: ``"file.py:function"``.

    Raises:
        UsageError: no such file or function, or it returned something else.
        TargetError: the file or the function raised; the original error is its cause.
    """
    from sharpkit._cli_target import returned_by

    return _checked(returned_by(target, _EXAMPLE), target)


def _checked(returned: Any, target: str) -> RaceProblem:
    from sharpkit._cli_target import UsageError
    from sharpkit.training.race import RaceProblem

    if isinstance(returned, RaceProblem):
        return returned
    if isinstance(returned, Mapping):
        if set(returned) <= set(_KEYS) and set(_KEYS[:3]) <= set(returned):
            return RaceProblem(**returned)
        came = f"a dict with the keys {', '.join(map(str, returned))}"
    elif isinstance(returned, tuple) and len(returned) in (3, 4) and all(map(callable, returned[:2])):
        return RaceProblem(*returned)
    else:
        came = f"a tuple of {', '.join(type(x).__name__ for x in returned)}" if isinstance(returned, tuple) else type(returned).__name__
    raise UsageError(f"{target} returned {came}.\n{_EXAMPLE}")
