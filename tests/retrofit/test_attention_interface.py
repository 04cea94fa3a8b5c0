"""What a retrofitted model is made of, what it goes through, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
import transformers as hf
from families import (
    FAMILIES,
    LAYERS,
    LENGTH,
    VOCAB,
    WeightsNoise,
    assert_same_gradients,
    attention,
    gradients,
    inputs,
    posterior_parameters,
    retrofitted,
    stock,
    targets,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_variational import posterior_noise
from hf_variational.retrofit import VariationalMixin, variational_class, variationalize

SAMPLES = 3


class TestClass:
    def test_is_a_subclass_with_the_arguments_in_its_signature(self):
        import inspect

        model = retrofitted("bert-masked")
        assert isinstance(model, hf.BertForMaskedLM) and isinstance(model, VariationalMixin)
        assert type(model) is variational_class(hf.BertForMaskedLM) is variational_class(type(model))
        assert type(model).__name__ == "VariationalBertForMaskedLM"
        plain, ours = inspect.signature(hf.BertForMaskedLM.forward), inspect.signature(type(model).forward)
        added = set(ours.parameters) - set(plain.parameters)
        assert {"num_posterior_samples", "kl_weight", "output_uncertainty", "output_posteriors"} <= added
        assert set(plain.parameters) <= set(ours.parameters)

    @torch.no_grad()
    def test_arguments_by_position_and_tuples(self):
        model, given = retrofitted("bert-single"), inputs("bert-single", padding=2)
        wanted = targets("bert-single", given)
        expected = model(**given, **wanted)
        as_tuple = model(given["input_ids"], given["attention_mask"], **wanted, return_dict=False)
        assert torch.equal(as_tuple[0], expected.loss) and torch.equal(as_tuple[1], expected.logits)

    def test_configuration_is_plain_json(self, tmp_path):
        model = retrofitted("bert-masked", "gaussian", "query", layers=[1], num_posterior_samples=4)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architectures"] == ["VariationalBertForMaskedLM"]
        assert config["model_type"] == "variational_bert"
        assert config["variational"]["attention_layers"] == [1] and config["variational"]["kl_weight"] == 0.1
        assert config["variational"]["attention"] == attention("gaussian", "query").to_dict()

    @pytest.mark.parametrize("name", ["bert-masked", "gpt2-next", "vit-single", "bert"])
    @pytest.mark.parametrize(
        "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
    )
    def test_copies(self, name, way):
        model, given = retrofitted(name, layers=[1]), inputs(name)
        other = way(model)
        assert type(other) is type(model)
        with torch.no_grad(), posterior_noise(WeightsNoise()):
            expected = model(**given, num_posterior_samples=SAMPLES)[0]
            assert torch.equal(other(**given, num_posterior_samples=SAMPLES)[0], expected)
            for parameter in posterior_parameters(other).values():
                parameter.add_(1.0)
            assert torch.equal(model(**given, num_posterior_samples=SAMPLES)[0], expected)

    @torch.no_grad()
    def test_output_survives_what_torch_does_to_outputs(self):
        """Sharded and distributed wrappers take an output apart and build it again from its class's fields."""
        model, given = retrofitted("gpt2-next"), inputs("gpt2-next")
        out = model(**given, **targets("gpt2-next", given), num_posterior_samples=2, output_posteriors=True)
        leaves, spec = torch.utils._pytree.tree_flatten(out)
        again = torch.utils._pytree.tree_unflatten(leaves, spec)
        assert type(again) is type(out) and isinstance(out, type(stock("gpt2-next")(**given)))
        assert list(again) == list(out) and torch.equal(again.kl, out.kl)
        assert out.uncertainty is None

    @torch.no_grad()
    def test_recorded_before_and_after(self):
        """Hidden states of a base model, whose class changes under transformers' recorder."""
        for early in (False, True):
            plain, given = stock("bert"), inputs("bert")
            if early:
                plain(**given, output_hidden_states=True)
            out = retrofitted(plain, layers=[1])(**given, output_hidden_states=True, num_posterior_samples=2)
            assert [len(states) for states in out.hidden_states] == [2, 2, 4, 4]


