"""What a card says of a stock model that was made variational, of an adapter, and of what was measured on them."""

import re
from dataclasses import replace

import pytest
import torch
import transformers as hf
from huggingface_hub import ModelCard

from hf_variational import EVEConfig, VariationalAttentionConfig, model_card, save_for_hub, variationalize
from hf_variational.evaluation.temperature import FittedTemperature
from hf_variational.hub import write_model_card
from hf_variational.retrofit.scale import FittedScale
from hf_variational.retrofit_program import report
from hf_variational.retrofit_program.measured import Measured
from hf_variational.retrofit_program.texts import RetrofitTexts
from hf_variational.training.recipe import RetrofitRecipe, recipe_from_dict

SIZES = {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = {**SIZES, "intermediate_size": 24}
IDS = torch.tensor([[5, 9, 20, 7]])
STOCK = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**WIDE)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(vocab_size=67, n_embd=16, n_layer=2, n_head=2)),
    "masked": (hf.BertForMaskedLM, hf.BertConfig(**WIDE)),
    "classes": (hf.BertForSequenceClassification, hf.BertConfig(**WIDE, num_labels=3)),
    "tokens": (hf.BertForTokenClassification, hf.BertConfig(**WIDE, num_labels=3)),
    "spans": (hf.BertForQuestionAnswering, hf.BertConfig(**WIDE)),
    "states": (hf.BertModel, hf.BertConfig(**WIDE)),
    "images": (
        hf.ViTForImageClassification,
        hf.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16),
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(vocab_size=67, d_model=16, num_layers=2, num_heads=2, d_ff=24, d_kv=8, decoder_start_token_id=0),
    ),
    "unknown": (hf.StableLmForCausalLM, hf.StableLmConfig(**WIDE, num_key_value_heads=2)),
}
AUTO = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classes": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "spans": "AutoModelForQuestionAnswering",
    "states": "AutoModel",
    "images": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
}


def stock(name, folder):
    """As a user has it: read from files, so that its configuration has the files' `model_type`."""
    torch.manual_seed(0)
    model_class, config = STOCK[name]
    model_class(config).save_pretrained(folder / "base")
    return model_class.from_pretrained(folder / "base").eval()


def retrofit(name, folder, **options):
    return variationalize(stock(name, folder), **{"eve": EVEConfig(scale="unit", prior="centered"), **options}).eval()


