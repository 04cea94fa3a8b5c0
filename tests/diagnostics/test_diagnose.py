"""Diagnostics of a model: the numbers against brute force, whatever the batches and the padding; units in trouble."""

import json
import math

import pytest
import torch
from inspected_models import (
    LAYERS,
    LENGTHS,
    UNITS,
    VOCAB,
    by_brute_force,
    data,
    dirichlet,
    gpt,
    moved,
    padded,
    retrofitted,
    stock,
)
from transformers import MixtralConfig, MixtralForCausalLM

from hf_variational import (
    EVEAdapterConfig,
    EVEConfig,
    NoiseRequest,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    posterior_noise,
    variationalize,
)
from hf_variational.diagnostics import Band, Diagnostics, diagnose
from hf_variational.diagnostics.layers import LayerDiagnostics, troubled
from hf_variational.modeling.posterior import ACTIVE_KL, UnitWeights

TOKENS = sum(LENGTHS) - len(LENGTHS)


def inspected(model, rows=None, *args, **options):
    settings = {"num_posterior_samples": 0, "progress": False, **options}
    return diagnose(model, data() if rows is None else rows, *args, **settings)


def assert_same(left: Diagnostics, right: Diagnostics):
    assert left.tokens == right.tokens and left.layers.keys() == right.layers.keys()
    for layer in left.layers:
        for name in ("kl", "effective_kl", "scale", "mean_energy"):
            first, second = (getattr(side.layers[layer], name) for side in (left, right))
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)
    for layer in left.heads:
        for name, values in left.heads[layer].values.items():
            torch.testing.assert_close(values, right.heads[layer].values[name], rtol=1e-5, atol=1e-7)


# ---- The numbers ----


@pytest.mark.parametrize(
    "model",
    [
        lambda: gpt(),
        lambda: gpt(mean="gain", prior="standard"),
        lambda: retrofitted("llama"),
        lambda: retrofitted("gpt2", prior="standard"),
    ],
    ids=["gpt", "gpt-gain-standard", "llama", "gpt2-standard"],
)
def test_units_equal_brute_force(model):
    model = model()
    found = inspected(model, batch_size=3)
    assert found.tokens == TOKENS and found.sequences == len(LENGTHS)
    expected = by_brute_force(model, data())
    assert list(found.layers) == list(expected) == list(range(LAYERS))
    for layer, values in expected.items():
        for name, value in values.items():
            torch.testing.assert_close(getattr(found.layers[layer], name).double(), value, rtol=1e-4, atol=1e-6)
        active = float((values["kl"] > ACTIVE_KL).double().mean())
        assert found.layers[layer].active_fraction == pytest.approx(active)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_the_size_of_a_batch_changes_nothing(batch_size):
    model = gpt(attention=dirichlet())
    assert_same(inspected(model, batch_size=3), inspected(model, batch_size=batch_size))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = gpt(attention=dirichlet())
    assert_same(inspected(model, batch_size=1), inspected(model, iter(padded(data(), side))))


def test_labels_say_which_tokens_count():
    model = gpt()
    rows = [{"input_ids": tokens, "labels": [-100] * 2 + tokens[2:]} for tokens in data() if len(tokens) > 3]
    found = inspected(model, rows)
    assert found.tokens == sum(len(row["labels"]) - 2 for row in rows)
    assert not torch.allclose(found.layers[0].kl, inspected(model, [row["input_ids"] for row in rows]).layers[0].kl)


def test_samples_are_averaged_and_reach_the_layers_above():
    model, tables = gpt(), torch.randn(LAYERS, 4, max(LENGTHS), UNITS, generator=torch.Generator().manual_seed(2))

    def source(request: NoiseRequest):
        # The same for every sequence, so that no batch changes it.
        noise = tables[request.layer, : request.num_samples][:, request.positions]  # [S, batch, length, units]
        return noise.transpose(0, 1).flatten(0, 1)

    with posterior_noise(source):
        four = [inspected(model, num_posterior_samples=4, batch_size=size) for size in (1, 3)]
    assert_same(*four)
    below, above = (inspected(model).layers[layer] for layer in (0, 1))
    torch.testing.assert_close(four[0].layers[0].kl, below.kl)  # nothing below it is random
    assert not torch.allclose(four[0].layers[1].kl, above.kl)


