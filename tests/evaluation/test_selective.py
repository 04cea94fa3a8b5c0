"""Risk-coverage curves against brute force, and the policy's guarantee on simulated splits whose risk is known."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression

from hf_variational.evaluation.ranking import aurc, excess_aurc
from hf_variational.evaluation.risk_control import (
    betting_p_value,
    binomial_p_value,
    fixed_sequence,
    growth_optimal_bet,
)
from hf_variational.evaluation.selective import CombinedScore, RiskCoverage, risk_coverages
from hf_variational.evaluation.selective_policy import Decision, SelectivePolicy, Thresholds
from hf_variational.evaluation.token_scores import TokenScores

SPLITS = 1000
# Three standard deviations above delta = 0.1, of a share of 1,000.
MOST = 0.1 + 3 * math.sqrt(0.1 * 0.9 / SPLITS)


def table(wrong, num_windows=1, **values):
    tokens = wrong.numel()
    return TokenScores(
        values={name: value.flatten().float() for name, value in values.items()},
        correct=~wrong.flatten(),
        windows=torch.arange(tokens) // (tokens // num_windows),
        num_windows=num_windows,
        targets=torch.arange(tokens),
        positions=torch.zeros(tokens, dtype=torch.int64),
    )


def draw(generator, documents, length, hidden=0.0):
    """Scores that are standard normal, and errors of probability sigmoid(1.5 score − 1 + hidden · document): what is
    hidden belongs to all tokens of a document and is not in the score.
    """
    score = torch.randn(documents, length, generator=generator)
    effect = hidden * torch.randn(documents, 1, generator=generator)
    wrong = torch.rand(documents, length, generator=generator) < torch.sigmoid(1.5 * score - 1 + effect)
    return table(wrong, documents, predictive_entropy=score)


def risk_of_threshold(hidden=0.0):
    """P(wrong | score ≤ t) by quadrature, as a function of t."""
    score = np.linspace(-8, 8, 1601)
    nodes, weights = np.polynomial.hermite_e.hermegauss(41)
    chance = 1 / (1 + np.exp(-(1.5 * score[:, None] - 1 + hidden * nodes))) @ weights / weights.sum()
    density = stats.norm.pdf(score)
    curve = np.cumsum(density * chance) / np.cumsum(density)
    return lambda threshold: float(np.interp(threshold, score, curve))


# ---- Tests of a risk ----


@given(
    accepted=st.integers(1, 60), share=st.floats(0, 1), risk=st.floats(0.01, 0.9), delta=st.sampled_from([0.05, 0.2])
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_binomial_test_is_the_clopper_pearson_bound(accepted, share, risk, delta):
    errors = round(share * accepted)
    bound = stats.binomtest(errors, accepted, alternative="less").proportion_ci(1 - delta, method="exact").high
    if abs(bound - risk) > 1e-6:
        assert (binomial_p_value(errors, accepted, risk) <= delta) == (bound <= risk)


@pytest.mark.parametrize("risk", [0.1, 0.37])
@pytest.mark.parametrize("bet", [0.3, 0.98])
def test_no_p_value_is_small_more_often_than_it_says(risk, bet):
    # every outcome of 12 documents at the edge of the hypothesis, each accepted whole
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=12)))
    probability = np.prod(np.where(outcomes == 1, risk, 1 - risk), axis=1)
    accepted = np.ones(12)
    for p_values in (
        [binomial_p_value(lost.sum(), 12, risk) for lost in outcomes],
        [betting_p_value(lost, accepted, risk, bet / (1 - risk)) for lost in outcomes],
    ):
        p_values = np.array(p_values)
        assert min(p_values) < 0.75
        for level in np.unique(p_values):
            assert probability[p_values <= level].sum() <= level + 1e-12


def test_a_bet_is_the_best_of_a_grid_and_wealth_is_a_product():
    generator = np.random.default_rng(0)
    accepted = generator.random(30)
    lost = accepted * generator.random(30) * 0.15
    bet, growth = growth_optimal_bet(lost, accepted, 0.2)
    tried = np.linspace(0.01, 0.99, 300) / 0.8
    best = max(np.log(1 + b * (0.2 * accepted - lost)).sum() for b in tried)
    assert growth == pytest.approx(best, rel=0.01) and 0 < bet < 1 / 0.8
    wealth = [np.prod(1 + bet * (0.2 * accepted[:count] - lost[:count])) for count in range(31)]
    assert betting_p_value(lost, accepted, 0.2, bet) == pytest.approx(1 / max(wealth))
    assert betting_p_value(accepted, accepted, 0.2, bet) == 1  # nothing but errors
    assert betting_p_value(0 * lost, np.ones(30), 0.2, 1 / 0.8) == pytest.approx(0.8**30)


def test_a_sequence_ends_at_its_first_failure():
    p_values = [0.5, 0.01, 0.1, 0.11, 0.02]
    assert fixed_sequence(p_values.__getitem__, range(1, 5), 0.1) == 2
    assert fixed_sequence(p_values.__getitem__, range(4, 5), 0.1) == 4
    assert fixed_sequence(p_values.__getitem__, range(0, 5), 0.1) is None


# ---- The guarantee ----


def violations(policy, hidden, documents, length, seed):
    """Shares of splits whose fitted policy is above the risk, and whose naive threshold is; mean coverage."""
    generator = torch.Generator().manual_seed(seed)
    risk_at = risk_of_threshold(hidden)
    over, naive, coverage = 0, 0, 0.0
    for _ in range(SPLITS):
        validation = draw(generator, documents, length, hidden)
        fitted = policy.fit(validation)
        if fitted.certified:
            over += risk_at(fitted.thresholds.accept) > policy.target_risk
            coverage += stats.norm.cdf(fitted.thresholds.accept) / SPLITS
        curve = RiskCoverage.of(validation, "predictive_entropy")
        share = curve.coverage_at(policy.target_risk)
        naive += (
            share > 0 and risk_at(float(curve.thresholds[round(share * len(validation)) - 1])) > policy.target_risk
        )
    return over / SPLITS, naive / SPLITS, coverage


def test_the_risk_is_kept_with_independent_tokens():
    policy = SelectivePolicy(target_risk=0.2, delta=0.1, unit="token", num_thresholds=50)
    over, naive, coverage = violations(policy, 0.0, 600, 1, seed=0)
    assert over <= MOST
    # what the data itself says would break the promise in about half of the splits, at a coverage of 0.73
    assert naive > 0.4
    assert coverage > 0.5


def test_the_risk_is_kept_with_dependent_tokens():
    policy = SelectivePolicy(target_risk=0.3, delta=0.1, unit="sequence", num_thresholds=25)
    over, naive, coverage = violations(policy, 2.0, 150, 20, seed=1)
    assert over <= MOST
    assert naive > 0.4
    assert coverage > 0.2


def test_tokens_taken_for_independent_break_the_promise():
    policy = SelectivePolicy(target_risk=0.3, delta=0.1, unit="token", num_thresholds=25)
    over, _, _ = violations(policy, 2.0, 30, 60, seed=2)
    assert over > 2 * MOST


def two_looks(generator, tokens):
    """The second score is nearer to what makes errors, and its predictions have fewer of them."""
    truth = torch.randn(tokens, generator=generator)
    noise = torch.randn(2, tokens, generator=generator)
    uniform = torch.rand(tokens, generator=generator)
    first = table(uniform < torch.sigmoid(2 * truth - 1), tokens, mutual_information=truth + noise[0])
    more = table(uniform < torch.sigmoid(2 * truth - 1.2), tokens, mutual_information=truth + 0.3 * noise[1])
    return first, more


def test_the_risk_is_kept_with_a_second_look_that_earns_its_samples():
    generator = torch.Generator().manual_seed(3)
    population = two_looks(generator, 50_000)
    options = {"score": "mutual_information", "target_risk": 0.2, "unit": "token", "num_thresholds": 25}
    looks_twice = SelectivePolicy(**options, num_samples=8, num_more_samples=32, band=0.3)
    over, cost, coverage = 0, 0.0, {"once": 0.0, "twice": 0.0}
    for _ in range(300):
        first, more = two_looks(generator, 800)
        twice = looks_twice.fit(first, more=more).apply(population[0], more=population[1])
        once = SelectivePolicy(**options).fit(first).apply(population[0])
        over += twice.selective_risk > 0.2
        assert once.cost == 8
        cost += twice.cost / 300
        coverage["twice"] += twice.coverage / 300
        coverage["once"] += once.coverage / 300
    assert over / 300 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 300)
    assert cost == pytest.approx(8 + 32 * 0.3, abs=0.3)
    assert coverage["twice"] > coverage["once"] + 0.05


def test_the_risk_is_kept_by_a_combination_fitted_on_the_design_part():
    generator = torch.Generator().manual_seed(4)

    def two_scores(tokens):
        scores = torch.randn(2, tokens, generator=generator)
        wrong = torch.rand(tokens, generator=generator) < torch.sigmoid(scores.sum(0) - 1)
        return table(wrong, tokens, predictive_entropy=scores[0], mutual_information=scores[1])

    population = two_scores(50_000)
    options = {"target_risk": 0.2, "unit": "token", "num_thresholds": 25}
    over, both, single = 0, 0.0, 0.0
    for seed in range(200):
        validation = two_scores(800)
        result = SelectivePolicy("combination", seed=seed, **options).fit(validation).apply(population)
        over += result.selective_risk > 0.2
        both += result.coverage / 200
        single += SelectivePolicy("predictive_entropy", **options).fit(validation).apply(population).coverage / 200
    assert over / 200 <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)
    assert both > single + 0.05


# ---- What a policy does ----


@pytest.mark.parametrize("decide", ["token", "sequence"])
def test_decisions_by_hand(decide):
    generator = torch.Generator().manual_seed(5)
    first = draw(generator, 600, 4)
    more = draw(generator, 600, 4)
    policy = SelectivePolicy(target_risk=0.25, decide=decide, num_samples=4, num_more_samples=16)
    fitted = policy.fit(first, more=more)
    assert fitted.certified
    test, test_more = draw(generator, 20, 4), draw(generator, 20, 4)
    result = fitted.apply(test, more=test_more)
    here = fitted.thresholds
    assert here.accept <= here.draw_more

    score, second = (scores.values["predictive_entropy"].double().reshape(20, 4) for scores in (test, test_more))
    wrong, later = ((~scores.correct).double().reshape(20, 4) for scores in (test, test_more))
    if decide == "sequence":
        score, second, wrong, later = (x.mean(1, keepdim=True) for x in (score, second, wrong, later))
    accepted = torch.zeros_like(score)
    lost = torch.zeros_like(score)
    again = 0
    expected = []
    for place in itertools.product(range(20), range(score.shape[1])):
        if score[place] <= here.accept:
            expected.append(Decision.ACCEPT)
            accepted[place], lost[place] = 1, wrong[place]
        elif score[place] <= here.draw_more:
            expected.append(Decision.DRAW_MORE)
            again += 1
            if second[place] <= here.second:
                accepted[place], lost[place] = 1, later[place]
        else:
            expected.append(Decision.ABSTAIN)
    assert result.decisions.tolist() == expected == fitted.decide(test).tolist()
    assert {Decision.ACCEPT, Decision.DRAW_MORE, Decision.ABSTAIN} == set(expected)
    assert torch.equal(result.accepted, accepted.flatten().bool())
    assert result.coverage == pytest.approx(accepted.mean().item())
    assert result.selective_risk == pytest.approx((lost.mean(1).sum() / accepted.mean(1).sum()).item())
    assert result.cost == pytest.approx(4 + 16 * again / accepted.numel())


def test_sequences_of_different_lengths_count_the_same():
    validation = draw(torch.Generator().manual_seed(6), 300, 4)
    fitted = SelectivePolicy(target_risk=0.25).fit(validation)
    assert fitted.certified and fitted.thresholds.accept > -3
    # one token of two sequences, and three of a third; -9 is accepted and 9 is not
    test = table(torch.tensor([0, 1, 0, 0, 0]) == 1, 1, predictive_entropy=torch.tensor([-9.0, -9, -9, 9, -9]))
    test.windows[:] = torch.tensor([0, 1, 2, 2, 2])
    result = fitted.apply(test)
    assert result.coverage == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert result.selective_risk == pytest.approx(1 / (1 + 1 + 2 / 3))


def test_a_perfect_score_accepts_all_that_is_right():
    wrong = torch.arange(4000) % 4 == 0
    validation = table(wrong, 1000, mutual_information=wrong.float())
    fitted = SelectivePolicy("mutual_information", target_risk=0.01, unit="token").fit(validation)
    result = fitted.apply(validation)
    assert result.coverage == 0.75 and result.selective_risk == 0
    # every token of which a share of 1/4 is wrong may be accepted at a risk of 0.3
    everything = SelectivePolicy("mutual_information", target_risk=0.3, unit="token").fit(validation)
    assert everything.thresholds.accept == math.inf and everything.apply(validation).coverage == 1


def test_out_of_reach_it_abstains_from_everything_and_names_what_is_within(caplog):
    validation = draw(torch.Generator().manual_seed(7), 200, 5)
    library = logging.getLogger("hf_variational")
    with caplog.at_level(logging.WARNING, library.name):
        fitted = SelectivePolicy(target_risk=0.001).fit(validation)
    message = caplog.records[-1].getMessage()
    assert "No threshold of predictive_entropy keeps the risk at 0.001 with probability 0.9" in message
    assert not fitted.certified and fitted.thresholds == Thresholds(-math.inf, -math.inf, -math.inf)
    result = fitted.apply(validation)
    assert result.coverage == 0 and math.isnan(result.selective_risk) and not result.accepted.any()
    assert set(result.decisions.tolist()) == {Decision.ABSTAIN}
    reach = float(message.split("a target of ")[1].split()[0])
    assert SelectivePolicy(target_risk=reach + 0.001).fit(validation).certified
    assert not SelectivePolicy(target_risk=reach - 0.01).fit(validation).certified
    # an error at every token: nothing is within reach
    caplog.clear()
    always = table(torch.ones(40, dtype=torch.bool), 20, predictive_entropy=torch.randn(40))
    with caplog.at_level(logging.WARNING, library.name):
        SelectivePolicy().fit(always)
    assert "no target is within its reach" in caplog.records[-1].getMessage()


# ---- Risk and coverage ----


@given(
    scores=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    losses=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=7, max_size=7),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_curve_is_the_mean_over_orders_of_equal_scores(scores, losses):
    losses = losses[: len(scores)]
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] <= scores[b] for a, b in itertools.pairwise(order))
    ]
    risks = [np.cumsum([losses[i] for i in order]) / np.arange(1, len(order) + 1) for order in orders]
    curve = RiskCoverage.of_values(torch.tensor(scores).double(), torch.tensor(losses))
    np.testing.assert_allclose(curve.risk, np.mean(risks, axis=0), atol=1e-12)
    assert curve.thresholds.tolist() == sorted(scores)
    assert curve.area() == pytest.approx(aurc(torch.tensor(scores).double(), torch.tensor(losses)))
    assert curve.excess() == pytest.approx(excess_aurc(torch.tensor(scores).double(), torch.tensor(losses)))
    assert curve.excess() >= -1e-12
    for share in (0.3, 0.5, 1.0):
        # the next unit is accepted with the probability that is left
        count = share * len(scores)
        whole = int(count + 1e-9)
        total = whole * curve.risk[whole - 1].item() if whole else 0.0
        following = curve.risk[whole].item() * (whole + 1) - total if whole < len(scores) else 0.0
        assert curve.at(share) == pytest.approx((total + (count - whole) * following) / count)


def test_reading_a_curve():
    wrong = torch.tensor([0, 0, 1, 0, 1]) == 1
    scores = table(wrong, 1, mutual_information=torch.arange(5.0), nll=torch.tensor([1.0, 2, 3, 4, 5]))
    curve = RiskCoverage.of(scores, "mutual_information")
    assert curve.risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5])
    assert curve.at(0.4) == 0 and curve.at(1.0) == pytest.approx(0.4) and curve.at(0.5) == pytest.approx(0.5 / 2.5)
    assert curve.coverage_at(0.0) == pytest.approx(0.4)
    assert curve.coverage_at(0.3) == pytest.approx(0.8)  # the risk need not rise everywhere
    assert curve.coverage_at(0.4) == 1 and curve.coverage_at(-0.1) == 0
    assert RiskCoverage.of(scores, "mutual_information", loss="nll").risk[-1] == 3
    oracle = RiskCoverage.of_values(wrong.double(), wrong.double())
    assert oracle.excess() == 0 and curve.excess() == pytest.approx(curve.area() - oracle.area())


def test_sequences_are_ranked_by_their_means():
    scores = draw(torch.Generator().manual_seed(8), 30, 6)
    curve = RiskCoverage.of(scores, "predictive_entropy", unit="sequence")
    values = scores.values["predictive_entropy"].double().reshape(30, 6).mean(1)
    errors = (~scores.correct).double().reshape(30, 6).mean(1)
    order = values.argsort()
    torch.testing.assert_close(curve.thresholds, values[order])
    torch.testing.assert_close(curve.risk, errors[order].cumsum(0) / torch.arange(1, 31))


def test_a_random_score_has_the_mean_risk():
    generator = torch.Generator().manual_seed(9)
    wrong = torch.rand(20_000, generator=generator) < 0.3
    scores = table(wrong, 1, mutual_information=torch.rand(20_000, generator=generator))
    assert RiskCoverage.of(scores, "mutual_information").area() == pytest.approx(0.3, abs=0.01)


def test_every_score_that_does_not_look_at_the_target_has_a_curve():
    scores = draw(torch.Generator().manual_seed(10), 50, 4)
    scores.values.update(
        nll=torch.rand(200), kl=torch.rand(200), brier=torch.rand(200), token_variance=torch.rand(200)
    )
    combined = CombinedScore.fit(scores)
    curves = risk_coverages(scores, combined, unit="sequence")
    assert list(curves) == ["predictive_entropy", "kl", "combination"] and len(curves["kl"].risk) == 50
    assert list(risk_coverages(scores)) == ["predictive_entropy", "kl"]


# ---- The combination ----


def test_the_combination_is_a_logistic_regression_of_standardised_scores():
    generator = torch.Generator().manual_seed(11)
    scores = torch.randn(3, 5000, generator=generator).double()
    scores[1] = 1e-4 * scores[1] + 7
    wrong = torch.rand(5000, generator=generator) < torch.sigmoid(scores[0] + 1e4 * (scores[1] - 7) / 2 - 1)
    values = dict(zip(("predictive_entropy", "mutual_information", "kl"), scores, strict=True))
    validation = table(wrong, 1, **values)
    combined = CombinedScore.fit(validation)
    # what the errors were made from, whatever the units of a score
    assert list(combined.weights.values()) == pytest.approx([1.0, 0.5, 0.0], abs=0.1)
    features = torch.stack([validation.values[name].double() for name in values], 1)
    features = (features - features.mean(0)) / features.std(0, correction=0)
    oracle = LogisticRegression(max_iter=1000).fit(features, wrong)
    torch.testing.assert_close(combined(validation), torch.from_numpy(oracle.predict_proba(features)[:, 1]))
    assert (
        RiskCoverage.of(validation, combined).area() < RiskCoverage.of(validation, "predictive_entropy").area() - 0.005
    )
    # standardised as on the validation data, not anew
    few = validation.select(torch.arange(3))
    torch.testing.assert_close(combined(few), combined(validation)[:3])
    assert CombinedScore.fit(validation, ("kl",)).names == ("kl",)


# ---- Bad input ----


def scored(**values):
    return table(torch.arange(40) % 3 == 0, 10, **(values or {"predictive_entropy": torch.arange(40.0)}))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RiskCoverage.of(scored(), "mutual_information"), "no 'mutual_information'; they have .*entropy"),
        (lambda: RiskCoverage.of(scored(nll=torch.rand(40)), "nll"), "'nll' looks at the target"),
        (lambda: RiskCoverage.of(scored(kl=torch.full((40,), math.nan)), "kl"), "NaN at 40 of 40 tokens"),
        (lambda: RiskCoverage.of(scored(), "predictive_entropy", unit="word"), "token, sequence, got 'word'"),
        (lambda: RiskCoverage.of(scored(), "predictive_entropy", loss="f1"), "error, nll, brier, got 'f1'"),
        (lambda: RiskCoverage.of(scored(), "predictive_entropy").at(0), r"\(0, 1\], got 0"),
        (lambda: CombinedScore.fit(scored().select(torch.tensor([1, 2]))), "All of the 2 validation tokens are right"),
        (lambda: CombinedScore.fit(scored().select(torch.tensor([0, 3]))), "All of the 2 validation tokens are wrong"),
        (lambda: SelectivePolicy(target_risk=5), "`target_risk` is a number between 0 and 1, got 5"),
        (lambda: SelectivePolicy(delta=0), "`delta` is a number between 0 and 1, got 0"),
        (lambda: SelectivePolicy(unit="document"), "`unit` is one of token, sequence, got 'document'"),
        (lambda: SelectivePolicy(unit="token", decide="sequence"), "give unit='sequence'"),
        (lambda: SelectivePolicy(num_thresholds=0), "at least 1, got 0"),
        (lambda: SelectivePolicy().fit(scored(), more=scored()), "num_more_samples=None and more=a table"),
        (lambda: SelectivePolicy(num_more_samples=8).fit(scored()), "num_more_samples=8 and more=None"),
        (
            lambda: SelectivePolicy(num_more_samples=8).fit(scored(), more=scored().select(torch.arange(4))),
            "`more` is of other tokens",
        ),
        (lambda: SelectivePolicy().fit(scored().select(torch.arange(4))), "designed on one sequence .* got 1"),
        (lambda: SelectivePolicy("nll").fit(scored(nll=torch.rand(40))), "'nll' looks at the target"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
