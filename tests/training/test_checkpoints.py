import os
import signal
from pathlib import Path

import pytest
import torch
from training_models import assert_same_bits, make_arguments, make_blocks, make_model, weights
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_variational import VariationalTrainer
from hf_variational.training.checkpoints import last_complete_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def make_trainer(folder, callbacks=None, seed=0, model=None, **fields):
    return VariationalTrainer(
        make_model(seed=seed) if model is None else model,
        make_arguments(folder, **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, **fields}),
        train_dataset=make_blocks(rows=20),
        eval_dataset=make_blocks(rows=5, seed=2),
        callbacks=callbacks,
    )


def trained(folder, **fields):
    trainer = make_trainer(folder, **fields)
    trainer.train()
    return trainer


class At(TrainerCallback):
    """Does something once, at an event of a step (counted from 1)."""

    def __init__(self, event, step, action):
        self.event, self.step, self.action = event, step, action

    def __getattribute__(self, name):
        if name.startswith("on_") and name == object.__getattribute__(self, "event"):
            return self._fire
        return object.__getattribute__(self, name)

    def _fire(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.action is not None:
            action, self.action = self.action, None
            action()


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def keyboard_interrupt():
    raise KeyboardInterrupt


# ---- resuming ----


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, step):
    # 20 rows in batches of 2 x 3: step 4 is the last of the first epoch, step 2 lies in its middle
    schedule = {"kl_schedule": "cyclical", "kl_cycles": 3, "kl_weight": 0.05}
    whole = trained(tmp_path / "whole", **SAVING, **schedule)
    resumed = make_trainer(tmp_path / "resumed", seed=5, **SAVING, **schedule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert_same_bits(weights(whole.model), weights(resumed.model))
    late = [entry for entry in whole.state.log_history if "loss" in entry and entry["step"] > step]
    again = [entry for entry in resumed.state.log_history if "loss" in entry and entry["step"] > step]
    assert late == again and len(late) == 6 - step


def test_evaluating_changes_no_weight_and_no_resumed_run(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 1}
    plain = trained(tmp_path / "plain", **SAVING)
    evaluated = trained(tmp_path / "evaluated", **SAVING, **often)
    assert_same_bits(weights(plain.model), weights(evaluated.model))
    resumed = make_trainer(tmp_path / "evaluated", seed=5, **SAVING, **often)
    resumed.train(resume_from_checkpoint=str(tmp_path / "evaluated" / "checkpoint-2"))
    assert_same_bits(weights(plain.model), weights(resumed.model))


def test_resuming_takes_the_newest_checkpoint_that_is_complete(tmp_path):
    whole = trained(tmp_path, **SAVING)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4')
    (tmp_path / "checkpoint-10").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = make_trainer(tmp_path, seed=5, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights(whole.model), weights(resumed.model))


def test_nothing_to_resume_is_said(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_cut_off_weights_are_named(tmp_path):
    trained(tmp_path, **SAVING)
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint-4 cannot be read .*cut off"):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# ---- Ctrl-C ----


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_log"])
def test_ctrl_c_saves_a_checkpoint_that_resumes_with_the_same_bits(tmp_path, event):
    whole = trained(tmp_path / "whole", max_steps=6)
    stopped = make_trainer(tmp_path / "stopped", callbacks=[At(event, 2, ctrl_c)], max_steps=6)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-3 is saved"):
        stopped.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert stopped.state.global_step == 3
    assert os.listdir(tmp_path / "stopped") == ["checkpoint-3"]
    resumed = make_trainer(tmp_path / "stopped", seed=5, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights(whole.model), weights(resumed.model))


def test_ctrl_c_in_an_evaluation_does_not_wait_for_its_end(tmp_path):
    whole = trained(tmp_path / "whole", max_steps=6)
    evaluating = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1, "max_steps": 6}
    steps = []

    class Stop(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            steps.append(state.global_step)
            if len(steps) == 2:
                ctrl_c()

    stopped = make_trainer(tmp_path / "stopped", callbacks=[Stop()], **evaluating)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert steps == [3, 3]
    resumed = make_trainer(tmp_path / "stopped", seed=5, **evaluating)
    resumed.train(resume_from_checkpoint=True)
    assert_same_bits(weights(whole.model), weights(resumed.model))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        ctrl_c()
        ctrl_c()

    trainer = make_trainer(tmp_path, callbacks=[At("on_pre_optimizer_step", 2, twice)])
    with pytest.raises(KeyboardInterrupt, match="without saving"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_without_a_signal_saves_too(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[At("on_substep_end", 2, keyboard_interrupt)], max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = make_trainer(tmp_path, seed=5, max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_half_an_optimizer_step_is_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[At("on_optimizer_step", 2, keyboard_interrupt)], **SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_an_interrupt_before_the_first_step_leaves_nothing(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[At("on_train_begin", 0, keyboard_interrupt)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert os.listdir(tmp_path) == []


def test_training_off_the_main_thread_leaves_signals_alone(tmp_path):
    import threading

    trainer = make_trainer(tmp_path, max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 1


# ---- a loss that is not finite ----


def poison(trainer, pattern, value=float("nan")):
    def action():
        with torch.no_grad():
            names = [name for name, _ in trainer.model.named_parameters() if pattern in name]
            assert names, pattern
            for name in names:
                trainer.model.get_parameter(name).fill_(value)

    return action


def assert_last_checkpoint_is_good(folder, step):
    assert last_complete_checkpoint(folder) == str(Path(folder) / f"checkpoint-{step}")
    model = AutoModelForCausalLM.from_pretrained(last_complete_checkpoint(folder))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def stopping_trainer(folder, pattern, value=float("nan"), at_once=True, model=None, **fields):
    trainer = make_trainer(folder, model=model, **{**SAVING, **fields})
    trainer._checks_every_step = at_once
    trainer.add_callback(At("on_step_begin", 3, poison(trainer, pattern, value)))
    return trainer


@pytest.mark.parametrize("at_once", [True, False], ids=["every step", "at the log"])
def test_a_loss_that_is_not_finite_stops_and_names_the_layer(tmp_path, at_once):
    trainer = stopping_trainer(tmp_path, "layers.1.mlp.eve.log_scale", at_once=at_once)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    message = str(error.value)
    assert "not finite at step 4" in message
    assert "posterior of layer 1 is not finite" in message and "layer 0" not in message
    assert "Parameters that are not finite: model.layers.1.mlp.eve." in message
    assert f"last good checkpoint is {tmp_path / 'checkpoint-2'}" in message
    assert_last_checkpoint_is_good(tmp_path, 2)
    if at_once:
        assert "layer 1 is not finite (its scale)" in message
        # the other weights were not touched by the bad gradient
        clean = [p for n, p in trainer.model.named_parameters() if "layers.1.mlp.eve.log_scale" not in n]
        assert all(parameter.isfinite().all() for parameter in clean)


def test_a_mean_that_is_not_finite_is_found_where_the_kl_does_not_show_it(tmp_path):
    from hf_variational import EVEConfig

    model = make_model(eve=EVEConfig(prior="centered", scale="unit"))
    trainer = stopping_trainer(tmp_path, "layers.1.mlp.up_proj", model=model)
    with pytest.raises(FloatingPointError, match=r"posterior of layer 1 is not finite \(its mean\)"):
        trainer.train()
    assert_last_checkpoint_is_good(tmp_path, 2)


def test_a_likelihood_that_is_not_finite_is_told_from_a_posterior(tmp_path):
    trainer = stopping_trainer(tmp_path, "lm_head", float("inf"))
    with pytest.raises(FloatingPointError, match="Every layer's posterior is finite; the likelihood is not.*lm_head"):
        trainer.train()
    assert_last_checkpoint_is_good(tmp_path, 2)


def test_a_twin_stops_too(tmp_path):
    trainer = stopping_trainer(tmp_path, "layers.0.mlp.up_proj", model=make_model(eve=None))
    with pytest.raises(FloatingPointError, match="step 4.*model.layers.0.mlp.up_proj"):
        trainer.train()


@pytest.mark.parametrize("logging", [3, 100])
def test_a_checkpoint_between_two_logs_stays_good(tmp_path, logging):
    # steps 4 and 6 would save; nothing is logged before them
    trainer = stopping_trainer(tmp_path, "layers.0.mlp.eve.log_scale", at_once=False, logging_steps=logging)
    message = "not finite at step 4.*layer 0 is not finite, nor are those above it, 1.*checkpoint-2"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert_last_checkpoint_is_good(tmp_path, 2)


def test_the_end_of_a_run_that_never_logs_is_looked_at(tmp_path):
    never = {"logging_strategy": "no", "save_strategy": "no"}
    trainer = stopping_trainer(tmp_path, "layers.0.mlp.eve.log_scale", at_once=False, **never)
    with pytest.raises(FloatingPointError, match="not finite at step 4.*No checkpoint had been saved"):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = trained(tmp_path, **SAVING)
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    poison(trainer, "layers.0.mlp.eve")()
    with pytest.raises(FloatingPointError, match="after step 6 are not finite.*not saved.*checkpoint-6"):
        trainer.save_model()
    assert (tmp_path / "model.safetensors").read_bytes() == before
