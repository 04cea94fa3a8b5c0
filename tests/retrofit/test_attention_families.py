"""Attention made variational in models of many families: the mean pass, samples, and what a sample sees."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from families import (
    DEPENDENT,
    FAMILIES,
    HEADS,
    KINDS,
    LANGUAGE_MODELS,
    LAYERS,
    LENGTH,
    WITH_TARGETS,
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
from torch.nn import functional as F

from hf_variational import posterior_noise
from hf_variational.retrofit import variational_class, variationalize

SAMPLES = 3
EVERY_WAY = [(name, how) for name, family in FAMILIES.items() for how in family.implementations]
ENCODERS = ["bert", "bert-masked", "bert-tokens", "bert-single", "roberta-masked", "distilbert-masked"]


def assert_equal_outputs(actual, expected, exactly: bool = True):
    """Every tensor of `expected` is in `actual`; bit for bit, unless weights lie elsewhere in memory, where a matrix
    product may add in another order.
    """
    for name, value in expected.items():
        values, others = (value, actual[name]) if isinstance(value, tuple) else ((value,), (actual[name],))
        for one, other in zip(values, others, strict=True):
            if torch.is_tensor(one):
                assert torch.equal(other, one) if exactly else torch.allclose(other, one, atol=1e-5), name


def seeded(model, given, seed=1, **options):
    torch.manual_seed(seed)
    return model(**given, num_posterior_samples=SAMPLES, **options)


@torch.no_grad()
@pytest.mark.parametrize(("name", "how"), EVERY_WAY)
def test_mean_pass_is_the_stock_model(name, how):
    plain, given = stock(name, how), inputs(name, padding=2)
    before = copy.deepcopy(plain.state_dict())
    model = retrofitted(plain)
    assert model.config._attn_implementation == {"sdpa": "variational", "eager": "variational_eager"}[how]
    for options in [{}, {"output_hidden_states": True}]:
        assert_equal_outputs(model(**given, **options), plain(**given, **options))
    if how == "eager":
        assert_equal_outputs(model(**given, output_attentions=True), plain(**given, output_attentions=True))
    after = model.state_dict()
    assert all(torch.equal(after.pop(key), value) for key, value in before.items())
    assert after and all(".posterior." in key for key in after)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_TARGETS)
def test_nll_of_the_mean_pass_is_the_stock_loss(name):
    plain, given = stock(name), inputs(name, padding=2)
    wanted = targets(name, given)
    out = retrofitted(plain)(**given, **wanted)
    assert torch.equal(out.nll, plain(**given, **wanted).loss)
    torch.testing.assert_close(out.loss, out.nll + 0.1 * out.kl)
    assert out.kl > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_mean_attentions_beside_sdpa(name):
    """The kernel keeps its weights to itself; those of the eager pass are answered."""
    given = inputs(name, padding=2)
    expected = stock(name, "eager")(**given, output_attentions=True).attentions
    actual = retrofitted(stock(name, "sdpa"))(**given, output_attentions=True).attentions
    attended = given["attention_mask"].bool()
    for one, other in zip(actual, expected, strict=True):
        # [batch, queries, heads, keys]: where the query is padding it sees nothing, and its weights are 0 here
        one, other = one.transpose(1, 2), other.transpose(1, 2)
        torch.testing.assert_close(one[attended], other[attended], atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "how"), EVERY_WAY)
def test_many_certain_samples_are_the_mean_pass(name, how):
    """a to infinity; with every mask, softcap and window of the family, in both implementations."""
    plain, given = stock(name, how), inputs(name, padding=2)
    model = retrofitted(plain)
    for key, parameter in posterior_parameters(model).items():
        parameter.fill_(1e11 if key.endswith("raw") else 0.0)
    expected, actual = model(**given)[0], model(**given, num_posterior_samples=2)[0]
    if FAMILIES[name].task is None:
        expected = expected.repeat_interleave(2, 0)
    elif FAMILIES[name].task not in ("multi", "regression"):
        expected = torch.log_softmax(expected, -1)
    kept = slice(None)
    if not FAMILIES[name].is_image and actual.ndim == 3:
        kept = given["attention_mask"].bool().repeat_interleave(actual.shape[0] // 2, 0)
    torch.testing.assert_close(actual[kept], expected[kept], atol=2e-3, rtol=1e-3)


class TestSamples:
    @torch.no_grad()
    @pytest.mark.parametrize("name", [name for name in WITH_TARGETS if FAMILIES[name].task not in ("multi", "spans")])
    def test_vary_in_every_family(self, name):
        given = inputs(name, padding=2)
        if FAMILIES[name].task == "regression":
            drawn = retrofitted(name)(**given, num_posterior_samples=8, output_sample_logits=True).sample_logits
            assert drawn.shape == (2, 8, 1) and drawn.std(1).min() > 1e-4
            return
        out = retrofitted(name)(**given, num_posterior_samples=8, output_uncertainty=True)
        assert out.uncertainty.mutual_information.shape == out.logits.shape[:-1]
        assert out.uncertainty.mutual_information.amax(-1).min() > 1e-4
        torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(out.logits.shape[:-1]))

    @pytest.mark.parametrize("name", ["bert-masked", "gpt2-next", "vit-single"])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dependent", DEPENDENT)
    def test_vary_in_every_kind_and_every_parameter_learns(self, name, kind, dependent):
        model, given = retrofitted(name, kind, dependent), inputs(name, padding=2)
        for field in ("nll", "kl"):
            out = model(**given, **targets(name, given), num_posterior_samples=4, output_uncertainty=True)
            assert out.uncertainty.mutual_information.max() > 1e-4
            grads = gradients(model, out[field], lambda key: ".posterior." in key)
            assert grads.keys() == posterior_parameters(model).keys()
            assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads.values())

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["dirichlet", "gaussian"])
    def test_moments_of_the_weights_inside_bert(self, kind):
        """Of Dirichlet(a m), whose covariance is (diag(m) - m m') / (a + 1); padding included."""
        model, given = retrofitted("bert", kind, layers=[1]), inputs("bert", length=6, padding=2)
        mean = model(**given, output_attentions=True).attentions[1]
        count = 4000
        drawn = model(**given, num_posterior_samples=count, output_attentions=True).attentions[1]
        drawn = drawn.unflatten(0, (2, count)).double()
        assert (drawn.sum(-1) - 1).abs().max() < 1e-6
        assert drawn[0, ..., 4:].eq(0).all() and drawn[1].gt(0).any(1).all()
        if kind == "gaussian":
            log_ratio = drawn[1].log() - drawn[1].log()[..., :1]
            value = posterior_parameters(model)["encoder.layer.1.attention.self.posterior.raw"]
            scale = 0.7 * F.softplus(value) / math.log(2.0)
            expected = 2.0 * scale.double().square().view(HEADS, 1, 1).expand(HEADS, 6, 5)
            torch.testing.assert_close(log_ratio.var(0)[..., 1:], expected, rtol=0.15, atol=0)
            return
        value = posterior_parameters(model)["encoder.layer.1.attention.self.posterior.raw"]
        a = (6.0 * F.softplus(value) / math.log(2.0)).double().view(1, HEADS, 1, 1)
        mean = mean.double()
        variance = mean * (1 - mean) / (a + 1)
        error = (variance / count).sqrt() + 1e-6
        assert ((drawn.mean(1) - mean).abs() < 5 * error).all()
        torch.testing.assert_close(drawn.var(1), variance, rtol=0.2, atol=2e-4)
        cross = torch.einsum("bshqk,bshql->bhqkl", drawn, drawn) / count
        cross = cross - torch.einsum("bhqk,bhql->bhqkl", drawn.mean(1), drawn.mean(1))
        expected = torch.diag_embed(mean) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        torch.testing.assert_close(cross, expected / (a.unsqueeze(-1) + 1), rtol=0.3, atol=2e-3)


def joined(name: str, singles: torch.Tensor) -> torch.Tensor:
    """What S samples answer, [batch, ...], from each one's answer, [S, batch, ...]."""
    task = FAMILIES[name].task
    if task == "regression":
        return singles.mean(0)
    if task == "multi":
        return torch.logit(torch.sigmoid(singles.double()).mean(0)).float()
    return torch.softmax(singles.double(), -1).mean(0).log().float()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layers", ["all", [1]], ids=["all", "middle"])
def test_samples_are_a_loop_over_single_samples(name, layers):
    """Answers, loss, KL and gradients of S rows a sequence, against S passes of one sample each."""
    model, given = retrofitted(name, data_dependent="query", layers=layers), inputs(name, padding=2)
    wanted = targets(name, given) if FAMILIES[name].task else {}
    with posterior_noise(WeightsNoise()):
        out = model(**given, **wanted, num_posterior_samples=SAMPLES)
    singles = []
    for sample in range(SAMPLES):
        with posterior_noise(WeightsNoise(only=[sample])):
            singles.append(model(**given, **wanted, num_posterior_samples=1))
    if not wanted:
        expected = torch.stack([single.last_hidden_state for single in singles], 1).flatten(0, 1)
        torch.testing.assert_close(out.last_hidden_state, expected, atol=1e-5, rtol=1e-4)
        return
    for field in ("logits", "start_logits", "end_logits"):
        if field in out:
            expected = joined(name, torch.stack([single[field] for single in singles]))
            torch.testing.assert_close(out[field], expected, atol=1e-5, rtol=1e-4)
    for field in ("nll", "kl", "kl_per_layer", "loss"):
        expected = torch.stack([single[field] for single in singles]).mean(0)
        torch.testing.assert_close(out[field], expected, atol=1e-5, rtol=1e-4)
    expected = gradients(model, sum(single.loss for single in singles) / SAMPLES)
    assert_same_gradients(gradients(model, out.loss), expected, 5e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("layers", "split"), [("all", 0), ([1], 1), ([2], 2), ([2, 1], 1)])
def test_rows_split_at_the_first_variational_layer(name, layers, split):
    model, given = retrofitted(name, layers=layers), inputs(name)
    assert model.settings.attention_layers == ([0, 1, 2] if layers == "all" else sorted(layers))
    out = model(**given, num_posterior_samples=SAMPLES, output_hidden_states=True, output_attentions=True)
    rows = [2 if layer < split else 2 * SAMPLES for layer in range(LAYERS)]
    assert [weights.shape[0] for weights in out.attentions] == rows
    assert [states.shape[0] for states in out.hidden_states[1:]] == rows


class TestCausality:
    @torch.no_grad()
    @pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "gpt2"])
    @pytest.mark.parametrize("dependent", DEPENDENT)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_future_token_changes_nothing_earlier(self, name, kind, dependent):
        model, given = retrofitted(name, kind, dependent), inputs(name)
        outputs = []
        for token in (5, 11):
            given["input_ids"][:, 5] = token
            with posterior_noise(WeightsNoise()):
                outputs.append(model(**given, num_posterior_samples=SAMPLES)[0])
        assert torch.equal(outputs[0][:, :5], outputs[1][:, :5])
        assert not torch.equal(outputs[0][:, 5], outputs[1][:, 5])

    @torch.no_grad()
    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    @pytest.mark.parametrize("dependent", DEPENDENT)
    @pytest.mark.parametrize("kind", ["dirichlet", "gaussian"])
    def test_padding_in_front_changes_nothing(self, name, kind, dependent):
        model, given = retrofitted(name, kind, dependent), inputs(name, batch=1)
        padding = 3
        padded = {key: F.pad(value, (padding, 0)) for key, value in given.items()}
        positions = torch.arange(-padding, LENGTH).unsqueeze(0)
        with posterior_noise(WeightsNoise()):
            expected = model(**given, num_posterior_samples=SAMPLES).logits
            shifted = model(**padded, position_ids=positions.clamp(min=0), num_posterior_samples=SAMPLES).logits
        torch.testing.assert_close(shifted[:, padding:], expected, atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ENCODERS)
    @pytest.mark.parametrize("dependent", DEPENDENT)
    def test_padding_behind_changes_nothing_in_an_encoder(self, name, dependent):
        model, given = retrofitted(name, data_dependent=dependent), inputs(name, batch=1)
        padded = {key: F.pad(value, (0, 3)) for key, value in given.items()}
        with posterior_noise(WeightsNoise()):
            expected = model(**given, num_posterior_samples=SAMPLES)[0]
            actual = model(**padded, num_posterior_samples=SAMPLES)[0]
        kept = slice(0, LENGTH) if expected.ndim > 2 else slice(None)
        torch.testing.assert_close(actual[:, kept], expected, atol=1e-5, rtol=1e-4)


