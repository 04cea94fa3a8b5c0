"""A plain Trainer trains adapters, with the KL in their loss."""

import copy

import pytest
import torch
from eve_families import VOCAB, stock
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import adapted, config, posterior, sampled, twin
from transformers import Trainer, TrainingArguments

from hf_variational import (
    VariationalTrainer,
    VariationalTrainingArguments,
    calibrate_prior,
    evaluate_language_model,
    fit_scale,
)

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCAB, (16, 8)).tolist()]


def trainer(model, folder, **options) -> Trainer:
    settings = {
        **{"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.1, "logging_steps": 1},
        **{"report_to": "none", "save_steps": 3, "use_cpu": True, "disable_tqdm": True},
    }
    extra = {name: options.pop(name) for name in ("compute_metrics",) if name in options}
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], **extra)


def test_plain_trainer_trains_the_posterior_alone(tmp_path):
    model = adapted("gpt2", kl_weight=1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    at = trainer(model, tmp_path)
    at.train()
    losses = [entry["loss"] for entry in at.state.log_history if "loss" in entry]
    # The KL is nearly all of it, and goes as sigma goes to the prior's.
    assert losses[-1] < losses[0] - 1.0
    parameters = {id(tensor) for tensor in posterior(model).values() if isinstance(tensor, torch.nn.Parameter)}
    for (name, parameter), key in zip(model.named_parameters(), dict(model.named_parameters()), strict=True):
        assert torch.equal(parameter, before[key]) == (id(parameter) not in parameters), name


def test_loss_of_an_accumulated_batch(tmp_path):
    """The same loss and the same step, whether four sequences come at once or one by one."""
    losses = []
    for size, steps in ((4, 1), (1, 4)):
        model = adapted("gpt2", kl_weight=1.0)
        for (_, name), tensor in posterior(model).items():
            if name.startswith("log_scale"):
                tensor.data.fill_(-12.0)  # next to no noise, so that the KL and the NLL can be compared
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        at = trainer(model, tmp_path / str(size), **options, data_seed=3, learning_rate=1e-3)
        at.train()
        losses.append([entry["loss"] for entry in at.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_checkpoint_holds_the_adapter_and_is_resumed_from(tmp_path):
    torch.manual_seed(0)
    model = adapted("gpt2")
    trainer(model, tmp_path).train()
    folder = tmp_path / "checkpoint-3"
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "model.safetensors").exists()
    resumed = adapted("gpt2")
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(folder))
    for key, tensor in posterior(model).items():
        torch.testing.assert_close(posterior(resumed)[key], tensor)


def test_adapter_that_transformers_manages(tmp_path):
    model = stock("gpt2")
    model.add_adapter(config("gpt2", "last", kl_weight=1.0))
    at = trainer(model, tmp_path)
    at.train()
    losses = [entry["loss"] for entry in at.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1.0
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()


def test_metrics_are_of_the_logits_alone(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"rows": len(prediction.predictions)}

    answer = trainer(adapted("gpt2"), tmp_path, compute_metrics=compute_metrics).evaluate()
    assert answer["eval_rows"] == 4 and seen[0].shape == (4, 8, VOCAB)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_checkpoint_of_lora_and_eve_has_both(tmp_path):
    base = stock("llama")
    low_rank = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, low_rank, adapter_name="lora")
    model = get_peft_model(base, config("llama", "last"), adapter_name="eve")
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    trainer(model, tmp_path).train()
    changed = {name for name, parameter in base.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"lora_" in name or "eve_posterior" in name for name in changed} == {True}
    assert any("lora_A" in name for name in changed) and any("eve_posterior" in name for name in changed)
    inputs = {"input_ids": torch.tensor([ROWS[0]["input_ids"]])}
    again = stock("llama")
    for name in ("lora", "eve"):
        loaded = PeftModel.from_pretrained(again, tmp_path / "checkpoint-6" / name, adapter_name=name)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


class TestOurOwnTools:
    """What the package offers for retrofits is there for adapters, and only the active one is meant."""

    def test_calibration_and_fit_of_the_scale(self):
        plain = stock("gpt2")
        model = adapted("gpt2", base=copy.deepcopy(plain))
        model.add_adapter("second", config("gpt2"))
        other = twin(model, plain)
        untouched = {key: tensor.clone() for key, tensor in posterior(model, "second").items()}
        rows = [{"input_ids": torch.tensor(row["input_ids"])} for row in ROWS]
        fitted = []
        for one in (model, other):
            calibrate_prior(one, rows, progress=False)
            fitted.append(fit_scale(one, rows, progress=False, epochs=1, num_posterior_samples=2))
        assert fitted[0].nll == fitted[1].nll and fitted[0].multipliers == fitted[1].multipliers
        assert torch.equal(sampled(model, "gpt2").logits, sampled(other, "gpt2").logits)
        for key, tensor in posterior(model, "second").items():
            assert torch.equal(tensor, untouched[key])
            assert not tensor.requires_grad
        metrics = [
            evaluate_language_model(one, rows, num_posterior_samples=2, progress=False, seed=0)["samples"]["nll"]
            for one in (model, other)
        ]
        assert metrics[0] == metrics[1]

    def test_variational_trainer(self, tmp_path):
        model = adapted("gpt2", "last")
        arguments = VariationalTrainingArguments(
            str(tmp_path),
            kl_weight=0.5,
            max_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = VariationalTrainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])
        trainer.train()
        logs = trainer.state.log_history
        assert any("kl/layer_2" in entry for entry in logs)
        assert any(entry.get("eval_mutual_information", 0) > 0 for entry in logs)
        assert (tmp_path / "checkpoint-2" / "adapter_config.json").is_file()
