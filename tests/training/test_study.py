"""The study runs from texts to tables at toy size, goes on where it was, and compares what is matched."""

import importlib
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from hf_variational.training.data import train_tokenizer
from hf_variational.training.program import build_model
from hf_variational.training.recipe import load_recipe

TRAINING = Path(__file__).parents[2] / "training"
SMALL = (
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "tokenizer.vocab_size=1024",
    "arguments.max_steps=2",
    "arguments.eval_steps=1",
    "arguments.save_steps=1",
    "arguments.per_device_train_batch_size=2",
)


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(TRAINING))
    try:
        yield importlib.import_module("study")
    finally:
        sys.path.remove(str(TRAINING))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    text = "\n".join(topics[name] for name in sorted(topics))
    for number, name in enumerate(("train", "validation", "test", "other")):
        (folder / f"{name}.txt").write_text(text[40_000 * number : 40_000 * (number + 1)], encoding="utf-8")
    return folder


@pytest.fixture
def options(texts, tmp_path):
    given = [part for name in ("train", "validation", "test") for part in (f"--{name}", str(texts / f"{name}.txt"))]
    given += ["--other", f"code={texts / 'other.txt'}", "--output", str(tmp_path / "study")]
    given += ["--train-characters", "12000", "--held-out-characters", "4000", "--watched-characters", "2000"]
    given += ["--windows", "4", "--samples", "2", "--members", "2", "--seeds", "0", "1"]
    return given + [part for value in SMALL for part in ("--set", value)]


def test_from_texts_to_tables(study, options, tmp_path, capsys, monkeypatch):
    arms = ["--arms", "deterministic", "mc_dropout", "eve_identity_empirical"]
    results = study.main([*options, *arms])
    assert list(results) == ["deterministic", "mc_dropout", "eve_identity_empirical", "ensemble"]
    for name, result in results.items():
        tuned = [trial["validation_nll"] for trial in result["tuning"]]
        assert result["best"] == tuned.index(min(tuned))
        assert [run["seed"] for run in result["runs"]] == [0, 1]
        for run in result["runs"]:
            plain, tempered = run["rows"][""], run["rows"]["temperature"]
            assert plain["temperature"] == 1 != tempered["temperature"]
            assert ("mutual_information" in plain["wrong"]) is (name != "deterministic")
            assert (run["mean_pass"] is None) is (name in ("deterministic", "ensemble"))
            assert (
                run["cost"]["num_posterior_samples"] == run["num_posterior_samples"] == (name != "deterministic") * 2
            )
    assert [run["members"] for run in results["ensemble"]["runs"]] == [[0, 1], [1, 2]]
    tokens = results["deterministic"]["runs"][0]["training_tokens"]
    assert tokens == 2 * 2 * 128 and results["ensemble"]["runs"][0]["training_tokens"] == 2 * tokens
    converged = results["eve_identity_empirical"]["convergence"]["rows"]
    assert list(converged) == ["1", "2", "4", "8", "16", "32"]
    assert converged["1"]["mutual_information"]["mean"] == 0 < converged["32"]["mutual_information"]["mean"]
    assert converged["2"]["nll"]["draws"] == 3 * 16 and converged["32"]["nll"]["bias"] is None
    assert all(results[name].get("convergence") is None for name in ("deterministic", "mc_dropout", "ensemble"))
    printed = capsys.readouterr().out
    table = (tmp_path / "study" / "study.md").read_text()
    assert table in printed and "| dropout, MC dropout |" in table and "not measured" not in table
    assert "### Samples: EVE, identity mean, empirical prior, one seed" in table
    assert json.loads((tmp_path / "study" / "study.json").read_text()) == json.loads(json.dumps(results))

    def train_again(*args):
        raise AssertionError("a run that is there was trained again")

    monkeypatch.setattr(study.Study, "_train", train_again)
    assert json.loads(json.dumps(study.main([*options, *arms]))) == json.loads(json.dumps(results))
    one = study.main([*options, "--arms", "mc_dropout", "--seeds", "0"])
    assert list(one) == ["mc_dropout"] and "(one seed)" in (tmp_path / "study" / "study.md").read_text()


def test_what_it_does_not_take(study, options, texts, tmp_path):
    with pytest.raises(ValueError, match="No arm is named dropuot; there are deterministic, mc_dropout"):
        study.main([*options, "--arms", "dropuot"])
    with pytest.raises(ValueError, match="have .* windows of 128 tokens in common"):
        study.main([*options, "--test", str(texts / "validation.txt")])
    with pytest.raises(ValueError, match="has a study of another test text"):
        study.main(options)
    with pytest.raises(SystemExit):
        study.main([*options, "--other", "law.txt"])


def test_parameters_of_every_trial_are_matched_within_two_percent(study, texts):
    base = study.RECIPES / "base.yaml"
    tokenizer = train_tokenizer([(texts / "train.txt").read_text(encoding="utf-8")], vocab_size=1024)
    counts = {}
    for name, arm in study.load_arms(study.RECIPES / "arms.yaml", None).items():
        assert len(arm["trials"]) in ((1,) if name == "eve_no_kl" else (2, 3)), "about the same budget for every arm"
        for number, trial in enumerate(arm["trials"]):
            values = {key: value for key, value in trial.items() if key != "mc_dropout"}
            counts[name, number] = build_model(load_recipe(base, (), values), tokenizer).num_parameters()
    reference = counts["deterministic", 0]
    assert reference > 700_000
    for key, count in counts.items():
        assert abs(count / reference - 1) < 0.02, (key, count, reference)
