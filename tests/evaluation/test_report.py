"""A report's numbers against the functions called by hand, its data against what was given, and what it refuses."""

import json
import math

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from report_models import Bigram, other_rows, sampled_rows
from sklearn.metrics import roc_auc_score

from hf_variational.evaluation import (
    ClasswiseCalibration,
    aurc,
    bits_per_byte,
    bootstrap_documents,
    conditional_value_at_risk,
    detection,
    evaluate_language_model,
    expected_calibration_error,
    fit_temperature,
    maximum_calibration_error,
    token_scores,
)
from hf_variational.evaluation.report import (
    Contender,
    EvaluationReport,
    EvaluationSettings,
    eval_results,
    evaluate_model,
    text_rows,
)
from hf_variational.evaluation.report.contents import policy
from hf_variational.evaluation.report.resamples import DocumentResamples, window_auroc_interval
from hf_variational.evaluation.report.rows import described, front, short_windows
from hf_variational.evaluation.selective import CombinedScore
from hf_variational.evaluation.selective_policy import SelectivePolicy

SAMPLES = 4
QUICK = EvaluationSettings(num_resamples=30, window_lengths=(4, 8), max_windows=40, target_risk=0.5)


def rows_of(model, **options):
    """Rows with documents of two sequences each, and bytes."""
    rows = sampled_rows(model, **options)
    return [{"input_ids": row, "document": index // 2, "num_bytes": 3 * len(row)} for index, row in enumerate(rows)]


def report_of(model, data=None, **options):
    arguments = {"settings": QUICK, "progress": False, "name": "bigram", **options}
    return evaluate_model(model, rows_of(model) if data is None else data, SAMPLES, **arguments)


@pytest.fixture(scope="module")
def model():
    return Bigram()


@pytest.fixture(scope="module")
def validation(model):
    return sampled_rows(model, seed=7)


@pytest.fixture(scope="module")
def report(model, validation):
    return report_of(model, validation=validation, ood={"other": other_rows()}, baselines={})


@pytest.fixture(scope="module")
def scores(model):
    return token_scores(model, rows_of(model), SAMPLES, QUICK.batch_size, progress=False)


# ---- The numbers are those of the functions ----


def test_quality(model, report, scores):
    confidence = 1 - scores.values["one_minus_confidence"].double()
    classwise = ClasswiseCalibration()
    token_scores(model, rows_of(model), SAMPLES, QUICK.batch_size, classwise=classwise, progress=False)
    nll = scores.values["nll"]
    expected = {
        "nll": float(nll.double().mean()),
        "perplexity": math.exp(nll.double().mean()),
        "accuracy": float(scores.correct.double().mean()),
        "expected_calibration_error": expected_calibration_error(confidence, scores.correct),
        "expected_calibration_error_mass": expected_calibration_error(confidence, scores.correct, binning="mass"),
        "maximum_calibration_error": maximum_calibration_error(confidence, scores.correct, binning="mass"),
        "classwise_calibration_error": classwise.compute(),
        "brier_score": float(scores.values["brier"].double().mean()),
        "cvar_nll": conditional_value_at_risk(nll),
        "bits_per_byte": bits_per_byte(nll, 60 * 36),
    }
    got = report.contenders["bigram"]["quality"]
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name]["value"] == pytest.approx(value, rel=1e-9), name


def test_measures_are_those_of_evaluate_language_model(model, report):
    direct = evaluate_language_model(model, rows_of(model), SAMPLES, QUICK.batch_size, progress=False, seed=0)
    # there the mean pass runs between the batches, without drawing noise
    for name in ("predictive_entropy", "expected_entropy", "mutual_information", "conditional_variance"):
        assert report.value("bigram", "measures", name) == pytest.approx(direct["samples"][name], rel=1e-6)
    assert report.value("mean pass", "quality", "nll") == pytest.approx(direct["mean_pass"]["nll"], rel=1e-6)
    assert report.value("mean pass", "measures", "mutual_information") is None


def test_errors_are_found_as_well_as_scikit_learn_says(model, report, scores, validation):
    found = report.contenders["bigram"]["error_detection"]
    held = token_scores(model, validation, SAMPLES, QUICK.batch_size, progress=False)
    combined = CombinedScore.fit(held)(scores)
    assert "token_variance" not in found and "nll" not in found
    for name, values in {
        **{n: scores.values[n] for n in found if n != "combination"},
        "combination": combined,
    }.items():
        assert found[name]["auroc"]["value"] == pytest.approx(roc_auc_score(~scores.correct, values)), name
        assert found[name]["aupr"]["value"] == detection(values[scores.correct], values[~scores.correct])["aupr"]
        area = report.value("bigram", "selective", "token", name, "aurc")
        assert area == pytest.approx(aurc(values, (~scores.correct).double())), name


def test_the_policy_is_fitted_on_validation_and_applied_to_test(model, report, scores, validation):
    held = token_scores(model, validation, SAMPLES, QUICK.batch_size, progress=False)
    fitted = SelectivePolicy("predictive_entropy", target_risk=0.5, num_samples=SAMPLES).fit(held)
    result = fitted.apply(scores)
    found = report.contenders["bigram"]["policies"]["predictive_entropy"]
    assert fitted.certified and found["certified"]
    assert found["coverage"] == result.coverage and found["selective_risk"] == result.selective_risk
    assert found["samples_per_token"] == SAMPLES


def test_a_policy_that_cannot_be_fitted_says_why(scores):
    found = policy("combination", scores.select(~scores.correct), scores, SAMPLES, 0.5, 0.1)
    assert found.keys() == {"target_risk", "delta", "certified", "reason"}
    assert found["certified"] is False and "tokens are wrong" in found["reason"]


def test_tempered_contenders_are_at_the_fitted_temperature(model, report, validation):
    for title, samples in (("bigram", SAMPLES), ("mean pass", 0)):
        fitted = fit_temperature(model, validation, samples, QUICK.batch_size, progress=False)
        column = report.contenders[f"{title}, tempered"]
        assert column["temperature"] == fitted.temperature
        options = {"temperature": fitted.temperature, "progress": False}
        direct = token_scores(model, rows_of(model), samples, QUICK.batch_size, **options)
        assert column["quality"]["nll"]["value"] == pytest.approx(float(direct.values["nll"].double().mean()))


def test_other_texts(model, report):
    windows = {"own": short_windows(rows_of(model), 8, (), 40), "other": short_windows(other_rows(), 8, (), 40)}
    means = {
        name: token_scores(model, rows, SAMPLES, 12, progress=False).window_means() for name, rows in windows.items()
    }
    for name in ("mutual_information", "predictive_entropy", "nll"):
        expected = detection(means["own"][name], means["other"][name])
        found = report.contenders["bigram"]["out_of_domain"]["other"]["8"][name]
        assert {key: entry["value"] for key, entry in found.items()} == pytest.approx(expected)
    assert report.value("bigram", "out_of_domain", "other", "8", "mutual_information", "auroc") > 0.6
    histogram = report.curves["bigram"]["histograms"]
    assert histogram["length"] == 8
    for counts in histogram["measures"]["mutual_information"]["counts"].values():
        assert sum(counts) == 40


def test_each_contender_runs_once_over_the_test_data(model):
    model.calls.clear()
    # the temperature and the score need the validation data twice
    report_of(model, baselines={}, validation=sampled_rows(model, seed=7, count=16))
    drawn = [rows for rows, samples in model.calls if samples == SAMPLES]
    mean = [rows for rows, samples in model.calls if samples == 0]
    assert sum(drawn) == sum(mean) == 60 + 2 * 16
    model.calls.clear()
    report_of(model)
    assert sum(rows for rows, _ in model.calls) == 60, "validation and test data together"


def test_a_baseline_may_be_made_of_the_validation_data(model, validation):
    seen = []

    def make(held):
        seen.append(len(held))
        return Contender(Bigram(noise=0.0), 2, notes=("is quiet.",), training={"tokens": 5})

    report = report_of(model, validation=validation, baselines={"quiet": make, "plain": Bigram(variational=False)})
    assert seen == [60]
    assert report.value("quiet", "measures", "mutual_information") == pytest.approx(0, abs=1e-6)
    assert report.contenders["quiet"]["training"] == {"tokens": 5}
    assert report.contenders["plain"]["num_posterior_samples"] == 0
    assert "quiet: is quiet." in report.notes


# ---- Intervals ----


def test_intervals_are_those_of_bootstrap_documents(scores):
    documents = scores.windows // 2
    resamples = DocumentResamples(documents, num_resamples=40, seed=3)
    wrong = ~scores.correct
    entropy = scores.values["predictive_entropy"].mul(3).round()  # with ties
    confidence = 1 - scores.values["one_minus_confidence"].double()
    nll = scores.values["nll"]

    def area(tokens):
        return detection(entropy[tokens][~wrong[tokens]], entropy[tokens][wrong[tokens]])["auroc"]

    cases = (
        (resamples.of_mean(nll), lambda tokens: float(nll[tokens].double().mean())),
        (resamples.of_auroc(entropy, wrong), area),
        (resamples.of_tail_mean(nll), lambda tokens: conditional_value_at_risk(nll[tokens])),
        (
            resamples.of_calibration_error(confidence, scores.correct, 15),
            lambda tokens: expected_calibration_error(confidence[tokens], scores.correct[tokens]),
        ),
    )
    for interval, statistic in cases:
        naive = bootstrap_documents(statistic, documents, num_resamples=40, seed=3)
        assert interval == pytest.approx(list(naive.interval), rel=1e-6)


def test_one_document_has_no_interval(scores):
    resamples = DocumentResamples(torch.zeros(len(scores), dtype=torch.int64))
    assert resamples.of_mean(scores.values["nll"]) is None
    assert resamples.of_auroc(scores.values["nll"], ~scores.correct) is None


def test_the_interval_of_two_samples_of_windows_has_its_coverage():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(200):
        own, other = torch.randn(2, 40, generator=generator)
        low, high = window_auroc_interval(own, other + 1.0, num_resamples=200, seed=trial)
        inside += low <= 0.7602 <= high  # Φ(1/√2)
    assert inside >= 180


def test_few_documents_are_no_unit(model):
    rows = [{"input_ids": row, "document": index // 30} for index, row in enumerate(sampled_rows(model))]
    unit = report_of(model, rows, validation=sampled_rows(model, seed=7)).configuration["resampled"]
    assert (unit["unit"], unit["count"]) == ("sequence", 60)
    unit = report_of(model, validation=sampled_rows(model, seed=7)).configuration["resampled"]
    assert (unit["unit"], unit["count"]) == ("document", 30)


# ---- Repeated, saved, loaded ----


def test_a_repeated_run_differs_in_its_times_alone(model, report, validation):
    def without_times(one):
        return {key: value for key, value in json.loads(one.to_json()).items() if key != "times"}

    options = {"validation": validation, "ood": {"other": other_rows()}, "baselines": {}}
    again = report_of(model, **options)
    assert without_times(again) == without_times(report)
    assert again.times["bigram"]["test_seconds"] > 0
    other = without_times(report_of(model, seed=1, **options))
    assert other["contenders"]["bigram"]["quality"] != report.contenders["bigram"]["quality"]


def test_a_saved_report_is_read_again(report, tmp_path):
    folder = report.save(tmp_path / "report")
    text = (folder / "report.json").read_text()
    loaded = EvaluationReport.from_json(text)
    assert loaded.to_json() == text == report.to_json()
    assert loaded.table() == report.table()
    assert {"python", "torch", "transformers", "hf-variational"} <= set(loaded.versions)
    assert loaded.configuration["settings"]["window_lengths"] == [4, 8]
    with pytest.raises(ValueError, match="format 1"):
        EvaluationReport.from_json('{"format": 99}')


def test_the_table_has_every_contender_and_every_note(report):
    lines = report.table().splitlines()
    assert all(name in lines[0] for name in report.contenders)
    nll = next(line for line in lines if line.startswith("NLL, nats"))
    assert nll.split()[4:] == [f"{report.value(name, 'quality', 'nll'):.4g}" for name in report.contenders]
    assert all(note in lines for note in report.notes)
    assert any(note.startswith("One seed (0)") for note in report.notes)


def test_the_metadata_are_what_a_card_takes(report, tmp_path):
    index = yaml.safe_load(report.model_index())["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "bigram" and {one.metric_type for one in results} >= {"perplexity", "accuracy", "roc_auc"}
    perplexity = next(one for one in results if one.metric_type == "perplexity")
    assert perplexity.metric_value == pytest.approx(report.value("bigram", "quality", "perplexity"), rel=1e-5)
    assert "4 posterior samples" in perplexity.metric_name
    card = ModelCardData(model_name="bigram", eval_results=eval_results(report))
    path = tmp_path / "README.md"
    ModelCard(f"---\n{card.to_yaml()}\n---\ntext").save(path)
    assert ModelCard.load(path).data.eval_results[0].metric_value == results[0].metric_value
    with pytest.raises(ValueError, match="has no 'nothing'"):
        report.model_index("nothing")


# ---- Deterministic models, and without validation data ----


def test_a_deterministic_model_has_the_deterministic_measures_and_a_line(validation):
    report = report_of(Bigram(variational=False), validation=validation)
    assert set(report.contenders["bigram"]["measures"]) == {"predictive_entropy"}
    assert report.contenders["bigram"]["num_posterior_samples"] == 0
    (line,) = [note for note in report.notes if "deterministic" in note]
    assert "mutual information" in line and "posteriors" in line
    assert report.value("bigram", "error_detection", "predictive_entropy", "auroc") > 0.5


def test_the_front_of_the_data_is_for_validation_between_documents(model):
    report = report_of(model)
    assert report.configuration["data"]["sequences"] == 48 and report.configuration["validation"]["sequences"] == 12
    assert "12 of 60" in report.notes[0]
    rows = [{"input_ids": row, "document": int(index >= 10)} for index, row in enumerate(sampled_rows(model))]
    held, rest, repeated = front(rows, 0.2)
    assert [len(held), len(rest), repeated] == [10, 50, 0]
    held, rest, repeated = front([*rows[:3], *rows[:1], *rows[3:]], 0.05)
    assert len(held) == 2 and repeated == 1 and rest[0] == rows[0]


def test_without_validation_data_nothing_is_fitted(model):
    settings = EvaluationSettings(validation_fraction=0, num_resamples=5)
    report = report_of(model, settings=settings, baselines={})
    assert report.configuration["data"]["sequences"] == 60
    assert "combination" not in report.contenders["bigram"]["error_detection"]
    assert list(report.contenders) == ["bigram", "mean pass"] and not report.contenders["bigram"]["policies"]
    assert any("no validation data" in note for note in report.notes)


def test_a_dataset_is_read_as_a_list_is(model, report, validation):
    import datasets

    data = datasets.Dataset.from_list(rows_of(model))
    options = {"ood": {"other": other_rows()}, "baselines": {}}
    again = report_of(model, data, validation=validation, **options)
    assert again.contenders["bigram"]["quality"] == report.contenders["bigram"]["quality"]
    assert described(data, "dataset") == described(rows_of(model), "dataset")


# ---- Sequences of text ----


@pytest.fixture(scope="module")
def tokenizer():
    from shift_models import tokenizer_of_letters

    return tokenizer_of_letters(front=True)


def test_text_rows_predict_every_token_and_count_its_bytes(tokenizer):
    rows = text_rows(["a b c d e f g", "h i j"], tokenizer, 4)
    assert [row["document"] for row in rows] == [0, 0, 0, 1]
    bos = tokenizer.bos_token_id
    assert all(row["input_ids"][0] == bos and row["labels"][0] == -100 for row in rows)
    assert [len(row["labels"]) for row in rows] == [4, 4, 2, 4]
    # every character belongs to a token
    assert sum(row["num_bytes"] for row in rows) == len("a b c d e f g") + len("h i j")
    assert len(text_rows(["a b c d e f g"], tokenizer, 4, limit=2)) == 2
    assert [row["document"] for row in text_rows(["a b c", "d e f"], tokenizer, 4, documents=[5, 5])] == [5, 5]


def test_without_a_front_token_the_first_one_has_no_bytes():
    from shift_models import tokenizer_of_letters

    (row,) = text_rows(["aé b c"], tokenizer_of_letters(), 3)
    assert row["num_bytes"] == len("b c") and row["labels"] == row["input_ids"]


def test_text_that_is_shorter_than_a_window(tokenizer):
    with pytest.raises(ValueError, match="shorter than a window.* 3 tokens, and a window takes 9"):
        text_rows(["a b c"], tokenizer, 10)
    assert len(text_rows(["a b c"], tokenizer, 10, shortest=2)) == 1
    with pytest.raises(ValueError, match="length"):
        text_rows(["a b c"], tokenizer, 1)


# ---- Bad input ----


def test_overlapping_validation_data_is_refused_with_the_number(model):
    rows = sampled_rows(model)
    with pytest.raises(ValueError, match="have 2 windows in common, of 5 and 60"):
        report_of(model, rows, validation=[*rows[3:5], *sampled_rows(model, seed=7, count=3)])
    padded = {"input_ids": [*rows[3], 0, 0], "attention_mask": [1] * 12 + [0, 0]}
    with pytest.raises(ValueError, match="have 1 window in common"):
        report_of(model, rows, validation=[padded])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": []}, "`dataset` is empty"),
        ({"validation": []}, "`validation` is empty"),
        ({"ood": {"law": []}}, "`law` is empty"),
        ({"ood": {"law": [[1, 2, 3]]}}, "law has no window of 4 or 8 tokens"),
        ({"data": iter([[1, 2]])}, "give a list or a dataset"),
        ({"data": [[1, 2, 3]]}, "one sequence"),
        ({"data": [[1, 2, 3]] * 9}, "comes again in the rest"),
        ({"baselines": {"mean pass": Bigram()}}, "Two contenders are called 'mean pass'"),
    ],
)
def test_data_that_cannot_be_used(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        report_of(model, **arguments)


def test_nan_logits_name_contender_batch_and_row(model, validation):
    broken = Bigram()
    with torch.no_grad():
        broken.table[3] = math.nan
    rows = [[1, 2]] * 10 + [[3, 2]]
    with pytest.raises(ValueError, match="broken: The logits of batch 1, row 2"):
        report_of(model, rows, validation=[[2, 2]] * 3, baselines={"broken": Contender(broken)})


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("validation_fraction", 1.0), ("window_lengths", (0,)), ("target_risk", 0.0), ("delta", 2.0)],
)
def test_settings_that_cannot_be(name, value):
    with pytest.raises(ValueError, match=name):
        EvaluationSettings(**{name: value})


def test_windows_that_are_left_out_are_named(model, validation):
    settings = EvaluationSettings(window_lengths=(1, 4, 32), num_resamples=5, max_windows=10)
    report = report_of(model, validation=validation, ood={"other": other_rows()}, settings=settings)
    assert list(report.contenders["bigram"]["out_of_domain"]["other"]) == ["4"]
    assert any("Windows of 1 token are" in note for note in report.notes)
    assert any("Windows of 32 tokens are" in note for note in report.notes)
    with_front = EvaluationSettings(window_lengths=(1,), num_resamples=5, max_windows=10, prefix=(0,))
    report = report_of(model, validation=validation, ood={"other": other_rows()}, settings=with_front)
    assert report.configuration["windows"] == {"1": 10}


def test_long_windows_are_fewer(model, validation, monkeypatch):
    monkeypatch.setattr("hf_variational.evaluation.report.data._WINDOW_TOKENS", 120)
    report = report_of(model, validation=validation, ood={"other": other_rows()})
    assert report.configuration["windows"] == {"4": 30, "8": 15}
    assert report.configuration["out_of_domain"] == {"other": {"4": 30, "8": 15}}
