"""``file.py:function`` on the command line becomes an Objective, or an error that says what to mend."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import sharpkit as sk

if TYPE_CHECKING:
    from torch.optim import Optimizer

_OURS = Path(sk.__file__).resolve().parent

_EXAMPLE = """a TARGET is file.py:function, where the function takes no arguments and returns the Objective, for example
    def objective():
        return sk.Objective(model, (inputs, targets), loss=F.cross_entropy)      # or: (sk.Objective(...), optimizer)"""


class UsageError(Exception):
    """The command line asks for something that is not there; exit code 2."""


class TargetError(Exception):
    """The user's own code failed; exit code 1."""


def load_target(target: str) -> tuple[sk.Objective, Optimizer | None]:
    """Import the file, call the function, check what it returns.

    Args:
        target: ``"file.py:function"``.

    Returns:
        The objective and, where the function returned one, the optimizer.

    Raises:
        UsageError: no such file or function, or it returned something else.
        TargetError: the file or the function raised; the original error is its cause.
    """
    return _checked(returned_by(target, _EXAMPLE), target)


def returned_by(target: str, example: str, *, instead: type | None = None) -> Any:
    """What the function of a ``file.py:function`` returns.

    Args:
        target: as on the command line.
        example: of a target, shown where this one is none.
        instead: the name may also be that of an object of this type, which is then returned itself.

    Raises:
        UsageError: no such file or function.
        TargetError: the file or the function raised; the original error is its cause.
    """
    file, colon, name = target.rpartition(":")
    if not colon or not name:
        raise UsageError(f"cannot read {target!r} as a TARGET: it has no ':function' at its end.\n{example}")
    module = _import_file(Path(file))
    if instead is not None and isinstance(getattr(module, name, None), instead):
        return getattr(module, name)
    function = _find_function(module, name, Path(file), example)
    try:
        return function()
    # SystemExit too: a training script that ends in sys.exit() would end this program with its own exit code, unexplained
    except (Exception, SystemExit) as error:
        raise TargetError(f"{target} raised {type(error).__name__}: {error}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"the file {path} {what} (looked in {Path.cwd()})")
    if path.suffix != ".py":
        raise UsageError(f"{path} is not a Python file: expected a name that ends in .py")
    name = f"_sharpkit_target_{path.stem}"  # a name that no import finds: a target called torch.py must not hide torch
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UsageError(f"Python cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look a class's module up by its name
    sys.path.insert(0, str(path.resolve().parent))  # as "python file.py" would: the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TargetError(f"importing {path} raised {type(error).__name__}: {error}") from error
    return module


def _find_function(module: ModuleType, name: str, path: Path, example: str) -> Callable[[], Any]:
    if not hasattr(module, name):
        # only what the file itself defines: what it imported would bury the name that was misspelt
        own = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise UsageError(f"{path} has no function {name!r}; it defines {', '.join(sorted(own)) or 'no functions'}\n{example}")
    function = getattr(module, name)
    if not callable(function):
        raise UsageError(f"{name!r} in {path} is a {type(function).__name__}, not a function.\n{example}")
    try:
        required = [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    except (TypeError, ValueError):  # a callable written in C may have no signature: calling it will tell
        required = []
    if required:
        raise UsageError(f"{name}() in {path} needs the arguments {', '.join(required)}; it must be callable without any.\n{example}")
    return function  # type: ignore[no-any-return]


def _checked(returned: Any, target: str) -> tuple[sk.Objective, Optimizer | None]:
    from torch.optim import Optimizer

    pair = returned if isinstance(returned, tuple) else (returned, None)
    if len(pair) == 2 and isinstance(pair[0], sk.Objective) and isinstance(pair[1], Optimizer | None):
        return pair[0], pair[1]
    came = f"a tuple of {', '.join(type(x).__name__ for x in returned)}" if isinstance(returned, tuple) else type(returned).__name__
    raise UsageError(f"{target} returned {came}; expected an sk.Objective, or a tuple (sk.Objective, optimizer).\n{_EXAMPLE}")


# -- tracebacks ------------------------------------------------------------------------------------------------------------------


def users_traceback(error: BaseException, target: str) -> str:
    """The traceback of an error that came out of the user's code: from their first line on, without sharpkit's lines.

    Args:
        error: as it reached the command line; of the errors that caused it, the first that came out of the user's code is shown.
        target: ``"file.py:function"``; the user's code is what lies in the folder of the file and below.

    Returns:
        The text, as Python prints a traceback. Empty where none of the user's lines took part, or where sharpkit refused what they asked
        for in a sentence that says so.
    """
    from sharpkit._errors import SharpkitError

    folder = Path(target.rpartition(":")[0]).resolve().parent
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    for each in reversed(causes):
        whose = [_owner(frame.filename, folder) for frame in traceback.extract_tb(each.__traceback__)]
        in_file = isinstance(each, SyntaxError) and _owner(each.filename or "", folder) == "user"  # it is read, not run: no line took part
        raised_there = in_file or [owner for owner in whose if owner in ("user", "sharpkit")][-1:] == ["user"]
        if raised_there or ("user" in whose and not isinstance(each, SharpkitError)):
            shown = traceback.TracebackException.from_exception(each)
            _trim(shown, folder)
            return "".join(shown.format())
    return ""


def _owner(filename: str, folder: Path) -> str:
    """Whose code a file holds: ``"user"``, ``"sharpkit"``, ``"python"`` (the import system) or ``"other"``."""
    if filename.startswith("<"):
        return "python" if filename.startswith("<frozen") else "other"
    path = Path(filename).resolve()
    if path.is_relative_to(_OURS):
        return "sharpkit"
    # an environment may lie in the user's folder
    return "user" if path.is_relative_to(folder) and "site-packages" not in path.parts else "other"


def _trim(shown: traceback.TracebackException, folder: Path) -> None:
    """Leave out what comes before the user's first line, and sharpkit's lines; of the errors behind this one too."""
    owners = [_owner(frame.filename, folder) for frame in shown.stack]
    begin = owners.index("user") if "user" in owners else 0
    kept = [frame for frame, owner in zip(shown.stack, owners, strict=True) if owner not in ("sharpkit", "python")]
    before = sum(owner not in ("sharpkit", "python") for owner in owners[:begin])
    # None, not an empty one: that would print its heading alone
    shown.stack = traceback.StackSummary.from_list(kept[before:]) if kept[before:] else None  # type: ignore[assignment]
    for behind in (shown.__cause__, shown.__context__):
        if behind is not None:
            _trim(behind, folder)
