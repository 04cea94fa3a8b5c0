"""Classifiers among files, Auto classes, pipelines and Trainers, what they learn, and bad input."""

import numpy as np
import pytest
import torch
from classification_models import (
    BATCH,
    CASES,
    HEADS,
    LABELS,
    LENGTH,
    MULTI,
    NUMBERS,
    SEQUENCE,
    SINGLE,
    SITED,
    STOCK,
    TOKEN,
    TWIN,
    build,
    close,
    labels_of,
    padded,
    run,
    stock_twin,
    with_labels,
)
from integration_models import PAD, VOCABULARY, RowNoise, attention_config, prompt, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_variational import posterior_noise

AUTO = {SEQUENCE: AutoModelForSequenceClassification, TOKEN: AutoModelForTokenClassification}


@HEADS
@SITED
def test_saved_and_loaded_is_equal(head, options, tmp_path):
    model = build(head, **options, id2label={i: f"kind {i}" for i in range(LABELS)})
    model.save_pretrained(tmp_path)
    loaded, report = AUTO[head].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is head and not loaded.training and not any(report.values())
    assert loaded.config.id2label == model.config.id2label
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    rows = with_labels(head, padded())
    out, expected = (run(each, **rows, num_posterior_samples=2) for each in (loaded, model))
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.loss, expected.loss)
    assert type(AUTO[head].from_config(model.config)) is head


@HEADS
def test_checkpoints_of_llama(head, tmp_path):
    stock = stock_twin(build(head))
    stock.save_pretrained(tmp_path / "llama")
    model = head.from_pretrained(tmp_path / "llama", attention=attention_config())
    rows = padded()
    torch.testing.assert_close(model(**rows).logits, stock(**rows).logits)
    model.save_pretrained(tmp_path / "ours")
    again = STOCK[head].from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(again(**rows).logits, stock(**rows).logits)


@HEADS
def test_a_language_model_becomes_a_classifier(head, tmp_path):
    language_model = tiny_model(attention=attention_config())
    language_model.save_pretrained(tmp_path)
    model, report = AUTO[head].from_pretrained(tmp_path, num_labels=LABELS, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"score"}
    assert set(report["unexpected_keys"]) == {"lm_head.weight"}
    expected = language_model.model.state_dict()
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert model.score.weight.std() > 0


def test_another_number_of_labels_is_refused_as_in_llama(tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=LABELS + 1)
    options = {"num_labels": LABELS + 1, "ignore_mismatched_sizes": True}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    assert model(**padded()).logits.shape == (BATCH, LABELS + 1)


@pytest.fixture
def tokenizer():
    words = {"<pad>": PAD, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<pad>")


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_text_classification_pipeline(problem, tokenizer, tmp_path):
    model = build(problem_type=problem, id2label={i: f"kind {i}" for i in range(LABELS)})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classifier = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None, batch_size=2)
    assert type(classifier.model) is SEQUENCE
    texts = ["w5 w9 w11", "w7 w8 w9 w10 w20"]
    logits = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    expected = logits.softmax(-1) if problem == SINGLE else logits.sigmoid()
    for answers, row in zip(classifier(texts), expected, strict=True):
        assert len(answers) == LABELS
        for answer in answers:
            assert answer["score"] == pytest.approx(row[int(answer["label"][5:])].item(), rel=1e-4)


def test_token_classification_pipeline(tokenizer, tmp_path):
    model = build(TOKEN, id2label={i: f"kind {i}" for i in range(LABELS)})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tagger = pipeline("token-classification", model=str(tmp_path), device="cpu")
    text = "w5 w9 w11 w30"
    expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0].max(-1)
    answers = tagger(text)
    assert [answer["entity"] for answer in answers] == [f"kind {label}" for label in expected.indices.tolist()]
    assert [float(answer["score"]) for answer in answers] == pytest.approx(expected.values.tolist(), rel=1e-4)


def dataset(head, problem: str) -> list[dict]:
    rows = with_labels(head, padded(), problem)
    return [{name: value[index] for name, value in rows.items()} for index in range(BATCH)]


