"""VariationalGPT with variational attention: its mean pass, its samples, their moments, its KL and its gradients."""

import math

import pytest
import torch
from integration_models import RowNoise, attention_config, prompt, stock_llama, tiny_model, twin_of
from transformers import AutoModelForCausalLM

from hf_variational import VariationalGPTForCausalLM, posterior_noise
from hf_variational.modeling.dirichlet import multi_gamma_kl

KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")
DEPENDENT = (False, "query", True)
# Where the layers have variational units and variational attention.
SITES = {
    "attention alone": {"eve": None},
    "attention above": {"eve": None, "attention_layers": [1, 2]},
    "attention between": {"eve": None, "attention_layers": [1]},
    "units first": {"variational_layers": [0], "attention_layers": [1, 2]},
    "attention first": {"variational_layers": [2], "attention_layers": [0]},
    "same layer": {"variational_layers": [1], "attention_layers": [1]},
    "everything": {},
}
SAMPLES = 3
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def model_of(kind="dirichlet", data_dependent=False, sites="attention alone", attention=None, **options):
    config = attention_config(kind, data_dependent, **(attention or {}))
    return tiny_model(**{"attention": config, **SITES[sites], **options})


def labelled(padded: bool = True) -> dict:
    ids = prompt()
    mask = PADDING if padded else torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run(model, noise=None, **options):
    with posterior_noise(noise or RowNoise()):
        return model(**options)


def gradients(model, loss) -> dict:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-4):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        atol = tolerance * grad.abs().max().item() + 1e-7
        torch.testing.assert_close(
            actual[name], grad, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
class TestMeanPass:
    @pytest.mark.parametrize("sites", ["attention alone", "units first", "everything"])
    def test_equals_the_deterministic_twin_exactly(self, implementation, kind, data_dependent, sites):
        model = model_of(kind, data_dependent, sites, attn_implementation=implementation)
        twin, batch = twin_of(model), labelled()
        with torch.no_grad():
            assert torch.equal(model(batch["input_ids"]).logits, twin(batch["input_ids"]).logits)
            out, expected = model(**batch), twin(**batch)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.nll, expected.loss)
            assert torch.equal(model(**batch, kl_weight=0.0).loss, expected.loss)
        assert out.kl > 0 and torch.equal(out.loss, out.nll + model.config.kl_weight * out.kl)

    def test_draws_nothing(self, implementation, kind, data_dependent):
        """So that dropout in train mode falls on the same weights as the twin's."""
        options = {"attn_implementation": implementation, "attention_dropout": 0.3}
        model = model_of(kind, data_dependent, **options).train()
        twin, batch = twin_of(model).train(), labelled()
        losses = []
        for each in (model, twin):
            torch.manual_seed(4)
            losses.append(each(**batch, num_posterior_samples=0).nll)
        assert torch.equal(*losses)
        assert not torch.equal(losses[0], model.eval()(**batch).nll)


