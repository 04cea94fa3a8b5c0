"""Bad input gets an error that names the value and the way out."""

import re

import pytest
import torch
from integration_models import attention_config, prompt, stock_llama, tiny_config, tiny_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_variational import EVEConfig, VariationalAttentionConfig, VariationalGPTForCausalLM, posterior_noise
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


ATTENTION_CHOICES = {
    "kind": ("gaussian", "approximate_dirichlet", "dirichlet"),
    "data_dependent": ("False", "'query'", "True"),
    "prior": ("contextual", "constant", "uniform"),
}


@pytest.mark.parametrize("field", ATTENTION_CHOICES)
@pytest.mark.parametrize("value", ["dirichlt", "", None, 3, "Query"])
def test_unknown_choice_of_attention(field, value):
    for build in (VariationalAttentionConfig, lambda **values: tiny_config(attention=values)):
        refusal(lambda build=build: build(**{field: value}), field, repr(value), *ATTENTION_CHOICES[field])


@pytest.mark.parametrize("field", ["prior_concentration", "prior_scale", "initial_concentration", "initial_scale"])
@pytest.mark.parametrize("value", [0, 0.0, -1.5, float("nan"), float("inf"), "3", True, None], ids=repr)
def test_concentrations_and_scales(field, value):
    refusal(lambda: VariationalAttentionConfig(**{field: value}), field, repr(value))


@pytest.mark.parametrize("values", [{"hidden_size": 0}, {"hidden_size": 2.5}, {"initial_raw": "-7"}], ids=str)
def test_other_fields_of_attention(values):
    ((field, value),) = values.items()
    refusal(lambda: VariationalAttentionConfig(**values), field, repr(value))


@pytest.mark.parametrize("prior", ["constant", "uniform"])
def test_gaussian_attention_with_a_prior_over_concentrations(prior):
    refusal(lambda: VariationalAttentionConfig(kind="gaussian", prior=prior), repr(prior), "gaussian", "contextual")


def test_unknown_field_of_attention(tmp_path):
    message = refusal(lambda: tiny_config(attention={"knd": "gaussian"}), "'knd'", "VariationalAttentionConfig")
    assert "kind" in message
    tiny_config(attention={}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"initial_raw"', '"initial_row"'))
    refusal(lambda: AutoModelForCausalLM.from_config(type(tiny_config()).from_pretrained(tmp_path)), "'initial_row'")


@pytest.mark.parametrize(
    ("layers", "value"), [([3], 3), ([0, 7], 7), ([-1], -1), ([True], True), ("1", "'1'"), (2, 2)]
)
def test_attention_layers(layers, value):
    refusal(lambda: tiny_config(attention={}, attention_layers=layers), "attention_layers", value)


def test_no_attention_layer():
    refusal(lambda: tiny_config(attention={}, attention_layers=[]), "attention_layers=[]", "attention=None")


@pytest.mark.parametrize("value", ["dirichlet", True, 3], ids=repr)
def test_attention_of_a_wrong_type(value):
    refusal(lambda: tiny_config(attention=value), "attention", repr(value), error=(ValueError, TypeError))


@pytest.mark.parametrize(
    ("heads", "named"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, ("num_attention_heads=4", "num_key_value_heads=3")),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, ("num_attention_heads=2", "num_key_value_heads=4")),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ("32", "5")),
    ],
    ids=["groups", "more key heads", "width"],
)
def test_head_counts_that_do_not_divide(heads, named):
    refusal(lambda: tiny_config(attention={}, **heads), *named, error=Exception)


def test_row_longer_than_the_network_of_the_logits():
    """Named, with the way out; the mean pass reads no row, and the other kinds of network have no maximum."""
    too_long, named = prompt(1, 70), ("70 keys", "max_position_embeddings=64", "data_dependent='query'", "shorten")
    model = tiny_model(attention=attention_config(data_dependent=True))
    refusal(lambda: model(too_long, num_posterior_samples=2), *named)
    refusal(lambda: model(too_long, labels=too_long), *named)
    cache = model(too_long[:, :64], num_posterior_samples=2).past_key_values
    refusal(
        lambda: model(too_long[:, 64:65], past_key_values=cache, num_posterior_samples=2),
        "65 keys",
        "max_position_embeddings=64",
    )
    assert model(too_long).logits.isfinite().all()
    for data_dependent in (False, "query"):
        other = tiny_model(attention=attention_config(data_dependent=data_dependent))
        assert other(too_long, labels=too_long, num_posterior_samples=2).loss.isfinite()


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("options", [{"num_posterior_samples": 2}, {"labels": prompt()}, {"output_posteriors": True}])
def test_kernel_that_has_no_weights(implementation, options):
    model = tiny_model(attention=attention_config())
    model.config._attn_implementation = implementation
    refusal(lambda: model(prompt(), **options), implementation, "weights", "attn_implementation='sdpa'", "mean pass")


@pytest.fixture
def kernel():
    """A kernel of a name of its own; the shapes of the queries it was called with."""
    calls = []

    def attend(module, query, *args, **kwargs):
        calls.append(query.shape)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("counting_kernel", attend)
    AttentionMaskInterface.register("counting_kernel", sdpa_mask)
    yield calls
    AttentionInterface._global_mapping.pop("counting_kernel")
    AttentionMaskInterface._global_mapping.pop("counting_kernel")


@pytest.mark.parametrize("layers", [None, [1]])
def test_mean_pass_runs_whatever_kernel(kernel, layers):
    model = tiny_model(attention=attention_config(), attention_layers=layers)
    ids, mask = prompt(2, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8])
    expected = model(ids, attention_mask=mask).logits
    model.config._attn_implementation = "counting_kernel"
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    assert kernel == [(2, 4, 8, 8)] * 3
    assert model.generate(ids, attention_mask=mask, max_new_tokens=3).shape[0] == 2
    for options in ({"num_posterior_samples": 2}, {"labels": ids}):
        refusal(lambda options=options: model(ids, **options), "counting_kernel", "attn_implementation='sdpa'")


@pytest.mark.parametrize("options", [{}, {"num_posterior_samples": 2}, {"output_posteriors": True}], ids=str)
def test_fewer_posteriors_than_variational_attention_layers(options):
    model, labels = tiny_model(attention=attention_config(), attention_layers=[1, 2]), prompt()
    model(labels, labels=labels)
    model.model.layers[1].self_attn.posterior.tap = PosteriorTap()
    refusal(lambda: model(labels, labels=labels, **options), "(1, 'attention')", "KL", error=RuntimeError)


def test_attention_noise_of_a_wrong_shape():
    model = tiny_model(eve=None, attention=attention_config())
    with posterior_noise(lambda request: torch.zeros(1)):
        refusal(lambda: model(prompt(), num_posterior_samples=3), "(1,)", "attention of layer 0", "(6, 4, 6, 6, 2)")
