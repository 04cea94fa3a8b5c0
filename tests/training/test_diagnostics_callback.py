"""Histograms over units in the trainer's logs: in a TensorBoard event file, and as trackio takes them."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_models import make_arguments, make_blocks, make_model
from transformers import default_data_collator
from transformers.integrations import TrackioCallback

from hf_variational import VariationalTrainer, posterior_noise
from hf_variational.training import diagnostics_callback

NAMES = ("unit_kl_log10", "unit_scale_log10", "unit_energy_log10")


def trained(folder, model=None, callbacks=None, report_to="none", **fields):
    trainer = VariationalTrainer(
        model or make_model(),
        make_arguments(folder, report_to=report_to, **fields),
        train_dataset=make_blocks(),
        data_collator=default_data_collator,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def histograms(folder):
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"histograms": 0})
    events.Reload()
    return {tag: events.Histograms(tag) for tag in events.Tags()["histograms"]}


def test_histograms_arrive_in_an_event_file(tmp_path):
    trained(tmp_path, report_to="tensorboard")
    found = histograms(tmp_path)
    assert set(found) == {f"{name}/layer_{layer}" for name in NAMES for layer in (0, 1)}
    for events in found.values():
        # Four steps are logged, and histograms are 100 steps apart.
        assert [event.step for event in events] == [1]
        assert events[0].histogram_value.num == 24


def test_how_far_apart_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnostics_callback, "INTERVAL", 3)
    trained(tmp_path, report_to="tensorboard", max_steps=8)
    found = histograms(tmp_path)
    assert [event.step for event in found["unit_kl_log10/layer_0"]] == [1, 4, 7]


def test_the_values_are_those_of_the_units_over_the_whole_step(tmp_path):
    """Two micro-batches with other numbers of targets: of the layer below all noise nothing depends on samples."""
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    written = {}
    trainer = VariationalTrainer(
        model,
        make_arguments(tmp_path, report_to="tensorboard", gradient_accumulation_steps=2, max_steps=1),
        train_dataset=make_blocks(8),
        data_collator=default_data_collator,
    )
    callback = trainer._diagnostics
    callback._write = lambda writer, found, step: written.update(found)
    with posterior_noise(lambda request: torch.zeros(request.shape)):
        trainer.train()
    model.load_state_dict(before)
    blocks = make_blocks(8)
    ids, labels = torch.tensor(blocks["input_ids"]), torch.tensor(blocks["labels"])
    with posterior_noise(lambda request: torch.zeros(request.shape)):
        out = model.eval()(ids, labels=labels, num_posterior_samples=1, output_posteriors=True)
    for layer, statistics in out.posteriors.items():
        pairs = zip(NAMES, (statistics.kl_per_unit, statistics.scale, statistics.mean_energy), strict=True)
        for name, values in pairs:
            np.testing.assert_allclose(written[f"{name}/layer_{layer}"], values.log10().numpy(), rtol=1e-4, atol=1e-5)


def test_trackio_gets_the_same(tmp_path, monkeypatch):
    logged = []

    class Histogram:
        def __init__(self, sequence):
            self.values = np.asarray(sequence)

    context = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
    double = SimpleNamespace(
        Histogram=Histogram,
        log=lambda metrics, step=None: logged.append((metrics, step)),
        init=lambda **options: None,
        finish=lambda: None,
        config={},
        context_vars=context,
    )
    monkeypatch.setitem(sys.modules, "trackio", double)

    class Trackio(TrackioCallback):
        def __init__(self):
            self._trackio, self._initialized = double, True
            self._space_id = self._static_space_id = None

    trained(tmp_path, callbacks=[Trackio()])
    (found,) = [metrics for metrics, _ in logged if "unit_kl_log10/layer_0" in metrics]
    assert set(found) == {f"{name}/layer_{layer}" for name in NAMES for layer in (0, 1)} | {"train/global_step"}
    assert found["train/global_step"] == 1 and len(found["unit_scale_log10/layer_1"].values) == 24
    # sigma starts at 0.1
    assert found["unit_scale_log10/layer_1"].values == pytest.approx(np.full(24, -1.0), abs=1e-3)


def test_without_a_writer_nothing_is_gathered(tmp_path, monkeypatch):
    def refuse(self, posteriors):
        raise AssertionError("nobody reads this")

    monkeypatch.setattr("hf_variational.training.diagnostics_callback.UnitSums.add", refuse)
    trained(tmp_path)


def test_a_deterministic_model_has_none(tmp_path):
    trained(tmp_path, make_model(eve=None), report_to="tensorboard")
    assert histograms(tmp_path) == {}


def test_what_is_not_finite_or_zero_is_no_obstacle(tmp_path):
    trainer = trained(tmp_path, report_to="tensorboard", max_steps=1)
    callback, written = trainer._diagnostics, {}
    callback._write = lambda writer, found, step: written.update(found)
    values = torch.tensor([0.0, math.nan, 10.0])
    statistics = SimpleNamespace(kl_per_unit=values, scale=values, mean_energy=values, tokens=torch.tensor(2.0))
    trainer.state.global_step = 1000
    callback.add({0: statistics})
    callback.on_log(trainer.args, trainer.state, trainer.control)
    assert written["unit_kl_log10/layer_0"] == pytest.approx([-12.0, 1.0])
