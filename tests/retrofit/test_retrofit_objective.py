"""The loss of models whose attention was made variational: what counts as a target, and plain training."""

import math
from functools import partial

import pytest
import torch
import transformers as hf
from families import (
    FAMILIES,
    HEADS,
    LABELS,
    TASKS,
    VOCAB,
    WeightsNoise,
    assert_same_gradients,
    gradients,
    inputs,
    posterior_parameters,
    retrofitted,
    stock,
    targets,
)
from torch.nn import functional as F

from hf_variational import posterior_noise
from hf_variational.modeling.dirichlet import multi_gamma_kl

SAMPLES = 3


def count_and_weights(name: str, given: dict, wanted: dict) -> tuple[int, torch.Tensor | None]:
    """How many targets there are, and which positions carry KL, [batch, length] (`None`: all)."""
    task = FAMILIES[name].task
    labels = next(iter(wanted.values()))
    if task == "next":
        has_target = F.pad(labels[:, 1:] != -100, (0, 1))
        return int(has_target.sum()), has_target * given["attention_mask"]
    if task in ("masked", "tokens"):
        return int((labels != -100).sum()), (labels != -100) * given["attention_mask"]
    return labels.numel(), given.get("attention_mask")


def nll_by_hand(name: str, out, wanted: dict) -> torch.Tensor:
    """Mean over targets of the mean over samples, from `sample_logits`."""
    task, labels, drawn = FAMILIES[name].task, wanted["labels"], out.sample_logits
    labels = labels.unsqueeze(1).expand(-1, SAMPLES, *labels.shape[1:])
    if task == "regression":
        return (drawn.squeeze(-1) - labels).square().mean()
    if task == "multi":
        return F.binary_cross_entropy(torch.sigmoid(drawn), labels)
    if task == "next":
        drawn, labels = drawn[:, :, :-1], labels[:, :, 1:]
    log_p = drawn.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -log_p[labels != -100].mean()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("layers", ["all", [1, 2]], ids=["all", "upper"])
def test_loss_by_hand(name, layers):
    """The stock NLL averaged over samples, and the KL per target from the statistics of the layers."""
    model, given = retrofitted(name, data_dependent="query", layers=layers), inputs(name, padding=3)
    wanted = targets(name, given)
    options = {} if FAMILIES[name].task == "spans" else {"output_sample_logits": True}
    out = model(**given, **wanted, num_posterior_samples=SAMPLES, output_posteriors=True, **options)
    assert list(out.attention_posteriors) == ([0, 1, 2] if layers == "all" else layers)
    count, weights = count_and_weights(name, given, wanted)
    per_layer = []
    for statistics in out.attention_posteriors.values():
        kl = statistics.kl if weights is None else statistics.kl * weights
        per_layer.append(kl.sum() / count)
    torch.testing.assert_close(out.kl_per_layer, torch.stack(per_layer))
    torch.testing.assert_close(out.kl, sum(per_layer))
    torch.testing.assert_close(out.loss, out.nll + 0.1 * out.kl)
    if options:
        torch.testing.assert_close(out.nll, nll_by_hand(name, out, wanted), atol=1e-5, rtol=1e-5)
    other = model(**given, **wanted, num_posterior_samples=0, kl_weight=2.0)
    torch.testing.assert_close(other.loss, other.nll + 2.0 * other.kl)
    free = model(**given, **wanted, num_posterior_samples=0, free_bits=1e3)
    spent = (torch.ones(2, 17) if weights is None else weights).sum() * 1e3 * HEADS * len(per_layer) / count
    torch.testing.assert_close(free.loss, free.nll + 0.1 * spent)


