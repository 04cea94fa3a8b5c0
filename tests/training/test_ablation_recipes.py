"""The ablations: each is eve.yaml but for one thing, and runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from training_models import assert_same_bits, weights

from hf_variational import VariationalGPTConfig
from hf_variational.modeling.configuration_variational_gpt import PRIORS
from hf_variational.training import program
from hf_variational.training.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
# What differs from eve.yaml, of the units and of the arguments; None is left out.
DIFFERENCES = {
    "mean_only": ({}, {"eval_posterior_samples": 0}),
    "beta_zero": ({}, {"kl_weight": 0}),
    "fixed_scale": (
        {
            "scale": "scalar",
            "scale_rank": None,
            "initial_scale": 0.05,
            "log_scale_min": -2.9958,
            "log_scale_max": -2.9957,
        },
        {},
    ),
    "prior_standard": ({"prior": "standard", "prior_scale": None}, {}),
    "prior_centered": ({"prior": "centered"}, {}),
    "prior_autoregressive": ({"prior": "autoregressive"}, {}),
}


def trained(file, folder, **changes):
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat. the dog sat on the log. " * 40)
    small = {"model.hidden_size": 16, "model.intermediate_size": 24, "model.num_attention_heads": 2}
    small |= {"data.train": text, "data.block_size": 16, "tokenizer.vocab_size": 270, "arguments.max_steps": 2}
    small |= {"arguments.output_dir": folder / file.stem, "arguments.use_cpu": "true", "arguments.logging_steps": 1}
    small |= {"arguments.per_device_train_batch_size": 4, **changes}
    trainer = program.run(load_recipe(file, [f"{key}={value}" for key, value in small.items()]))
    return trainer, json.loads((folder / file.stem / "metrics.json").read_text())["evaluation"]


def test_every_ablation_is_here():
    assert {file.stem for file in (RECIPES / "ablations").glob("*")} == set(DIFFERENCES)
    priors = {name.removeprefix("prior_") for name in DIFFERENCES if name.startswith("prior_")}
    assert priors | {load_recipe(RECIPES / "eve.yaml").model["eve"]["prior"]} == set(PRIORS)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_an_ablation_is_eve_but_for_one_thing(name):
    file = RECIPES / "ablations" / f"{name}.yaml"
    recipe, eve = load_recipe(file), load_recipe(RECIPES / "eve.yaml")
    of_units, of_arguments = DIFFERENCES[name]
    units = {key: value for key, value in {**eve.model["eve"], **of_units}.items() if value is not None}
    assert recipe.model == {**eve.model, "eve": units}
    assert recipe.arguments == {**eve.arguments, "output_dir": f"runs/ablations/{name}", **of_arguments}
    assert recipe.data == eve.data and recipe.tokenizer == eve.tokenizer and recipe.retrofit is None
    assert VariationalGPTConfig(**recipe.model).eve_layer_indices() == [0, 1, 2, 3]
    assert file.read_text().startswith("# eve.yaml ")


@pytest.mark.parametrize("name", DIFFERENCES)
def test_an_ablation_runs(name, tmp_path):
    samples = {} if name == "mean_only" else {"arguments.eval_posterior_samples": 2}
    trainer, evaluation = trained(RECIPES / "ablations" / f"{name}.yaml", tmp_path, **samples)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    assert trainer.state.global_step == 2 and evaluation["eval_mean_pass_nll"] > 0
    if name == "mean_only":
        assert not any("mutual_information" in key for key in evaluation)
    else:
        assert evaluation["eval_mutual_information"] > 0 and evaluation["eval_kl"] > 0
    if name == "beta_zero":
        assert all(entry["kl_weight"] == 0 for entry in trainer.state.log_history if "kl_weight" in entry)
    if name == "fixed_scale":
        trained_scales = trainer.model(torch.tensor([[3, 4, 5]]), num_posterior_samples=2, output_posteriors=True)
        for layer in trained_scales.posteriors.values():
            torch.testing.assert_close(layer.scale, torch.full_like(layer.scale, 0.05), rtol=1e-4, atol=0)


def test_the_range_of_the_fixed_scale_is_closed_around_it():
    eve = load_recipe(RECIPES / "ablations" / "fixed_scale.yaml").model["eve"]
    assert eve["log_scale_min"] < math.log(eve["prior_scale"]) < eve["log_scale_max"]
    assert eve["log_scale_max"] - eve["log_scale_min"] < 1.1e-4


def test_evaluating_the_means_alone_trains_the_same_model(tmp_path):
    often = {"arguments.eval_steps": 1, "arguments.max_steps": 3}
    mean_only, evaluation = trained(RECIPES / "ablations" / "mean_only.yaml", tmp_path, **often)
    eve, of_eve = trained(RECIPES / "eve.yaml", tmp_path, **often)
    assert_same_bits(weights(mean_only.model), weights(eve.model))
    assert evaluation["eval_mean_pass_nll"] == of_eve["eval_mean_pass_nll"]
