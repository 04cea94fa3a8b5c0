import json
import math

import pytest
import torch
from training_models import (
    LENGTH,
    VOCABULARY,
    assert_same_bits,
    make_arguments,
    make_blocks,
    make_model,
    weights,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_variational import EVEConfig, VariationalTrainer, evaluate_language_model, posterior_noise
from hf_variational.training.callbacks import own_noise
from hf_variational.training.checkpoints import refuse_mixed_dtypes
from hf_variational.training.recorder import StepRecorder

UNIT_STATISTICS = ("posterior_scale", "mean_energy", "active_fraction")


def train(folder, model=None, blocks=None, **fields):
    trainer = VariationalTrainer(
        make_model() if model is None else model,
        make_arguments(folder, **fields),
        train_dataset=make_blocks() if blocks is None else blocks,
        data_collator=default_data_collator,
    )
    trainer.train()
    return trainer


def logs(trainer, key="loss"):
    return [entry for entry in trainer.state.log_history if key in entry]


def make_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def record_calls(model):
    """What the trainer hands to the model's forward pass, call by call."""
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


# ---- what is logged in training ----


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_logged_nll_and_kl_are_those_of_the_whole_accumulated_batch(tmp_path, accumulation):
    # the learning rate is 0, so the weights stay and one pass over each step's rows is the reference
    model, blocks = make_model(), make_blocks(rows=8)
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = train(
        tmp_path, model, blocks, learning_rate=0.0, max_steps=2, train_posterior_samples=0, kl_weight=0.01, **sizes
    )
    batch = {name: torch.tensor(blocks[name]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        expected = model(**batch, num_posterior_samples=0)
    for entry in logs(trainer):
        assert entry["nll"] == pytest.approx(expected.nll.item(), rel=1e-5)
        assert entry["kl"] == pytest.approx(expected.kl.item(), rel=1e-5)
        for layer in (0, 1):
            assert entry[f"kl/layer_{layer}"] == pytest.approx(expected.kl_per_layer[layer].item(), rel=1e-5)
        assert entry["loss"] == pytest.approx(entry["nll"] + 0.01 * entry["kl"], rel=1e-5)
        assert entry["kl_weight"] == 0.01


def test_logs_are_averages_since_the_last_log(tmp_path):
    each = logs(train(tmp_path, max_steps=6, kl_schedule="linear_warmup", kl_warmup_steps=4))
    mean = logs(train(tmp_path, max_steps=6, kl_schedule="linear_warmup", kl_warmup_steps=4, logging_steps=3))
    assert [entry["kl_weight"] for entry in each] == pytest.approx([0, 0.00025, 0.0005, 0.00075, 0.001, 0.001])
    assert len(mean) == 2
    for index, entry in enumerate(mean):
        for name in ("loss", "nll", "kl", "kl/layer_1", "kl_weight"):
            average = sum(other[name] for other in each[3 * index : 3 * index + 3]) / 3
            assert entry[name] == pytest.approx(average, rel=1e-4), name


def test_unit_statistics_are_measured_on_logged_steps_alone(tmp_path):
    model = make_model()
    calls = record_calls(model)
    trainer = train(tmp_path, model, max_steps=6, logging_steps=3, gradient_accumulation_steps=2)
    asked = ["output_posteriors" in call for call in calls]
    assert asked == [False] * 4 + [True] * 2 + [False] * 4 + [True] * 2
    assert all(name in entry for entry in logs(trainer) for name in UNIT_STATISTICS)


def test_unit_statistics_are_the_models(tmp_path):
    model, blocks = make_model(), make_blocks(rows=8)
    trainer = train(tmp_path, model, blocks, learning_rate=0.0, max_steps=1, per_device_train_batch_size=8)
    batch = {name: torch.tensor(blocks[name]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        posteriors = model.train()(**batch, num_posterior_samples=0, output_posteriors=True).posteriors
    (entry,) = logs(trainer)
    # the first layer's mean does not depend on the noise
    assert entry["posterior_scale"] == pytest.approx(0.1, rel=1e-5)
    assert 0 < entry["mean_energy"] < 10 * posteriors[0].mean_energy.mean().item()
    assert entry["active_fraction"] == pytest.approx(1.0)


def test_recorder_averages_statistics_over_micro_batches():
    from hf_variational.modeling.posterior import PosteriorStatistics

    recorder = StepRecorder()
    for micro, kl in enumerate((0.0, 4e-4)):
        recorder.add(1, {"nll": torch.tensor(1.0 + micro), "kl": torch.tensor(2.0)}, kl_weight=0.5)
        units = torch.tensor([kl, 0.0, 1.0])
        layer = PosteriorStatistics(None, units, torch.full((3,), 0.1 + micro), torch.tensor([0.0, 3.0, 6.0]))
        recorder.add_statistics({0: layer, 2: layer})
    recorder.add(2, {"nll": torch.tensor(6.0), "kl": torch.tensor(0.0)}, kl_weight=0.25)
    assert recorder.flush(lambda values: values) == pytest.approx(
        {
            "nll": 4.5,
            "kl": 2.0,
            "kl_weight": 0.375,
            "posterior_scale": 0.6,
            "mean_energy": 3.0,
            "active_fraction": 2 / 3,
        }
    )
    assert recorder.flush(lambda values: values) == {}


def test_recorder_stays_bounded_and_loses_nothing():
    recorder = StepRecorder()
    for step in range(1, 1001):
        recorder.add(step, {"nll": torch.tensor(float(step))})
        if recorder.full:
            recorder.fold()
        assert len(recorder._rows) <= 256
    assert recorder.flush(lambda values: values) == {"nll": 500.5}


def test_a_step_reads_no_more_on_the_host_than_a_stock_model(tmp_path):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def reads(trainer_class, model):
        class Counting(trainer_class):
            def training_step(self, *args, **kwargs):
                with Reads() as reads:
                    loss = super().training_step(*args, **kwargs)
                counts.append(reads.count)
                return loss

        counts = []
        arguments = make_arguments(tmp_path, max_steps=6, logging_steps=3)
        trainer = Counting(model, arguments, train_dataset=make_blocks())
        # as on an accelerator
        trainer._checks_every_step = False
        trainer.train()
        return counts

    # transformers looks for packed sequences in the position ids once a forward pass
    stock = reads(Trainer, make_llama())
    assert stock == [stock[0]] * 6
    assert max(reads(VariationalTrainer, make_model())) <= stock[0]


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_other_logging_strategies(tmp_path, strategy):
    trainer = train(tmp_path, max_steps=-1, num_train_epochs=2, logging_strategy=strategy)
    entries = logs(trainer)
    assert len(entries) == (2 if strategy == "epoch" else 0)
    assert all(name in entry for entry in entries for name in UNIT_STATISTICS)


def test_everything_logged_is_a_plain_number(tmp_path):
    seen = []

    class Spy(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = VariationalTrainer(
        make_model(),
        make_arguments(tmp_path, eval_strategy="steps", eval_steps=2),
        train_dataset=make_blocks(),
        eval_dataset=make_blocks(seed=2),
        callbacks=[Spy()],
    )
    trainer.train()
    assert {type(value) for entry in seen for value in entry.values()} <= {int, float}
    json.dumps(seen, allow_nan=False)


# ---- what the model is handed ----


def test_kl_weight_is_a_tensor_without_axes_on_its_schedule(tmp_path):
    model = make_model()
    calls = record_calls(model)
    train(tmp_path, model, max_steps=4, kl_schedule="cyclical", kl_cycles=2, kl_cycle_ratio=1.0, kl_weight=0.2)
    weight = [call["kl_weight"] for call in calls]
    assert all(torch.is_tensor(value) and value.ndim == 0 for value in weight)
    assert [value.item() for value in weight] == pytest.approx([0.0, 0.1, 0.0, 0.1])
    assert all("free_bits" not in call and "num_posterior_samples" not in call for call in calls)


def test_free_bits_and_sample_counts_are_handed_on(tmp_path):
    model = make_model()
    calls = record_calls(model)
    train(tmp_path, model, max_steps=1, free_bits=0.5, train_posterior_samples=3)
    (call,) = calls
    assert call["free_bits"] == 0.5 and call["num_posterior_samples"] == 3
    # the configuration's weight is the default
    assert call["kl_weight"].item() == pytest.approx(model.config.kl_weight)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_weights_do_not_depend_on_the_accumulation(tmp_path, accumulation):
    blocks, results = make_blocks(rows=8), []
    for parts in (1, accumulation):
        sizes = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        trainer = train(tmp_path, make_model(), blocks, max_steps=3, train_posterior_samples=0, optim="sgd", **sizes)
        results.append(weights(trainer.model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_a_plain_trainer_trains_the_same_objective(tmp_path):
    plain = Trainer(
        make_model(),
        TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            logging_steps=100,
            data_seed=42,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=make_blocks(),
    )
    plain.train()
    # a step that is logged computes the statistics apart from the fused pass, which rounds differently
    ours = train(tmp_path, max_steps=3, logging_steps=100)
    assert_same_bits(weights(plain.model), weights(ours.model))


def test_twin_and_stock_models_train_and_evaluate_with_the_same_trainer(tmp_path):
    for model in (make_model(eve=None), make_llama()):
        trainer = train(tmp_path, model)
        for entry in logs(trainer):
            assert entry["nll"] == pytest.approx(entry["loss"], rel=1e-5)
            assert not any(name.startswith(("kl", "posterior")) for name in entry)
        metrics = trainer.evaluate(make_blocks(seed=2))
        assert metrics["eval_nll"] == metrics["eval_mean_pass_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
        assert "eval_kl" not in metrics and "eval_mutual_information" not in metrics


def test_mixed_precision_keeps_the_log_scales_in_float32(tmp_path):
    trainer = train(tmp_path, bf16=True, max_steps=3)
    assert all(math.isfinite(entry["kl"]) and entry["posterior_scale"] > 0 for entry in logs(trainer))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.evaluate(make_blocks(seed=2))["eval_mutual_information"] > 0


def test_adapters_train_with_the_kl_of_the_model_below(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = train(tmp_path, model, kl_weight=0.25)
    for entry in logs(trainer):
        assert entry["loss"] == pytest.approx(entry["nll"] + 0.25 * entry["kl"], rel=1e-5)
        assert entry["kl/layer_1"] > 0
    assert trainer.evaluate(make_blocks(seed=2))["eval_mutual_information"] > 0


# ---- evaluation ----


def by_call():
    """Noise that depends on the layer and on how often it was asked."""
    asked = {}

    def source(request):
        asked[request.layer] = asked.get(request.layer, 0) + 1
        generator = torch.Generator().manual_seed(1000 * asked[request.layer] + request.layer)
        return torch.randn(request.shape, generator=generator)

    return source


def test_evaluation_is_the_streamed_evaluation_of_both_passes(tmp_path):
    model, blocks = make_model(), make_blocks(rows=10)
    arguments = make_arguments(tmp_path, per_device_eval_batch_size=4, kl_weight=0.5)
    trainer = VariationalTrainer(model, arguments, eval_dataset=blocks, data_collator=default_data_collator)
    with posterior_noise(by_call()):
        metrics = trainer.evaluate()
    with posterior_noise(by_call()):
        expected = evaluate_language_model(model, blocks, num_posterior_samples=3, batch_size=4, progress=False)
    for kind, prefix in (("samples", "eval_"), ("mean_pass", "eval_mean_pass_")):
        for name, value in expected[kind].items():
            assert metrics[prefix + name] == pytest.approx(value, rel=1e-6, abs=1e-9), (kind, name)
    assert metrics["eval_mutual_information"] > 0
    for name in ("top1_flip_rate", "conditional_variance", "token_variance", "expected_entropy", "cvar_nll"):
        assert f"eval_{name}" in metrics

    # the KL and the objective are per target token, whatever the batches
    batch = {name: torch.tensor(blocks[name]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        whole = model.eval()(**batch)
    assert metrics["eval_mean_pass_nll"] == pytest.approx(whole.nll.item(), rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(whole.kl.item(), rel=0.05)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"] + 0.5 * metrics["eval_kl"], rel=0.02)


def test_evaluation_repeats_itself_and_leaves_the_generator_alone(tmp_path):
    trainer = VariationalTrainer(make_model(), make_arguments(tmp_path), eval_dataset=make_blocks())
    before = torch.get_rng_state()
    first = trainer.evaluate()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    second = trainer.evaluate()
    timing = ("_runtime", "_per_second", "_time")
    assert {k: v for k, v in first.items() if not k.endswith(timing)} == {
        k: v for k, v in second.items() if not k.endswith(timing)
    }
    assert not trainer.model.training


def test_evaluation_noise_differs_between_ranks_and_seeds():
    draws = []
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        with own_noise(seed, rank, "evaluation", torch.device("cpu")):
            draws.append(torch.rand(4).tolist())
    assert len({tuple(draw) for draw in draws}) == 3


def test_evaluation_without_samples_is_the_mean_pass(tmp_path):
    trainer = VariationalTrainer(make_model(), make_arguments(tmp_path, eval_posterior_samples=0))
    metrics = trainer.evaluate(make_blocks())
    assert metrics["eval_nll"] == metrics["eval_mean_pass_nll"]
    assert metrics["eval_kl"] > 0 and "eval_mutual_information" not in metrics


def test_evaluation_never_holds_the_whole_set(tmp_path):
    trainer = VariationalTrainer(
        make_model(), make_arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=make_blocks(rows=40)
    )
    rows = []
    trainer.model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    trainer.evaluate()
    assert max(rows) <= 2 * 3


def test_predict_and_compute_metrics_still_work(tmp_path):
    shapes = []

    def count(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"answer": 42.0}

    trainer = VariationalTrainer(make_model(), make_arguments(tmp_path), compute_metrics=count)
    result = trainer.predict(make_blocks(rows=6))
    assert shapes == [((6, LENGTH, VOCABULARY), (6, LENGTH))]
    assert result.metrics["test_answer"] == 42.0 and "test_mutual_information" in result.metrics


def test_best_checkpoint_is_chosen_by_a_metric_of_ours(tmp_path):
    fields = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best", "metric_for_best_model": "nll"}
    trainer = VariationalTrainer(
        make_model(),
        make_arguments(tmp_path, greater_is_better=False, max_steps=6, **fields),
        train_dataset=make_blocks(),
        eval_dataset=make_blocks(),
    )
    trainer.train()
    best = min(entry["eval_nll"] for entry in logs(trainer, "eval_nll"))
    assert trainer.state.best_metric == best


# ---- reporting ----


def test_tensorboard_gets_the_variational_metrics(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = VariationalTrainer(
        make_model(),
        make_arguments(tmp_path, report_to="tensorboard", eval_strategy="steps", eval_steps=4),
        train_dataset=make_blocks(),
        eval_dataset=make_blocks(),
    )
    trainer.train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    names = ("nll", "kl", "kl/layer_0", "kl/layer_1", "kl_weight", *UNIT_STATISTICS)
    assert {f"train/{name}" for name in names} <= tags
    assert {"eval/nll", "eval/mutual_information", "eval/mean_pass_nll", "eval/cvar_nll"} <= tags
    written = [event.value for event in board.Scalars("train/kl")]
    assert written == pytest.approx([entry["kl"] for entry in logs(trainer)], rel=1e-6)


# ---- refusals ----


def test_other_losses_and_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func.*KL"):
        VariationalTrainer(make_model(), make_arguments(tmp_path), compute_loss_func=lambda *args, **kwargs: None)
    with pytest.raises(TypeError, match="VariationalTrainingArguments, got TrainingArguments"):
        VariationalTrainer(make_model(), TrainingArguments(str(tmp_path), use_cpu=True))


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant"):
        train(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})


def test_checkpointing_leaves_the_weights_as_they_are(tmp_path):
    plain = train(tmp_path, max_steps=3)
    checkpointed = train(tmp_path, max_steps=3, activation_checkpointing=True)
    assert_same_bits(weights(plain.model), weights(checkpointed.model))


def test_fsdp2_needs_one_dtype_of_what_it_trains():
    model = make_model(eve=EVEConfig(scale="unit"))
    refuse_mixed_dtypes(model)
    for name, parameter in model.named_parameters():
        if ".eve." not in name:
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(ValueError, match="one dtype.*bfloat16.*float32.*Load the model in float32"):
        refuse_mixed_dtypes(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".eve." in name)
    refuse_mixed_dtypes(model)
