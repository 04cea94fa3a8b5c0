"""The modules of `evaluate`: loaded offline in a process of their own, combined, filled bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch

from hf_variational import evaluation
from hf_variational.evaluation import METRIC_MODULES, TokenScores, metric_path
from hf_variational.modeling.predictive import predictive_measures

LIKELIHOOD = ("nll", "perplexity", "cvar_nll")
CONFIDENCE = ("expected_calibration_error", "maximum_calibration_error", "brier_score")
DETECTION = ("auroc", "aupr", "fpr_at_tpr")
REJECTION = ("aurc", "excess_aurc", "prediction_rejection_ratio", "rank_calibration_error")
MEASURES = (
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "conditional_variance",
    "top1_flip_rate",
)


def example(count=60, samples=4, classes=5):
    """Probabilities of samples, their mean, and what came."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, samples, classes, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)
    return p, p.mean(1), torch.multinomial(p.mean(1), 1, generator=generator).squeeze(1)


def inputs_and_answers() -> dict[str, tuple[dict, float]]:
    """What each module is given, and what it should answer."""
    samples, p, targets = example()
    confidence, predicted = p.max(-1)
    correct = (predicted == targets).long()
    chosen = p[torch.arange(len(p)), targets]
    nll, size = -chosen.log(), 1 + targets
    entropy = torch.special.entr(p).sum(-1)
    found = {name: {"predictions": -nll} for name in LIKELIHOOD}
    found |= {name: {"predictions": confidence, "references": correct} for name in CONFIDENCE}
    found |= {name: {"predictions": entropy, "references": 1 - correct} for name in DETECTION + REJECTION}
    found |= {name: {"predictions": samples} for name in MEASURES}
    found["bits_per_byte"] = {"predictions": -nll, "references": size}
    found["classwise_calibration_error"] = {"predictions": p, "references": targets}
    classwise = evaluation.ClasswiseCalibration()
    classwise.update(p, targets)
    wrong, right = entropy[correct == 0], entropy[correct == 1]
    flat = samples.flatten(0, 1).log().unsqueeze(1)
    measures = predictive_measures(flat, samples.shape[1])
    answers = {
        "nll": nll.mean(),
        "perplexity": nll.mean().exp(),
        "cvar_nll": nll.topk(3).values.mean(),
        "bits_per_byte": nll.sum() / torch.tensor(2.0).log() / size.sum(),
        "expected_calibration_error": evaluation.expected_calibration_error(confidence, correct),
        "maximum_calibration_error": evaluation.maximum_calibration_error(confidence, correct),
        "brier_score": (confidence - correct).square().mean(),
        "classwise_calibration_error": classwise.compute(),
        "auroc": evaluation.auroc(right, wrong),
        "aupr": evaluation.aupr(right, wrong),
        "fpr_at_tpr": evaluation.fpr_at_tpr(right, wrong),
        "aurc": evaluation.aurc(entropy, 1 - correct),
        "excess_aurc": evaluation.excess_aurc(entropy, 1 - correct),
        "prediction_rejection_ratio": evaluation.prediction_rejection_ratio(entropy, 1 - correct),
        "rank_calibration_error": evaluation.rank_calibration_error(entropy, 1 - correct),
        **{name: measures[name].double().mean() for name in MEASURES},
    }
    return {name: (found[name], float(answers[name])) for name in found}


def plain(inputs):
    return {name: values.tolist() for name, values in inputs.items()}


_SCRIPT = """
import json, sys
import evaluate
given = json.load(open(sys.argv[1]))
answers = {}
for path, inputs in given["alone"]:
    answers.update(evaluate.load(path).compute(**inputs))
combined = [evaluate.combine(paths).compute(**inputs) for paths, inputs in given["together"]]
print(json.dumps([answers, combined]))
"""


def test_offline_in_a_process_of_its_own(tmp_path):
    expected = inputs_and_answers()
    assert set(expected) == set(METRIC_MODULES)
    groups = (("bits_per_byte", *LIKELIHOOD), CONFIDENCE, DETECTION + REJECTION, MEASURES)
    given = {
        "alone": [(metric_path(name), plain(inputs)) for name, (inputs, _) in expected.items()],
        "together": [([metric_path(name) for name in group], plain(expected[group[0]][0])) for group in groups],
    }
    (tmp_path / "given.json").write_text(json.dumps(given))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path / "given.json")],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    alone, together = json.loads(done.stdout.splitlines()[-1])
    assert alone == {name: pytest.approx(answer, rel=1e-5, abs=1e-9) for name, (_, answer) in expected.items()}
    for group, answers in zip(groups, together, strict=True):
        assert answers == {name: pytest.approx(alone[name]) for name in group}


