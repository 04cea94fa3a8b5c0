"""Bad input gets an error that names the value and the way out."""

import re

import pytest
import torch
from integration_models import prompt, stock_llama, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_variational import EVEConfig, VariationalGPTForCausalLM
from hf_variational.modeling.posterior import PosteriorTap

CHOICES = {
    "mean": ("identity", "gain", "linear"),
    "scale": ("scalar", "unit", "input"),
    "prior": ("standard", "empirical", "centered", "autoregressive"),
    "pool": ("mean", "sum", "sum_sqrtk"),
    "noise": ("token", "sequence"),
}


def refusal(call, *parts, error=ValueError) -> str:
    """The message of the error that `call` raises, which has all of `parts`."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"
    return message


@pytest.mark.parametrize("field", CHOICES)
@pytest.mark.parametrize("value", ["identty", "", None, 3])
def test_unknown_choice(field, value):
    refusal(lambda: EVEConfig(**{field: value}), field, repr(value), *CHOICES[field])
    refusal(lambda: tiny_config(eve={field: value}), field, repr(value), *CHOICES[field])


def test_unknown_objective():
    refusal(lambda: tiny_config(objective="vae"), "objective", "'vae'", "elbo", "mc_nll")


def test_unknown_field():
    message = refusal(lambda: tiny_config(eve={"meen": "gain"}), "'meen'")
    assert "mean" in message.replace("meen", "")


NOT_NUMBERS_OF_SAMPLES = [-1, -8, 0.5, 2.0, True, "4", float("nan")]


@pytest.mark.parametrize("value", NOT_NUMBERS_OF_SAMPLES, ids=repr)
def test_number_of_samples(value):
    model = tiny_model()
    way_out = ("num_posterior_samples", repr(value), "whole number", "0 is the mean pass")
    refusal(lambda: model(prompt(), num_posterior_samples=value), *way_out)
    refusal(lambda: model.model(prompt(), num_posterior_samples=value), *way_out)
    refusal(lambda: model.generate(prompt(), num_posterior_samples=value, max_new_tokens=1), *way_out)
    refusal(lambda: tiny_config(num_posterior_samples=value), *way_out)
    model.generation_config.num_posterior_samples = value
    refusal(lambda: model.generate(prompt(), max_new_tokens=1), *way_out)


@pytest.mark.parametrize("scale", ["scalar", "unit"])
def test_scale_rank_without_an_input_scale(scale):
    refusal(
        lambda: EVEConfig(scale=scale, scale_rank=4),
        "scale_rank=4",
        f"scale={scale!r}",
        "set scale='input' or scale_rank=None",
    )
    assert EVEConfig(scale=scale).scale_rank is None


@pytest.mark.parametrize("value", [0, -2, 1.5, True, "8"], ids=repr)
def test_scale_rank(value):
    refusal(lambda: EVEConfig(scale_rank=value), "scale_rank", repr(value), "None for the full affine scale")


@pytest.mark.parametrize(("layers", "value"), [([3], 3), ([0, 7], 7), ([-1], -1), ([1.5], 1.5), (["1"], "'1'")])
def test_variational_layers_out_of_range(layers, value):
    refusal(lambda: tiny_config(variational_layers=layers), "variational_layers", value, "0 to 2")


def test_no_variational_layer():
    refusal(lambda: tiny_config(variational_layers=[]), "variational_layers=[]", "eve=None", "None for all")


@pytest.mark.parametrize("value", [8.0, 1e-6, 0, -0.1, float("nan"), float("inf")], ids=repr)
def test_initial_scale_outside_the_allowed_range(value):
    refusal(lambda: EVEConfig(initial_scale=value), "initial_scale", repr(value))
    if 0 < value < float("inf"):
        refusal(lambda: EVEConfig(initial_scale=value), "6.14e-06", "7.39", "log_scale_max", "choose another")
    assert EVEConfig(initial_scale=8.0, log_scale_max=3.0).initial_scale == 8.0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"latent_dim": 0}, ["latent_dim", "0"]),
        ({"latent_dim": 1.5}, ["latent_dim", "1.5"]),
        ({"prior_scale": 0.0}, ["prior_scale", "0.0"]),
        ({"log_scale_min": 3.0}, ["log_scale_min=3.0", "log_scale_max=2.0"]),
        ({"autoregressive_coefficient": 1.5}, ["autoregressive_coefficient", "1.5", "[-1, 1]"]),
        ({"reconstruction_weight": -0.5}, ["reconstruction_weight", "-0.5"]),
    ],
    ids=str,
)
def test_other_fields_of_the_neuron(fields, named):
    refusal(lambda: EVEConfig(**fields), *named)


@pytest.mark.parametrize("value", [-1e-4, float("nan"), float("inf")], ids=repr)
def test_kl_weight(value):
    refusal(lambda: tiny_config(kl_weight=value), "kl_weight", repr(value))


WRONG_TYPES = [
    ({"eve": "identity"}, ["eve", "'identity'"]),
    ({"eve": True}, ["eve", "True"]),
    ({"variational_layers": 2}, ["variational_layers", "2"]),
    ({"kl_weight": "0.1"}, ["kl_weight", "'0.1'"]),
    ({"eve": {"initial_scale": "0.1"}}, ["initial_scale", "'0.1'"]),
    ({"eve": {"prior_scale": "1"}}, ["prior_scale", "'1'"]),
]


@pytest.mark.parametrize(("fields", "named"), WRONG_TYPES, ids=lambda value: str(value))
def test_wrong_types(fields, named):
    refusal(lambda: tiny_config(**fields), *named, error=(ValueError, TypeError))


@pytest.mark.parametrize("name", ["output_uncertainty", "output_sample_logits"])
@pytest.mark.parametrize("samples", [0, None])
def test_uncertainty_of_a_mean_pass(name, samples):
    model = tiny_model()
    refusal(
        lambda: model(prompt(), num_posterior_samples=samples, **{name: True}),
        f"{name}=True",
        "num_posterior_samples is 0",
        "pass num_posterior_samples=8",
    )


def test_samples_of_a_twin():
    twin = tiny_model(eve=None)
    for call in (twin, twin.model):
        refusal(lambda call=call: call(prompt(), num_posterior_samples=3), "num_posterior_samples=3", "eve=None")
    assert twin.train()(prompt(), labels=prompt()).kl == 0


def test_labels_with_logits_to_keep():
    model = tiny_model()
    refusal(lambda: model(prompt(), labels=prompt(), logits_to_keep=1), "leave out logits_to_keep", "1")


REENTRANT = {"use_reentrant": True}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_reentrant_checkpointing():
    model = tiny_model()
    way_out = ("'use_reentrant': True", "KL", "{'use_reentrant': False}")
    refusal(lambda: model.gradient_checkpointing_enable(REENTRANT), *way_out)
    refusal(lambda: model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT), *way_out)
    if hasattr(model, "activation_checkpointing_enable"):
        refusal(lambda: model.activation_checkpointing_enable(REENTRANT), *way_out)
    assert not model.model.gradient_checkpointing
    tiny_model(eve=None).gradient_checkpointing_enable(REENTRANT)  # without a KL there is nothing to lose


def test_reentrant_checkpointing_in_training_arguments(tmp_path):
    arguments = TrainingArguments(
        output_dir=tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=REENTRANT,
        report_to=[],
        use_cpu=True,
        max_steps=1,
    )
    data = [{"input_ids": row, "labels": row} for row in prompt()]
    trainer = Trainer(model=tiny_model(), args=arguments, train_dataset=data)
    refusal(trainer.train, "'use_reentrant': True", "{'use_reentrant': False}")


@pytest.mark.parametrize("options", [{}, {"num_posterior_samples": 2}, {"output_posteriors": True}], ids=str)
def test_fewer_posteriors_than_variational_layers(options):
    model, labels = tiny_model(), prompt()
    model(labels, labels=labels)
    model.model.layers[1].mlp.eve.tap = PosteriorTap()  # as an adapter that replaces a layer would leave it
    message = refusal(
        lambda: model(labels, labels=labels, **options), "(2, 'ffn')", "(1, 'ffn')", "KL", error=RuntimeError
    )
    assert re.search("before the first|fresh|new model", message), message


TRUNCATED = [("cut in the tensors", 0.5), ("cut in the header", 0.001), ("empty", 0.0)]


@pytest.mark.parametrize(("_", "share"), TRUNCATED, ids=[name for name, _ in TRUNCATED])
@pytest.mark.parametrize("loader", [VariationalGPTForCausalLM, AutoModelForCausalLM], ids=["class", "auto"])
def test_truncated_safetensors(_, share, loader, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * share)])
    message = refusal(lambda: loader.from_pretrained(tmp_path), tmp_path, error=Exception)
    assert re.search("truncated|incomplete|damaged", message), message
    assert re.search("again|another|earlier", message), message
    assert weights.read_bytes() == content[: int(len(content) * share)]


def test_truncated_shard_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="30KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refusal(lambda: AutoModelForCausalLM.from_pretrained(tmp_path), shard.name, error=Exception)


def test_weights_of_another_shape(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path, eve=EVEConfig(scale_rank=3))


def test_posterior_noise_of_a_wrong_shape():
    from hf_variational import posterior_noise

    model = tiny_model()
    with posterior_noise(lambda request: torch.zeros(1)):
        refusal(lambda: model(prompt(), num_posterior_samples=3), "(1,)", "layer 0", "(6, 6, 48)")
    torch.testing.assert_close(model(prompt()).logits, model(prompt()).logits)


def test_both_or_neither_input():
    model = tiny_model()
    refusal(lambda: model(), "exactly one of input_ids and inputs_embeds")
    embeddings = model.get_input_embeddings()(prompt())
    refusal(lambda: model(prompt(), inputs_embeds=embeddings), "exactly one of input_ids and inputs_embeds")


def test_cache_of_a_stock_model_goes_on_as_a_mean_pass():
    model, stock = tiny_model(), stock_llama()
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if ".eve." not in name})
    ids = prompt(2, 8)
    cache = stock(ids[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 5:], past_key_values=cache).logits, stock(ids).logits[:, 5:])
    refusal(
        lambda: model(ids, past_key_values=cache, num_posterior_samples=2),
        "num_posterior_samples=0",
        "this pass has 2",
        "start again",
    )
