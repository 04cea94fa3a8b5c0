"""Recipes that make a pretrained model variational: what they may say, and what a training from one does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_program import stop_at, train_script
from tokenizers import Tokenizer, models, pre_tokenizers
from training_models import assert_same_bits, weights
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_variational import EVEConfig, VariationalAttentionConfig, calibrate_prior, fit_scale, variationalize
from hf_variational.retrofit_program.options import recipe_for, shipped_recipe
from hf_variational.training import program
from hf_variational.training.naming import is_variational
from hf_variational.training.recipe import RetrofitRecipe, load_recipe, recipe_from_dict
from hf_variational.training.retrofitting import base_facts, calibrate, card_recipe, make_variational

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
WORDS = [f"w{index}" for index in range(30)]
LENGTH, CALIBRATION = 12, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama with its tokenizer, and a text of counting words."""
    folder = tmp_path_factory.mktemp("base")
    whole = Tokenizer(models.WordLevel({"[PAD]": 0, **{word: index + 1 for index, word in enumerate(WORDS)}}, "[PAD]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="[PAD]", eos_token="[PAD]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=31, max_position_embeddings=32, initializer_range=0.4, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    BertLMHeadModel(BertConfig(vocab_size=31, **sizes)).save_pretrained(folder / "bert")
    for name in ("llama", "bert"):
        tokenizer.save_pretrained(folder / name)
    lines = (
        " ".join(WORDS[(start + step * index) % 30] for index in range(60)) for start in range(6) for step in (1, 7)
    )
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def content(place, output, **changes):
    whole = {
        "retrofit": {
            "model": str(place / "llama"),
            "eve": {"scale": "input", "scale_rank": 2},
            "layers": [1],
            "objective": "mc_nll",
            "num_posterior_samples": 2,
            "calibration": {"sequences": CALIBRATION, "scale": 0.2},
        },
        "data": {"train": str(place / "text.txt"), "validation_fraction": 0.2, "block_size": LENGTH},
        "arguments": {
            "output_dir": str(output),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 2,
            "eval_posterior_samples": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = whole
        for name in sections:
            section = section[name]
        section[key] = value
    return whole


def recipe(place, output, **changes):
    return recipe_from_dict(content(place, output, **changes))


def retrofit(**fields):
    return RetrofitRecipe(model="base", **fields)


def gpt2(**options):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2, n_positions=32, **options))


def pretrained(folder):
    held = load_file(Path(folder) / "model.safetensors")
    return {name: value for name, value in held.items() if not is_variational(name)}


# ---- What a recipe may say ----


def test_the_shipped_recipes_differ_in_what_training_needs():
    scale, posterior = (load_recipe(RECIPES / f"retrofit_{name}.yaml") for name in ("scale", "posterior"))
    assert scale.retrofit.train == "none" and posterior.retrofit.train == "posterior"
    assert scale.data == posterior.data and scale.retrofit.calibration == posterior.retrofit.calibration
    assert scale.retrofit.model == posterior.retrofit.model and scale.retrofit.layers == posterior.retrofit.layers
    for name, shipped in (("scale", scale), ("posterior", posterior)):
        assert shipped.retrofit.eve["prior"] == "centered" and shipped.retrofit.calibration.fit_scale
        assert shipped.arguments["output_dir"] == f"runs/retrofit_{name}"
        assert shipped_recipe(f"retrofit_{name}").read_text() == (RECIPES / f"retrofit_{name}.yaml").read_text()
    # a scale that reads its input has something to learn, and one that does not has not
    assert EVEConfig(**scale.retrofit.eve).scale == "unit" and EVEConfig(**posterior.retrofit.eve).scale == "input"


def test_what_is_asked_for_stands_in_the_recipe():
    plain = recipe_for("gpt2", "a.txt", "out")
    assert plain.retrofit.train == "none" and plain.data.train == "a.txt" and plain.arguments["output_dir"] == "out"
    shipped = load_recipe(shipped_recipe("retrofit_scale"))
    assert plain.retrofit.calibration == shipped.retrofit.calibration and plain.data.validation_fraction == 0.2
    full = recipe_for(
        "gpt2",
        "{dataset: wikitext, split: train}",
        "out",
        train="ffn",
        layers="1,2",
        attention="dirichlet",
        test="b.txt",
        tolerance=0.01,
        samples=3,
        max_sequences=9,
        length=33,
        seed=5,
        overrides=["arguments.seed=6"],
    )
    assert full.retrofit.train == "ffn" and full.retrofit.layers == [1, 2] and full.retrofit.objective == "mc_nll"
    assert full.retrofit.attention == {"kind": "dirichlet"} and full.retrofit.calibration.tolerance == 0.01
    assert full.data.train == {"dataset": "wikitext", "split": "train"}
    assert full.data.validation == "b.txt" and full.data.validation_fraction == 0.0 and full.data.block_size == 33
    assert full.arguments["seed"] == 6 and full.arguments["eval_posterior_samples"] == 3
    assert full.retrofit.calibration.sequences == 9 and not full.retrofit.adapter
    assert recipe_for("gpt2", "a.txt", "out", adapter=True).retrofit.adapter


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"hidden_size": 16}}, "one or the other"),
        ({"retrofit__train": "some"}, "none, posterior, ffn, all"),
        ({"retrofit__eve": None}, "neither `eve` nor `attention`"),
        ({"retrofit__eve": {"scale_rnak": 2}}, "did you mean 'scale_rank'"),
        ({"retrofit__attention": {"knid": "gaussian"}}, "did you mean 'kind'"),
        ({"retrofit__layer": "all"}, "did you mean 'layers'"),
        ({"retrofit__calibration__sequences": 0}, "at least 1 of `sequences`"),
        ({"retrofit__calibration__tolerence": 0.1}, "did you mean 'tolerance'"),
        ({"retrofit__calibration": 3}, "`calibration` is a mapping"),
        ({"retrofit__kl_weight": "small"}, "`kl_weight` is float, got 'small'"),
        ({"retrofit__adapter": True, "retrofit__train": "all"}, "holds the posterior of the units alone"),
        ({"retrofit__adapter": True, "retrofit__attention": {"kind": "gaussian"}}, "leave `attention` out"),
        ({"retrofit": {"eve": {}}}, "has no `model`"),
    ],
)
def test_a_wrong_recipe_is_refused(place, tmp_path, changes, words):
    with pytest.raises(ValueError) as refusal:
        recipe(place, tmp_path, **changes)
    assert words in str(refusal.value)


