"""An excerpt of the experiment: its formula for what a process receives agrees with what was counted, and its numbers with the claims."""

from __future__ import annotations

from experiments._common import HERE, read_rows
from experiments.scale_sharded import predicted_bytes

ROWS = read_rows(HERE / "results" / "scale_sharded.jsonl")


def test_sharded_models_agree_with_one_process_to_rounding() -> None:
    rows = [row for row in ROWS if row["kind"] == "accuracy" and row["way"] != "DDP"]
    assert {row["world"] for row in rows} == {1, 2, 3, 4}
    assert max(row["product"] for row in rows) < 1e-12
    assert max(row[key] for row in rows for key in ("top_5", "trace", "density")) < 1e-9
    assert all(row["same_products"] for row in rows)
    assert all(max(row["lengths"]) < 1.2 * sum(row["lengths"]) / row["world"] for row in rows)


def test_a_product_takes_less_than_three_times_the_memory_of_a_training_step_and_receives_what_the_formula_says() -> None:
    cost = {(row["world"], row["stage"]): row for row in ROWS if row["kind"] == "cost"}
    passes = []
    for world in (2, 4):
        product = cost[world, "product"]
        assert product["peak_bytes"] < 3 * cost[world, "training step"]["peak_bytes"]
        passes.append(product["bytes"] / predicted_bytes(product["parameters"], world, 1.0))
    assert max(passes) < 1.02 * min(passes), "the same passes over the parameters for any number of processes"
    assert 4 < passes[0] < 6
