"""Which rule of the parametrisation is broken: every rule tested by itself, on sizes and effects measured at growing width or depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sharpkit._calls import public_call
from sharpkit._results import ProgressCallback, Result
from sharpkit.fits import Slope, log_slope
from sharpkit.objective.objective import Closure
from sharpkit.transfer.observing import Observations, TensorTrack, Values, at, geometric_mean, observe, over_steps
from sharpkit.transfer.setup import Build, Family, MakeOptimizer, check_sizes

# The mildest broken rule shifts an exponent by 1/2, and widths of 64 to 512 of a correct network show up to about 0.15: half way
# (experiments/transfer_faults.py).
MINIMAL_EXPONENT = 0.25
# Standard errors: some ten rules are tested with errors known from 7 to 10 degrees of freedom, whose t-quantile for one false alarm in a
# hundred checks is 4 to 5; the exponent asked for above makes the joint condition stricter (experiments/transfer_faults.py).
MINIMAL_ERRORS = 4.0
# Times both, for a single tensor among many of its role, by judgement: there are dozens of them, so that some are off by chance.
_STRICT = 2.0
_GENTLE = 1 / 8  # of the rates, by judgement
_EXACT = 1e-9  # error of an exponent that was read and not measured, with rounding
# Of the gradient, by judgement: eps below a tenth of it changes a step little, while coupled decay stays when gradients fall in training.
_SHARES = {"weight decay": 0.01, "epsilon": 0.1}
_ROUNDING = 1e-5  # of a coordinate, by judgement: the change that rounding makes in single precision, with room above
_CONTRADICTION = 0.1  # by judgement: updates off by less in the other direction are no evidence against the logits at initialisation

RULES = {
    "hidden initialisation": "variance 1/fan_in",
    "input initialisation": "outputs of one size at every width",
    "readout initialisation": "logits that fall as width^-1/2 or faster",
    "hidden multiplier": "multiplier^2 x variance x fan_in constant, and the same of multiplier x rate x fan_in under Adam",
    "input multiplier": "outputs, and what a step changes in them, of one size at every width",
    "readout multiplier": "logits multiplied by 1/fan_in (or, equivalently, variance 1/fan_in^2 and a rate by 1/fan_in)",
    "attention scale": "q.k/d, not q.k/sqrt(d)",
    "hidden learning rate": "by 1/fan_in under Adam, constant under SGD; Muon's step constant in spectral norm",
    "input learning rate": "constant under Adam, by fan_out under SGD; Muon's step by fan_out^1/2 in spectral norm",
    "readout learning rate": "with a 1/fan_in multiplier constant under Adam, by fan_in under SGD, by fan_in^1/2 in Muon's spectral norm",
    "vector learning rate": "biases and gains: constant under Adam, by fan_out under SGD",
    "fixed learning rate": "constant",
    "weight decay": "decoupled, and under SGD: learning rate x weight decay constant; in Adam's gradient: decay x RMS(w) / RMS(g) constant",
    "epsilon": "by 1/width, as gradients under muP, or far below them",
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


@public_call
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
    return culprits_in(family, observe(family, sizes, steps=steps, seeds=seeds, effects=True, callback=callback), seeds=seeds)


def culprits_in(family: Family, seen: Observations, *, seeds: int | Sequence[int]) -> tuple[Culprit, ...]:
    """The broken rules in observations made with effects; from gentler steps where those were rough, and a rule is broken.

    The rules are about exponents, which no factor on all rates changes. In a network that its first steps saturate, everything is off.
    """
    named = culprits_of(seen)
    if not (named and seen.rough):
        return named
    gentle = observe(family, seen.sizes, steps=seen.num_steps, seeds=seeds, effects=True, lr_factor=_GENTLE)
    return culprits_of(gentle) or named


def culprits_of(seen: Observations) -> tuple[Culprit, ...]:
    """The broken rules in observations made with effects."""
    broken = sorted(_unexplained(gather(seen)), key=lambda e: -abs(e.excess))
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
        tests = (("depth multiplier", "residual stream", seen.stream), ("depth learning rate", "residual stream", seen.blocks))
        return [Evidence(rule, (where,), log_slope(values)) for rule, where, values in tests if values]
    return [*_initialisations(seen), *_attention(seen), *_learning_rates(seen), *_decay(seen)]


def _unexplained(every: list[Evidence]) -> list[Evidence]:
    """What is broken, with one name for what has one cause."""
    broken = [e for e in every if e.broken]
    rules = {e.rule: e for e in broken}
    # A multiplier that is missing shows in both tests of the readout, a wrong rate or start in one. Once one of them is certain the other
    # one only has to tell these causes apart: half way between their exponents, without the errors that a finding of its own takes.
    tested = {e.rule: e for e in every if e.rule.startswith("readout ")} | rules
    start, rate = tested.get("readout initialisation"), tested.get("readout learning rate")
    if start and rate and (start.broken or rate.broken) and min(start.excess, rate.excess) > MINIMAL_EXPONENT:
        broken = [e for e in broken if e not in (start, rate)]
        broken.append(Evidence("readout multiplier", rate.where, rate.slope, rate.expected))
    for role in ("hidden", "input"):
        start, rate = rules.get(f"{role} initialisation"), rules.get(f"{role} learning rate")
        # a multiplier does the same to what a weight is and to what its steps are: which of the factors is wrong cannot be determined
        if start and rate and abs(start.excess - rate.excess) < MINIMAL_EXPONENT:
            broken = [e for e in broken if e not in (start, rate)]
            broken.append(Evidence(f"{role} multiplier", start.where, start.slope, start.expected))
            rules = {e.rule: e for e in broken}
    attention = rules.get("attention scale")
    if attention:  # queries and keys of another size explain logits of another size, their rates those without a start
        causes = ["hidden initialisation", "hidden multiplier", *([] if attention.expected else ["hidden learning rate"])]
        if any(c in rules and rules[c].excess * attention.excess > 0 for c in causes):
            broken = [e for e in broken if e.rule != "attention scale"]
    # decay or eps that outweighs gradients makes steps smaller and turns them: not the rate
    beside = {name for e in broken if e.rule == "epsilon" or _is_measured_decay(e) for name in e.where}
    broken = [e for e in broken if not (e.rule.endswith("learning rate") and e.excess < 0 and beside.intersection(e.where))]
    if "depth multiplier" in rules:  # larger branches change the output more at any rate
        broken = [e for e in broken if e.rule != "depth learning rate"]
    return broken


def _is_measured_decay(e: Evidence) -> bool:
    """Whether it is decay in an adaptive optimizer's gradient; the exponent of the other kind is read."""
    return e.rule == "weight decay" and e.slope.stderr > _EXACT


