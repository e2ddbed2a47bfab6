"""The base that a parametrisation counts width from: a model, or shapes by name, also in the file of microsoft's mup (name -> shape)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sharpkit._arguments import as_path, shown
from sharpkit._errors import SharpkitError
from sharpkit.objective.guard import unwrap

Shape = tuple[int, ...]
BaseShape = tuple[int | None, ...]  # None where a dimension does not grow with the width
Role = Literal["input", "hidden", "readout", "vector", "fixed"]

_HEAD = """\
# This is a base shape file encoded in yaml
# - `null` indicates a dimension is "finite", i.e. a non-"width" dimension
# - a number indicates the base dimension of an "infinite" dimension, i.e. some notion of "width"
"""


def write_base_shapes(path: str | os.PathLike[str], base: nn.Module, other: nn.Module) -> None:
    """Write a base's shapes in the form of microsoft's mup, which reads them too (``mup.set_base_shapes(model, path)``).

    Args:
        path: of the file.
        base: the narrow model.
        other: the same model at any other width, which tells which dimensions grow; neither is changed.

    Raises:
        ValueError: the models have other names or numbers of dimensions.

    Example:
        >>> import tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "base.bsh")
        >>> write_base_shapes(path, nn.Linear(4, 64), nn.Linear(4, 128))
        >>> read_base_shapes(path)
        {'weight': (64, None), 'bias': (64,)}
    """
    wide = dict(unwrap(other).named_parameters())
    narrow = as_base(base)
    lines = [_HEAD]
    for name, p in narrow.matched(wide).items():
        lines.append(f"{name}:\n")
        sizes = zip(narrow.shape(name, tuple(p.shape)), p.shape, strict=True)
        lines += [f"- {'null' if b == n else b}\n" for b, n in sizes]
        if not p.ndim:
            lines[-1] = f"{name}: []\n"
    Path(as_path("path", path)).write_text("".join(lines), encoding="utf-8")


def read_base_shapes(path: str | os.PathLike[str]) -> dict[str, BaseShape]:
    """Shapes by name from a file that microsoft's mup or :func:`write_base_shapes` wrote; None where a dimension does not grow.

    Raises:
        SharpkitError: it is no such file; the message names the line.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "base.bsh"
        >>> _ = path.write_text(chr(10).join(["weight:", "- 64", "- null"]))
        >>> read_base_shapes(path)
        {'weight': (64, None)}
    """
    where = Path(as_path("path", path))
    shapes: dict[str, list[int | None]] = {}
    name = ""
    for number, line in enumerate(where.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].rstrip()
        if match := re.fullmatch(r"(['\"]?)([\w.\-]+)\1:\s*(\[[^]]*\])?", text):
            name = match[2]
            shapes[name] = [_dimension(d, where, number) for d in match[3].strip("[] ").split(",") if d.strip()] if match[3] else []
        elif (match := re.fullmatch(r"\s*-\s*(\S+)", text)) and name:
            shapes[name].append(_dimension(match[1], where, number))
        elif text:
            raise _no_shape(where, number)
    return {name: tuple(dims) for name, dims in shapes.items()}


def _dimension(text: str, path: Path, number: int) -> int | None:
    text = text.strip()
    if text in ("null", "~"):
        return None
    if not text.isdigit():
        raise _no_shape(path, number)
    return int(text)


def _no_shape(path: Path, number: int) -> SharpkitError:
    return SharpkitError(
        f"line {number} of {path} is no base shape: expected 'name:' and below it one '- number' or '- null' for each dimension, as mup's "
        "save_base_shapes writes"
    )


@dataclass(frozen=True)
class Base:
    """Shapes by name, with the model they are of where there is one."""

    shapes: Mapping[str, BaseShape]
    model: nn.Module | None

    def matched(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The same parameters, after their names and numbers of dimensions were compared.

        Raises:
            ValueError: they differ.
        """
        missing, extra = [n for n in named if n not in self.shapes], [n for n in self.shapes if n not in named]
        if missing or extra:
            raise ValueError(
                f"the base must have the same parameters as the model, only narrower: {len(missing)} are missing in the base "
                f"({', '.join(missing[:3])}) and {len(extra)} are in the base alone ({', '.join(extra[:3])}). Give it the same depth"
            )
        for name, p in named.items():
            if len(self.shapes[name]) != p.ndim:
                raise ValueError(f"{name} has {p.ndim} dimensions in the model and {len(self.shapes[name])} in the base")
        return dict(named)

    def shape(self, name: str, own: Shape) -> Shape:
        """Of a parameter in the base; dimensions that do not grow are the model's own."""
        return tuple(n if b is None else b for b, n in zip(self.shapes[name], own, strict=True))

    def std(self, name: str) -> float | None:
        """Standard deviation of the base's initial values, 0 for a single one; None without values."""
        if self.model is None:
            return None
        p = self.model.get_parameter(name)
        if p.device.type == "meta":
            return None
        return float(p.detach().float().std()) if p.numel() > 1 else 0.0

    def module(self, name: str) -> Any:
        """The base's module of this name, None if only shapes are known."""
        return None if self.model is None else self.model.get_submodule(name)


def as_base(base: Any) -> Base:
    """From a model, a mapping, or the path of a file.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(base, nn.Module):
        model = unwrap(base)
        return Base({name: tuple(p.shape) for name, p in model.named_parameters()}, model)
    if isinstance(base, Mapping):
        return Base({str(name): tuple(dims) for name, dims in base.items() if isinstance(dims, Sequence)}, None)
    if isinstance(base, (str, os.PathLike)):
        return Base(read_base_shapes(base), None)
    raise TypeError(f"base must be a narrow model, its shapes by name, or the path of a file of base shapes, got {shown(base)}")
