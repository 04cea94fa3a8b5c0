"""generate's per-token measures are those of a full forward pass over what it produced."""

import pytest
import torch
from integration_models import (
    PAD,
    RowNoise,
    assert_same_measures,
    endless,
    eve_config,
    measures_of_sequences,
    prompt,
    stock_llama,
    tiny_model,
)
from transformers import DynamicCache, StaticCache

from hf_variational import VariationalGenerateOutput, posterior_noise

NEW = 7
MEASURED = {"max_new_tokens": NEW, "output_uncertainty": True, "return_dict_in_generate": True}

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "num_return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "processors": {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
    "chunked prefill, static": {"prefill_chunk_size": 4, "cache_implementation": "static"},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.fixture(scope="module")
def model():
    return endless(tiny_model(eve=eve_config(noise="sequence")))


def generate(model, inputs, noise=None, **options):
    torch.manual_seed(0)
    options = {**MEASURED, "attention_mask": torch.ones_like(inputs), **options}
    with posterior_noise(noise or RowNoise()):
        return model.generate(inputs, **options)


@pytest.mark.parametrize("mode", MODES)
def test_measures_equal_a_full_forward(model, mode):
    out = generate(model, prompt(), num_posterior_samples=3, **MODES[mode])
    assert isinstance(out, VariationalGenerateOutput)
    assert out.uncertainty.mutual_information.shape == (out.sequences.shape[0], NEW)
    assert (out.uncertainty.mutual_information > 1e-4).all()
    # guidance runs its unconditional passes through forward too: they must not be taken for steps
    expected = measures_of_sequences(model, out.sequences, NEW, RowNoise(), num_posterior_samples=3)
    assert_same_measures(out.uncertainty, expected)


@pytest.mark.parametrize("noise", ["token", "sequence"])
@pytest.mark.parametrize("options", [{}, {"variational_layers": [1]}, {"variational_layers": [0, 2]}], ids=str)
def test_measures_for_every_split(noise, options):
    model = endless(tiny_model(eve=eve_config(noise=noise), **options))
    out = generate(model, prompt(), num_posterior_samples=2)
    expected = measures_of_sequences(model, out.sequences, NEW, RowNoise(), num_posterior_samples=2)
    assert_same_measures(out.uncertainty, expected)


@pytest.mark.parametrize(
    "eve", [{"latent_dim": 3, "pool": "sum_sqrtk"}, {"mean": "linear", "prior": "autoregressive"}]
)
def test_measures_for_other_neurons(eve):
    model = endless(tiny_model(eve=eve_config(noise="sequence", **eve)))
    out = generate(model, prompt(), num_posterior_samples=2)
    expected = measures_of_sequences(model, out.sequences, NEW, RowNoise(), num_posterior_samples=2)
    assert_same_measures(out.uncertainty, expected)


def test_one_sample_knows_no_disagreement(model):
    uncertainty = generate(model, prompt(), num_posterior_samples=1).uncertainty
    for name in ("mutual_information", "conditional_variance", "token_variance", "top1_flip_rate"):
        assert (uncertainty[name] == 0).all(), name
    assert (uncertainty.predictive_entropy > 0).all()


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_left_padding_changes_nothing(model, cache):
    ids = prompt()
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    plain = generate(model, ids, num_posterior_samples=3, **options)
    padded = torch.cat([torch.full((2, 3), PAD), ids], dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, -1)
    out = generate(model, padded, num_posterior_samples=3, attention_mask=mask, **options)
    assert torch.equal(out.sequences[:, 3:], plain.sequences)
    assert_same_measures(out.uncertainty, plain.uncertainty)


def test_rows_of_different_length_in_one_batch(model):
    long, short = prompt(1, 8), prompt(1, 5, seed=9)
    batch = torch.cat([long, torch.cat([torch.full((1, 3), PAD), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    both = generate(model, batch, num_posterior_samples=3, attention_mask=mask)
    for row, ids in enumerate([long, short]):
        alone = generate(model, ids, noise=RowNoise(rows=[row]), num_posterior_samples=3)
        assert torch.equal(both.sequences[row, 8:], alone.sequences[0, -NEW:])
        assert_same_measures(both.uncertainty.map(lambda v, row=row: v[row : row + 1]), alone.uncertainty)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_prompt_of_embeddings(model, options):
    ids = prompt()
    expected = generate(model, ids, num_posterior_samples=3, **options)
    torch.manual_seed(0)
    with posterior_noise(RowNoise()):
        embeddings = model.get_input_embeddings()(ids)
        out = model.generate(inputs_embeds=embeddings, num_posterior_samples=3, **MEASURED, **options)
    assert torch.equal(out.sequences, expected.sequences[:, 6:])
    assert_same_measures(out.uncertainty, expected.uncertainty)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_conversation_goes_on_from_its_cache(model, kind):
    ids, said = prompt(), prompt(2, 3, seed=8)
    cache = kind(config=model.config, **({"max_cache_len": 48} if kind is StaticCache else {}))
    first = generate(model, ids, num_posterior_samples=3, past_key_values=cache, max_new_tokens=4)
    second_prompt = torch.cat([first.sequences, said], dim=1)
    second = generate(model, second_prompt, num_posterior_samples=3, past_key_values=first.past_key_values)
    assert second.sequences.shape[1] == 6 + 4 + 3 + NEW
    expected = measures_of_sequences(model, second.sequences, NEW, RowNoise(), num_posterior_samples=3)
    assert_same_measures(second.uncertainty, expected)


def test_sequence_noise_lasts_a_conversation(model):
    cache = DynamicCache(config=model.config)
    source = RowNoise()
    first = generate(model, prompt(), noise=source, num_posterior_samples=2, past_key_values=cache)
    generate(model, first.sequences, noise=source, num_posterior_samples=2, past_key_values=cache)
    assert [request.layer for request in source.requests] == [0, 1, 2]


def test_cache_of_another_number_of_samples_is_refused(model):
    cache = generate(model, prompt(), num_posterior_samples=3).past_key_values
    longer = prompt(2, 20)
    with pytest.raises(ValueError, match=r"num_posterior_samples=3, this pass has 2.*start again"):
        generate(model, longer, num_posterior_samples=2, past_key_values=cache)


def test_scores_states_and_attentions_are_returned_as_usual():
    model = endless(tiny_model(attn_implementation="eager", variational_layers=[1, 2]))
    wanted = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), True)
    out = generate(model, prompt(), num_posterior_samples=3, **wanted)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    # embeddings, layer 0 and the split's own attention know one row a sequence
    assert [state.shape[0] for state in out.hidden_states[0]] == [2, 2, 6, 6]
    assert [weights.shape[0] for weights in out.attentions[0]] == [2, 2, 6]
    scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    torch.testing.assert_close(torch.logsumexp(out.logits[0], -1), torch.zeros(2), atol=1e-5, rtol=0)
    assert scores.shape == (2, NEW)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=str,
)
@pytest.mark.parametrize("eve", [eve_config(), None], ids=["eve", "twin"])
def test_mean_pass_generates_what_stock_llama_generates(options, eve):
    model, stock = tiny_model(eve=eve), stock_llama()
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if ".eve." not in name})
    arguments = {"max_new_tokens": 12, "attention_mask": torch.ones(2, 6, dtype=torch.long), **options}
    torch.manual_seed(0)
    expected = stock.generate(prompt(), **arguments)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt(), **arguments), expected)
