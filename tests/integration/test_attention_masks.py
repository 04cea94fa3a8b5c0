"""Variational attention under every mask and cache: causality, padding, packing, windows, decoding, generate."""

import pytest
import torch
from integration_models import (
    PAD,
    RowNoise,
    assert_same_measures,
    attention_config,
    endless,
    eve_config,
    measures_of_sequences,
    prompt,
    tiny_model,
)
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from hf_variational import posterior_noise

KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")
DEPENDENT = (False, "query", True)
SITES = {
    "attention alone": {"eve": None},
    "attention between": {"eve": None, "attention_layers": [1]},
    "everything": {"eve": eve_config(noise="sequence")},
}
SOME_SITES = ["attention between", "everything"]
SAMPLES, LENGTH, NEW = 3, 9, 5
LEFT = torch.tensor([[0] * 3 + [1] * 6, [1] * LENGTH])
RIGHT = torch.tensor([[1] * 6 + [0] * 3, [1] * LENGTH])


def model_of(kind="dirichlet", data_dependent=False, sites="attention alone", **options):
    return tiny_model(**{"attention": attention_config(kind, data_dependent), **SITES[sites], **options})


def run(model, ids=None, noise=None, samples=SAMPLES, **options):
    """Log-probabilities of the samples, and KL of each layer's attention."""
    with torch.no_grad(), posterior_noise(noise or RowNoise()):
        out = model(ids, num_posterior_samples=samples, output_sample_logits=True, output_posteriors=True, **options)
    return out.sample_logits, torch.stack([statistics.kl for statistics in out.attention_posteriors.values()], -1)


