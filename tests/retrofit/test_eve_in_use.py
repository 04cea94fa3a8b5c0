"""Retrofitted models as ordinary models of transformers: tied weights, checkpointing, compiling, dtypes, copies."""

import copy
import pickle

import pytest
import torch
from eve_families import (
    CAUSAL,
    EVERY,
    FEW,
    GENERATING,
    TINY,
    WITH_TARGETS,
    added,
    answer,
    assert_same_gradients,
    attended,
    centered,
    given,
    is_added,
    retrofitted,
    stock,
    targets,
)
from eve_reference import UnitNoise
from families import VOCAB, gradients

from hf_variational import posterior_noise, to_deterministic, variationalize

SAMPLES = 2


def sampled(model, inputs, samples=SAMPLES, **options):
    with posterior_noise(UnitNoise()):
        return model(**inputs, num_posterior_samples=samples, **options)


class TestTiedWeights:
    @pytest.mark.parametrize("name", [*GENERATING, "bert-masked", "roberta-masked", "distilbert-masked"])
    def test_stay_tied(self, name, tmp_path):
        plain = stock(name)

        def is_tied(model):
            return model.get_output_embeddings().weight is model.get_input_embeddings().weight

        tied, model = is_tied(plain), retrofitted(plain)
        assert is_tied(model) == tied
        model.save_pretrained(tmp_path)
        assert is_tied(type(model).from_pretrained(tmp_path)) == tied
        # Every model of several that are tied or not is met: the assertions above are about both.
        assert tied or name not in ("gpt2", "gemma", "t5", "bert-masked")

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "opt", "t5", "bert-masked"])
    def test_more_tokens(self, name):
        plain, inputs = stock(name), given(name, padding=2)
        model = retrofitted(plain)
        before = sampled(model, inputs).logits
        model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
        assert model.get_input_embeddings().weight.shape[0] == VOCAB + 6
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert is_tied == (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight)
        out = sampled(model, inputs)
        assert out.logits.shape[-1] == VOCAB + 6
        # The old tokens' shares among themselves are what they were, sample by sample.
        drawn = sampled(model, inputs, output_sample_logits=True).sample_logits[..., :VOCAB]
        again = torch.log_softmax(drawn, -1).exp().mean(1).log()
        kept = attended(name, inputs)
        torch.testing.assert_close(again[kept], before[kept], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
class TestCheckpointing:
    # Of the last: what `Trainer` asks for.
    @pytest.mark.parametrize("name", [name for name in WITH_TARGETS if TINY[name].task not in ("single", "tokens")])
    def test_gradients_are_those_without(self, name):
        inputs = given(name, padding=2)
        plain, wanted = stock(name), targets(name, inputs)
        model = retrofitted(plain, [1, 2]).train()
        expected = sampled(model, inputs, **wanted)
        expected_grads = gradients(model, expected.loss)
        model.gradient_checkpointing_enable()
        out = sampled(model, inputs, **wanted)
        torch.testing.assert_close(out.loss, expected.loss)
        # The noise source is gone when the backward pass runs: what was drawn must be found again.
        assert_same_gradients(gradients(model, out.loss), expected_grads)
        torch.testing.assert_close(out.kl_per_layer, expected.kl_per_layer)

    @pytest.mark.parametrize("name", ["gpt2", "gptj", "bloom", "mixtral", "t5", "bert-masked", "vit"])
    def test_with_the_global_generator(self, name):
        inputs = given(name, padding=2)
        model, wanted = retrofitted(name).train(), targets(name, inputs)
        found = []
        for enable in (False, True):
            if enable:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(3)
            loss = model(**inputs, **wanted, num_posterior_samples=SAMPLES).loss
            torch.manual_seed(8)  # what is computed again draws what was drawn, not what comes next
            found.append((loss, gradients(model, loss)))
        torch.testing.assert_close(found[0][0], found[1][0])
        assert_same_gradients(found[1][1], found[0][1])

    @pytest.mark.parametrize("name", ["gpt2", "bloom", "t5"])
    def test_reentrant_is_refused(self, name):
        """It would lose the KL's gradient without a word."""
        model = retrofitted(name)
        with pytest.raises(ValueError, match="use_reentrant"):
            model.gradient_checkpointing_enable({"use_reentrant": True})

    @pytest.mark.parametrize("name", ["llama", "bloom"])
    def test_enabled_before(self, name):
        inputs = given(name, padding=2)
        plain, wanted = stock(name), targets(name, inputs)
        expected = gradients(model := retrofitted(plain).train(), sampled(model, inputs, **wanted).loss)
        plain.gradient_checkpointing_enable()
        model = retrofitted(plain).train()
        assert_same_gradients(gradients(model, sampled(model, inputs, **wanted).loss), expected)


class TestCompiled:
    @pytest.mark.parametrize(("name", "depth"), [("llama", {"num_hidden_layers": 2}), ("gpt2", {"n_layer": 2})])
    def test_is_the_eager_model(self, name, depth):
        torch._dynamo.reset()
        inputs = given(name)
        plain, wanted = stock(name, **depth), targets(name, inputs)
        model = retrofitted(plain, [1])
        whole = True
        try:
            torch.compile(plain, backend="eager", fullgraph=True)(**inputs, **wanted, use_cache=False)
        except torch._dynamo.exc.Unsupported:
            whole = False
        # The stock GPT-2 warns that its class's name does not say its loss.
        assert whole == (name != "gpt2")
        compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
        torch.manual_seed(1)
        expected = model(**inputs, **wanted, num_posterior_samples=SAMPLES, use_cache=False)
        torch.manual_seed(1)
        out = compiled(**inputs, **wanted, num_posterior_samples=SAMPLES, use_cache=False)
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=1e-4)
        assert_same_gradients(gradients(model, out.loss), gradients(model, expected.loss), 1e-4)
        with torch.no_grad():
            mean = compiled(**inputs, use_cache=False)
            torch.testing.assert_close(mean.logits, plain(**inputs).logits, atol=1e-5, rtol=1e-4)

    def test_moving_the_kl_weight_compiles_nothing_again(self):
        torch._dynamo.reset()
        inputs = given("llama")
        model, wanted = retrofitted(stock("llama", num_hidden_layers=1)), targets("llama", inputs)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        losses = []
        for weight in (0.1, 0.2, 0.3):
            torch.manual_seed(1)
            weight = torch.tensor(weight)
            out = compiled(**inputs, **wanted, num_posterior_samples=SAMPLES, use_cache=False, kl_weight=weight)
            losses.append((out.loss - out.nll) / out.kl)
        torch.testing.assert_close(torch.stack(losses), torch.tensor([0.1, 0.2, 0.3]), atol=1e-5, rtol=1e-4)
        assert counter.frame_count == 1


