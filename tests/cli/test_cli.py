"""The command line: what it prints, and one line for every wrong input."""

import io
import json
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from hf_variational.cli import app

runner = CliRunner()
TEXT = "The with statement is used to wrap the execution of a block. A compound statement has clauses.\n" * 3


def run(*arguments, stdin=None):
    result = runner.invoke(app, [str(a) for a in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments, code=2, stdin=None):
    """The line on stderr."""
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == code and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# ---- generate ----


def test_generate_prints_text_legend_and_tokens(eve_checkpoint):
    result = run("generate", eve_checkpoint, "--prompt", "The with", "--max-new-tokens", 5, "--samples", 3)
    assert result.exit_code == 0
    assert "The with" in result.stdout and "mutual information  0" in result.stdout
    assert "of the predictive entropy" in result.stdout


def test_json_has_every_measure_of_every_token_and_the_seed_decides(eve_checkpoint):
    arguments = ("generate", eve_checkpoint, "--prompt", "The with", "--max-new-tokens", 5, "--json", "--do-sample")
    first, again, other = (json.loads(run(*arguments, "--seed", seed).stdout) for seed in (1, 1, 2))
    assert first == again and first["tokens"] != other["tokens"]
    assert first["num_posterior_samples"] == 8 and first["prompt"] == "The with"
    assert 1 <= len(first["tokens"]) <= 5
    for token in first["tokens"]:
        assert 0 <= token["mutual_information"] <= token["predictive_entropy"]
        assert set(token) >= {"id", "piece", "text", "conditional_variance", "token_variance", "top1_flip_rate"}


def test_the_prompt_comes_from_the_standard_input(eve_checkpoint):
    result = run("generate", eve_checkpoint, "--prompt", "-", "--max-new-tokens", 2, "--json", stdin="A block\n")
    assert json.loads(result.stdout)["prompt"] == "A block\n"


def test_html_is_written(eve_checkpoint, tmp_path):
    page = tmp_path / "page.html"
    result = run("generate", eve_checkpoint, "--prompt", "The", "--max-new-tokens", 3, "--html", page)
    assert result.exit_code == 0 and f"wrote {page}" in result.stderr
    assert 'class="t' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["twin", "mean pass"])
def test_without_samples_there_is_text_and_a_notice(twin_checkpoint, eve_checkpoint, kind):
    model, extra = (twin_checkpoint, ()) if kind == "twin" else (eve_checkpoint, ("--samples", 0))
    result = run("generate", model, "--prompt", "The with", "--max-new-tokens", 3, *extra)
    assert result.exit_code == 0 and "no uncertainty to show" in result.stderr
    assert "The with" in result.stdout and "nats" not in result.stdout


def test_a_deterministic_model_has_no_samples(twin_checkpoint, tmp_path):
    line = refused("generate", twin_checkpoint, "--prompt", "The", "--samples", 4)
    assert "deterministic" in line and "--samples 0" in line
    page = tmp_path / "page.html"
    assert "deterministic" in refused("generate", twin_checkpoint, "--prompt", "The", "--html", page)
    assert not page.exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--prompt", "  "), ("--prompt is empty",)),
        (("--prompt", "a", "--samples", "-1"), ("--samples is -1", "0 or more")),
        (("--prompt", "a", "--max-new-tokens", "0"), ("--max-new-tokens is 0", "1 or more")),
        (("--prompt", "a", "--temperature", "0"), ("--temperature is 0.0", "--greedy")),
        (("--prompt", "a", "--temperature", "nan"), ("--temperature is nan",)),
        (("--prompt", "a", "--temperature", "1", "--greedy"), ("--temperature 1.0", "--greedy")),
        (("--prompt", "a", "--html", "/no/such/folder/page.html"), ("/no/such/folder/page.html",)),
        (("--prompt", "a", "--html", "page.html", "--samples", "0"), ("--html", "--samples 0")),
        (("--prompt", "a", "--device", "abacus"), ("--device abacus", "cpu")),
    ],
)
def test_wrong_options_of_generate(eve_checkpoint, options, parts):
    line = refused("generate", eve_checkpoint, *options)
    assert all(part in line for part in parts)


def test_an_empty_standard_input_is_an_empty_prompt(eve_checkpoint):
    assert "--prompt is empty" in refused("generate", eve_checkpoint, "--prompt", "-", stdin="")