def test_the_seed_decides_and_the_generator_is_left_alone():
    model = gpt()
    before = torch.get_rng_state()
    first, again, other = (inspected(model, num_posterior_samples=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.layers[2].kl, again.layers[2].kl)
    assert not torch.equal(first.layers[2].kl, other.layers[2].kl)


def test_the_mode_of_the_model_is_left_alone():
    model = gpt().train()
    inspected(model)
    assert model.training and model.model.layers[0].training


def test_the_effective_kl_is_what_the_loss_is_charged():
    model = gpt()
    batch = padded(data())[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels, num_posterior_samples=0)
    found = inspected(model)
    charged = sum(float(layer.effective_kl.sum()) for layer in found.layers.values())
    assert charged == pytest.approx(float((out.loss - out.nll).detach()), rel=1e-4)
    assert found.kl_weight == 0.01 and inspected(model, kl_weight=0.5).kl_weight == 0.5
    weights = {1: UnitWeights(kl=torch.linspace(0.5, 1.5, UNITS))}
    weighted = inspected(model, unit_weights=weights)
    torch.testing.assert_close(weighted.layers[1].effective_kl, found.layers[1].effective_kl * weights[1].kl)
    torch.testing.assert_close(weighted.layers[0].effective_kl, found.layers[0].effective_kl)


def test_heads_are_those_of_the_tape():
    model = gpt(attention=dirichlet())
    batch = padded(data())[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    out = model(**batch, labels=labels, num_posterior_samples=0, output_posteriors=True)
    found = inspected(model, batch_size=2)
    for layer, expected in out.attention_posteriors.items():
        values = found.heads[layer].values
        torch.testing.assert_close(values["kl"], expected.kl_per_head.float(), rtol=1e-4, atol=1e-6)
        for name in ("concentration", "entropy", "effective_keys"):
            torch.testing.assert_close(values[name], getattr(expected, name).float(), rtol=1e-4, atol=1e-6)
        assert "scale" not in values and found.heads[layer].heads == 2
        torch.testing.assert_close(values["effective_kl"], values["kl"] * 0.01)


def test_an_adapter_says_what_the_same_retrofit_says():
    peft = pytest.importorskip("peft")
    eve = EVEConfig(initial_scale=0.5)
    config = EVEAdapterConfig(eve=eve, layers="all", kl_weight=0.01, task_type="CAUSAL_LM")
    model = peft.get_peft_model(stock(), config)
    model.add_adapter("idle", EVEAdapterConfig(eve=EVEConfig(initial_scale=0.1), layers="all", task_type="CAUSAL_LM"))
    found = inspected(moved(model).eval())
    expected = by_brute_force(model.get_base_model(), data())
    assert found.kl_weight == 0.01 and list(found.layers) == list(range(LAYERS))
    for layer, values in expected.items():
        for name, value in values.items():
            torch.testing.assert_close(getattr(found.layers[layer], name).double(), value, rtol=1e-4, atol=1e-6)


def test_stacked_experts_have_all_their_units():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=UNITS,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=1,
        max_position_embeddings=32,
        pad_token_id=0,
        initializer_range=0.3,
    )
    model = variationalize(MixtralForCausalLM(config), eve=EVEConfig(prior="standard")).eval()
    found = inspected(model, batch_size=3)
    assert [layer.units for layer in found.layers.values()] == [3 * UNITS] * 2
    assert_same(found, inspected(model, batch_size=1))
    out = model(torch.tensor([data()[0]]), num_posterior_samples=0, labels=torch.tensor([data()[0]]))
    alone = inspected(model, data()[:1])
    assert float(alone.layers[0].kl.sum()) == pytest.approx(float(out.kl_per_layer[0].detach()), rel=1e-4)


# ---- The band ----


def test_shares_of_the_band():
    model = gpt()
    energy = {number: layer.mean_energy for number, layer in inspected(model).layers.items()}
    bands = {number: Band(values.roll(1), 0.5, 2.0) for number, values in energy.items() if number != 1}
    found = inspected(model, band=bands)
    assert found.layers[1].shares is None and "inside" not in found.layers[1].summary()
    under = inside = 0
    for number in bands:
        ratio = energy[number] / energy[number].roll(1)
        shares = found.layers[number].shares
        assert float(shares.under) == pytest.approx(float((ratio < 0.5).float().mean()))
        assert float(shares.over) == pytest.approx(float((ratio > 2.0).float().mean()))
        under, inside = under + float(shares.under) / 2, inside + float(shares.inside) / 2
    assert found.shares()["under"] == pytest.approx(under) and found.shares()["inside"] == pytest.approx(inside)
    assert sum(found.shares().values()) == pytest.approx(1.0) and inspected(model).shares() == {}
    one = inspected(model, band=Band.homogeneous(0.1, UNITS, 0.5, 2.0))
    assert all(layer.band.units == UNITS for layer in one.layers.values())


# ---- Units in trouble ----


def kill(model, layer: int, unit: int) -> None:
    """The posterior of a unit becomes its prior, whatever the input is."""
    mlp = model.model.layers[layer].mlp
    with torch.no_grad():
        mlp.up_proj.weight[unit] = 0.0
        mlp.eve.scale_up[unit] = 0.0
        mlp.eve.log_scale[unit] = 0.0


def test_a_planted_dead_and_an_exploding_unit_are_named():
    model = gpt(prior="standard")
    assert not inspected(model).dead and not inspected(model).exploding
    kill(model, 1, 4)
    kill(model, 2, 0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] *= 100.0
        model.model.layers[0].mlp.eve.log_scale[3] = 5.0  # far over the clip
        model.model.layers[0].mlp.eve.scale_up[3] = 0.0
    found = inspected(model, num_posterior_samples=1)
    assert found.dead == {1: [4], 2: [0]}
    assert found.exploding == {0: [3], 1: [7]}
    table = found.table()
    assert "dead in layer 1: 4" in table and "exploding in layer 0: 3" in table
    assert found.layers[1].summary()["dead"] == 1 and found.layers[1].summary()["exploding"] == 1


def test_under_a_centered_prior_a_unit_that_passes_its_mean_on_is_not_dead():
    model = gpt(prior="centered", prior_scale=0.5, initial_scale=0.5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.eve.log_scale.fill_(math.log(0.5))
            layer.mlp.eve.scale_up.zero_()
            layer.mlp.eve.prior_log_scale.fill_(math.log(0.5))
        model.model.layers[1].mlp.up_proj.weight[6] = 0.0
    found = inspected(model)
    assert found.layers[1].active_fraction == 0.0
    assert found.dead == {1: [6]}


def test_what_explodes_is_measured_at_the_band_where_there_is_one():
    energy = torch.tensor([1.0, 2.0, 150.0, 250.0, 3.0])
    kl, scale, nothing = torch.ones(5), torch.ones(5), torch.zeros(5)
    ceiling = 7.4

    def exploding(band, **changed):
        given = {"kl": kl, "scale": scale, "energy": energy, "unwatched": nothing, **changed}
        return troubled(**given, ceiling=ceiling, band=band)[1].nonzero().flatten().tolist()

    assert exploding(None) == []  # the median is 3
    assert exploding(Band.homogeneous(1.0, 5, 0.5, 2.0)) == [2, 3]
    assert exploding(Band.homogeneous(1.0, 5, 0.5, 200.0)) == [3]  # a wider band wins
    assert exploding(None, energy=torch.tensor([1.0, 1.0, 1.0, 101.0, 99.0])) == [3]
    # The units that are dead say nothing of what is usual.
    quiet = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
    assert exploding(None, kl=quiet, energy=torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0])) == []
    assert exploding(None, kl=nothing, energy=energy) == []
    assert exploding(None, scale=torch.tensor([1.0, 6.0, 6.7, 7.4, 1.0])) == [2, 3]
    assert exploding(None, kl=torch.tensor([1.0, math.nan, 1.0, 1.0, math.inf])) == [1, 4]


