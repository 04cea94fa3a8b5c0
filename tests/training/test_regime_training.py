"""Regime control inside the trainer: when it acts, on whom, what is logged and saved, and which checkpoint is best."""

import logging
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from training_models import (
    VOCABULARY,
    assert_same_bits,
    make_arguments,
    make_blocks,
    make_model,
    weights,
)
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from hf_variational import EVEConfig, RegimeControl, VariationalTrainer, posterior_noise, variationalize
from hf_variational.diagnostics.neurons import neurons_of
from hf_variational.training.regime import RegimeControlCallback, rules
from hf_variational.training.regime.callback import STATE_FILE

BAND = {"target": 0.02, "low_factor": 0.5, "high_factor": 2.0}
EVERYTHING = {
    "interval": 2,
    "band": {**BAND, "spread": 2.0, "order": "shuffled"},
    "penalty": {"weight": 0.5, "ramp_steps": 3},
    "projection": {"interval": 4},
    "homeostasis": {},
    "thermostat": {"kl_min": 0.5, "kl_max": 1.5},
    "scale_guard": {"floor": 0.05, "ceiling": 0.5, "kick": 0.1},
    "calibration": {},
}


def gain_model(seed=0, **fields):
    eve = {"mean": "gain", "scale": "unit", "initial_scale": 0.3, **fields.pop("eve", {})}
    model = make_model(seed=seed, eve=EVEConfig(**eve), **{"initializer_range": 0.2, **fields})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for here in neurons_of(model).values():
            for eve in here:
                if hasattr(eve, "gain"):
                    eve.gain.mul_(torch.randn(eve.units, generator=generator).exp())
    return model


def make_trainer(folder, model=None, regime=None, rows=16, **fields):
    return VariationalTrainer(
        gain_model() if model is None else model,
        make_arguments(folder, regime=regime, **fields),
        train_dataset=make_blocks(rows=rows),
        eval_dataset=make_blocks(rows=6, seed=2),
        data_collator=default_data_collator,
    )


def trained(folder, *args, **fields):
    trainer = make_trainer(folder, *args, **fields)
    trainer.train()
    return trainer


def logs(trainer, key="loss"):
    return [entry for entry in trainer.state.log_history if key in entry]


@torch.no_grad()
def measured(model, blocks, layer=0):
    batch = {name: torch.tensor(blocks[name]) for name in ("input_ids", "labels")}
    return model(**batch, num_posterior_samples=0, output_posteriors=True).posteriors[layer]


def gain_of(model, layer=0):
    return model.model.layers[layer].mlp.eve.gain.detach().clone()


# ---- The steps, with a learning rate of 0 by hand ----


