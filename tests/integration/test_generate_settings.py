"""Where generate takes the number of samples from, what it refuses, and assisted generation."""

import json

import pytest
import torch
from integration_models import (
    EOS,
    RowNoise,
    assert_same_measures,
    endless,
    eve_config,
    prompt,
    stock_llama,
    tiny_model,
)
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_variational import UncertaintyStoppingCriteria, posterior_noise

MEASURED = {"max_new_tokens": 4, "output_uncertainty": True, "return_dict_in_generate": True}


@pytest.fixture
def model():
    return endless(tiny_model(eve=eve_config(noise="sequence")))


def samples_drawn(model, call) -> set[int]:
    """The numbers of posterior samples of the forward passes that `call` makes; 0 where none asked for noise."""
    source = RowNoise()
    with posterior_noise(source):
        call()
    return {request.num_samples for request in source.requests} or {0}


def saved_and_loaded(model, directory):
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


def test_default_is_the_mean_pass(model):
    assert samples_drawn(model, lambda: model.generate(prompt(), max_new_tokens=2)) == {0}


def test_train_mode_does_not_sample(model):
    expected = model.generate(prompt(), max_new_tokens=6)
    model.train()
    assert torch.equal(model.generate(prompt(), max_new_tokens=6), expected)
    assert model.training


def test_generation_config_of_the_checkpoint(model, tmp_path):
    model.generation_config.num_posterior_samples = 5
    model.generation_config.repetition_penalty = 1.1
    for generation in range(2):  # saved, loaded, and saved and loaded again
        model = saved_and_loaded(model, tmp_path / str(generation))
        saved = json.loads((tmp_path / str(generation) / "generation_config.json").read_text())
        assert saved["num_posterior_samples"] == 5
        assert model.generation_config.num_posterior_samples == 5
        assert model.generation_config.repetition_penalty == 1.1
        assert samples_drawn(model, lambda m=model: m.generate(prompt(), max_new_tokens=2)) == {5}


def test_forward_does_not_read_the_generation_config(model):
    model.generation_config.num_posterior_samples = 5
    assert samples_drawn(model, lambda: model(prompt())) == {0}
    model.train()
    assert samples_drawn(model, lambda: model(prompt())) == {1}


@pytest.mark.parametrize("samples", [0, 2])
def test_argument_overrides_the_checkpoint(model, samples):
    model.generation_config.num_posterior_samples = 5
    drawn = samples_drawn(model, lambda: model.generate(prompt(), max_new_tokens=2, num_posterior_samples=samples))
    assert drawn == {samples}


def test_generation_config_argument(model):
    model.generation_config.num_posterior_samples = 5
    given = GenerationConfig(num_posterior_samples=2, **MEASURED)
    with posterior_noise(RowNoise()):
        out = model.generate(prompt(), generation_config=given)
    with posterior_noise(RowNoise()):
        expected = model.generate(prompt(), num_posterior_samples=2, **MEASURED)
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_measures(out.uncertainty, expected.uncertainty)
    # what it does not say is the checkpoint's to say
    drawn = samples_drawn(
        model, lambda: model.generate(prompt(), generation_config=GenerationConfig(max_new_tokens=2))
    )
    assert drawn == {5}


def test_argument_beside_a_generation_config(model):
    given = GenerationConfig(num_posterior_samples=2, max_new_tokens=2)
    drawn = samples_drawn(model, lambda: model.generate(prompt(), generation_config=given, num_posterior_samples=3))
    assert drawn == {3}


def test_uncertainty_asked_by_the_generation_config(model):
    model.generation_config.num_posterior_samples = 2
    model.generation_config.output_uncertainty = True
    out = model.generate(prompt(), max_new_tokens=3, return_dict_in_generate=True)
    assert out.uncertainty.mutual_information.shape == (2, 3)
    assert model(prompt()).uncertainty is None


def test_token_ids_alone(model):
    torch.manual_seed(0)
    ids = model.generate(prompt(), max_new_tokens=4, num_posterior_samples=2)
    torch.manual_seed(0)
    out = model.generate(prompt(), num_posterior_samples=2, return_dict_in_generate=True, max_new_tokens=4)
    assert torch.is_tensor(ids)
    assert torch.equal(ids, out.sequences)
    assert "uncertainty" not in out


