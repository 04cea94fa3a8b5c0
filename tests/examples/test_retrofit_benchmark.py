"""The benchmark of retrofits runs from files to tables on a tiny model, and reads the numbers as it should."""

import json
import lzma
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_variational.training.data import load_text, train_tokenizer

STORY = "The with statement is used to wrap the execution of a block with methods. "
SOURCE = "def f(x):\n    return x + 1\n\n"


@pytest.fixture
def files(tmp_path):
    """A model, and texts in every form that is read."""
    tokenizer = train_tokenizer(load_text("pydoc_data.topics"), vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    # right now and then, or there are no right tokens to tell from wrong ones
    optimizer, ids = torch.optim.Adam(model.parameters(), lr=1e-2), torch.tensor([tokenizer(STORY)["input_ids"]])
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with lzma.open(tmp_path / "train.jsonl.xz", "wt") as lines:
        lines.writelines(json.dumps({"text": STORY * 5}) + "\n" for _ in range(6))
    (tmp_path / "test.txt").write_text(STORY * 20)
    with lzma.open(tmp_path / "code.txt.xz", "wt") as text:
        text.write(SOURCE * 30)
    (tmp_path / "law.txt").write_text("Article 5 shall apply. " * 30)
    return tmp_path


@pytest.fixture
def options(files):
    given = {
        "train": files / "train.jsonl.xz",
        "test": files / "test.txt",
        "low-entropy": "code",
        "samples": 2,
        "length": 16,
        "calibration": 4,
        "test-sequences": 4,
        "windows": 6,
        "steps": 2,
        "batch-size": 2,
        "train-samples": 2,
        "rank": 2,
        "control-rank": 2,
        "output": files / "tables.md",
        "json": files / "numbers.json",
    }
    listed = [str(files / "model"), "--other", f"code={files / 'code.txt.xz'}", "--other", f"law={files / 'law.txt'}"]
    return listed + [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_from_files_to_tables(load, files, options, capsys):
    script = load("retrofit_on_pretrained")
    result = script.main([*options, "--seeds", "0"])
    (seed,) = result["seeds"]
    models = ("base", "fit_scale", "trained", "control")
    assert set(seed["rows"]) == {name + suffix for name in models for suffix in ("", ", temperature")}
    for name, row in seed["rows"].items():
        assert 0 < row["nll"] < math.log(300) + 0.5 and 0 <= row["ece"] <= 1
        assert set(row["domains"]) == {"code", "law"} and 0 <= row["domains"]["law"]["predictive_entropy"] <= 1
        assert ("mutual_information" in row["domains"]["code"]) is not name.startswith(("base", "control"))
        assert (row["temperature"] == 1) is not name.endswith("temperature")
    plain, tempered = (seed["rows"]["trained" + suffix] for suffix in ("", ", temperature"))
    assert plain["domains"]["code"]["mutual_information"] == tempered["domains"]["code"]["mutual_information"]
    assert seed["training"]["steps"] == 2 and seed["training"]["parameters"] == 2 * (24 + 2 * 2 * 24)
    assert seed["control"]["steps"] == 2 and seed["control"]["parameters"] == 2 * 2 * (24 + 16)
    assert seed["control"]["learning_rate"] in (2e-3, 5e-3, 1e-2)
    assert seed["rows"]["control"]["nll"] != seed["rows"]["base"]["nll"]
    tables = (files / "tables.md").read_text()
    assert tables in capsys.readouterr().out
    assert "| base, temperature |" in tables and "| code | law | mean |" in tables and "| met |" in tables

    # seeds that are there are not run again
    more = script.main([*options, "--seeds", "0", "1"])
    assert [run["seed"] for run in more["seeds"]] == [0, 1] and more["seeds"][0] == seed
    assert "(" in (files / "tables.md").read_text().splitlines()[4]
    with pytest.raises(SystemExit):
        script.main([*options, "--steps", "3"])


def test_what_it_does_not_take(load, files, options, capsys):
    script = load("retrofit_on_pretrained")
    for wrong, message in (
        (["--other", "law.txt"], "expected NAME=FILE, got 'law.txt'"),
        (["--low-entropy", "verse"], "'verse' is none of code, law"),
    ):
        with pytest.raises(SystemExit):
            script.main([*options, *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="--calibration 999 leaves none"):
        script.main([*options, "--calibration", "999"])
    with pytest.raises(ValueError, match="length=5000 fits"):
        script.main([*options, "--length", "5000"])


def test_the_first_share_of_a_text_is_left_to_tuning(load, files):
    script = load("retrofit_on_pretrained")
    whole = "".join(f"line {number}\n" for number in range(20_000))
    (files / "long.txt").write_text(whole)
    for share in (0.0, 0.3, 0.5, 0.99):
        pieces = script.read_pieces(str(files / "long.txt"), start=share)
        assert "".join(pieces).rstrip("\n") == whole[int(share * (len(whole) + 2)) :].rstrip("\n")
        assert max(map(len, pieces)) <= script.PIECE
    assert "".join(script.read_pieces(str(files / "train.jsonl.xz"))).count(STORY + "\n\n") == 6


def test_plain_text(load):
    script = load("retrofit_on_pretrained")
    assert script.plain_text("a\n \n\nb — “c”\r\nd’s…") == 'a\nb - "c"\nd\'s...'
    for text in ("“c”", "d’s", "a — b", "e…"):
        mangled = text.encode().decode("cp1252", "surrogateescape")
        mangled = "".join(chr(ord(c) - 0xDC00) if 0xDC80 <= ord(c) <= 0xDCFF else c for c in mangled)
        assert mangled != text and script.plain_text(mangled) == script.plain_text(text)


def test_data_is_dealt_by_the_seed(load):
    script = load("retrofit_on_pretrained")
    windows = [[number] for number in range(20)]
    calibration, training = script.dealt(windows, 5, 0)
    assert sorted(row["input_ids"][0] for row in calibration + training) == list(range(20))
    assert script.dealt(windows, 5, 0) == (calibration, training) != script.dealt(windows, 5, 1)


def test_the_targets_are_read_off_the_rows(load):
    tables = load("retrofit_tables")

    def row(likelihood, ece, wrong, **measures):
        return {"nll": likelihood, "ece": ece, "wrong": {"predictive_entropy": wrong}, "domains": {"code": measures}}

    rows = {
        "base": row(2.0, 0.04, 0.80, predictive_entropy=0.95),
        "base, temperature": row(1.99, 0.02, 0.80, predictive_entropy=0.96),
        "fit_scale": row(1.99, 0.03, 0.81, predictive_entropy=0.96, mutual_information=0.93, nll=0.99),
        "fit_scale, temperature": row(1.99, 0.02, 0.81, predictive_entropy=0.955, mutual_information=0.93, nll=0.99),
        "trained": row(1.97, 0.01, 0.79, predictive_entropy=0.96, mutual_information=0.97, nll=0.99),
        "trained, temperature": row(1.96, 0.02, 0.79, predictive_entropy=0.96, mutual_information=0.97, nll=0.99),
    }
    lines = tables.targets_table([{"rows": rows}], "code").splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [cell[3] for cell in cells] == ["yes", "no", "yes", "yes", "yes", "no", "yes", "yes", "no"]
    assert cells[0][1:3] == ["at most -0.30%", "-0.50%"] and cells[1][1:3] == ["at most 0.70", "0.75"]
    assert cells[2][0].startswith("posterior trained, temperature") and cells[2][2] == "-1.51%"
    assert "mutual_information, posterior trained" in cells[4][0] and cells[4][1:3] == ["above 0.960", "0.970"]
