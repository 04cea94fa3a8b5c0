"""A small language model from starts that have gone wrong: what homeostasis and the thermostat make of them.

The data are all rows of counting tokens, which the model learns nearly to their entropy, so that a loss that is a few
per cent worse shows. The band is where the units of a healthy run of this model end, 5 times up and down.
"""

import pytest
import torch
from training_models import make_arguments, make_blocks, make_model

from hf_variational import EVEConfig, VariationalTrainer

STEPS = 500
TARGET = 1.5
BAND = {"target": TARGET, "low_factor": 0.2, "high_factor": 5.0}
RANGE = {"kl_min": 0.3, "kl_max": 0.6}
# share of the target, and sigma
STARTS = {"collapsed": (1e-4, 1.0), "exploding": (100.0, 0.1)}


def started(start):
    """A model whose units all have the mean energy and the scale of a start."""
    share, scale = STARTS[start]
    model = make_model(
        eve=EVEConfig(mean="gain", scale="unit", prior="standard", initial_scale=scale),
        initializer_range=0.3,
        kl_weight=1e-4,
    )
    blocks = make_blocks(rows=128, masked=False)
    batch = {name: torch.tensor(blocks[name]) for name in ("input_ids", "labels")}
    for layer in (0, 1):  # the second reads what the first has become
        with torch.no_grad():
            energy = model(**batch, num_posterior_samples=0, output_posteriors=True).posteriors[layer].mean_energy
            model.model.layers[layer].mlp.eve.gain.mul_((share * TARGET / energy).sqrt())
    return model


def trained(folder, model, regime, learning_rate=3e-3):
    trainer = VariationalTrainer(
        model,
        make_arguments(
            folder,
            max_steps=STEPS,
            learning_rate=learning_rate,
            per_device_train_batch_size=16,
            logging_steps=50,
            eval_posterior_samples=2,
            regime=regime,
        ),
        train_dataset=make_blocks(rows=512, masked=False),
        eval_dataset=make_blocks(rows=128, seed=5, masked=False),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("start", STARTS)
def test_homeostasis_brings_the_units_into_their_band_and_costs_no_loss(tmp_path, start):
    without = trained(tmp_path / "without", started(start), {"band": BAND})
    with_it = trained(tmp_path / "with", started(start), {"band": BAND, "homeostasis": {}})
    first = next(entry for entry in with_it.state.log_history if "regime/inside" in entry)
    assert first["step"] == 50 and first["regime/inside"] < 0.95, "the start is a bad one"
    before, after = without.evaluate(), with_it.evaluate()
    assert after["eval_regime_inside"] >= 0.95 and before["eval_regime_inside"] < 0.8
    assert after["eval_nll"] <= 1.02 * before["eval_nll"]
    assert after["eval_mean_pass_nll"] <= 1.02 * before["eval_mean_pass_nll"]


def kl_inside(folder, thermostat, **options):
    """Share of the units whose KL is in the thermostat's range: on other data at the end, and at each log."""
    initial_scale = options.pop("initial_scale")
    model = make_model(
        eve=EVEConfig(mean="gain", scale="unit", prior="centered", initial_scale=initial_scale),
        initializer_range=0.3,
        kl_weight=1e-2,
    )
    trainer = trained(folder, model, {"thermostat": RANGE} if thermostat else {}, **options)
    blocks = make_blocks(rows=128, seed=5, masked=False)
    batch = {key: torch.tensor(blocks[key]) for key in ("input_ids", "labels")}
    with torch.no_grad():
        layers = model.eval()(**batch, num_posterior_samples=1, output_posteriors=True).posteriors.values()
    kl = torch.cat([layer.kl_per_unit for layer in layers])
    logs = [entry["regime/kl_inside"] for entry in trainer.state.log_history if "regime/kl_inside" in entry]
    return ((kl >= RANGE["kl_min"]) & (kl <= RANGE["kl_max"])).float().mean(), logs


def test_the_thermostat_holds_the_kl_of_the_units(tmp_path):
    """From the middle of the range, which the units leave without it: the likelihood wants less noise than the KL."""
    without, _ = kl_inside(tmp_path / "without", False, initial_scale=0.42)
    with_it, logs = kl_inside(tmp_path / "with", True, initial_scale=0.42)
    assert with_it >= 0.95 and min(logs) >= 0.95
    assert without < 0.5


def test_the_thermostat_fetches_the_kl_of_the_units(tmp_path):
    """From far above the range; how fast a scale can move is the learning rate's to say."""
    options = {"initial_scale": 0.15, "learning_rate": 1e-2}
    without, _ = kl_inside(tmp_path / "without", False, **options)
    with_it, logs = kl_inside(tmp_path / "with", True, **options)
    assert logs[0] == 0 and with_it >= 0.95 and min(logs[-5:]) >= 0.95
    assert without < 0.5
