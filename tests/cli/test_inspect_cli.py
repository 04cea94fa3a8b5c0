"""`hf-variational inspect`: its page, its numbers, what it prints, and a line for every wrong input."""

import json
import re

import pytest
import torch
from test_cli import TEXT, refused, run
from transformers import AutoModelForCausalLM

from hf_variational import save_for_hub
from hf_variational.diagnostics import Band, Diagnostics, diagnose
from hf_variational.evaluation.report import text_rows

OPTIONS = ("--length", 16, "--batch-size", 3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text("".join(f"{n * 7919 % 1000} + {n * 31 % 97} = {n}\n" for n in range(40)))
    return folder


@pytest.fixture(scope="module")
def troubled_checkpoint(eve_checkpoint, tokenizer, tmp_path_factory):
    """The model with a unit that is dead and one that explodes."""
    model = AutoModelForCausalLM.from_pretrained(eve_checkpoint)
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[5] = 0.0
        mlp.eve.prior_mean[5], mlp.eve.prior_log_scale[5] = 0.0, mlp.eve.log_scale[5]
        mlp.up_proj.weight[9] *= 300.0
    folder = tmp_path_factory.mktemp("checkpoints") / "troubled"
    save_for_hub(model, folder, tokenizer)
    return str(folder)


def test_page_numbers_and_table(troubled_checkpoint, texts, tokenizer, tmp_path):
    page = tmp_path / "inside.html"
    band = ("--band-target", 0.5, "--band-low", 0.1, "--band-high", 10)
    result = run("inspect", troubled_checkpoint, "--data", texts / "text.txt", *band, "--output", page, *OPTIONS)
    assert result.exit_code == 0, result.stderr
    assert f"wrote {page}" in result.stderr
    assert "dead in layer 1: 5" in result.stdout and re.search(r"exploding in layer 1: .*\b9\b", result.stdout)
    found = Diagnostics.load(tmp_path / "inside.json")
    assert found.model == "troubled" and found.data == "text.txt"
    model = AutoModelForCausalLM.from_pretrained(troubled_checkpoint)
    rows = text_rows([TEXT], tokenizer, 16)
    expected = diagnose(
        model, rows, Band.homogeneous(0.5, 32, 0.1, 10.0), batch_size=3, name="troubled", data_name="text.txt",
        progress=False,
    )  # fmt: skip
    assert found.to_dict() == expected.to_dict()
    assert result.stdout.rstrip("\n") == expected.table()
    text = page.read_text(encoding="utf-8")
    assert "Inside troubled" in text and text.count("<svg") == 3 and "://" not in re.sub(r'xmlns\S*="[^"]*"', "", text)


def test_drift_against_a_checkpoint_a_file_and_a_text(troubled_checkpoint, eve_checkpoint, texts, tmp_path):
    base = ("--data", texts / "text.txt", *OPTIONS)
    assert run("inspect", eve_checkpoint, *base, "--output", tmp_path / "before.html").exit_code == 0
    by_model = run("inspect", troubled_checkpoint, *base, "--against", eve_checkpoint, "--output", tmp_path / "a.html")
    by_file = run(
        "inspect", troubled_checkpoint, *base, "--against", tmp_path / "before.json", "--output", tmp_path / "b.html"
    )
    assert by_model.exit_code == by_file.exit_code == 0, by_model.stderr + by_file.stderr
    assert "change of log μ²" in by_model.stdout and by_model.stdout == by_file.stdout
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "layer 1, unit 9" in page and "Drift is from eve on text.txt" in page
    assert page == (tmp_path / "b.html").read_text(encoding="utf-8")
    other = ("--other-data", texts / "other.txt", "--output", tmp_path / "c.html")
    assert run("inspect", troubled_checkpoint, *base, *other).exit_code == 0
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Drift is from troubled on text.txt" in page and "to troubled on other.txt" in page


def test_attention_alone(attention_checkpoint, texts, tmp_path):
    page = tmp_path / "inspect.html"
    result = run("inspect", attention_checkpoint, "--data", texts / "text.txt", "--output", page, *OPTIONS)
    assert result.exit_code == 0 and "concentration" in result.stdout and "dead" not in result.stdout
    assert "Attention heads" in page.read_text(encoding="utf-8")
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert set(found["heads"]) == {"0", "1"} and not found["layers"]
    line = refused(
        "inspect", attention_checkpoint, "--data", texts / "text.txt", "--band-target", 1, "--output", page, code=1
    )
    assert "--band-target is of the mean energy of variational neurons" in line


def test_a_model_without_neurons(twin_checkpoint, texts, tmp_path):
    line = refused("inspect", twin_checkpoint, "--data", texts / "text.txt", "--output", tmp_path / "a.html", code=1)
    assert "is deterministic: it has no variational neurons" in line and not (tmp_path / "a.html").exists()


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--band-target", -1), "target=-1.0", 1),
        (("--band-target", 1, "--band-low", 2, "--band-high", 0.5), "low_factor=2.0 must be below high_factor=0.5", 1),
        (("--band-low", 0.5), "--band-low needs --band-target", 1),
        (("--band-target", 1, "--band-spread", 0.5), "spread=0.5", 1),
        (("--samples", -1), "--samples is -1", 2),
        (("--batch-size", 0), "--batch-size is 0", 2),
        (("--output", "nowhere/inspect.html"), "folder that exists", 1),
        (("--output", "numbers.json"), "name it .html", 1),
        (("--against", "a", "--other-data", "b"), "leave one of them out", 2),
        (("--against", "nothing.json"), "nothing.json", 1),
        (("--data", "nothing.txt"), "nothing.txt is no file", 1),
    ],
)
def test_wrong_options(eve_checkpoint, texts, tmp_path, options, message, code):
    given = {"--data": texts / "text.txt", "--output": tmp_path / "inspect.html", "--length": 16}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    assert message in refused("inspect", eve_checkpoint, *[part for pair in given.items() for part in pair], code=code)


def test_a_file_of_something_else_and_a_text_that_is_too_short(eve_checkpoint, texts, tmp_path):
    (tmp_path / "other.json").write_text('{"format": 1}')
    (tmp_path / "short.txt").write_text("The with")
    base = ("--output", tmp_path / "inspect.html")
    line = refused(
        "inspect", eve_checkpoint, "--data", texts / "text.txt", "--length", 16, "--against", tmp_path / "other.json",
        *base, code=1,
    )  # fmt: skip
    assert "other.json: These are no diagnostics of format" in line
    line = refused("inspect", eve_checkpoint, "--data", tmp_path / "short.txt", *base, code=1)
    assert "--data: The text is shorter than a window" in line
