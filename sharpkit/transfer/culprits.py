"""Which rule of the parametrisation is broken: every rule tested by itself, on sizes and effects measured at growing width or depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sharpkit.objective import Closure
from sharpkit.transfer.observations import Observations
from sharpkit.transfer.observing import Callback, check_counts, observe
from sharpkit.transfer.roles import IN_WORDS
from sharpkit.transfer.rules import RULES, Evidence, gather
from sharpkit.transfer.setup import Build, Family, MakeOptimizer, check_sizes
from sharpkit.transfer.slopes import Slope


@dataclass(frozen=True)
class Culprit:
    """A rule that is broken.

    Attributes:
        rule: ``"hidden learning rate"``, ``"readout multiplier"``, ``"attention scale"``, ``"weight decay"``, ...; all are in
            ``sharpkit.transfer.rules.RULES``.
        where: names of the tensors or coordinates.
        slope: measured exponent.
        expected: what the rule asks for.
        evidence: in words, with the remedy.
        confidence: probability, given the slope's error, that the exponent is off by more than half of the least exponent that counts.
    """

    rule: str
    where: tuple[str, ...]
    slope: Slope
    expected: float
    evidence: str
    confidence: float

    @property
    def strength(self) -> float:
        """How far the exponent is off."""
        return abs(self.slope.value - self.expected)

    def __str__(self) -> str:
        return f"{self.rule}: {self.evidence}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": "culprit",
            "version": 1,
            "rule": self.rule,
            "where": list(self.where),
            "slope": self.slope.to_dict(),
            "expected": self.expected,
            "evidence": self.evidence,
            "confidence": self.confidence,
        }


def find_culprits(
    build: Build,
    widths: Sequence[int],
    *,
    optimizer: MakeOptimizer,
    data: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    closure: Closure | None = None,
    steps: int = 4,
    seeds: int = 3,
    dimension: str = "width",
    callback: Callback | None = None,
) -> tuple[Culprit, ...]:
    """Train briefly at each width and name the rules that are broken, the strongest first; none for a correct parametrisation.

    No rule is looked up in the code of the model: what counts is how the outputs at initialisation, and the change that putting back one
    tensor makes in its module's output, grow with width.

    Args:
        build: width -> a fresh model (depth -> model with ``dimension="depth"``).
        widths: at least three.
        optimizer: (model, width) -> its optimizer.
        data: batches, as for :class:`sharpkit.Objective`; the first 64 samples are also the fixed batch.
        loss: ``loss(output, target)``.
        closure: ``closure(model, batch)``, instead of loss.
        steps: optimizer steps of each run.
        seeds: runs at each width; with fewer than three, few rules reach their significance.
        dimension: ``"width"`` or ``"depth"``.
        callback: called with (width, seed) after each run.

    Returns:
        the broken rules. A rule counts as broken when its exponent is off by more than 0.25 and by more than four standard errors.

    Raises:
        ValueError, TypeError: arguments of the wrong kind.

    Example:
        >>> import torch; from torch import nn
        >>> build = lambda n: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
        >>> adam = lambda model, n: torch.optim.Adam(model.parameters(), lr=1e-3)  # one rate for all widths
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> data = (x, (x[:, 0] > 0).long())
        >>> found = find_culprits(build, [64, 128, 256, 512], optimizer=adam, data=data, loss=nn.functional.cross_entropy)
        >>> [culprit.rule for culprit in found]
        ['readout multiplier', 'hidden learning rate']

    References:
        G. Yang, E. J. Hu et al., Tensor Programs V, 2022, arXiv:2203.03466, Table 8. G. Yang, J. B. Simon, J. Bernstein, A Spectral
        Condition for Feature Learning, 2023, arXiv:2310.17813.
    """
    family = Family(build, optimizer, data, loss=loss, closure=closure, dimension=dimension)
    sizes = check_sizes(widths, dimension=dimension, least=3)
    check_counts(steps=steps, seeds=seeds)
    return culprits_of(observe(family, sizes, steps=steps, seeds=seeds, effects=True, callback=callback))


def culprits_of(seen: Observations) -> tuple[Culprit, ...]:
    """The broken rules in observations made with effects."""
    broken = _unexplained([e for e in gather(seen) if e.broken])
    found = [
        Culprit(e.rule, e.where, e.slope, e.expected, _in_words(e, seen), e.confidence)
        for e in sorted(broken, key=lambda e: -abs(e.excess))
    ]
    return tuple(found)


def _unexplained(broken: list[Evidence]) -> list[Evidence]:
    """One name for what has one cause."""
    rules = {e.rule: e for e in broken}
    start, rate = rules.get("readout initialisation"), rules.get("readout learning rate")
    if start and rate and rate.excess > 0:  # too large from the beginning and in its updates: not the rate
        broken = [e for e in broken if e not in (start, rate)]
        broken.append(Evidence("readout multiplier", rate.where, rate.slope, rate.expected))
    attention = rules.get("attention scale")
    if attention:  # queries and keys of another size explain logits of another size, their rates those without a start
        causes = ["hidden initialisation"] if attention.expected else ["hidden initialisation", "hidden learning rate"]
        if any(c in rules and rules[c].excess * attention.excess > 0 for c in causes):
            broken = [e for e in broken if e.rule != "attention scale"]
    if "depth multiplier" in rules:  # larger branches change the output more at any rate
        broken = [e for e in broken if e.rule != "depth learning rate"]
    return broken


def _in_words(e: Evidence, seen: Observations) -> str:
    size = seen.dimension
    grow = "grow" if e.slope.value > 0 else "fall"
    grows = f"{grow} as {size}^{e.slope}"
    asked = f"{size}^{e.expected:g}" if e.expected else f"no change with {size}"
    role = IN_WORDS.get(e.rule.partition(" ")[0], "")
    many = f" ({', '.join(e.where[:3])}{', ...' if len(e.where) > 3 else ''})"
    rule = RULES[e.rule]
    if e.rule.endswith("initialisation"):
        return f"at initialisation the outputs of {role}{many} {grows}, where {asked} is asked for; the rule: {rule}"
    if e.rule == "readout multiplier":
        return f"logits are too large from the start, and the changes that the readout's updates make in them {grows}; the rule: {rule}"
    if e.rule == "attention scale":
        what = "attention logits at initialisation" if e.expected else "changes of attention logits"
        return f"{what}{many} {grows}, where {asked} is asked for; the rule: {rule}"
    if e.rule == "weight decay":
        return f"learning rate x weight decay of {len(e.where)} tensors{many} {grow}s as {size}^{e.slope}; the rule: {rule}"
    if e.rule == "depth multiplier":
        return f"what the blocks add to the residual stream at initialisation {grow}s as {size}^{e.slope}; the rule: {rule}"
    if e.rule == "depth learning rate":
        return f"the changes that the blocks' updates make in the output {grows}; the rule: {rule}"
    verdict = "too large for large ones" if e.excess > 0 else "too small for large ones: in the limit they take no part"
    return f"the changes that updates of {role}{many} make in their outputs {grows}: the rate is {verdict}; the rule: {rule}"
