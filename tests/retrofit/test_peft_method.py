"""An EVE adapter computes what a retrofit computes: its mean pass is the base, its samples are the retrofit's."""

import copy

import pytest
import torch
from eve_families import TINY, answer, centered, given, stock, targets
from eve_reference import UnitNoise
from peft import get_peft_model
from peft_models import CAUSAL, NAMES, adapted, config, posterior, sampled, twin
from transformers import PreTrainedModel

from hf_variational import posterior_noise
from hf_variational.retrofit.model import VariationalMixin
from hf_variational.retrofit.peft.layer import eve_layers

MEASURED = {"num_posterior_samples": 3, "output_uncertainty": True, "return_dict_in_generate": True}
GENERATED = {"max_new_tokens": 4, "do_sample": False}


class TestPass:
    @torch.no_grad()
    @pytest.mark.parametrize("name", NAMES)
    def test_mean_pass_is_the_base_bit_for_bit(self, name):
        plain, inputs = stock(name), given(name, padding=2)
        expected = answer(plain(**inputs))
        model = adapted(name, base=copy.deepcopy(plain))
        assert torch.equal(answer(model(**inputs)), expected)
        with model.disable_adapter():
            assert torch.equal(answer(model(**inputs)), expected)
        assert type(model.get_base_model()) is not type(plain)
        assert isinstance(model.get_base_model(), (VariationalMixin, type(plain)))
        assert type(model.config) is type(plain.config)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("layers", ["all", [1]])
    def test_samples_loss_and_kl_are_the_retrofits(self, name, layers):
        plain = stock(name)
        model = adapted(name, layers, base=copy.deepcopy(plain))
        other = twin(model, plain)
        wanted = targets(name, given(name, padding=2))
        ours = sampled(model, name, output_uncertainty=True, **wanted)
        theirs = sampled(other, name, output_uncertainty=True, **wanted)
        assert ours.uncertainty.mutual_information.max() > 1e-3
        torch.testing.assert_close(answer(ours), answer(theirs), atol=1e-5, rtol=1e-5)
        for key in ("loss", "nll", "kl", "kl_per_layer"):
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-4, rtol=1e-5)
        assert ours.kl > 0 and torch.equal(ours.loss, ours.nll + 0.1 * ours.kl)
        assert len(ours.kl_per_layer) == (TINY[name].depth if layers == "all" else 1)

    @torch.no_grad()
    def test_certain_samples_are_the_mean_pass(self):
        model, inputs = adapted("llama"), given("llama")
        for (_, key), tensor in posterior(model).items():
            tensor.fill_(-12.0 if key == "log_scale" else 0.0)
        expected = model(**inputs).logits.log_softmax(-1)
        actual = model(**inputs, num_posterior_samples=3).logits
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("objective", ["elbo", "mc_nll"])
    def test_objective_of_the_adapter(self, objective):
        plain = stock("gpt2")
        model = adapted("gpt2", base=copy.deepcopy(plain), objective=objective, num_posterior_samples=2)
        other, inputs = twin(model, plain).train(), given("gpt2", padding=2)
        with posterior_noise(UnitNoise()):  # and how many samples train mode draws
            ours = model.train()(**inputs, **targets("gpt2", inputs))
        theirs = sampled(other, "gpt2", samples=2, **targets("gpt2", inputs))
        torch.testing.assert_close(ours.loss, theirs.loss)

    def test_samples_below_the_first_layer_of_the_adapter_are_computed_once(self):
        model, seen = adapted("llama", "last"), []
        for layer in model.get_base_model().model.layers:
            layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
        sampled(model, "llama", samples=5)
        assert seen == [2, 2, 10]


