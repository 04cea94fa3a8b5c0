"""Adaptive sampling of a data set: what was drawn before counts again, and cost and quality are what they are said."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from acting_models import KeyedNoise, llama, made, texts

from hf_variational import EVEConfig, posterior_noise, predictive_measures
from hf_variational.acting import Action, ActionThresholds, AdaptiveSampling, adaptive, corrected_measures
from hf_variational.acting.adaptive import QualityAtCost, cheapest
from hf_variational.acting.settling import KeptLooks, act_on_data
from hf_variational.baselines import mc_dropout
from hf_variational.evaluation import TokenScores, token_scores
from hf_variational.evaluation.selective import RiskCoverage
from hf_variational.evaluation.statistics import bootstrap_documents

SCHEDULE = (2, 4, 8)
QUIET = {"progress": False, "batch_size": 4}


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def looks(model):
    with posterior_noise(KeyedNoise()):
        return KeptLooks.draw(model, texts(), SCHEDULE, **QUIET)


def assert_same_tokens(left: TokenScores, right: TokenScores, names=None):
    for column in ("correct", "windows", "targets", "positions"):
        assert torch.equal(getattr(left, column), getattr(right, column)), column
    for name in names or left.values:
        torch.testing.assert_close(left.values[name], right.values[name], rtol=1e-4, atol=1e-5, msg=name)


# ---- Samples are drawn once ----


@pytest.mark.parametrize("noise", ["token", "sequence"])
def test_an_unlimited_budget_is_the_fixed_run(noise):
    model = made(EVEConfig(scale="unit", initial_scale=0.6, noise=noise))
    with posterior_noise(KeyedNoise()):
        adaptive = AdaptiveSampling(schedule=(2, 8, 32)).evaluate(model, texts(), **QUIET)
        fixed = AdaptiveSampling(schedule=(32,)).evaluate(model, texts(), **QUIET)
    assert (adaptive.samples == 32).all() and adaptive.cost.mean_samples == 32
    assert adaptive.cost.drawn == [102] * 3 and fixed.cost.drawn == [102]
    assert_same_tokens(adaptive.scores, fixed.scores)
    assert adaptive.nll == pytest.approx(fixed.nll, abs=1e-6) and adaptive.aurc() == pytest.approx(fixed.aurc())


def test_scores_are_those_of_an_evaluation(model):
    with posterior_noise(KeyedNoise()):
        found = AdaptiveSampling(schedule=(8,)).evaluate(model, texts(), progress=False, batch_size=12)
        plain = token_scores(model, texts(), 8, batch_size=12, progress=False)
    assert_same_tokens(found.scores, plain, ("nll", "brier", "one_minus_confidence", "expected_entropy"))
    ratio = found.scores.values["conditional_variance"] / plain.values["conditional_variance"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 8 / 7), rtol=1e-4, atol=0)


def test_corrected_scores_are_those_of_the_samples(model):
    data = texts()
    with posterior_noise(KeyedNoise()):
        found = AdaptiveSampling(schedule=(2, 8)).evaluate(model, data, **QUIET).scores
        with torch.no_grad():
            ids = torch.tensor([data[0]])
            log_p = model(ids, num_posterior_samples=8, output_sample_logits=True).sample_logits
    expected = corrected_measures(log_p[0, :, :-1].transpose(0, 1))
    here = found.windows == 0
    for name in ("predictive_entropy", "mutual_information", "mutual_information_error", "excess"):
        torch.testing.assert_close(found.values[name][here], getattr(expected, name), rtol=1e-3, atol=1e-5)
    raw = predictive_measures(log_p.flatten(0, 1), 8).mutual_information[0, :-1]
    assert (found.values["mutual_information"][here] > raw).all()


def test_the_first_look_alone(model):
    with posterior_noise(KeyedNoise()):
        found = AdaptiveSampling(math.inf, SCHEDULE).evaluate(model, texts(), **QUIET)
        fixed = AdaptiveSampling(schedule=(2,)).evaluate(model, texts(), **QUIET)
    assert found.cost.mean_samples == 2 and found.cost.drawn == [102, 0, 0]
    assert_same_tokens(found.scores, fixed.scores)


@pytest.mark.parametrize("measure", ["predictive_entropy", "mutual_information"])
def test_only_sequences_above_the_tolerance_go_on(model, looks, measure):
    def errors(table):
        squares = table.values[f"{measure}_error"].double().square()
        return torch.stack([squares[table.windows == window].mean().sqrt() for window in range(12)])

    first, second = errors(looks.looks[0]), errors(looks.looks[1])
    tolerance = float(first.median() if measure == "predictive_entropy" else (first.min() + first.median()) / 2)
    sampling = AdaptiveSampling(tolerance, SCHEDULE, measure)
    with posterior_noise(KeyedNoise()):
        found = sampling.evaluate(model, texts(), **QUIET)
    expected = torch.where(first < tolerance, 2, torch.where(second < tolerance, 4, 8))
    assert len(expected.unique()) > 1
    assert torch.equal(found.samples, expected[found.scores.windows])
    lengths = torch.tensor([10, 7] * 6)
    drawn = [int(lengths[expected >= size].sum()) for size in SCHEDULE]
    assert found.cost.drawn == drawn
    assert found.cost.sample_tokens == 2 * drawn[0] + 2 * drawn[1] + 4 * drawn[2]
    # a token's scores are those of the look that settled it
    for size, table in zip(SCHEDULE, looks.looks, strict=True):
        here = found.samples == size
        assert_same_tokens(found.scores.select(here), table.select(here))


def test_kept_looks_say_what_drawing_would(model, looks):
    sampling = AdaptiveSampling(float(looks.looks[0].values["predictive_entropy_error"].median()), SCHEDULE)
    with posterior_noise(KeyedNoise()):
        drawn = sampling.evaluate(model, texts(), **QUIET)
    kept = looks.act(sampling.act, sampling.measure)
    assert torch.equal(kept.samples, drawn.samples)
    assert_same_tokens(kept.scores, drawn.scores)
    assert kept.nll == pytest.approx(drawn.nll, abs=1e-5)


def test_some_of_the_looks(model, looks):
    two = looks.at((2, 8))
    assert two.schedule == (2, 8) and two.looks == (looks.looks[0], looks.looks[2])
    with pytest.raises(ValueError, match=r"no look at 16 samples, but at \(2, 4, 8\)"):
        looks.at((2, 16))


def test_a_token_that_draws_more_takes_the_rest_of_its_sequence_along(model):
    def act(scores, last):  # position 4 of every third sequence asks until the end, position 6 of it once
        asks = (scores.windows % 3 == 0) & (scores.positions == 4) & (not last)
        return torch.where(asks, Action.DRAW_MORE, Action.ANSWER).to(torch.int8)

    found = act_on_data(model, texts(), act, SCHEDULE, "predictive_entropy", **QUIET)
    behind = (found.scores.windows % 3 == 0) & (found.scores.positions >= 4)
    assert torch.equal(found.samples, torch.where(behind, 8, 2))
    order = found.scores.windows * 100 + found.scores.positions
    assert torch.equal(order, order.sort().values)
    assert found.cost.drawn == [102, 34, 34]


def test_batches_do_not_matter(model):
    sampling = AdaptiveSampling(0.15, SCHEDULE)
    with posterior_noise(KeyedNoise()):
        one, many = (sampling.evaluate(model, texts(), progress=False, batch_size=size) for size in (1, 12))
    assert torch.equal(one.samples, many.samples) and one.cost == many.cost
    assert_same_tokens(one.scores, many.scores)


def test_the_seed_and_the_generator(model):
    sampling = AdaptiveSampling(0.15, SCHEDULE)
    state = torch.get_rng_state()
    found = [sampling.evaluate(model, texts(), seed=seed, **QUIET).nll for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_method_that_only_samples():
    dropout = mc_dropout(llama(), 0.2)
    assert AdaptiveSampling(schedule=(2, 4)).evaluate(dropout, texts(), **QUIET).cost.mean_samples == 4


# ---- The tolerance ----


def test_fit_keeps_the_quality_at_the_least_cost(model, looks):
    with posterior_noise(KeyedNoise()):
        fitted = AdaptiveSampling.fit(model, texts(), schedule=SCHEDULE, quality=0.05, **QUIET)
    full = fitted.frontier[0]
    assert full.mean_samples == 8 and full.tolerance == 0
    assert fitted.frontier[-1].mean_samples == 2 and fitted.frontier[-1].tolerance == math.inf
    kept = [p for p in fitted.frontier if p.nll <= 1.025 * full.nll and p.aurc <= 1.025 * full.aurc]
    assert next(p for p in fitted.frontier if p.tolerance == fitted.tolerance) in kept
    costs = [point.mean_samples for point in fitted.frontier]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("quality", [0.02, 0.05, 0.2])
def test_fit_takes_the_cheapest_whose_interval_is_within(looks, quality):
    """Against the tables themselves, whole windows of which are resampled."""
    fitted = AdaptiveSampling.fit_looks(looks, "predictive_entropy", quality)

    def table(tolerance):
        sampling = AdaptiveSampling(tolerance, looks.schedule)
        return looks.act(sampling.act, "predictive_entropy").scores

    full = table(0.0)

    def keeps(tolerance):
        found = table(tolerance)
        for statistic in (
            lambda scores: float(scores.values["nll"].double().mean()),
            lambda scores: RiskCoverage.of(scores, "predictive_entropy").area(),
        ):
            if statistic(found) > (1 + quality / 2) * statistic(full):
                return False
            estimate = bootstrap_documents(
                lambda tokens, statistic=statistic: (
                    statistic(found.select(tokens)) - (1 + quality) * statistic(full.select(tokens))
                ),
                full.windows,
                num_resamples=200,
            )
            if estimate.interval[1] > 0:
                return False
        return True

    chosen = next(p for p in fitted.frontier if p.tolerance == fitted.tolerance)
    assert keeps(chosen.tolerance)
    for point in fitted.frontier:
        cheaper = (point.mean_samples, point.tolerance) < (chosen.mean_samples, chosen.tolerance)
        assert not cheaper or not keeps(point.tolerance)


def test_a_quality_that_only_all_samples_have(looks):
    fitted = AdaptiveSampling.fit_looks(looks, "mutual_information", quality=1e-9)
    chosen = next(p for p in fitted.frontier if p.tolerance == fitted.tolerance)
    assert chosen.nll <= fitted.frontier[0].nll * (1 + 1e-9)


def test_of_equal_costs_the_smallest_tolerance(monkeypatch):
    points = [QualityAtCost(t, c, 1.0, 1.0) for t, c in ((0.0, 8.0), (0.1, 4.0), (0.2, 4.0))]
    monkeypatch.setattr(adaptive, "_surely_within", lambda *args: True)
    full = SimpleNamespace(cost=SimpleNamespace(mean_samples=8.0), nll=1.0, aurc=lambda: 1.0)
    assert cheapest(points, lambda tolerance: None, full, 0.01).tolerance == 0.1
    assert cheapest([QualityAtCost(0.1, 4.0, 1.02, 1.0)], lambda tolerance: None, full, 0.01) is None


# ---- Thresholds ----


def test_thresholds_by_hand():
    thresholds = ActionThresholds(answer=-1.0, final=0.5, abstain=2.0)
    score = torch.tensor([-2.0, -1.0, 0.0, 0.0, 0.5, 1.0, 2.0, 2.1])
    error = torch.tensor([9.0, 9.0, 9.0, 0.1, 9.0, 0.1, 9.0, 9.0])
    answer, abstain, more = Action.ANSWER, Action.ABSTAIN, Action.DRAW_MORE
    early = thresholds.act(score, error, 0.2, last=False).tolist()
    assert early == [answer, answer, more, answer, more, abstain, more, abstain]
    late = thresholds.act(score, error, 0.2, last=True).tolist()
    assert late == [answer, answer, answer, answer, answer, abstain, abstain, abstain]


# ---- Bad input ----


def test_bad_input(model):
    with pytest.raises(ValueError, match="thresholds are reversed: answer=1.0"):
        ActionThresholds(answer=1.0, final=0.0, abstain=2.0)
    with pytest.raises(ValueError, match="reversed"):
        ActionThresholds(final=math.nan)
    for schedule, message in (((), "is empty"), ((1, 8), "at least 2"), ((8, 2), "rise"), ((2, 2.5), "whole number")):
        with pytest.raises(ValueError, match=message):
            AdaptiveSampling(schedule=schedule)
    for tolerance in (-1.0, math.nan, "much"):
        with pytest.raises(ValueError, match=f"`tolerance`.*{re.escape(repr(tolerance))}"):
            AdaptiveSampling(tolerance)
    with pytest.raises(ValueError, match="`measure` is one of predictive_entropy, mutual_information, got 'kl'"):
        AdaptiveSampling(measure="kl")
    with pytest.raises(ValueError, match="`quality` is a share"):
        AdaptiveSampling.fit(model, texts(), quality=1)
    with pytest.raises(ValueError, match="has no posterior samples"):
        AdaptiveSampling().evaluate(made(deterministic=True), texts(), **QUIET)
    with pytest.raises(ValueError, match="none of the 1 sequences has a token to predict"):
        AdaptiveSampling.fit(model, [[5]], **QUIET)
    with pytest.raises(ValueError, match="are not\\s+numbers"):
        broken = made()
        with torch.no_grad():
            broken.lm_head.weight[0] = math.nan
        AdaptiveSampling().evaluate(broken, texts(), **QUIET)
