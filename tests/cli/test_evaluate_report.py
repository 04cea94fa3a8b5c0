"""`evaluate --output`: what it writes and prints, what it compares with, and a line for every wrong input."""

import json

import pytest
import torch
import yaml
from test_cli import refused, run
from transformers import AutoModelForCausalLM

from hf_variational import EVEConfig, VariationalGPTForCausalLM, save_for_hub, variationalize
from hf_variational.baselines import EnsembleForCausalLM, mc_dropout
from hf_variational.evaluation import token_scores
from hf_variational.evaluation.report import EvaluationReport, text_rows
from hf_variational.evaluation_program import contenders
from hf_variational.evaluation_program.contenders import deterministic, training_of
from hf_variational.evaluation_program.texts import read_rows, source_name, source_of

WORDS = ("the", "with", "for", "def", "class", "block", "clause", "raise", "return", "value", "name", "scope")
OPTIONS = ("--samples", 2, "--length", 16, "--batch-size", 4)


def sentences(seed, count=40):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(WORDS), (count, 9), generator=generator).tolist()
    return "".join(" ".join(WORDS[pick] for pick in line) + ".\n" for line in picks)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "test.txt").write_text(sentences(0))
    (folder / "valid.txt").write_text(sentences(1))
    (folder / "other.txt").write_text("".join(f"{n * 7919 % 1000} + {n * 31 % 97} = {n}\n" for n in range(120)))
    return folder


@pytest.fixture(scope="module")
def second_twin(twin_checkpoint, tokenizer, tmp_path_factory):
    """A deterministic checkpoint of other weights, with a trainer's log beside it."""
    model = AutoModelForCausalLM.from_pretrained(twin_checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    folder = tmp_path_factory.mktemp("checkpoints") / "second"
    save_for_hub(model, folder, tokenizer)
    history = [
        {"step": 5, "loss": 5.0, "nll": 4.5},
        {"step": 5, "eval_nll": 4.4},
        {"step": 10, "loss": 4.0, "nll": 3.5},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "num_input_tokens_seen": 1234}))
    return str(folder)


