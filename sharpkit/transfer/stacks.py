"""Networks of different depth compared: a stack of blocks has a first and a last one at every depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Stacks:
    """The numbered containers (``blocks.0``, ``blocks.1``, ...) whose length differs between the sizes.

    Attributes:
        names: of the containers.
        lengths: container -> size -> number of blocks.
    """

    names: tuple[str, ...] = ()
    lengths: dict[str, dict[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, models: Mapping[int, nn.Module]) -> Stacks:
        """Find them in one model for each size.

        Example:
            >>> make = lambda depth: nn.Sequential(nn.Linear(2, 2), nn.Sequential(*[nn.ReLU() for _ in range(depth)]))
            >>> Stacks.of({2: make(2), 4: make(4)}).lengths
            {'1': {2: 2, 4: 4}}
        """
        found: dict[str, dict[int, int]] = {}
        for size, model in models.items():
            for name, module in model.named_modules():
                if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
                    found.setdefault(name, {})[size] = len(module)
        varying = {n: by for n, by in found.items() if len(by) == len(models) and len(set(by.values())) > 1}
        outermost = {n: by for n, by in varying.items() if not any(n.startswith(f"{o}.") for o in varying if o != n)}
        return cls(tuple(outermost), outermost)

    def aliases(self, name: str, size: int) -> list[str]:
        """What a module or tensor is called when depths are compared: in the first or last block, or as it is; none in between.

        Example:
            >>> stacks = Stacks(("blocks",), {"blocks": {1: 1, 3: 3}})
            >>> stacks.aliases("blocks.0.out", 1), stacks.aliases("blocks.2.out", 3), stacks.aliases("blocks.1", 3)
            (['blocks.first.out', 'blocks.last.out'], ['blocks.last.out'], [])
        """
        for stack in self.names:
            match = re.match(rf"{re.escape(stack)}\.(\d+)(.*)", name) if stack else re.match(r"(\d+)(.*)", name)
            if match:
                place, rest = int(match[1]), match[2]
                begin = f"{stack}." if stack else ""
                ends = {"first": place == 0, "last": place == self.lengths[stack][size] - 1}
                return [f"{begin}{end}{rest}" for end, here in ends.items() if here]
        return [name]

    def inside(self, name: str) -> bool:
        """Whether a tensor belongs to a block."""
        return any(re.match(rf"{re.escape(s)}\.\d+" if s else r"\d+", name) for s in self.names)

    def ends(self, size: int) -> tuple[str, str]:
        """Names of the first and the last block of the longest stack; empty strings without one."""
        if not self.names:
            return "", ""
        longest = max(self.names, key=lambda n: self.lengths[n][size])
        begin = f"{longest}." if longest else ""
        return f"{begin}0", f"{begin}{self.lengths[longest][size] - 1}"
