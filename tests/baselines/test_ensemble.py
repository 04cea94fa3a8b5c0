"""Ensembles against averaging the members by hand."""

import copy

import pytest
import torch
import transformers as hf
from baseline_models import SAMPLES, VOCAB, ensemble, given, greedy_by_hand, mean_probability, stock, with_positions
from hypothesis import given as each
from hypothesis import settings
from hypothesis import strategies as st

from hf_variational import EVEConfig, variationalize
from hf_variational.baselines import EnsembleConfig, EnsembleForCausalLM

FAMILIES = ["llama", "gpt2"]


def members(family: str, count: int = SAMPLES, **options) -> list:
    return [stock(family, seed, **options) for seed in range(count)]


def mixed() -> list:
    return [stock("llama", 0), stock("gpt2", 1, n_layer=1)]


def average(models):
    return lambda inputs: mean_probability([model(**inputs, use_cache=False).logits for model in models])


@pytest.mark.parametrize("family", [*FAMILIES, "mixed"])
@torch.no_grad()
def test_forward_is_the_average_of_the_members(family):
    models = mixed() if family == "mixed" else members(family)
    inputs = with_positions(given())
    out = EnsembleForCausalLM.from_members(models)(**inputs, output_uncertainty=True, output_sample_logits=True)
    singles = [model(**inputs).logits.double().log_softmax(-1) for model in models]
    torch.testing.assert_close(out.logits.double(), mean_probability(singles), rtol=1e-5, atol=1e-5)
    for number, single in enumerate(singles):
        torch.testing.assert_close(out.sample_logits[:, number].double(), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "mixed"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_generation_is_the_average_of_the_members(family, cache):
    models = mixed() if family == "mixed" else members(family)
    tokens, chosen_from = greedy_by_hand(average(models), given(), 5)
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {"use_cache": False}
    result = EnsembleForCausalLM.from_members(models).generate(
        **given(),
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_logits=True,
        output_uncertainty=True,
        **options,
    )
    assert torch.equal(result.sequences, tokens)
    torch.testing.assert_close(torch.stack(result.logits, 1).double(), chosen_from, rtol=1e-4, atol=1e-4)
    entropy = -(chosen_from.exp() * chosen_from).sum(-1)
    torch.testing.assert_close(result.uncertainty.predictive_entropy.double(), entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_as_many_beams_as_tokens_find_the_most_probable_pair(family):
    models = members(family)
    prompt = given()
    result = EnsembleForCausalLM.from_members(models).generate(
        **prompt, max_new_tokens=2, num_beams=VOCAB, return_dict_in_generate=True, output_uncertainty=True
    )
    log_p = average(models)
    first = log_p(with_positions(prompt))[:, -1]
    every = torch.arange(VOCAB).repeat(2)[:, None]
    longer = {name: value.repeat_interleave(VOCAB, 0) for name, value in prompt.items()}
    longer["input_ids"] = torch.cat([longer["input_ids"], every], 1)
    longer["attention_mask"] = torch.cat([longer["attention_mask"], torch.ones_like(every)], 1)
    second = log_p(with_positions(longer))[:, -1].unflatten(0, (2, VOCAB))
    best = (first[:, :, None] + second).flatten(1).argmax(-1)
    assert torch.equal(result.sequences[:, -2:], torch.stack([best // VOCAB, best % VOCAB], 1))
    chosen = second[torch.arange(2), best // VOCAB]
    torch.testing.assert_close(
        result.uncertainty.predictive_entropy[:, 1].double(), -(chosen.exp() * chosen).sum(-1), rtol=1e-4, atol=1e-4
    )


def test_a_sliding_window_longer_and_shorter_than_the_prompt():
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"intermediate_size": 40, "vocab_size": VOCAB, "sliding_window": 4, "initializer_range": 0.25}
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(hf.MistralForCausalLM(hf.MistralConfig(**settings, eos_token_id=None)).eval())
    prompt = given(padding=0, length=3)
    tokens, _ = greedy_by_hand(average(models), prompt, 6)
    assert torch.equal(EnsembleForCausalLM.from_members(models).generate(**prompt, max_new_tokens=6), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_identical_members_have_no_mutual_information(family):
    one = stock(family)
    model = EnsembleForCausalLM.from_members([copy.deepcopy(one) for _ in range(4)])
    out = model(**given(), output_uncertainty=True)
    measures = out.uncertainty
    assert measures.mutual_information.abs().max() < 1e-6 and measures.conditional_variance.abs().max() < 1e-10
    assert measures.top1_flip_rate.max() == 0
    torch.testing.assert_close(out.logits, one(**given()).logits.log_softmax(-1))


@settings(max_examples=20, deadline=None)
@each(order=st.permutations(range(SAMPLES)), seed=st.integers(0, 10**6))
def test_the_order_of_the_members_changes_nothing(order, seed):
    models = members("llama")
    inputs = given(seed=seed)
    out = EnsembleForCausalLM.from_members(models)(**inputs, output_uncertainty=True)
    other = EnsembleForCausalLM.from_members([models[number] for number in order])(**inputs, output_uncertainty=True)
    torch.testing.assert_close(other.logits, out.logits)
    torch.testing.assert_close(other.uncertainty.mutual_information, out.uncertainty.mutual_information)


def test_fewer_samples_are_the_first_members_and_more_are_refused():
    models = members("gpt2", 3)
    model = EnsembleForCausalLM.from_members(models)
    two = EnsembleForCausalLM.from_members(copy.deepcopy(models[:2]))(**given()).logits
    assert torch.equal(model(**given(), num_posterior_samples=2).logits, two)
    assert torch.equal(model(**given()).logits, model(**given(), num_posterior_samples=3).logits)
    with pytest.raises(ValueError, match="num_posterior_samples=4, but this ensemble has 3 members"):
        model(**given(), num_posterior_samples=4)
    with pytest.raises(ValueError, match="num_posterior_samples=4, but this ensemble has 3 members"):
        model.generate(**given(), max_new_tokens=2, num_posterior_samples=4)


@pytest.mark.parametrize("family", [*FAMILIES, "tied", "mixed"])
def test_one_folder_holds_all_members(family, tmp_path):
    options = {"tie_word_embeddings": True} if family == "tied" else {}
    models = mixed() if family == "mixed" else members("llama" if family == "tied" else family, **options)
    model = EnsembleForCausalLM.from_members(models)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is EnsembleForCausalLM and not any(report.values())
    assert torch.equal(again(**given()).logits, model(**given()).logits)
    assert again.generation_config.num_posterior_samples == len(models)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())
    assert torch.equal(again.generate(**given(), max_new_tokens=3), model.generate(**given(), max_new_tokens=3))
    eager = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.bfloat16)
    assert {one.config._attn_implementation for one in eager.members} == {"eager"}
    assert {parameter.dtype for parameter in eager.parameters()} == {torch.bfloat16}


def test_checkpoints_are_loaded(tmp_path):
    models = members("llama", 2)
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    loaded = EnsembleForCausalLM.from_members([tmp_path / "0", str(tmp_path / "1")])
    inputs = with_positions(given())
    expected = mean_probability([model(**inputs).logits for model in models])
    torch.testing.assert_close(loaded(**inputs).logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_variational_member_takes_part_with_its_mean_pass():
    models = [variationalize(one, eve=EVEConfig()) for one in members("llama", 2)]
    inputs = with_positions(given())
    model = EnsembleForCausalLM.from_members(models)
    expected = mean_probability([one(**inputs).logits for one in members("llama", 2)])
    torch.testing.assert_close(model(**inputs).logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_member():
    model = ensemble("llama").train()
    model(**given(), labels=given()["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one member"):
        EnsembleForCausalLM.from_members([])
    with pytest.raises(ValueError, match=r"one vocab_size, got \[32, 48\]"):
        EnsembleForCausalLM.from_members([stock("llama"), stock("gpt2", vocab_size=32)])
    one = stock("llama")
    with pytest.raises(ValueError, match="The same model is given twice"):
        EnsembleForCausalLM.from_members([one, one])
    t5 = hf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="got an encoder-decoder"):
        EnsembleConfig(members=[t5.to_dict()])
    with pytest.raises(ValueError, match="resize each of `members`"):
        ensemble("llama").resize_token_embeddings(64)
    with pytest.raises(ValueError, match="offloaded cache"):
        ensemble("llama")._caches(_Offloading(), SAMPLES)


class _Offloading:
    offloading = True
