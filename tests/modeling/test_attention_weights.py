"""Sampled attention weights and their divergence: the fused pass against plain operations, closed forms and limits."""

import itertools
import math

import pytest
import torch
from torch.distributions import Dirichlet, Gamma, Normal, kl_divergence

from hf_variational.modeling import attention_weights
from hf_variational.modeling.attention_weights import WeightsPosterior, sample_weights, sample_weights_with_kl
from hf_variational.modeling.dirichlet import masked_softmax

BATCH, HEADS, QUERIES, KEYS = 3, 2, 5, 7
LOGITS = (BATCH, HEADS, QUERIES, KEYS)
KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")
POSTERIORS = [("gaussian", "contextual"), *itertools.product(KINDS[1:], ("contextual", "constant", "uniform"))]
# One query of one sequence, two queries, two sequences, everything.
BLOCKS = (1, 30, 160, 65_536)


def causal(queries: int = QUERIES, keys: int = KEYS) -> torch.Tensor:
    """The last query sees every key, as with a cache."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]


def left_padded() -> torch.Tensor:
    """Causal, with 0, 3 and 5 keys of padding in front: the first queries of the last sequence see nothing."""
    start = torch.tensor([0, 3, 5]).view(BATCH, 1, 1, 1)
    return causal() & (torch.arange(KEYS) >= start)


def scattered() -> torch.Tensor:
    """Each head its own mask; a blind row and a row of one key among them."""
    visible = torch.rand(LOGITS, generator=torch.Generator().manual_seed(5)) < 0.5
    visible[0, 0, 1] = False
    visible[1, 1, 2] = torch.arange(KEYS) == 4
    return visible


def packed() -> torch.Tensor:
    """Two documents in a row."""
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    return causal() & (documents[-QUERIES:, None] == documents)


MASKS = {
    "none": lambda: None,
    "causal": causal,
    "left padded": left_padded,
    "padded, bidirectional": lambda: (torch.arange(KEYS) < torch.tensor([7, 4, 0])[:, None])[:, None, None],
    "random": scattered,
    "sliding band": lambda: causal() & torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(KEYS - QUERIES - 2),
    "packed": packed,
}


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def posterior_of(kind: str, prior: str = "contextual") -> WeightsPosterior:
    return WeightsPosterior(kind, prior, math.log(0.5) if kind == "gaussian" else 0.8)


def inputs_of(kind: str, dtype, copies: int, value_shape: tuple[int, ...]):
    """Logits, log_value (scales around 0.3, concentrations around 5), and noise for every copy."""
    logits = 2.0 * draw(*LOGITS, dtype=dtype)
    log_value = draw(*value_shape, dtype=dtype, seed=1) + (-1.0 if kind == "gaussian" else 1.5)
    draws = posterior_of(kind).draws
    return logits, log_value, draw(BATCH * copies, *LOGITS[1:], draws, dtype=dtype, seed=2)


def plain(posterior, logits, log_value, visible, noise, copies):
    noise = None if noise is None else noise.unflatten(0, (-1, copies))
    weights, kl = sample_weights(posterior, logits, log_value, visible, noise, copies)
    return weights.flatten(0, 1), kl


def run(function, posterior, logits, log_value, visible, noise, copies, parts=(1.0, 1.0)):
    """Weights, KL, and the gradients of a random projection of those that have a part, in the logits and log_value."""
    leaves = [each.detach().clone().requires_grad_() for each in (logits, log_value)]
    outputs = function(posterior, *leaves, visible, noise, copies)
    total = sum(
        part * (output * draw(*output.shape, dtype=output.dtype, seed=8 + index)).sum()
        for index, (part, output) in enumerate(zip(parts, outputs, strict=True))
        if part
    )
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return (*(output.detach() for output in outputs), *gradients)


def assert_same(actual, expected, dtype) -> None:
    rtol, atol = (1e-5, 1e-7) if dtype == torch.float64 else (2e-4, 2e-5)
    for name, one, other in zip(("weights", "kl", "logits", "log_value"), actual, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == dtype
        size = max(1.0, other.abs().max().item()) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol * size, msg=lambda text, n=name: f"{n}: {text}")


class TestFused:
    """`sample_weights_with_kl` against `sample_weights`."""

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_equals_the_plain_operations(self, kind, prior, dtype, mask, monkeypatch, poisoned_scratch):
        posterior, visible = posterior_of(kind, prior), MASKS[mask]()
        for copies, value_shape in ((1, (BATCH, HEADS, QUERIES, 1)), (3, (1, HEADS, 1, 1))):
            logits, log_value, noise = inputs_of(kind, dtype, copies, value_shape)
            expected = run(plain, posterior, logits, log_value, visible, noise, copies)
            assert all(torch.isfinite(each).all() for each in expected)
            for block_elements in BLOCKS:
                monkeypatch.setattr(attention_weights, "_BLOCK_ELEMENTS", block_elements)
                assert_same(
                    run(sample_weights_with_kl, posterior, logits, log_value, visible, noise, copies), expected, dtype
                )

    @pytest.mark.parametrize("copies", [1, 3])
    @pytest.mark.parametrize("value_shape", [(1, HEADS, 1, 1), (1, HEADS, QUERIES, 1), (BATCH, HEADS, 1, 1)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_shape_of_log_value(self, kind, value_shape, copies, monkeypatch):
        monkeypatch.setattr(attention_weights, "_BLOCK_ELEMENTS", 30)
        logits, log_value, noise = inputs_of(kind, torch.float64, copies, value_shape)
        arguments = posterior_of(kind), logits, log_value, causal(), noise, copies
        assert_same(run(sample_weights_with_kl, *arguments), run(plain, *arguments), torch.float64)

    @pytest.mark.parametrize("parts", [(1.0, 0.0), (0.0, 1.0)])
    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_each_output_alone(self, kind, prior, parts):
        """Autograd then hands the other output no gradient at all, rather than zeros."""
        logits, log_value, noise = inputs_of(kind, torch.float64, 2, (1, HEADS, 1, 1))
        arguments = posterior_of(kind, prior), logits, log_value, left_padded(), noise, 2, parts
        assert_same(run(sample_weights_with_kl, *arguments), run(plain, *arguments), torch.float64)

    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_without_the_divergence(self, kind, prior):
        logits, log_value, noise = inputs_of(kind, torch.float64, 2, (1, HEADS, 1, 1))

        def without(*arguments):
            weights, kl = sample_weights_with_kl(*arguments, with_kl=False)
            assert kl is None
            return weights, torch.zeros(LOGITS[:3], dtype=torch.float64)

        arguments = posterior_of(kind, prior), logits, log_value, left_padded(), noise, 2, (1.0, 0.0)
        actual, expected = run(without, *arguments), run(plain, *arguments)
        assert_same((actual[0], expected[1], *actual[2:]), expected, torch.float64)

    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_no_copies_give_the_same_divergence(self, kind, prior, poisoned_scratch):
        posterior = posterior_of(kind, prior)
        logits, log_value, noise = inputs_of(kind, torch.float64, 2, (BATCH, HEADS, QUERIES, 1))
        arguments = posterior, logits, log_value, left_padded()
        alone = run(sample_weights_with_kl, *arguments, None, 0)
        assert alone[0].shape == (0, *LOGITS[1:]) and alone[1].shape == LOGITS[:3]
        beside = run(sample_weights_with_kl, *arguments, noise, 2, (0.0, 1.0))
        assert_same(alone, (alone[0], *beside[1:]), torch.float64)
        assert_same(alone, run(plain, *arguments, None, 0), torch.float64)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_a_compiler_sees_is_the_same(self, kind, monkeypatch):
        logits, log_value, noise = inputs_of(kind, torch.float64, 3, (1, HEADS, 1, 1))
        arguments = posterior_of(kind), logits, log_value, left_padded(), noise, 3
        fused = run(sample_weights_with_kl, *arguments)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert_same(run(sample_weights_with_kl, *arguments), fused, torch.float64)

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradcheck(self, kind, monkeypatch):
        monkeypatch.setattr(attention_weights, "_BLOCK_ELEMENTS", 30)
        logits, log_value, noise = inputs_of(kind, torch.float64, 2, (1, HEADS, 1, 1))
        leaves = logits[:1].clone().requires_grad_(), log_value.clone().requires_grad_()

        def weights(logits, log_value):
            return sample_weights_with_kl(posterior_of(kind), logits, log_value, causal(), noise[:2], 2)[0]

        # The implicit gradient has a relative error of 1.2e-4, and cancels in a row.
        tolerance = {"atol": 1e-4, "rtol": 1e-3} if kind == "dirichlet" else {}
        assert torch.autograd.gradcheck(weights, leaves, **tolerance)

    @pytest.mark.parametrize("kind", KINDS)
    def test_views_and_empty_inputs(self, kind):
        logits, log_value, noise = inputs_of(kind, torch.float64, 1, (1, HEADS, 1, 1))
        arguments = log_value.expand(BATCH, -1, QUERIES, -1), causal(), noise.mT.contiguous().mT, 1
        view = logits.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        assert not view.is_contiguous()
        for one, other in zip(
            sample_weights_with_kl(posterior_of(kind), view, *arguments),
            plain(posterior_of(kind), logits, *arguments),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
        drawn, _ = sample_weights_with_kl(posterior_of(kind), view, log_value, causal())
        torch.testing.assert_close(drawn.sum(-1), torch.ones_like(drawn[..., 0]))
        weights, kl = sample_weights_with_kl(posterior_of(kind), logits[:0], log_value, causal())
        assert weights.shape == (0, *LOGITS[1:]) and kl.shape == (0, HEADS, QUERIES)

    @pytest.mark.parametrize("kind", KINDS)
    def test_leaves_its_inputs_alone(self, kind):
        logits, log_value, noise = inputs_of(kind, torch.float64, 2, (1, HEADS, 1, 1))
        tensors = [logits, log_value, left_padded(), noise]
        before = [each.clone() for each in tensors]
        for supplied in (noise, None):
            leaf = logits.requires_grad_()
            weights, kl = sample_weights_with_kl(
                posterior_of(kind, "constant"), leaf, log_value, tensors[2], supplied, 2
            )
            (weights.square().sum() + kl.sum()).backward()
        for tensor, copy in zip(tensors, before, strict=True):
            assert torch.equal(tensor, copy)


class TestMasks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_sum_to_one_and_blind_rows_are_zero(self, kind, mask, dtype, monkeypatch, poisoned_scratch):
        visible = MASKS[mask]()
        full = torch.ones(LOGITS, dtype=torch.bool) if visible is None else visible.expand(LOGITS)
        for block_elements, log_value in itertools.product(BLOCKS, (-7.0, 5.0)):
            monkeypatch.setattr(attention_weights, "_BLOCK_ELEMENTS", block_elements)
            leaves = [
                (5.0 * draw(*LOGITS, dtype=dtype)).requires_grad_(),
                torch.full((1, HEADS, 1, 1), log_value, dtype=dtype, requires_grad=True),
            ]
            weights, kl = sample_weights_with_kl(posterior_of(kind), *leaves, visible, None, 2)
            seen = full.repeat_interleave(2, 0)
            assert weights[~seen].eq(0).all() and (weights >= 0).all()
            torch.testing.assert_close(weights.sum(-1), seen.any(-1).to(dtype))
            assert torch.isfinite(kl).all() and kl[~full.any(-1)].eq(0).all() and (kl > -1e-5).all()
            gradients = torch.autograd.grad((weights * draw(*weights.shape, dtype=dtype)).sum() + kl.sum(), leaves)
            assert all(torch.isfinite(each).all() for each in gradients)
            assert gradients[0][~full].eq(0).all()

    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_hidden_keys_change_nothing(self, kind, prior):
        posterior, visible = posterior_of(kind, prior), scattered()
        logits, log_value, noise = inputs_of(kind, torch.float64, 2, (1, HEADS, 1, 1))
        other_logits = torch.where(visible, logits, 1e4)
        shown = visible.repeat_interleave(2, 0).unsqueeze(-1)
        other_noise = torch.where(shown, noise, draw(*noise.shape, dtype=torch.float64, seed=6))
        first = run(sample_weights_with_kl, posterior, logits, log_value, visible, noise, 2)
        second = run(sample_weights_with_kl, posterior, other_logits, log_value, visible, other_noise, 2)
        assert_same(first, second, torch.float64)

    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_hidden_keys_may_as_well_be_absent(self, kind, prior):
        posterior, kept = posterior_of(kind, prior), torch.tensor([1, 2, 5])
        visible = torch.zeros(1, 1, 1, KEYS, dtype=torch.bool).index_fill(-1, kept, True)
        logits, log_value, noise = inputs_of(kind, torch.float64, 1, (1, HEADS, 1, 1))
        weights, kl = sample_weights_with_kl(posterior, logits, log_value, visible, noise)
        short, short_kl = sample_weights_with_kl(posterior, logits[..., kept], log_value, None, noise[..., kept, :])
        torch.testing.assert_close(weights[..., kept], short)
        torch.testing.assert_close(kl, short_kl)

    @pytest.mark.parametrize("shape", [(BATCH, 1, QUERIES, 1), (1, 1, 1, 1)])
    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_masks_that_broadcast_over_the_keys(self, kind, prior, shape):
        posterior = posterior_of(kind, prior)
        visible = torch.ones(shape, dtype=torch.bool)
        visible[-1, :, 0] = shape == (1, 1, 1, 1)
        logits, log_value, noise = inputs_of(kind, torch.float64, 1, (1, HEADS, 1, 1))
        whole = run(sample_weights_with_kl, posterior, logits, log_value, visible.expand(LOGITS), noise, 1)
        for function in (sample_weights_with_kl, plain):
            assert_same(run(function, posterior, logits, log_value, visible, noise, 1), whole, torch.float64)


class TestDivergence:
    @pytest.mark.parametrize("mask", ["none", "left padded", "random"])
    def test_gaussian_equals_torch_distributions(self, mask):
        visible = MASKS[mask]()
        logits, log_value, _ = inputs_of("gaussian", torch.float64, 1, (BATCH, HEADS, QUERIES, 1))
        per_key = kl_divergence(Normal(logits, log_value.exp()), Normal(logits, 0.5))
        expected = (per_key if visible is None else per_key * visible).sum(-1)
        _, kl = sample_weights_with_kl(posterior_of("gaussian"), logits, log_value, visible)
        torch.testing.assert_close(kl, expected)

    @pytest.mark.parametrize("prior", ["contextual", "constant", "uniform"])
    @pytest.mark.parametrize("mask", ["none", "left padded", "random"])
    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_dirichlet_equals_torch_distributions(self, kind, mask, prior):
        visible = MASKS[mask]()
        logits, log_value, _ = inputs_of(kind, torch.float64, 1, (BATCH, HEADS, QUERIES, 1))
        seen = torch.ones(LOGITS, dtype=torch.bool) if visible is None else visible.expand(LOGITS)
        mean = masked_softmax(logits.masked_fill(~seen, -torch.inf))
        weight = {"contextual": mean, "uniform": seen / seen.sum(-1, keepdim=True).clamp(min=1)}.get(prior, seen)
        alpha = torch.where(seen, mean * log_value.exp(), 1.0)
        prior_alpha = torch.where(seen, weight * math.exp(0.8), 1.0)
        one = torch.ones_like(alpha)
        expected = kl_divergence(Gamma(alpha, one), Gamma(prior_alpha, one)).sum(-1)
        _, kl = sample_weights_with_kl(posterior_of(kind, prior), logits, log_value, visible)
        torch.testing.assert_close(kl, expected, rtol=1e-6, atol=1e-6)
        bounded = kl_divergence(Dirichlet(alpha[0, 0, -1]), Dirichlet(prior_alpha[0, 0, -1]))
        assert visible is not None or kl[0, 0, -1] >= bounded

    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_gradient_into_the_logits(self, kind, prior):
        """The contextual prior, like the Gaussian's, follows the mean and leaves it free; the others pull on it."""
        for function in (sample_weights_with_kl, plain):
            logits, log_value, noise = inputs_of(kind, torch.float64, 1, (1, HEADS, 1, 1))
            leaves = logits.requires_grad_(), log_value.requires_grad_()
            _, kl = function(posterior_of(kind, prior), *leaves, causal(), noise, 1)
            gradients = torch.autograd.grad(kl.sum(), leaves, allow_unused=True, materialize_grads=True)
            assert (gradients[0].abs().max() == 0) == (prior == "contextual")
            assert (gradients[1].abs() > 0).all()

    @pytest.mark.parametrize("prior", ["contextual", "constant", "uniform"])
    def test_is_zero_at_the_target(self, prior):
        logits = torch.zeros(LOGITS) if prior != "contextual" else draw(*LOGITS)
        total = 0.8 + (math.log(KEYS) if prior == "constant" else 0.0)
        _, kl = sample_weights_with_kl(posterior_of("dirichlet", prior), logits, torch.full((1, HEADS, 1, 1), total))
        assert kl.abs().max() < 1e-5
        log_value = torch.full((1, HEADS, 1, 1), math.log(0.5))
        _, kl = sample_weights_with_kl(posterior_of("gaussian"), logits, log_value)
        assert kl.abs().max() < 1e-6

    def test_contextual_stays_finite_as_a_mean_vanishes(self):
        """Each vanishing key costs a_p / a - log(a_p / a) - 1, where a constant prior costs a_p / (a m)."""
        logits = torch.tensor([0.0, -40.0, -60.0]).expand(1, 1, 1, 3)
        log_value = torch.full((1, 1, 1, 1), 0.8 + math.log(2.0))
        _, kl = sample_weights_with_kl(posterior_of("dirichlet"), logits, log_value)
        one = torch.ones((), dtype=torch.float64)
        largest = kl_divergence(Gamma(2.0 * math.exp(0.8) * one, one), Gamma(math.exp(0.8) * one, one)).item()
        assert kl.item() == pytest.approx(largest + 2.0 * (0.5 + math.log(2.0) - 1.0), rel=1e-5)
        _, constant = sample_weights_with_kl(posterior_of("dirichlet", "constant"), logits, log_value)
        assert constant.item() > 1e16

    @pytest.mark.parametrize("prior", ["contextual", "constant", "uniform"])
    def test_means_below_the_floor(self, prior):
        """A logit 100 below the others: its concentration is floored, and the two implementations agree on it."""
        posterior = posterior_of("dirichlet", prior)
        logits, log_value, noise = inputs_of("dirichlet", torch.float64, 1, (1, HEADS, 1, 1))
        logits[..., 2:4] -= torch.tensor([100.0, 300.0], dtype=torch.float64)
        fused = run(sample_weights_with_kl, posterior, logits, log_value, None, noise, 1)
        assert_same(fused, run(plain, posterior, logits, log_value, None, noise, 1), torch.float64)