def _in_words(e: Evidence, size: str) -> str:
    grow, many = "grow" if e.slope.value > 0 else "fall", f" ({', '.join(e.where[:3])}{', ...' if len(e.where) > 3 else ''})"
    grows = f"{grow} as {size}^{e.slope}"
    expected = f"where {f'{size}^{e.expected:g}' if e.expected else f'no change with {size}'} is expected"
    role = _ROLES.get(e.rule.partition(" ")[0], "")
    if e.rule.endswith("initialisation") or e.rule in ("hidden multiplier", "input multiplier"):
        alike = ", and so do the changes that updates make in them" if e.rule.endswith("multiplier") else ""
        text = f"at initialisation the outputs of {role}{many} {grows}{alike}, {expected}"
    elif e.rule == "readout multiplier":
        text = f"logits are too large from the start, and the changes that the readout's updates make in them {grows}"
    elif e.rule == "attention scale":
        text = f"{'attention logits at initialisation' if e.expected else 'changes of attention logits'}{many} {grows}, {expected}"
    elif e.rule == "epsilon" or _is_measured_decay(e):
        what = "eps" if e.rule == "epsilon" else "coupled weight decay"
        text = f"the share of {what} in the gradients of {len(e.where)} tensors{many} {grow}s as {size}^{e.slope}"
    elif e.rule == "weight decay":
        text = f"learning rate x weight decay of {len(e.where)} tensors{many} {grow}s as {size}^{e.slope}"
    elif e.rule == "depth multiplier":
        text = f"what the blocks add to the residual stream at initialisation {grow}s as {size}^{e.slope}"
    elif e.rule == "depth learning rate":
        text = f"the changes that the blocks' updates make in the residual stream {grows}"
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
    # by the result, as some layouts are (in, out); by the dimension where the result is not the tensor's own
    return "input" if _grows(tensor.entries.values()) or (0 in growing and not tensor.own) else "readout"


