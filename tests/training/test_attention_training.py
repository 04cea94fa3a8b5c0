"""Training with variational attention: what is logged, a model with nothing else variational, and its recipes."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_models import VOCABULARY, assert_same_bits, make_arguments, make_blocks, make_model, weights
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_variational import EVEConfig, VariationalAttentionConfig, VariationalTrainer, variationalize
from hf_variational.modeling.posterior import AttentionStatistics, PosteriorStatistics
from hf_variational.training import program
from hf_variational.training.recipe import recipe_from_dict
from hf_variational.training.recorder import StepRecorder
from hf_variational.training.statistics import StatisticsMean

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
KINDS = ("gaussian", "approximate_dirichlet", "dirichlet")


def attention_model(kind="dirichlet", eve=None, settings=None, **fields):
    return make_model(eve=eve, attention=VariationalAttentionConfig(kind, **(settings or {})), **fields)


def train(folder, model, blocks=None, **fields):
    trainer = VariationalTrainer(
        model, make_arguments(folder, **fields), train_dataset=make_blocks() if blocks is None else blocks
    )
    trainer.train()
    return trainer


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def batch_of(blocks):
    return {name: torch.tensor(blocks[name]) for name in ("input_ids", "labels")}


# ---- what is logged in training ----


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_the_attention_is_the_models(tmp_path, kind, accumulation):
    # the learning rate is 0 and the pass without noise, so one pass over the step's rows is the reference
    model, blocks = attention_model(kind), make_blocks(rows=8, masked=False)
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = train(tmp_path, model, blocks, learning_rate=0.0, max_steps=1, train_posterior_samples=0, **sizes)
    with torch.no_grad():
        expected = model(**batch_of(blocks), num_posterior_samples=0, output_posteriors=True)
    (entry,) = logs(trainer)
    layers = expected.attention_posteriors.values()
    value = "scale" if kind == "gaussian" else "concentration"
    assert entry["kl"] == pytest.approx(expected.kl.item(), rel=1e-4)
    assert entry["attention_kl"] == pytest.approx(entry["kl"], rel=1e-4)
    for layer in (0, 1):
        assert entry[f"kl/layer_{layer}"] == pytest.approx(expected.kl_per_layer[layer].item(), rel=1e-4)
        assert entry[f"attention_{value}/layer_{layer}"] == pytest.approx(0.1 if kind == "gaussian" else 100, rel=1e-4)
    for name, attribute in (
        (f"attention_{value}", value),
        ("attention_entropy", "entropy"),
        ("effective_keys", "effective_keys"),
    ):
        mean = torch.stack([getattr(layer, attribute) for layer in layers]).mean().item()
        assert entry[name] == pytest.approx(mean, rel=1e-4), name
    assert 1 < entry["effective_keys"] < 10
    # nothing of units that are deterministic
    assert not {"posterior_scale", "mean_energy", "active_fraction", "attention_kl_share"} & set(entry)


def test_of_units_and_attention_together_each_is_logged(tmp_path):
    model = attention_model(eve=EVEConfig(scale="unit"), variational_layers=[0], attention_layers=[1])
    blocks = make_blocks(rows=8)
    trainer = train(
        tmp_path, model, blocks, learning_rate=0.0, max_steps=1, per_device_train_batch_size=8, kl_weight=0.5
    )
    (entry,) = logs(trainer)
    # a site in each layer, so the KL of a layer is that of its site
    assert entry["attention_kl"] == pytest.approx(entry["kl/layer_1"], rel=1e-4)
    assert entry["attention_kl_share"] == pytest.approx(entry["kl/layer_1"] / entry["kl"], rel=1e-4)
    assert entry["posterior_scale"] == pytest.approx(0.1, rel=1e-4) and entry["active_fraction"] == 1.0
    assert entry["attention_concentration"] == entry["attention_concentration/layer_1"] == pytest.approx(100, rel=1e-4)
    assert "attention_concentration/layer_0" not in entry
    assert entry["loss"] == pytest.approx(entry["nll"] + 0.5 * entry["kl"], rel=1e-5)


def heads(kl, concentration, entropy):
    return AttentionStatistics(
        None,
        kl_per_head=torch.tensor(kl),
        concentration=torch.tensor(concentration),
        entropy=torch.tensor(entropy),
        effective_keys=torch.tensor(entropy).exp(),
    )


def test_recorder_averages_over_micro_batches():
    recorder = StepRecorder()
    recorder.add(1, {"nll": torch.tensor(1.0), "kl": torch.tensor(2.0)}, kl_weight=0.5)
    for micro in (0.0, 2.0):
        units = PosteriorStatistics(None, torch.tensor([1.0, 0.0, 3.0]), torch.ones(3), torch.ones(3))
        recorder.add_statistics(
            {4: units},
            {1: heads([1.0 + micro, 2.0], [10.0, 20.0], [0.0, 0.0]), 3: heads([4.0, 4.0], [1.0] * 2, [0.0] * 2)},
        )
    assert recorder.flush(lambda values: values) == pytest.approx(
        {
            "nll": 1.0,
            "kl": 2.0,
            "kl_weight": 0.5,
            "posterior_scale": 1.0,
            "mean_energy": 1.0,
            "active_fraction": 2 / 3,
            "attention_kl": 12.0,
            "attention_concentration": 8.0,
            "attention_concentration/layer_1": 15.0,
            "attention_concentration/layer_3": 1.0,
            "attention_entropy": 0.0,
            "effective_keys": 1.0,
            "attention_kl_share": 12.0 / 16.0,
        }
    )
    assert recorder.flush(lambda values: values) == {}


def test_statistics_weigh_each_pass_and_stay_on_the_device():
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    mean = StatisticsMean()
    passes = [({0: heads([6.0], [3.0], [0.5])}, 1.0), ({0: heads([2.0], [7.0], [0.1])}, 3.0)]
    with Reads() as reads:
        for layers, weight in passes:
            mean.add(None, layers, weight)
        # as if two processes had seen the same
        summary = mean.summary(2 * mean.sums())
    assert reads.count == 0
    assert summary["attention_kl"].item() == pytest.approx(3.0)
    assert summary["attention_concentration"].item() == pytest.approx(6.0)
    assert summary["attention_entropy"].item() == pytest.approx(0.2)
    # the weights of a pass without targets leave the mean as it is
    mean.add(None, {0: heads([9.0], [9.0], [9.0])}, 0.0)
    assert mean.summary(mean.sums())["attention_kl"].item() == pytest.approx(3.0)


def test_statistics_are_measured_on_logged_steps_alone(tmp_path):
    model = attention_model()
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    trainer = train(tmp_path, model, max_steps=4, logging_steps=2)
    assert ["output_posteriors" in call for call in calls] == [False, True, False, True]
    assert all("attention_concentration" in entry for entry in logs(trainer))


# ---- a model with attention alone ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data_dependent", [False, "query"])
def test_the_posterior_moves_toward_its_prior(tmp_path, kind, data_dependent):
    settings = {"data_dependent": data_dependent, "prior_concentration": 5.0}
    # in rows of one length the KL is that of as many keys in every batch
    blocks = make_blocks(masked=False)
    trainer = train(tmp_path, attention_model(kind, settings=settings), blocks, max_steps=6, kl_weight=0.01)
    first, last = logs(trainer)[0], logs(trainer)[-1]
    assert last["attention_kl"] < first["attention_kl"]
    name = "attention_scale" if kind == "gaussian" else "attention_concentration"
    # from a scale of 0.1 up to 0.5, from a concentration of 100 down to 5
    assert (last[name] > first[name]) == (kind == "gaussian")
    raw = [parameter for name, parameter in trainer.model.named_parameters() if name.endswith(".posterior.raw")]
    assert len(raw) == 2 and all((parameter != 0).all() for parameter in raw)


def test_a_plain_trainer_trains_the_same_objective(tmp_path):
    fields = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 100}
    arguments = TrainingArguments(
        str(tmp_path), save_strategy="no", data_seed=42, use_cpu=True, disable_tqdm=True, report_to="none", **fields
    )
    plain = Trainer(attention_model(), arguments, train_dataset=make_blocks())
    plain.train()
    ours = train(tmp_path, attention_model(), **fields)
    assert_same_bits(weights(plain.model), weights(ours.model))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_leaves_the_weights_as_they_are(tmp_path, kind):
    plain = train(tmp_path, attention_model(kind), max_steps=2)
    checkpointed = train(tmp_path, attention_model(kind), max_steps=2, activation_checkpointing=True)
    assert_same_bits(weights(plain.model), weights(checkpointed.model))


def test_the_weights_do_not_depend_on_the_accumulation(tmp_path):
    blocks, results = make_blocks(rows=8), []
    for parts in (1, 4):
        sizes = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        trainer = train(
            tmp_path, attention_model(), blocks, max_steps=3, train_posterior_samples=0, optim="sgd", **sizes
        )
        results.append(weights(trainer.model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_free_bits_are_for_each_row_of_weights(tmp_path):
    blocks = make_blocks(rows=4)
    model = attention_model(num_hidden_layers=1)
    trainer = train(
        tmp_path,
        model,
        blocks,
        learning_rate=0.0,
        max_steps=1,
        train_posterior_samples=0,
        kl_weight=1.0,
        free_bits=1e3,
    )
    (entry,) = logs(trainer)
    # two heads, both under their allowance
    assert entry["loss"] == pytest.approx(entry["nll"] + 2e3, rel=1e-5) and entry["kl"] < 2e3


@pytest.fixture
def ten_seconds():
    """A sampler that waits for a number that is never accepted would wait for ever."""

    def stop(signum, frame):
        raise TimeoutError("The training hangs.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("ten_seconds")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_named(tmp_path, kind):
    model = attention_model(kind)
    with torch.no_grad():
        model.model.layers[1].self_attn.posterior.raw[0] = math.nan
    value = "scale" if kind == "gaussian" else "concentration"
    named = rf"layer 1 is not finite \(its attention {value}.*: model\.layers\.1\.self_attn\.posterior\.raw"
    with pytest.raises(FloatingPointError, match=named):
        train(tmp_path, model)


def test_a_stock_model_made_variational_trains_too(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout))
    variationalize(model, attention=VariationalAttentionConfig("dirichlet"), layers=[1], kl_weight=0.25)
    trainer = train(tmp_path, model, max_steps=2)
    for entry in logs(trainer):
        assert entry["loss"] == pytest.approx(entry["nll"] + 0.25 * entry["kl"], rel=1e-4)
        assert entry["kl_weight"] == 0.25 and entry["attention_concentration/layer_1"] > 1
    metrics = trainer.evaluate(make_blocks(rows=4, seed=2))
    assert metrics["eval_mutual_information"] > 0
    assert metrics["eval_attention_kl"] == pytest.approx(metrics["eval_kl"], rel=1e-4)


# ---- evaluation ----


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_measures_the_attention_over_all_tokens(tmp_path, kind):
    # rows with other numbers of targets, in batches with other numbers of rows
    model, blocks = attention_model(kind), make_blocks(rows=10)
    trainer = VariationalTrainer(model, make_arguments(tmp_path, per_device_eval_batch_size=4))
    metrics = trainer.evaluate(blocks)
    value = "scale" if kind == "gaussian" else "concentration"
    assert metrics["eval_attention_kl"] == pytest.approx(metrics["eval_kl"], rel=1e-4)
    assert metrics[f"eval_attention_{value}"] == pytest.approx(0.1 if kind == "gaussian" else 100, rel=1e-4)
    assert metrics["eval_mutual_information"] > 0
    with torch.no_grad():
        out = model.eval()(**batch_of(blocks), num_posterior_samples=0, output_posteriors=True)
    # the noise is small beside the rows of weights, so their entropy is near that of the mean
    entropy = torch.stack([layer.entropy for layer in out.attention_posteriors.values()]).mean().item()
    assert metrics["eval_attention_entropy"] == pytest.approx(entropy, rel=0.1)
    assert 1 < metrics["eval_effective_keys"] < 10
    assert not [name for name in metrics if "/layer_" in name]


def test_evaluation_of_the_mean_pass_and_of_deterministic_attention(tmp_path):
    trainer = VariationalTrainer(attention_model(), make_arguments(tmp_path, eval_posterior_samples=0))
    metrics = trainer.evaluate(make_blocks())
    assert metrics["eval_nll"] == metrics["eval_mean_pass_nll"] and metrics["eval_attention_kl"] > 0
    metrics = VariationalTrainer(make_model(), make_arguments(tmp_path)).evaluate(make_blocks())
    assert not [name for name in metrics if "attention" in name or "effective_keys" in name]


def test_predictions_are_logits_alone(tmp_path):
    shapes = []

    def remember(prediction):
        shapes.append(prediction.predictions.shape)
        return {}

    trainer = VariationalTrainer(attention_model(), make_arguments(tmp_path), compute_metrics=remember)
    trainer.evaluate(make_blocks(rows=6))
    assert shapes == [(6, 10, VOCABULARY)]


# ---- a run from a recipe ----


def run_recipe(folder, text, kind="dirichlet", **changes):
    model = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    content = {
        "model": {**model, "eve": None, "attention": {"kind": kind}, "attention_layers": [1], **changes},
        "data": {"train": str(text), "validation_fraction": 0.2, "block_size": 16},
        "tokenizer": {"vocab_size": 270},
        "arguments": {
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 2,
            "eval_posterior_samples": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    return recipe_from_dict(content)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on the mat. the dog sat on the log. " * 40)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_to_the_same_bits_and_its_model_loads(tmp_path, text, kind):
    whole = program.run(run_recipe(tmp_path / "whole", text, kind))
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = program.run(run_recipe(tmp_path / "resumed", text, kind), resume=checkpoint)
    assert_same_bits(weights(whole.model), weights(resumed.model))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert_same_bits(weights(whole.model), weights(model))
    assert model.config.attention.kind == kind and model.variational_layers == [1]
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    own = sum(p.numel() for name, p in model.named_parameters() if ".self_attn.posterior." in name)
    assert metrics["facts"]["variational_parameters"] == own > 0
    assert metrics["facts"]["eval_posterior_samples"] == 2
    assert metrics["evaluation"]["eval_mutual_information"] > 0
    with pytest.raises(ValueError, match="model.attention="):
        program.run(
            run_recipe(tmp_path / "whole", text, "gaussian" if kind != "gaussian" else "dirichlet"), resume=True
        )


def test_a_run_starts_from_a_pretrained_llama(tmp_path, text):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    llama.save_pretrained(tmp_path / "llama")
    recipe = run_recipe(tmp_path / "run", text, pretrained=str(tmp_path / "llama"))
    recipe.arguments.update(max_steps=1, learning_rate=0.0)
    trainer = program.run(recipe)
    for layer in (0, 1):
        ours, stock = (model.model.layers[layer].self_attn.q_proj.weight for model in (trainer.model, llama))
        assert torch.equal(ours, stock)
    (entry,) = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    assert entry["eval_attention_concentration"] == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"knid": "dirichlet"}, "`attention` has the unknown key 'knid': did you mean 'kind'"),
        ({"prior_concentraton": 3}, "did you mean 'prior_concentration'"),
        ({"kind": 3}, "`kind` is str, got 3"),
        ({"data_dependent": 1}, "`data_dependent` is bool or str, got 1"),
        ({"initial_raw": "low"}, "`initial_raw` is float or null, got 'low'"),
        ("dirichlet", "`attention` is a mapping, or null for deterministic attention, got 'dirichlet'"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, text, attention, message):
    with pytest.raises(ValueError, match=message):
        run_recipe(tmp_path, text, attention=attention)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": {"kind": "beta"}}, "kind='beta' is unknown"),
        ({"attention": {"prior_concentration": 0.0}}, "prior_concentration must be a positive"),
        ({"attention_layers": [7]}, "attention_layers names 7"),
        ({"attention_layers": []}, "use attention=None"),
    ],
)
def test_bad_values_are_the_configurations_to_refuse(tmp_path, text, changes, message):
    with pytest.raises(ValueError, match=message):
        program.run(run_recipe(tmp_path / "run", text, **changes))


def test_attention_layers_is_a_list(tmp_path, text):
    with pytest.raises(ValueError, match="`attention_layers` is list or null, got 1"):
        run_recipe(tmp_path, text, attention_layers=1)