@pytest.mark.parametrize("name", ["bert-tokens", "llama", "gemma2", "gpt2-next"])
def test_kl_from_the_mean_weights(name):
    """From the attention weights that the mean pass answers: KL of Gamma(a m_k) from Gamma(a_p m_k), where m_k > 0."""
    model, given = retrofitted(name, layers=[1]), inputs(name, padding=3)
    wanted = targets(name, given)
    out = model(**given, **wanted, output_attentions=True)
    mean = out.attentions[1].double()
    (raw,) = posterior_parameters(model).values()
    log_a = (6.0 * F.softplus(raw.double()) / math.log(2.0)).log().view(1, HEADS, 1, 1)
    kl = multi_gamma_kl(mean.log() + log_a, mean.log() + math.log(3.0)).where(mean > 1e-30, 0.0).sum((1, 3))
    count, weights = count_and_weights(name, given, wanted)
    torch.testing.assert_close(out.kl.double(), (kl * weights).sum() / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_statistics_are_means_over_what_carries_kl(name):
    model, given = retrofitted(name, layers=[1]), inputs(name, padding=3)
    wanted = targets(name, given)
    out = model(**given, **wanted, num_posterior_samples=SAMPLES, output_posteriors=True)
    statistics = out.attention_posteriors[1]
    count, weights = count_and_weights(name, given, wanted)
    tokens = 2 * 17 if weights is None else weights.sum()
    torch.testing.assert_close(statistics.kl_per_head.sum() * tokens / count, out.kl)
    assert statistics.concentration.shape == (HEADS,) and statistics.scale is None
    assert (statistics.effective_keys >= 1).all() and (statistics.entropy > 0).all()


@pytest.mark.parametrize("name", TASKS)
def test_accumulation_changes_nothing(name):
    """Micro-batches that are told the targets of the whole batch add up to its loss and its gradient, also in the
    heads whose stock loss is a mean whatever it is told.
    """
    model, given = retrofitted(name, data_dependent="query"), inputs(name, batch=4, padding=3)
    wanted = targets(name, given)
    with posterior_noise(WeightsNoise()):
        whole = model(**given, **wanted, num_posterior_samples=SAMPLES)
    count, _ = count_and_weights(name, given, wanted)
    parts = []
    for sequences in ([0], [1, 2, 3]):
        some = {key: value[sequences] for key, value in {**given, **wanted}.items()}
        with posterior_noise(WeightsNoise(sequences)):
            parts.append(model(**some, num_posterior_samples=SAMPLES, num_items_in_batch=torch.tensor(count)))
    for field in ("loss", "nll", "kl", "kl_per_layer"):
        torch.testing.assert_close(parts[0][field] + parts[1][field], whole[field], atol=1e-5, rtol=1e-5)
    assert_same_gradients(gradients(model, parts[0].loss + parts[1].loss), gradients(model, whole.loss), 5e-5)


@pytest.mark.parametrize("name", ["bert-masked", "gpt2-next", "llama"])
def test_micro_batch_without_a_target_costs_nothing(name):
    model, given = retrofitted(name), inputs(name)
    out = model(**given, labels=torch.full((2, 8), -100), num_posterior_samples=2, num_items_in_batch=5)
    assert out.loss == 0 and out.kl == 0
    assert all(grad.eq(0).all() for grad in gradients(model, out.loss).values())


def test_shifted_labels_of_a_language_model():
    model, given = retrofitted("llama"), inputs("llama")
    shifted = F.pad(given["input_ids"][:, 1:], (0, 1), value=-100)
    with posterior_noise(WeightsNoise()):
        expected = model(**given, labels=given["input_ids"], num_posterior_samples=SAMPLES)
        actual = model(**given, labels=given["input_ids"], shift_labels=shifted, num_posterior_samples=SAMPLES)
    assert torch.equal(actual.loss, expected.loss)


# Images have no ids, and the stock GPT-2 classifier looks for padding in them.
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("vit-single", "gpt2-single")])
def test_embeddings_instead_of_ids(name):
    model, given = retrofitted(name), inputs(name)
    wanted = targets(name, given)
    embedded = model.get_input_embeddings()(given["input_ids"])
    with posterior_noise(WeightsNoise()):
        expected = model(**given, **wanted, num_posterior_samples=SAMPLES)
        actual = model(inputs_embeds=embedded, **wanted, num_posterior_samples=SAMPLES)
    torch.testing.assert_close(actual.loss, expected.loss)


def test_two_heads_of_pretraining_are_joined():
    config = hf.BertConfig(**FAMILIES["bert"].options)
    model, given = retrofitted(hf.BertForPreTraining(config).eval()), inputs("bert", padding=2)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    out = model(**given, labels=labels, next_sentence_label=torch.tensor([0, 1]), num_posterior_samples=SAMPLES)
    assert out.prediction_logits.shape == (2, 8, VOCAB) and out.seq_relationship_logits.shape == (2, 2)
    assert out.nll.isfinite() and out.kl > 0


class OneForAllRows:
    """Noise of the positions alone, so that it does not matter which batch a row is in."""

    def __call__(self, request):
        noise = WeightsNoise([0] * request.batch, samples=request.num_samples)
        return noise(request)


