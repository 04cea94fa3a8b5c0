"""The shipped recipes of variational attention: each differs from the twin in its noise alone, and runs."""

import json
from pathlib import Path

import pytest

from hf_variational import VariationalGPTConfig
from hf_variational.training import program
from hf_variational.training.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")
NAMES = (*KINDS, "dirichlet_paper", "eve_dirichlet")
OF_THE_KL = {"output_dir", "kl_schedule", "kl_warmup_ratio", "kl_weight"}


def shipped(name):
    return load_recipe(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_differs_from_the_twin_in_the_noise_alone(name):
    recipe, twin = shipped(name), shipped("twin")
    assert recipe.data == twin.data and recipe.tokenizer == twin.tokenizer
    different = {key for key in recipe.model if recipe.model[key] != twin.model.get(key)}
    assert different == {"attention"} | ({"eve"} if name == "eve_dirichlet" else set())
    assert set(twin.model) <= set(recipe.model)
    assert {key for key, value in recipe.arguments.items() if value != twin.arguments.get(key)} <= OF_THE_KL
    assert recipe.arguments["output_dir"] == f"runs/{name}"
    config = VariationalGPTConfig(**recipe.model)
    kind = name if name in KINDS else "dirichlet"
    assert config.attention.kind == kind and config.attention_layer_indices() == [0, 1, 2, 3]


def test_units_and_attention_are_those_of_their_own_recipes():
    both = shipped("eve_dirichlet").model
    assert both["eve"] == shipped("eve").model["eve"] and both["attention"] == shipped("dirichlet").model["attention"]


def test_the_published_start_is_a_recipe_that_warns():
    attention = shipped("dirichlet_paper").model["attention"]
    assert attention["initial_raw"] == -7 and attention["prior"] == "constant" and not attention["data_dependent"]
    header = (RECIPES / "dirichlet_paper.yaml").read_text().partition("model:")[0]
    assert "much worse" in header and "one-hot" in header
    for name in ("gaussian", "approximate_dirichlet"):
        assert "initial_raw: -7" in (RECIPES / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_runs(name, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. the dog sat on the log. " * 40)
    small = {"model.hidden_size": 16, "model.intermediate_size": 24, "model.num_attention_heads": 2}
    small |= {"data.train": text, "data.block_size": 16, "tokenizer.vocab_size": 270, "arguments.max_steps": 2}
    small |= {"arguments.output_dir": tmp_path / "run", "arguments.use_cpu": "true", "arguments.logging_steps": 1}
    small |= {"arguments.per_device_train_batch_size": 4, "arguments.eval_posterior_samples": 2}
    recipe = load_recipe(RECIPES / f"{name}.yaml", [f"{key}={value}" for key, value in small.items()])
    trainer = program.run(recipe)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    evaluation = json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluation"]
    assert evaluation["eval_mutual_information"] >= 0 and evaluation["eval_attention_kl"] > 0
    if name == "dirichlet_paper":
        assert evaluation["eval_effective_keys"] < 1.1
