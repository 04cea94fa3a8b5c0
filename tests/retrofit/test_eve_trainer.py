"""Plain `Trainer` and pipelines on models whose feed-forward units were made variational."""

import pytest
import torch
import transformers as hf
from eve_families import TINY, added_parameters, given, is_added, retrofitted, stock, targets
from eve_reference import same_everywhere
from families import VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from hf_variational import posterior_noise


def rows_of(name: str, count: int = 8) -> list[dict]:
    inputs = given(name, batch=count, padding=2)
    columns = {**inputs, **targets(name, inputs)}
    return [{key: value[row] for key, value in columns.items()} for row in range(count)]


def trained(model, rows: list[dict], directory, **options) -> hf.Trainer:
    settings = {
        **{"output_dir": str(directory), "report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 7},
        **{"per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2},
        **{"disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "weight_decay": 0.0},
    }
    more = {name: options.pop(name) for name in ("compute_metrics", "eval_dataset") if name in options}
    arguments = hf.TrainingArguments(**{**settings, **options})
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows, **more)
    trainer.train()
    return trainer


FAMILIES = ["llama", "opt", "bloom", "mixtral", "t5", "roberta-tokens", "vit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_posterior_alone(name, tmp_path):
    """Three steps move what was added and nothing else."""
    model = retrofitted(name, train="posterior", num_posterior_samples=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = trained(model, rows_of(name), tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 1000 for loss in losses)
    trainable = set(added_parameters(model))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != (key in trainable), key


@pytest.mark.parametrize("name", ["gptj", "mixtral", "t5", "bert-single"])
def test_all_of_it(name, tmp_path):
    """The loss goes down, and `compute_metrics` is given the mean pass's logits alone."""
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"seen": 1.0}

    model, rows = retrofitted(name, num_posterior_samples=2, kl_weight=1e-3), rows_of(name)
    options = {"compute_metrics": metrics, "eval_dataset": rows, "per_device_eval_batch_size": 8}
    trainer = trained(model, rows, tmp_path, max_steps=14, **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert trainer.evaluate()["eval_loss"] > 0
    answered = seen[0].predictions
    answered = answered[0] if isinstance(answered, tuple) else answered
    model.eval()
    with torch.no_grad():
        out = model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    torch.testing.assert_close(torch.from_numpy(answered), out.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "bert-single", "t5"])
def test_accumulation_of_the_arguments(name, tmp_path):
    models = []
    for steps in (1, 2):
        model = retrofitted(name)
        options = {"learning_rate": 0.05, "optim": "sgd", "per_device_train_batch_size": 8 // steps, "max_steps": 1}
        with posterior_noise(same_everywhere):
            trainer = trained(model, rows_of(name), tmp_path, gradient_accumulation_steps=steps, **options)
        models.append((trainer.state.log_history[0]["loss"], model.state_dict()))
    assert models[0][0] == pytest.approx(models[1][0], rel=1e-4)
    for key, value in models[0][1].items():
        torch.testing.assert_close(models[1][1][key], value, atol=2e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_precision_and_checkpointing_of_the_arguments(options, tmp_path):
    for name in ("llama", "t5"):
        model = retrofitted(name, train="posterior")
        trainer = trained(model, rows_of(name), tmp_path, **options)
        assert all(0 < entry["loss"] < 100 for entry in trainer.state.log_history if "loss" in entry)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_checkpoint_of_the_trainer_goes_on(tmp_path):
    rows = rows_of("llama")
    model = retrofitted("llama", train="posterior")
    trained(model, rows, tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    expected = {key: value.clone() for key, value in model.state_dict().items() if is_added(key)}
    again = retrofitted("llama", train="posterior")
    arguments = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "seed": 7, "max_steps": 4}
    arguments |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "disable_tqdm": True, "weight_decay": 0.0}
    arguments |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no"}
    trainer = hf.Trainer(model=again, args=hf.TrainingArguments(**arguments), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    for key, value in expected.items():
        torch.testing.assert_close(again.state_dict()[key], value, atol=1e-5, rtol=1e-4)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    for key, value in expected.items():
        assert torch.equal(loaded.state_dict()[key], value)


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2} | {f"w{index}": index for index in range(3, VOCAB)}
    tokens = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]", padding_side="left"
    )


PIPELINES = {
    "gpt2": ("text-generation", "w5 w9", {"max_new_tokens": 5, "do_sample": False}),
    "llama": ("text-generation", "w5 w9", {"max_new_tokens": 5, "do_sample": False}),
    "mixtral": ("text-generation", "w5 w9", {"max_new_tokens": 5, "do_sample": False}),
    "bert-masked": ("fill-mask", "w5 [MASK] w9", {}),
    "distilbert-masked": ("fill-mask", "w5 [MASK] w9", {}),
    "bert-single": ("text-classification", "w5 w9", {}),
    "llama-single": ("text-classification", "w5 w9", {}),
    "bert-tokens": ("token-classification", "w5 w9", {}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_answer_as_with_the_stock_model(name, caplog):
    task, text, options = PIPELINES[name]
    # The fixtures make transformers silent, and what it warns of is what is asked here.
    hf.logging.set_verbosity_warning()
    hf.logging.enable_propagation()
    try:
        plain = stock(name)
        expected = hf.pipeline(task, model=plain, tokenizer=tokenizer())(text, **options)
        caplog.clear()
        pipe = hf.pipeline(task, model=retrofitted(plain), tokenizer=tokenizer())
        actual = pipe(text, **options)
    finally:
        hf.logging.disable_propagation()
    assert "not supported" not in caplog.text and "not used by the model" not in caplog.text
    if task == "text-generation":
        assert actual == expected
        (drawn,) = pipe(text, num_posterior_samples=2, return_tensors=True, **options)
        assert len(drawn["generated_token_ids"]) == 7
        return
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.pop("score") == pytest.approx(other.pop("score")) and one == other


@pytest.mark.parametrize("name", ["gpt2", "t5", "vit"])
def test_pipeline_knows_the_class(name):
    """By its name, among those that the task's Auto class makes."""
    from transformers.models.auto import modeling_auto

    mapping = {
        "gpt2": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "t5": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "vit": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }[name]
    model = retrofitted(name)
    assert TINY[name].model.__name__ in mapping.values()
    auto = {"gpt2": hf.AutoModelForCausalLM, "t5": hf.AutoModelForSeq2SeqLM, "vit": hf.AutoModelForImageClassification}
    assert auto[name]._model_mapping[type(model.config)] is type(model)