STILL = {"learning_rate": 0.0, "max_steps": 1, "per_device_train_batch_size": 16}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_homeostasis_is_the_step_by_hand_and_leaves_those_inside(tmp_path, accumulation):
    model = gain_model(variational_layers=[0])
    before, energy = gain_of(model), measured(model, make_blocks()).mean_energy
    sizes = {"per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation}
    regime = {"interval": 1, "band": BAND, "homeostasis": {"eta": 0.1, "eta_max": 0.3, "max_factor": 1.5}}
    trained(tmp_path, model, regime, **{**STILL, **sizes})
    outside = (energy < 0.01) | (energy > 0.04)
    assert 0 < outside.float().mean() < 1, "the case must hold units of both kinds"
    eta = 0.1 + 0.2 * outside.float().mean()
    factor = torch.where(outside, (0.02 / energy).pow(eta / 2).clamp(1 / 1.5, 1.5), 1.0)
    torch.testing.assert_close(gain_of(model), before * factor, rtol=1e-5, atol=0)
    assert torch.equal(gain_of(model)[~outside], before[~outside])


def test_projection_puts_units_inside_at_its_own_interval(tmp_path):
    model = gain_model(variational_layers=[0])
    before = measured(model, make_blocks()).mean_energy
    regime = {"interval": 1, "band": BAND, "projection": {"interval": 2, "max_factor": 100.0}}
    trained(tmp_path / "one", model, regime, **STILL)
    torch.testing.assert_close(measured(model, make_blocks()).mean_energy, before)
    trained(tmp_path / "two", model, regime, **{**STILL, "max_steps": 2})
    after = measured(model, make_blocks()).mean_energy
    assert ((after >= 0.01) & (after <= 0.04)).all()
    inside = (before >= 0.01) & (before <= 0.04)
    torch.testing.assert_close(after[inside], before[inside])


def test_the_scale_guard_moves_scales_by_hand(tmp_path):
    model = gain_model(variational_layers=[0])
    with torch.no_grad():
        log_scale = model.model.layers[0].mlp.eve.log_scale
        log_scale.copy_(torch.linspace(math.log(0.01), math.log(3.0), 24))
        before = log_scale.clone()
    guard = {"floor": 0.05, "ceiling": 1.0, "max_shift": 10.0}
    trained(tmp_path, model, {"interval": 1, "scale_guard": guard}, **STILL)
    expected = before.clamp(math.log(0.05), 0.0)
    torch.testing.assert_close(model.model.layers[0].mlp.eve.log_scale.detach(), expected, rtol=1e-5, atol=1e-5)


def test_the_weights_that_a_step_is_given_are_the_rules_of_what_was_measured(tmp_path):
    model = gain_model(variational_layers=[0])
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    regime = {
        "interval": 2,
        "band": BAND,
        "penalty": {"weight": 0.5, "low_weight": 2.0},
        "thermostat": {"kl_min": 0.5, "kl_max": 0.6, "rate": 0.2, "gain": 0.3},
    }
    trainer = trained(tmp_path, model, regime, **{**STILL, "max_steps": 4, "train_posterior_samples": 0})
    assert ["output_posteriors" in call for call in calls] == [True] * 4, "each step is logged"
    first, _, third, fourth = (call["unit_weights"][0] for call in calls)
    assert (first.kl == 1).all() and (first.energy == 0).all() and first.constant == 0
    statistics = measured(model, make_blocks())
    limits = rules.Limits(*(torch.full((24,), value) for value in (0.01, 0.04, 0.02)))
    value, slope = rules.band_penalty(statistics.mean_energy, limits, 1.0, 0.5, relative=True)
    kl = statistics.kl_per_unit
    _, step = rules.thermostat_step(torch.zeros(24), kl, kl, 0.5, 0.6, 0.2, 0.3, 100.0, 1.0)
    for weights_ in (third, fourth):
        torch.testing.assert_close(weights_.energy, slope)
        torch.testing.assert_close(weights_.kl, step.exp())
        torch.testing.assert_close(weights_.constant, (value - slope * statistics.mean_energy).sum())
    first, _, third, _ = logs(trainer)
    assert third["regime/band_penalty"] == pytest.approx(value.sum().item(), rel=1e-5)
    assert third["loss"] - third["nll"] - 1e-3 * (step.exp() * statistics.kl_per_unit).sum().item() == pytest.approx(
        value.sum().item(), rel=1e-3
    )


def test_the_share_of_an_autoregressive_prior_comes_to_what_is_asked(tmp_path):
    eve = {"prior": "autoregressive", "learn_autoregressive_coefficient": True}
    model = gain_model(eve=eve, kl_weight=0.1)
    regime = {"interval": 1, "autoregressive": {"share": 0.02, "max_share": 0.3, "rate": 0.5}}
    found = logs(trained(tmp_path, model, regime, max_steps=40))
    shares = [entry["regime/autoregressive_share"] for entry in found]
    assert shares[0] > 0.3 and all(share <= 0.3 for share in shares[2:])
    assert shares[-1] == pytest.approx(0.02, rel=0.5)
    assert found[-1]["regime/autoregressive_weight"] < 1


def test_calibration_moves_the_band_and_then_freezes_it(tmp_path):
    model = gain_model(variational_layers=[0])
    with torch.no_grad():
        model.model.layers[0].mlp.eve.gain.mul_(30.0)
    regime = {"interval": 1, "band": {**BAND, "spread": 3.0}, "calibration": {"steps": 30, "rate": 2.0}, "decay": 0.0}
    trainer = trained(tmp_path, model, regime, **{**STILL, "max_steps": 60})
    factors = [entry["regime/band_factor"] for entry in logs(trainer)]
    assert factors[28] > factors[0] > 1
    assert all(after / before <= math.exp(0.1) + 1e-6 for before, after in pairwise(factors))
    assert len(set(factors[30:])) == 1
    limits = trainer._regime.limits()
    torch.testing.assert_close(limits.target[-1] / limits.target[0], torch.tensor(9.0))


# ---- What is measured, logged and evaluated ----


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_shares_are_those_of_the_whole_accumulated_batch(tmp_path, accumulation):
    model = gain_model()
    sizes = {"per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trained(
        tmp_path, model, {"interval": 1, "band": BAND}, **{**STILL, **sizes, "train_posterior_samples": 0}
    )
    energy = torch.cat([measured(model, make_blocks(), layer).mean_energy for layer in (0, 1)])
    torch.testing.assert_close(trainer._regime.controller.means.energy, energy)
    (entry,) = logs(trainer)
    assert entry["regime/under"] == pytest.approx((energy < 0.01).float().mean().item())
    assert entry["regime/over"] == pytest.approx((energy > 0.04).float().mean().item())
    assert entry["regime/under"] + entry["regime/inside"] + entry["regime/over"] == pytest.approx(1.0)


def test_an_evaluation_has_the_shares_of_its_data(tmp_path):
    model, blocks = gain_model(), make_blocks(rows=6, seed=2)
    trainer = make_trainer(tmp_path, model, {"band": BAND}, per_device_eval_batch_size=4, eval_posterior_samples=0)
    metrics = trainer.evaluate()
    energy = torch.cat([measured(model, blocks, layer).mean_energy for layer in (0, 1)])
    assert metrics["eval_regime_under"] == pytest.approx((energy < 0.01).float().mean().item())
    assert metrics["eval_regime_over"] == pytest.approx((energy > 0.04).float().mean().item())
    assert "eval_regime_inside" not in make_trainer(tmp_path, model).evaluate()


def test_only_measured_steps_are_measured_and_logs_do_not_notice(tmp_path):
    model = gain_model()
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    plain = trained(tmp_path / "plain", gain_model(), max_steps=6, logging_steps=3)
    trainer = trained(tmp_path / "watched", model, {"interval": 2, "band": BAND}, max_steps=6, logging_steps=3)
    assert ["output_posteriors" in call for call in calls] == [False, True, True, True, False, True]
    assert not any("unit_weights" in call for call in calls)
    for watched, entry in zip(logs(trainer), logs(plain), strict=True):
        for name in ("loss", "nll", "kl", "posterior_scale", "mean_energy", "active_fraction"):
            assert watched[name] == entry[name], name
    assert_same_bits(weights(trainer.model), weights(plain.model))


def test_a_unit_of_zero_is_named_once_and_left_alone(tmp_path, caplog):
    model = gain_model()
    with torch.no_grad():
        for layer, unit in ((0, 3), (1, 7), (1, 20)):
            model.model.layers[layer].mlp.eve.gain[unit] = 0.0
    regime = {"interval": 1, "band": BAND, "homeostasis": {}}
    root = logging.getLogger("transformers")
    root.addHandler(caplog.handler)
    try:
        trained(tmp_path, model, regime, **{**STILL, "max_steps": 3})
    finally:
        root.removeHandler(caplog.handler)
    found = [record.message for record in caplog.records if "exactly 0" in record.message]
    assert len(found) == 1 and "3 units" in found[0] and "layer 0: 3; layer 1: 7, 20" in found[0]
    assert gain_of(model, 1)[7] == 0 and torch.isfinite(gain_of(model, 1)).all()


# ---- Saving and resuming ----


@pytest.mark.parametrize("step", [3, 4, 6])
def test_resuming_ends_in_the_same_bits(tmp_path, step):
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    options |= {"kl_weight": 0.05, "rows": 20, "per_device_train_batch_size": 3}
    whole = trained(tmp_path, None, EVERYTHING, **options)
    resumed = make_trainer(tmp_path / "again", None, EVERYTHING, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same_bits(weights(resumed.model), weights(whole.model))
    assert_same_bits(resumed._regime.controller.state_dict(), whole._regime.controller.state_dict())
    for before, after in zip(logs(whole)[step:], logs(resumed)[step:], strict=True):
        for name in before:
            assert before[name] == after[name], name
    # it did something to resume, and to the parameters
    assert logs(whole)[-1]["regime/rescaled"] > 0 and logs(whole)[-1]["regime/kl_log_weight"] != 0


def test_a_checkpoint_has_the_state_in_a_file_of_its_own_and_the_weights_as_ever(tmp_path):
    trained(tmp_path, None, EVERYTHING, save_strategy="steps", save_steps=2)
    state = load_file(tmp_path / "checkpoint-4" / STATE_FILE)
    assert state["energy"].shape == (48,) and int(state["step"]) == 4
    kept = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(kept) <= set(gain_model().state_dict())


def test_resuming_what_had_no_regime_control_is_refused(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match=rf"has no {STATE_FILE}"):
        make_trainer(tmp_path, None, EVERYTHING, max_steps=6).train(resume_from_checkpoint=True)


def test_two_trainings_of_one_trainer_start_afresh(tmp_path):
    trainer = make_trainer(tmp_path, None, EVERYTHING)
    trainer.train()
    first = trainer._regime
    trainer.train()
    assert trainer._regime is not first and trainer._regime.controller.measurements == 2
    assert sum(isinstance(one, RegimeControlCallback) for one in trainer.callback_handler.callbacks) == 1


# ---- Models ----


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config)


def peft_gpt2():
    peft = pytest.importorskip("peft")
    from hf_variational import EVEAdapterConfig

    config = EVEAdapterConfig(eve=EVEConfig(mean="gain", prior="centered"), layers="all", task_type="CAUSAL_LM")
    return peft.get_peft_model(gpt2(), config)


def retrofit():
    return variationalize(gpt2(), eve=EVEConfig(mean="linear", prior="centered"), train="posterior")


@pytest.mark.parametrize("make", [retrofit, peft_gpt2])
def test_retrofitted_models_and_adapters_are_steered_too(tmp_path, make):
    model = make()
    regime = {**EVERYTHING, "interval": 1, "projection": None}
    names = set(model.state_dict())
    trainer = trained(tmp_path, model, regime, max_steps=6)
    found = logs(trainer)
    assert found[-1]["regime/rescaled"] > 0 and "eval_regime_inside" in trainer.evaluate()
    assert found[-1]["regime/under"] != found[0]["regime/under"] or found[-1]["regime/over"] != found[0]["regime/over"]
    assert set(model.state_dict()) == names


def test_what_a_control_needs_of_a_model(tmp_path):
    cases = [
        (
            {"homeostasis": {}},
            {"mean": "identity"},
            r"homeostasis rescales .*mean='identity' has nothing .*mean='gain'",
        ),
        ({"projection": {}}, {"mean": "identity"}, r"projection rescales .*mean='linear'"),
        ({"scale_guard": {"kick": 0.1}}, {"scale": "scalar"}, r"scale='scalar' is one number for all of them"),
        ({"scale_guard": {"ceiling": 50.0}}, {}, r"ceiling=50.0 lies outside the scales that the units can have"),
        ({"autoregressive": {}}, {}, r"the prior is 'empirical': set prior='autoregressive'"),
    ]
    for regime, eve, message in cases:
        model = gain_model(eve={"mean": "gain", **eve})
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, model, {"band": BAND, **regime})
    with pytest.raises(ValueError, match="this VariationalGPTForCausalLM has none"):
        make_trainer(tmp_path, make_model(eve=None), {"band": BAND})
    # with nothing to rescale the rest of it works
    trained(tmp_path, gain_model(eve={"mean": "identity"}), {"band": BAND, "penalty": {}}, **STILL)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_rows_of_sharded_parameters_are_not_changed(tmp_path, engine):
    for control in ("projection", "homeostasis", "scale_guard"):
        settings = {"floor": 0.05} if control == "scale_guard" else {}
        trainer = make_trainer(tmp_path, None, {"band": BAND, control: settings})
        setattr(trainer, engine, True)
        with pytest.raises(ValueError, match="train with DDP, or keep to the penalty and the thermostat"):
            trainer._make_regime()
    trainer = make_trainer(tmp_path, None, {"band": BAND, "penalty": {}, "thermostat": {"kl_min": 0.5, "kl_max": 1.5}})
    setattr(trainer, engine, True)
    trainer._make_regime()
    assert trainer._regime is not None