class TestKernels:
    def test_mean_pass_equals_a_stock_model(self):
        model, stock = model_of(), stock_llama()
        state = {name: value for name, value in model.state_dict().items() if ".posterior." not in name}
        stock.load_state_dict(state)
        with torch.no_grad():
            assert torch.equal(model(prompt()).logits, stock(prompt()).logits)

    @pytest.mark.parametrize(("samples", "sites", "calls"), [(0, "everything", 3), (2, "attention above", 1)])
    def test_sdpa_runs_where_nothing_is_sampled(self, samples, sites, calls, monkeypatch):
        model, seen = model_of(sites=sites), []
        kernel = torch.nn.functional.scaled_dot_product_attention

        def counted(query, *args, **kwargs):
            seen.append(query.shape)
            return kernel(query, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        for options in ({}, {"labels": prompt()}):
            seen.clear()
            model(prompt(), num_posterior_samples=samples, **options)
            assert len(seen) == calls


def beta_moments(p, q) -> tuple:
    """Mean, and second and fourth central moment of Beta(p, q), a Dirichlet's marginal; 0 at p = 0."""
    n = p + q
    variance = p * q / (n**2 * (n + 1))
    fourth = 3 * p * q * (2 * n**2 + p * q * (n - 6)) / (n**4 * (n + 1) * (n + 2) * (n + 3))
    return p / n, variance, fourth


def by_definition(kind, mean, value, draws) -> torch.Tensor:
    """Weights of the kinds that have no closed form, [draws, *mean.shape]."""
    generator = torch.Generator().manual_seed(1)
    shape = (draws, *mean.shape)
    if kind == "gaussian":
        log_g = mean.log() + value * torch.randn(shape, generator=generator)
    else:
        alpha = (value * mean).double()
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        log_g = ((uniform.log() + torch.lgamma(alpha + 1)) / alpha).masked_fill(mean == 0, -torch.inf)
    return torch.softmax(log_g, -1).float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
class TestSamples:
    def test_they_vary(self, kind, data_dependent):
        model = model_of(kind, data_dependent)
        with torch.no_grad():
            out = model(prompt(), num_posterior_samples=8, output_uncertainty=True)
        information = out.uncertainty.mutual_information
        assert (information[:, 1:] > 1e-3).all()
        # the first query sees one key, whatever its weight's posterior
        assert information[:, 0].abs().max() < 1e-5
        assert (out.uncertainty.top1_flip_rate > 0).any()

    def test_they_vanish_at_the_limit(self, kind, data_dependent):
        """sigma -> 0, a -> infinity: ordinary attention."""
        model = model_of(kind, data_dependent, attention={"initial_scale": 1e-7, "initial_concentration": 1e10})
        with torch.no_grad():
            out = model(prompt(), num_posterior_samples=4, output_sample_logits=True, output_attentions=True)
            mean = model(prompt(), output_attentions=True)
        expected = mean.logits.log_softmax(-1)
        torch.testing.assert_close(out.logits, expected, rtol=0, atol=2e-3)
        for sample in out.sample_logits.unbind(1):
            torch.testing.assert_close(sample, expected, rtol=0, atol=4e-3)
        for sampled, weights in zip(out.attentions, mean.attentions, strict=True):
            torch.testing.assert_close(sampled, weights.repeat_interleave(4, 0), rtol=0, atol=3e-4)

    def test_moments_of_output_attentions(self, kind, data_dependent):
        """Those of Dirichlet(a m) inside a model; of the other kinds those of their definitions, by brute force."""
        draws = 4000
        model = model_of(kind, data_dependent, attention_layers=[0], num_hidden_layers=1)
        posterior, values = model.model.layers[0].self_attn.posterior, []
        log_value = posterior.log_value
        posterior.log_value = lambda *args: values.append(log_value(*args)) or values[-1]
        ids = prompt(1)
        with torch.no_grad():
            mean = model.model(ids, output_attentions=True).attentions[0][0]
            weights = model.model(ids, num_posterior_samples=draws, output_attentions=True).attentions[0]
        value = values[-1].exp()[0]
        visible = mean > 0
        assert visible.sum() == 4 * 21
        if kind == "dirichlet":
            expected, variance, fourth = beta_moments(value * mean, value * (1 - mean))
        else:
            brute = by_definition(kind, mean, value, 10 * draws)
            expected, variance = brute.mean(0), brute.var(0)
            fourth = (brute - expected).pow(4).mean(0)
        spread = (weights - expected).square().mean(0)
        error, spread_error = (variance / draws).sqrt(), ((fourth - variance**2) / draws).sqrt()
        assert ((weights.mean(0) - expected).abs() <= 5 * error + 1e-5).all()
        assert ((spread - variance).abs() <= 6 * spread_error + 1e-5).all()
        assert weights.masked_select(~visible).eq(0).all()

    @pytest.mark.parametrize("sites", SITES)
    def test_equal_separate_passes_with_their_noise(self, kind, data_dependent, sites):
        """The naive oracle: each sample alone; logits, the tape, the loss and its gradients."""
        model, batch = model_of(kind, data_dependent, sites), labelled()
        options = {"output_sample_logits": True, "output_posteriors": True, "output_attentions": True, **batch}
        together = run(model, num_posterior_samples=SAMPLES, **options)
        alone = [
            run(model, RowNoise(sample=s, of=SAMPLES), num_posterior_samples=1, **options) for s in range(SAMPLES)
        ]
        keep = batch["attention_mask"].bool()
        for s in range(SAMPLES):
            torch.testing.assert_close(
                together.sample_logits[:, s][keep], alone[s].sample_logits[:, 0][keep], rtol=1e-4, atol=1e-4
            )
            for many, one in zip(together.attentions, alone[s].attentions, strict=True):
                many = many if len(many) == 2 else many[s::SAMPLES]
                many, one = (weights.transpose(1, 2)[keep] for weights in (many, one))
                torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-5)
        for name in ("loss", "nll", "kl", "kl_per_layer"):
            torch.testing.assert_close(
                together[name], torch.stack([out[name] for out in alone]).mean(0), rtol=1e-4, atol=1e-5
            )
        for layer, statistics in together.attention_posteriors.items():
            each = torch.stack([out.attention_posteriors[layer].kl for out in alone]).mean(0)
            torch.testing.assert_close(statistics.kl[keep], each[keep], rtol=1e-4, atol=1e-4)
        assert_same_gradients(
            gradients(model, together.loss), gradients(model, sum(out.loss for out in alone) / SAMPLES)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("samples", [0, 3])
def test_output_attentions(kind, implementation, samples):
    """One entry a layer; what was sampled in the layers that sample, the mean elsewhere; rows sum to 1."""
    model = model_of(kind, "query", "attention between", attn_implementation=implementation)
    out = run(model, input_ids=prompt(), num_posterior_samples=samples, output_attentions=True)
    rows = [2, 2 * max(samples, 1), 2 * max(samples, 1)]
    assert [weights.shape for weights in out.attentions] == [(count, 4, 6, 6) for count in rows]
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.triu(1).eq(0).all()
    eager = twin_of(model)
    eager.set_attn_implementation("eager")
    expected = eager(prompt(), output_attentions=True).attentions
    for index in range(3 if samples == 0 else 1):
        torch.testing.assert_close(out.attentions[index], expected[index])
    if samples:
        sampled = out.attentions[1].unflatten(0, (2, samples))
        differs = (sampled[:, 0] - sampled[:, 1]).abs().amax(-1) > 1e-3
        assert not differs[..., 0].any() and differs[..., 1:].float().mean() > 0.6


@pytest.mark.parametrize("samples", [0, 2])
def test_sdpa_and_eager_agree(samples):
    models = [model_of(sites="everything", attn_implementation=name) for name in ("sdpa", "eager")]
    batch = labelled()
    batch["labels"][0, 2] = -100  # its predecessor is padding
    outs = [run(model, num_posterior_samples=samples, **batch) for model in models]
    for name in ("loss", "kl"):
        torch.testing.assert_close(outs[0][name], outs[1][name])


def log_value_of(model, layer: int) -> torch.Tensor:
    """log of the scale or concentration of each head, where it depends on nothing."""
    posterior = model.model.layers[layer].self_attn.posterior
    return posterior.log_value(torch.zeros(1), None).squeeze()


def kl_by_hand(model, weights, layer: int) -> torch.Tensor:
    """KL of each head and token, [batch, heads, length], from the mean weights."""
    log_value, config = log_value_of(model, layer), model.config.attention
    visible = weights > 0
    if config.kind == "gaussian":
        ratio = log_value.exp() / config.prior_scale
        return visible.sum(-1) * (0.5 * (ratio**2 - 1) - ratio.log())[:, None]
    log_mean, log_prior = weights.log(), math.log(config.prior_concentration)
    target = {
        "contextual": log_mean + log_prior,
        "constant": torch.full_like(log_mean, log_prior),
        "uniform": (log_prior - visible.sum(-1, keepdim=True).log()).expand_as(log_mean),
    }[config.prior]
    return multi_gamma_kl(log_mean + log_value[:, None, None], target).sum(-1)


PRIORS = [("gaussian", "contextual")]
PRIORS += [(kind, prior) for kind in KINDS[1:] for prior in ("contextual", "constant", "uniform")]


@pytest.mark.parametrize(("kind", "prior"), PRIORS)
class TestKL:
    def test_of_the_mean_pass_by_hand(self, kind, prior):
        """Summed over heads and keys at the tokens that are scored, per target token and layer."""
        model, batch = model_of(kind, attention={"prior": prior}), labelled()
        out = model(**batch, output_attentions=True, output_posteriors=True)
        targets = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), -100)], 1) != -100
        scored = targets & batch["attention_mask"].bool()
        for layer in range(3):
            kl = kl_by_hand(model, out.attentions[layer], layer)
            by_token, statistics = kl.sum(1), out.attention_posteriors[layer]
            torch.testing.assert_close(statistics.kl[scored], by_token[scored], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                out.kl_per_layer[layer], by_token[scored].sum() / targets.sum(), rtol=1e-4, atol=1e-4
            )
            per_head = kl.transpose(1, 2)[scored].mean(0)
            torch.testing.assert_close(statistics.kl_per_head, per_head, rtol=1e-4, atol=1e-4)
            entropy = torch.special.entr(out.attentions[layer]).sum(-1).transpose(1, 2)[scored]
            torch.testing.assert_close(statistics.entropy, entropy.mean(0))
            torch.testing.assert_close(statistics.effective_keys, entropy.exp().mean(0))
            name = "scale" if kind == "gaussian" else "concentration"
            torch.testing.assert_close(getattr(statistics, name), log_value_of(model, layer).exp())
        torch.testing.assert_close(out.kl, out.kl_per_layer.sum())

    def test_of_samples_in_the_first_layer_is_that_of_the_mean_pass(self, kind, prior):
        """Nothing below it is random, and a posterior's KL does not depend on the sample drawn of it."""
        model, batch = model_of(kind, attention={"prior": prior}), labelled()
        kls = [model(**batch, num_posterior_samples=samples).kl_per_layer for samples in (0, 1, 4)]
        for kl in kls[1:]:
            torch.testing.assert_close(kl[0], kls[0][0])
            if kind != "gaussian" and prior != "contextual":
                assert (kl[1:] - kls[0][1:]).abs().min() > 1e-5, "above it the logits differ from sample to sample"

    @pytest.mark.parametrize("free_bits", [0.05, 1.0, 50.0])
    def test_free_bits_are_of_each_head(self, kind, prior, free_bits):
        model, batch = model_of(kind, attention={"prior": prior}, sites="same layer"), labelled()
        out = run(model, num_posterior_samples=2, free_bits=free_bits, kl_weight=1.0, output_posteriors=True, **batch)
        targets = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), -100)], 1) != -100
        scored = targets & batch["attention_mask"].bool()
        # both posteriors of the layer have a floor of their own, per sequence once the samples are averaged
        charged = out.attention_posteriors[1].kl.clamp(min=4 * free_bits)[scored].sum()
        charged = charged + out.posteriors[1].kl.clamp(min=48 * free_bits)[scored].sum()
        torch.testing.assert_close(out.loss - out.nll, charged / targets.sum(), rtol=1e-4, atol=1e-4)
        assert out.kl_per_layer.shape == (1,)