class TestTraining:
    @pytest.mark.parametrize("name", NAMES)
    def test_gradient_reaches_every_parameter_of_the_adapter_and_none_of_the_base(self, name):
        model = adapted(name).train()
        ours = {id(tensor) for tensor in posterior(model).values() if tensor.requires_grad}
        sampled(model, name, 2, **targets(name, given(name, padding=2))).loss.backward()
        assert ours
        for key, parameter in model.named_parameters():
            is_head = "modules_to_save" in key  # of a classifier, as peft has it
            assert parameter.requires_grad == (id(parameter) in ours or is_head), key
            if id(parameter) in ours:
                assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, key
            elif not is_head:
                assert parameter.grad is None, key

    @pytest.mark.parametrize("mean", ["gain", "linear"])
    def test_gradient_reaches_learned_means(self, mean):
        model = adapted("gpt2", eve=centered(mean=mean, prior="empirical")).train()
        sampled(model, "gpt2", 2, **targets("gpt2", given("gpt2"))).loss.backward()
        for tensor in posterior(model).values():
            assert tensor.grad.abs().max() > 0

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
    @pytest.mark.parametrize("before", [True, False])
    def test_gradient_checkpointing(self, before):
        wanted, grads = targets("llama", given("llama", padding=2)), []
        for checkpointed in (False, True):
            base = stock("llama")
            if checkpointed and before:
                base.gradient_checkpointing_enable()
            model = adapted("llama", base=base).train()
            if checkpointed and not before:
                model.gradient_checkpointing_enable()
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == checkpointed
            sampled(model, "llama", 2, use_cache=False, **wanted).loss.backward()
            grads.append({key: tensor.grad for key, tensor in posterior(model).items() if tensor.requires_grad})
        for key, grad in grads[0].items():
            torch.testing.assert_close(grads[1][key], grad)

    def test_data_parallel(self, tmp_path):
        """Every parameter that trains takes part in every pass, which a second step of DDP insists on."""
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = torch.nn.parallel.DistributedDataParallel(adapted("gpt2", "last_quarter").train())
            for _ in range(2):
                sampled(wrapped, "gpt2", 2, **targets("gpt2", given("gpt2"))).loss.backward()
        finally:
            torch.distributed.destroy_process_group()


class TestGenerate:
    @pytest.mark.parametrize("name", [*CAUSAL, "t5"])
    @pytest.mark.parametrize("beams", [1, 2])
    def test_generate_with_samples_is_the_retrofits(self, name, beams):
        plain = stock(name)
        model = adapted(name, base=copy.deepcopy(plain))
        prompt = {key: given(name, padding=2)[key] for key in ("input_ids", "attention_mask")}
        outs = []
        for one in (model, twin(model, plain)):
            with posterior_noise(UnitNoise()):
                outs.append(one.generate(**prompt, **GENERATED, **MEASURED, num_beams=beams))
        assert torch.equal(outs[0].sequences, outs[1].sequences)
        ours, theirs = (out.uncertainty.mutual_information for out in outs)
        assert ours.max() > 1e-4
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["gpt2", "t5"])
    def test_generate_without_samples_is_the_bases(self, name):
        plain = stock(name)
        prompt = {key: given(name)[key] for key in ("input_ids", "attention_mask")}
        expected = plain.generate(**prompt, **GENERATED)
        model = adapted(name, base=plain)
        assert torch.equal(model.generate(**prompt, **GENERATED), expected)
        with model.disable_adapter():
            assert torch.equal(model.generate(**prompt, **GENERATED), expected)


class TestDisabled:
    def test_samples_of_a_disabled_adapter_are_refused(self):
        model, inputs = adapted("gpt2"), given("gpt2")
        with model.disable_adapter():
            with pytest.raises(ValueError, match="enable the adapter"):
                model(**inputs, num_posterior_samples=2)
            assert "kl" not in model(**inputs, **targets("gpt2", inputs))
        assert "kl" in model(**inputs, **targets("gpt2", inputs))
        assert torch.equal(sampled(model, "gpt2").logits, sampled(adapted("gpt2"), "gpt2").logits)

    def test_train_mode_of_a_disabled_adapter_trains_the_base_model(self):
        model, inputs = adapted("gpt2").train(), given("gpt2")
        with model.disable_adapter():
            assert "kl" not in model(**inputs, **targets("gpt2", inputs))

    def test_merged_adapter_is_the_mean_pass_until_it_is_unmerged(self):
        model = adapted("llama")
        before = sampled(model, "llama").logits
        model.merge_adapter()
        with pytest.raises(ValueError, match="nothing in this"):
            sampled(model, "llama")
        model.unmerge_adapter()
        assert torch.equal(sampled(model, "llama").logits, before)
        with pytest.raises(ValueError, match="merge_and_unload"):
            adapted("llama", eve=centered(mean="gain")).merge_adapter()


