"""examples/retrofit_with_lora.py runs, and what it loads is what it saved."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = ["--steps", "8", "--block-size", "16", "--samples", "2", "--batch-size", "4", "--rank", "2", "--cpu"]


@pytest.fixture
def some_text(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("".join(f"{number} green bottles hanging on the wall.\n" for number in range(200)))
    return str(path)


def test_two_adapters_are_trained_saved_and_loaded(monkeypatch, tmp_path, some_text, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import retrofit_with_lora

    result = retrofit_with_lora.main(["--text", some_text, "--output", str(tmp_path / "out"), *SMALL])
    assert result["after"] < result["before"]
    assert result["loaded"] == pytest.approx(result["after"], rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["posterior", "task"]
    printed = capsys.readouterr().out
    assert "mutual information" in printed and "trainable params" in printed


def test_a_model_of_ones_own(monkeypatch, tmp_path, some_text, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import retrofit_with_lora

    retrofit_with_lora.save_tiny_model(str(tmp_path / "model"), retrofit_with_lora.load_text(some_text))
    options = ["--text", some_text, "--output", str(tmp_path / "out"), "--layers", "all", *SMALL, "--steps", "1"]
    result = retrofit_with_lora.main([str(tmp_path / "model"), *options])
    assert set(result["sizes"]) == {"task", "posterior"}
    assert (tmp_path / "out" / "posterior" / "README.md").is_file()
