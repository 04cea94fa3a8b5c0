"""S samples through the sample axis against S single-sample forwards with the same noise; the groups of a cache."""

import pytest
import torch
from noise import NoiseTable
from tiny import assert_same_gradients, gradients, tiny_model, token_ids
from transformers import DynamicCache, StaticCache

from hf_variational import posterior_noise
from hf_variational.modeling.sample_axis import prepare_cache

SPLITS = [None, [0], [1], [2], [0, 2], [1, 2]]
SAMPLES = 3
LENGTH = 9
MASKS = {
    "unpadded": torch.ones(2, LENGTH, dtype=torch.long),
    "right": torch.tensor([[1] * LENGTH, [1] * 6 + [0] * 3]),
    "left": torch.tensor([[0] * 3 + [1] * 6, [1] * LENGTH]),
}


def padded(padding: str) -> dict:
    """Ids, mask, and the position ids that `generate` gives them."""
    mask = MASKS[padding]
    return {
        "input_ids": token_ids(2, LENGTH),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def forward(model, noise: NoiseTable, samples: int = SAMPLES, **kwargs):
    with posterior_noise(noise):
        return model(num_posterior_samples=samples, output_sample_logits=True, **kwargs)


def one_by_one(model, noise: NoiseTable, samples: int = SAMPLES, **kwargs) -> torch.Tensor:
    """The samples' log-probabilities from single-sample forwards, [batch, S, length, vocab]."""
    alone = [forward(model, noise.only(samples=[s]), 1, **kwargs).sample_logits for s in range(samples)]
    return torch.cat(alone, dim=1)


def assert_close_where(mask: torch.Tensor, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal at the attended positions of [batch, S, length, ...]."""
    keep = mask.bool()[:, None].expand(actual.shape[:3])
    torch.testing.assert_close(actual[keep], expected[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("scope", ["token", "sequence"])
class TestEqualsSingleSamples:
    @pytest.mark.parametrize("padding", list(MASKS))
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_full_forward(self, split, scope, padding, attention):
        model = tiny_model({"noise": scope}, variational_layers=split, attn_implementation=attention)
        noise, inputs = NoiseTable.of(model, 2, SAMPLES), padded(padding)
        with torch.no_grad():
            out = forward(model, noise, **inputs)
            expected = one_by_one(model, noise, **inputs)
        assert_close_where(inputs["attention_mask"], out.sample_logits, expected)
        torch.testing.assert_close(out.logits, out.sample_logits.exp().mean(1).log(), rtol=1e-4, atol=1e-5)
        assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.02, "the samples must differ for this to say anything"

    @pytest.mark.parametrize("padding", ["unpadded", "left"])
    @pytest.mark.parametrize(
        "kind, chunks",
        [
            ("dynamic", [1] * LENGTH),
            ("dynamic", [4, 1, 1, 3]),
            ("dynamic", [5, 4]),
            ("static", [4, 1, 1, 3]),
            ("static", [5, 4]),
        ],
        ids=str,
    )
    def test_cached(self, split, scope, padding, kind, chunks):
        """Token by token and in chunks, the cached pass equals the full one, which equals the single samples."""
        model = tiny_model({"noise": scope}, variational_layers=split)
        noise, inputs = NoiseTable.of(model, 2, SAMPLES), padded(padding)
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=LENGTH + 3)
        pieces, seen = [], 0
        with torch.no_grad():
            expected = one_by_one(model, noise, use_cache=False, **inputs)
            for size in chunks:
                here = slice(seen, seen + size)
                seen += size
                out = forward(
                    model,
                    noise,
                    input_ids=inputs["input_ids"][:, here],
                    attention_mask=inputs["attention_mask"][:, :seen],
                    position_ids=inputs["position_ids"][:, here],
                    past_key_values=cache,
                    use_cache=True,
                )
                pieces.append(out.sample_logits)
        assert_close_where(inputs["attention_mask"], torch.cat(pieces, dim=2), expected)
        assert cache.get_seq_length() == LENGTH
        first = 0 if split is None else split[0]
        for index, layer in enumerate(cache.layers):
            rows = 2 if index <= first else 2 * SAMPLES
            assert layer.keys.shape[0] == layer.values.shape[0] == rows, "computed and cached once up to the split"

    def test_packed(self, split, scope):
        """Two documents in one row equal each alone; with and without samples side by side."""
        model = tiny_model({"noise": scope}, variational_layers=split)
        ids = token_ids(1, LENGTH)
        noise = NoiseTable.of(model, 1, SAMPLES)
        position_ids = torch.cat([torch.arange(5), torch.arange(4)])[None]
        with torch.no_grad():
            packed = forward(model, noise, input_ids=ids, position_ids=position_ids, use_cache=False)
            alone = [one_by_one(model, noise, input_ids=part) for part in (ids[:, :5], ids[:, 5:])]
        torch.testing.assert_close(packed.sample_logits, torch.cat(alone, dim=2), rtol=1e-4, atol=1e-5)

    def test_gradient_is_the_mean_of_the_single_samples(self, split, scope):
        options = {"noise": scope, "prior": "autoregressive", "latent_dim": 2}
        model = tiny_model(options, variational_layers=split)
        noise, inputs = NoiseTable.of(model, 2, SAMPLES), padded("right")
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        together = gradients(model, forward(model, noise, **inputs).loss)
        alone = [gradients(model, forward(model, noise.only(samples=[s]), 1, **inputs).loss) for s in range(SAMPLES)]
        mean = {name: torch.stack([part[name] for part in alone]).mean(0) for name in together}
        assert_same_gradients(together, mean)


class TestWhereRowsSplit:
    @pytest.mark.parametrize("split, rows", [([0], [2, 6, 6, 6]), ([1], [2, 2, 6, 6]), ([2], [2, 2, 2, 6])], ids=str)
    def test_nothing_is_computed_twice_below_the_split(self, split, rows):
        model, seen = tiny_model(variational_layers=split), []
        for layer in [*model.model.layers, model.model.norm]:
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
        out = model(token_ids(), num_posterior_samples=3, output_hidden_states=True)
        assert seen == rows
        assert [state.shape[0] for state in out.hidden_states] == rows
        assert out.logits.shape == (2, LENGTH, model.config.vocab_size)

    def test_rows_are_grouped_by_sequence(self):
        """Row b * S + s is sample s of sequence b."""
        model, ids = tiny_model(), token_ids()
        noise = NoiseTable.of(model, 2, 3)
        with torch.no_grad(), posterior_noise(noise):
            rows = model.model(ids, num_posterior_samples=3).last_hidden_state
        for b in range(2):
            for s in range(3):
                with torch.no_grad(), posterior_noise(noise.only([b], [s])):
                    alone = model.model(ids[b : b + 1], num_posterior_samples=1).last_hidden_state
                torch.testing.assert_close(rows[b * 3 + s], alone[0], rtol=1e-4, atol=1e-5)

    def test_one_sequence(self):
        """Masks and positions of a batch of one are shared by its samples."""
        model, ids = tiny_model(), token_ids(1)
        noise = NoiseTable.of(model, 1, SAMPLES)
        for mask in (None, torch.ones(1, LENGTH), torch.tensor([[0] * 3 + [1] * 6])):
            with torch.no_grad():
                out = forward(model, noise, input_ids=ids, attention_mask=mask)
                expected = one_by_one(model, noise, input_ids=ids, attention_mask=mask)
            assert_close_where(torch.ones(1, LENGTH) if mask is None else mask, out.sample_logits, expected)

    def test_embeddings_instead_of_ids_and_a_prepared_mask(self):
        model, ids = tiny_model(), token_ids()
        noise = NoiseTable.of(model, 2, SAMPLES)
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
        with torch.no_grad():
            expected = forward(model, noise, input_ids=ids).sample_logits
            embeddings = model.get_input_embeddings()(ids)
            for mask in (None, causal, causal[:1]):
                out = forward(model, noise, inputs_embeds=embeddings, attention_mask=mask)
                torch.testing.assert_close(out.sample_logits, expected, rtol=1e-4, atol=1e-5)

    def test_without_a_source_samples_and_positions_draw_their_own(self):
        model, ids = tiny_model(), token_ids(1).expand(2, -1)
        with torch.no_grad():
            log_p = model(ids, num_posterior_samples=2, output_sample_logits=True).sample_logits.flatten(0, 1)
        assert torch.pdist(log_p.flatten(1)).min() > 1e-2


def continued(model, cache, noise, ids, position: int, **kwargs):
    """Logits of one more token after a cache of `position` tokens."""
    positions = torch.full((ids.shape[0], 1), position)
    options = {"position_ids": positions, "past_key_values": cache, "use_cache": True, **kwargs}
    return forward(model, noise, input_ids=ids[:, position : position + 1], **options).sample_logits[:, :, 0]


@pytest.mark.parametrize("split", [None, [1], [2]], ids=str)
@pytest.mark.parametrize("scope", ["token", "sequence"])
class TestCacheGroups:
    def filled(self, split, scope, static: bool = False):
        model = tiny_model({"noise": scope}, variational_layers=split)
        noise, ids = NoiseTable.of(model, 2, SAMPLES), token_ids()
        cache = StaticCache(config=model.config, max_cache_len=LENGTH) if static else DynamicCache()
        forward(model, noise, input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        return model, noise, ids, cache

    @pytest.mark.parametrize(
        "move, order",
        [
            (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([0, 1, 1])), [0, 1, 1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        ],
        ids=["swap", "same beam", "select", "select more", "repeat"],
    )
    @torch.no_grad()
    def test_whole_sequences_move(self, split, scope, move, order):
        model, noise, ids, cache = self.filled(split, scope)
        move(cache)
        moved, ids = noise.only(sequences=order), ids[order]
        actual = continued(model, cache, moved, ids, LENGTH - 1)
        expected = forward(model, moved, input_ids=ids).sample_logits[:, :, -1]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_static_cache_reorders(self, split, scope):
        model, noise, ids, cache = self.filled(split, scope, static=True)
        cache.reorder_cache(torch.tensor([1, 0]))
        moved, ids = noise.only(sequences=[1, 0]), ids[[1, 0]]
        expected = forward(model, moved, input_ids=ids).sample_logits[:, :, -1]
        torch.testing.assert_close(continued(model, cache, moved, ids, LENGTH - 1), expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_crop(self, split, scope):
        model, noise, ids, cache = self.filled(split, scope)
        cache.crop(-3)
        assert cache.get_seq_length() == LENGTH - 4
        expected = forward(model, noise, input_ids=ids).sample_logits[:, :, LENGTH - 4]
        torch.testing.assert_close(continued(model, cache, noise, ids, LENGTH - 4), expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_moves_before_the_first_token_are_harmless(self, split, scope):
        """As those of the stock cache are."""
        model = tiny_model({"noise": scope}, variational_layers=split)
        noise, ids, cache = NoiseTable.of(model, 2, SAMPLES), token_ids(), DynamicCache(config=model.config)
        prepare_cache(cache, 3, model.variational_layers[0], SAMPLES)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(1)
        cache.crop(-1)
        actual = forward(model, noise, input_ids=ids, past_key_values=cache).sample_logits
        torch.testing.assert_close(actual, forward(model, noise, input_ids=ids).sample_logits)

    @torch.no_grad()
    def test_another_number_of_samples_is_refused(self, split, scope):
        model, noise, ids, cache = self.filled(split, scope)
        for other in (0, 1, SAMPLES + 1):
            with pytest.raises(ValueError, match=rf"num_posterior_samples={SAMPLES}.*{other}"):
                model(ids[:, -1:], past_key_values=cache, num_posterior_samples=other)
        continued(model, cache, noise, ids, LENGTH - 1)  # and the cache is none the worse

    @torch.no_grad()
    def test_reset_starts_anew(self, split, scope):
        """An emptied cache takes any number of samples, and a new sequence draws its own noise."""
        model, _, ids, cache = self.filled(split, scope)
        cache.reset()
        assert all(getattr(layer, "sequence_noise", None) is None for layer in cache.layers)
        for samples in (SAMPLES, 2, 1):
            noise = NoiseTable.of(model, 2, samples, seed=samples)
            expected = forward(model, noise, samples, input_ids=ids).sample_logits
            actual = forward(model, noise, samples, input_ids=ids, past_key_values=cache).sample_logits
            torch.testing.assert_close(actual, expected)
            cache.reset()


class TestCache:
    @torch.no_grad()
    @pytest.mark.parametrize("cache_of", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=12)])
    def test_sequence_noise_is_kept_while_decoding(self, cache_of):
        """Drawn from the global generator when the sequence starts, then constant: a full forward with it agrees."""
        model, ids = tiny_model({"noise": "sequence"}), token_ids()
        cache, logits = cache_of(config=model.config), []
        for t in range(LENGTH):
            options = {"past_key_values": cache, "num_posterior_samples": 3, "output_sample_logits": True}
            logits.append(model(ids[:, t : t + 1], **options).sample_logits)
        kept = [layer.sequence_noise for layer in cache.layers]
        assert all(noise.shape == (6, 1, 20) for noise in kept)
        assert not torch.equal(kept[0], kept[1])
        with posterior_noise(lambda request: kept[request.layer]):
            full = model(ids, num_posterior_samples=3, output_sample_logits=True)
        torch.testing.assert_close(torch.cat(logits, 2), full.sample_logits, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_token_noise_is_fresh_at_each_step(self):
        model, ids = tiny_model(), token_ids()
        cache = DynamicCache()
        seen = []

        def source(request):
            seen.append(request.positions)
            return torch.zeros(request.shape)

        with posterior_noise(source):
            model(ids[:, :5], past_key_values=cache, num_posterior_samples=2)
            model(ids[:, 5:6], past_key_values=cache, num_posterior_samples=2)
        assert torch.equal(seen[0], torch.arange(5).expand(2, -1))
        assert torch.equal(seen[-1], torch.tensor([[5], [5]]))

    @torch.no_grad()
    def test_samples_may_follow_a_mean_pass_where_only_the_last_layer_is_variational(self):
        """What it cached is what samples would have cached; above the split it is not, and is refused."""
        ids = token_ids()
        model = tiny_model(variational_layers=[2])
        cache, noise = DynamicCache(), NoiseTable.of(model, 2, SAMPLES)
        model(ids[:, :-1], past_key_values=cache, num_posterior_samples=0)
        expected = forward(model, noise, input_ids=ids).sample_logits[:, :, -1]
        torch.testing.assert_close(continued(model, cache, noise, ids, LENGTH - 1), expected, rtol=1e-4, atol=1e-5)
        model, cache = tiny_model(variational_layers=[1]), DynamicCache()
        model(ids[:, :-1], past_key_values=cache, num_posterior_samples=0)
        with pytest.raises(ValueError, match="num_posterior_samples=0, this pass has 2"):
            model(ids[:, -1:], past_key_values=cache, num_posterior_samples=2)

    @torch.no_grad()
    def test_mean_pass_caches_like_the_stock_model(self):
        model, ids = tiny_model(), token_ids()
        cache = DynamicCache()
        pieces = [model(ids[:, part], past_key_values=cache).logits for part in (slice(0, 6), slice(6, 9))]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, rtol=1e-4, atol=1e-5)
        assert {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"}

    @torch.no_grad()
    def test_kl_of_a_cached_pass_is_that_of_the_full_one(self):
        model, ids = tiny_model({"prior": "empirical"}), token_ids()
        noise, cache, pieces = NoiseTable.of(model, 2, 2), DynamicCache(), []
        full = forward(model, noise, 2, input_ids=ids, output_posteriors=True).posteriors
        for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
            out = forward(model, noise, 2, input_ids=ids[:, part], past_key_values=cache, output_posteriors=True)
            pieces.append(out.posteriors)
        for layer in range(3):
            kl = torch.cat([piece[layer].kl for piece in pieces], 1)
            torch.testing.assert_close(kl, full[layer].kl, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_the_autoregressive_prior_refuses_to_go_on_from_a_cache(self):
        """The prior of a chunk's first position is set by a posterior that the cache does not hold."""
        model, ids, cache = tiny_model({"prior": "autoregressive"}), token_ids(), DynamicCache()
        model(ids[:, :4], past_key_values=cache, num_posterior_samples=2, output_posteriors=True)
        model(ids[:, 4:5], past_key_values=cache, num_posterior_samples=2)
        with pytest.raises(ValueError, match="starts at position 5.*whole sequence"):
            model(ids[:, 5:9], past_key_values=cache, num_posterior_samples=2, output_posteriors=True)


@pytest.mark.parametrize("samples", [-1, 1.5, True, "4"])
def test_bad_numbers_of_samples_are_named(samples):
    with pytest.raises(ValueError, match=f"num_posterior_samples.*{samples}"):
        tiny_model()(token_ids(), num_posterior_samples=samples)