def code(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def answer(model, name):
    with torch.no_grad():
        if name == "images":
            return model(torch.ones(1, 3, 16, 16))[0]
        return model(IDS, decoder_input_ids=IDS)[0] if name == "t5" else model(IDS)[0]


@pytest.mark.parametrize("name", STOCK)
def test_a_card_loads_what_lies_beside_it(name, tmp_path, monkeypatch):
    model = retrofit(name, tmp_path)
    expected = answer(stock(name, tmp_path), name)
    card = (save_for_hub(model, tmp_path / "ours") / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code(card)[0], found)
    assert type(found["model"]) is type(model)
    mean_pass = answer(found["model"].eval(), name)
    # weights lie in another file, at other places of memory, and a kernel may round by where they lie
    torch.testing.assert_close(mean_pass, expected, rtol=1e-5, atol=1e-7)
    if name == "unknown":
        assert "variational_class(StableLmForCausalLM)" in card and "AutoModel" not in code(card)[0]
    else:
        assert f"model = {AUTO[name]}.from_pretrained" in card and "variational_class" not in card
    # the stock class that is named reads the same files
    (named,) = re.findall(r"the stock class: `(\w+)\.from_pretrained", card)
    assert named == STOCK[name][0].__name__
    assert torch.equal(answer(getattr(hf, named).from_pretrained("ours").eval(), name), mean_pass)
    # and the same card comes of the model that was loaded
    assert model_card(found["model"], path="ours") == model_card(model, path="ours")
    assert "Loading the posteriors needs the package." in card and "trust_remote_code" not in card


@pytest.mark.parametrize("name", ["llama", "masked", "classes", "spans", "states", "t5"])
def test_the_example_of_a_card_runs(name, tmp_path, monkeypatch):
    save_for_hub(retrofit(name, tmp_path), tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    found = {}
    for block in code((tmp_path / "ours" / "README.md").read_text()):
        exec(block, found)
    out = found["out"]
    if name in ("llama", "t5"):
        assert out.uncertainty.mutual_information.max() > 0
    else:
        assert any(value.isfinite().all() for value in out.values() if torch.is_tensor(value))


def test_only_the_class_tells_how_it_is_loaded(tmp_path):
    read = retrofit("llama", tmp_path)
    made = variationalize(hf.LlamaForCausalLM(hf.LlamaConfig(**WIDE)), eve=EVEConfig(scale="unit", prior="centered"))
    assert model_card(read).partition("## Load it")[2] == model_card(made).partition("## Load it")[2]


def test_a_mean_that_is_learned_is_no_stock_class(tmp_path):
    for mean, named in (("identity", True), ("gain", False)):
        card = model_card(retrofit("llama", tmp_path, eve=EVEConfig(mean=mean, prior="centered")))
        assert ("`LlamaForCausalLM.from_pretrained" in card) is named


def test_layers_and_parameters_are_counted(tmp_path):
    model = retrofit("llama", tmp_path, attention=VariationalAttentionConfig("gaussian"), layers=[1])
    card = model_card(model)
    base = sum(value.numel() for value in stock("llama", tmp_path).parameters())
    total = sum(value.numel() for value in model.parameters())
    share = f"{100 * (total - base) / total:.2f}"
    assert f"| Parameters | {total:,}, of which {total - base:,} ({share} %) are variational |" in card
    assert card.count("in 1 of 2 layers (number 1, counted from 0)") == 2
    assert {"eve", "variational-attention"} <= set(ModelCard(card).data.tags)
    t5 = model_card(retrofit("t5", tmp_path, layers=[0, 3]))
    assert "in 2 of 4 layers (number 0, 3, counted from 0, the encoder's first)" in t5
    assert "A sequence-to-sequence model with variational neurons" in t5


# ---- What the command measured ----


def metrics(nll, ece=0.04, **more):
    return {"nll": nll, "expected_calibration_error": ece, "num_tokens": 60, "predictive_entropy": 2.0, **more}


def measured(nll, tempered, temperature, others=None, **more):
    return Measured(
        FittedTemperature(temperature, tempered, nll, 60),
        metrics(nll, **more),
        metrics(tempered, 0.02, **more),
        others or {},
        others or {},
    )


def texts(**changes):
    row = {"input_ids": [1, 5, 9, 7], "attention_mask": [1] * 4, "labels": [-100, 5, 9, 7]}
    whole = {
        **{"calibration": [row] * 3, "training": [], "test": [row] * 2, "overlapping": 0, "windows": []},
        **{"others": {}, "data": "text.txt", "held_out": "text.txt, held out"},
    }
    return RetrofitTexts(**{**whole, **changes})


def recipe(**changes):
    whole = {"model": "org/base", "train": "none", "eve": {"scale": "unit"}, **changes}
    return recipe_from_dict({"retrofit": whole, "data": {"train": "text.txt"}, "arguments": {"output_dir": "here"}})


NOISE = "each unit's noise is 0.100 of its standard deviation"
BASE, AFTER = measured(3.0, 2.9, 1.2), measured(2.96, 2.93, 0.9, mutual_information=0.1)


def test_measurements_stand_beside_the_base_and_only_ours_in_the_metadata(tmp_path):
    facts = report.card_facts(recipe(), texts(), None, None, "org/base", 3)
    card = model_card(
        retrofit("llama", tmp_path), facts, report.card_metrics(BASE, AFTER, metrics(3.1), texts(), 8, 3)
    )
    assert "### text.txt, held out\n\n| | base | base, T 1.20 | 8 samples | 8 samples, T 0.90 | mean pass |" in card
    assert "| NLL | 3 | 2.9 | 2.96 | 2.93 | 3.1 |" in card
    assert "| Mutual information | – | – | 0.1 | 0.1 | – |" in card
    assert "Conditions: num_posterior_samples 8; seed 3; T a temperature, fitted to the 3 sequences" in card
    data = ModelCard(card).data
    assert data.base_model in ("org/base", ["org/base"])
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found["Expected calibration error (8 samples)"] == 0.04
    assert not any("base" in name for name in found)


def test_other_texts_are_a_table_of_their_own(tmp_path):
    rows = {"predictive_entropy": 0.6, "mutual_information": 0.7}
    others = {"code": rows, "verse": {name: value + 0.1 for name, value in rows.items()}}
    base, after = replace(BASE, tempered_others=others), replace(AFTER, others=others)
    given = texts(windows=[[1, 5, 9, 7]], others={"code": [[1, 2, 3, 4]], "verse": [[1, 2, 3, 4]]})
    card = model_card(retrofit("llama", tmp_path), {}, report.card_metrics(base, after, None, given, 8, 0))
    table = card.partition("### Other texts")[2]
    assert "| | base, T: predictive entropy | predictive entropy | mutual information |" in table
    assert "| code | 0.6 | 0.6 | 0.7 |" in table and "| verse | 0.7 | 0.7 | 0.8 |" in table
    assert re.search(r"\| mean \| 0\.65 \| 0\.65 \| 0\.75 \|", table)
    assert "predicted tokens of a window 3" in table
    lines = report.summary(base, after)
    assert "mutual information (mean AUROC 0.750)" in lines[-1] and "has 0.650" in lines[-1]


def test_the_summary_says_which_is_better():
    (line,) = report.summary(BASE, AFTER)
    assert "NLL is 1.33 % below the base's" in line and "its calibration error 1.00 times" in line
    assert "With a temperature on both, its NLL is 1.03 % above" in line
    (line,) = report.summary(AFTER, replace(AFTER, plain={**AFTER.plain}))
    assert line.count("equal to the base's") == 2
    quiet = report.summary(BASE, measured(3.0, 2.9, 1.2, mutual_information=1e-6))
    assert "hardly disagree" in quiet[1]


@pytest.mark.parametrize(
    ("changes", "factors", "said"),
    [
        (
            {},
            {(0, "ffn"): 0.5, (1, "ffn"): 2.0},
            f"{NOISE}, times 0.500 to 2.00",
        ),
        ({}, {(0, "ffn"): 0.5}, f"{NOISE}, times 0.500"),
        (
            {"calibration": {"sequences": 3, "scale": 0.2}},
            None,
            NOISE.replace("100", "200"),
        ),
        (
            {"eve": None, "attention": {"kind": "gaussian"}},
            {(1, "attention"): 1.5},
            "the noise of the attention weights is what it started with, times 1.50",
        ),
        (
            {"calibration": {"sequences": 3, "tolerance": 0.01}},
            {(0, "ffn"): 3.0},
            f"{NOISE}, times 3.00: as much as costs 1 % of the base's NLL",
        ),
    ],
)
def test_the_fitted_scales_in_words(changes, factors, said):
    changes = {**changes, "calibration": recipe(**changes).retrofit.calibration}
    fitted = None if factors is None else FittedScale(3.0, 2.9, 1.0, factors)
    text = report.fitted_text(fitted, RetrofitRecipe(**{"model": "base", **changes}))
    assert text.startswith(said) and ("(by layer)" in text) is (factors is not None and len(factors) > 1)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ("none", "Every pretrained weight is as it was, and nothing was trained."),
        ("posterior", "Every pretrained weight is as it was; the posteriors were trained."),
        ("ffn", "The posteriors and the feed-forward networks of these layers were trained."),
        ("all", "The posteriors and all pretrained weights were trained."),
    ],
)
def test_what_was_done_in_words(train, said):
    training = {"parameters": 1234, "steps": 1, "seconds": 2.4, "hardware": "cpu, 1 thread"}
    given = texts(training=texts().test) if train != "none" else texts()
    facts = report.card_facts(recipe(train=train), given, None, training if train != "none" else None, "org/base", 3)
    assert facts["description"] == f"A retrofit of `org/base`. {said}" and facts["base_model"] == "org/base"
    assert facts["seeds"] == [3]
    if train == "none":
        assert facts["trained"] == "nothing" and facts["hardware"] is None and "to train on" not in facts["data"]
    else:
        assert facts["trained"] == "1,234 parameters in 1 step, 2 s, on 2 sequences"
        assert facts["hardware"] == "cpu, 1 thread" and "2 to train on" in facts["data"]


