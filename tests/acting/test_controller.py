"""The controller on data: fitted coefficients and thresholds, decisions that follow from them, and its file."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from acting_models import KeyedNoise, made, texts
from sklearn.linear_model import LogisticRegression

from hf_variational import EVEConfig, VariationalAttentionConfig, posterior_noise
from hf_variational.acting import Action, ActionThresholds, AdaptiveSampling, InternalScore, UncertaintyController
from hf_variational.acting.controller import _thresholds
from hf_variational.acting.settling import KeptLooks
from hf_variational.evaluation import token_scores

SCHEDULE = (2, 4, 8)
QUIET = {"progress": False, "batch_size": 6}
FIT = {"schedule": SCHEDULE, "coverage": 0.7, "reversals": 0.05, "quality": 0.05, **QUIET}


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module", params=["step", "sequence"])
def fitted(request, model):
    with posterior_noise(KeyedNoise()):
        return UncertaintyController.fit(model, texts(), unit=request.param, **FIT)


@pytest.fixture(scope="module")
def looks(model):
    with posterior_noise(KeyedNoise()):
        return KeptLooks.draw(model, texts(), SCHEDULE, internal=True, **QUIET)


# ---- The score ----


def test_the_score_is_a_logistic_regression_of_errors(looks):
    table = looks.looks[-1]
    score = InternalScore.fit(table)
    assert list(score.coefficients) == ["kl", "scale", "mutual_information"]
    features = torch.stack([table.values[name].double() for name in score.coefficients], 1).numpy()
    standard = (features - features.mean(0)) / features.std(0)
    regression = LogisticRegression(max_iter=1000).fit(standard, (~table.correct).numpy())
    np.testing.assert_allclose(score(table.values).numpy(), regression.decision_function(standard), rtol=1e-6)


def test_kl_and_scale_are_those_of_the_pass(model, looks):
    with posterior_noise(KeyedNoise()):
        plain = token_scores(model, texts(), 8, batch_size=12, internal=True, progress=False)
    for name in ("kl", "scale"):
        # means over the samples of three passes are those of one
        torch.testing.assert_close(looks.looks[-1].values[name], plain.values[name], rtol=1e-4, atol=1e-5)


def test_attention_alone_has_no_scale():
    attention = VariationalAttentionConfig(kind="gaussian", initial_scale=0.7)
    model = made(EVEConfig(initial_scale=0.6))
    config = model.config.__class__(**{**model.config.to_dict(), "eve": None, "attention": attention})
    torch.manual_seed(0)
    only = type(model)(config).eval()
    found = UncertaintyController.fit(only, texts(), **FIT)
    assert list(found.score.coefficients) == ["kl", "mutual_information"]
    assert found.evaluate(only, texts(4), **QUIET).actions.shape == (30,)


# ---- Thresholds ----


def test_the_share_answered_with_all_samples_is_the_coverage(model, fitted):
    undecided = ActionThresholds(-math.inf, fitted.thresholds.final, math.inf)
    of_all = dataclasses.replace(fitted, thresholds=undecided, sampling=AdaptiveSampling(0.0, SCHEDULE))
    with posterior_noise(KeyedNoise()):
        found = of_all.evaluate(model, texts(), **QUIET)
    assert (found.samples == 8).all()
    answered = found.actions == Action.ANSWER
    if fitted.unit == "step":
        assert found.coverage == pytest.approx(0.7, abs=0.02)
    else:
        assert len(found.scores.windows[answered].unique()) == math.ceil(0.7 * 12)
    assert found.selective_risk == pytest.approx(float((~found.scores.correct[answered]).double().mean()))


def test_few_decisions_are_reversed_and_the_quality_kept(model, fitted):
    undecided = ActionThresholds(-math.inf, fitted.thresholds.final, math.inf)
    of_all = dataclasses.replace(fitted, thresholds=undecided, sampling=AdaptiveSampling(0.0, SCHEDULE))
    with posterior_noise(KeyedNoise()):
        full, found = (controller.evaluate(model, texts(), **QUIET) for controller in (of_all, fitted))
    assert float((full.actions != found.actions).double().mean()) <= 0.05
    assert found.nll <= 1.025 * full.nll + 1e-6 and found.aurc() <= 1.025 * full.aurc() + 1e-6
    assert found.cost.mean_samples <= full.cost.mean_samples == 8


def test_bands_by_hand():
    last = np.array([-5.0, -4, -3, -2, -1, 1, 2, 3, 4, 5])
    early = last.copy()
    early[4], early[5] = -0.6, -1.4  # each on the other side of what the last look will be held to
    found = _thresholds([early, last], 0.5, 0.0)
    assert found.final == -1.0
    # both have to lie within, and no more than they
    assert found.answer == pytest.approx(-1.4) and found.answer < early[5]
    assert found.abstain == pytest.approx(-0.6) and found.abstain >= early[4]
    assert _thresholds([early, last], 0.5, 0.2).answer == -1.0  # two reversals of ten are allowed
    # the second of three looks is asked only about what the first left open
    assert _thresholds([last, early, last], 0.5, 0.0).answer == -1.0
    assert _thresholds([early, last], 1, 0.0) == ActionThresholds()


def test_of_a_whole_coverage_nothing_is_abstained_from(model):
    with posterior_noise(KeyedNoise()):
        found = UncertaintyController.fit(model, texts(), **{**FIT, "coverage": 1})
        sampling = AdaptiveSampling.fit(model, texts(), schedule=SCHEDULE, quality=0.05, **QUIET)
        assert found.evaluate(model, texts(), **QUIET).coverage == 1
    assert found.thresholds == ActionThresholds() and found.sampling == sampling


def test_a_decision_about_a_sequence_is_one(model, looks):
    score = InternalScore.fit(looks.looks[-1])
    means = torch.stack(
        [score(looks.looks[0].values)[looks.looks[0].windows == window].mean() for window in range(12)]
    )
    middle = float(means.median())
    controller = UncertaintyController(
        score, ActionThresholds(middle, middle, middle), AdaptiveSampling(0.0, SCHEDULE)
    )
    with posterior_noise(KeyedNoise()):
        found = controller.evaluate(model, texts(), **QUIET)
    assert found.cost.mean_samples == 2
    expected = torch.where(means <= middle, Action.ANSWER, Action.ABSTAIN)
    assert torch.equal(found.actions.long(), expected[found.scores.windows])


def test_controllers_of_looks_that_are_there(looks, fitted):
    options = {name: FIT[name] for name in ("coverage", "reversals", "quality")}
    assert UncertaintyController.fit_looks(looks, unit=fitted.unit, **options) == fitted


# ---- The file ----


def test_saved_and_loaded(model, fitted, tmp_path):
    fitted.save(tmp_path / "controller.json")
    loaded = UncertaintyController.load(tmp_path / "controller.json")
    assert loaded == fitted and loaded.sampling.frontier == fitted.sampling.frontier
    json.loads((tmp_path / "controller.json").read_text(), parse_constant=pytest.fail)
    open_ended = dataclasses.replace(fitted, thresholds=ActionThresholds(), sampling=AdaptiveSampling(math.inf))
    open_ended.save(tmp_path / "open.json")
    assert UncertaintyController.load(tmp_path / "open.json") == open_ended
    with posterior_noise(KeyedNoise()):
        found = [controller.evaluate(model, texts(), **QUIET) for controller in (fitted, loaded)]
    assert torch.equal(found[0].actions, found[1].actions)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ('{"format": 9}', "its format is 9, and this version reads 1"),
        ('{"format": 1, "unit": "step"}', "'sampling'"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, message):
    file = tmp_path / "controller.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"controller.json holds no UncertaintyController: .*{message}"):
        UncertaintyController.load(file)


def test_a_file_with_thresholds_reversed(fitted, tmp_path):
    file = tmp_path / "controller.json"
    fitted.save(file)
    content = json.loads(file.read_text())
    content["thresholds"] = {"answer": 2.0, "final": 1.0, "abstain": 0.0}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="thresholds are reversed"):
        UncertaintyController.load(file)


# ---- Bad input ----


def test_bad_input(model, looks):
    for options, message in (
        ({"unit": "token"}, "`unit` is one of step, sequence, got 'token'"),
        ({"coverage": 0}, r"`coverage` is the share of validation units to answer, in \(0, 1\], got 0"),
        ({"reversals": 1.0}, "`reversals` is a share between 0 and 1, got 1.0"),
        ({"measure": "kl"}, "`measure` is one of"),
    ):
        with pytest.raises(ValueError, match=message):
            UncertaintyController.fit(model, texts(), **{**FIT, **options})
    with pytest.raises(ValueError, match="none of the 1 sequences has a token to predict"):
        UncertaintyController.fit(model, [[5]], **FIT)
    deterministic = made(deterministic=True)
    with pytest.raises(ValueError, match="has no posteriors"):
        UncertaintyController.fit(deterministic, texts(), **FIT)
    with pytest.raises(ValueError, match="has no posteriors"):
        UncertaintyController(InternalScore({"kl": 1.0})).generate(deterministic, torch.ones(1, 3, dtype=torch.long))
    wrong = looks.looks[-1].select(~looks.looks[-1].correct)
    with pytest.raises(ValueError, match="validation tokens are wrong"):
        InternalScore.fit(wrong)
    with pytest.raises(ValueError, match="coefficients are of kl, scale, mutual_information, got"):
        InternalScore({"entropy": 1.0})
    with pytest.raises(ValueError, match="'kl' is a finite number, got nan"):
        InternalScore({"kl": math.nan})
    with pytest.raises(ValueError, match="fitted with scale, which this model's posteriors do not have"):
        InternalScore({"scale": 1.0})({"kl": torch.zeros(2)})