@pytest.fixture(scope="module")
def written(files, eve_checkpoint, twin_checkpoint, second_twin, tmp_path_factory):
    """A run with everything: its result and its folder."""
    folder = tmp_path_factory.mktemp("run") / "report"
    result = run(
        "evaluate", eve_checkpoint, "--data", files / "test.txt", "--validation", files / "valid.txt",
        "--ood", f"sums={files / 'other.txt'}", "--baselines",
        "--ensemble", twin_checkpoint, "--ensemble", second_twin, "--compare", f"twin={second_twin}",
        "--corruption", "--readouts", "--output", folder, *OPTIONS,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    return result, folder


def loaded(folder):
    return EvaluationReport.from_json((folder / "report.json").read_text())


# ---- What it writes ----


def test_the_folder_has_report_page_plots_and_metadata(written):
    result, folder = written
    names = {file.name for file in folder.iterdir()}
    pictures = {f"{name}.png" for name in ("reliability", "risk_coverage", "histograms", "cost", "training")}
    assert names >= {"report.json", "report.html", "model-index.yaml", *pictures}
    assert f"wrote {folder / 'report.html'}" in result.stderr
    assert yaml.safe_load((folder / "model-index.yaml").read_text())["model-index"][0]["name"] == "eve"


def test_the_contenders_and_their_price(written):
    report = loaded(written[1])
    own = ["eve", "eve, tempered", "mean pass", "mean pass, tempered", "MC dropout"]
    assert list(report.contenders) == [*own, "twin", "twin, tempered", "ensemble of 2"]
    for name, sections in report.contenders.items():
        assert sections["cost"]["inference_flops_per_token"] > 0 and sections["cost"]["parameters"] > 0, name
        assert report.times[name]["test_seconds"] > 0
    assert report.contenders["ensemble of 2"]["num_posterior_samples"] == 2
    one, both = (report.contenders[name]["cost"]["parameters"] for name in ("twin", "ensemble of 2"))
    assert both == 2 * one
    assert report.contenders["twin"]["training"]["tokens"] == 1234


def test_the_numbers_are_those_of_a_call_by_hand(
    written, files, eve_checkpoint, second_twin, twin_checkpoint, tokenizer
):
    report = loaded(written[1])
    rows = text_rows([(files / "test.txt").read_text()], tokenizer, 16)
    models = {
        "eve": (AutoModelForCausalLM.from_pretrained(eve_checkpoint), 2),
        "twin": (AutoModelForCausalLM.from_pretrained(second_twin), 0),
        "ensemble of 2": (EnsembleForCausalLM.from_members([twin_checkpoint, second_twin]), 2),
    }
    for name, (model, samples) in models.items():
        scores = token_scores(model.eval(), rows, samples, 4, progress=False)
        assert report.value(name, "quality", "nll") == pytest.approx(float(scores.values["nll"].double().mean()))
    assert report.configuration["data"] == {
        "sequences": len(rows), "documents": 1, "longest": 16, "name": "test.txt", "length": 16
    }  # fmt: skip
    nats = report.value("eve", "quality", "nll") * sum(len(row["labels"]) - 1 for row in rows)
    size = sum(row["num_bytes"] for row in rows)
    assert report.value("eve", "quality", "bits_per_byte") == pytest.approx(nats / size / 0.6931471805599453)


def test_sections_that_were_asked_for(written):
    report = loaded(written[1])
    own = report.contenders["eve"]
    assert [condition["rate"] for condition in own["corruption"]["conditions"]] == [0.0, *([0.05, 0.15, 0.3] * 2)]
    assert own["readouts"]["chosen"]["readout"] and own["slices"]["long context"]["num_tokens"] > 0
    assert set(own["out_of_domain"]["sums"]) == {"8"}
    assert "kl" in own["out_of_domain"]["sums"]["8"] and "kl" in own["measures"]


def test_what_it_prints(written):
    text = written[0].stdout
    assert "test.txt: " in text and "MC dropout" in text and "What it costs" in text and "One seed (0)" in text
    assert "The rate is" in text.replace("\n", " ")


def test_the_same_seed_gives_the_same_report_but_for_times(eve_checkpoint, files, tmp_path):
    found = []
    for folder in ("first", "second"):
        options = ("--data", files / "test.txt", "--max-sequences", 20, "--baselines", "--output", tmp_path / folder)
        assert run("evaluate", eve_checkpoint, *options, *OPTIONS).exit_code == 0
        report = json.loads((tmp_path / folder / "report.json").read_text())
        report.pop("times")
        found.append(report)
    assert found[0] == found[1]
    assert found[0]["configuration"]["data"]["sequences"] == 16 and "4 of 20" in found[0]["notes"][0]


def test_json_is_what_is_written(eve_checkpoint, files, tmp_path):
    options = ("--data", files / "test.txt", "--max-sequences", 10, "--output", tmp_path / "out", "--json")
    result = run("evaluate", eve_checkpoint, *options, *OPTIONS)
    assert result.stdout == (tmp_path / "out" / "report.json").read_text()


def test_a_deterministic_model_asked_for_samples_has_a_line(twin_checkpoint, files, tmp_path):
    options = ("--data", files / "test.txt", "--max-sequences", 20, "--output", tmp_path / "out")
    result = run("evaluate", twin_checkpoint, *options, *OPTIONS)
    assert result.exit_code == 0 and "twin is deterministic" in result.stdout.replace("\n", " ")
    report = loaded(tmp_path / "out")
    assert list(report.contenders["twin"]["measures"]) == ["predictive_entropy"]


def test_a_report_is_replaced_when_that_is_asked_for(twin_checkpoint, files, tmp_path):
    folder = tmp_path / "out"
    options = ("--data", files / "test.txt", "--max-sequences", 10, "--output", folder, *OPTIONS)
    assert run("evaluate", twin_checkpoint, *options).exit_code == 0
    before = (folder / "report.json").read_text()
    assert "--overwrite" in refused("evaluate", twin_checkpoint, *options, "--seed", 1, code=1)
    assert (folder / "report.json").read_text() == before
    assert run("evaluate", twin_checkpoint, *options, "--seed", 1, "--overwrite").exit_code == 0
    assert loaded(folder).seed == 1


# ---- Contenders ----


def test_the_deterministic_copy_is_the_mean_pass(eve_checkpoint, attention_checkpoint):
    ids = torch.arange(12).reshape(2, 6)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (eve_checkpoint, attention_checkpoint)]
    retrofit = variationalize(AutoModelForCausalLM.from_pretrained(gpt2_like()), eve=EVEConfig(initial_scale=0.3))
    for model in (*models, retrofit):
        copy = deterministic(model.eval())
        assert model.variational_layers and not getattr(copy, "variational_layers", None)
        assert torch.equal(copy.eval()(ids).logits, model(ids, num_posterior_samples=0).logits)
        mc_dropout(copy, 0.1)  # it takes dropout


