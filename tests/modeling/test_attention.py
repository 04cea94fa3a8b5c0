"""Variational attention as a module, against explicit formulas with copies of the keys."""

import math

import pytest
import torch
from tiny import assert_same_gradients, attention_config
from torch.nn import functional as F

from hf_variational.modeling.attention import AttentionPosterior, masked_logits, mean_weights, mix
from hf_variational.modeling.attention_weights import sample_weights
from hf_variational.modeling.dirichlet import multi_gamma_kl
from hf_variational.modeling.sample_axis import SampleAxis, posterior_noise

KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")
DEPENDENT = (False, "query", True)
PRIORS = [(kind, "contextual") for kind in KINDS]
PRIORS += [(kind, prior) for kind in KINDS[1:] for prior in ("constant", "uniform")]
BATCH, HEADS, GROUPS, LENGTH, WIDTH, SAMPLES = 2, 4, 2, 5, 6, 3
SCALING = WIDTH**-0.5

causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
left_padded = causal & (torch.arange(LENGTH) >= torch.tensor([2, 0])[:, None])[:, None, None]
sliding = causal & ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3)
both_ways = (torch.arange(LENGTH) < torch.tensor([3, 5])[:, None])[:, None, None].expand(-1, 1, LENGTH, -1)
MASKS = {"none": None, "causal": causal, "left": left_padded, "sliding": sliding, "both ways": both_ways}


def posterior_of(kind="dirichlet", data_dependent=False, perturb=True, **options) -> AttentionPosterior:
    config = attention_config(kind, data_dependent, **options)
    posterior = AttentionPosterior(config, HEADS, WIDTH, layer_idx=1, max_keys=9)
    posterior.init_weights()
    if perturb:
        with torch.no_grad():
            for parameter in posterior.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return posterior