class TestLoading:
    def test_posteriors_that_a_checkpoint_lacks_start_as_configured(self, tmp_path):
        """Also inside the base model of a head, which another class initializes."""
        plain = stock("bert-masked")
        plain.save_pretrained(tmp_path)
        config = hf.BertConfig.from_pretrained(tmp_path)
        config.variational = {"attention": attention("dirichlet", "query").to_dict(), "attention_layers": [0, 2]}
        model = variational_class(hf.BertForMaskedLM).from_pretrained(tmp_path, config=config)
        names = posterior_parameters(model)
        assert len(names) == 8
        for name, parameter in names.items():
            if name.endswith("network_in"):
                assert 0.3 < parameter.std() * 8**0.5 < 3
            else:
                assert parameter.eq(0).all(), name
        for name, parameter in plain.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter)

    def test_from_a_configuration(self):
        config = hf.GPT2Config(**FAMILIES["gpt2"].options)
        config.variational = {"attention": attention().to_dict(), "attention_layers": [1]}
        model = variational_class(hf.GPT2LMHeadModel)(config)
        assert [name for name in model.state_dict() if ".posterior." in name] == ["transformer.h.1.attn.posterior.raw"]
        assert model.transformer.h[1].attn.posterior.raw.eq(0).all()
        assert {"past_key_values", "kl", "uncertainty"} <= set(model.config.keys_to_ignore_at_inference)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["llama", "bert-masked"])
    def test_half_precision_keeps_the_posterior_in_float32(self, name, dtype, tmp_path):
        model, given = retrofitted(stock(name).to(dtype), data_dependent="query"), inputs(name, padding=2)
        assert {parameter.dtype for parameter in posterior_parameters(model).values()} == {torch.float32}
        model.save_pretrained(tmp_path)
        again = variational_class(type(stock(name))).from_pretrained(tmp_path, dtype=dtype).eval()
        for key, parameter in again.named_parameters():
            assert parameter.dtype == (torch.float32 if ".posterior." in key else dtype), key
            assert torch.equal(parameter, model.get_parameter(key))
        with torch.no_grad(), posterior_noise(WeightsNoise()):
            expected = model(**given, num_posterior_samples=SAMPLES).logits
            actual = again(**given, num_posterior_samples=SAMPLES).logits
        assert expected.dtype == torch.float32
        torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["bert-single", "vit-single", "gpt2-next", "gemma2"])
    def test_cast_models_run_and_the_mean_pass_is_stock(self, name, dtype):
        plain, given = stock(name).to(dtype), inputs(name, padding=2)
        if FAMILIES[name].is_image:
            given = {"pixel_values": given["pixel_values"].to(dtype)}
        model = retrofitted(plain, data_dependent="query").to(dtype)
        with torch.no_grad():
            assert torch.equal(model(**given).logits, plain(**given).logits)
        # Without padding: where a target is predicted from padding, Gemma 2 normalizes a row of zeros, and its
        # gradient leaves the range of float16.
        given = inputs(name) if not FAMILIES[name].is_image else given
        out = model(**given, **targets(name, given), num_posterior_samples=SAMPLES)
        assert out.kl.dtype == torch.float32 and out.loss.isfinite()
        assert all(grad.isfinite().all() for grad in gradients(model, out.loss).values())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @pytest.mark.parametrize("name", ["bert-single", "vit-single", "gpt2-next", "gemma2"])
    def test_moves_to_an_accelerator(self, name):
        model, given = retrofitted(name, data_dependent="query"), inputs(name, padding=2)
        wanted = targets(name, given)
        with posterior_noise(WeightsNoise()):
            expected = model(**given, **wanted, num_posterior_samples=SAMPLES)
            model.cuda()
            moved = {key: value.cuda() for key, value in {**given, **wanted}.items()}
            actual = model(**moved, num_posterior_samples=SAMPLES)
        torch.testing.assert_close(actual.loss.cpu(), expected.loss, atol=1e-3, rtol=1e-3)


class TestCheckpointing:
    @pytest.mark.parametrize("name", ["bert-masked", "vit-single", "gpt2-next", "mistral", "opt"])
    @pytest.mark.parametrize("layers", ["all", [1]], ids=["all", "middle"])
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
    def test_same_loss_and_gradients(self, name, layers):
        model, given = retrofitted(name, data_dependent="query", layers=layers).train(), inputs(name, padding=2)
        wanted = targets(name, given)
        answers = []
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable()
            torch.manual_seed(3)
            out = model(**given, **wanted, num_posterior_samples=SAMPLES)
            answers.append((out.loss, gradients(model, out.loss)))
        torch.testing.assert_close(answers[1][0], answers[0][0])
        assert_same_gradients(answers[1][1], answers[0][1])

    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
    def test_reentrant_is_refused_before_and_after(self):
        model = retrofitted("bert-masked")
        with pytest.raises(ValueError, match="gradient of zero"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
        plain = stock("bert-masked")
        plain.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="gradient of zero"):
            variationalize(plain, attention=attention())
        assert type(plain) is hf.BertForMaskedLM and not hasattr(plain.config, "variational")
        plain.gradient_checkpointing_enable({"use_reentrant": False})
        model = variationalize(plain, attention=attention()).train()
        assert model.is_gradient_checkpointing
        model(**inputs("bert-masked"), labels=torch.ones(2, LENGTH, dtype=torch.long)).loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in posterior_parameters(model).values())


