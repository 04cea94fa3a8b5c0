"""The loss of a forward pass against its definition, and the posteriors it is made of."""

import pytest
import torch
from noise import NoiseTable
from tiny import assert_same_gradients, gradients, tiny_model, token_ids, twin_of
from torch.nn import functional as F

from hf_variational import EVE, posterior_noise
from hf_variational.modeling.configuration_variational_gpt import PRIORS
from hf_variational.modeling.posterior import PosteriorTap

RIGHT = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
LEFT = RIGHT.flip(1)


def batch(padding: str = "right"):
    """Ids, mask and labels: a padded row, and a prompt that is not scored."""
    ids, mask = token_ids(), RIGHT if padding == "right" else LEFT
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = -100
    labels[0, 5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def noisy(model, samples: int, **kwargs):
    """A forward pass whose noise is the same each time."""
    with posterior_noise(NoiseTable.of(model, 2, max(samples, 1))):
        return model(num_posterior_samples=samples, **kwargs)


def nll_by_hand(out, labels, samples: int, objective: str) -> torch.Tensor:
    targets = shifted(labels)
    log_p = F.log_softmax(out.logits, -1)[:, None] if samples == 0 else out.sample_logits
    if objective == "mc_nll":
        log_p = log_p.exp().mean(1, keepdim=True).log()
    index = targets.clamp(min=0)[:, None, :, None].expand(-1, log_p.shape[1], -1, -1)
    return -log_p.gather(-1, index).squeeze(-1).mean(1)[targets >= 0].sum()


class TestLoss:
    @pytest.mark.parametrize("samples", [0, 1, 3])
    @pytest.mark.parametrize("objective", ["elbo", "mc_nll"])
    @pytest.mark.parametrize("prior", PRIORS)
    def test_equals_the_definition(self, samples, objective, prior):
        model = tiny_model({"prior": prior, "reconstruction_weight": 0.3}, objective=objective)
        inputs = batch()
        out = noisy(model, samples, **inputs, output_posteriors=True, output_sample_logits=samples > 0)
        targets = shifted(inputs["labels"])
        num_targets = int((targets >= 0).sum())
        carries = (targets >= 0) & (inputs["attention_mask"] == 1)
        nll = nll_by_hand(out, inputs["labels"], samples, objective) / num_targets
        kl = torch.stack([(p.kl * carries).sum() for p in out.posteriors.values()]) / num_targets
        torch.testing.assert_close(out.nll, nll)
        torch.testing.assert_close(out.kl_per_layer, kl)
        torch.testing.assert_close(out.kl, kl.sum())
        assert out.kl.ndim == out.nll.ndim == out.loss.ndim == 0
        torch.testing.assert_close(out.loss, nll + 0.1 * kl.sum() + 0.3 * out.reconstruction)

    @pytest.mark.parametrize("samples", [0, 1, 3])
    def test_reconstruction_counts_the_tokens_that_carry_kl(self, samples):
        """Value by hand from what the layers handed to the tape."""
        model, inputs, records = tiny_model({"reconstruction_weight": 0.3}), batch(), []
        for module in model.modules():
            if isinstance(module, PosteriorTap):
                module.register_forward_hook(lambda module, args, record: records.append(record))
        out = noisy(model, samples, **inputs)
        carries = ((shifted(inputs["labels"]) >= 0) & (inputs["attention_mask"] == 1)).float()
        errors = [record.reconstruction.unflatten(0, (2, -1)).mean(1) for record in records]
        expected = sum((error * carries).sum() for error in errors) / (shifted(inputs["labels"]) >= 0).sum()
        torch.testing.assert_close(out.reconstruction, expected)

    @pytest.mark.parametrize("samples", [0, 2])
    def test_num_items_in_batch_divides_everything(self, samples):
        model, inputs = tiny_model({"reconstruction_weight": 0.3}), batch()
        n = int((shifted(inputs["labels"]) >= 0).sum())
        whole = noisy(model, samples, **inputs)
        for items in (4 * n, torch.tensor(4 * n)):
            part = noisy(model, samples, **inputs, num_items_in_batch=items)
            for name in ("loss", "nll", "kl", "kl_per_layer", "reconstruction"):
                torch.testing.assert_close(4 * part[name], whole[name])

    def test_kl_weight_is_a_number_a_tensor_or_the_configs(self):
        model, inputs = tiny_model(kl_weight=0.25), batch()
        out = noisy(model, 1, **inputs)
        torch.testing.assert_close(out.loss, out.nll + 0.25 * out.kl)
        for weight in (0.0, 0.7, torch.tensor(0.7)):
            given = noisy(model, 1, **inputs, kl_weight=weight)
            torch.testing.assert_close(given.loss, out.nll + float(weight) * out.kl)
            torch.testing.assert_close(given.kl, out.kl)

    def test_mean_pass_is_that_of_the_deterministic_twin(self):
        """Same weights, same NLL; the KL comes on top."""
        model, inputs = tiny_model(), batch()
        twin = twin_of(model)
        out, expected = model(**inputs), twin(**inputs)
        torch.testing.assert_close(out.nll, expected.nll)
        torch.testing.assert_close(out.logits, expected.logits)
        torch.testing.assert_close(out.loss, expected.loss + 0.1 * out.kl)
        assert expected.kl.shape == () and expected.kl == 0 and expected.loss == expected.nll

    def test_shift_labels_are_the_targets(self):
        model, inputs = tiny_model(), batch()
        out = noisy(model, 1, **inputs)
        labels = inputs.pop("labels")
        torch.testing.assert_close(noisy(model, 1, **inputs, shift_labels=shifted(labels)).loss, out.loss)

    def test_nothing_to_score_costs_nothing(self):
        model, inputs = tiny_model(), batch()
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        for samples in (0, 2):
            out = noisy(model, samples, **inputs)
            assert out.loss == 0 and out.kl == 0
            assert all(torch.isfinite(grad).all() for grad in gradients(model, out.loss).values())

    def test_without_labels_there_is_no_loss(self):
        out = tiny_model()(token_ids(), num_posterior_samples=2)
        assert out.loss is out.nll is out.kl is out.kl_per_layer is out.posteriors is None

    @pytest.mark.parametrize("prior", PRIORS)
    @pytest.mark.parametrize("samples", [1, 2])
    def test_asking_for_posteriors_changes_neither_loss_nor_gradient(self, prior, samples):
        """The fused pass runs only where nobody asks for statistics."""
        model, inputs = tiny_model({"prior": prior}), batch()
        plain, asked = (noisy(model, samples, **inputs, output_posteriors=flag) for flag in (False, True))
        torch.testing.assert_close(plain.loss, asked.loss)
        assert_same_gradients(gradients(model, plain.loss), gradients(model, asked.loss))

    def test_centered_kl_gives_the_stock_parameters_no_gradient_of_their_own(self):
        """With scales that do not read h, the centered prior's KL concerns the scales alone."""
        model, inputs = tiny_model({"prior": "centered", "scale": "unit"}), batch()
        for samples in (0, 2):
            found = gradients(model, noisy(model, samples, **inputs).kl)
            assert any(grad.abs().max() > 0 for name, grad in found.items() if ".eve." in name)
            assert all(grad.abs().max() == 0 for name, grad in found.items() if ".eve." not in name)

    def test_kl_is_the_mean_over_samples(self):
        """Of the layers above the split, where each sample has its own hidden activations."""
        model, inputs = tiny_model(variational_layers=[1, 2]), batch()
        noise = NoiseTable.of(model, 2, 4)
        with posterior_noise(noise):
            together = model(**inputs, num_posterior_samples=4)
        alone = []
        for sample in range(4):
            with posterior_noise(noise.only(samples=[sample])):
                alone.append(model(**inputs, num_posterior_samples=1))
        for name in ("loss", "nll", "kl", "kl_per_layer"):
            torch.testing.assert_close(together[name], torch.stack([out[name] for out in alone]).mean(0))
        spread = torch.stack([out.kl_per_layer for out in alone]).std(0)
        assert spread[0] < 1e-6 < spread[1], "the first variational layer's posterior knows no sample"


class TestWhoCarriesKL:
    @pytest.mark.parametrize("padding", ["right", "left"])
    @pytest.mark.parametrize("samples", [0, 2])
    def test_attended_positions_with_a_target(self, padding, samples):
        """Each position's own KL enters the sum if and only if it is attended and its next label counts."""
        model, inputs = tiny_model(), batch(padding)
        out = noisy(model, samples, **inputs, output_posteriors=True, num_items_in_batch=1)
        kl = sum(p.kl for p in out.posteriors.values())
        for row, t in ((0, 4), (0, 2), (1, 4), (0, 7)):
            inputs["labels"][row, t + 1] = -100 if inputs["labels"][row, t + 1] >= 0 else 7
            carries = (shifted(inputs["labels"]) >= 0) & (inputs["attention_mask"] == 1)
            changed = noisy(model, samples, **inputs, num_items_in_batch=1)
            torch.testing.assert_close(changed.kl, kl[carries].sum())

    def test_padding_carries_none_even_with_labels(self):
        model, inputs = tiny_model(), batch("left")
        inputs["labels"] = inputs["input_ids"]
        out = noisy(model, 2, **inputs, output_posteriors=True, num_items_in_batch=1)
        kl = sum(p.kl for p in out.posteriors.values())
        scored = inputs["attention_mask"].bool()
        scored[:, -1] = False
        torch.testing.assert_close(out.kl, kl[scored].sum())

    def test_last_position_and_whole_prompts_carry_none(self):
        model, ids = tiny_model(), token_ids()
        out = noisy(model, 1, input_ids=ids, labels=ids, output_posteriors=True, num_items_in_batch=1)
        kl = sum(p.kl for p in out.posteriors.values())
        torch.testing.assert_close(out.kl, kl[:, :-1].sum())


class TestFreeBits:
    @pytest.mark.parametrize("samples", [0, 3])
    @pytest.mark.parametrize("k", [1, 2])
    def test_a_layer_is_charged_at_each_token_for_at_least_its_free_nats(self, samples, k):
        model, inputs = tiny_model({"latent_dim": k, "initial_scale": 0.9}, kl_weight=1.0), batch()
        plain = noisy(model, samples, **inputs, output_posteriors=True)
        carries = (shifted(inputs["labels"]) >= 0) & (inputs["attention_mask"] == 1)
        per_token = torch.cat([p.kl[carries] for p in plain.posteriors.values()])
        bits = (per_token.quantile(0.5) / model.config.intermediate_size).item()
        out = noisy(model, samples, **inputs, free_bits=bits)
        free = bits * model.config.intermediate_size
        charged = per_token.clamp(min=free).sum() / (shifted(inputs["labels"]) >= 0).sum()
        torch.testing.assert_close(out.loss - out.nll, charged)
        torch.testing.assert_close(out.kl, plain.kl)  # what is reported is the KL itself
        torch.testing.assert_close(out.kl_per_layer, plain.kl_per_layer)

    def test_what_is_free_has_no_gradient(self):
        model, inputs = tiny_model(kl_weight=1.0), batch()
        with_kl = noisy(model, 1, **inputs, free_bits=1e4)
        without = noisy(model, 1, **inputs, kl_weight=0.0)
        assert_same_gradients(gradients(model, with_kl.loss), gradients(model, without.loss))

    def test_none_free_is_the_plain_kl(self):
        model, inputs = tiny_model(), batch()
        plain, none = noisy(model, 1, **inputs), noisy(model, 1, **inputs, free_bits=0.0)
        assert plain.loss == none.loss


class TestPosteriors:
    @pytest.mark.parametrize("layers, expected", [(None, [0, 1, 2]), ([2], [2]), ([0, 2], [0, 2])])
    @pytest.mark.parametrize("samples", [0, 1, 2])
    def test_are_keyed_by_layer_number(self, layers, expected, samples):
        model, inputs = tiny_model(variational_layers=layers), batch()
        out = noisy(model, samples, **inputs, output_posteriors=True)
        assert list(out.posteriors) == expected == model.variational_layers
        for statistics in out.posteriors.values():
            assert statistics.kl.shape == (2, 9)
            for values in (statistics.kl_per_unit, statistics.scale, statistics.mean_energy):
                assert values.shape == (20,) and not values.requires_grad
            assert 0 <= statistics.active_fraction <= 1
        assert out.kl_per_layer.shape == (len(expected),)

    @pytest.mark.parametrize("labelled", [True, False])
    @pytest.mark.parametrize("samples", [0, 1, 3])
    def test_statistics_are_means_over_the_tokens_that_carry_kl(self, labelled, samples):
        """Over the attended ones where there are no labels. By hand from what the layers read."""
        model, inputs, read = tiny_model({"prior": "standard", "scale": "unit"}), batch(), {}
        carries = (shifted(inputs["labels"]) >= 0) & (inputs["attention_mask"] == 1)
        if not labelled:
            del inputs["labels"]
            carries = inputs["attention_mask"].bool()
        for module in model.modules():
            if isinstance(module, EVE):
                module.register_forward_pre_hook(lambda module, args: read.update({module.layer_idx: args[0]}))
        out = noisy(model, samples, **inputs, output_posteriors=True)
        for layer, statistics in out.posteriors.items():
            h = read[layer].unflatten(0, (2, -1))
            sigma = model.model.layers[layer].mlp.eve.log_scale.exp()
            kl = 0.5 * (h.square() + sigma.square() - sigma.square().log() - 1)
            torch.testing.assert_close(statistics.kl, kl.sum(-1).mean(1))
            torch.testing.assert_close(statistics.scale, sigma)
            torch.testing.assert_close(statistics.kl_per_unit, kl.mean(1)[carries].mean(0))
            torch.testing.assert_close(statistics.mean_energy, h.square().mean(1)[carries].mean(0))

    def test_per_unit_kl_adds_up_to_the_layers(self):
        model, inputs = tiny_model(), batch()
        out = noisy(model, 2, **inputs, output_posteriors=True)
        units = torch.stack([p.kl_per_unit.sum() for p in out.posteriors.values()])
        torch.testing.assert_close(units, out.kl_per_layer)

    def test_the_kl_of_a_posterior_carries_a_gradient(self):
        model = tiny_model()
        out = model(token_ids(), output_posteriors=True)
        found = gradients(model, sum(p.kl.sum() for p in out.posteriors.values()))
        assert all(f"model.layers.{layer}.mlp.eve.log_scale" in found for layer in range(3))

    @pytest.mark.parametrize("asks", [{"labels": token_ids()}, {"output_posteriors": True}])
    def test_a_posterior_that_never_reaches_the_tape_fails_loudly(self, asks):
        model, ids = tiny_model(), token_ids()
        model(ids, labels=ids)
        model.model.layers[1].mlp.eve.tap = PosteriorTap()  # without the hook, as a layer swapped in later
        with pytest.raises(RuntimeError, match=r"\(1, 'ffn'\)"):
            model(ids, **asks)
        model.model._output_capturing_hooks_installed = False
        with pytest.raises(RuntimeError, match="layers"):
            model(ids, **asks)  # the other layers are heard twice now

    def test_nobody_listening_computes_nothing(self, monkeypatch):
        """No KL and no statistics where neither labels nor posteriors are asked for."""
        from hf_variational.modeling import eve

        def refuse(*args, **kwargs):
            raise AssertionError("computed a KL that nobody asked for")

        monkeypatch.setattr(eve, "gaussian_kl", refuse)
        monkeypatch.setattr(eve, "sample_with_kl", refuse)
        for samples in (0, 1, 2):
            tiny_model()(token_ids(), num_posterior_samples=samples)

    def test_the_model_keeps_nothing_of_a_pass(self):
        model, inputs = tiny_model(), batch()
        before = {name: list(module.__dict__) for name, module in model.named_modules()}
        out = noisy(model, 2, **inputs, output_posteriors=True)
        del out
        after = {name: list(module.__dict__) for name, module in model.named_modules()}
        changed = {name for name in before if set(after[name]) - set(before[name])}
        assert changed <= {"", "model"}, changed  # transformers' mark that its hooks are installed


def test_num_samples_default_to_the_mode():
    model, ids = tiny_model(num_posterior_samples=3), token_ids()
    seen = []
    with posterior_noise(lambda request: seen.append(request.num_samples) or torch.zeros(request.shape)):
        model(ids)
        assert not seen
        model.train()(ids)
        assert set(seen) == {3}
        seen.clear()
        model(ids, num_posterior_samples=0)
        assert not seen


def test_the_deterministic_twin_has_no_posteriors_and_no_samples():
    twin, ids = twin_of(tiny_model()), token_ids()
    for mode in (twin.eval(), twin.train()):
        out = mode(ids, labels=ids, output_posteriors=True)
        assert out.posteriors == {} and out.kl == 0 and out.loss == out.nll
    with pytest.raises(ValueError, match=r"num_posterior_samples=2.*eve=None"):
        twin(ids, num_posterior_samples=2)


@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("prior", PRIORS)
def test_under_autocast_the_loss_stays_wide_and_close(samples, prior):
    model, inputs = tiny_model({"prior": prior}).train(), batch("left")
    expected = noisy(model, samples, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = noisy(model, samples, **inputs)
    for name in ("loss", "nll", "kl"):
        assert out[name].dtype == torch.float32
        torch.testing.assert_close(out[name], expected[name], rtol=0.03, atol=0.03)
    assert all(torch.isfinite(grad).all() for grad in gradients(model, out.loss).values())
