"""What must not move the loss or its gradient: accumulation, gradient checkpointing, compilation."""

import shutil

import pytest
import torch
import torch._dynamo.testing
from noise import NoiseTable
from tiny import assert_same_gradients, gradients, tiny_model, token_ids

from hf_variational import posterior_noise
from hf_variational.modeling.configuration_variational_gpt import PRIORS
from hf_variational.modeling.gaussian import sample_with_kl

SEQUENCES, LENGTH = 8, 9

# transformers 5.23 renames the method and still calls the one of that name where a class has its own
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def padded_batch(sequences: int = SEQUENCES) -> dict:
    """Rows of different lengths, so that no two micro-batches hold equally many target tokens."""
    ids = token_ids(sequences, LENGTH)
    lengths = torch.tensor([9, 3, 7, 9, 4, 5, 8, 2])[:sequences, None]
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def num_targets(batch: dict) -> int:
    return int((batch["labels"][:, 1:] >= 0).sum())


class TestAccumulation:
    @pytest.mark.parametrize("samples", [0, 1, 3])
    @pytest.mark.parametrize("objective", ["elbo", "mc_nll"])
    @pytest.mark.parametrize("free_bits", [0.0, 0.05])
    def test_gradient_does_not_depend_on_it(self, samples, objective, free_bits):
        """1, 4 or 8 micro-batches, with the same noise; without samples the mean pass plus the KL."""
        options = {"reconstruction_weight": 0.2, "prior": "autoregressive"}
        model = tiny_model(options, objective=objective).train()
        batch = padded_batch()
        noise = NoiseTable.of(model, SEQUENCES, max(samples, 1))
        items, found = torch.tensor(num_targets(batch)), {}
        for steps in (1, 4, 8):
            model.zero_grad()
            losses = []
            for rows in torch.arange(SEQUENCES).chunk(steps):
                part = {name: value[rows] for name, value in batch.items()}
                with posterior_noise(noise.only(sequences=rows.tolist())):
                    out = model(**part, num_posterior_samples=samples, num_items_in_batch=items, free_bits=free_bits)
                out.loss.backward()
                losses.append(out.loss.detach())
            found[steps] = sum(losses), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for steps in (4, 8):
            torch.testing.assert_close(found[steps][0], found[1][0])
            assert_same_gradients(found[steps][1], found[1][1])

    def test_a_mean_per_micro_batch_would_not_do(self):
        """The batch is one on which the published bug shows."""
        model, batch = tiny_model().train(), padded_batch()
        whole = model(**batch, num_posterior_samples=0).loss
        parts = [
            model(**{name: value[rows] for name, value in batch.items()}, num_posterior_samples=0).loss
            for rows in torch.arange(SEQUENCES).chunk(4)
        ]
        assert (torch.stack(parts).mean() - whole).abs() > 1e-2

    def test_without_num_items_the_batch_is_whole(self):
        model, batch = tiny_model().train(), padded_batch()
        alone = model(**batch, num_posterior_samples=0)
        told = model(**batch, num_posterior_samples=0, num_items_in_batch=num_targets(batch))
        assert alone.loss == told.loss


def loss_and_gradients(model, batch, noise=None, seed=5, **options):
    torch.manual_seed(seed)
    if noise is None:
        out = model(**batch, **options)
    else:
        with posterior_noise(noise):
            out = model(**batch, **options)
    found = gradients(model, out.loss)  # after the noise source is gone: a recomputation must not need it
    return out, found


