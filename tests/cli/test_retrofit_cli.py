"""`hf-variational retrofit`: what it says, its flags, what it refuses, and what it keeps where it fails."""

import json
import re
from pathlib import Path

import pytest
import torch
from retrofit_runs import (
    LENGTH,
    QUICK,
    SAMPLES,
    SEQUENCES,
    assert_mean_pass_is_the_base,
    changed,
    ids_of,
    printed_row,
    retrofitted,
    run,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_variational.presentation.measures import format_value
from hf_variational.retrofit_program import program
from hf_variational.retrofit_program.options import layers_from, named_source, shipped_recipe, source_from
from hf_variational.training.recipe import load_recipe


def refused(*arguments, code=1):
    """The line on stderr."""
    result = run(*arguments)
    assert result.exit_code == code and result.stdout == "", result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---- What is said ----


def test_the_table_shows_the_numbers_of_the_file(scaled):
    kinds = [scaled.results[model][kind] for model in ("base", "retrofit") for kind in ("plain", "tempered")]
    for label, name in (
        ("NLL (nats a token)", "nll"),
        ("ECE (15 bins)", "expected_calibration_error"),
        ("accuracy", "accuracy"),
        ("AUROC, wrong tokens", "wrong_token_auroc"),
        ("mutual information", "mutual_information"),
    ):
        assert printed_row(scaled.printed, label) == [format_value(metrics.get(name)) for metrics in kinds]
    others = scaled.results["base"]["tempered_others"]["code"], scaled.results["retrofit"]["others"]["code"]
    shown = ("predictive_entropy", "expected_entropy", "mutual_information", "conditional_variance")
    expected = [others[0]["predictive_entropy"], *(others[1][name] for name in shown)]
    assert printed_row(scaled.printed.partition("Other texts")[2], "code") == list(map(format_value, expected))
    change = 100 * (kinds[2]["nll"] / kinds[0]["nll"] - 1)
    said = f"the retrofit's NLL is {format_value(abs(change))} % {'below' if change < 0 else 'above'} the base's"
    assert said in " ".join(scaled.printed.split())
    assert f"hf-variational generate {scaled.folder} --prompt" in scaled.printed


def test_samples_that_agree_are_said_to(place):
    options = ("retrofit.calibration.scale=1e-5", "retrofit.calibration.fit_scale=false", "--layers", "last")
    run_ = retrofitted(place, "quiet", *options)
    assert "hardly disagree" in run_.printed and "--tolerance 0.01" in run_.printed
    assert run_.results["fitted"] is None and "- Fitted: each unit's noise is 1.0e-05 of" in run_.card


def test_the_card_says_what_was_done(scaled, trained, place):
    for run_, sentence in ((scaled, "nothing was trained"), (trained, "the posteriors were trained")):
        assert "A retrofit of `base`. Every pretrained weight is as it was" in run_.card
        assert sentence in run_.card and "- Started from: base (a local folder)" in run_.card
        assert str(place) not in run_.card  # no folder of this machine
        assert f"{SEQUENCES} sequences of up to {LENGTH} tokens of text.txt to calibrate on" in run_.card
        for kind, metrics in (("base", "plain"), ("retrofit", "plain")):
            assert f"| {run_.results[kind][metrics]['nll']:.4g} |" in run_.card
        assert f"{SAMPLES} posterior samples (from the generation config)" in run_.card
    assert "- Trained: nothing" in scaled.card and "Hardware" not in scaled.card
    assert re.search(r"- Trained: [\d,]+ parameters in 3 steps, \d+ s, on [\d,]+ sequences", trained.card)
    assert re.search(r"- Hardware: cpu, \d+ threads?\n", trained.card)
    assert "predicted tokens of a window 7" in scaled.card  # this tokenizer begins a text with nothing
    assert "### Other texts" in scaled.card and "### Other texts" not in trained.card


def test_the_examples_of_the_card_run(scaled, monkeypatch):
    monkeypatch.chdir(scaled.folder.parent)
    found = {}
    for block in re.findall(r"```python\n(.*?)```", scaled.card, re.DOTALL):
        exec(block, found)
    assert type(found["model"]).__name__ == "VariationalLlamaForCausalLM"
    assert found["out"].uncertainty.mutual_information.shape[0] == 1
    (stock,) = re.findall(r"`(\w+)\.from_pretrained\(", scaled.card)
    assert stock == "LlamaForCausalLM"


# ---- Flags and recipes ----


def test_help_names_the_defaults_of_the_recipes():
    shown = " ".join(run("retrofit", "--help").stdout.split())
    for name in ("retrofit_scale", "retrofit_posterior"):
        recipe = load_recipe(shipped_recipe(name))
        for text in (
            f"Posterior samples. [default: {recipe.arguments['eval_posterior_samples']}]",
            f"Sequences to calibrate on, at most. [default: {recipe.retrofit.calibration.sequences}]",
            f"Tokens of a sequence. [default: {recipe.data.block_size}]",
            f"Seed of the noise and of the training. [default: {recipe.arguments['seed']}]",
        ):
            assert text in shown
    assert load_recipe(shipped_recipe("retrofit_scale")).retrofit.train == "none"
    assert load_recipe(shipped_recipe("retrofit_posterior")).retrofit.train == "posterior"


def test_flags_stand_before_the_recipe_and_settings_before_flags(place):
    recipe = place / "own.yaml"
    text = shipped_recipe("retrofit_scale").read_text().replace("scale: 0.1", "scale: 0.2")
    recipe.write_text(text.replace("layers: all", "layers: [0]"))
    options = ("--recipe", recipe, "--layers", "last", "retrofit.calibration.sequences=5", "--overwrite")
    run_ = retrofitted(place, "own", *options)
    used = run_.results["recipe"]["retrofit"]
    assert used["layers"] == "last" and used["calibration"]["scale"] == 0.2
    assert run_.results["texts"]["calibration"] == used["calibration"]["sequences"] == 5
    assert json.loads((run_.folder / "config.json").read_text())["variational"]["eve_layers"] == [1]
    assert used["model"] == str(place / "base")


def test_arguments_are_read():
    assert layers_from("0,2") == [0, 2] and layers_from("3") == [3] and layers_from(r"model\.layers\.[01]") != [0, 1]
    assert layers_from("last_quarter") == "last_quarter"
    assert source_from("a.txt") == "a.txt"
    assert source_from("{dataset: name, split: test}") == {"dataset": "name", "split": "test"}
    assert named_source("code=a=b.py") == ("code", "a=b.py")
    for text in ("code", "=a", "code="):
        with pytest.raises(ValueError, match="NAME=FILE"):
            named_source(text)
    with pytest.raises(ValueError, match="is no mapping"):
        source_from("{dataset")


# ---- What is refused, and what is kept ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "missing.txt"), ("There is no file 'missing.txt'",)),
        (("--data", "empty.txt"), ("empty.txt is empty",)),
        (("--data", "short.txt"), ("short.txt is too short", "do not fill one sequence of 16")),
        (("--test", "short.txt"), ("short.txt is too short", "to measure on")),
        (("--layers", "decoder.*"), ("'decoder.*' matches no layer", "model.layers.0")),
        (("--layers", "0,9"), ("9", "[0, 1]")),
        (("--length", "100"), ("100 tokens", "max_position_embeddings=64")),
        (("--ood", "code=missing.txt"), ("There is no file 'missing.txt'",)),
        (("--other", "code=short.txt"), ("code:", "length=8")),
        (("--other", "short.txt"), ("NAME=FILE",)),
        (("--adapter", "--train", "all"), ("adapter", "posterior or none")),
        (("retrofit.kl_wieght=1",), ("did you mean 'kl_weight'",)),
        (("arguments.eval_posterior_samples=0",), ("eval_posterior_samples to 1 or more",)),
        (("retrofit.train=some",), ("none, posterior, ffn, all", "'some'")),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(place, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(place)
    data = () if "--data" in options else ("--data", "text.txt")
    line = refused("retrofit", "base", "--output", tmp_path / "new", *data, *QUICK, *options)
    assert all(word in line for word in words), line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--samples", 0, "1 or more"),
        ("--max-sequences", 0, "1 or more"),
        ("--test-sequences", 0, "1 or more"),
        ("--batch-size", 0, "1 or more"),
        ("--length", 1, "2 or more"),
        ("--tolerance", -0.1, "0 or more"),
        ("--tolerance", "nan", "0 or more"),
        ("--recipe", "missing.yaml", "is no file"),
    ],
)
def test_wrong_values(place, tmp_path, option, value, word):
    options = ("--data", place / "text.txt", "--output", tmp_path / "new", option, value)
    line = refused("retrofit", place / "base", *options, code=2)
    assert option in line and word in line and not (tmp_path / "new").exists()