def _grows(values: Iterable[int | None]) -> bool:
    different = set(values)  # None where a product of another size came before the softmax
    return None not in different and len(different) > 1


def _idle(tensor: TensorTrack) -> bool:
    """No effect, or one that is rounding noise (the bias of attention's keys has no gradient)."""
    pairs = [(e, x) for s in tensor.effect for e, x in zip(tensor.effect[s], tensor.level[s], strict=True) if math.isfinite(e)]
    return not pairs or geometric_mean(e / x if x > 0 else 0.0 for e, x in pairs) < _ROUNDING or any(e == 0 for e, _ in pairs)


def _matrix(tensor: TensorTrack) -> bool:
    return len(next(iter(tensor.shapes.values()))) > 1


# -- the rules ----------------------------------------------------------------------------------------------------------------
def _initialisations(seen: Observations) -> list[Evidence]:
    evidence = []
    for role, exponent in {"hidden": 0.0, "input": 0.0, "readout": -0.5}.items():
        # by what they make of their input and not by their entries, whose spread says little behind a norm or a multiplier; a weight that
        # enters in another way than by a product (a mask, positions that are added) is not judged
        chosen = [seen.products[t.name] for t in seen.tensors.values() if t.name in seen.products and role_of(t) == role and _matrix(t)]
        gains = {product.name: product.gain for product in chosen if _positive(product.gain)}
        if gains:
            evidence += _pooled(f"{role} initialisation", gains, exponent, above_only=role == "readout")
    return evidence


def _positive(values: Values) -> bool:
    return all(v > 0 for runs in values.values() for v in runs)


def _learning_rates(seen: Observations) -> list[Evidence]:
    by_role: dict[str, dict[str, Values]] = {}
    for t in seen.tensors.values():
        if not _idle(t):
            by_role.setdefault(role_of(t), {})[t.name] = relative_effect(t, t.input_rms, adaptive=seen.adaptive)
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
    """Exact where a step subtracts lr decay w: read from the optimizer. Measured where decay and eps stand beside the gradient."""
    names: dict[float, list[str]] = {}
    slopes: dict[float, Slope] = {}
    for tensor in seen.tensors.values():
        product = {s: [tensor.lr[s] * tensor.weight_decay[s]] * 3 for s in tensor.lr}  # three alike, so that the error is known to be 0
        if all(v[0] > 0 for v in product.values()):
            slope = log_slope(product)
            key = round(slope.value, 2)
            names.setdefault(key, []).append(tensor.name)
            slopes[key] = slope
    exact = [Evidence("weight decay", tuple(where), slopes[key]) for key, where in names.items()]
    return [*exact, *_beside_gradients(seen)]


def _beside_gradients(seen: Observations) -> list[Evidence]:
    """Coupled decay and eps of adaptive optimizers, whose share of the step must not grow as gradients fall with the width."""
    evidence = []
    for rule, kind in (("weight decay", "decay_share"), ("epsilon", "eps_share")):
        by_role: dict[str, dict[str, Values]] = {}
        for tensor in seen.tensors.values():
            shares: Values = getattr(tensor, kind)
            # what is a small part of the step at every size does nothing yet; a bias may have a gradient of rounding noise alone
            if _matrix(tensor) and not _idle(tensor) and _positive(shares) and max(max(v) for v in shares.values()) > _SHARES[rule]:
                by_role.setdefault(role_of(tensor), {})[tensor.name] = shares
        evidence += [e for values in by_role.values() for e in _pooled(rule, values, 0.0, above_only=rule == "epsilon")]
    return evidence