def trainer(model, directory, data, **options) -> Trainer:
    settings = {
        "output_dir": str(directory),
        "report_to": [],
        "use_cpu": True,
        "per_device_train_batch_size": BATCH,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    given = {name: options.pop(name) for name in ("compute_metrics", "eval_dataset") if name in options}
    return Trainer(model=model, args=TrainingArguments(**{**settings, **options}), train_dataset=data, **given)


class SameForEveryRow(RowNoise):
    """Noise that does not depend on which batch a row is in."""

    def __call__(self, request):
        self.rows = [0] * request.batch
        return super().__call__(request)


@CASES
def test_a_plain_trainer_trains_the_bound_under_any_accumulation(head, problem, tmp_path):
    found = []
    for steps in (1, 2, 4):
        options = {"classifier_dropout": 0.0} if head is TOKEN else {"problem_type": problem}
        model = build(head, attention=attention_config(), **options)
        with posterior_noise(SameForEveryRow()):
            expected = model.train()(**with_labels(head, padded(), problem)).loss.item()
            size = {"per_device_train_batch_size": BATCH // steps, "gradient_accumulation_steps": steps}
            run_of = trainer(model, tmp_path, dataset(head, problem), **size)
            run_of.train()
        assert run_of.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
        found.append(model.state_dict())
    for name, value in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-4, msg=name)


@CASES
def test_metrics_see_only_logits(head, problem, tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {}

    options = {"problem_type": problem} if head is SEQUENCE else {}
    model = build(head, output_posteriors=True, **options)
    data = dataset(head, problem)
    evaluation = {"eval_dataset": data, "compute_metrics": metrics, "per_device_eval_batch_size": BATCH}
    result = trainer(model, tmp_path, data, **evaluation).evaluate()
    rows = with_labels(head, padded(), problem)
    expected = model(**rows)
    assert isinstance(seen[0].predictions, np.ndarray)
    close(torch.from_numpy(seen[0].predictions), expected.logits.detach())
    assert (seen[0].label_ids == rows["labels"].numpy()).all()
    assert result["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["dirichlet", "approximate_dirichlet", "gaussian"])
def test_it_learns_which_token_is_more_frequent(kind):
    """One glance back of the last token, with random attention weights, is enough to count; chance is 50 %."""
    torch.manual_seed(0)
    attention = attention_config(kind, initial_concentration=30.0, initial_scale=0.3, prior_concentration=30.0)
    config = tiny_config(
        eve=None, attention=attention, num_labels=2, num_hidden_layers=1, kl_weight=1e-3, initializer_range=0.1
    )
    model = SEQUENCE(config)

    def examples(count):
        ids = torch.randint(3, 5, (count, 9))
        return ids, (ids == 4).sum(1).gt(4).long()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(80):
        ids, labels = examples(64)
        optimizer.zero_grad()
        out = model(ids, labels=labels)
        out.loss.backward()
        optimizer.step()
    assert out.kl.isfinite()
    ids, labels = examples(512)
    with torch.no_grad():
        out = model.eval()(ids, num_posterior_samples=8, output_uncertainty=True)
    assert (out.logits.argmax(-1) == labels).float().mean() > 0.95
    # where the counts are close the model is less sure, and so is the attention that counts them
    is_close = ((ids == 4).sum(1) - 4.5).abs() < 1
    for name in ("predictive_entropy", "mutual_information"):
        measure = out.uncertainty[name]
        assert measure[is_close].mean() > 3 * measure[~is_close].mean()
    assert out.uncertainty.mutual_information[is_close].mean() > 1e-3


# Bad input


def test_several_sequences_need_a_padding_token():
    model = build(pad_token_id=None)
    with pytest.raises(ValueError, match="no padding token is defined"):
        model(prompt(2, LENGTH))
    ids = prompt(1, LENGTH)
    expected = stock_twin(model)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    assert run(model, input_ids=ids, num_posterior_samples=2).logits.shape == (1, LABELS)


@HEADS
@pytest.mark.parametrize("name", ["output_uncertainty", "output_sample_logits"])
def test_what_needs_samples_is_refused_without(head, name):
    with pytest.raises(ValueError, match=f"{name}=True needs posterior samples"):
        build(head)(**padded(), **{name: True})
    with pytest.raises(ValueError, match="no variational layer"):
        build(head, **TWIN)(**padded(), num_posterior_samples=2)


@pytest.mark.parametrize("problem", [MULTI, NUMBERS])
def test_uncertainty_is_about_classes(problem):
    model = build(problem_type=problem)
    with pytest.raises(ValueError, match=rf"{problem}.*output_sample_logits"):
        model(**padded(), num_posterior_samples=2, output_uncertainty=True)
    with pytest.raises(ValueError, match=rf"{MULTI}"):
        build()(**padded(), labels=labels_of(MULTI), num_posterior_samples=2, output_uncertainty=True)
    with pytest.raises(ValueError, match=rf"{NUMBERS}"):
        build(num_labels=1)(**padded(), num_posterior_samples=2, output_uncertainty=True)


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        (SINGLE, torch.zeros(BATCH + 1, dtype=torch.long)),
        (SINGLE, torch.zeros(BATCH)),
        (SINGLE, torch.zeros(BATCH, LABELS, dtype=torch.long)),
        (MULTI, torch.zeros(BATCH)),
        (MULTI, torch.zeros(LABELS + 1, BATCH)),
        (NUMBERS, torch.zeros(BATCH, LABELS - 1)),
        ("ranking", torch.zeros(BATCH)),
    ],
    ids=str,
)
def test_labels_that_do_not_fit(problem, labels):
    model = build(problem_type=problem)
    with pytest.raises(ValueError, match=f"problem_type='{problem}'"):
        model(**padded(), labels=labels)


@HEADS
@pytest.mark.parametrize("samples", [0, 2])
def test_a_label_beyond_the_last(head, samples):
    rows = with_labels(head, padded())
    rows["labels"] = rows["labels"].clone()
    rows["labels"].flatten()[0] = LABELS
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        build(head)(**rows, num_posterior_samples=samples)


def test_token_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"one a token, \(4, 7\)"):
        build(TOKEN)(**padded(), labels=torch.zeros(BATCH, dtype=torch.long))


@HEADS
def test_neither_tokens_nor_embeddings(head):
    labels = torch.zeros((2,) if head is SEQUENCE else (2, 6), dtype=torch.long)
    for inputs in ({}, {"input_ids": prompt(), "inputs_embeds": torch.zeros(2, 6, 32)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            build(head)(**inputs, labels=labels)


@HEADS
def test_a_posterior_that_is_missing(head):
    model = build(head)
    model.model.layers[1].mlp.eve.tap = torch.nn.Identity()
    model.model.layers[1].mlp.eve.tap.forward = lambda record, tape=None: record
    with pytest.raises(RuntimeError, match="KL would be incomplete"):
        model(**with_labels(head, padded()))