def inputs(batch=BATCH, queries=LENGTH, keys=LENGTH, dtype=torch.float32, seed=1) -> list[torch.Tensor]:
    """Query, key and value that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, HEADS, queries, WIDTH), (batch, GROUPS, keys, WIDTH), (batch, GROUPS, keys, WIDTH))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def axis_of(samples=SAMPLES, batch=BATCH, queries=LENGTH, seen=0, **options) -> SampleAxis:
    return SampleAxis(samples, batch, torch.arange(seen, seen + queries)[None], seen=seen, **options)


def noise_of(posterior, samples=SAMPLES, queries=LENGTH, keys=LENGTH, batch=BATCH, seed=2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = posterior.weights_posterior.draws
    return torch.randn(batch * samples, HEADS, queries, keys, draws, generator=generator)


def attend(posterior, tensors, mask, noise, samples=SAMPLES, **options):
    """Output, weights, and the record on the tape."""
    taped = []
    axis_options = {"record": True, **options.pop("axis", {})}
    handle = posterior.tap.register_forward_hook(lambda module, args, record: taped.append(record))
    with posterior_noise(lambda request: noise):
        axis = axis_of(samples, tensors[0].shape[0], tensors[0].shape[2], **axis_options)
        output, weights = posterior(*tensors, mask, axis, scaling=SCALING, **options)
    handle.remove()
    return output, weights, taped[0] if taped else None


def repeated(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the keys (or values) for each query head."""
    return tensor.repeat_interleave(HEADS // GROUPS, dim=1)


def naive_log_value(posterior, query, logits, visible, is_causal=True) -> torch.Tensor:
    """[batch, heads, queries], head by head and query by query."""
    config, batch, queries = posterior.config, query.shape[0], query.shape[2]
    raw = posterior.raw.view(1, -1, 1).expand(batch, -1, queries).clone()
    for head in range(HEADS if config.data_dependent else 0):
        weight, bias, out = (getattr(posterior, f"network_{name}")[head] for name in ("in", "bias", "out"))
        for b in range(batch):
            for q in range(queries):
                if config.data_dependent == "query":
                    row = query[b, head, q]
                else:
                    keys = logits.shape[-1]
                    seen = (
                        torch.ones(keys, dtype=torch.bool)
                        if visible is None
                        else visible.expand_as(logits)[b, head, q]
                    )
                    row = torch.zeros(posterior.max_keys)
                    for k in range(keys):
                        if seen[k]:
                            row[q - k if is_causal else k] = logits[b, head, q, k]
                raw[b, head, q] += out @ torch.relu(weight @ row + bias)
    unit = 1.0 if config.initial_raw is not None else config.initial_value / math.log(2)
    return torch.log(unit * F.softplus(raw))


def naive(posterior, tensors, visible, noise, is_causal=True):
    """Every sample a row of its own, with copies of everything, plain operations."""
    query, key, value = tensors
    logits = query @ repeated(key).mT * SCALING
    log_value = naive_log_value(posterior, query, logits, visible, is_causal)[..., None]
    rows = [tensor.repeat_interleave(SAMPLES, dim=0) for tensor in (logits, log_value, repeated(value))]
    seen = None if visible is None else visible.expand(BATCH, 1, -1, -1).repeat_interleave(SAMPLES, dim=0)
    weights, kl = sample_weights(posterior.weights_posterior, rows[0], rows[1], seen, noise.unsqueeze(1), 1)
    weights = weights.squeeze(1)
    return (weights @ rows[2]).transpose(1, 2), weights, kl.sum(1)[::SAMPLES]


class TestAgainstTheNaiveOne:
    @pytest.mark.parametrize(("kind", "prior"), PRIORS)
    @pytest.mark.parametrize("data_dependent", DEPENDENT)
    @pytest.mark.parametrize("mask", MASKS)
    def test_output_weights_kl_and_gradients(self, kind, prior, data_dependent, mask):
        """Keys and values shared by samples and by the heads of a group are those of the copies."""
        posterior, tensors = posterior_of(kind, data_dependent, prior=prior), inputs()
        noise, visible = noise_of(posterior), MASKS[mask]
        is_causal = mask not in ("none", "both ways")
        leaves = [*tensors, *posterior.parameters()]
        generator = torch.Generator().manual_seed(4)
        found = []
        output, weights, record = attend(posterior, tensors, visible, noise, is_causal=is_causal)
        for result in (
            (output, weights, record.statistics.kl),
            naive(posterior, tensors, visible, noise, is_causal),
        ):
            generator.manual_seed(4)
            loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in result)
            found.append((result, torch.autograd.grad(loss, leaves)))
        for actual, expected in zip(*(result for result, _ in found), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-5)
        actual, expected = (dict(enumerate(grads)) for _, grads in found)
        assert_same_gradients(actual, expected, tolerance=5e-4)
        seen = torch.ones(1, dtype=torch.bool) if visible is None else visible
        assert weights.masked_select(~seen.repeat_interleave(SAMPLES if len(seen) > 1 else 1, 0)).eq(0).all()

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("data_dependent", DEPENDENT)
    def test_rows_that_are_samples_already(self, kind, data_dependent):
        """Above the split each row has keys of its own: as with copies of the same keys."""
        posterior, tensors = posterior_of(kind, data_dependent), inputs()
        noise = noise_of(posterior)
        copies = [tensor.detach().repeat_interleave(SAMPLES, 0) for tensor in tensors]
        expected = attend(posterior, tensors, left_padded, noise)
        mask = left_padded.repeat_interleave(SAMPLES, 0)
        with posterior_noise(lambda request: noise):
            output, weights = posterior(*copies, mask, axis_of(), scaling=SCALING)
        torch.testing.assert_close(output, expected[0])
        torch.testing.assert_close(weights, expected[1])

    def test_gaussian_weights_are_the_softmax_of_shifted_logits(self):
        posterior, (query, key, value) = posterior_of("gaussian"), inputs()
        noise = noise_of(posterior)
        sigma = 0.7 / math.log(2) * F.softplus(posterior.raw)
        logits = (query @ repeated(key).mT * SCALING).repeat_interleave(SAMPLES, 0)
        expected = torch.softmax((logits + sigma[:, None, None] * noise[..., 0]).masked_fill(~causal, -torch.inf), -1)
        _, weights, record = attend(posterior, (query, key, value), causal, noise)
        torch.testing.assert_close(weights, expected)
        ratio = sigma / posterior.config.prior_scale
        per_key = (0.5 * (ratio**2 - 1) - ratio.log()).sum()
        torch.testing.assert_close(record.statistics.kl, per_key * torch.arange(1.0, LENGTH + 1).expand(BATCH, -1))

    @pytest.mark.parametrize("prior", ["contextual", "constant", "uniform"])
    def test_dirichlet_kl_from_its_definition(self, prior):
        posterior, (query, key, value) = posterior_of("dirichlet", prior=prior), inputs()
        mean = mean_weights(query, key, causal, scaling=SCALING)
        alpha = (6.0 / math.log(2) * F.softplus(posterior.raw))[:, None, None] * mean
        keys = torch.arange(1.0, LENGTH + 1)[:, None]
        target = {"contextual": 3.0 * mean, "constant": torch.tensor(3.0), "uniform": 3.0 / keys}[prior].expand_as(
            mean
        )
        gammas = [torch.distributions.Gamma(each.clamp(min=1e-9), 1.0) for each in (alpha, target)]
        expected = torch.distributions.kl_divergence(*gammas).masked_fill(~causal, 0.0).sum((1, 3))
        _, _, record = attend(posterior, (query, key, value), causal, noise_of(posterior))
        torch.testing.assert_close(record.statistics.kl, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("kind", "prior"), PRIORS)
    def test_what_the_kl_pulls_on(self, kind, prior):
        """A contextual prior follows the mean and leaves it free; the others pull on it."""
        posterior, tensors = posterior_of(kind, prior=prior), inputs()
        _, _, record = attend(posterior, tensors, causal, noise_of(posterior))
        leaves = [*tensors[:2], posterior.raw]
        grads = torch.autograd.grad(record.statistics.kl.sum(), leaves, allow_unused=True)
        pulls = [grad is not None and bool(grad.abs().max() > 1e-4) for grad in grads]
        assert pulls == [prior != "contextual", prior != "contextual", True]


