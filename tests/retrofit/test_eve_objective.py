"""The KL of retrofitted feed-forward units: closed forms, what carries it, and what accumulation does to it."""

import pytest
import torch
from eve_families import (
    FEW,
    TINY,
    WITH_TARGETS,
    answer,
    assert_same_gradients,
    attended,
    centered,
    given,
    retrofitted,
    rows_of,
    stock,
    targets,
)
from eve_reference import UnitNoise, by_hand, grid, kl_by_hand, kl_weights, same_everywhere
from families import gradients
from families import inputs as attention_inputs
from families import stock as attention_stock
from families import targets as attention_targets
from torch.nn import functional as F

from hf_variational import posterior_noise

SAMPLES = 2


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_kl_of_the_mean_pass_in_closed_form(name):
    """From what enters W_out of the stock model, with padding and tokens without a target."""
    plain, inputs = stock(name), given(name, padding=3)
    model, wanted = retrofitted(plain), targets(name, inputs)
    out = model(**inputs, **wanted, output_posteriors=True)
    (one,) = [by_hand(name, plain, model, inputs, None, wanted)]
    expected = kl_by_hand(name, [one], inputs, wanted)
    torch.testing.assert_close(out.kl_per_layer, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.kl, expected.sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, one.outputs.loss + 0.1 * expected.sum(), atol=1e-5, rtol=1e-5)
    other = model(**inputs, **wanted, kl_weight=2.0)
    torch.testing.assert_close(other.loss, one.outputs.loss + 2.0 * expected.sum(), atol=1e-5, rtol=1e-5)
    count, weights = kl_weights(name, inputs, wanted)
    free = model(**inputs, **wanted, free_bits=1e3).loss - out.nll
    units = TINY[name].units * (4 if name == "mixtral" else 1)
    spent = sum((weights[layer] * torch.ones_like(one.kl[layer])).sum() for layer in weights) * units * 1e3 / count
    torch.testing.assert_close(free, 0.1 * spent, rtol=1e-4, atol=1e-4)
    for layer, statistics in out.posteriors.items():
        total = statistics.kl_per_unit.sum() * (weights[layer] * torch.ones_like(one.kl[layer])).sum() / count
        torch.testing.assert_close(total, expected[layer], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prior", ["standard", "empirical"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert-masked", "t5"])
def test_kl_of_other_priors(name, prior):
    plain, inputs = stock(name), given(name, padding=3)
    model, wanted = retrofitted(plain, eve=centered(prior=prior)), targets(name, inputs)
    tiny, named, kls = TINY[name], model.state_dict(), {}

    def hook(layer):
        def read(module, args):
            h = args[0].reshape(2, -1, tiny.units)
            where = tiny.eve(layer)
            low_rank = h @ named[f"{where}.scale_down"].T @ named[f"{where}.scale_up"].T
            posterior = torch.distributions.Normal(h, (low_rank + named[f"{where}.log_scale"]).clamp(-12, 2).exp())
            zero = torch.zeros(tiny.units)
            mean = named.get(f"{where}.prior_mean", zero)
            prior = torch.distributions.Normal(mean, named.get(f"{where}.prior_log_scale", zero).exp())
            kls[layer] = torch.distributions.kl_divergence(posterior, prior).sum(-1)

        return read

    for layer in range(tiny.depth):
        plain.get_submodule(tiny.projection(layer)).register_forward_pre_hook(hook(layer))
    plain(**inputs)
    out = model(**inputs, **wanted)
    count, weights = kl_weights(name, inputs, wanted)
    expected = torch.stack([(kls[layer] * weights[layer]).sum() / count for layer in range(tiny.depth)])
    torch.testing.assert_close(out.kl_per_layer, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "bert-tokens", "t5"])
