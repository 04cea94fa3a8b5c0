"""The demo on a very small model: its texts, its folder, and that everything it promises is there."""

import io
import json
import re

import pytest
import torch
from rich.console import Console

import hf_variational  # noqa: F401
from hf_variational.demo.matched_training import matched_models
from hf_variational.demo.output import MARKER, check_output, check_reload, prepare_output
from hf_variational.demo.program import run
from hf_variational.demo.settings import QUICK, DemoSettings
from hf_variational.demo.texts import demo_texts, language_reference, prompt_from, python_source, split_text
from hf_variational.training.data import train_tokenizer

# ---- texts ----


def test_the_language_reference_repeats_no_paragraph():
    text = language_reference()
    assert len(text) > 250_000
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", text)]
    long = [p for p in paragraphs if len(p) >= 60]
    assert len(long) == len(set(long))


def test_nothing_held_out_stands_in_the_training_text():
    texts = demo_texts()
    assert 0.07 < len(texts.held_out) / len(texts.training) < 0.15
    training = " ".join(texts.training.split())
    for paragraph in re.split(r"\n\s*\n", texts.held_out):
        words = " ".join(paragraph.split())
        assert len(words) < 60 or words not in training
    assert len(texts.other) == len(texts.held_out) and "import" in texts.other


@pytest.mark.parametrize("separator", ["\n\n", "\n", " "])
def test_any_text_is_split_without_loss(separator):
    text = separator.join(f"sentence number {i} of a text" for i in range(1500))
    training, held_out = split_text(text)
    whole = re.sub(r"\s", "", text)
    assert len(re.sub(r"\s", "", training + held_out)) == len(whole)
    assert 0.05 < len(held_out) / len(text) < 0.2


def test_a_text_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(f"Paragraph {i} says something of its own, at length." for i in range(600)))
    texts = demo_texts(path)
    assert texts.name == "mine.txt" and "Paragraph 1 " in texts.training
    path.write_text("too short")
    with pytest.raises(ValueError, match=r"mine.txt has \d+ characters.*10,000"):
        demo_texts(path)
    path.write_bytes(b"\x00\x01binary")
    with pytest.raises(ValueError, match="mine.txt"):
        demo_texts(path)


def test_prompts_are_short_and_from_the_text():
    text = python_source(20_000)
    tokenizer = train_tokenizer([text], 400)
    prompt = prompt_from(text, tokenizer, ("def ", "class ", "    def "))
    assert prompt in text and prompt.lstrip().startswith(("def ", "class "))
    assert len(tokenizer(prompt)["input_ids"]) <= 30


# ---- the folder ----


def test_only_what_a_demo_wrote_is_replaced(tmp_path):
    mine = tmp_path / "results"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no demo wrote it"):
        prepare_output(mine)
    with pytest.raises(ValueError, match=r"is a file.*--output"):
        check_output(mine / "thesis.txt")
    fresh = tmp_path / "demo_output"
    prepare_output(fresh)
    (fresh / "eve").mkdir()
    (fresh / "eve" / "old").write_text("")
    (fresh / "notes.txt").write_text("mine")
    prepare_output(fresh)
    assert sorted(p.name for p in fresh.iterdir()) == [MARKER, "notes.txt"]


# ---- the models ----


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([python_source(20_000)], QUICK.vocab_size)


def test_the_models_differ_in_eve_only(tokenizer):
    models = matched_models(QUICK, tokenizer, seed=3)
    twin, eve = (models[name].state_dict() for name in ("deterministic", "eve"))
    assert not [name for name in twin if ".eve." in name]
    assert {name for name in eve if name not in twin} == {name for name in eve if ".eve." in name}
    assert all(torch.equal(twin[name], eve[name]) for name in twin)
    ids = torch.arange(12)[None]
    mean_pass = models["eve"].eval()(ids).logits
    assert torch.equal(models["deterministic"].eval()(ids).logits, mean_pass)


def test_eve_adds_at_most_two_percent():
    settings = DemoSettings()
    models = matched_models(settings, train_tokenizer([language_reference()], settings.vocab_size), seed=0)
    twin, eve = (models[name].num_parameters() for name in ("deterministic", "eve"))
    assert twin < eve <= 1.02 * twin


def test_a_reloaded_checkpoint_that_differs_is_noticed(tokenizer, tmp_path, monkeypatch):
    models = matched_models(QUICK, tokenizer, seed=3)
    models["eve"].save_pretrained(tmp_path / "eve")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        models["eve"].model.norm.weight += 1
    name, difference = check_reload(models["eve"], tmp_path / "eve", ids)
    assert name == "VariationalGPTForCausalLM" and difference > 1e-3
    monkeypatch.setattr("hf_variational.demo.output.RELOAD", "raise OSError('cut short')")
    with pytest.raises(RuntimeError, match=r"(?s)does not load.*cut short"):
        check_reload(models["eve"], tmp_path / "eve", ids)


# ---- all of it ----


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "demo_output"
    console = Console(file=io.StringIO(), width=110)
    report = run(output=output, seed=1, quick=True, console=console)
    return output, report, console.file.getvalue()


def test_everything_is_written(demo):
    output, report, _ = demo
    names = {path.name for path in output.iterdir()}
    assert names >= {MARKER, "eve", "deterministic", "generation.html", "training_and_calibration.png", "results.json"}
    for name in ("eve", "deterministic"):
        inside = {path.name for path in (output / name).iterdir()}
        assert inside >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert json.loads((output / "results.json").read_text()) == json.loads(json.dumps(report))
    assert 'class="t' in (output / "generation.html").read_text(encoding="utf-8")
    generation = json.loads((output / "eve" / "generation_config.json").read_text())
    assert generation["num_posterior_samples"] == report["settings"]["posterior_samples"]


def test_both_models_are_compared_on_both_texts(demo):
    _, report, printed = demo
    assert list(report["results"]) == ["in_domain", "another_kind"]
    for models in report["results"].values():
        twin, eve = models["deterministic"], models["eve"]
        assert "samples" not in twin and twin["mean_pass"]["nll"] > 0
        assert eve["samples"]["mutual_information"] > 0 and eve["samples"]["conditional_variance"] > 0
        assert eve["mean_pass"]["num_tokens"] == twin["mean_pass"]["num_tokens"]
    for words in (
        "In domain",
        "Another kind",
        "NLL",
        "perplexity",
        "ECE",
        "mutual information",
        "conditional variance",
    ):
        assert words in printed
    for words in ("parameters", "tokens", "seconds", "held out", "Python source code"):
        assert words in printed


def test_the_curves_and_the_reload_are_reported(demo):
    _, report, printed = demo
    for model in report["training"].values():
        curve = model["curve"]
        assert model["seconds"] > 0 and len(curve["steps"]) == len(curve["nll"]) >= 1
        assert len(curve["eval_steps"]) == len(curve["eval_nll"]) >= 1
    assert report["reload"]["class"] == "VariationalGPTForCausalLM"
    assert report["reload"]["largest_difference_of_logits"] <= 1e-5
    assert "its logits match" in " ".join(printed.split())