def test_models_that_are_no_causal_language_models(place, tmp_path, tokenizer, scaled, eve_checkpoint):
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(hidden_size=16, **sizes)).save_pretrained(tmp_path / "bert")
    t5 = T5Config(vocab_size=len(tokenizer), d_model=16, num_layers=1, num_heads=2, d_ff=24, d_kv=8)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    for name in ("bert", "t5"):
        tokenizer.save_pretrained(tmp_path / name)
    for model, words in (
        (tmp_path / "bert", "is an encoder, and no causal language model"),
        (tmp_path / "t5", "is no causal language model: AutoModelForCausalLM has no class for it"),
        (scaled.folder, "is variational already: start from the pretrained model"),
        (eve_checkpoint, "is variational already"),
        (place, "has no config.json"),
    ):
        line = refused("retrofit", model, "--data", place / "text.txt", "--output", tmp_path / "new", *QUICK)
        assert words in line and not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_left_alone(place, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"an old shard")
    for output, word in ((folder, "--overwrite"), (place / "text.txt", "is a file")):
        options = ("--data", place / "text.txt", "--output", output, *QUICK)
        assert word in refused("retrofit", place / "base", *options)
    options = ("--data", place / "text.txt", "--output", place / "base", "--overwrite", *QUICK)
    assert "base model's own folder" in refused("retrofit", place / "base", *options)
    assert {path.name for path in folder.iterdir()} == {"thesis.tex", "model-00001-of-00002.safetensors"}
    options = ("--data", place / "text.txt", "--output", folder, "--overwrite", *QUICK)
    assert run("retrofit", place / "base", *options).exit_code == 0
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert changed(folder, place / "base") == set()