def test_kl_of_a_layer_with_both_posteriors_is_their_sum():
    model, batch = model_of(sites="units first", attention_layers=[0, 2]), labelled()
    out = run(model, num_posterior_samples=2, output_posteriors=True, **batch)
    assert sorted(out.posteriors) == [0] and sorted(out.attention_posteriors) == [0, 2]
    assert out.kl_per_layer.shape == (2,)
    targets = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), -100)], 1) != -100
    scored = targets & batch["attention_mask"].bool()
    parts = [out.attention_posteriors[0].kl + out.posteriors[0].kl, out.attention_posteriors[2].kl]
    for layer, kl in enumerate(parts):
        torch.testing.assert_close(out.kl_per_layer[layer], kl[scored].sum() / targets.sum())
    weight = model.config.kl_weight
    torch.testing.assert_close(out.loss, out.nll + weight * out.kl)


def test_a_concentration_at_its_prior_has_no_kl():
    model = model_of(attention={"initial_concentration": 3.0}, sites="attention between")
    with torch.no_grad():
        model.model.layers[1].self_attn.posterior.raw.zero_()
    assert model(**labelled()).kl.abs() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
@pytest.mark.parametrize("samples", [1, 2])
def test_every_parameter_learns(kind, data_dependent, samples):
    model = model_of(kind, data_dependent).train()
    model(prompt(), labels=prompt(), num_posterior_samples=samples).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_attention_dropout(kind):
    plain = model_of(kind)
    dropping = model_of(kind, attention_dropout=0.4)
    expected = run(plain, input_ids=prompt(), num_posterior_samples=2).logits
    assert torch.equal(run(plain.train(), input_ids=prompt(), num_posterior_samples=2).logits, expected)
    assert torch.equal(run(dropping, input_ids=prompt(), num_posterior_samples=2).logits, expected)
    out = run(dropping.train(), input_ids=prompt(), num_posterior_samples=2, output_attentions=True)
    assert (out.logits - expected).abs().max() > 0.05
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(4, 4, 6))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestHalfPrecision:
    def assert_near(self, out, expected, dtype):
        for name in ("loss", "nll", "kl", "kl_per_layer", "logits"):
            assert out[name].isfinite().all(), name
        for statistics in out.attention_posteriors.values():
            assert statistics.kl.dtype == torch.float32
        tolerance = 0.15 if dtype == torch.bfloat16 else 0.03
        torch.testing.assert_close(out.kl.float(), expected.kl, rtol=tolerance, atol=0.0)
        torch.testing.assert_close(out.nll.float(), expected.nll, rtol=tolerance, atol=0.0)
        assert all(measure[:, :-1].isfinite().all() for measure in out.uncertainty.values())

    def both(self, kind, data_dependent, dtype, tmp_path):
        options = {"num_posterior_samples": 3, "output_posteriors": True, "output_uncertainty": True, **labelled()}
        model = model_of(kind, data_dependent, "everything")
        expected = run(model, **options)
        model.save_pretrained(tmp_path)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for each in (half, model.to(dtype)):
            out = run(each, **options)
            yield each, out, expected

    def test_near_float32_with_the_same_noise(self, kind, data_dependent, dtype, tmp_path):
        for model, out, expected in self.both(kind, data_dependent, dtype, tmp_path):
            self.assert_near(out, expected, dtype)
            out.loss.backward()
            assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_autocast(self, kind, data_dependent, dtype, tmp_path):
        options = {"num_posterior_samples": 3, "output_posteriors": True, "output_uncertainty": True, **labelled()}
        model = model_of(kind, data_dependent, "everything")
        expected = run(model, **options)
        with torch.autocast("cpu", dtype=dtype):
            out = run(model, **options)
        self.assert_near(out, expected, dtype)
        out.loss.backward()


