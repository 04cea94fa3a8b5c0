"""The commands on a model whose attention alone is variational."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from hf_variational.cli import app

TEXT = "The with statement is used to wrap the execution of a block. A compound statement has clauses.\n" * 8


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_generate_measures_each_token(attention_checkpoint, tmp_path):
    page = tmp_path / "page.html"
    options = ("--prompt", "The with", "--max-new-tokens", 4)
    result = json.loads(run("generate", attention_checkpoint, *options, "--json").stdout)
    assert result["num_posterior_samples"] == 8
    assert any(token["mutual_information"] > 0 for token in result["tokens"])
    shown = run("generate", attention_checkpoint, *options, "--samples", 3, "--html", page)
    assert shown.exit_code == 0 and "mutual information  0" in shown.stdout and page.is_file()


def test_evaluate_compares_the_samples_with_the_mean_pass(attention_checkpoint, text_file):
    options = ("--data", text_file, "--samples", 2, "--block-size", 16, "--json")
    (metrics,) = json.loads(run("evaluate", attention_checkpoint, *options).stdout)["data"].values()
    assert metrics["samples"]["mutual_information"] > 0 and metrics["mean_pass"]["nll"] > 0


def test_train_and_generate_with_what_it_wrote(text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    content = {
        "model": {**sizes, "eve": None, "attention": {"kind": "gaussian", "initial_scale": 0.5}},
        "data": {"train": str(text_file), "block_size": 16},
        "tokenizer": {"vocab_size": 280},
        "arguments": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "report_to": "none", "save_steps": 1},
    }
    recipe.write_text(yaml.safe_dump(content))
    assert run("train", recipe).exit_code == 0
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())["facts"]
    assert 0 < facts["variational_parameters"] < facts["parameters"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "variational attention" in card and "`kind='gaussian'`" in card
    result = run("generate", tmp_path / "run", "--prompt", "The", "--max-new-tokens", 3, "--samples", 2, "--json")
    assert all(token["mutual_information"] >= 0 for token in json.loads(result.stdout)["tokens"])


def test_a_wrong_setting_is_one_line(text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    content = {
        "model": {"hidden_size": 16, "num_attention_heads": 2, "eve": None, "attention": {"kind": "dirichlet"}},
        "data": {"train": str(text_file), "block_size": 16},
        "arguments": {"output_dir": str(tmp_path / "run")},
    }
    recipe.write_text(yaml.safe_dump(content))
    result = run("train", recipe, "model.attention.knid=gaussian")
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "did you mean 'kind'" in result.stderr
