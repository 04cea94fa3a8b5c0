"""LoRA from peft on top: train, save, load, generate with posterior samples."""

import pytest
import torch
from integration_models import RowNoise, assert_same_measures, endless, prompt, tiny_model
from transformers import AutoModelForCausalLM

from hf_variational import posterior_noise

peft = pytest.importorskip("peft")

MEASURED = {
    "max_new_tokens": 5,
    "num_posterior_samples": 3,
    "output_uncertainty": True,
    "return_dict_in_generate": True,
    "eos_token_id": None,
}


@pytest.fixture
def base(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    return endless(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), tmp_path / "base"


def lora(**options):
    return peft.LoraConfig(
        **{
            "r": 2,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "task_type": "CAUSAL_LM",
            **options,
        }
    )


def train(model, steps: int = 3):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    labels = prompt()
    losses = []
    for _ in range(steps):
        with posterior_noise(RowNoise()):
            loss = model(input_ids=labels, labels=labels, num_posterior_samples=2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def generate(model):
    with posterior_noise(RowNoise()):
        return model.generate(input_ids=prompt(), **MEASURED)


def assert_generates_the_same(model, expected):
    out = generate(model)
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_measures(out.uncertainty, expected.uncertainty)


def neurons(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".eve." in name}


def test_lora_trains_saves_and_loads(base, tmp_path):
    model, directory = base
    before = neurons(model)
    adapted = peft.get_peft_model(model, lora())
    untrained = generate(adapted)
    losses = train(adapted)
    assert losses[-1] < losses[0]
    # nothing but the adapter trains: the neurons are frozen where the config does not name them
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    for name, value in neurons(adapted).items():
        assert torch.equal(value, before[name.removeprefix("base_model.model.")])
    expected = generate(adapted)
    assert not torch.equal(expected.uncertainty.predictive_entropy, untrained.uncertainty.predictive_entropy)
    adapted.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    assert_generates_the_same(loaded.eval(), expected)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_generates_the_same(auto.eval(), expected)


def test_merged_adapter_is_a_checkpoint(base, tmp_path):
    adapted = peft.get_peft_model(base[0], lora())
    train(adapted)
    with torch.no_grad(), posterior_noise(RowNoise()):
        expected = adapted(prompt(), num_posterior_samples=3).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad(), posterior_noise(RowNoise()):
        torch.testing.assert_close(loaded(prompt(), num_posterior_samples=3).logits, expected, atol=2e-5, rtol=1e-4)


def test_neurons_saved_with_the_adapter(base, tmp_path):
    model, directory = base
    before = neurons(model)
    adapted = peft.get_peft_model(model, lora(modules_to_save=["eve"]))
    losses = train(adapted)
    assert losses[-1] < losses[0]
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad and ".eve." in name}
    assert len(trained) == len(before)
    changed = [n for n, p in adapted.named_parameters() if n in trained and not torch.equal(p, before[plain_name(n)])]
    assert len(changed) == len(before)
    with posterior_noise(RowNoise()):
        out = adapted(input_ids=prompt(), labels=prompt(), num_posterior_samples=2, output_posteriors=True)
    assert sorted(out.posteriors) == [0, 1, 2]
    expected = generate(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    assert_generates_the_same(loaded.eval(), expected)


def plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def test_neurons_replaced_after_a_pass_do_not_lose_their_kl(base):
    model = base[0]
    labels = prompt()
    model(labels, labels=labels)  # the tape listens to the modules that are there now
    adapted = peft.get_peft_model(model, lora(modules_to_save=["eve"]))
    with posterior_noise(RowNoise()):
        out = adapted(input_ids=labels, labels=labels, num_posterior_samples=2)
    assert out.kl > 0
    out.loss.backward()
    for name, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


def test_every_linear_layer(base):
    adapted = peft.get_peft_model(base[0], lora(target_modules="all-linear"))
    wrapped = {name.split(".lora_")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert wrapped == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    losses = train(adapted)
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_under_an_adapter(base):
    adapted = peft.get_peft_model(base[0], lora(modules_to_save=["eve"])).train()
    labels = prompt()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            adapted.gradient_checkpointing_enable()
        adapted.zero_grad()
        with posterior_noise(RowNoise()):
            out = adapted(input_ids=labels, labels=labels, num_posterior_samples=2, kl_weight=1.0, use_cache=False)
        out.loss.backward()
        grads.append({name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient)


def test_adapter_added_by_transformers(base, tmp_path):
    model, directory = base
    model.add_adapter(lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    expected = generate(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    loaded.load_adapter(tmp_path / "adapter")
    assert_generates_the_same(endless(loaded), expected)