class TestPrecision:
    @torch.no_grad()
    @pytest.mark.parametrize("name", EVERY)
    def test_log_scale_stays_in_float32(self, name):
        inputs = given(name, padding=2)
        plain = stock(name).to(torch.bfloat16)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        model = retrofitted(plain)
        for key, value in model.state_dict().items():
            if is_added(key):
                assert value.dtype == torch.float32, key
        kept = attended(name, inputs)
        assert torch.equal(answer(model(**inputs))[kept], answer(plain(**inputs))[kept])
        out = sampled(model, inputs)
        if TINY[name].task:
            assert out.logits.dtype == torch.float32 and out.logits[kept].isfinite().all()
            wide = sampled(retrofitted(name), {**given(name, padding=2)})
            assert (out.logits[kept].exp() - wide.logits[kept].exp()).abs().mean() < 0.05

    @pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral", "t5", "bert-masked", "vit"])
    def test_trains_in_bfloat16(self, name):
        inputs = given(name, padding=2)
        model = retrofitted(stock(name).to(torch.bfloat16)).train()
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        out = model(**inputs, **targets(name, given(name, padding=2)), num_posterior_samples=SAMPLES)
        assert out.kl.dtype == torch.float32
        # With statistics the KL is computed another way.
        told = model(
            **inputs, **targets(name, given(name, padding=2)), num_posterior_samples=0, output_posteriors=True
        )
        wide = given(name, padding=2)
        reference = retrofitted(name)(**wide, **targets(name, wide), num_posterior_samples=0)
        assert all(statistics.kl.dtype == torch.float32 for statistics in told.posteriors.values())
        torch.testing.assert_close(told.kl, reference.kl, rtol=0.02, atol=0.02)
        assert all(grad.isfinite().all() for grad in gradients(model, out.loss).values())

    def test_autocast_and_casting_afterwards(self):
        for name in ("llama", "mixtral", "opt"):
            inputs = given(name)
            wanted = targets(name, inputs)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = sampled(retrofitted(name), inputs, **wanted)
            expected = sampled(retrofitted(name), inputs, **wanted)
            assert out.kl.dtype == torch.float32
            torch.testing.assert_close(out.kl, expected.kl, rtol=0.05, atol=0.05)
            cast = retrofitted(name).to(torch.bfloat16)
            assert sampled(cast, inputs, **wanted).loss.isfinite()
            doubled = retrofitted(name).double()
            torch.testing.assert_close(
                sampled(doubled, inputs, **wanted).kl.float(), expected.kl, rtol=1e-4, atol=1e-4
            )