def assert_close(actual, expected, where=slice(None)):
    """Of samples [batch, S, length, vocab] and KL [batch, length, layers]; `where` picks positions."""
    for ours, theirs in zip(
        (actual[0].transpose(1, 2), actual[1]), (expected[0].transpose(1, 2), expected[1]), strict=True
    ):
        torch.testing.assert_close(ours[where], theirs[where], rtol=1e-4, atol=1e-4)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """As `generate` gives them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
class TestMasks:
    @pytest.mark.parametrize("sites", SITES)
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_the_future_changes_nothing_earlier(self, kind, data_dependent, sites, implementation):
        model = model_of(kind, data_dependent, sites, attn_implementation=implementation)
        ids = prompt(2, LENGTH)
        before = run(model, ids)
        for position in (1, 5, LENGTH - 1):
            changed = ids.clone()
            changed[:, position] = (ids[:, position] + 7) % 50 + 3
            after = run(model, changed)
            assert_close(after, before, (slice(None), slice(position)))
            assert (after[0] - before[0])[:, :, position:].abs().amax((1, 3)).min() > 1e-3

    def test_the_future_has_no_gradient(self, kind, data_dependent):
        model = model_of(kind, data_dependent)
        embeddings = model.get_input_embeddings()(prompt(1, LENGTH)).detach().requires_grad_()
        out = model(inputs_embeds=embeddings, num_posterior_samples=2, output_posteriors=True)
        kl = sum(statistics.kl for statistics in out.attention_posteriors.values())
        (grad,) = torch.autograd.grad(out.logits[:, 4].sum() + kl[:, 4].sum(), embeddings)
        assert grad[:, 5:].eq(0).all() and grad[:, 4].abs().max() > 0 and grad[:, :4].abs().max() > 0

    @pytest.mark.parametrize("sites", SOME_SITES)
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
    def test_padding_changes_nothing(self, kind, data_dependent, sites, implementation, mask):
        model = model_of(kind, data_dependent, sites, attn_implementation=implementation)
        ids = prompt(2, LENGTH).where(mask.bool(), PAD)
        padded = run(model, ids, attention_mask=mask, position_ids=positions_of(mask))
        assert all(part.isfinite().all() for part in padded)
        for row in range(2):
            keep = mask[row].bool()
            alone = run(model, ids[row : row + 1, keep], RowNoise([row]))
            assert_close([padded[0][row : row + 1, :, keep], padded[1][row : row + 1, keep]], alone)

    @pytest.mark.parametrize("sites", SITES)
    def test_packed_sequences_equal_separate_ones(self, kind, data_dependent, sites):
        model, ids = model_of(kind, data_dependent, sites), prompt(1, LENGTH)
        positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
        packed = run(model, ids, position_ids=positions, use_cache=False)
        alone = [run(model, part) for part in (ids[:, :5], ids[:, 5:])]
        expected = torch.cat([alone[0][0], alone[1][0]], 2), torch.cat([alone[0][1], alone[1][1]], 1)
        assert_close(packed, expected)

    def test_a_batch_of_one_shares_its_mask(self, kind, data_dependent):
        model, ids = model_of(kind, data_dependent, "everything"), prompt(1, LENGTH)
        mask = torch.ones(1, 1, LENGTH, LENGTH).tril().bool()
        assert_close(run(model, ids, attention_mask=mask), run(model, ids))
        both = run(model, ids.expand(2, -1), RowNoise([0, 0]), attention_mask=mask)
        assert_close([part[:1] for part in both], run(model, ids))

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_sequence_of_nothing_but_padding(self, kind, data_dependent, implementation):
        """Rows that see no key: zeros, and neither NaN nor a KL nor a NaN gradient."""
        model = model_of(kind, data_dependent, "everything", attn_implementation=implementation)
        mask = torch.stack([torch.zeros(LENGTH), LEFT[0]]).long()
        ids = prompt(2, LENGTH)
        options = {
            "num_posterior_samples": SAMPLES,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }
        out = model(ids, output_attentions=True, output_posteriors=True, **options)
        assert out.logits.isfinite().all() and out.loss.isfinite()
        for weights in out.attentions:
            assert weights[:SAMPLES].eq(0).all() and weights[SAMPLES:, :, :3].eq(0).all()
            torch.testing.assert_close(weights[SAMPLES:, :, 3:].sum(-1), torch.ones(SAMPLES, 4, 6))
        for statistics in out.attention_posteriors.values():
            assert statistics.kl[0].eq(0).all() and statistics.kl[1, :3].eq(0).all()
        out.loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        alone = model(ids[1:], attention_mask=mask[1:], labels=options["labels"][1:])
        torch.testing.assert_close(model(ids, attention_mask=mask, labels=options["labels"]).kl, alone.kl)

    @pytest.mark.parametrize("groups", [1, 2])
    def test_grouped_queries_equal_copies_of_the_keys(self, kind, data_dependent, groups):
        """A model with a key head for each query head, whose projections are copies."""
        model = model_of(kind, data_dependent, "everything", num_key_value_heads=groups)
        wide = model_of(kind, data_dependent, "everything", num_key_value_heads=4)
        state = model.state_dict()
        for name, value in state.items():
            if "k_proj" in name or "v_proj" in name:
                state[name] = value.unflatten(0, (groups, 8)).repeat_interleave(4 // groups, 0).flatten(0, 1)
        wide.load_state_dict(state)
        ids = prompt(2, LENGTH)
        options = {"attention_mask": LEFT, "position_ids": positions_of(LEFT)}
        assert_close(run(model, ids, **options), run(wide, ids, **options))


CHUNKS = {"tokens": [5, 1, 1, 1, 1], "chunks": [1, 4, 2, 2]}


def in_chunks(model, ids, mask, cache, chunks, **options):
    """The same in pieces over a cache."""
    pieces, seen, positions = [], 0, positions_of(mask)
    for size in chunks:
        here = slice(seen, seen + size)
        seen += size
        given = {"attention_mask": mask[:, :seen], "position_ids": positions[:, here], **options}
        pieces.append(run(model, ids[:, here], past_key_values=cache, use_cache=True, **given))
    return torch.cat([piece[0] for piece in pieces], 2), torch.cat([piece[1] for piece in pieces], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", DEPENDENT)
class TestCaches:
    @pytest.mark.parametrize("sites", SOME_SITES)
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("chunks", CHUNKS)
    def test_cached_equals_the_full_pass(self, kind, data_dependent, sites, cache, chunks):
        model, ids = model_of(kind, data_dependent, sites), prompt(2, LENGTH)
        if cache == "dynamic":
            cache = DynamicCache(config=model.config)
        else:
            cache = StaticCache(config=model.config, max_cache_len=LENGTH + 3)
        expected = run(model, ids, attention_mask=LEFT, position_ids=positions_of(LEFT), use_cache=False)
        actual = in_chunks(model, ids, LEFT, cache, CHUNKS[chunks])
        assert_close(actual, expected, LEFT.bool())
        split = 1 if sites == "attention between" else 0
        rows = [2 if index <= split else 2 * SAMPLES for index in range(3)]
        assert [layer.keys.shape[0] for layer in cache.layers] == rows
        assert [layer.values.shape[0] for layer in cache.layers] == rows
        assert cache.layers[0].keys.shape[1] == 2, "one row of keys for a group of queries"

    @pytest.mark.parametrize("sites", SOME_SITES)
    @pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
    @pytest.mark.parametrize("chunks", CHUNKS)
    def test_sliding_window(self, kind, data_dependent, sites, static, chunks):
        """Each query sees the last four keys; the cache keeps no others."""
        window = 4
        model, ids = model_of(kind, data_dependent, sites), prompt(2, LENGTH)
        distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
        band = ((distance >= 0) & (distance < window))[None, None].expand(2, 1, -1, -1)
        expected = run(model, ids, attention_mask=band, use_cache=False)
        if static:
            layers = [StaticSlidingWindowLayer(max_cache_len=20, sliding_window=window) for _ in range(3)]
        else:
            layers = [DynamicSlidingWindowLayer(sliding_window=window) for _ in range(3)]
        cache, pieces, seen = Cache(layers=layers), [], 0
        for size in CHUNKS[chunks]:
            length, offset = cache.get_mask_sizes(size, 0)
            here = slice(seen, seen + size)
            keys = torch.nn.functional.pad(band, (0, 20))[:, :, here, offset : offset + length]
            pieces.append(run(model, ids[:, here], attention_mask=keys, past_key_values=cache, use_cache=True))
            seen += size
        actual = torch.cat([piece[0] for piece in pieces], 2), torch.cat([piece[1] for piece in pieces], 1)
        assert_close(actual, expected)

    @pytest.mark.parametrize(
        ("move", "rows"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda cache: cache.crop(-2), [0, 1]),
        ],
        ids=["reorder", "select", "repeat", "crop"],
    )
    def test_whole_sequences_move(self, kind, data_dependent, move, rows):
        model, ids = model_of(kind, data_dependent, "attention between"), prompt(2, 6)
        cache = DynamicCache(config=model.config)
        run(model, ids, past_key_values=cache)
        move(cache)
        more = prompt(len(rows), 3, seed=4)
        out = run(model, more, RowNoise(rows), past_key_values=cache)
        whole = torch.cat([ids[rows, : cache.get_seq_length() - 3], more], 1)
        expected = run(model, whole, RowNoise(rows))
        assert_close(out, [expected[0][:, :, -3:], expected[1][:, -3:]])

    def test_samples_after_a_prompt_of_the_mean_pass(self, kind, data_dependent):
        """Where only the last layer samples, the mean pass has cached the very rows that samples have."""
        model, ids = model_of(kind, data_dependent, attention_layers=[2]), prompt(2, LENGTH)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
        out, expected = run(model, ids[:, 6:], past_key_values=cache), run(model, ids)
        assert_close(out, [expected[0][:, :, 6:], expected[1][:, 6:]])


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "beam sample": {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
}


def generate(model, ids, noise=None, **options):
    torch.manual_seed(0)
    given = {"num_posterior_samples": SAMPLES, "output_uncertainty": True, "return_dict_in_generate": True}
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, **given, **options}
    with posterior_noise(noise or RowNoise()):
        return model.generate(ids, **options)


@pytest.mark.parametrize("kind", KINDS)
class TestGenerate:
    @pytest.mark.parametrize("data_dependent", DEPENDENT)
    @pytest.mark.parametrize("mode", MODES)
    def test_measures_equal_a_full_forward(self, kind, data_dependent, mode):
        """Noise belongs to a sequence: its beams share it, and what is not kept by the cache is drawn alike."""
        model = endless(model_of(kind, data_dependent, "everything"))
        options = MODES[mode]
        beams, returned = options.get("num_beams", 1), options.get("num_return_sequences", 1)
        copies = beams if beams > 1 else returned
        out = generate(model, prompt(), RowNoise([row for row in range(2) for _ in range(copies)]), **options)
        noise = RowNoise([row for row in range(2) for _ in range(returned)])
        expected = measures_of_sequences(model, out.sequences, NEW, noise, num_posterior_samples=SAMPLES)
        assert_same_measures(out.uncertainty, expected)
        assert out.uncertainty.mutual_information.mean() > 1e-3

    def test_padded_prompts_equal_each_alone(self, kind):
        model, ids = endless(model_of(kind, "query", "everything")), prompt(2, LENGTH)
        out = generate(model, ids.where(LEFT.bool(), PAD), attention_mask=LEFT)
        for row, start in enumerate((3, 0)):
            alone = generate(model, ids[row : row + 1, start:], RowNoise([row]))
            assert torch.equal(alone.sequences[0, LENGTH - start :], out.sequences[row, LENGTH:])
            assert_same_measures(
                out.uncertainty.map(lambda measure, row=row: measure[row : row + 1]), alone.uncertainty
            )

    def test_only_the_new_row_is_sampled(self, kind):
        model, noise = endless(model_of(kind, "query", "attention between")), RowNoise()
        out = generate(model, prompt(), noise)
        assert [request.shape[2:4] for request in noise.requests] == [
            (6, 6),
            *((1, 6 + step) for step in range(1, NEW)),
        ]
        layers = out.past_key_values.layers
        assert [layer.keys.shape[0] for layer in layers] == [2, 2, 2 * SAMPLES]

    def test_attentions_of_each_step(self, kind):
        model = endless(model_of(kind))
        out = generate(model, prompt(), output_attentions=True)
        assert len(out.attentions) == NEW
        for step, layers in enumerate(out.attentions):
            keys = 6 + step
            assert [weights.shape for weights in layers] == [(2 * SAMPLES, 4, 6 if step == 0 else 1, keys)] * 3
            for weights in layers:
                torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize(("kind", "data_dependent"), list(zip(KINDS, DEPENDENT[::-1], strict=True)))
def test_static_cache_compiles_without_a_break(kind, data_dependent):
    """On accelerators transformers compiles the decoding step of a static cache by itself."""
    model, ids = endless(model_of(kind, data_dependent, "attention between")), prompt()
    table = torch.randn(2 * SAMPLES, 4, 1, 32, 2, generator=torch.Generator().manual_seed(0))

    def noise(request):  # which a compiler can read
        *_, keys, draws = request.shape
        return table[..., :keys, :draws].expand(request.shape)

    expected = generate(model, ids, noise)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    out = generate(model, ids, noise, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_measures(out.uncertainty, expected.uncertainty)