def trained(model, rows: list[dict], directory, **options) -> hf.Trainer:
    settings = {
        **{"output_dir": str(directory), "report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 7},
        **{"per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "learning_rate": 1e-3},
        **{"disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
    }
    more = {name: options.pop(name) for name in ("compute_metrics", "eval_dataset") if name in options}
    arguments = hf.TrainingArguments(**{**settings, **options})
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows, **more)
    trainer.train()
    return trainer


def rows_of(name: str, count: int = 8) -> list[dict]:
    given = inputs(name, batch=count, padding=2)
    columns = {**given, **targets(name, given)}
    return [{key: value[row] for key, value in columns.items()} for row in range(count)]


class TestPlainTrainer:
    @pytest.mark.parametrize("name", ["bert-masked", "bert-single", "bert-spans", "vit-single", "gpt2-next", "qwen3"])
    def test_loss_goes_down_and_metrics_get_what_they_should(self, name, tmp_path):
        seen = []

        def metrics(prediction):
            seen.append(prediction)
            return {"seen": 1.0}

        model, rows = retrofitted(name, kl_weight=1e-3, num_posterior_samples=2), rows_of(name)
        before = {key: value.clone() for key, value in posterior_parameters(model).items()}
        options = {"compute_metrics": metrics, "eval_dataset": rows, "per_device_eval_batch_size": 3}
        trainer = trained(model, rows, tmp_path, max_steps=12, learning_rate=1e-2, weight_decay=0.0, **options)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
        assert all(not torch.equal(value, before[key]) for key, value in posterior_parameters(model).items())
        trainer.evaluate()
        answered = seen[0].predictions
        model.eval()
        given = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        with torch.no_grad():
            out = model(**given)
        fields = ("start_logits", "end_logits") if FAMILIES[name].task == "spans" else ("logits",)
        answered = answered if isinstance(answered, tuple) else (answered,)
        for one, field in zip(answered, fields, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), out[field], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("name", ["bert-single", "bert-masked", "bert-multi", "gpt2-next", "vit-single"])
    def test_accumulation_of_the_arguments(self, name, tmp_path):
        """Also in the heads whose stock loss is a mean over the micro-batch."""
        models = []
        for steps in (1, 2):
            model = retrofitted(name)
            options = {"learning_rate": 0.05, "optim": "sgd", "per_device_train_batch_size": 8 // steps}
            with posterior_noise(OneForAllRows()):
                trainer = trained(model, rows_of(name), tmp_path, gradient_accumulation_steps=steps, **options)
            models.append((trainer.state.log_history[0]["loss"], model.state_dict()))
        assert models[0][0] == pytest.approx(models[1][0], rel=1e-4)
        for key, value in models[0][1].items():
            torch.testing.assert_close(models[1][1][key], value, atol=1e-5, rtol=1e-4, msg=key)

    @pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
    def test_precision_and_checkpointing_of_the_arguments(self, options, tmp_path):
        model = retrofitted("bert-single", data_dependent="query")
        trainer = trained(model, rows_of("bert-single"), tmp_path, max_steps=2, **options)
        assert all(0 < entry["loss"] < 100 for entry in trainer.state.log_history if "loss" in entry)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_posterior_alone_can_be_trained():
    """The pretrained weights frozen: only the posterior's parameters have a gradient, and it is that of before."""
    model, given = retrofitted("bert-single", data_dependent="query"), inputs("bert-single")
    wanted = targets("bert-single", given)
    run = partial(model, **given, **wanted, num_posterior_samples=SAMPLES)
    with posterior_noise(WeightsNoise()):
        expected = gradients(model, run().loss, lambda key: ".posterior." in key)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(".posterior." in key)
        run().loss.backward()
    actual = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert_same_gradients(actual, expected)


def test_labels_of_the_stock_problem_types():
    """A problem type that nobody set is found from the labels, as in the stock class."""
    for labels, kind in ((torch.rand(2, LABELS).round(), "multi_label"), (torch.tensor([0, 2]), "single_label")):
        model = retrofitted(stock("bert-single"))
        assert model.config.problem_type is None
        out = model(**inputs("bert-single"), labels=labels, num_posterior_samples=SAMPLES)
        assert model.config.problem_type == f"{kind}_classification"
        assert out.logits.shape == (2, LABELS) and out.kl > 0