class TestSaving:
    @torch.no_grad()
    @pytest.mark.parametrize("name", FAMILIES)
    def test_both_classes_load_what_is_saved(self, name, tmp_path):
        plain, given = stock(name), inputs(name, padding=2)
        model = retrofitted(plain, data_dependent="query", layers=[0, 2], num_posterior_samples=2)
        model.save_pretrained(tmp_path)
        how = {"attn_implementation": FAMILIES[name].implementations[0]}
        again = variational_class(type(plain)).from_pretrained(tmp_path, **how).eval()
        assert again.settings == model.settings and again.variational_layers == [0, 2]
        assert again.config._attn_implementation == model.config._attn_implementation
        for key, value in again.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
        assert_equal_outputs(again(**given), plain(**given), exactly=False)
        assert_equal_outputs(seeded(again, given), seeded(model, given), exactly=False)
        read = type(plain).from_pretrained(tmp_path, **how).eval()
        assert type(read) is type(plain)
        assert_equal_outputs(read(**given), plain(**given), exactly=False)

    @torch.no_grad()
    def test_eager_is_asked_for_when_loading(self, tmp_path):
        model, given = retrofitted("llama"), inputs("llama")
        model.save_pretrained(tmp_path)
        again = (
            variational_class(FAMILIES["llama"].model).from_pretrained(tmp_path, attn_implementation="eager").eval()
        )
        assert again.config._attn_implementation == "variational_eager"
        torch.testing.assert_close(seeded(again, given).logits, seeded(model, given).logits)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["bert-masked", "gpt2-next"])
    def test_base_model_loads_from_the_file_of_a_head(self, name, tmp_path):
        model, given = retrofitted(name), inputs(name)
        model.save_pretrained(tmp_path)
        base = variational_class(type(stock(name).base_model)).from_pretrained(tmp_path).eval()
        torch.manual_seed(1)
        expected = model(**given, num_posterior_samples=SAMPLES, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(seeded(base, given).last_hidden_state, expected)

    @torch.no_grad()
    def test_fresh_process(self, tmp_path):
        """Another process, which imports nothing but the loader, draws the same samples under the same seed."""
        names = ["bert-single", "vit-single", "gpt2-next", "mistral"]
        expected = {}
        for name in names:
            model, given = retrofitted(name, data_dependent="query"), inputs(name, padding=2)
            model.save_pretrained(tmp_path / name)
            stored = {"class": type(stock(name)).__name__, "inputs": given, "logits": seeded(model, given).logits}
            expected[name] = stored
        torch.save(expected, tmp_path / "expected.pt")
        program = (
            "import sys, torch, transformers\n"
            "from hf_variational import variational_class\n"
            "folder = sys.argv[1]\n"
            "for name, stored in torch.load(folder + '/expected.pt').items():\n"
            "    stock = getattr(transformers, stored['class'])\n"
            "    model = variational_class(stock).from_pretrained(folder + '/' + name).eval()\n"
            "    torch.manual_seed(1)\n"
            f"    logits = model(**stored['inputs'], num_posterior_samples={SAMPLES}).logits\n"
            "    assert torch.allclose(logits, stored['logits'], atol=1e-5), name\n"
            "print('same')\n"
        )
        run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
        assert run.stdout.strip() == "same", run.stderr

    @torch.no_grad()
    def test_stock_checkpoint_is_a_stock_model(self, tmp_path):
        plain, given = stock("bert-masked"), inputs("bert-masked", padding=2)
        plain.save_pretrained(tmp_path)
        model = variational_class(type(plain)).from_pretrained(tmp_path).eval()
        assert model.posterior_sites == [] and model.config._attn_implementation == "sdpa"
        assert model.state_dict().keys() == plain.state_dict().keys()
        wanted = targets("bert-masked", given)
        assert_equal_outputs(model(**given, **wanted), plain(**given, **wanted), exactly=False)
        with pytest.raises(ValueError, match="variationalize"):
            model(**given, num_posterior_samples=2)
        with_posteriors = variationalize(model, attention=attention("gaussian"))
        assert with_posteriors is model and len(model.posterior_sites) == LAYERS
        assert model(**given, num_posterior_samples=2).logits.shape == (2, LENGTH, 64)