class TestCopies:
    @torch.no_grad()
    @pytest.mark.parametrize("name", EVERY)
    def test_are_whole_and_apart(self, name):
        """What is done to one is not done to the other, neurons and hooks included."""
        model, inputs = retrofitted(name, [1, 2]), given(name)
        expected = answer(sampled(model, inputs))
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(again) is type(model) and type(again.config) is type(model.config)
            assert torch.equal(answer(sampled(again, inputs)), expected)
            for tensor in added(again).values():
                tensor.add_(0.5)
            assert not torch.equal(answer(sampled(again, inputs)), expected)
            assert torch.equal(answer(sampled(model, inputs)), expected)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
    def test_go_back_alone(self, name):
        """A copy turned back has no hook of its own left, and takes none from the model it is a copy of."""
        model, inputs = retrofitted(name, [1, 2]), given(name)
        expected = answer(sampled(model, inputs))
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            back = to_deterministic(again)
            assert not any(module._forward_pre_hooks or module._forward_hooks for module in back.modules())
            assert torch.equal(answer(back(**inputs)), answer(model(**inputs)))
            assert torch.equal(answer(sampled(model, inputs)), expected)

    @torch.no_grad()
    def test_two_models_in_one_process(self):
        """Interleaved, of one class and of two, variational in other layers; the stock class stays what it was."""
        inputs = given("llama")
        models = [retrofitted("llama", [0]), retrofitted("llama", [1, 2]), retrofitted("llama", "last")]
        first = [sampled(model, inputs).logits for model in models]
        again = [sampled(model, inputs).logits for model in reversed(models)][::-1]
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        assert not any(torch.equal(first[0], other) for other in first[1:])
        assert torch.equal(stock("llama")(**inputs).logits, models[0](**inputs).logits)

    @torch.no_grad()
    def test_after_use_as_a_stock_model(self):
        """A model that has run (and installed its recording hooks) before it is made variational."""
        for name in FEW:
            plain, inputs = stock(name), given(name)
            plain(**inputs, output_hidden_states=True)
            model = variationalize(plain, eve=centered())
            wanted = targets(name, inputs)
            out = model(**inputs, **wanted, num_posterior_samples=SAMPLES)
            assert out.kl > 0 and len(out.kl_per_layer) == TINY[name].depth


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-masked", "t5", "bloom"])
def test_tuple_instead_of_an_output(name):
    model, inputs = retrofitted(name), given(name)
    expected = sampled(model, inputs, **targets(name, inputs))
    actual = sampled(model, inputs, **targets(name, inputs), return_dict=False)
    assert isinstance(actual, tuple)
    assert torch.equal(actual[0], expected.loss) and torch.equal(actual[1], expected.logits)


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_last_logits_alone(name):
    model, inputs = retrofitted(name), given(name)
    try:
        stock(name)(**inputs, logits_to_keep=1)
    except TypeError:
        pytest.skip("the stock class does not take logits_to_keep")
    expected = sampled(model, inputs).logits[:, -1:]
    torch.testing.assert_close(sampled(model, inputs, logits_to_keep=1).logits, expected, atol=1e-5, rtol=1e-4)