_GPT2 = []


def gpt2_like():
    """A folder with a tiny stock model."""
    import tempfile

    from transformers import GPT2Config, GPT2LMHeadModel

    if not _GPT2:
        torch.manual_seed(0)
        shape = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        _GPT2.append(tempfile.TemporaryDirectory())
        GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(_GPT2[0].name)
    return _GPT2[0].name


def test_a_learned_mean_leaves_dropout_out_and_says_so(eve_checkpoint):
    config = AutoModelForCausalLM.from_pretrained(eve_checkpoint).config
    config.eve = EVEConfig(mean="gain")
    model = VariationalGPTForCausalLM(config)
    found, notes = contenders.baselines_of(model, 2)
    assert not found and "MC dropout is left out" in notes[0] and "'gain'" in notes[0]


def test_the_rate_of_dropout_is_the_best_on_validation_data(twin_checkpoint, files, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(twin_checkpoint).eval()
    held = text_rows([(files / "valid.txt").read_text()], tokenizer, 16, limit=20)
    (make,) = contenders.baselines_of(model, 2, batch_size=4)[0].values()
    made = make(held)
    nll = {}
    for rate in contenders.RATES:
        copy = mc_dropout(deterministic(model), rate)
        nll[rate] = float(token_scores(copy, held, 2, 4, progress=False).values["nll"].double().mean())
    assert made.notes[0].startswith(f"the model was trained without dropout. The rate is {min(nll, key=nll.get)},")
    (make,) = contenders.baselines_of(model, 2)[0].values()
    without = make(None)
    assert "not chosen on any data" in without.notes[0]


def test_dropout_of_the_model_s_own_stays_at_its_rate():
    model = AutoModelForCausalLM.from_pretrained(gpt2_like()).eval()
    made = contenders.baselines_of(model, 3)[0]["MC dropout"](None)
    assert "rates that the model has" in made.notes[0] and made.num_posterior_samples == 3
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert "was not chosen" in contenders.baselines_of(model, 3)[0]["MC dropout"](None).notes[0]


def test_the_trainer_s_log_beside_a_checkpoint(second_twin, tmp_path):
    assert training_of(second_twin) == {
        "steps": [5, 10], "nll": [4.5, 3.5], "eval_steps": [5], "eval_nll": [4.4], "tokens": 1234, "flops": None
    }  # fmt: skip
    assert training_of(str(tmp_path)) == {}
    for step, loss in ((9, 3.0), (10, 2.0)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"log_history": [{"step": step, "loss": loss}, {"train_runtime": 1.0, "step": step}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert training_of(str(tmp_path))["steps"] == [10] and training_of(str(tmp_path))["nll"] == [2.0]


# ---- Texts ----


def test_sources(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text")
    assert source_of(str(path), "--data") == str(path) and source_name(str(path)) == "a.txt"
    assert source_of("{dataset: some/set, split: test}", "--data") == {"dataset": "some/set", "split": "test"}
    assert source_of("some/set", "--data") == {"dataset": "some/set", "split": "test"}
    wikitext = source_of("wikitext", "--data")
    assert wikitext["name"] == "wikitext-2-raw-v1" and source_name(wikitext) == "wikitext-2-raw-v1"
    with pytest.raises(ValueError, match="no mapping"):
        source_of("{dataset", "--data")


def test_lines_of_a_data_set_are_joined_to_documents(tokenizer, tmp_path):
    from datasets import Dataset

    lines = ["the with statement\n", "for the class\n", "def the block\n"]
    Dataset.from_dict({"text": lines}).save_to_disk(tmp_path / "lines")
    source = {"dataset": str(tmp_path / "lines"), "rows_are_documents": False}
    rows = read_rows(source, tokenizer, 8, None, "--data")
    expected = tokenizer("".join(lines), add_special_tokens=False)["input_ids"]
    assert [token for row in rows for token in row["labels"]] == expected[: sum(len(row["labels"]) for row in rows)]
    assert {row["document"] for row in rows} == {0}
    rows = read_rows({"dataset": str(tmp_path / "lines")}, tokenizer, 4, None, "--data")
    assert {row["document"] for row in rows} == {0, 1, 2}


# ---- Bad input ----


def test_text_that_is_shorter_than_a_window(eve_checkpoint, tmp_path):
    (tmp_path / "short.txt").write_text("the with")
    line = refused("evaluate", eve_checkpoint, "--data", tmp_path / "short.txt", "--output", tmp_path / "out", code=1)
    assert "--data: The text is shorter than a window" in line and "shorter windows" in line
    assert not (tmp_path / "out").exists()


def test_overlapping_validation_data(eve_checkpoint, files, tmp_path):
    options = ("--data", files / "test.txt", "--validation", files / "test.txt", "--output", tmp_path / "out")
    line = refused("evaluate", eve_checkpoint, *options, *OPTIONS, code=1)
    assert "windows in common" in line and "leave the validation data out" in line


def test_other_texts_that_are_none(eve_checkpoint, files, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    base = ("evaluate", eve_checkpoint, "--data", files / "test.txt", "--output", tmp_path / "out")
    assert "--ood law" in (line := refused(*base, "--ood", f"law={tmp_path / 'empty.txt'}", code=1))
    assert "empty" in line
    assert "write --ood NAME=FILE" in refused(*base, "--ood", "law.txt", code=1)
    twice = ("--ood", f"a={files / 'other.txt'}", "--ood", f"a={files / 'valid.txt'}")
    assert "names a twice" in refused(*base, *twice, code=1)
    assert "is no file" in refused(*base, "--ood", "law=nothing.txt", code=1)


def test_names_that_are_unknown(eve_checkpoint, files, tmp_path, monkeypatch):
    base = ("--output", tmp_path / "out", *OPTIONS)
    assert "nothing.txt is no file" in refused("evaluate", eve_checkpoint, "--data", "nothing.txt", *base, code=1)

    def offline(*arguments, **options):
        raise ConnectionError("no route to the host")

    monkeypatch.setattr("datasets.load_dataset", offline)
    line = refused("evaluate", eve_checkpoint, "--data", "nobody/nothing", *base, code=1)
    assert "nobody/nothing cannot be loaded (no route to the host)" in line and "give a text file" in line
    options = ("--data", files / "test.txt", *base)
    assert "is no folder" in refused("evaluate", eve_checkpoint, *options, "--compare", "twin=./nothing", code=1)


def test_logits_that_are_not_numbers(eve_checkpoint, files, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(eve_checkpoint)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    save_for_hub(model, tmp_path / "broken", tokenizer)
    options = ("--data", files / "test.txt", "--output", tmp_path / "out", *OPTIONS)
    line = refused("evaluate", tmp_path / "broken", *options, code=1)
    assert "broken: The logits of batch 0, row 0" in line


def test_ensembles_that_are_none(eve_checkpoint, twin_checkpoint, files, tmp_path):
    options = ("--data", files / "test.txt", "--output", tmp_path / "out", *OPTIONS)
    line = refused("evaluate", eve_checkpoint, *options, "--ensemble", twin_checkpoint, code=1)
    assert "two members or more" in line


def test_models_of_other_tokens(eve_checkpoint):
    model = AutoModelForCausalLM.from_pretrained(eve_checkpoint)
    other = AutoModelForCausalLM.from_pretrained(gpt2_like())
    with pytest.raises(ValueError, match=r"other has a vocabulary of 40 tokens and the model one of 320"):
        contenders.baselines_of(model, 2, compared={"other": (other, "other")})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--baselines",), "--baselines needs --output"),
        (("--ood", "a=b"), "--ood needs --output"),
        (("--output", "OUT", "--max-batches", 2), "--max-batches has no effect with --output"),
        (("--output", "OUT", "--data", "other.txt"), "--output is of one text, and --data names 2"),
        (("--output", "OUT", "--target-risk", 1.5), "--target-risk is 1.5"),
        (("--output", "OUT", "--max-sequences", 1), "--max-sequences is 1"),
    ],
)
def test_options_that_do_not_go_together(eve_checkpoint, files, tmp_path, options, message):
    options = [tmp_path / "out" if option == "OUT" else option for option in options]
    assert message in refused("evaluate", eve_checkpoint, "--data", files / "test.txt", *options)


def test_an_output_that_is_no_report(eve_checkpoint, files, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    base = ("evaluate", eve_checkpoint, "--data", files / "test.txt", "--overwrite", "--output")
    assert "has no report in it to overwrite" in refused(*base, tmp_path, code=1)
    assert "is a file" in refused(*base, tmp_path / "mine.txt", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