# ---- Whose card it is ----


def test_measurements_replace_our_card_and_no_other(tmp_path):
    model = retrofit("llama", tmp_path)
    readme = save_for_hub(model, tmp_path / "ours", facts={"data": "a book"}) / "README.md"
    given = report.card_metrics(BASE, AFTER, None, texts(), 8, 0)
    assert "Not measured." in readme.read_text()
    assert write_model_card(model, tmp_path / "ours", facts={"data": "a book"}, metrics=given)
    assert "| NLL | 3 | 2.9 | 2.96 | 2.93 |" in readme.read_text()
    edited = readme.read_text().replace("a book", "a book of mine")
    readme.write_text(edited)
    assert not write_model_card(model, tmp_path / "ours", facts={}, metrics=given)
    assert readme.read_text() == edited


def adapter(folder):
    from peft import get_peft_model

    from hf_variational import EVEAdapterConfig

    return get_peft_model(stock("llama", folder), EVEAdapterConfig(task_type="CAUSAL_LM"))


def test_an_adapter_s_card_gets_the_record_once(tmp_path):
    model = adapter(tmp_path)
    facts = report.card_facts(recipe(adapter=True), texts(), None, None, "org/base", 3)
    readme = save_for_hub(model, tmp_path / "ours", facts={**facts, "license": "mit"}) / "README.md"
    assert (
        "Not measured." in readme.read_text() and "3 sequences of up to 256 tokens of text.txt" in readme.read_text()
    )
    given = report.card_metrics(BASE, AFTER, None, texts(), 8, 0)
    for _ in range(2):
        assert write_model_card(model, tmp_path / "ours", facts=facts, metrics=given)
    card = readme.read_text()
    assert card.count("## Measured") == 1 and "| NLL | 3 | 2.9 | 2.96 | 2.93 |" in card
    assert "- Fitted: each unit's noise is 0.100 of its standard deviation" in card
    assert "registers the method" in card and ModelCard(card).data.library_name == "peft"
    # saved again by whoever has it, the record goes: it was measured on what lay here before
    save_for_hub(model, tmp_path / "ours")
    assert "## Measured" not in readme.read_text()


def test_a_card_that_a_person_wrote_for_an_adapter_stays(tmp_path):
    model = adapter(tmp_path)
    readme = save_for_hub(model, tmp_path / "ours") / "README.md"
    readme.write_text("My adapter.\n")
    assert not write_model_card(model, tmp_path / "ours", facts={"data": "a book"})
    assert readme.read_text() == "My adapter.\n"