class TestImplementations:
    @pytest.fixture
    def kernel(self):
        """A stand-in for FlashAttention, which a CPU does not have: it never shows its weights."""
        calls = []

        def flash(module, query, key, value, attention_mask, **kwargs):
            assert "sample_axis" not in kwargs
            calls.append(module)
            return sdpa_attention_forward(module, query, key, value, None, scaling=kwargs.get("scaling"))

        ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = flash
        yield calls
        del ALL_ATTENTION_FUNCTIONS["flash_attention_2"]

    @torch.no_grad()
    def test_flash_attention_runs_the_mean_pass_alone(self, kernel):
        plain, given = stock("bert-masked"), {"input_ids": inputs("bert-masked")["input_ids"]}
        expected = plain(**given).logits
        model = retrofitted(plain)
        model.config._attn_implementation = "flash_attention_2"
        torch.testing.assert_close(model(**given).logits, expected)
        assert len(kernel) == LAYERS
        for options in ({"num_posterior_samples": 2}, {"labels": given["input_ids"]}, {"output_posteriors": True}):
            with pytest.raises(
                ValueError, match=r"'flash_attention_2' never.*set_attn_implementation\('variational'\)"
            ):
                model(**given, **options)
        model.set_attn_implementation("variational")
        assert (
            model(**given, num_posterior_samples=2, output_uncertainty=True).uncertainty.mutual_information.max() > 0
        )

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["bert-masked", "llama"])
    def test_implementations_agree_and_can_be_changed(self, name):
        model, given = retrofitted(name), inputs(name, padding=2)
        answers = []
        for how in ("variational", "variational_eager"):
            model.set_attn_implementation(how)
            with posterior_noise(WeightsNoise()):
                answers.append(model(**given, num_posterior_samples=SAMPLES).logits)
        attended = given["attention_mask"].bool()
        torch.testing.assert_close(answers[0][attended], answers[1][attended])

    @torch.no_grad()
    def test_softcap_and_scaling_of_the_family_are_in_the_samples(self):
        """Without them nearly certain samples would not be the mean pass."""
        model, given = retrofitted("gemma2"), inputs("gemma2")
        answers = []
        for softcap in (1.0, 50.0):
            for layer in model.model.layers:
                layer.self_attn.attn_logit_softcapping = softcap
            with posterior_noise(WeightsNoise()):
                answers.append(model(**given, num_posterior_samples=SAMPLES).logits)
        assert (answers[0] - answers[1]).abs().max() > 1e-3

    @pytest.mark.parametrize(
        "place", [hf.models.bert.modeling_bert.BertAttention, hf.models.bert.modeling_bert.BertSelfAttention]
    )
    def test_attention_that_another_kernel_computes_fails_loudly(self, place, monkeypatch):
        model, given = retrofitted("bert-masked"), inputs("bert-masked")
        monkeypatch.setattr(place, "forward", lambda self, hidden_states, *args, **kwargs: (hidden_states, None))
        model(**given)
        for options in ({"num_posterior_samples": 2}, {"labels": given["input_ids"]}):
            with pytest.raises(RuntimeError, match="never saw the posterior samples.*does not call these modules"):
                model(**given, **options)

    def test_choices_folded_into_the_batch_fail_loudly(self):
        config = hf.BertConfig(**FAMILIES["bert"].options)
        plain = hf.BertForMultipleChoice(config).eval()
        ids = torch.randint(3, VOCAB, (2, 2, LENGTH))
        expected = plain(ids).logits
        model = retrofitted(plain)
        assert torch.equal(model(ids).logits, expected)
        for options in ({"num_posterior_samples": 2}, {"labels": torch.tensor([0, 1])}):
            with pytest.raises(ValueError, match="folds another axis into its batch"):
                model(ids, **options)
