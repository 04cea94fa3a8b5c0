"""The three short trainings behind the pictures of docs/regimes.md, at toy size."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_three_runs_make_two_pictures_and_numbers(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import three_layers

    text = tmp_path / "some.txt"
    text.write_text("".join(f"{number} green bottles hanging on the wall.\n" for number in range(800)))
    output = tmp_path / "images"
    found = three_layers.main(["--text", str(text), "--steps", "2", "--units", "8", "--output", str(output)])
    assert list(found) == ["healthy", "collapsed", "exploding"]
    for numbers in found.values():
        assert numbers["units"] == 8 and abs(numbers["under"] + numbers["inside"] + numbers["over"] - 1) < 1e-6
        assert numbers["nll"] > 0
    assert {file.name for file in output.iterdir()} == {"three_layers.png", "three_runs.png"}
    assert all(file.stat().st_size < 100_000 for file in output.iterdir())
    assert "collapsed: units 8" in capsys.readouterr().out