# ---- Written and read ----


def test_saved_and_loaded(tmp_path):
    band = Band.heterogeneous(0.1, UNITS, 0.5, 2.0, spread=3.0, order="shuffled", seed=1)
    model = gpt(attention=dirichlet(), prior="standard")
    kill(model, 1, 4)
    found = inspected(model, band=band, name="ours", data_name="made up")
    path = found.save(tmp_path / "found.json")
    again = Diagnostics.load(path)
    assert again.to_dict() == found.to_dict() and again.table() == found.table()
    for number, layer in found.layers.items():
        assert torch.equal(layer.kl, again.layers[number].kl) and torch.equal(layer.dead, again.layers[number].dead)
        assert torch.equal(layer.band.targets, again.layers[number].band.targets)
    assert again.model == "ours" and again.data == "made up" and again.dead == {1: [4]}
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"]


def test_numbers_that_are_not_finite_are_json_too():
    values = torch.tensor([1.0, math.nan, math.inf])
    layer = LayerDiagnostics(values, values, values, values, values > 2, ~values.isfinite())
    read = LayerDiagnostics.from_dict(json.loads(json.dumps(layer.to_dict(), allow_nan=False)))
    assert read.kl[0] == 1.0 and bool(read.kl[1:].isnan().all()) and read.exploding.tolist() == [False, True, True]


# ---- Bad input ----


def test_a_model_without_a_posterior():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no variational neurons.*variationalize"):
        inspected(stock())
    twin = VariationalGPTForCausalLM(VariationalGPTConfig(**{**gpt().config.to_dict(), "eve": None}))
    with pytest.raises(ValueError, match="no variational neurons"):
        inspected(twin)


def test_bands_that_do_not_fit():
    model = gpt()
    with pytest.raises(ValueError, match=rf"The band is of 5 units, and layer 0 has {UNITS}"):
        inspected(model, band=Band.homogeneous(1.0, 5, 0.5, 2.0))
    with pytest.raises(ValueError, match=r"band for layer 9, and the layers with variational neurons are 0, 1, 2"):
        inspected(model, band={9: Band.homogeneous(1.0, UNITS, 0.5, 2.0)})
    config = VariationalGPTConfig(**{**model.config.to_dict(), "eve": None, "attention": dirichlet()})
    with pytest.raises(ValueError, match="this model has none"):
        inspected(VariationalGPTForCausalLM(config), band=Band.homogeneous(1.0, UNITS, 0.5, 2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_posterior_samples": -1}, "num_posterior_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"unit_weights": {9: UnitWeights(kl=torch.ones(UNITS))}}, "weights for layer 9"),
        ({"unit_weights": {0: UnitWeights(kl=torch.ones(3))}}, rf"shape \[3\], and layer 0 has {UNITS} units"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        inspected(gpt(), **options)


def test_data_without_a_token_to_predict():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        inspected(gpt(), [[1], [2]])


def test_a_unit_that_is_not_finite_explodes():
    model = gpt(scale="unit")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[1] = math.nan
    assert inspected(model).exploding == {2: [1]}
