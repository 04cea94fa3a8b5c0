import itertools
import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from searches import run

from hf_variational.autopilot import runs as runs_module
from hf_variational.autopilot.dimensions import Gate, Range, Space
from hf_variational.autopilot.objective import CALIBRATION, COST, NLL, PARETO
from hf_variational.autopilot.outcome import TrialRow, finalists_of, front_of, paired_difference, rank
from hf_variational.training.program import run as train
from hf_variational.training.recipe import load_recipe

RATE = "arguments.learning_rate"
GATED = Space((Range(RATE, 0.0, 1.0),), gates=(Gate("eval_kl", most=1.0),))


def row(number, nll, state="complete", missed=0.0, **metrics):
    return TrialRow(number, state, {}, {NLL: nll, "eval_kl": 0.5, **metrics}, {"eval_kl": missed})


def runs_of(*values, kl=0.5):
    """Metrics by seed, counted from 1."""
    return {seed: {NLL: value, "eval_kl": kl} for seed, value in enumerate(values, start=1)}


def test_the_last_rung_is_ranked_by_the_mean_over_further_seeds():
    rows = [row(0, 1.0), row(1, 1.1), row(2, 1.2)]
    runs = {0: runs_of(1.5, 1.7), 1: runs_of(1.2, 1.3), 2: runs_of(1.4, 1.2)}
    ranked = rank(rows, runs, GATED)
    assert [finalist.row.number for finalist in ranked] == [1, 2, 0]
    assert [finalist.mean() for finalist in ranked] == pytest.approx([1.25, 1.3, 1.6])
    first = next(finalist for finalist in ranked if finalist.row.number == 0)
    assert first.mean() == pytest.approx(1.6), "the seed it was chosen on is not in it"
    assert first.standard_error() == pytest.approx(statistics.stdev([1.5, 1.7]) / math.sqrt(2))


def test_only_seeds_that_all_have_run_count():
    ranked = rank([row(0, 1.0), row(1, 1.1)], {0: runs_of(2.0, 0.1), 1: runs_of(1.5)}, GATED)
    assert [finalist.row.number for finalist in ranked] == [1, 0] and ranked[0].shared == (1,)
    assert ranked[0].standard_error() is None and paired_difference(*ranked) is None
    without = rank([row(0, 1.0), row(1, 1.1)], {}, GATED)
    assert [finalist.mean() for finalist in without] == [1.0, 1.1] and without[0].shared == ()


def test_one_that_fails_or_misses_its_gates_comes_last():
    runs = {0: {**runs_of(1.0), 2: "not finite"}, 1: runs_of(1.1, 1.1, kl=2.0), 2: runs_of(1.2, 1.2)}
    ranked = rank([row(0, 1.0), row(1, 1.1), row(2, 1.2)], runs, GATED)
    assert [finalist.row.number for finalist in ranked] == [2, 1, 0]
    assert ranked[1].violations == {"eval_kl": 1.0} and ranked[2].failed


def test_the_paired_difference_is_a_t_test():
    first, second = rank([row(0, 1.0), row(1, 1.1)], {0: runs_of(1.0, 1.2, 1.1), 1: runs_of(1.3, 1.4, 1.5)}, GATED)
    mean, width = paired_difference(first, second)
    interval = stats.ttest_rel([1.3, 1.4, 1.5], [1.0, 1.2, 1.1]).confidence_interval(0.95)
    assert (mean - width, mean + width) == pytest.approx((interval.low, interval.high))


def test_the_last_rung_has_the_better_share_of_what_passes():
    rows = [row(number, 2.0 - 0.1 * number) for number in range(9)]
    rows += [row(9, 0.1, "pruned"), row(10, 0.1, missed=1.0), TrialRow(11, "failed", {}, error="no")]
    assert [one.number for one in finalists_of(rows, "nll", factor=3)] == [8, 7, 6]
    assert [one.number for one in finalists_of(rows[:3], "nll", factor=3)] == [2, 1], "two at least"
    assert finalists_of(rows[9:], "nll", factor=3) == []


