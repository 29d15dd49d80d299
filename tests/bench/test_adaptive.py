"""bench/adaptive.py: its figures on steps made up by hand, and one real round on two ranks."""

from __future__ import annotations

import numpy as np
import pytest

from efflaunch.bench.adaptive import measure, summary
from efflaunch.bench.report import page


def row(measured_s, predicted_s, degree, groups=((1.0, 2.0),)):
    held = [{"degree": degree, "predicted_s": p, "measured_s": m} for p, m in groups]
    return {"measured_s": measured_s, "predicted_s": predicted_s, "processor_s": 1.0, "bubble": 0.1, "gap": None, "groups": held}


def test_figures_are_means_over_the_same_steps():
    steps = [
        {"plan_s": 0.1, "plans": {"adaptive": row(1.0, 2.0, 1), "static 1": row(2.0, 4.0, 1), "static 2": row(3.0, 3.0, 2, ((3.0, 2.0),))}},
        {"plan_s": 0.3, "plans": {"adaptive": row(3.0, 2.0, 1), "static 1": row(4.0, 4.0, 1), "static 2": row(2.0, 3.0, 2, ((3.0, 2.0),))}},
    ]
    results = summary(steps)
    assert results["best_static"] == "static 2" and results["speedup_vs_best_static"] == pytest.approx(2.5 / 2.0)
    assert results["speedups"] == {"static 1": pytest.approx(1.5), "static 2": pytest.approx(1.25)}
    assert results["speedup_vs_best_static_modelled"] == pytest.approx(1.5)
    assert results["prediction_error_by_degree"] == {"1": pytest.approx(0.5), "2": pytest.approx(0.5)}
    assert results["step_prediction_error"] == pytest.approx((1 + 1 + 0 + 1 / 3 + 0 + 0.5) / 6)
    assert results["plan_s"] == pytest.approx(0.2)


def test_a_round_on_real_ranks(tmp_path):
    from efflaunch.training.data.writer import IndexedWriter

    writer = IndexedWriter(str(tmp_path / "corpus"), "uint16")
    for length in (500, 300, 40, 900, 120, 30, 60, 20, 700, 90):
        writer.add(np.arange(7, 7 * length + 7, 7) % 97)
    writer.finish()
    tiny = (
        "+experiment=quickstart", "model.hidden_size=32", "model.intermediate_size=64", "model.num_heads=4", "model.num_kv_heads=2",
        "model.num_layers=1", "model.vocab_size=97", "data=indexed", f"data.prefixes=[{tmp_path / 'corpus'}]", "data.max_seq_len=256",
        "data.global_batch_tokens=1K", "cluster.ranks_per_node=2", "parallel.tokens_per_rank=256",
    )  # fmt: skip
    results = measure(tiny, rounds=2, seconds=0.5)
    assert {r["plan"] for r in results["rows"]} == {"adaptive", "greedy", "static 1", "static 2"}
    assert results["speedup_vs_best_static"] > 0 and results["speedup_vs_best_static_modelled"] >= 1 - 1e-9
    machine = {"machine": {"processor": "p", "cores": 2, "system": "s", "load_before": 0.0}, "versions": {}, "command": "c", "date": "d"}
    assert "| static 2 |" in page([{"benchmark": "adaptive", **machine, **results}])
