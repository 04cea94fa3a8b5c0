"""LoRA ensembles against switching adapters by hand, and PVeRA against a loop with the same noise."""

import pytest
import torch
from baseline_models import (
    SAMPLES,
    adapted,
    dropped,
    given,
    greedy_by_hand,
    mean_probability,
    probabilistic,
    stock,
    with_positions,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.pvera import PveraLayer

from hf_variational.baselines import lora_ensemble, pvera_samples

NAMES = ("first", "second", "third")
each_family = pytest.mark.parametrize("family", ["llama", "gpt2"])


def switched(model, inputs, names=NAMES, **options):
    """The logits of each adapter, which is switched to by hand."""
    logits = []
    for name in names:
        model.set_adapter(name)
        logits.append(model(**inputs, **options).logits)
    return logits


@each_family
@torch.no_grad()
def test_a_lora_ensemble_is_switching_adapters_by_hand(family):
    inputs = with_positions(given())
    singles = switched(adapted(family), inputs)
    out = lora_ensemble(adapted(family))(**inputs, output_sample_logits=True)
    for number, single in enumerate(singles):
        torch.testing.assert_close(out.sample_logits[:, number], single.log_softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.logits.double(), mean_probability(singles), rtol=1e-4, atol=1e-5)


@each_family
def test_a_lora_ensemble_generates_what_switching_adapters_by_hand_does(family):
    apart = adapted(family)
    log_p = lambda inputs: mean_probability(switched(apart, inputs, use_cache=False))  # noqa: E731
    tokens, chosen_from = greedy_by_hand(log_p, given(), 5)
    result = lora_ensemble(adapted(family)).generate(
        **given(), max_new_tokens=5, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(result.sequences, tokens)
    torch.testing.assert_close(torch.stack(result.logits, 1).double(), chosen_from, rtol=1e-4, atol=1e-4)
    beams = lora_ensemble(adapted(family)).generate(**given(), max_new_tokens=4, num_beams=3)
    uncached = lora_ensemble(adapted(family)).generate(**given(), max_new_tokens=4, num_beams=3, use_cache=False)
    assert torch.equal(beams, uncached)


@torch.no_grad()
def test_chosen_adapters_fewer_of_them_and_the_active_one_alone():
    apart, inputs = adapted("llama"), with_positions(given())
    model = lora_ensemble(adapted("llama"), ["third", "first"])
    expected = switched(apart, inputs, ["third", "first"])
    torch.testing.assert_close(model(**inputs).logits.double(), mean_probability(expected), rtol=1e-4, atol=1e-5)
    one = model(**inputs, num_posterior_samples=1).logits
    torch.testing.assert_close(one, expected[0].log_softmax(-1), rtol=1e-4, atol=1e-5)
    model.set_adapter("second")
    alone = model(**inputs, num_posterior_samples=0).logits
    torch.testing.assert_close(alone, switched(apart, inputs, ["second"])[0])
    with pytest.raises(ValueError, match="num_posterior_samples=3, but this ensemble has 2 adapters"):
        model(**inputs, num_posterior_samples=3)


def test_a_head_saved_with_each_adapter_takes_part(tmp_path):
    model = adapted("llama", modules_to_save=["lm_head"])
    with torch.no_grad():
        for number, name in enumerate(NAMES):
            model.get_base_model().lm_head.modules_to_save[name].weight.mul_(1 + number)
    inputs = with_positions(given())
    with torch.no_grad():
        singles = switched(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(stock("llama"), tmp_path / "first", adapter_name="first")
    for name in NAMES[1:]:
        again.load_adapter(tmp_path / name, adapter_name=name)
    out = lora_ensemble(again.eval())(**inputs)
    torch.testing.assert_close(out.logits.double(), mean_probability(singles), rtol=1e-4, atol=1e-5)


def test_a_lora_ensemble_trains_as_peft_does():
    model = lora_ensemble(adapted("llama")).train()
    model(**given(), labels=given()["input_ids"]).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(".first." in name for name in trained)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model(**given(), num_posterior_samples=2)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert type(model.unload()) is not type(stock("llama"))


def test_lora_ensembles_of_bad_input_are_refused():
    with pytest.raises(ValueError, match="needs a PeftModel with LoRA adapters, got LlamaForCausalLM"):
        lora_ensemble(stock("llama"))
    with pytest.raises(ValueError, match="needs a PeftModel with LoRA adapters"):
        lora_ensemble(probabilistic("llama"))
    with pytest.raises(ValueError, match=r"names \['fourth'\]"):
        lora_ensemble(adapted("llama"), ["first", "fourth"])
    with pytest.raises(ValueError, match="names nothing"):
        lora_ensemble(adapted("llama"), [])
    with pytest.raises(ValueError, match=r"\['first', 'second', 'third'\] use DoRA"):
        lora_ensemble(adapted("llama", use_dora=True))
    merged = adapted("llama")
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        lora_ensemble(merged)
    with pytest.raises(ValueError, match="posterior samples of its own"):
        lora_ensemble(get_peft_model(dropped("llama"), LoraConfig(target_modules=["q_proj"])))


class RowNoise:
    """Stands in for `torch.randn_like`: noise for each call and row."""

    def __init__(self, rows: list[int], table_rows: int):
        self.rows, self.table_rows, self.calls = rows, table_rows, 0

    def __call__(self, like, **options):
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        return torch.randn(self.table_rows, *like.shape[1:], generator=generator)[self.rows]


@each_family
@torch.no_grad()
def test_pvera_rows_are_the_naive_loop_with_the_same_noise(family, monkeypatch):
    inputs, total = with_positions(given()), 2 * SAMPLES
    model, naive = pvera_samples(probabilistic(family)), probabilistic(family, sample_at_inference=True)
    monkeypatch.setattr(torch, "randn_like", RowNoise(list(range(total)), total))
    out = model(**inputs, num_posterior_samples=SAMPLES, output_sample_logits=True)
    for sample in range(SAMPLES):
        monkeypatch.setattr(torch, "randn_like", RowNoise([sample, SAMPLES + sample], total))
        logits = naive(**inputs).logits
        torch.testing.assert_close(out.sample_logits[:, sample], logits.log_softmax(-1), rtol=1e-4, atol=1e-5)


@each_family
@torch.no_grad()
def test_pvera_without_samples_is_the_mean(family, monkeypatch):
    inputs = with_positions(given())
    plain = probabilistic(family)(**inputs).logits
    model = pvera_samples(probabilistic(family, sample_at_inference=True))
    assert torch.equal(model(**inputs, num_posterior_samples=0).logits, plain)
    monkeypatch.setattr(torch, "randn_like", lambda like, **options: torch.zeros_like(like))
    out = model(**inputs, num_posterior_samples=SAMPLES, output_uncertainty=True)
    torch.testing.assert_close(out.logits, plain.log_softmax(-1), rtol=1e-4, atol=1e-5)
    assert out.uncertainty.mutual_information.max() < 1e-6
    monkeypatch.undo()
    layers = [module for module in model.modules() if isinstance(module, PveraLayer)]
    assert layers and not any(value for layer in layers for value in layer.sample_at_inference.values())


def test_pvera_draws_in_train_mode_as_in_peft():
    model, naive = pvera_samples(probabilistic("llama")).train(), probabilistic("llama").train()
    labels = given()["input_ids"]
    torch.manual_seed(1)
    expected = naive(**given(), labels=labels).loss
    torch.manual_seed(1)
    loss = model(**given(), labels=labels).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_pvera_samples_of_bad_input_are_refused():
    with pytest.raises(ValueError, match="needs a PeftModel with PVeRA adapters, got LlamaForCausalLM"):
        pvera_samples(stock("llama"))
    with pytest.raises(ValueError, match="needs a PeftModel with PVeRA adapters"):
        pvera_samples(adapted("llama"))
    with pytest.raises(ValueError, match=r"\['default'\] have a generator_seed"):
        pvera_samples(probabilistic("llama", generator_seed=3))
    model = pvera_samples(probabilistic("llama"))
    with model.disable_adapter(), pytest.raises(ValueError, match="merged or disabled"):
        model(**given(), num_posterior_samples=2)