class TestLogValue:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("data_dependent", DEPENDENT)
    def test_start(self, kind, data_dependent):
        """The initial scale or concentration in every head, whatever the input."""
        options = {"initial_scale": 0.1, "initial_concentration": 100.0}
        posterior, (query, key, _) = posterior_of(kind, data_dependent, perturb=False, **options), inputs()
        value = posterior.log_value(query, (query @ repeated(key).mT) if data_dependent is True else None).exp()
        torch.testing.assert_close(value, torch.full_like(value, 0.1 if kind == "gaussian" else 100.0))
        posterior = posterior_of(kind, data_dependent, perturb=False, initial_raw=-7.0)
        value = posterior.log_value(query, query @ repeated(key).mT).exp()
        torch.testing.assert_close(value, torch.full_like(value, 0.000911), rtol=0.06, atol=0)
        assert value.unique().numel() >= HEADS, "each head draws its start"

    @pytest.mark.parametrize("raw", [-300.0, -30.0, -20.0, 0.0, 30.0, 1e4])
    def test_softplus_that_neither_underflows_nor_loses_its_gradient(self, raw):
        posterior = posterior_of(perturb=False, initial_raw=-7.0)
        with torch.no_grad():
            posterior.raw.fill_(raw)
        log_value = posterior.log_value(inputs()[0], None)
        expected = raw if raw < -20 else math.log(F.softplus(torch.tensor(raw, dtype=torch.float64)))
        torch.testing.assert_close(log_value, torch.full_like(log_value, expected), rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(log_value.sum(), posterior.raw)
        assert grad.isfinite().all() and (grad > 0).all()

    @pytest.mark.parametrize("data_dependent", ["query", True])
    def test_depends_on_the_data(self, data_dependent):
        posterior, (query, key, _) = posterior_of("gaussian", data_dependent), inputs()
        rows = query @ repeated(key).mT * SCALING
        assert posterior.log_value(query, rows if data_dependent is True else None).std(-2).min() > 1e-3

    def test_bf16_query_is_read_in_float32(self):
        posterior, (query, *_) = posterior_of("gaussian", "query"), inputs()
        half = query.detach().bfloat16()
        assert posterior.log_value(half, None).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = posterior.log_value(half, None)
        assert torch.equal(cast, posterior.log_value(half.float(), None))

    def test_rows_do_not_see_padding_in_front_nor_a_cache(self):
        """The network of data_dependent=True reads a causal row by distance from the query."""
        posterior, (query, key, value) = posterior_of("gaussian", True), inputs(batch=1)
        noise = noise_of(posterior, batch=1)
        whole = attend(posterior, (query, key, value), causal, noise)
        front = [F.pad(tensor.detach(), (0, 0, 2, 0), value=1.7) for tensor in (query, key, value)]
        mask = F.pad(causal, (2, 0, 2, 0))
        padded = attend(posterior, front, mask, F.pad(noise, (0, 0, 2, 0, 2, 0)))
        torch.testing.assert_close(padded[1][:, :, 2:, 2:], whole[1])
        last = [query[:, :, -1:], key, value]
        cached = attend(posterior, last, None, noise[:, :, -1:], axis={"seen": LENGTH - 1})
        torch.testing.assert_close(cached[1], whole[1][:, :, -1:])
        room = [query[:, :, -1:], *(F.pad(tensor, (0, 0, 0, 3), value=9.9) for tensor in (key, value))]
        mask = torch.tensor([True] * LENGTH + [False] * 3)[None, None, None]
        static = attend(posterior, room, mask, F.pad(noise[:, :, -1:], (0, 0, 0, 3)), axis={"seen": LENGTH - 1})
        torch.testing.assert_close(static[1][..., :LENGTH], whole[1][:, :, -1:])

    def test_row_longer_than_the_network(self):
        posterior = posterior_of("gaussian", True)
        with pytest.raises(ValueError, match=r"10 keys.*max_position_embeddings=9.*data_dependent='query'"):
            attend(posterior, inputs(queries=1, keys=10), None, None)
        with pytest.raises(ValueError, match=r"max_position_embeddings.*data_dependent='query'"):
            AttentionPosterior(attention_config(data_dependent=True), HEADS, WIDTH, 0, None)


class TestMasks:
    def test_mask_of_none_is_causal_unless_told_otherwise(self):
        query, key, _ = inputs()
        assert torch.equal(masked_logits(query, key, None, 1.0, True)[1], causal)
        assert masked_logits(query, key, None, 1.0, False)[1] is None
        assert masked_logits(query[:, :, :1], key, None, 1.0, True)[1] is None

    def test_additive_mask_hides_what_a_bool_one_hides(self):
        query, key, _ = inputs()
        additive = torch.zeros(left_padded.shape).masked_fill(~left_padded, torch.finfo(torch.float32).min)
        for given in (additive, additive.masked_fill(~left_padded, -torch.inf), additive.bfloat16()):
            logits, visible = masked_logits(query, key, given, SCALING, True)
            assert torch.equal(visible, left_padded)
            torch.testing.assert_close(logits, query @ repeated(key).mT * SCALING)
        bias = torch.randn(1, HEADS, LENGTH, LENGTH)
        logits, visible = masked_logits(query, key, additive + bias, SCALING, True)
        expected = query @ repeated(key).mT * SCALING + bias
        torch.testing.assert_close(logits[visible.expand_as(logits)], expected[visible.expand_as(logits)])

    def test_softcap_and_position_bias(self):
        query, key, _ = inputs()
        bias = torch.randn(1, HEADS, LENGTH, LENGTH)
        logits, _ = masked_logits(query, key, None, SCALING, False, softcap=0.5, position_bias=bias)
        expected = 0.5 * torch.tanh(query @ repeated(key).mT * SCALING / 0.5) + bias
        torch.testing.assert_close(logits, expected)

    @pytest.mark.parametrize("mask", [torch.ones(2, LENGTH), object()], ids=["2-D", "of a kernel"])
    def test_mask_of_another_kind_is_refused(self, mask):
        with pytest.raises(ValueError, match=r"attn_implementation='sdpa'.*num_posterior_samples=0"):
            masked_logits(*inputs()[:2], mask, 1.0, True)

    def test_mask_longer_than_the_keys(self):
        query, key, _ = inputs()
        longer = F.pad(left_padded, (0, 4))
        assert torch.equal(masked_logits(query, key, longer, 1.0, True)[1], left_padded)

    @pytest.mark.parametrize(("kind", "prior"), PRIORS)
    @pytest.mark.parametrize("data_dependent", DEPENDENT)
    @pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
    def test_fully_masked_row_is_zero(self, kind, prior, data_dependent, additive):
        posterior, tensors = posterior_of(kind, data_dependent, prior=prior), inputs()
        mask = left_padded  # the first two queries of the first sequence see nothing
        if additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        output, weights, record = attend(posterior, tensors, mask, noise_of(posterior), axis={"statistics": True})
        assert output[:SAMPLES, :2].eq(0).all() and weights[:SAMPLES, :, :2].eq(0).all()
        assert record.statistics.kl[0, :2].eq(0).all()
        torch.testing.assert_close(weights.sum(-1)[:SAMPLES, :, 2:], torch.ones(SAMPLES, HEADS, 3))
        grads = torch.autograd.grad(
            output.square().sum() + record.statistics.kl.sum(), [*tensors, *posterior.parameters()]
        )
        assert all(grad.isfinite().all() for grad in grads)
        assert mean_weights(*tensors[:2], mask, scaling=SCALING)[0, :, :2].eq(0).all()


@pytest.mark.parametrize("queries", [1, LENGTH])
@pytest.mark.parametrize("copies", [1, SAMPLES])
def test_mix_equals_copies_of_the_values(queries, copies):
    weights = torch.randn(BATCH * copies, HEADS, queries, LENGTH, requires_grad=True)
    value = torch.randn(BATCH, GROUPS, LENGTH, WIDTH, requires_grad=True)
    expected = (weights @ repeated(value).repeat_interleave(copies, 0)).transpose(1, 2)
    actual = mix(weights, value)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (weights, value), grad),
        torch.autograd.grad(expected, (weights, value), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
class TestDropout:
    def test_rate_of_0_is_none(self, kind):
        posterior, tensors = posterior_of(kind), inputs()
        noise = noise_of(posterior)
        plain, _, _ = attend(posterior, tensors, causal, noise)
        assert torch.equal(attend(posterior, tensors, causal, noise, dropout=0.0)[0], plain)

    def test_expected_output_and_weights_before_dropout(self, kind):
        posterior, tensors = posterior_of(kind), inputs()
        noise = noise_of(posterior)
        expected, weights, _ = attend(posterior, tensors, causal, noise)
        drawn = []
        for _ in range(400):
            output, shown, _ = attend(posterior, tensors, causal, noise, dropout=0.3)
            assert torch.equal(shown, weights)
            drawn.append(output.detach())
        drawn = torch.stack(drawn)
        error = drawn.std(0) / len(drawn) ** 0.5
        assert drawn.std(0).min() > 1e-3
        assert ((drawn.mean(0) - expected).abs() < 5 * error + 1e-5).all()


class TestRecord:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("data_dependent", DEPENDENT)
    @pytest.mark.parametrize("samples", [0, SAMPLES])
    def test_statistics_by_brute_force(self, kind, data_dependent, samples):
        """Means over the tokens that count, of the sampled weights (the mean pass: of the mean)."""
        posterior, tensors = posterior_of(kind, data_dependent), inputs()
        counts = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 1, 1]])
        noise = noise_of(posterior, max(samples, 1))
        given = {"statistics": True, "token_weights": counts}
        output, weights, record = attend(posterior, tensors, left_padded, noise, samples, axis=given)
        logits = tensors[0] @ repeated(tensors[1]).mT * SCALING
        if not samples:
            assert output is None and weights is None
            weights = torch.softmax(logits.masked_fill(~left_padded, -1e9), -1)
        value = naive_log_value(posterior, tensors[0], logits, left_padded).exp()
        statistics, per_sample = record.statistics, weights.unflatten(0, (BATCH, -1))
        sums = {"value": 0, "entropy": 0, "effective_keys": 0}
        for b, q in counts.nonzero().tolist():
            entropy = torch.special.entr(per_sample[b, :, :, q]).sum(-1)
            sums["entropy"] += entropy.mean(0)
            sums["effective_keys"] += entropy.exp().mean(0)
            sums["value"] += value[b, :, q]
        name, other = ("scale", "concentration") if kind == "gaussian" else ("concentration", "scale")
        assert getattr(statistics, other) is None
        torch.testing.assert_close(getattr(statistics, name), sums["value"] / 6)
        torch.testing.assert_close(statistics.entropy, sums["entropy"] / 6)
        torch.testing.assert_close(statistics.effective_keys, sums["effective_keys"] / 6)
        kl_of_counted = (statistics.kl * counts).sum() / 6
        torch.testing.assert_close(statistics.kl_per_head.sum(), kl_of_counted)
        assert record.site == "attention" and record.layer == 1 and record.units == HEADS
        if kind != "gaussian":
            mean = torch.softmax(logits.masked_fill(~left_padded, -torch.inf), -1).nan_to_num()
            log_mean = mean.log()
            kl = multi_gamma_kl(log_mean + value[..., None].log(), log_mean + math.log(3.0)).sum(-1)
            torch.testing.assert_close(statistics.kl, kl.sum(1), rtol=1e-4, atol=1e-5)
            expected = (kl * counts[:, None]).sum((0, 2)) / 6
            torch.testing.assert_close(statistics.kl_per_head, expected, rtol=1e-4, atol=1e-5)

    def test_nothing_is_recorded_unless_asked(self):
        posterior = posterior_of()
        _, _, record = attend(posterior, inputs(), causal, noise_of(posterior), axis={"record": False})
        assert record is None
        _, _, record = attend(posterior, inputs(), causal, noise_of(posterior))
        assert record.statistics.kl_per_head is None and record.statistics.entropy is None

    def test_effective_keys_of_equal_weights_are_all_keys(self):
        posterior, tensors = posterior_of("gaussian", initial_scale=1e-6, perturb=False), inputs()
        tensors[0] = torch.zeros_like(tensors[0])
        given = {"statistics": True}
        _, _, record = attend(posterior, tensors, None, noise_of(posterior), is_causal=False, axis=given)
        torch.testing.assert_close(record.statistics.effective_keys, torch.full((HEADS,), float(LENGTH)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
def test_half_precision_inputs_float32_mathematics(kind, data_dependent):
    """The weights are those of float32 given the same (rounded) logits, and rows sum to 1 in bf16's precision."""
    posterior, tensors = posterior_of(kind, data_dependent), [t.detach().bfloat16() for t in inputs()]
    noise = noise_of(posterior)
    output, weights, record = attend(posterior, tensors, causal, noise)
    assert output.dtype == weights.dtype == torch.bfloat16 and record.statistics.kl.dtype == torch.float32
    expected = attend(posterior, [t.float() for t in tensors], causal, noise)
    torch.testing.assert_close(weights.float(), expected[1], rtol=0.05, atol=0.02)
    torch.testing.assert_close(output.float(), expected[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(record.statistics.kl, expected[2].statistics.kl, rtol=0.02, atol=0.02)
    assert (weights.float().sum(-1) - 1).abs().max() < 0.02
