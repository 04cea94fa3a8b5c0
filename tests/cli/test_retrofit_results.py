"""`hf-variational retrofit`: what it computes and writes, each number against the functions called by hand."""

import json
import re
import subprocess
import sys

import pytest
import torch
from retrofit_runs import (
    BATCH,
    LENGTH,
    QUICK,
    SAMPLES,
    SEQUENCES,
    STEP,
    TESTED,
    assert_mean_pass_is_the_base,
    changed,
    ids_of,
    loaded,
    printed_row,
    retrofitted,
    run,
    save_llama,
    tensors,
)
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM

from hf_variational import EVEConfig, calibrate_prior, evaluate_language_model, fit_scale, variationalize
from hf_variational.evaluation.domains import token_scores
from hf_variational.evaluation.temperature import fit_temperature
from hf_variational.presentation.measures import format_value
from hf_variational.retrofit_program.texts import read_texts
from hf_variational.training.naming import is_variational
from hf_variational.training.recipe import DataRecipe

# ---- The numbers ----


def test_the_base_is_measured_as_it_is_and_at_its_temperature(scaled, base, texts):
    found = scaled.results["base"]
    options = {"batch_size": BATCH, "seed": 0, "progress": False}
    fitted = fit_temperature(base, texts.calibration, 0, **options)
    assert found["temperature"]["temperature"] == pytest.approx(fitted.temperature, rel=1e-4)
    plain = evaluate_language_model(base, texts.test, 0, **options)["mean_pass"]
    assert found["plain"] == pytest.approx({**plain, **_own(found["plain"])}, rel=1e-5)
    tempered = token_scores(base, texts.test, 0, temperature=fitted.temperature, **options)
    assert found["tempered"]["nll"] == pytest.approx(tempered.evaluation().compute()["nll"], rel=1e-5)
    # by hand, and the temperature is that of the calibration data
    logits, ids = base(ids_of(texts)).logits[:, :-1].detach(), ids_of(texts)[:, 1:]
    labels = torch.tensor([row["labels"] for row in texts.test])[:, 1:] != -100
    for kind, temperature in (("plain", 1.0), ("tempered", found["temperature"]["temperature"])):
        log_p = (logits / temperature).log_softmax(-1)
        nll = -log_p.gather(-1, ids[..., None]).squeeze(-1)[labels]
        assert found[kind]["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
        entropy = -(log_p.exp() * log_p).sum(-1)[labels]
        wrong = (log_p.argmax(-1) != ids)[labels]
        assert found[kind]["wrong_token_auroc"] == pytest.approx(roc_auc_score(wrong, entropy), abs=1e-6)


def test_what_is_saved_is_what_was_measured(scaled, texts):
    model, found = loaded(scaled.folder), scaled.results["retrofit"]
    options = {"batch_size": BATCH, "seed": 0, "progress": False}
    plain = evaluate_language_model(model, texts.test, SAMPLES, **options)["samples"]
    assert plain["mutual_information"] > 1e-4
    assert found["plain"] == pytest.approx({**plain, **_own(found["plain"])}, rel=1e-5)
    fitted = fit_temperature(model, texts.calibration, SAMPLES, **options)
    assert found["temperature"]["temperature"] == pytest.approx(fitted.temperature, rel=1e-4)
    tempered = token_scores(model, texts.test, SAMPLES, temperature=fitted.temperature, **options)
    assert found["tempered"]["nll"] == pytest.approx(tempered.evaluation().compute()["nll"], rel=1e-5)
    assert scaled.results["num_posterior_samples"] == SAMPLES == model.generation_config.num_posterior_samples


def _own(metrics):
    return {name: metrics[name] for name in ("wrong_token_auroc", "kl") if name in metrics}


def test_other_texts_are_told_apart_as_often_as_scikit_learn_says(scaled, base, texts):
    model = loaded(scaled.folder)
    size = max(1, BATCH * LENGTH // len(texts.windows[0]))
    options = {"batch_size": size, "seed": 0, "progress": False}
    for network, samples, found in (
        (base, 0, scaled.results["base"]["others"]),
        (model, SAMPLES, scaled.results["retrofit"]["others"]),
    ):
        own, other = (
            token_scores(network, rows, samples, **options).window_means()
            for rows in (texts.windows, texts.others["code"])
        )
        assert set(found["code"]) == set(own) >= {"predictive_entropy", "nll"}
        for name in own:
            truth = [0] * len(own[name]) + [1] * len(other[name])
            expected = roc_auc_score(truth, torch.cat([own[name], other[name]]))
            assert found["code"][name] == pytest.approx(expected, abs=1e-4)
    assert "mutual_information" in scaled.results["retrofit"]["others"]["code"]


def test_scales_are_those_of_calibrate_prior_and_fit_scale(scaled, place, texts):
    model = variationalize(
        AutoModelForCausalLM.from_pretrained(place / "base"), eve=EVEConfig(scale="unit", prior="centered")
    )
    reading = {"max_sequences": SEQUENCES, "max_length": LENGTH, "batch_size": BATCH, "progress": False}
    calibrate_prior(model, texts.calibration, scale=0.1, **reading)
    found = fit_scale(model, texts.calibration, num_posterior_samples=SAMPLES, seed=0, **reading)
    by_hand = {name: value for name, value in model.state_dict().items() if is_variational(name)}
    saved = tensors(scaled.folder)
    assert by_hand
    for name, value in by_hand.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
    fitted = scaled.results["fitted"]
    assert fitted["base_nll"] == pytest.approx(found.base_nll) and fitted["nll"] == pytest.approx(found.nll)
    expected = {f"layer {layer} {site}": factor for (layer, site), factor in found.multipliers.items()}
    assert fitted["multipliers"] == pytest.approx(expected)


def test_no_sequence_is_in_two_parts(texts, place, tokenizer):
    test = {tuple(row["input_ids"]) for row in texts.test}
    assert test.isdisjoint(tuple(row["input_ids"]) for row in texts.calibration)
    # all of the held-out text is in the other too
    data = DataRecipe(str(place / "text.txt"), validation=str(place / "text.txt"), block_size=LENGTH)
    found = read_texts(data, tokenizer, calibration=SEQUENCES, test=TESTED, trains=True)
    assert found.overlapping >= TESTED and found.training
    test = {tuple(row["input_ids"]) for row in found.test}
    assert test.isdisjoint(tuple(row["input_ids"]) for row in (*found.calibration, *found.training))
    with pytest.raises(ValueError, match="is in text.txt too: nothing is left"):
        read_texts(data, tokenizer, calibration=SEQUENCES, test=10**6, trains=True)


# ---- What is written ----


def test_nothing_that_was_pretrained_changes(scaled, trained, place, texts):
    for run_ in (scaled, trained):
        assert_mean_pass_is_the_base(run_.folder, place / "base", ids_of(texts))
    assert scaled.results["mean_pass"] is trained.results["mean_pass"] is None


def test_the_folder_holds_a_checkpoint_and_no_leavings(scaled, trained):
    for run_ in (scaled, trained):
        names = {path.name for path in run_.folder.iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
        assert names >= {"README.md", "results.json"} and not any(name.endswith(".part") for name in names)
        assert "training" not in names
        assert json.loads((run_.folder / "config.json").read_text())["model_type"] == "variational_llama"


def test_a_fresh_process_loads_it_and_draws_samples_untold(scaled):
    program_text = (
        "import sys, hf_variational\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "inputs = AutoTokenizer.from_pretrained(sys.argv[1])('The with', return_tensors='pt')\n"
        "out = model.generate(input_ids=inputs['input_ids'], max_new_tokens=2, do_sample=False,\n"
        "                     return_dict_in_generate=True, output_uncertainty=True)\n"
        "print(type(model).__name__, out.uncertainty.mutual_information.max().item())\n"
    )
    command = [sys.executable, "-c", program_text, str(scaled.folder)]
    name, information = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert name == "VariationalLlamaForCausalLM" and float(information) > 0


def test_the_posterior_alone_is_trained(trained):
    facts = trained.results["training"]
    saved = tensors(trained.folder)
    posterior = {name: value for name, value in saved.items() if is_variational(name)}
    assert all(".layers.1." in name for name in posterior)
    parameters = {name: value for name, value in loaded(trained.folder).named_parameters() if is_variational(name)}
    assert facts["steps"] == 3 and facts["parameters"] == sum(value.numel() for value in parameters.values())
    assert [entry["step"] for entry in facts["log"]] == [1, 2, 3]
    # the input's part of the scale started at 0
    assert parameters["model.layers.1.mlp.eve.scale_up"].abs().min() > 0
    assert trained.results["texts"]["training"] > 0


def test_networks_are_trained_where_it_is_asked(place, base, texts):
    run_ = retrofitted(place, "ffn", "--train", "ffn", "--layers", "1", *STEP)
    names = changed(run_.folder, place / "base")
    assert names == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert run_.results["mean_pass"]["nll"] != run_.results["base"]["plain"]["nll"]
    found = evaluate_language_model(loaded(run_.folder), texts.test, 0, BATCH, progress=False)["mean_pass"]
    assert run_.results["mean_pass"]["nll"] == pytest.approx(found["nll"], rel=1e-5)
    assert printed_row(run_.printed, "NLL (nats a token)")[-1] == format_value(found["nll"])
    assert "| mean pass |" in run_.card and "feed-forward networks of these layers were trained" in run_.card


def test_attention_alone(place, texts):
    run_ = retrofitted(place, "attention", "--attention", "dirichlet", "--layers", "last", "retrofit.eve=null")
    assert list(run_.results["fitted"]["multipliers"]) == ["layer 1 attention"]
    factor = format_value(run_.results["fitted"]["multipliers"]["layer 1 attention"])
    said = f"the noise of the attention weights is what it started with, times {factor}"
    assert said in " ".join(run_.printed.split()) and said in run_.card and "each unit's noise" not in run_.card
    assert_mean_pass_is_the_base(run_.folder, place / "base", ids_of(texts))


def test_units_and_attention_have_multipliers_of_their_own(place):
    run_ = retrofitted(place, "both", "--attention", "gaussian", "--layers", "0,1")
    factors = run_.results["fitted"]["multipliers"]
    assert set(factors) == {f"layer {layer} {site}" for layer in (0, 1) for site in ("ffn", "attention")}
    said = re.search(
        r"- Fitted: each unit's noise is 0.100 of .*?, times (.*?); the noise .*?, times (.*)\n", run_.card
    )
    for text, site in zip(said.groups(), ("ffn", "attention"), strict=True):
        ends = {format_value(factors[f"layer {layer} {site}"]) for layer in (0, 1)}
        assert set(re.findall(r"[\d.]+", text)) == ends


def test_a_tolerance_raises_the_noise(place, scaled):
    run_ = retrofitted(place, "tolerant", "--tolerance", "0.05")
    fitted, least = run_.results["fitted"], scaled.results["fitted"]
    assert least["nll"] < fitted["nll"] <= 1.05 * fitted["base_nll"] * (1 + 1e-6)
    assert min(fitted["multipliers"].values()) > min(least["multipliers"].values())
    assert "as much as costs 5 % of the base's NLL" in run_.card


def test_an_adapter_leaves_the_base_where_it_is(place, base, texts):
    run_ = retrofitted(place, "adapter", "--adapter", "--train", "posterior", *STEP)
    assert not (run_.folder / "model.safetensors").exists() and (run_.folder / "adapter_config.json").is_file()
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(run_.folder).eval()
    with torch.no_grad():
        assert torch.equal(model(ids_of(texts)).logits, base(ids_of(texts)).logits)
    found = evaluate_language_model(model, texts.test, SAMPLES, BATCH, progress=False, seed=0)["samples"]
    assert run_.results["retrofit"]["plain"]["nll"] == pytest.approx(found["nll"], rel=1e-5)
    assert f"base, T {run_.results['base']['temperature']['temperature']:.2f}" in run_.card
    assert "registers the method" in run_.card
    told = run("generate", run_.folder, "--prompt", "The with", "--max-new-tokens", 2, "--samples", 2, "--json")
    assert all(token["mutual_information"] >= 0 for token in json.loads(told.stdout)["tokens"])


def test_half_precision_weights_stay_what_their_files_hold(place, tokenizer):
    save_llama(place / "half", tokenizer, torch.bfloat16)
    options = ("--data", place / "text.txt", "--output", place / "half-retrofit", *QUICK, "retrofit.dtype=auto")
    assert run("retrofit", place / "half", *options).exit_code == 0
    assert changed(place / "half-retrofit", place / "half") == set()
    saved = tensors(place / "half-retrofit")
    assert {value.dtype for name, value in saved.items() if is_variational(name)} == {torch.float32}
    assert {value.dtype for name, value in saved.items() if not is_variational(name)} == {torch.bfloat16}


def test_the_seed_decides_everything(place, scaled):
    again = retrofitted(place, "again", "--other", f"code={place / 'other.txt'}")
    other = retrofitted(place, "other-seed", "--seed", 1)
    for name in ("base", "retrofit"):
        assert again.results[name] == scaled.results[name]
    assert other.results["retrofit"]["plain"] != scaled.results["retrofit"]["plain"]
    # the held-out text does not depend on it
    assert other.results["base"]["plain"] == scaled.results["base"]["plain"]