# ---- The model ----


def test_a_recipe_is_what_variationalize_is_told():
    asked = retrofit(
        eve={"scale": "unit"},
        attention={"kind": "gaussian", "initial_scale": 0.3},
        layers="last",
        train="ffn",
        kl_weight=0.02,
        objective="mc_nll",
        num_posterior_samples=3,
    )
    made = make_variational(gpt2(), asked)
    by_hand = variationalize(
        gpt2(),
        eve=EVEConfig(scale="unit", prior="centered"),
        attention=VariationalAttentionConfig(kind="gaussian", initial_scale=0.3),
        layers="last",
        train="ffn",
        kl_weight=0.02,
        objective="mc_nll",
        num_posterior_samples=3,
    )
    assert made.config.variational == by_hand.config.variational
    for (name, value), (other, expected) in zip(made.named_parameters(), by_hand.named_parameters(), strict=True):
        assert name == other and value.requires_grad == expected.requires_grad and value.shape == expected.shape
    # nothing is trained: still only the posterior could be
    parameters = dict(make_variational(gpt2(), retrofit(train="none")).named_parameters())
    assert {name for name, value in parameters.items() if value.requires_grad} == set(
        filter(is_variational, parameters)
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_causal_model_in_any_mode_is_none_that_looks_ahead(training):
    model = gpt2().train(training)  # with dropout in training
    assert make_variational(model, retrofit()).training is training
    half = gpt2().to(torch.bfloat16)
    assert make_variational(half, retrofit()).dtype == torch.bfloat16


def test_an_encoder_is_refused_and_as_a_decoder_it_is_not(place):
    asked = RetrofitRecipe(model="bert", layers="all")
    with pytest.raises(ValueError, match="bert predicts a token from the tokens after it too: it is an encoder"):
        make_variational(BertLMHeadModel.from_pretrained(place / "bert"), asked)
    decoder = BertLMHeadModel.from_pretrained(place / "bert", is_decoder=True)
    assert make_variational(decoder, asked).variational_layers == [0, 1]


def test_calibration_is_calibrate_prior_and_fit_scale(place):
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": ids} for ids in torch.randint(1, 31, (CALIBRATION, LENGTH), generator=generator).tolist()]
    asked = retrofit(calibration=program.recipe_from_dict(content(place, "out")).retrofit.calibration)
    options = {"num_posterior_samples": 2, "batch_size": 3, "seed": 4, "progress": False}
    ours, by_hand = (make_variational(gpt2(), asked).eval() for _ in range(2))
    found = calibrate(ours, asked, rows, **options)
    calibrate_prior(by_hand, rows, scale=0.2, batch_size=3, progress=False)
    expected = fit_scale(by_hand, rows, **options)
    assert_same_bits(weights(ours), weights(by_hand))
    assert found.multipliers == expected.multipliers and found.nll == expected.nll
    asked.calibration.fit_scale = False
    again = make_variational(gpt2(), asked).eval()
    assert calibrate(again, asked, rows, **options) is None


def test_names_and_folders_of_a_machine_are_no_facts(place, tmp_path):
    assert base_facts("openai-community/gpt2") == {"base_model": "openai-community/gpt2"}
    assert base_facts(str(place / "llama")) == {"base": "llama (a local folder)"}
    shown = json.dumps(card_recipe(recipe(place, tmp_path)))
    assert str(place) not in shown and str(tmp_path) not in shown
    assert '"scale_rank": 2' in shown and '"learning_rate": 0.01' in shown and f'"block_size": {LENGTH}' in shown


# ---- The training ----


def test_a_run_trains_the_posterior_and_nothing_else(place, tmp_path):
    folder = tmp_path / "run"
    trainer = program.run(recipe(place, folder))
    assert_same_bits(pretrained(folder), pretrained(place / "llama"))
    base = LlamaForCausalLM.from_pretrained(folder).eval()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__name__ == "VariationalLlamaForCausalLM" and model.variational_layers == [1]
    assert_same_bits(weights(model), weights(trainer.model))
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert model.model.layers[1].mlp.eve.scale_up.abs().max() > 0  # started at 0
    assert model.generation_config.num_posterior_samples == 2

    metrics = json.loads((folder / "metrics.json").read_text())
    added = sum(value.numel() for name, value in model.named_parameters() if is_variational(name))
    assert metrics["facts"]["variational_parameters"] == added and metrics["facts"]["steps"] == 4
    assert metrics["evaluation"]["eval_mutual_information"] > 0
    # three parts: held out, calibrated on, and the rest
    blocks = metrics["facts"]["train_blocks"] + metrics["facts"]["validation_blocks"] + CALIBRATION
    sequences = 12 * -(-60 // LENGTH)
    assert blocks == sequences and metrics["facts"]["validation_blocks"] == round(0.2 * sequences)
    card = (folder / "README.md").read_text()
    assert "- Started from: llama (a local folder)" in card and "scale_rank: 2" in card and str(place) not in card
    assert 'AutoModelForCausalLM.from_pretrained("run")' in card and "AutoTokenizer" in card


def test_the_posterior_is_calibrated_before_it_is_trained(place, tmp_path):
    trainer = program.run(recipe(place, tmp_path / "run", arguments__learning_rate=0.0))
    eve = trainer.model.model.layers[1].mlp.eve
    # in proportion to each unit, so not one number for all, and the prior where the posterior is
    assert eve.log_scale.std() > 0.1
    torch.testing.assert_close(eve.prior_log_scale, eve.log_scale.detach(), rtol=0, atol=1e-5)


def test_an_adapter_is_trained_and_saved_alone(place, tmp_path):
    from peft import AutoPeftModelForCausalLM

    folder = tmp_path / "run"
    program.run(recipe(place, folder, retrofit__adapter=True, arguments__max_steps=2))
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    base = LlamaForCausalLM.from_pretrained(place / "llama").eval()
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    assert not any("weight" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_an_interrupted_retrofit_resumes_to_the_same_bits(place, tmp_path, monkeypatch):
    whole = program.run(recipe(place, tmp_path / "whole"))
    undo = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        program.run(recipe(place, tmp_path / "stopped"))
    undo()
    # what a checkpoint holds is not calibrated again
    monkeypatch.setattr(program, "_calibrate", lambda *args: pytest.fail("calibrated twice"))
    resumed = program.run(recipe(place, tmp_path / "stopped"), resume=True)
    assert resumed.state.global_step == 4
    assert_same_bits(weights(whole.model), weights(resumed.model))
    assert_same_bits(pretrained(tmp_path / "stopped"), pretrained(place / "llama"))
    for change in ({"retrofit__layers": "all"}, {"retrofit__kl_weight": 0.5}):
        with pytest.raises(ValueError, match="resume with the run's recipe"):
            program.run(recipe(place, tmp_path / "stopped", **change), resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"retrofit__train": "none"}, "give it to `hf-variational retrofit`"),
        ({"retrofit__calibration__sequences": 1000}, "too few to calibrate on 1000"),
        ({"data__block_size": 40}, "max_position_embeddings=32"),
        ({"retrofit__layers": [5]}, "layers names 5"),
    ],
)
def test_what_cannot_be_trained(place, tmp_path, changes, words):
    with pytest.raises(ValueError) as refusal:
        program.run(recipe(place, tmp_path / "run", **changes))
    assert words in str(refusal.value)


def test_an_encoder_is_not_trained(place, tmp_path):
    with pytest.raises(ValueError, match="it is an encoder"):
        program.run(recipe(place, tmp_path / "run", retrofit__model=str(place / "bert")))


def test_the_script_takes_a_retrofit(place, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe(place, tmp_path / "run").to_dict()))  # JSON is YAML
    main = train_script().main
    assert main([str(file), "arguments.max_steps=1", "retrofit.train=ffn"]) == 0
    changed = {
        name
        for name, value in pretrained(place / "llama").items()
        if not torch.equal(value, pretrained(tmp_path / "run")[name])
    }
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert main([str(file), "retrofit.train=none"]) == 1
    assert "trains nothing" in capsys.readouterr().err
