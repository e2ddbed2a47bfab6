"""Learning-rate transfer on models whose best learning rate is known: gradient descent on a quadratic, its rate times a power of width."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sharpkit._errors import SharpkitError
from sharpkit._results import Progress
from sharpkit.fits import Slope
from sharpkit.transfer.learning_rates import RunStore, decide, learning_rate_transfer
from sharpkit.transfer.optimum import Curve, Optimum, loss_at, optimum, penalty_between, search, sensitivity
from sharpkit.transfer.verdict import reach

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
FLOOR = 0.02  # of the loss: 3 % of where it begins, so that the data are not fitted


class Bowl(nn.Module):
    """Loss floor + (w_1^2 + w_2^2 / 2) / 2: gradient descent multiplies the modes by 1 - lr and 1 - lr / 2."""

    def __init__(self, floor: float = FLOOR) -> None:
        super().__init__()
        self.w, self.floor = nn.Parameter(1 + 0.1 * torch.rand(2)), floor

    def forward(self, x: Tensor) -> Tensor:
        return self.floor + 0.5 * (torch.tensor([1.0, 0.5]) * self.w.square()).sum() + 0 * x.sum()


def bowls(gain: Callable[[int], float], *, floor: float = FLOOR) -> dict[str, Any]:
    """The same bowl at every width, with SGD of rate 0.3 gain(width): the best factor goes as 1 / gain."""
    return {
        "build": lambda width: Bowl(floor),
        "optimizer": lambda model, width: torch.optim.SGD(model.parameters(), lr=0.3 * gain(width)),
        "data": [(torch.zeros(1, 1), torch.zeros(1, 1))],
        "loss": lambda output, target: output,
    }


def measure(gain: Callable[[int], float], widths: list[int], *, floor: float = FLOOR, **options: Any) -> Any:
    family = bowls(gain, floor=floor)
    return learning_rate_transfer(family.pop("build"), widths, **family, **{"steps": STEPS, "seeds": 2, **options})


@pytest.mark.parametrize("power", [0.0, 1.0, -0.5])
def test_an_optimum_that_scales_as_a_power_of_width_has_that_drift(power: float) -> None:
    found = measure(lambda width: (width / 64) ** power, [64, 128, 256])
    # the loss is the same function of lr times width^power, and the half-octave grid lies on it in the same place at every width
    assert found.drift.value == pytest.approx(-power, abs=1e-3)
    assert found.passed is (power == 0)


def test_the_optimum_is_where_theory_says() -> None:
    found = measure(lambda width: 1.0, [64, 128], floor=1e-3)
    dense = np.linspace(-3, 4, 2000)
    losses = [_closed_form(0.3 * 2**x) for x in dense]
    best = dense[int(np.argmin(losses))]
    assert found.optima[0].log2 == pytest.approx(best, abs=0.3)  # a parabola through points half an octave apart
    assert found.optima[0].loss == pytest.approx(min(losses), rel=0.5)  # of the losses there, which span a factor of 300


def _closed_form(lr: float) -> float:
    """Mean loss over the last quarter of the steps, from w = 1.05 in both modes (the seeds' mean, nearly)."""
    total = 0.0
    for t in range(STEPS - STEPS // 4, STEPS):
        total += 1e-3 + 0.5 * sum(c * (1.05 * (1 - lr * c) ** t) ** 2 for c in (1.0, 0.5))
    return total / (STEPS // 4)


def test_diverged_runs_count_as_the_initial_loss() -> None:
    found = measure(lambda width: 1.0, [64, 128], factors=[0.5, 2.0, 64.0, 1024.0])
    curve = found.curves[0]
    assert {x for x, _ in curve.diverged} >= {10.0}
    for seed in range(2):
        assert curve.losses[10.0][seed] == curve.initial[seed]
    points = {p["log2"]: p for p in found.to_dict()["curves"][0]["points"]}
    assert points[10.0]["diverged"] == 2 and points[-1.0]["diverged"] == 0


def test_a_guess_that_diverges_everywhere_near_is_left_downwards() -> None:
    family = bowls(lambda width: 200.0, floor=1e-3)  # 0.3 * 200: far above the limit 2
    found = learning_rate_transfer(family.pop("build"), [64, 128], **family, steps=STEPS, seeds=1)
    assert all(o.interior for o in found.optima)
    assert 2 ** found.optima[0].log2 * 60 == pytest.approx(4 / 3, rel=0.25)  # 2 / (1 + 1/2), less a half-octave grid


def test_an_optimum_at_the_edge_is_said_to_be_one() -> None:
    found = measure(lambda width: 1.0, [64, 128], factors=[0.1, 0.2, 0.4])
    assert not found.optima[0].interior
    assert found.passed is None
    assert any("at the edge" in sentence for sentence in found.findings())


def test_every_best_point_has_worse_ones_on_both_sides() -> None:
    found = measure(lambda width: 64 / width, [64, 512])
    for curve in found.curves:
        points = curve.points(range(2))
        assert points[0] < curve.best(range(2)) < points[-1]


def test_runs_are_spent_near_the_optimum() -> None:
    found = measure(lambda width: 1.0, [64, 128])
    for curve, best in zip(found.curves, found.optima, strict=True):
        runs = [x for x, seeds in curve.losses.items() for _ in seeds]
        assert sum(abs(x - best.log2) <= 2 for x in runs) >= 0.8 * len(runs)


def test_penalty_is_what_the_proxys_rate_costs() -> None:
    found = measure(lambda width: (width / 64) ** 2, [64, 256])
    lr = 0.3 * 16 * 2 ** found.optima[0].log2  # at width 256, with the best factor of width 64
    if lr < 2:
        pytest.fail("the family is made so that the proxy's rate diverges at the largest width")
    curve = found.curves[-1]
    assert found.penalty[0] == pytest.approx(curve.start_loss / found.optima[-1].loss - 1, rel=0.05)


# -- the curve ------------------------------------------------------------------------------------------------------------------


def _exact(centre: float) -> tuple[Curve, list[tuple[float, int]]]:
    curve, asked = Curve(8), []

    def evaluate(x: float, seed: int) -> float:
        asked.append((x, seed))
        curve.initial[seed] = 1e40
        return math.exp(0.3 * (x - centre) ** 2)

    search(curve, evaluate, start=0.0, seeds=2)
    return curve, asked


@pytest.mark.parametrize("centre", [-9.7, -0.26, 0.0, 3.3, 12.1])
def test_a_parabola_in_log_loss_is_found_exactly(centre: float) -> None:
    curve, asked = _exact(centre)
    found = optimum(curve, seeds=2)
    assert found.interior
    assert found.log2 == pytest.approx(centre, abs=1e-6)
    assert found.curvature == pytest.approx(0.3, rel=1e-6)
    assert found.loss == pytest.approx(1.0, rel=1e-6)
    assert len(set(asked)) == len(asked)


def test_a_flat_start_is_left_upwards_and_a_diverged_one_downwards() -> None:
    for start, centre in ((-8.0, 0.0), (8.0, 0.0)):
        curve = Curve(8)

        def evaluate(x: float, seed: int, curve: Curve = curve, centre: float = centre) -> float:
            curve.initial[seed] = 2.0
            if x > centre + 2:
                curve.diverged.add((x, seed))
                return 2.0
            return 2.1 - 1.5 * math.exp(-((x - centre) ** 2))  # a little above the initial loss where nothing is learned

        search(curve, evaluate, start=start, seeds=1)
        assert optimum(curve, seeds=1).log2 == pytest.approx(centre, abs=0.1)


def test_a_curve_that_falls_for_ever_ends_at_the_edge() -> None:
    curve = Curve(8)
    curve.initial[0] = 1e9
    search(curve, lambda x, seed: math.exp(-x), start=0.0, seeds=1)
    assert curve.interior is False


def test_the_interval_over_seeds_holds_the_seeds_spread() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(30):
        shifts = rng.normal(0, 0.2, 5)
        curve = Curve(8, initial=dict.fromkeys(range(5), 100.0))
        search(curve, lambda x, seed, shifts=shifts: math.exp(0.3 * (x - shifts[seed]) ** 2), start=0.0, seeds=5)
        found = optimum(curve, seeds=5)
        covered += found.lower <= 0 <= found.upper
    assert covered >= 22  # 95 % asked for; five seeds are few for a bootstrap, which covers about 90 %: 22 of 30 is 3 sigma below that


def test_sensitivity_is_the_mean_loss_above_the_best() -> None:
    xs = np.arange(-4, 4.01, 0.01)
    curve = Curve(8, {float(x): {0: 1 + float(x) ** 2} for x in xs})
    assert sensitivity(curve, 0.0) == pytest.approx(4 / 3, rel=1e-3)  # mean of x^2 over (-2, 2)
    assert loss_at(curve, 99.0) == pytest.approx(17.0, rel=1e-2)


# -- verdict: what carrying the rate over costs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("penalty", "half", "sizes", "verdict"),
    [
        ((0.0, 0.0, 0.05), 0.1, 3, True),
        ((0.08, 0.0, 0.2), 0.9, 2, True),  # a drift that costs nothing is none
        ((0.02, 0.0, 2.01), 0.1, 2, None),
        ((0.3, 0.2, 0.5), 0.3, 3, False),
        ((0.3, 0.2, 0.5), 0.3, 2, None),  # two sizes are no line
        ((0.3, 0.2, 0.5), 1.5, 3, None),  # the drift may be 0
        ((0.15, 0.05, 0.3), 0.3, 4, None),
        ((math.nan,) * 3, 0.1, 3, None),
    ],
)
def test_transfer_is_judged_by_what_carrying_the_rate_over_costs(
    penalty: tuple[float, float, float], half: float, sizes: int, verdict: bool | None
) -> None:
    optima = [Optimum(64 << i, 0.0, -0.1, 0.1, (0.0,), 1.0, 0.2, True) for i in range(sizes)]
    assert decide(penalty, Slope(-1.0, half / 2, half, 9), optima) is verdict
    assert decide(penalty, Slope(-1.0, half / 2, half, 9), optima, fitted=True) is None


def test_the_interval_of_the_penalty_holds_that_of_the_optimum_that_moved() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(20):  # log loss 0.3 (x - c)^2 with seeds' centres about 0 at the small and about 0.5 at the large size
        shifts = rng.normal(0, 0.2, (2, 5))
        curves = []
        for centre, shift in zip((0.0, 0.5), shifts, strict=True):
            curve = Curve(8, initial=dict.fromkeys(range(5), 100.0))
            search(curve, lambda x, seed, c=centre, s=shift: math.exp(0.3 * (x - c - s[seed]) ** 2), start=0.0, seeds=5)
            curves.append(curve)
        value, low, high = penalty_between(*curves, seeds=5)
        assert low <= value <= high
        covered += low <= math.expm1(0.3 * 0.5**2) <= high
    assert covered >= 14  # as above: 95 % asked for, about 90 % with five seeds, 14 of 20 is 3 sigma below that


def test_fitted_data_determine_no_best_rate() -> None:
    family = bowls(lambda width: 1.0, floor=1e-9)
    build = family.pop("build")
    found = learning_rate_transfer(build, [64, 128, 256], **family, steps=12, seeds=1, until_certain=True)
    assert found.passed is None and found.sizes == (64,)
    assert "does not determine a best rate" in found.undetermined and "more samples" in str(found)


def test_reach_follows_from_the_drift() -> None:
    found = measure(lambda width: width / 64, [64, 128, 256])
    held = reach(found)
    assert held is not None
    assert held.value == pytest.approx(64 * 2 ** (held.octaves / abs(found.drift.value)), rel=1e-6)
    assert held.value < 8 * 256
    assert held.lower <= held.value <= held.upper <= 8 * 256
    assert "95 % interval" in held.sentence("width")


# -- resuming -----------------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_a_sweep_that_failed_goes_on_without_repeating_a_run(tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    family = bowls(lambda width: 1.0)
    plain, calls = family["optimizer"], {"left": 25}

    def failing(model: nn.Module, width: int) -> Any:
        calls["left"] -= 1
        if not calls["left"]:
            raise Stop
        return plain(model, width)

    with pytest.raises(Stop):
        learning_rate_transfer(family["build"], [64, 128], **{**family_without_build(family), "optimizer": failing}, **OPTIONS, store=store)
    before = store.read_text().splitlines()
    assert before
    again = learning_rate_transfer(family["build"], [64, 128], **family_without_build(family), **OPTIONS, store=store)
    fresh = learning_rate_transfer(family["build"], [64, 128], **family_without_build(family), **OPTIONS)
    keys = [json.loads(line)["key"] for line in store.read_text().splitlines()]
    assert len(set(keys)) == len(keys) == fresh.num_runs
    assert again.num_reused == len(before) and again.num_runs == fresh.num_runs - len(before)
    assert again.optima == fresh.optima and again.drift == fresh.drift


OPTIONS: dict[str, Any] = {"steps": STEPS, "seeds": 2}


def family_without_build(family: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in family.items() if key != "build"}


@pytest.mark.slow
def test_a_killed_process_leaves_a_store_to_go_on_from(tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    script = textwrap.dedent(
        f"""
        import os, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "transfer")!r}]
        import test_learning_rates as t
        from sharpkit.transfer import learning_rates as _store
        add, count = _store.RunStore.add, [0]
        def dying(self, key, document):
            add(self, key, document)
            count[0] += 1
            if count[0] == 7:
                with open(self.path, "ab") as stream:
                    stream.write(b'{{"kind": "transfer_run", "key": "torn')
                os._exit(9)
        _store.RunStore.add = dying
        t.measure(lambda width: 1.0, [64, 128], store={str(store)!r})
        """
    )
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120, check=False)
    assert ended.returncode == 9
    again = measure(lambda width: 1.0, [64, 128], store=store)
    assert again.num_reused == 7
    rows = [json.loads(line) for line in store.read_text().splitlines()]  # the torn line is gone
    assert len(rows) == 7 + again.num_runs == len({row["key"] for row in rows})
    assert measure(lambda width: 1.0, [64, 128], store=store).num_runs == 0


def test_a_changed_model_optimizer_or_data_is_not_mixed_in(tmp_path: Path) -> None:
    store = tmp_path / "runs.jsonl"
    factors = [0.5, 1.0, 2.0]
    measure(lambda width: 1.0, [64, 128], store=store, factors=factors)
    changed = bowls(lambda width: 1.0)
    for change in (
        {"build": lambda width: nn.Sequential(Bowl(), nn.Identity())},  # other names
        {"optimizer": lambda model, width: torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)},
        {"data": [(torch.ones(1, 1), torch.zeros(1, 1))]},
        {"loss": lambda output, target: 2 * output},  # shows in the initial loss
    ):
        family = {**changed, **change}
        found = learning_rate_transfer(family["build"], [64, 128], **family_without_build(family), **OPTIONS, store=store, factors=factors)
        assert found.num_reused == 0
    assert measure(lambda width: 1.0, [64, 128], store=store, factors=factors, steps=STEPS + 4).num_reused == 0
    assert measure(lambda width: 1.0, [64, 128], store=store, factors=factors).num_runs == 0


def test_another_file_is_not_taken_for_a_store(tmp_path: Path) -> None:
    other = tmp_path / "notes.jsonl"
    other.write_text('{"kind": "monitor_run"}\nhello\n')
    with pytest.raises(SharpkitError, match=r"line 1 of .*notes.jsonl"):
        RunStore(other)
    assert other.read_text() == '{"kind": "monitor_run"}\nhello\n'


def test_max_runs_ends_the_search_and_says_so(tmp_path: Path) -> None:
    found = measure(lambda width: 1.0, [64, 128], max_runs=22, store=tmp_path / "runs.jsonl")
    assert found.num_runs <= 24 and not found.complete
    assert any("max_runs" in sentence for sentence in found.findings())
    with pytest.raises(SharpkitError, match="allow more runs"):
        measure(lambda width: 1.0, [64, 128], max_runs=2)


def test_until_certain_leaves_out_sizes_between() -> None:
    said: list[Progress] = []
    found = measure(lambda width: width / 64, [64, 128, 256, 512], until_certain=True, seeds=3, callback=said.append)
    assert found.sizes == (64, 128, 512)  # two are no line, and of those between the nearest to the middle comes first
    assert found.passed is False
    assert "runs of 4 steps" in said[0].text and "after 3 of 4" in said[-1].text
    assert said[0].done == 0 and said[-1].done == found.num_runs and {p.unit for p in said} == {"runs"}


def test_any_seeds_may_be_given_and_the_first_one_searches() -> None:
    counted, listed = (measure(lambda width: 1.0, [64, 128], seeds=seeds) for seeds in (2, [0, 1]))
    assert counted.optima == listed.optima
    found = measure(lambda width: 1.0, [64, 128], seeds=[7, 3])
    assert set(found.curves[0].initial) == {3, 7} and found.num_seeds == 2
    assert all(next(iter(runs)) == 7 for runs in found.curves[0].losses.values())


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 2 different"):
        measure(lambda width: 1.0, [64])
    with pytest.raises(ValueError, match="steps must be a whole number of at least 4"):
        measure(lambda width: 1.0, [64, 128], steps=2)
    with pytest.raises(ValueError, match="three different positive"):
        measure(lambda width: 1.0, [64, 128], factors=[1.0])


def test_random_states_are_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measure(lambda width: 1.0, [64, 128], factors=[0.5, 1.0, 2.0])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_document_is_strict_json_and_draws() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from sharpkit._results import to_json
    from sharpkit.reporting.sections import section_for

    found = measure(lambda width: 1.0, [64, 128], factors=[0.5, 2.0, 64.0, 1024.0])
    document = json.loads(to_json(found.to_dict()))
    assert "factor" in found.plot().get_xlabel()
    section = section_for(document)
    assert [row[0] for row in section.rows] == ["64", "128"]
