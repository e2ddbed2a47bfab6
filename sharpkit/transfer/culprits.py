"""Which rule of the parametrisation is broken: every rule tested by itself, on sizes and effects measured at growing width or depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sharpkit.objective.objective import Closure
from sharpkit.transfer.fits import Slope, log_slope
from sharpkit.transfer.observing import (
    Callback,
    Observations,
    TensorTrack,
    Track,
    Values,
    at,
    check_counts,
    geometric_mean,
    observe,
    over_steps,
)
from sharpkit.transfer.setup import Build, Family, MakeOptimizer, check_sizes

ROLES = ("input", "hidden", "readout", "vector", "fixed")
IN_WORDS = {
    "input": "input weights and embeddings",
    "hidden": "hidden weights",
    "readout": "readout weights",
    "vector": "biases and gains",
    "fixed": "tensors whose shape does not change",
}


def role_of(tensor: TensorTrack) -> str:
    """``"input"``, ``"hidden"``, ``"readout"``, ``"vector"`` or ``"fixed"``.

    Growing output and input: hidden. Growing output alone: input, or, with one dimension, vector. A table that is looked up is input, and
    so is a matrix whose result grows although its first dimension does not (positions added to the stream). Growing input alone: readout.

    Example:
        >>> role_of(TensorTrack("head.weight", shapes={8: (10, 8), 16: (10, 16)}, entries={8: 640, 16: 640}))
        'readout'
        >>> role_of(TensorTrack("norm.weight", shapes={8: (8,), 16: (16,)}, entries={8: 512, 16: 1024}))
        'vector'
    """
    growing = growing_dimensions(tensor.shapes)
    if not growing:
        return "fixed"
    if len(next(iter(tensor.shapes.values()))) == 1:
        return "vector"
    if tensor.table:
        return "input"
    if len(growing) > 1:
        return "hidden"
    result_grows = len(set(tensor.entries.values())) > 1
    return "input" if 0 in growing or result_grows else "readout"


def growing_dimensions(shapes: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    """Which dimensions differ between the sizes.

    Example:
        >>> growing_dimensions({8: (8, 3, 3), 16: (16, 3, 3)})
        (0,)
    """
    columns = zip(*shapes.values(), strict=True)
    return tuple(i for i, column in enumerate(columns) if len(set(column)) > 1)


# The mildest broken rule shifts an exponent by 1/2, and widths of 64 to 512 of a correct network show up to about 0.15: half way
# (experiments/transfer_faults.py).
MINIMAL_EXPONENT = 0.25
# Standard errors: some ten rules are tested with errors known from 7 to 10 degrees of freedom, whose t-quantile for one false alarm in a
# hundred checks is 4 to 5; the exponent asked for above makes the joint condition stricter (experiments/transfer_faults.py).
MINIMAL_ERRORS = 4.0

RULES = {
    "hidden initialisation": "variance 1/fan_in",
    "input initialisation": "outputs of one size at every width",
    "readout initialisation": "logits that fall as width^-1/2 or faster",
    "readout multiplier": "logits multiplied by 1/fan_in (or, equivalently, variance 1/fan_in^2 and a rate by 1/fan_in)",
    "attention scale": "q.k/d, not q.k/sqrt(d)",
    "hidden learning rate": "by 1/fan_in under Adam, constant under SGD",
    "input learning rate": "constant under Adam, by fan_out under SGD",
    "readout learning rate": "with a 1/fan_in multiplier constant under Adam, by fan_in under SGD",
    "vector learning rate": "biases and gains: constant under Adam, by fan_out under SGD",
    "fixed learning rate": "constant",
    "weight decay": "decoupled decay: learning rate x weight decay constant",
    "depth multiplier": "residual branches by depth^-1/2",
    "depth learning rate": "inside the blocks by depth^-1/2 under Adam, constant under SGD",
}


@dataclass(frozen=True)
class Evidence:
    """One rule, tested.

    Attributes:
        rule: of RULES.
        where: names of the tensors or coordinates that were looked at.
        slope: measured exponent.
        expected: what the rule asks for.
        above_only: whether a smaller exponent is as good.
        strict: how many times the least exponent and error that count it must be off (a single tensor among many: twice).
    """

    rule: str
    where: tuple[str, ...]
    slope: Slope
    expected: float = 0.0
    above_only: bool = False
    strict: float = 1.0

    @property
    def excess(self) -> float:
        """Measured minus expected exponent."""
        return self.slope.value - self.expected

    @property
    def broken(self) -> bool:
        """Off by an exponent that counts, and by many standard errors."""
        off = self.excess if self.above_only else abs(self.excess)
        needed = max(MINIMAL_EXPONENT * self.strict, MINIMAL_ERRORS * math.sqrt(self.strict) * self.slope.stderr)
        return math.isfinite(off) and off > needed

    @property
    def confidence(self) -> float:
        """Probability that the exponent is off by more than half of the least that counts."""
        from scipy.stats import t

        if not self.slope.stderr > 0:
            return 1.0
        return float(t.cdf((abs(self.excess) - MINIMAL_EXPONENT / 2) / self.slope.stderr, max(self.slope.num_points - 2, 1)))


def gather(seen: Observations) -> list[Evidence]:
    """Every rule that can be tested on what was seen, broken or not."""
    if seen.dimension == "depth":
        return _depth(seen)
    return [*_initialisations(seen), *_attention(seen), *_learning_rates(seen), *_decay(seen)]


def by_role(seen: Observations) -> dict[str, list[TensorTrack]]:
    """The tensors that take part, by role."""
    found: dict[str, list[TensorTrack]] = {}
    for tensor in seen.tensors.values():
        if not _idle(tensor):
            found.setdefault(role_of(tensor), []).append(tensor)
    return found


def _idle(tensor: TensorTrack) -> bool:
    """No effect, or one that is rounding noise (the bias of attention's keys has no gradient)."""
    pairs = [(e, x) for s in tensor.effect for e, x in zip(tensor.effect[s], tensor.level[s], strict=True) if math.isfinite(e)]
    return not pairs or geometric_mean(e / x if x > 0 else 0.0 for e, x in pairs) < 1e-5 or any(e == 0 for e, _ in pairs)


# -- initialisation ---------------------------------------------------------------------------------------------------------


def _initialisations(seen: Observations) -> list[Evidence]:
    found = []
    expected = {"hidden": 0.0, "input": 0.0, "readout": -0.5}
    for role, exponent in expected.items():
        tracks = [t for t in _owners(seen, role) if _positive(t.spread)]
        if tracks:
            gains = {t.name: _gain(t, _features(seen, t.name) if role == "readout" else None) for t in tracks}
            found += _pooled(f"{role} initialisation", gains, exponent, above_only=role == "readout")
    return found


def _owners(seen: Observations, role: str) -> list[Track]:
    """The outputs of the modules that own matrices of this role (where a change of them shows first)."""
    names = dict.fromkeys(
        t.shown_in
        for t in seen.tensors.values()
        if role_of(t) == role
        and t.shown_in in seen.coordinates
        and len(next(iter(t.shapes.values()))) > 1
        and (role == "readout" or _own(t))
    )
    return [seen.coordinates[name] for name in names]


def _own(tensor: TensorTrack) -> bool:
    owner = tensor.name.rpartition(".")[0] or "output"
    return tensor.shown_in == owner or tensor.shown_in.startswith((f"{owner}[", f"{owner} (", f"{owner}."))


def _features(seen: Observations, name: str) -> Track | None:
    """What a readout reads, before any multiplier: the last growing output of a module with parameters that is computed before it.

    The input of the readout's own module would hide a multiplier applied to it, as in ``head(x / width)``.
    """
    owned = {t.shown_in for t in seen.tensors.values() if _own(t)}
    found = None
    for track in seen.coordinates.values():
        if track.name == name:
            return found
        if track.name in owned and len(set(track.entries.values())) > 1:
            found = track
    return None


def _gain(track: Track, features: Track | None = None) -> Values:
    """Output over input (or over the features given) at step 0; the output itself where there is no floating input.

    The output's deviations from its mean over samples, that is: a bias of constant size would hide that logits fall.
    """
    out, into = track.spread, at(track.input_rms if features is None else features.rms, 0)
    return {s: [o / i if math.isfinite(i) and i > 0 else o for o, i in zip(out[s], into[s], strict=True)] for s in out}


# -- learning rates ---------------------------------------------------------------------------------------------------------


def _learning_rates(seen: Observations) -> list[Evidence]:
    found = []
    for role, tensors in by_role(seen).items():
        effects = {}
        for t in tensors:
            features = _features(seen, t.shown_in) if role == "readout" else None
            inputs = t.input_rms if features is None else at(features.rms, seen.num_steps)
            effects[t.name] = relative_effect(t, inputs, adaptive=seen.adaptive)
        found += _pooled(f"{role} learning rate", effects, 0.0)
    return found


def relative_effect(tensor: TensorTrack, inputs: Values, *, adaptive: bool) -> Values:
    """How much a tensor's update changes its module's output, for inputs of size one.

    For SGD, whose step grows with the gradient, the effect is that of a gradient as in a correct network, falling as 1/width in each entry
    of a growing output: a fault downstream that inflates the gradient is not charged to this tensor's rate.
    """
    matrix = len(next(iter(tensor.shapes.values()))) > 1
    power = (1 if adaptive else 2) if matrix else 0
    found: Values = {}
    for size, effects in tensor.effect.items():
        values = [e / x**power if x > 0 else math.nan for e, x in zip(effects, inputs[size], strict=True)]
        if not adaptive:
            values = [v / (g * tensor.entries[size]) if g > 0 else math.nan for v, g in zip(values, tensor.signal[size], strict=True)]
        found[size] = values
    return found


def _pooled(rule: str, values: dict[str, Values], expected: float, *, above_only: bool = False) -> list[Evidence]:
    """The role as a whole, and single tensors that are far off by themselves."""
    whole = log_slope(_mean(values.values()))
    single = {name: Evidence(rule, (name,), log_slope(v), expected, above_only, strict=2.0) for name, v in values.items()}
    judged = Evidence(rule, tuple(values), whole, expected, above_only)
    if judged.broken:
        alike = tuple(n for n, e in single.items() if e.excess * judged.excess > 0 and abs(e.excess) > MINIMAL_EXPONENT)
        return [Evidence(rule, alike or judged.where, whole, expected, above_only)]
    alone = [e for e in single.values() if e.broken]
    return alone or [judged]


def _mean(values: Iterable[Values]) -> Values:
    """Geometric mean over tensors, by size and seed."""
    every = list(values)
    return {s: [geometric_mean(column) for column in zip(*(v[s] for v in every), strict=True)] for s in every[0]}


# -- attention, decay, depth ------------------------------------------------------------------------------------------------


def _attention(seen: Observations) -> list[Evidence]:
    """Logits over a dimension d that grows: at initialisation they fall as d^-1/2, and their updates keep their size.

    A wrong scale shifts both exponents alike. The one at initialisation is known better, as queries and keys are independent there; the one
    of the updates, of either sign in small heads, must only not contradict it. Queries that start at zero leave the updates alone to tell.
    """
    tracks = [t for t in seen.coordinates.values() if t.kind == "attention logits" and _grows(list(t.inner.values()))]
    if not tracks:
        return []
    updates = _pooled("attention scale", {t.name: over_steps(t.update) for t in tracks}, 0.0)
    levels = {t.name: at(t.rms, 0) for t in tracks if _positive(at(t.rms, 0))}
    if not levels:
        return updates
    start = _pooled("attention scale", levels, -0.5)
    contradicted = all(e.excess * math.copysign(1.0, start[0].excess) < 0.1 for e in updates)
    return [] if contradicted and any(e.broken for e in start) else start


def _positive(values: Values) -> bool:
    return all(v > 0 for runs in values.values() for v in runs)


def _grows(values: Sequence[int | None]) -> bool:
    return None not in values and len(set(values)) > 1


def _decay(seen: Observations) -> list[Evidence]:
    """Exact: read from the optimizer."""
    found: dict[float, list[str]] = {}
    slopes: dict[float, Slope] = {}
    for tensor in seen.tensors.values():
        product = {s: [tensor.lr[s] * tensor.weight_decay[s]] * 3 for s in tensor.lr}
        if all(v[0] > 0 for v in product.values()):
            slope = log_slope(product)
            key = round(slope.value, 2)
            found.setdefault(key, []).append(tensor.name)
            slopes[key] = slope
    return [Evidence("weight decay", tuple(names), slopes[key]) for key, names in found.items()]


def _depth(seen: Observations) -> list[Evidence]:
    found = []
    if seen.stream:
        found.append(Evidence("depth multiplier", ("residual stream",), log_slope(seen.stream), 0.0))
    if seen.blocks:
        found.append(Evidence("depth learning rate", ("output",), log_slope(seen.blocks), 0.0))
    return found


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