def test_double_precision_stays_double():
    model = model_of(data_dependent=True, sites="everything").double()
    out = run(model, num_posterior_samples=2, **labelled())
    assert {out[name].dtype for name in ("loss", "nll", "kl", "logits")} == {torch.float64}
    out.loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float64}


def test_output_fields_are_ignored_by_a_plain_trainer():
    model = model_of(sites="everything")
    out = run(model, num_posterior_samples=2, output_posteriors=True, **labelled())
    assert set(out) - set(model.config.keys_to_ignore_at_inference) == {"loss", "logits"}
    assert sorted(out.attention_posteriors) == [0, 1, 2]
    assert list(out)[:2] == ["loss", "logits"]


def test_what_a_user_gets():
    from hf_variational import VariationalAttentionConfig, VariationalGPTConfig

    attention = VariationalAttentionConfig(kind="dirichlet", data_dependent=False)
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 96}
    config = VariationalGPTConfig(vocab_size=99, eve=None, attention=attention, **shape)
    model, ids = AutoModelForCausalLM.from_config(config), prompt()
    assert type(model) is VariationalGPTForCausalLM
    out = model(ids, labels=ids, num_posterior_samples=4, output_posteriors=True)
    total = sum(statistics.kl[:, :-1].sum() for statistics in out.attention_posteriors.values())
    torch.testing.assert_close(out.kl, total / 10)
    assert out.posteriors == {}
    for statistics in out.attention_posteriors.values():
        torch.testing.assert_close(statistics.concentration, torch.full((8,), 100.0))