def test_autoregressive_prior_follows_the_sequence(name):
    """It does not cross padding; the first position takes the standard prior."""
    plain, inputs = stock(name), given(name, padding=3)
    model, wanted = retrofitted(plain, [1], eve=centered(prior="autoregressive")), targets(name, inputs)
    tiny, named, seen = TINY[name], model.state_dict(), {}
    handle = plain.get_submodule(tiny.projection(1)).register_forward_pre_hook(
        lambda module, args: seen.update(h=args[0].reshape(2, -1, tiny.units))
    )
    plain(**inputs)
    handle.remove()
    h, where, mask = seen["h"], tiny.eve(1), inputs["attention_mask"].bool()
    low_rank = h @ named[f"{where}.scale_down"].T @ named[f"{where}.scale_up"].T
    posterior = torch.distributions.Normal(h, (low_rank + named[f"{where}.log_scale"]).clamp(-12, 2).exp())
    follows = F.pad(mask[:, 1:] & mask[:, :-1], (1, 0)).unsqueeze(-1)
    mean = torch.where(follows, 0.9 * F.pad(h, (0, 0, 1, 0))[:, :-1], 0.0)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(mean, 1.0)).sum(-1)
    count, weights = kl_weights(name, inputs, wanted)
    out = model(**inputs, **wanted)
    torch.testing.assert_close(out.kl, (kl * weights[1]).sum() / count, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", WITH_TARGETS)
def test_accumulation_changes_nothing(name):
    """Micro-batches that are told the targets of the whole batch add up to its loss, KL and gradient."""
    inputs = given(name, batch=4, padding=3)
    model, wanted = retrofitted(name, [0, 2]), targets(name, inputs)
    with posterior_noise(UnitNoise()):
        whole = model(**inputs, **wanted, num_posterior_samples=SAMPLES)
    count, _ = kl_weights(name, inputs, wanted)
    parts = []
    for sequences in ([0], [1, 2, 3]):
        some = rows_of({**inputs, **wanted}, sequences)
        with posterior_noise(UnitNoise(grid(sequences, SAMPLES))):
            parts.append(model(**some, num_posterior_samples=SAMPLES, num_items_in_batch=torch.tensor(count)))
    for field in ("loss", "nll", "kl", "kl_per_layer"):
        torch.testing.assert_close(parts[0][field] + parts[1][field], whole[field], atol=2e-5, rtol=1e-5)
    if name in FEW:
        assert_same_gradients(gradients(model, parts[0].loss + parts[1].loss), gradients(model, whole.loss), 1e-4)


@pytest.mark.parametrize("name", ["gpt2", "bert-single", "t5"])
def test_accumulation_changes_nothing_in_the_predictive_nll(name):
    inputs = given(name, batch=4, padding=3)
    model, wanted = retrofitted(name, [1], objective="mc_nll"), targets(name, inputs)
    with posterior_noise(UnitNoise()):
        whole = model(**inputs, **wanted, num_posterior_samples=SAMPLES)
    count, _ = kl_weights(name, inputs, wanted)
    parts = []
    for sequences in ([0, 1, 2], [3]):
        some = rows_of({**inputs, **wanted}, sequences)
        with posterior_noise(UnitNoise(grid(sequences, SAMPLES))):
            parts.append(model(**some, num_posterior_samples=SAMPLES, num_items_in_batch=count))
    for field in ("loss", "nll", "kl"):
        torch.testing.assert_close(parts[0][field] + parts[1][field], whole[field], atol=2e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, parts[0].loss + parts[1].loss), gradients(model, whole.loss), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_company_in_a_batch_changes_nothing(name):
    """Logits and KL of a sequence alone, and beside others: the units of a token hear of no other row."""
    inputs = given(name, batch=3)
    model = retrofitted(name, [1, 2])
    with posterior_noise(same_everywhere):
        together = model(**inputs, num_posterior_samples=SAMPLES, output_posteriors=True)
        for row in range(3):
            alone = model(**rows_of(inputs, [row]), num_posterior_samples=SAMPLES, output_posteriors=True)
            torch.testing.assert_close(alone.logits, together.logits[[row]], atol=2e-5, rtol=1e-4)
            for layer, statistics in alone.posteriors.items():
                torch.testing.assert_close(statistics.kl, together.posteriors[layer].kl[[row]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "mixtral", "bert-masked", "roberta-tokens"])
def test_micro_batch_without_a_target_costs_nothing(name):
    model, inputs = retrofitted(name), given(name)
    labels = torch.full((2, 8), -100)
    out = model(**inputs, labels=labels, num_posterior_samples=2, num_items_in_batch=5)
    assert out.loss == 0 and out.kl == 0
    assert all(grad.eq(0).all() for grad in gradients(model, out.loss).values())


@pytest.mark.parametrize("name", ["gpt2", "bloom", "bert-masked", "bert-single", "t5", "vit"])
def test_nll_of_the_predictive_distribution(name):
    """`objective="mc_nll"`: of p̄, not the mean over samples."""
    inputs = given(name, padding=3)
    wanted = targets(name, inputs)
    model = retrofitted(name, [1, 2], objective="mc_nll")
    with posterior_noise(UnitNoise()):
        out = model(**inputs, **wanted, num_posterior_samples=4)
    log_p, labels = answer(out), wanted["labels"]
    if TINY[name].task == "next":
        log_p, labels = log_p[:, :-1], labels[:, 1:]
    expected = F.nll_loss(log_p.flatten(0, -2), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(out.nll, expected, atol=1e-5, rtol=1e-5)
    elbo = retrofitted(name, [1, 2])
    with posterior_noise(UnitNoise()):
        upper = elbo(**inputs, **wanted, num_posterior_samples=4)
    torch.testing.assert_close(upper.logits, out.logits)
    assert upper.nll > out.nll and torch.equal(upper.kl, out.kl)
    grads = gradients(model, out.loss)
    assert all(grad.isfinite().all() for grad in grads.values()) and any(".eve." in key for key in grads)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon-alibi", "bert-masked"])
def test_embeddings_instead_of_ids(name):
    model, inputs = retrofitted(name), given(name, padding=2)
    wanted = targets(name, inputs)
    embedded = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    embedded.pop("input_ids")
    with posterior_noise(UnitNoise()):
        expected = model(**inputs, **wanted, num_posterior_samples=SAMPLES)
        actual = model(**embedded, **wanted, num_posterior_samples=SAMPLES)
    torch.testing.assert_close(actual.loss, expected.loss)
    kept = attended(name, inputs)
    torch.testing.assert_close(actual.logits[kept], expected.logits[kept])


def test_default_number_of_samples_is_of_train_mode():
    model, inputs = retrofitted("bloom", num_posterior_samples=2), given("bloom")
    assert torch.equal(model(**inputs).logits, stock("bloom")(**inputs).logits)
    drawn = model.train()(**inputs, output_sample_logits=True).sample_logits
    assert drawn.shape[:2] == (2, 2)


def test_loss_under_autograd_and_without_is_the_same():
    """The fused pass that trains, and the plain one that adds statistics."""
    for name in ("gpt2", "opt", "mixtral", "t5"):
        model, inputs = retrofitted(name), given(name, padding=2)
        wanted = targets(name, inputs)
        values = []
        for options in ({}, {"output_posteriors": True}):
            with posterior_noise(UnitNoise()):
                values.append(model(**inputs, **wanted, num_posterior_samples=SAMPLES, **options))
        torch.testing.assert_close(values[0].loss, values[1].loss)
        assert_same_gradients(gradients(model, values[0].loss), gradients(model, values[1].loss))


@torch.no_grad()
@pytest.mark.parametrize("objective", ["elbo", "mc_nll"])
def test_decoder_reads_its_targets_shifted(objective):
    """As T5 is trained: with labels alone."""
    inputs = given("t5", padding=2)
    model, wanted = retrofitted("t5", objective=objective), targets("t5", inputs)
    inputs.pop("decoder_input_ids")
    before = model._shift_right(wanted["labels"])
    with posterior_noise(UnitNoise()):
        actual = model(**inputs, **wanted, num_posterior_samples=SAMPLES)
        expected = model(**inputs, **wanted, decoder_input_ids=before, num_posterior_samples=SAMPLES)
    for field in ("loss", "nll", "kl_per_layer", "logits"):
        torch.testing.assert_close(actual[field], expected[field])


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert-spans", "bert-multi", "bert-regression"])
def test_other_kinds_of_target(name):
    """Loss and KL of S samples are means over single samples."""
    inputs = attention_inputs(name, padding=2)
    model, wanted = retrofitted(attention_stock(name), [1]), attention_targets(name, inputs)
    with posterior_noise(UnitNoise()):
        out = model(**inputs, **wanted, num_posterior_samples=SAMPLES)
    singles = []
    for sample in range(SAMPLES):
        with posterior_noise(UnitNoise(grid(2, [sample]))):
            singles.append(model(**inputs, **wanted, num_posterior_samples=1))
    for field in ("loss", "nll", "kl"):
        torch.testing.assert_close(out[field], sum(one[field] for one in singles) / SAMPLES, atol=1e-5, rtol=1e-5)
    assert singles[0].nll != singles[1].nll
    model.config.variational = {**model.config.variational, "objective": "mc_nll"}
    with pytest.raises(ValueError, match="use objective='elbo'"):
        model(**inputs, **wanted, num_posterior_samples=SAMPLES)