# ---- The best checkpoint ----


def gated(folder, inside, nll, min_inside=0.5, **fields):
    """A training whose evaluations find these numbers."""
    options = {"metric_for_best_model": "nll", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    options |= {"save_steps": 1, "load_best_model_at_end": True, "max_steps": len(nll), "eval_posterior_samples": 0}
    trainer = make_trainer(folder, None, {"band": BAND, "min_inside": min_inside}, **{**options, **fields})
    stock = trainer._evaluation_metrics

    def found(evaluation, prefix):
        step = trainer.state.global_step - 1
        return {**stock(evaluation, prefix), "eval_nll": nll[step], "eval_regime_inside": inside[step]}

    trainer._evaluation_metrics = found
    return trainer


class TestGate:
    def test_the_best_is_chosen_among_those_inside(self, tmp_path):
        trainer = gated(tmp_path, inside=[0.9, 0.4, 0.6, 0.5], nll=[4.0, 1.0, 3.0, 3.5])
        trainer.train()
        assert trainer.state.best_global_step == 3 and trainer.state.best_metric == 3.0
        best = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
        assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in best.items())

    def test_resumes_with_its_best(self, tmp_path):
        inside, nll = [0.9, 0.4, 0.2, 0.5], [2.0, 1.0, 0.5, 3.5]
        gated(tmp_path, inside, nll).train()
        resumed = gated(tmp_path, inside, nll)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.state.best_global_step == 1 and resumed.state.best_metric == 2.0

    def test_a_limit_of_checkpoints_keeps_the_best_that_is_admitted(self, tmp_path):
        trainer = gated(tmp_path, [0.4, 0.9, 0.2, 0.1, 0.3], [5.0, 4.0, 1.0, 2.0, 3.0], save_total_limit=2)
        trainer.train()
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]

    def test_where_none_is_admitted_the_last_is_kept_and_it_says_so(self, tmp_path, caplog):
        trainer = gated(tmp_path, inside=[0.1, 0.4, 0.2], nll=[3.0, 2.0, 1.0])
        root = logging.getLogger("transformers")
        root.addHandler(caplog.handler)
        try:
            trainer.train()
        finally:
            root.removeHandler(caplog.handler)
        (message,) = [record.message for record in caplog.records if "No checkpoint" in record.message]
        assert "min_inside=0.5" in message and "0.400, at step 2" in message
        last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
        assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in last.items())

    def test_several_evaluation_sets_each_have_their_share(self):
        from hf_variational.training.regime.gate import Gate

        gate = Gate(0.5, "eval_far_nll")
        assert gate.admits({"eval_regime_inside": 0.1, "eval_near_nll": 1.0})
        found = {"eval_regime_inside": 0.9, "eval_far_regime_inside": 0.1, "eval_far_nll": 1.0}
        assert not gate.admits(found)

    def test_a_floor_without_a_choice_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"min_inside=0.5 .* set metric_for_best_model='nll'"):
            make_arguments(tmp_path, regime={"band": BAND, "min_inside": 0.5})

    @pytest.mark.parametrize("metric", ["nll", "eval_mean_pass_nll", "perplexity", "expected_calibration_error", "kl"])
    def test_less_of_these_is_better(self, tmp_path, metric):
        assert make_arguments(tmp_path, metric_for_best_model=metric).greater_is_better is False
        assert make_arguments(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True
        assert make_arguments(tmp_path, metric_for_best_model="accuracy").greater_is_better is True


def test_arguments_take_and_give_a_dictionary(tmp_path):
    args = make_arguments(tmp_path, regime='{"band": {"target": 0.5}, "homeostasis": {"eta": 0.2}}')
    assert isinstance(args.regime, RegimeControl) and args.regime.homeostasis.eta == 0.2
    assert args.to_dict()["regime"]["band"]["target"] == 0.5 and '"eta": 0.2' in args.to_json_string()
    with pytest.raises(ValueError, match="unknown key 'thermo'"):
        make_arguments(tmp_path, regime={"thermo": {}})


def test_a_recipe_has_it_too_and_names_a_wrong_key():
    from hf_variational.training import Recipe
    from hf_variational.training.recipe import recipe_from_dict

    content = {"data": {"train": "text"}, "arguments": {"output_dir": "out", "regime": {"band": {"target": 0.5}}}}
    recipe = recipe_from_dict(content)
    assert isinstance(recipe, Recipe) and recipe.arguments["regime"] == {"band": {"target": 0.5}}
    content["arguments"]["regime"]["band"]["target"] = -1.0
    with pytest.raises(ValueError, match=r"section `arguments`, `regime`: target=-1.0"):
        recipe_from_dict(content)
    content["arguments"]["regime"] = {"bands": {}}
    with pytest.raises(ValueError, match=r"unknown key 'bands': did you mean 'band'"):
        recipe_from_dict(content)


def test_noise_is_not_touched(tmp_path):
    """Control draws nothing: with nothing out of the band a run ends in the bits of one without."""
    wide = {"target": 1.0, "low_factor": 0.0, "high_factor": 1e6}
    regime = {"interval": 1, "band": wide, "homeostasis": {}, "projection": {"interval": 1}}
    with posterior_noise(lambda request: torch.randn(request.shape)):
        steered, plain = (trained(tmp_path / str(one), None, one) for one in (regime, None))
    assert_same_bits(weights(steered.model), weights(plain.model))
