"""A plain transformers.Trainer trains the evidence lower bound."""

import copy

import pytest
import torch
from integration_models import PAD, VOCABULARY, RowNoise, eve_config, prompt, tiny_model
from transformers import Trainer, TrainingArguments

from hf_variational import posterior_noise


def data(rows: int = 8, length: int = 6):
    return [{"input_ids": row, "labels": row.clone()} for row in prompt(rows, length)]


def trainer(model, directory, rows=8, **options):
    arguments = {
        "output_dir": str(directory),
        "report_to": [],
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "seed": 7,
    }
    compute_metrics = options.pop("compute_metrics", None)
    evaluation = options.pop("eval_dataset", None)
    return Trainer(
        model=model,
        args=TrainingArguments(**{**arguments, **options}),
        train_dataset=data(rows),
        eval_dataset=evaluation,
        compute_metrics=compute_metrics,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"kl_weight": 0.01},
        {"kl_weight": 0.01, "objective": "mc_nll", "num_posterior_samples": 3},
        {"kl_weight": 0.01, "eve": eve_config(reconstruction_weight=0.5)},
        {"eve": None},
    ],
    ids=["elbo", "mc_nll", "reconstruction", "twin"],
)
def test_reported_loss_is_the_objective(options, tmp_path):
    model = tiny_model(**options)
    reference = copy.deepcopy(model).train()
    batch = torch.stack([row["input_ids"] for row in data(4)])
    with posterior_noise(RowNoise()):
        # one step over all the data there is, so that the order of the rows is all that shuffling can change
        trained = trainer(model, tmp_path, rows=4, per_device_train_batch_size=4)
        order = [batch.tolist().index(row) for row in next(iter(trained.get_train_dataloader()))["input_ids"].tolist()]
        trained.train()
    with posterior_noise(RowNoise()):
        out = reference(batch[order], labels=batch[order])
    expected = out.nll + reference.config.kl_weight * out.kl
    if out.reconstruction is not None:
        expected = expected + 0.5 * out.reconstruction
    if options.get("eve", True) is not None:
        assert reference.config.kl_weight * out.kl > 0.1
    torch.testing.assert_close(out.loss, expected)
    assert trained.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_loss_goes_down(tmp_path):
    trained = trainer(tiny_model(kl_weight=1e-3), tmp_path, max_steps=12, learning_rate=2e-2)
    trained.train()
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


class SameForEveryRow:
    """Noise of the position alone, so that it does not matter which batch a row is in."""

    def __call__(self, request):
        row = RowNoise(rows=[0])
        table = row._table(request.layer, 0, request.num_samples, request.shape[2:])
        return torch.cat([table[:, positions] for positions in request.positions]).reshape(request.shape)


@pytest.mark.parametrize("steps", [2, 4])
def test_accumulation_changes_nothing(steps, tmp_path):
    # rows of different length: a mean of means would differ
    rows = data(8)
    for index, row in enumerate(rows):
        row["labels"][: index % 4] = -100
    trained = []
    for accumulation in (1, steps):
        model = tiny_model(kl_weight=0.1)
        run = trainer(
            model,
            tmp_path,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.5,
            optim="sgd",
        )
        run.train_dataset = rows
        with posterior_noise(SameForEveryRow()):
            run.train()
        trained.append((run.state.log_history[0]["loss"], model.state_dict()))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-4)
    for name, value in trained[0][1].items():
        torch.testing.assert_close(trained[1][1][name], value, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}], ids=str)
def test_gradient_checkpointing_of_the_arguments(kwargs, tmp_path):
    trained = []
    for options in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}):
        model = tiny_model(kl_weight=0.1)
        trainer(model, tmp_path, max_steps=2, **options).train()  # the noise of the global generator
        assert model.model.gradient_checkpointing == bool(options)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, msg=name)


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision(precision, tmp_path):
    run = trainer(tiny_model(), tmp_path, max_steps=2, **{precision: True})
    run.train()
    assert all(0 < entry["loss"] < 100 for entry in run.state.log_history if "loss" in entry)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_metrics_see_only_logits(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"seen": 1.0}

    model = tiny_model(output_posteriors=True)
    evaluation = data(5)
    run = trainer(model, tmp_path, eval_dataset=evaluation, compute_metrics=metrics, per_device_eval_batch_size=2)
    result = run.evaluate()
    (logits, labels) = seen[0]
    assert logits.shape == (5, 6, VOCABULARY)
    assert labels.shape == (5, 6)
    expected = model.eval()(torch.stack([row["input_ids"] for row in evaluation])).logits
    torch.testing.assert_close(torch.from_numpy(logits), expected.detach(), atol=1e-5, rtol=1e-4)
    # evaluation is in eval mode, so the loss is the mean pass's likelihood plus the KL
    assert result["eval_loss"] > 0


def test_padding_counts_for_nothing(tmp_path):
    model = tiny_model(kl_weight=0.1)
    rows = prompt(2, 6)
    padded = torch.cat([rows, torch.full((2, 3), PAD)], dim=1)
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], dim=1).long()
    labels = torch.where(mask.bool(), padded, -100)
    with posterior_noise(RowNoise()):
        expected = model(rows, labels=rows, num_posterior_samples=2)
    with posterior_noise(RowNoise()):
        out = model(padded, attention_mask=mask, labels=labels, num_posterior_samples=2)
    for name in ("loss", "nll", "kl", "kl_per_layer"):
        torch.testing.assert_close(out[name], expected[name])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_carry_kl(side):
    # attended, and with a shifted target: neither the padding nor the last token, whatever the labels say of them
    model, ids = tiny_model(), prompt(2, 8)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    labels = ids.clone()
    labels[1, 4] = -100
    with posterior_noise(RowNoise()):
        out = model(ids, attention_mask=mask, labels=labels, num_posterior_samples=2, output_posteriors=True)
    targets = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1) != -100
    kl = sum(statistics.kl for statistics in out.posteriors.values())
    torch.testing.assert_close(out.kl, kl[mask.bool() & targets].sum() / targets.sum())


def test_checkpoint_of_a_plain_trainer_resumes(tmp_path):
    whole = tiny_model()
    trainer(whole, tmp_path / "whole", max_steps=4).train()
    trainer(tiny_model(), tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=2).train()
    resumed = tiny_model(seed=5)
    run = trainer(resumed, tmp_path / "parts", max_steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    state = resumed.state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(state[name], value), name