class TestGradientCheckpointing:
    @pytest.mark.parametrize("given", [True, False], ids=["given noise", "global generator"])
    @pytest.mark.parametrize("samples", [0, 1, 4])
    @pytest.mark.parametrize("scope", ["token", "sequence"])
    @pytest.mark.parametrize("layers", [None, [1, 2]], ids=["all layers", "two layers"])
    def test_changes_nothing(self, given, samples, scope, layers):
        """Bit for bit on one machine: the same operations on the same numbers."""
        model = tiny_model({"noise": scope, "reconstruction_weight": 0.2}, variational_layers=layers).train()
        batch = padded_batch(3)
        noise = NoiseTable.of(model, 3, max(samples, 1)) if given else None
        plain, expected = loss_and_gradients(model, batch, noise, num_posterior_samples=samples)
        model.gradient_checkpointing_enable()
        checkpointed, actual = loss_and_gradients(model, batch, noise, num_posterior_samples=samples)
        assert torch.equal(checkpointed.loss, plain.loss)
        assert torch.equal(checkpointed.kl_per_layer, plain.kl_per_layer)
        assert_same_gradients(actual, expected, tolerance=1e-6)

    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("options", [{}, {"output_posteriors": True}, {"free_bits": 0.05}], ids=str)
    def test_of_every_prior(self, prior, options):
        model, batch = tiny_model({"prior": prior, "latent_dim": 2}).train(), padded_batch(3)
        _, expected = loss_and_gradients(model, batch, num_posterior_samples=2, **options)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _, actual = loss_and_gradients(model, batch, num_posterior_samples=2, **options)
        assert_same_gradients(actual, expected, tolerance=1e-6)

    def test_layers_are_indeed_computed_again(self):
        model, batch = tiny_model().train(), padded_batch(3)
        model.gradient_checkpointing_enable()
        calls = []
        model.model.layers[1].mlp.eve.register_forward_hook(lambda *args: calls.append(1))
        loss_and_gradients(model, batch, num_posterior_samples=2)
        assert len(calls) == 2

    def test_the_kl_keeps_its_gradient(self):
        """Reentrant checkpointing would make it zero, without a word."""
        model, batch = tiny_model().train(), padded_batch(3)
        model.gradient_checkpointing_enable()
        found = gradients(model, model(**batch, num_posterior_samples=2).kl)
        for layer in range(3):
            assert found[f"model.layers.{layer}.mlp.eve.log_scale"].abs().max() > 0
        assert found["model.embed_tokens.weight"].abs().max() > 0

    def test_reentrant_checkpointing_is_refused(self):
        model = tiny_model()
        with pytest.raises(ValueError, match="use_reentrant.*False"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ValueError, match="use_reentrant"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        if hasattr(model, "activation_checkpointing_enable"):  # what newer versions of transformers call it
            with pytest.raises(ValueError, match="use_reentrant"):
                model.activation_checkpointing_enable({"use_reentrant": True})

    def test_a_cache_in_train_mode_is_left_out(self):
        """The config's use_cache=True is what a plain loop runs with."""
        model, batch = tiny_model({"noise": "sequence"}).train(), padded_batch(3)
        plain, expected = loss_and_gradients(model, batch, num_posterior_samples=2, use_cache=False)
        model.gradient_checkpointing_enable()
        for use_cache in (None, True):
            out, actual = loss_and_gradients(model, batch, num_posterior_samples=2, use_cache=use_cache)
            torch.testing.assert_close(out.loss, plain.loss)
            assert_same_gradients(actual, expected, tolerance=1e-6)

    def test_with_accumulation(self):
        model, batch = tiny_model().train(), padded_batch()
        noise = NoiseTable.of(model, SEQUENCES, 2)
        _, expected = loss_and_gradients(model, batch, noise, num_posterior_samples=2)
        model.gradient_checkpointing_enable()
        items, model.config.use_cache = num_targets(batch), False
        for rows in torch.arange(SEQUENCES).chunk(4):
            with posterior_noise(noise.only(sequences=rows.tolist())):
                part = {name: value[rows] for name, value in batch.items()}
                model(**part, num_posterior_samples=2, num_items_in_batch=items).loss.backward()
        actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same_gradients(actual, expected)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
class TestCompile:
    def assert_equals_eager(self, model, backend: str, samples: int) -> None:
        batch, noise = padded_batch(3), NoiseTable.of(model, 3, max(samples, 1))
        options = {"num_posterior_samples": samples, "use_cache": False}
        plain, expected = loss_and_gradients(model, batch, noise, **options)
        with posterior_noise(noise):
            out = torch.compile(model, backend=backend)(**batch, **options)
        torch.testing.assert_close(out.loss, plain.loss)
        torch.testing.assert_close(out.kl_per_layer, plain.kl_per_layer)
        assert_same_gradients(gradients(model, out.loss), expected, tolerance=1e-4)

    @pytest.mark.parametrize("samples", [0, 1, 2])
    def test_equals_eager_given_the_noise(self, samples):
        self.assert_equals_eager(tiny_model({"reconstruction_weight": 0.2}).train(), "aot_eager", samples)

    def test_with_gradient_checkpointing(self):
        model = tiny_model().train()
        model.gradient_checkpointing_enable()
        self.assert_equals_eager(model, "aot_eager", 2)

    @pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs a C++ compiler")
    @pytest.mark.parametrize("prior", ["empirical", "centered"])
    def test_generated_code_of_the_neurons(self, prior):
        """The default backend writes its own sample and KL, forward and backward."""
        generator = torch.Generator().manual_seed(0)
        mean, log_scale, noise = (torch.randn(2, 5, 16, generator=generator) for _ in range(3))
        prior_mean, prior_log_scale = (torch.randn(16, generator=generator) for _ in range(2))

        def neurons(mean, log_scale):
            centre = prior_mean if prior == "empirical" else None
            return sample_with_kl(mean, log_scale, noise, centre, prior_log_scale, -1.0, 1.0)[:2]

        found = []
        for function in (neurons, torch.compile(neurons)):
            leaves = [mean.clone().requires_grad_(), log_scale.clone().requires_grad_()]
            z, kl = function(*leaves)
            found.append([z, kl, *torch.autograd.grad(z.square().sum() + kl.square().sum(), leaves)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)

    def test_one_graph_and_none_again_when_a_schedule_moves_the_kl_weight(self):
        model, batch = tiny_model().train(), padded_batch(3)
        options = {"num_posterior_samples": 2, "use_cache": False}
        model(**batch, **options)  # transformers installs its recording hooks, behind a lock, in the first pass
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(model, backend=counter)
        kl = [compiled(**batch, **options, kl_weight=torch.tensor(weight)) for weight in (0.0, 0.1, 0.2)]
        assert counter.frame_count == 1
        torch.testing.assert_close(kl[2].loss, kl[2].nll + 0.2 * kl[2].kl)
