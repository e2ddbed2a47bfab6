"""``sharpkit transfer file.py:build``: do hyperparameters transfer from narrow to wide, as an exit code, in words and on a page."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharpkit.transfer.setup import Family

Document = dict[str, Any]
Answer = tuple[list[Document], Document, int]
TRANSFERS, DOES_NOT = 0, 3

_EXAMPLE = """a TARGET of transfer is file.py:function, where the function takes no arguments and returns a family of networks, for example
    def build():
        return make_model, make_optimizer, data, loss      # make_model(width), make_optimizer(model, width), batches, loss(output, target)
or a dict with the keys build, optimizer, data and loss or closure, or a sk.transfer.Family"""
_KEYS = ("build", "optimizer", "data", "loss", "closure")


def run_transfer_command(arguments: argparse.Namespace) -> Answer:
    """Diagnose the family; exit code 0 where hyperparameters transfer, 3 where they do not or where it is undecided."""
    from sharpkit._cli_commands import _check_folder
    from sharpkit._cli_output import say
    from sharpkit._cli_target import UsageError
    from sharpkit.reporting import report
    from sharpkit.transfer.verdict import diagnose

    for path in filter(None, (arguments.html, arguments.store)):
        _check_folder(path)
    family = load_family(arguments.target)
    for name in ("widths", "depths"):
        sizes = getattr(arguments, name)
        if sizes is not None and len(set(sizes)) < 3:
            raise UsageError(f"--{name} needs at least three different sizes: two give no error of a slope; got {sizes}")
    verdict = diagnose(
        family["build"],
        widths=arguments.widths,
        depths=arguments.depths,
        optimizer=family["optimizer"],
        data=family["data"],
        loss=family.get("loss"),
        closure=family.get("closure"),
        mode="full" if arguments.full else "quick",
        seeds=arguments.seeds,
        store=arguments.store,
        callback=None if arguments.quiet else say,
    )
    whole = verdict.to_dict()
    documents = [{key: value for key, value in whole.items() if key != "parts"}, *whole["parts"]]
    extra: Document = {"target": arguments.target, "text": str(verdict)}
    if arguments.html:
        title = f"Do hyperparameters of {arguments.target} transfer?"
        extra["page"] = str(report(arguments.html, documents, title=title, command=shlex.join(arguments.argv)))
    return documents, extra, TRANSFERS if verdict.passed else DOES_NOT


def load_family(target: str) -> Mapping[str, Any]:
    """Import the file, call the function, check what it returns.

    Args:
        target: ``"file.py:function"``; the name may also be that of a Family.

    Returns:
        build, optimizer, data, loss and closure, as far as given.

    Raises:
        UsageError: no such file or function, or it returned something else.
        TargetError: the file or the function raised; the original error is its cause.
    """
    from sharpkit._cli_target import returned_by
    from sharpkit.transfer.setup import Family

    return _checked(returned_by(target, _EXAMPLE, instead=Family), target)


def _fields(family: Family) -> Mapping[str, Any]:
    return {key: getattr(family, key) for key in _KEYS}


def _checked(returned: Any, target: str) -> Mapping[str, Any]:
    from sharpkit._cli_target import UsageError
    from sharpkit.transfer.setup import Family

    if isinstance(returned, Family):
        if returned.dimension != "width":
            raise UsageError(f"{target} returned a Family over {returned.dimension}s; transfer starts from one over widths.\n{_EXAMPLE}")
        return _fields(returned)
    if isinstance(returned, Mapping):
        unknown, missing = set(returned) - set(_KEYS), [key for key in _KEYS[:3] if key not in returned]
        if not unknown and not missing:
            return dict(returned)
        came = f"a dict with the keys {', '.join(map(str, returned))}"
    elif isinstance(returned, tuple) and len(returned) in (3, 4) and all(map(callable, returned[:2])):
        return dict(zip(_KEYS, returned, strict=False))
    else:
        came = f"a tuple of {', '.join(type(x).__name__ for x in returned)}" if isinstance(returned, tuple) else type(returned).__name__
    raise UsageError(f"{target} returned {came}.\n{_EXAMPLE}")
