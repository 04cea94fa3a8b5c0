"""Caches that hold posterior samples: moved in whole groups of rows, cropped, reset, compiled."""

import pytest
import torch
from integration_models import RowNoise, assert_same_measures, endless, eve_config, prompt, tiny_model
from transformers import CompileConfig, DynamicCache, StaticCache

from hf_variational import posterior_noise

SAMPLES = 3


@pytest.fixture(scope="module")
def model():
    return endless(tiny_model(eve=eve_config(noise="sequence"), variational_layers=[1, 2]))


def run(model, ids, cache, noise=None, samples=SAMPLES):
    mask = torch.ones(ids.shape[0], cache.get_seq_length() + ids.shape[1], dtype=torch.long)
    with torch.no_grad(), posterior_noise(noise or RowNoise()):
        return model(ids, attention_mask=mask, past_key_values=cache, num_posterior_samples=samples).logits


def new_cache(model, kind):
    return kind(config=model.config, **({"max_cache_len": 24} if kind is StaticCache else {}))


def whole(model, ids, rows):
    """The logits of the last three positions, without a cache."""
    with torch.no_grad(), posterior_noise(RowNoise(rows)):
        return model(ids, num_posterior_samples=SAMPLES, use_cache=False).logits[:, -3:]


MOVES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize(
    ("kind", "move"),
    [(DynamicCache, "reorder"), (DynamicCache, "select"), (DynamicCache, "repeat"), (StaticCache, "reorder")],
)
def test_rows_move_in_groups_with_their_noise(model, kind, move):
    ids, more = prompt(3, 5), prompt(6, 3, seed=4)
    cache = new_cache(model, kind)
    run(model, ids, cache)
    apply, rows = MOVES[move]
    apply(cache)
    more = more[: len(rows)]
    # noise that the cache forgot to keep would be drawn here, and be another one
    out = run(model, more, cache, noise=RowNoise(seed=99))
    expected = whole(model, torch.cat([ids[rows], more], dim=1), rows)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


def test_crop(model):
    ids = prompt(2, 8)
    cache = new_cache(model, DynamicCache)
    run(model, ids, cache)
    cache.crop(-3)
    out = run(model, prompt(2, 3, seed=4), cache)
    expected = whole(model, torch.cat([ids[:, :5], prompt(2, 3, seed=4)], dim=1), [0, 1])
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("samples", [SAMPLES, 2, 0])
def test_reset_static_cache_takes_any_number_of_samples(model, samples):
    cache = new_cache(model, StaticCache)
    run(model, prompt(2, 8), cache)
    cache.reset()
    out = run(model, prompt(2, 5), cache, samples=samples)
    expected = run(model, prompt(2, 5), new_cache(model, StaticCache), samples=samples)
    assert torch.equal(out, expected)


def test_reset_cache_draws_new_noise(model):
    cache = new_cache(model, StaticCache)
    run(model, prompt(2, 5), cache)
    cache.reset()
    other = run(model, prompt(2, 5), cache, noise=RowNoise(seed=99))
    assert torch.equal(other, run(model, prompt(2, 5), new_cache(model, StaticCache), noise=RowNoise(seed=99)))


def test_prompt_of_the_mean_pass_cannot_become_samples(model):
    cache = new_cache(model, DynamicCache)
    run(model, prompt(2, 5), cache, samples=0)
    with pytest.raises(ValueError, match=r"num_posterior_samples=0, this pass has 3.*start again"):
        run(model, prompt(2, 3), cache)


def test_prompt_of_the_mean_pass_below_the_only_variational_layer():
    # Where only the last layer is variational no cached row depends on a sample, so any pass may go on.
    model = tiny_model(variational_layers=[2])
    ids, more = prompt(2, 5), prompt(2, 3, seed=4)
    cache = new_cache(model, DynamicCache)
    run(model, ids, cache, samples=0)
    out = run(model, more, cache)
    expected = whole(model, torch.cat([ids, more], dim=1), [0, 1])
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


def generate(model, noise=None, **options):
    ids = prompt()
    options = {"num_posterior_samples": SAMPLES, "output_uncertainty": True, **options}
    with posterior_noise(noise or RowNoise()):
        return model.generate(
            ids,
            max_new_tokens=6,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            **options,
        )


def test_static_caches_of_one_model_after_another(model):
    expected = {samples: generate(model, num_posterior_samples=samples) for samples in (3, 2)}
    for samples in (3, 2, 3):
        out = generate(model, num_posterior_samples=samples, cache_implementation="static")
        assert torch.equal(out.sequences, expected[samples].sequences)
        assert_same_measures(out.uncertainty, expected[samples].uncertainty)
    mean_pass = {"num_posterior_samples": 0, "output_uncertainty": False}
    static = generate(model, cache_implementation="static", **mean_pass)
    assert torch.equal(static.sequences, generate(model, **mean_pass).sequences)


class CompilableNoise:
    """Noise of each layer, position and row, from a table that a compiler can read."""

    table = torch.randn(3, 2 * SAMPLES, 64, 48, generator=torch.Generator().manual_seed(0))

    def __call__(self, request):
        if request.positions is None:
            return self.table[request.layer][:, :1]
        positions = request.positions.repeat_interleave(SAMPLES, dim=0)
        return self.table[request.layer].gather(1, positions.unsqueeze(-1).expand(-1, -1, 48))


@pytest.mark.parametrize("noise", ["token", "sequence"])
def test_static_cache_compiles_without_a_break(noise):
    # On accelerators transformers compiles the decoding step of a static cache by itself.
    model = endless(tiny_model(eve=eve_config(noise=noise)))
    expected = generate(model, noise=CompilableNoise())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    out = generate(model, noise=CompilableNoise(), cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_measures(out.uncertainty, expected.uncertainty)
    torch._dynamo.reset()


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_measures_outlive_the_outputs_they_came_from(options):
    # CUDA graphs write every step's outputs over the last step's.
    model = endless(tiny_model(eve=eve_config(noise="sequence")))
    expected = generate(model, **options)
    given = []

    def poison(module, args):
        for tensor in given:
            tensor.fill_(float("nan"))
        given.clear()

    def remember(module, args, out):
        given.extend([out.logits, out.sample_logits, *out.uncertainty.values()])

    model.register_forward_pre_hook(poison)
    model.register_forward_hook(remember)
    out = generate(model, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_measures(out.uncertainty, expected.uncertainty)