@pytest.fixture
def load(tmp_path):
    def load(name):
        return evaluate.load(metric_path(name), cache_dir=str(tmp_path), experiment_id=name)

    return load


@pytest.mark.parametrize("name", METRIC_MODULES)
def test_one_by_one_and_in_batches_is_all_at_once(name, load):
    inputs, expected = inputs_and_answers()[name]
    module = load(name)
    assert module.info.citation.strip().startswith("@") and name in METRIC_MODULES
    one = {"predictions": "prediction", "references": "reference"}
    for row in range(len(inputs["predictions"])):
        module.add(**{one[key]: values[row].tolist() for key, values in inputs.items()})
    assert module.compute() == {name: pytest.approx(expected, rel=1e-5, abs=1e-9)}
    for start in range(0, 60, 25):
        module.add_batch(**plain({key: values[start : start + 25] for key, values in inputs.items()}))
    assert module.compute() == {name: pytest.approx(expected, rel=1e-5, abs=1e-9)}


def test_arguments_reach_the_functions(load):
    expected = inputs_and_answers()
    confidence, correct = expected["brier_score"][0].values()
    options = {"num_bins": 4, "binning": "mass"}
    found = load("expected_calibration_error").compute(predictions=confidence, references=correct, **options)
    wanted = evaluation.expected_calibration_error(confidence, correct, **options)
    assert found["expected_calibration_error"] == pytest.approx(wanted)
    log_p = expected["nll"][0]["predictions"]
    assert load("cvar_nll").compute(predictions=log_p, fraction=1.0)["cvar_nll"] == pytest.approx(expected["nll"][1])
    uncertainty, error = expected["auroc"][0].values()
    found = load("fpr_at_tpr").compute(predictions=uncertainty, references=error, tpr=0.5)["fpr_at_tpr"]
    assert found == pytest.approx(evaluation.fpr_at_tpr(uncertainty[error == 0], uncertainty[error == 1], 0.5))


def test_the_columns_of_the_table_go_in_as_they_are(load):
    _, p, targets = example()
    predicted = p.argmax(-1)
    values = {"nll": torch.rand(60), "predictive_entropy": torch.special.entr(p).sum(-1).float()}
    scores = TokenScores(values, predicted == targets, torch.zeros(60).long(), 1, targets, torch.arange(60))
    found = load("auroc").compute(predictions=scores.values["predictive_entropy"], references=~scores.correct)
    assert found["auroc"] == pytest.approx(scores.error_auroc()["predictive_entropy"])
    found = load("nll").compute(predictions=-scores.values["nll"])
    assert found["nll"] == pytest.approx(scores.values["nll"].mean().item(), rel=1e-6)
    # a measure that is at hand is averaged
    found = load("predictive_entropy").compute(predictions=scores.values["predictive_entropy"])
    assert found["predictive_entropy"] == pytest.approx(scores.values["predictive_entropy"].mean().item(), rel=1e-6)


def test_the_brier_score_of_whole_distributions(load):
    _, p, targets = example()
    found = load("brier_score").compute(predictions=p.tolist(), references=targets.tolist())["brier_score"]
    assert found == pytest.approx(evaluation.brier(p, targets).mean().item())


def test_bad_input_is_named(load):
    with pytest.raises(ValueError, match="no metric 'ece': it is one of nll, perplexity"):
        metric_path("ece")
    with pytest.raises(ValueError, match="`references` is 0 or 1.*2"):
        load("auroc").compute(predictions=[0.1, 0.2], references=[2, 1])
    with pytest.raises(ValueError, match="add up to 1, got a sum of 1.5"):
        load("mutual_information").compute(predictions=[[[0.5, 0.5], [1.0, 0.5]]])
    with pytest.raises(ValueError, match="add up to 1, got a probability of -0.5"):
        load("mutual_information").compute(predictions=[[[0.5, 0.5], [1.5, -0.5]]])


def test_every_folder_is_a_module():
    folders = {path.name for path in Path(metric_path("nll")).parent.iterdir() if (path / f"{path.name}.py").exists()}
    assert folders == set(METRIC_MODULES)