def test_a_standard_input_that_is_no_text(eve_checkpoint, monkeypatch):
    import hf_variational.cli as cli

    monkeypatch.setattr(cli.sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x00"), encoding="utf-8"))
    with pytest.raises(cli.typer.Exit) as stop:
        cli.generate(eve_checkpoint, prompt="-")
    assert stop.value.exit_code == 2


def test_more_tokens_than_the_model_takes(eve_checkpoint):
    line = refused("generate", eve_checkpoint, "--prompt", "The", "--max-new-tokens", 500, code=1)
    assert "500" in line and "64 positions" in line


@pytest.mark.parametrize("option", [("--samples", "many"), ("--samples", "1.5"), ("--colour-by", "entropy")])
def test_values_of_the_wrong_type_name_the_option(eve_checkpoint, option):
    result = run("generate", eve_checkpoint, "--prompt", "a", *option)
    assert result.exit_code == 2 and option[0] in result.stderr and "Traceback" not in result.stderr


# ---- checkpoints that do not load ----


def test_a_folder_that_is_not_there():
    assert "./nothing is no folder" in refused("generate", "./nothing", "--prompt", "a", code=1)


def test_a_folder_without_a_checkpoint_names_the_ones_inside(eve_checkpoint, tmp_path):
    (tmp_path / "inside").symlink_to(eve_checkpoint)
    assert str(tmp_path / "inside") in refused("generate", tmp_path, "--prompt", "a", code=1)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("evaluate", tmp_path / "empty", "--data", __file__, code=1)


def copied(checkpoint, folder):
    import shutil

    return shutil.copytree(checkpoint, folder / "copy")


def test_truncated_weights(eve_checkpoint, tmp_path):
    folder = copied(eve_checkpoint, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert str(folder) in refused("generate", folder, "--prompt", "a", code=1)


def test_a_missing_tokenizer(eve_checkpoint, tmp_path):
    folder = copied(eve_checkpoint, tmp_path)
    for path in folder.glob("token*"):
        path.unlink()
    assert "tokenizer" in refused("generate", folder, "--prompt", "a", code=1)


def test_foreign_code_is_not_run_unasked(eve_checkpoint, tmp_path):
    folder = copied(eve_checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_type="somebody_elses", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    (folder / "config.json").write_text(json.dumps(config))
    assert "--trust-remote-code" in refused("generate", folder, "--prompt", "a", code=1)


# ---- evaluate ----


def test_evaluate_compares_the_samples_with_the_mean_pass(eve_checkpoint, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("def f(x):\n    return x\n" * 5)
    options = ("--data", text_file, "--data", other, "--samples", 2, "--block-size", 16)
    result = json.loads(run("evaluate", eve_checkpoint, *options, "--json").stdout)
    assert list(result["data"]) == [str(text_file), str(other)]
    for metrics in result["data"].values():
        assert metrics["samples"]["nll"] > 0 and metrics["mean_pass"]["nll"] > 0
        assert metrics["samples"]["mutual_information"] > 0
    table = run("evaluate", eve_checkpoint, *options).stdout
    assert "2 samples" in table and "mean pass" in table and "perplexity" in table and "other.txt" in table


def test_evaluate_a_deterministic_model(twin_checkpoint, text_file):
    result = json.loads(run("evaluate", twin_checkpoint, "--data", text_file, "--block-size", 16, "--json").stdout)
    assert result["num_posterior_samples"] == 0 and "samples" not in result["data"][str(text_file)]
    assert "mean pass" in run("evaluate", twin_checkpoint, "--data", text_file, "--block-size", 16).stdout
    assert "deterministic" in refused("evaluate", twin_checkpoint, "--data", text_file, "--samples", 2)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02binary", b"\xff\xfe\xfa latin"])
def test_files_that_hold_no_text(eve_checkpoint, tmp_path, content):
    path = tmp_path / "data.txt"
    path.write_bytes(content)
    assert str(path) in refused("evaluate", eve_checkpoint, "--data", path, code=1)


@pytest.mark.parametrize("option", [("--block-size", 1), ("--batch-size", 0), ("--max-batches", 0), ("--samples", -2)])
def test_wrong_numbers_of_evaluate(eve_checkpoint, text_file, option):
    assert f"{option[0]} is {option[1]}" in refused("evaluate", eve_checkpoint, "--data", text_file, *option)


def test_a_data_file_that_is_not_there(eve_checkpoint):
    assert "nothing.txt is no file" in refused("evaluate", eve_checkpoint, "--data", "nothing.txt")


# ---- train, demo, help ----


def test_wrong_recipes(tmp_path):
    assert "nothing.yaml is no file" in refused("train", tmp_path / "nothing.yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modle: {}\n")
    line = refused("train", recipe, code=1)
    assert "modle" in line and "model" in line


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "train.txt"
    text.write_text(TEXT * 5)
    path = tmp_path / "recipe.yaml"
    content = {
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "eve": {"initial_scale": 0.2},
        },
        "data": {"train": str(text), "block_size": 16},
        "tokenizer": {"vocab_size": 280},
        "arguments": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "save_steps": 1,
        },
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_train_a_recipe_and_generate_with_what_it_wrote(recipe, tmp_path):
    run_folder = tmp_path / "run"
    assert run("train", recipe).exit_code == 0
    result = run("generate", run_folder, "--prompt", "The", "--max-new-tokens", 3, "--samples", 2, "--json")
    assert all(token["mutual_information"] >= 0 for token in json.loads(result.stdout)["tokens"])
    assert "not empty" in last_line(run("train", recipe))
    assert run("train", recipe, "arguments.max_steps=2", "--resume").exit_code == 0
    assert (run_folder / "checkpoint-2").is_dir()
    assert "modell" in last_line(run("train", recipe, "modell.hidden_size=8"))


def last_line(result):
    """The trainer's own log may stand before it."""
    assert result.exit_code == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_an_interrupted_training_says_how_to_go_on(recipe, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt("Interrupted: checkpoint-1 is saved.")

    monkeypatch.setattr("hf_variational.training.program.run", interrupted)
    assert "checkpoint-1 is saved. Go on with --resume." in refused("train", recipe, code=130)


def test_wrong_options_of_demo(tmp_path):
    assert "--steps is 0" in refused("demo", "--steps", 0, "--output", tmp_path / "out")
    assert "nothing.txt is no file" in refused(
        "demo", "--text", tmp_path / "nothing.txt", "--output", tmp_path / "out"
    )
    (tmp_path / "mine.txt").write_text("keep me")
    assert "no demo wrote it" in refused("demo", "--quick", "--output", tmp_path, code=1)
    assert (tmp_path / "mine.txt").read_text() == "keep me" and not (tmp_path / "out").exists()


def test_a_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_VARIATIONAL_TRACEBACK", "1")
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="no demo wrote it"):
        run("demo", "--quick", "--output", tmp_path)


def test_the_commands_are_listed():
    result = run("--help")
    assert all(command in result.stdout for command in ("demo", "train", "generate", "evaluate", "inspect"))


def test_errors_have_no_traceback_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "hf_variational.cli", "generate", str(tmp_path / "nothing"), "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