def test_an_interruption_keeps_what_was_measured(place, tmp_path, monkeypatch, scaled):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "calibrate", interrupted)
    folder = tmp_path / "new"
    result = run("retrofit", place / "base", "--data", place / "text.txt", "--output", folder, *QUICK)
    assert result.exit_code == 130 and result.stderr == f"error: interrupted; {folder} has what was computed\n"
    kept = json.loads((folder / "results.json").read_text())
    assert kept["base"]["plain"] == scaled.results["base"]["plain"] and "retrofit" not in kept
    monkeypatch.setattr(program, "read_texts", interrupted)
    result = run("retrofit", place / "base", "--data", place / "text.txt", "--output", tmp_path / "none", *QUICK)
    assert result.exit_code == 130 and result.stderr == "error: interrupted\n"


def test_what_was_trained_is_saved_before_it_is_measured(place, tmp_path, monkeypatch, texts):
    inner, calls = program.measure, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            raise ValueError("out of luck")
        return inner(*args, **kwargs)

    monkeypatch.setattr(program, "measure", failing)
    folder = tmp_path / "new"
    options = ("--data", place / "text.txt", "--output", folder, *QUICK, "--train", "posterior")
    result = run("retrofit", place / "base", *options, "arguments.max_steps=1")
    assert result.exit_code == 1 and result.stderr.endswith("error: out of luck\n")
    assert json.loads((folder / "results.json").read_text())["training"]["steps"] == 1
    card = (folder / "README.md").read_text()
    assert "Not measured." in card and "parameters in 1 step," in card
    assert_mean_pass_is_the_base(folder, place / "base", ids_of(texts))


def test_progress_is_shown_by_one_bar_that_has_the_loss(place, tmp_path, tokenizer, capfd):
    recipe = load_recipe(
        shipped_recipe("retrofit_posterior"),
        ["arguments.max_steps=2", "arguments.logging_steps=1", "arguments.eval_posterior_samples=2"],
        {
            "retrofit.model": str(place / "base"),
            "data.train": str(place / "text.txt"),
            "data.block_size": LENGTH,
            "arguments.output_dir": str(tmp_path / "new"),
        },
    )
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    program.run(model, tokenizer, recipe, test_sequences=4, progress=True)
    printed = capfd.readouterr()
    assert re.search(r"2/2 .*nll=[\d.]+", printed.err) and "train_runtime" not in printed.out + printed.err
    for description in ("Fitting the temperature", "Scoring", "calibrating", "fitting scales"):
        assert description in printed.err


def test_the_tokenizer_comes_along(scaled, tokenizer):
    text = Path(scaled.folder.parent / "text.txt").read_text()[:200]
    assert AutoTokenizer.from_pretrained(scaled.folder)(text)["input_ids"] == tokenizer(text)["input_ids"]
