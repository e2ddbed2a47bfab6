"""Which rule of the parametrisation is broken: every rule tested by itself, on sizes and effects measured at growing width or depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sharpkit._results import ProgressCallback, Result
from sharpkit.objective.objective import Closure
from sharpkit.transfer.fits import Slope, log_slope
from sharpkit.transfer.observing import Observations, TensorTrack, Track, Values, at, geometric_mean, observe, over_steps
from sharpkit.transfer.setup import Build, Family, MakeOptimizer, check_sizes

# The mildest broken rule shifts an exponent by 1/2, and widths of 64 to 512 of a correct network show up to about 0.15: half way
# (experiments/transfer_faults.py).
MINIMAL_EXPONENT = 0.25
# Standard errors: some ten rules are tested with errors known from 7 to 10 degrees of freedom, whose t-quantile for one false alarm in a
# hundred checks is 4 to 5; the exponent asked for above makes the joint condition stricter (experiments/transfer_faults.py).
MINIMAL_ERRORS = 4.0
# Times both, for a single tensor among many of its role, by judgement: there are dozens of them, so that some are off by chance.
_STRICT = 2.0
_ROUNDING = 1e-5  # of a coordinate, by judgement: the change that rounding makes in single precision, with room above
_CONTRADICTION = 0.1  # by judgement: updates off by less in the other direction are no evidence against the logits at initialisation

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
_ROLES = {
    "input": "input weights and embeddings",
    "hidden": "hidden weights",
    "readout": "readout weights",
    "vector": "biases and gains",
    "fixed": "tensors whose shape does not change",
}


@dataclass(frozen=True)
class Culprit(Result, kind="culprit"):
    """A rule that is broken."""

    # "hidden learning rate", "readout multiplier", "attention scale", "weight decay", ...; all are in sharpkit.transfer.culprits.RULES
    rule: str
    where: tuple[str, ...]  # names of the tensors or coordinates
    slope: Slope  # measured exponent
    expected: float  # exponent under the rule
    evidence: str  # in words, with the remedy
    confidence: float  # probability, given the slope's error, that the exponent is off by more than half of the least exponent that counts

    @property
    def strength(self) -> float:
        """How far the exponent is off."""
        return abs(self.slope.value - self.expected)

    def __str__(self) -> str:
        return f"{self.rule}: {self.evidence}"


def find_culprits(
    build: Build,
    widths: Sequence[int],
    *,
    optimizer: MakeOptimizer,
    data: Any,
    loss: Callable[[Any, Any], Tensor] | None = None,
    closure: Closure | None = None,
    steps: int = 4,
    seeds: int | Sequence[int] = 3,
    dimension: str = "width",
    callback: ProgressCallback | None = None,
) -> tuple[Culprit, ...]:
    """Train briefly at each width and name the rules that are broken, the strongest first; none for a correct parametrisation.

    No rule is looked up in the code of the model: what counts is how the outputs at initialisation, and the change that putting back one
    tensor makes in its module's output, grow with width.

    Args:
        build, optimizer, data, loss, closure, dimension: as for :func:`sharpkit.transfer.coordinate_check`.
        widths: at least three.
        steps: optimizer steps of each run.
        seeds: how many runs at each width, or their seeds; with fewer than three, few rules reach their significance.
        callback: called with a :class:`sharpkit.Progress` after each run.

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
        >>> culprits = find_culprits(build, [64, 128, 256, 512], optimizer=adam, data=data, loss=nn.functional.cross_entropy)
        >>> [culprit.rule for culprit in culprits]
        ['readout multiplier', 'hidden learning rate']

    References:
        G. Yang, E. J. Hu et al., Tensor Programs V, 2022, arXiv:2203.03466, Table 8. G. Yang, J. B. Simon, J. Bernstein, A Spectral
        Condition for Feature Learning, 2023, arXiv:2310.17813.
    """
    family = Family(build, optimizer, data, loss=loss, closure=closure, dimension=dimension)
    sizes = check_sizes(widths, dimension=dimension, least=3)
    return culprits_of(observe(family, sizes, steps=steps, seeds=seeds, effects=True, callback=callback))


def culprits_of(seen: Observations) -> tuple[Culprit, ...]:
    """The broken rules in observations made with effects."""
    broken = sorted(_unexplained([e for e in gather(seen) if e.broken]), key=lambda e: -abs(e.excess))
    return tuple(Culprit(e.rule, e.where, e.slope, e.expected, _in_words(e, seen.dimension), e.confidence) for e in broken)


# -- evidence -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Evidence:
    """One rule, tested."""

    rule: str  # a key of RULES
    where: tuple[str, ...]  # names of the tensors or coordinates that were looked at
    slope: Slope  # measured exponent
    expected: float = 0.0  # exponent under the rule
    above_only: bool = False  # whether a smaller exponent is as good
    strict: float = 1.0  # how many times the least exponent and error that count it must be off (a single tensor among many: twice)

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
        # each rule by one number a run: with depths the roles of single tensors do not change
        tests = (("depth multiplier", "residual stream", seen.stream), ("depth learning rate", "output", seen.blocks))
        return [Evidence(rule, (where,), log_slope(values)) for rule, where, values in tests if values]
    return [*_initialisations(seen), *_attention(seen), *_learning_rates(seen), *_decay(seen)]


def _unexplained(broken: list[Evidence]) -> list[Evidence]:
    """One name for what has one cause."""
    rules = {e.rule: e for e in broken}
    # a multiplier that is missing shows in both tests of the readout, a wrong rate in one
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


def _in_words(e: Evidence, size: str) -> str:
    grow, many = "grow" if e.slope.value > 0 else "fall", f" ({', '.join(e.where[:3])}{', ...' if len(e.where) > 3 else ''})"
    grows = f"{grow} as {size}^{e.slope}"
    expected = f"where {f'{size}^{e.expected:g}' if e.expected else f'no change with {size}'} is expected"
    role = _ROLES.get(e.rule.partition(" ")[0], "")
    if e.rule.endswith("initialisation"):
        text = f"at initialisation the outputs of {role}{many} {grows}, {expected}"
    elif e.rule == "readout multiplier":
        text = f"logits are too large from the start, and the changes that the readout's updates make in them {grows}"
    elif e.rule == "attention scale":
        text = f"{'attention logits at initialisation' if e.expected else 'changes of attention logits'}{many} {grows}, {expected}"
    elif e.rule == "weight decay":
        text = f"learning rate x weight decay of {len(e.where)} tensors{many} {grow}s as {size}^{e.slope}"
    elif e.rule == "depth multiplier":
        text = f"what the blocks add to the residual stream at initialisation {grow}s as {size}^{e.slope}"
    elif e.rule == "depth learning rate":
        text = f"the changes that the blocks' updates make in the output {grows}"
    else:
        verdict = f"too large at large {size}s" if e.excess > 0 else f"too small at large {size}s: in the limit they do not learn"
        text = f"the changes that updates of {role}{many} make in their outputs {grows}: the rate is {verdict}"
    return f"{text}; the rule: {RULES[e.rule]}"


def _pooled(rule: str, values: Mapping[str, Values], expected: float, *, above_only: bool = False) -> list[Evidence]:
    """The role as a whole, and single tensors that are far off by themselves."""
    # geometric means over tensors, by size and seed: noise of single tensors averages out, a common fault does not
    sizes = next(iter(values.values()))
    whole = log_slope({s: [geometric_mean(column) for column in zip(*(v[s] for v in values.values()), strict=True)] for s in sizes})
    single = {name: Evidence(rule, (name,), log_slope(v), expected, above_only, _STRICT) for name, v in values.items()}
    judged = Evidence(rule, tuple(values), whole, expected, above_only)
    if judged.broken:
        alike = tuple(n for n, e in single.items() if e.excess * judged.excess > 0 and abs(e.excess) > MINIMAL_EXPONENT)
        return [Evidence(rule, alike or judged.where, whole, expected, above_only)]
    return [e for e in single.values() if e.broken] or [judged]


# -- roles --------------------------------------------------------------------------------------------------------------------
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
    columns = list(zip(*tensor.shapes.values(), strict=True))
    growing = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    if not growing:
        return "fixed"
    if len(columns) == 1:
        return "vector"
    if tensor.table:
        return "input"
    if len(growing) > 1:
        return "hidden"
    return "input" if 0 in growing or _grows(tensor.entries.values()) else "readout"


def _grows(values: Iterable[int | None]) -> bool:
    different = set(values)  # None where a product of another size came before the softmax
    return None not in different and len(different) > 1


def _idle(tensor: TensorTrack) -> bool:
    """No effect, or one that is rounding noise (the bias of attention's keys has no gradient)."""
    pairs = [(e, x) for s in tensor.effect for e, x in zip(tensor.effect[s], tensor.level[s], strict=True) if math.isfinite(e)]
    return not pairs or geometric_mean(e / x if x > 0 else 0.0 for e, x in pairs) < _ROUNDING or any(e == 0 for e, _ in pairs)


def _matrix(tensor: TensorTrack) -> bool:
    return len(next(iter(tensor.shapes.values()))) > 1


def _own(tensor: TensorTrack) -> bool:
    """Whether its change shows first in an output of the module that owns it."""
    owner = tensor.name.rpartition(".")[0] or "output"
    return tensor.shown_in == owner or tensor.shown_in.startswith((f"{owner}[", f"{owner} (", f"{owner}."))


def _features(seen: Observations, name: str) -> Track | None:
    """What a readout reads, before any multiplier: the last growing output of a module with parameters that is computed before it.

    The input of the readout's own module would hide a multiplier applied to it, as in ``head(x / width)``.
    """
    owned = {t.shown_in for t in seen.tensors.values() if _own(t)}
    features = None
    for track in seen.coordinates.values():
        if track.name == name:
            return features
        if track.name in owned and _grows(track.entries.values()):
            features = track
    return None


# -- the rules ----------------------------------------------------------------------------------------------------------------
def _initialisations(seen: Observations) -> list[Evidence]:
    evidence = []
    for role, exponent in {"hidden": 0.0, "input": 0.0, "readout": -0.5}.items():
        # by outputs and not by entries of the weights, whose spread says little behind a norm or a multiplier;
        # the outputs in which a change of this role's matrices shows first
        names = [t.shown_in for t in seen.tensors.values() if role_of(t) == role and _matrix(t) and (role == "readout" or _own(t))]
        tracks = [seen.coordinates[name] for name in dict.fromkeys(names) if name in seen.coordinates]
        gains = {t.name: _gain(t, _features(seen, t.name) if role == "readout" else None) for t in tracks if _positive(t.spread)}
        if gains:
            evidence += _pooled(f"{role} initialisation", gains, exponent, above_only=role == "readout")
    return evidence


def _gain(track: Track, features: Track | None) -> Values:
    """Output over input (or over the features given) at step 0; the output itself where there is no floating input.

    The output's deviations from its mean over samples, that is: a bias of constant size would hide that logits fall.
    """
    out, into = track.spread, at(track.input_rms if features is None else features.rms, 0)
    return {s: [o / i if math.isfinite(i) and i > 0 else o for o, i in zip(out[s], into[s], strict=True)] for s in out}


def _positive(values: Values) -> bool:
    return all(v > 0 for runs in values.values() for v in runs)


def _learning_rates(seen: Observations) -> list[Evidence]:
    by_role: dict[str, dict[str, Values]] = {}
    for t in seen.tensors.values():
        if not _idle(t):
            role = role_of(t)
            features = _features(seen, t.shown_in) if role == "readout" else None
            inputs = t.input_rms if features is None else at(features.rms, seen.num_steps)
            by_role.setdefault(role, {})[t.name] = relative_effect(t, inputs, adaptive=seen.adaptive)
    return [e for role, effects in by_role.items() for e in _pooled(f"{role} learning rate", effects, 0.0)]


def relative_effect(tensor: TensorTrack, inputs: Values, *, adaptive: bool) -> Values:
    """How much a tensor's update changes its module's output, for inputs of size one.

    For SGD, whose step grows with the gradient, the effect is that of a gradient as in a correct network, falling as 1/width in each entry
    of a growing output: a fault downstream that inflates the gradient is not charged to this tensor's rate.
    """
    # a matrix multiplies its input; under SGD its gradient holds the input once more
    power = (1 if adaptive else 2) if _matrix(tensor) else 0
    relative: Values = {}
    for size, effects in tensor.effect.items():
        values = [e / x**power if x > 0 else math.nan for e, x in zip(effects, inputs[size], strict=True)]
        if not adaptive:
            values = [v / (g * tensor.entries[size]) if g > 0 else math.nan for v, g in zip(values, tensor.signal[size], strict=True)]
        relative[size] = values
    return relative


def _attention(seen: Observations) -> list[Evidence]:
    """Logits over a dimension d that grows: at initialisation they fall as d^-1/2, and their updates keep their size.

    A wrong scale shifts both exponents alike. The one at initialisation is known better, as queries and keys are independent there; the one
    of the updates, of either sign in small heads, must only not contradict it. If queries start at zero, there are only the updates.
    """
    tracks = [t for t in seen.coordinates.values() if t.kind == "attention logits" and _grows(t.inner.values())]
    if not tracks:
        return []
    updates = _pooled("attention scale", {t.name: over_steps(t.update) for t in tracks}, 0.0)
    levels = {t.name: at(t.rms, 0) for t in tracks if _positive(at(t.rms, 0))}
    if not levels:
        return updates
    start = _pooled("attention scale", levels, -0.5)
    # updates alone had raised two false alarms in correct transformers (docs/transfer.md)
    contradicted = all(e.excess * math.copysign(1.0, start[0].excess) < _CONTRADICTION for e in updates)
    return [] if contradicted and any(e.broken for e in start) else start


def _decay(seen: Observations) -> list[Evidence]:
    """Exact: read from the optimizer."""
    names: dict[float, list[str]] = {}
    slopes: dict[float, Slope] = {}
    for tensor in seen.tensors.values():
        product = {s: [tensor.lr[s] * tensor.weight_decay[s]] * 3 for s in tensor.lr}  # three alike, so that the error is known to be 0
        if all(v[0] > 0 for v in product.values()):
            slope = log_slope(product)
            key = round(slope.value, 2)
            names.setdefault(key, []).append(tensor.name)
            slopes[key] = slope
    return [Evidence("weight decay", tuple(where), slopes[key]) for key, where in names.items()]