class TestDraws:
    @pytest.mark.parametrize("kind", KINDS)
    def test_repeat_under_the_global_seed(self, kind):
        logits, log_value, _ = inputs_of(kind, torch.float32, 1, (1, HEADS, 1, 1))
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(sample_weights_with_kl(posterior_of(kind), logits, log_value, causal(), None, 2)[0])
        assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])

    @pytest.mark.parametrize("kind", KINDS)
    def test_copies_are_neighbours(self, kind):
        """Row b * S + s is sample s of sequence b."""
        logits, log_value, noise = inputs_of(kind, torch.float64, 3, (BATCH, HEADS, QUERIES, 1))
        together, _ = sample_weights_with_kl(posterior_of(kind), logits, log_value, causal(), noise, 3)
        for sample in range(3):
            alone, _ = sample_weights_with_kl(posterior_of(kind), logits, log_value, causal(), noise[sample::3])
            torch.testing.assert_close(together[sample::3], alone)

    @pytest.mark.parametrize("block_elements", BLOCKS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_row_and_copy_has_noise_of_its_own(self, kind, block_elements, monkeypatch):
        monkeypatch.setattr(attention_weights, "_BLOCK_ELEMENTS", block_elements)
        value = torch.zeros(1, HEADS, 1, 1, dtype=torch.float64)
        weights, _ = sample_weights_with_kl(posterior_of(kind), torch.zeros(LOGITS).double(), value, None, None, 4)
        assert weights.flatten(0, 2).unique(dim=0).shape[0] == 4 * BATCH * HEADS * QUERIES

    @pytest.mark.parametrize("block_elements", [5_000, 65_536 * 100])
    @pytest.mark.parametrize("concentration", [0.05, 1.0, 30.0])
    def test_dirichlet_moments(self, concentration, block_elements, monkeypatch):
        """Means m and covariances (diag(m) - m m') / (a + 1), in every row, whatever it sees."""
        monkeypatch.setattr(attention_weights, "_BLOCK_ELEMENTS", block_elements)
        copies = 20_000
        logits = draw(1, 2, 3, 5, dtype=torch.float64)
        log_value = torch.tensor([concentration, 2.0 * concentration]).log().view(1, 2, 1, 1).double()
        visible = causal(3, 5)
        weights, _ = sample_weights_with_kl(posterior_of("dirichlet"), logits, log_value, visible, None, copies)
        mean = masked_softmax(logits.masked_fill(~visible, -torch.inf))[0]
        self.assert_mean(weights, mean)
        centered = weights - mean
        covariance = torch.diag_embed(mean) - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        covariance = covariance / (log_value[0].exp() + 1.0).unsqueeze(-1)
        self.assert_mean(centered.unsqueeze(-1) * centered.unsqueeze(-2), covariance)

    def test_gaussian_moments(self):
        """log w_i - log w_j is N(A_i - A_j, 2 sigma^2)."""
        logits = draw(1, 2, 3, 5, dtype=torch.float64)
        log_value = torch.tensor([0.1, 0.7]).log().view(1, 2, 1, 1).double()
        weights, _ = sample_weights_with_kl(posterior_of("gaussian"), logits, log_value, None, None, 20_000)
        difference = (weights[..., 1:] / weights[..., :1]).log() - (logits[..., 1:] - logits[..., :1])
        self.assert_mean(difference, torch.zeros(()))
        product = difference.unsqueeze(-1) * difference.unsqueeze(-2)
        shared = (torch.ones(4, 4) + torch.eye(4)).double()
        self.assert_mean(product, (2.0 * log_value[0]).exp().unsqueeze(-1) * shared)

    @staticmethod
    def assert_mean(values, expected):
        standard_error = values.std(0) / math.sqrt(values.shape[0])
        error = (values.mean(0) - expected).abs()
        assert (error <= 5.0 * standard_error + 1e-12).all(), (error / standard_error).max()


class TestLimits:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("mask", ["none", "left padded"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_no_dispersion_is_softmax_attention(self, kind, mask, dtype):
        """sigma to 0, and a to infinity: the distance from softmax falls with sigma and with a^(-1/2)."""
        logits, visible = draw(*LOGITS, dtype=dtype), MASKS[mask]()
        softmax = masked_softmax(logits if visible is None else logits.masked_fill(~visible, -torch.inf))
        distances = []
        for dispersion in (1e-1, 1e-2, 1e-3):
            value = math.log(dispersion) if kind == "gaussian" else -2.0 * math.log(dispersion)
            log_value = torch.full((1, HEADS, 1, 1), value, dtype=dtype)
            weights, _ = sample_weights_with_kl(posterior_of(kind), logits, log_value, visible, None, 4)
            distances.append((weights - softmax.repeat_interleave(4, 0)).abs().max().item())
        assert distances[2] < 4e-3 and distances[2] < 0.05 * distances[0] and distances[1] < 0.3 * distances[0]

    @pytest.mark.parametrize("kind", KINDS)
    def test_in_the_limit_so_is_its_gradient(self, kind):
        logits = draw(*LOGITS, dtype=torch.float64).requires_grad_()
        log_value = torch.full((1, HEADS, 1, 1), -30.0 if kind == "gaussian" else 60.0, dtype=torch.float64)
        weights, _ = sample_weights_with_kl(posterior_of(kind), logits, log_value)
        softmax = torch.softmax(logits, -1)
        torch.testing.assert_close(weights, softmax, rtol=0, atol=1e-10)
        projection = draw(*LOGITS, dtype=torch.float64, seed=3)
        actual, expected = (torch.autograd.grad((each * projection).sum(), logits)[0] for each in (weights, softmax))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


class TestMemory:
    """What the backward pass keeps, in units of the weights of one posterior sample."""

    @staticmethod
    def kept(call) -> dict[int, torch.Tensor]:
        tensors = {}

        def pack(tensor):
            tensors[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call.outputs = call()
        return tensors

    @pytest.mark.parametrize("with_kl", [True, False])
    @pytest.mark.parametrize("copies", [0, 1, 3])
    @pytest.mark.parametrize(("kind", "prior"), POSTERIORS)
    def test_keeps_no_more_than_it_needs(self, kind, prior, copies, with_kl):
        shape = 2, 4, 32, 32
        logits = draw(*shape).requires_grad_()
        log_value = torch.zeros(1, 4, 1, 1, requires_grad=True)
        posterior, visible = posterior_of(kind, prior), causal(32, 32)

        def call():
            return sample_weights_with_kl(posterior, logits, log_value, visible, None, copies, with_kl=with_kl)

        tensors = self.kept(call).values()
        per_key = sum(each.numel() for each in tensors if each.is_floating_point() and each.shape[-1] == 32)
        # The weights and one derivative of each sample; for a Dirichlet also the mean, once.
        assert per_key <= (2 * copies + (kind != "gaussian")) * logits.numel()
        rest = sum(each.numel() for each in tensors) - per_key
        assert rest <= visible.numel() + 8 * logits[..., 0].numel()

    @pytest.mark.parametrize("kind", KINDS)
    def test_keeps_nothing_without_gradients(self, kind):
        logits, log_value, noise = inputs_of(kind, torch.float32, 2, (1, HEADS, 1, 1))
        leaf = logits.clone().requires_grad_()
        expected = sample_weights_with_kl(posterior_of(kind), logits, log_value, causal(), noise, 2)

        def call():
            with torch.no_grad():
                return sample_weights_with_kl(posterior_of(kind), leaf, log_value, causal(), noise, 2)

        assert not self.kept(call)
        for one, other in zip(call.outputs, expected, strict=True):
            assert not one.requires_grad and torch.equal(one, other)
