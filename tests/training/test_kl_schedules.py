from itertools import pairwise

import pytest
from training_models import make_arguments

from hf_variational.training.schedules import constant, cyclical, kl_factor, linear_warmup


def test_constant_is_full_at_every_step():
    assert [constant(step) for step in (0, 1, 10**6)] == [1.0, 1.0, 1.0]


def test_linear_warmup_rises_from_zero_to_the_full_weight():
    assert [linear_warmup(step, 4) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert linear_warmup(0, 0) == 1.0


def test_cyclical_rises_in_each_cycle():
    # 12 steps, 3 cycles of 4, each rising over its first half
    cycle = [0.0, 0.5, 1.0, 1.0]
    assert [cyclical(step, 12, 3, 0.5) for step in range(12)] == cycle * 3
    assert cyclical(12, 12, 3, 0.5) == 1.0
    assert cyclical(0, 0, 3, 0.5) == 1.0


def test_cycles_that_do_not_divide_the_steps_stay_in_range():
    factors = [cyclical(step, 1000, 7, 0.3) for step in range(1000)]
    assert min(factors) == 0.0 and max(factors) == 1.0
    assert sum(a > b for a, b in pairwise(factors)) == 6


def test_dispatch_prefers_warmup_steps_to_the_ratio():
    assert kl_factor("linear_warmup", 5, 100, warmup_ratio=0.1) == 0.5
    assert kl_factor("linear_warmup", 5, 100, warmup_steps=20, warmup_ratio=0.1) == 0.25
    assert kl_factor("constant", 0, 100) == 1.0
    with pytest.raises(ValueError, match="'sigmoid'.*constant, linear_warmup, cyclical"):
        kl_factor("sigmoid", 0, 100)


def test_arguments_hand_their_fields_to_the_schedule(tmp_path):
    args = make_arguments(tmp_path, kl_schedule="cyclical", kl_cycles=2, kl_cycle_ratio=1.0)
    assert [args.kl_factor(step, 8) for step in range(9)] == [0, 0.25, 0.5, 0.75, 0, 0.25, 0.5, 0.75, 1.0]
    args = make_arguments(tmp_path, kl_schedule="linear_warmup", kl_warmup_steps=2)
    assert [args.kl_factor(step, 8) for step in range(3)] == [0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_schedule", "linear"),
        ("kl_weight", -1e-4),
        ("kl_weight", float("nan")),
        ("kl_warmup_ratio", 1.5),
        ("kl_warmup_steps", 2.5),
        ("kl_cycles", 0),
        ("kl_cycle_ratio", 0.0),
        ("free_bits", -0.1),
        ("eval_posterior_samples", -1),
        ("eval_posterior_samples", 2.5),
        ("train_posterior_samples", True),
        ("cvar_fraction", 0.0),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_arguments_refuse_bad_values_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=name) as error:
        make_arguments(tmp_path, **{name: value})
    assert str(value) in str(error.value)


def test_processes_without_an_accelerator_train_together(tmp_path, monkeypatch):
    import torch
    from transformers import TrainingArguments

    # what is asked for is seen before any process group is made
    seen = []
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: seen.append(self.use_cpu))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    make_arguments(tmp_path, use_cpu=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    make_arguments(tmp_path, use_cpu=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    make_arguments(tmp_path, use_cpu=False)
    assert seen == [False, True, False]


def test_defaults_that_differ_from_transformers(tmp_path):
    args = make_arguments(tmp_path, seed=7)
    assert args.logging_nan_inf_filter is False
    assert args.data_seed == 7
    assert make_arguments(tmp_path, seed=7, data_seed=3).data_seed == 3
