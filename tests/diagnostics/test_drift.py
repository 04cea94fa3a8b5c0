"""Drift: nothing between a model and itself, what was changed between two, and what moved most."""

import math

import pytest
import torch
from inspected_models import LAYERS, UNITS, data, dirichlet, gpt
from scipy.stats import spearmanr

from hf_variational.diagnostics import Diagnostics, diagnose, drift


def inspected(model, rows=None, samples=0):
    return diagnose(model, data() if rows is None else rows, num_posterior_samples=samples, progress=False)


@pytest.fixture(scope="module")
def before():
    return inspected(gpt(attention=dirichlet(), mean="gain"))


@pytest.fixture(scope="module")
def after():
    """Unit 3 of layer 1 has ten times the gain and unit 5 of layer 0 a third of the scale."""
    model = gpt(attention=dirichlet(), mean="gain")
    with torch.no_grad():
        model.model.layers[1].mlp.eve.gain[3] *= 10
        model.model.layers[0].mlp.eve.log_scale[5] -= math.log(3)
    return inspected(model)


def test_of_a_model_with_itself(before):
    found = drift(before, before)
    assert list(found.layers) == list(found.heads) == list(range(LAYERS))
    for layer in (*found.layers.values(), *found.heads.values()):
        assert all(not change.any() for change in layer.changes.values())
        assert all(value == pytest.approx(1.0) for value in layer.rank_correlation.values())
    assert found.movers() == [] and "rank correlation" in found.table()


def test_samples_of_one_seed_are_common_to_both_sides():
    model = gpt()
    found = drift(*(inspected(model, samples=3) for _ in range(2)))
    assert not any(change.any() for layer in found.layers.values() for change in layer.changes.values())


def test_what_was_changed_is_what_moved(before, after):
    found = drift(before, after)
    first = found.movers("log_mean_energy", 3)[0]
    assert (first.layer, first.unit) == (1, 3) and first.change == pytest.approx(math.log(100.0), rel=1e-4)
    assert first.after == pytest.approx(100.0 * first.before, rel=1e-4)
    assert found.layers[1].changes["log_mean_energy"][[0, 1, 2, 4]].abs().max() == 0.0
    (moved,) = [mover for mover in found.movers("log_scale", 100) if mover.layer == 0]
    assert moved.unit == 5 and moved.change == pytest.approx(-math.log(3.0), rel=1e-4)
    kl = after.layers[1].kl - before.layers[1].kl
    torch.testing.assert_close(found.layers[1].changes["kl"], kl)
    assert found.layers[0].changes["kl"].nonzero().flatten().tolist() == [5]


def test_summaries_equal_those_by_hand(before, after):
    found = drift(before, after).layers[2].summary()["log_mean_energy"]
    change = (after.layers[2].mean_energy.double().log() - before.layers[2].mean_energy.double().log()).float()
    assert found["mean"] == pytest.approx(float(change.mean()), rel=1e-4)
    assert found["q25"] == pytest.approx(float(change.double().quantile(0.25)), rel=1e-3)
    rank = spearmanr(before.layers[2].mean_energy.numpy(), after.layers[2].mean_energy.numpy()).statistic
    assert found["rank_correlation"] == pytest.approx(rank)


def test_between_two_texts():
    model = gpt(attention=dirichlet())
    one, other = inspected(model), inspected(model, data(seed=5))
    found = drift(one, other)
    assert found.heads[0].changes.keys() == {"kl", "log_concentration", "entropy"}
    entropy = other.heads[1].values["entropy"] - one.heads[1].values["entropy"]
    torch.testing.assert_close(found.heads[1].changes["entropy"], entropy)
    back = drift(other, one)
    assert torch.equal(found.layers[2].changes["kl"], -back.layers[2].changes["kl"])


def test_a_mean_energy_of_zero_has_a_change():
    model = gpt(prior="standard")
    one = inspected(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[2] = 0.0
    found = drift(one, inspected(model))
    change = float(found.layers[0].changes["log_mean_energy"][2])
    assert change == pytest.approx(math.log(1e-12) - math.log(float(one.layers[0].mean_energy[2])), rel=1e-4)


def test_ranks_of_what_is_the_same_everywhere_are_not_numbers():
    found = drift(*(inspected(gpt(scale="scalar")) for _ in range(2)))
    assert math.isnan(found.layers[0].rank_correlation["log_scale"]) and "–" in found.table()
    assert found.to_dict()["layers"]["0"]["rank_correlation"]["log_scale"] is None


def test_the_dictionary_has_every_unit(before, after, tmp_path):
    loaded = [Diagnostics.load(one.save(tmp_path / f"{place}.json")) for place, one in enumerate((before, after))]
    values = drift(*loaded).to_dict()
    assert values == drift(before, after).to_dict() and values["before"]["tokens"] == before.tokens
    assert len(values["layers"]["1"]["changes"]["kl"]) == UNITS and len(values["heads"]["1"]["changes"]["kl"]) == 2


def test_what_cannot_be_compared(before):
    with pytest.raises(ValueError, match=r"not the same variational attention.*none"):
        drift(before, inspected(gpt(mean="gain")))
    with pytest.raises(ValueError, match="num_posterior_samples=0 and the other 2"):
        drift(before, inspected(gpt(attention=dirichlet(), mean="gain"), samples=2))
    with pytest.raises(ValueError, match="quantity='energy' is unknown"):
        drift(before, before).movers("energy")