class TestUnload:
    @torch.no_grad()
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("mean", ["identity", "gain"])
    def test_merge_and_unload_is_the_mean_pass_in_the_stock_class(self, name, mean):
        plain, inputs = stock(name), given(name, padding=2)
        model = adapted(name, base=copy.deepcopy(plain), eve=centered(mean=mean))
        expected, base = answer(model(**inputs)), model.get_base_model()
        assert torch.equal(expected, answer(plain(**inputs))) == (mean == "identity")
        back = model.merge_and_unload()
        assert back is base
        assert_stock(back, plain)
        if mean == "identity":
            assert torch.equal(answer(back(**inputs)), expected)
        torch.testing.assert_close(answer(back(**inputs)), expected, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["gpt2", "bert-masked"])
    def test_affine_mean_is_merged_where_the_projection_has_a_bias(self, name):
        model, inputs = adapted(name, eve=centered(mean="linear")), given(name, padding=2)
        expected = answer(model(**inputs))
        torch.testing.assert_close(answer(model.merge_and_unload()(**inputs)), expected, atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_mean_that_the_stock_class_cannot_compute_is_refused_and_nothing_changes(self):
        model, inputs = adapted("llama", eve=centered(mean="linear")), given("llama", padding=2)
        before, expected = copy.deepcopy(model.state_dict()), answer(model(**inputs))
        with pytest.raises(ValueError, match="bias"):
            model.merge_and_unload()
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        assert torch.equal(answer(model(**inputs)), expected)

    def test_means_are_not_merged_into_quantised_weights(self):
        model = adapted("llama", eve=centered(mean="gain"))
        layer = eve_layers(model)[1]
        layer.projection.weight = torch.nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match="layer 1.*not plain numbers"):
            model.merge_and_unload()
        assert type(model.unload()) is TINY["llama"].model

    @torch.no_grad()
    @pytest.mark.parametrize("name", NAMES)
    def test_unload_is_the_base(self, name):
        plain, inputs = stock(name), given(name, padding=2)
        back = adapted(name, base=copy.deepcopy(plain), eve=centered(mean="gain")).unload()
        assert_stock(back, plain)
        assert torch.equal(answer(back(**inputs)), answer(plain(**inputs)))
        # and the next adapter is as good as the first
        again = adapted(name, base=back)
        assert torch.equal(answer(sampled(again, name)), answer(sampled(adapted(name, base=plain), name)))

    def test_unloaded_model_is_saved_as_a_stock_one(self, tmp_path):
        plain = stock("gpt2")
        back = adapted("gpt2", base=copy.deepcopy(plain)).merge_and_unload()
        back.save_pretrained(tmp_path / "back")
        plain.save_pretrained(tmp_path / "plain")
        for file in ("config.json", "model.safetensors", "generation_config.json"):
            assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def assert_stock(model: PreTrainedModel, plain: PreTrainedModel) -> None:
    assert type(model) is type(plain) and type(model.config) is type(plain.config)
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not hasattr(model, "peft_config") and not hasattr(model, "adapters")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert vars(model.config).keys() == vars(plain.config).keys()


class TestInUse:
    def test_copies_and_pickles(self):
        import pickle

        model = adapted("gpt2", "last")
        expected = sampled(model, "gpt2").logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(sampled(other, "gpt2").logits, expected)
            for tensor in posterior(other).values():
                tensor.data.fill_(-12.0)
            assert not torch.equal(sampled(other, "gpt2").logits, expected)
        assert torch.equal(sampled(model, "gpt2").logits, expected)

    @torch.no_grad()
    def test_compiled(self):
        model, inputs = adapted("gpt2", "last"), {"input_ids": given("gpt2")["input_ids"], "use_cache": False}
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)

    def test_status_as_peft_reports_it(self):
        model = adapted("gpt2", [1, 2])
        status = model.get_model_status()
        assert status.num_adapter_layers == 2 and status.enabled is True and status.active_adapters == ["default"]
        assert status.requires_grad == {"default": True} and status.devices == {"default": ["cpu"]}
        assert [one.name for one in model.get_layer_status()] == [
            f"model.transformer.h.{layer}.mlp.variational_neurons" for layer in (1, 2)
        ]

    def test_trainable_parameters(self):
        trainable, every = get_peft_model(stock("gpt2"), config("gpt2")).get_nb_trainable_parameters()
        # rank 4: A, B and c of 48 units in each of 3 layers; the centered prior is not trained
        assert trainable == 3 * 48 * (4 + 4 + 1) and every > trainable