def test_noise_comes_from_the_global_generator(model):
    def run(seed):
        torch.manual_seed(seed)
        return model.generate(prompt(), num_posterior_samples=2, **MEASURED).uncertainty.mutual_information

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


REFUSED = [
    ({"num_posterior_samples": 0}, "num_posterior_samples is 0.*num_posterior_samples=8"),
    ({"num_posterior_samples": None}, "num_posterior_samples is 0.*num_posterior_samples=8"),
    ({"num_posterior_samples": -1}, "whole number of at least 0, got -1.*0 is the mean pass"),
    ({"num_posterior_samples": 1.5}, "whole number of at least 0, got 1.5.*0 is the mean pass"),
    ({"return_dict_in_generate": False}, "output_uncertainty=True needs return_dict_in_generate=True"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(), **{"num_posterior_samples": 2, **MEASURED, **options})


def test_twin_refuses_samples():
    twin = tiny_model(eve=None)
    with pytest.raises(ValueError, match=r"num_posterior_samples=2.*eve=None.*num_posterior_samples=0"):
        twin.generate(prompt(), max_new_tokens=2, num_posterior_samples=2)
    assert twin.generate(prompt(), max_new_tokens=2, num_posterior_samples=0).shape == (2, 8)


def test_continuous_batching_refuses_samples(model):
    with pytest.raises(ValueError, match="paged"):
        model.generate(prompt(), max_new_tokens=2, num_posterior_samples=2, cache_implementation="paged")


def test_a_failed_call_leaves_no_trace(model):
    class Fails(UncertaintyStoppingCriteria):
        def __call__(self, *args, **kwargs):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate(prompt(), num_posterior_samples=2, stopping_criteria=[Fails(0.1)], **MEASURED)
    with pytest.raises(ValueError, match="needs generate"):
        UncertaintyStoppingCriteria(0.1)(prompt(), None)
    assert model.generate(prompt(), num_posterior_samples=2, **MEASURED).uncertainty.token_variance.shape == (2, 4)


ASSISTED = {
    "stock": lambda: {"assistant_model": stock_llama(seed=1, num_hidden_layers=1)},
    "twin": lambda: {"assistant_model": tiny_model(seed=1, eve=None, num_hidden_layers=1)},
    "variational": lambda: {"assistant_model": tiny_model(seed=1, num_hidden_layers=1)},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "early exit": lambda: {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("assistant", ASSISTED)
@pytest.mark.parametrize("samples", [0, 2])
def test_assisted_generation_equals_greedy(model, assistant, samples):
    ids = prompt(1)
    # prompt lookup in transformers 5.10 cannot do without an end token
    arguments = {"max_new_tokens": 10, "num_posterior_samples": samples, "eos_token_id": EOS}
    arguments["attention_mask"] = torch.ones_like(ids)
    with posterior_noise(RowNoise()):
        expected = model.generate(ids, **arguments)
        out = model.generate(ids, **arguments, **ASSISTED[assistant]())
    assert torch.equal(out, expected)


@pytest.mark.parametrize("assistant", ASSISTED)
def test_assisted_generation_refuses_uncertainty(model, assistant):
    with pytest.raises(ValueError, match=r"not in assisted_generation.*leave out output_uncertainty"):
        model.generate(prompt(1), num_posterior_samples=2, **MEASURED, **ASSISTED[assistant]())


def test_variational_assistant_samples_as_its_own_config_says(model):
    ids, assistant = prompt(1), tiny_model(seed=1, num_hidden_layers=1)
    assistant.generation_config.num_posterior_samples = 4
    arguments = {"max_new_tokens": 6, "eos_token_id": EOS, "attention_mask": torch.ones_like(ids)}
    for target, own in ((model, {2}), (stock_llama(), set())):
        given = {"num_posterior_samples": 2} if own else {}
        with posterior_noise(RowNoise()):
            expected = target.generate(ids, **arguments, **given)
        source = RowNoise()
        with posterior_noise(source):
            out = target.generate(ids, assistant_model=assistant, **arguments, **given)
        assert torch.equal(out, expected)
        assert {request.num_samples for request in source.requests} == own | {4}