points = st.tuples(*[st.integers(0, 3)] * len(PARETO))


@given(st.lists(points, min_size=1, max_size=12))
def test_the_front_by_brute_force(values):
    rows = [row(n, float(v[0]), **{CALIBRATION: float(v[1]), COST: float(v[2])}) for n, v in enumerate(values)]
    front = {one.number for one in front_of(rows)}
    for number, here in enumerate(values):
        beaten = any(there != here and all(a <= b for a, b in zip(there, here, strict=True)) for there in values)
        assert (number in front) == (not beaten)


def test_further_seeds_are_runs_of_the_recipe_with_that_seed(tmp_path, monkeypatch):
    space = {RATE: {"choices": [2e-3, 1e-2, 2e-2]}, "halving": {"factor": 2}}
    made = []
    inner = runs_module.TrialRuns.train
    monkeypatch.setattr(runs_module.TrialRuns, "train", lambda *a: made.append(a[2]) or inner(*a))
    outcome = run(tmp_path, space, trials=4, seeds=2)
    assert len(outcome.finalists) == 2 and sorted(made) == [1, 1, 2, 2]
    assert [f.mean() for f in outcome.finalists] == sorted(f.mean() for f in outcome.finalists)
    best = outcome.best
    assert set(best.runs) == {1, 2} and best.standard_error() > 0
    recipe = load_recipe(
        tmp_path / "found" / "best.yaml", [f"arguments.output_dir={tmp_path / 'seed'}", "arguments.seed=2"]
    )
    train(recipe)
    metrics = json.loads((tmp_path / "seed" / "metrics.json").read_text())["evaluation"]
    assert metrics[NLL] == best.runs[2][NLL]

    more = run(tmp_path, space, trials=4, seeds=3)
    assert sorted(made) == [1, 1, 2, 2, 3, 3], "what is done is not done again"
    assert set(more.best.runs) == {1, 2, 3} and more.best.shared == (1, 2, 3)


def test_a_front_of_likelihood_calibration_and_cost(tmp_path):
    space = {"model.variational_layers": {"choices": [[1], [0, 1]]}, RATE: {"low": 1e-3, "high": 2e-2, "log": True}}
    more = {"eval_posterior_samples": 8}  # of two samples little is shared
    outcome = run(tmp_path, space, trials=5, objective="pareto", arguments={"eval_strategy": "no", **more})
    assert {one.state for one in outcome.rows} == {"complete"}, "Optuna prunes no search for a front"
    cost = {len(one.values["model.variational_layers"]): one.metrics[COST] for one in outcome.rows}
    assert set(cost) == {1, 2} and cost[2] > 1.2 * cost[1], "below the split the samples share their work"
    assert outcome.front == [one.number for one in front_of(outcome.rows)]
    assert outcome.best.row.nll == min(one.nll for one in outcome.rows)
    written = sorted((tmp_path / "found" / "front").glob("*.yaml"))
    assert [file.stem for file in written] == sorted(f"trial-{number}" for number in outcome.front)
    assert load_recipe(written[0]).arguments["output_dir"] == str(written[0].with_suffix(""))
    page = (tmp_path / "found" / "report.html").read_text()
    assert "Optuna prunes only where there is one objective" in page and "The front" in page
    assert set(outcome.importance) <= set(PARETO)


def test_a_search_for_a_front_counts_operations_without_touching_the_training(tmp_path):
    space = {RATE: {"choices": [1e-2]}}
    front = run(tmp_path, space, "front", trials=1, objective="pareto")
    plain = run(tmp_path, space, "plain", trials=1)
    assert front.rows[0].nll == plain.rows[0].nll


def test_the_rank_does_not_depend_on_the_order_of_the_trials():
    rows, runs = [row(n, 1.0 + n) for n in range(3)], {n: runs_of(3.0 - n) for n in range(3)}
    orders = {tuple(f.row.number for f in rank(list(order), runs, GATED)) for order in itertools.permutations(rows)}
    assert orders == {(2, 1, 0)}
