"""LoRA and EVE on one base: trained together, saved and loaded, merged one after the other."""

import copy

import pytest
import torch
import transformers as hf
from eve_families import TINY, answer, centered, given, stock, targets
from eve_reference import UnitNoise
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import adapted, config, move, posterior, sampled
from safetensors.torch import load_file

from hf_variational import posterior_noise
from hf_variational.retrofit.model import VariationalMixin

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config` attribute",
)
# LoRA on W_out as well as elsewhere
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "down_proj"],
    "opt": ["q_proj", "fc2"],
    "t5": ["q", "wo"],
    "bert-single": ["query", "output.dense"],
}


def lora(name: str, **options) -> LoraConfig:
    task = {"bert-single": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    return LoraConfig(**{"r": 2, "target_modules": TARGETS[name], "task_type": task, **options})


def both(name: str, eve_first: bool = False, layers="all", base=None, **options) -> tuple[PeftModel, PeftModel]:
    """The wrappers of LoRA and of EVE around one base, moved off their start."""
    base = stock(name) if base is None else base
    for method in ("eve", "lora") if eve_first else ("lora", "eve"):
        torch.manual_seed(2)
        if method == "eve":
            eve = get_peft_model(base, config(name, layers, **options), adapter_name="eve")
        else:
            low_rank = get_peft_model(base, lora(name), adapter_name="lora")
    move(eve, "eve")
    move_lora(base)
    return low_rank.eval(), eve.eval()


@torch.no_grad()
def move_lora(base) -> None:
    generator = torch.Generator().manual_seed(4)
    for key, parameter in base.named_parameters():
        if "lora_" in key:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", TARGETS)
def test_order_of_the_two_does_not_matter(name):
    """The update of W_out reads the sampled activation, as merging it into W_out has it."""
    wanted, outs = targets(name, given(name, padding=2)), []
    for eve_first in (False, True):
        low_rank, eve = both(name, eve_first)
        assert low_rank.get_base_model() is eve.get_base_model()
        outs += [sampled(model, name, output_uncertainty=True, **wanted) for model in (low_rank, eve)]
    for out in outs[1:]:
        assert torch.equal(answer(out), answer(outs[0])) and torch.equal(out.loss, outs[0].loss)
    assert outs[0].uncertainty.mutual_information.max() > 1e-4 and outs[0].kl > 0
    # LoRA is merged, and what EVE samples stays the same
    low_rank.merge_adapter(["lora"])
    merged = sampled(eve, name, **wanted)
    torch.testing.assert_close(answer(merged), answer(outs[0]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("eve_first", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-single"])
def test_both_are_trained_together(name, eve_first):
    low_rank, eve = both(name, eve_first, "last_quarter")
    inputs = given(name, padding=2)
    wanted = targets(name, inputs)
    for model in (low_rank, eve):
        base = model.get_base_model()
        trained = {key for key, parameter in base.named_parameters() if parameter.requires_grad}
        ours = {key for key in trained if "eve_posterior" in key}
        assert ours and any("lora_" in key for key in trained)
        assert all("lora_" in key or key in ours or "modules_to_save" in key for key in trained)
        before = {key: parameter.clone() for key, parameter in base.named_parameters()}
        optimizer = torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=0.003)
        losses = []
        for _ in range(4):
            loss = sampled(model.train(), name, 2, **wanted).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        for key, parameter in base.named_parameters():
            if "lora_" in key or key in ours:
                assert not torch.equal(parameter, before[key]), key
            elif "modules_to_save" not in key:
                assert torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("saver", ["lora", "eve"])
@pytest.mark.parametrize("eve_first", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_both_are_saved_and_loaded(name, eve_first, saver, tmp_path):
    plain = stock(name)
    low_rank, eve = both(name, eve_first, base=copy.deepcopy(plain))
    expected = answer(sampled(eve, name))
    (low_rank if saver == "lora" else eve).save_pretrained(tmp_path)
    names = {method: load_file(tmp_path / method / "adapter_model.safetensors").keys() for method in ("lora", "eve")}
    assert all("lora_" in key and "base_layer" not in key for key in names["lora"])
    assert all("eve_posterior" in key and "base_layer" not in key for key in names["eve"])
    assert len(names["eve"]) == len(posterior(eve, "eve"))
    for order in (("lora", "eve"), ("eve", "lora")):
        base = copy.deepcopy(plain)
        for method in order:
            loaded = PeftModel.from_pretrained(base, tmp_path / method, adapter_name=method)
        assert torch.equal(answer(sampled(loaded, name)), expected)
    # each alone, as if the other had never been there
    alone = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora")
    assert type(alone.get_base_model()) is type(plain)
    eve.get_base_model()
    only_eve = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "eve")
    assert torch.equal(answer(sampled(only_eve, name)), answer(sampled(adapted(name), name)))


def test_adapters_that_transformers_manages(tmp_path):
    _, eve = both("gpt2")
    expected = sampled(eve, "gpt2").logits
    eve.save_pretrained(tmp_path)
    model = stock("gpt2")
    for method in ("lora", "eve"):
        model.load_adapter(tmp_path / method, adapter_name=method)
    model.set_adapter(["lora", "eve"])
    assert torch.equal(sampled(model, "gpt2").logits, expected)
    model.set_adapter("lora")
    with pytest.raises(ValueError, match="nothing in this"):
        sampled(model, "gpt2")
    model.set_adapter("eve")
    assert torch.equal(sampled(model, "gpt2").logits, sampled(adapted("gpt2"), "gpt2").logits)
    # saved one by one, which is all that transformers can
    for method in ("lora", "eve"):
        model.set_adapter(method)
        model.save_pretrained(tmp_path / "again" / method)
    again = stock("gpt2")
    for method in ("lora", "eve"):
        again.load_adapter(tmp_path / "again" / method, adapter_name=method)
    again.set_adapter(["lora", "eve"])
    assert torch.equal(sampled(again, "gpt2").logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_disabling_disables_both(name):
    plain, inputs = stock(name), given(name, padding=2)
    expected = answer(plain(**inputs))
    for model in both(name, base=copy.deepcopy(plain)):
        with model.disable_adapter():
            assert torch.equal(answer(model(**inputs)), expected)
        assert not torch.allclose(answer(model(**inputs)), expected, atol=1e-3)
        sampled(model, name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("mean", ["identity", "gain"])
@pytest.mark.parametrize("eve_first", [False, True])
def test_merging_lora_leaves_eve(name, mean, eve_first):
    low_rank, eve = both(name, eve_first, eve=centered(mean=mean))
    inputs, expected = given(name, padding=2), answer(sampled(eve, name))
    mean_pass = answer(eve(**inputs))
    base = low_rank.merge_and_unload()
    assert isinstance(base, VariationalMixin) and not any("lora_" in key for key in base.state_dict())
    torch.testing.assert_close(answer(sampled(base, name)), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(answer(sampled(eve, name)), expected, atol=2e-5, rtol=1e-4)
    back = eve.merge_and_unload()
    assert type(back) is TINY[name].model and back.state_dict().keys() == stock(name).state_dict().keys()
    torch.testing.assert_close(answer(back(**inputs)), mean_pass, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("mean", ["identity", "gain"])
def test_merging_eve_merges_both(name, mean):
    """As peft has it: unloading is of all adapters."""
    _, eve = both(name, eve=centered(mean=mean))
    inputs = given(name, padding=2)
    mean_pass = answer(eve(**inputs))
    back = eve.merge_and_unload()
    assert type(back) is TINY[name].model and back.state_dict().keys() == stock(name).state_dict().keys()
    torch.testing.assert_close(answer(back(**inputs)), mean_pass, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eve_first", [False, True])
def test_lora_on_experts(eve_first, tmp_path):
    """LoRA of parameters stands around the experts, which EVE is in."""
    plain, base, wrappers = stock("mixtral"), stock("mixtral"), {}
    low_rank = LoraConfig(
        r=2, target_modules=[], target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    )
    for method in ("eve", "lora") if eve_first else ("lora", "eve"):
        torch.manual_seed(2)
        settings = config("mixtral") if method == "eve" else low_rank
        wrappers[method] = get_peft_model(base, settings, adapter_name=method)
    eve = wrappers["eve"]
    move(eve, "eve")
    move_lora(base.eval())
    inputs, expected = given("mixtral", padding=2), sampled(eve, "mixtral").logits
    assert not torch.equal(expected, sampled(adapted("mixtral"), "mixtral").logits)
    eve.save_pretrained(tmp_path)
    assert not any("base_layer" in key for key in load_file(tmp_path / "eve" / "adapter_model.safetensors"))
    again = copy.deepcopy(plain)
    for method in ("lora", "eve"):
        loaded = PeftModel.from_pretrained(again, tmp_path / method, adapter_name=method)
    assert torch.equal(sampled(loaded, "mixtral").logits, expected)
    with torch.no_grad():
        mean_pass = eve(**inputs).logits
        back = eve.merge_and_unload()
        assert type(back) is type(plain) and back.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(back(**inputs).logits, mean_pass, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("eve_first", [False, True])
def test_family_that_is_not_in_the_table(eve_first):
    """W_out is found by looking, whether LoRA is around it or not."""
    options = dict(TINY["llama"].options)
    plain = hf.GraniteForCausalLM(hf.GraniteConfig(**options)).eval()
    base, wrappers = copy.deepcopy(plain), {}
    for method in ("eve", "lora") if eve_first else ("lora", "eve"):
        settings = config("llama") if method == "eve" else lora("llama", target_modules="all-linear")
        wrappers[method] = get_peft_model(base, settings, adapter_name=method)
    move(wrappers["eve"], "eve")
    move_lora(base)
    out = sampled(wrappers["eve"], "llama", output_uncertainty=True)
    assert out.uncertainty.mutual_information.max() > 1e-4
    assert type(wrappers["eve"].unload()) is type(plain)


def test_generate_with_both():
    low_rank, eve = both("llama", layers="last_quarter")
    prompt, outs = given("llama")["input_ids"], []
    for model in (low_rank, eve):
        with posterior_noise(UnitNoise()):
            outs.append(
                model.generate(
                    input_ids=prompt,
                    max_new_tokens=4,
                    num_posterior_samples=3,
                    output_uncertainty=True,
                    return_dict_in_generate=True,
                )
            )
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert outs[0].uncertainty.mutual_information.max() > 1e-4
    assert torch.equal(outs[0].uncertainty.mutual_information, outs[1].uncertainty.mutual_information)


class TestRefused:
    def test_same_name(self):
        base = stock("gpt2")
        low_rank = get_peft_model(base, lora("gpt2"))
        with pytest.raises(ValueError, match="adapter 'default' of another method.*adapter_name='posterior'"):
            get_peft_model(base, config("gpt2"))
        # and LoRA is as it was
        assert isinstance(low_rank.peft_config["default"], LoraConfig) and type(base) is TINY["gpt2"].model
        low_rank(**given("gpt2"))

    def test_wrapped_base(self):
        low_rank = get_peft_model(stock("gpt2"), lora("gpt2"))
        with pytest.raises(ValueError, match=r"get_peft_model\(model.get_base_model\(\)"):
            get_peft_model(low_rank, config("gpt2"), adapter_name="eve")
        assert list(low_rank.peft_config) == ["default"]

    def test_deleting_the_others_adapter(self):
        low_rank, eve = both("gpt2")
        with pytest.raises(ValueError, match="'lora' has a LoraConfig"):
            eve.delete_adapter("lora")
        expected = sampled(eve, "gpt2").logits
        assert torch.equal(sampled(low_rank, "gpt2").logits, expected)

    def test_bad_adapter_leaves_no_trace(self):
        base = stock("gpt2")
        low_rank = get_peft_model(base, lora("gpt2"), adapter_name="lora")
        expected = low_rank(**given("gpt2")).logits
        with pytest.raises(ValueError, match="layers names 17"):
            get_peft_model(base, config("gpt2", [17]), adapter_name="eve")
        assert list(low_rank.peft_config) == ["lora"] and type(base) is TINY["gpt2"].model
        assert torch.equal(low_rank(**given("gpt2")).logits, expected)
