import json
import re
import sys

import pytest
from searches import files, run
from typer.testing import CliRunner

from hf_variational.cli import app
from hf_variational.presentation.autopilot import notes_of
from hf_variational.presentation.autopilot_plots import FIGURES

RATE = "arguments.learning_rate"
SPACE = {
    RATE: {"low": 1e-3, "high": 2e-2, "log": True},
    "model.eve.prior": {"choices": ["standard", "centered"]},
    "gates": {"eval_mutual_information": {"min": 1e-7}},
    "halving": {"factor": 2},
}


def invoke(*arguments):
    result = CliRunner().invoke(app, ["autopilot", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_searches_and_goes_on(tmp_path):
    recipe, space = files(tmp_path, SPACE)
    asked = (recipe, "--space", space, "--output", tmp_path / "found", "--seeds", 2, "--budget", "1h")
    first = invoke(*asked, "--trials", 3)
    assert first.exit_code == 0
    assert [line.split()[:2] for line in first.stdout.splitlines() if line.startswith("trial")][:3] == [
        ["trial", "0"],
        ["trial", "1"],
        ["trial", "2"],
    ]
    assert re.search(r"trial \d is best: NLL \d\.\d{4} ± 0\.\d{4} over 2 further seeds", first.stdout)
    second = invoke(*asked, "--trials", 4)
    assert "trial 3 " in second.stdout and "trial 0 complete" not in second.stdout
    assert len(json.loads((tmp_path / "found" / "results.json").read_text())["trials"]) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--budget", "soon"), "'soon' is no time: write 2h, 90m, 30s or 1h30m."),
        (("--trials", "0"), "--trials is 0: it must be 1 or more"),
        (("--seeds", "-1"), "--seeds is -1: it must be 0 or more"),
        (("arguments.max_stps=3",), "did you mean 'max_steps'"),
    ],
)
def test_bad_input_is_a_line(tmp_path, change, message):
    recipe, space = files(tmp_path, SPACE)
    result = invoke(recipe, "--space", space, "--output", tmp_path / "found", *change)
    assert result.exit_code in (1, 2) and message in " ".join(result.stderr.split())
    assert len(result.stderr.splitlines()) == 1


def test_files_that_are_not_there(tmp_path):
    recipe, space = files(tmp_path, SPACE)
    assert "RECIPE none.yaml is no file" in invoke("none.yaml", "--space", space).stderr
    assert "--space none.yaml is no file" in invoke(recipe, "--space", "none.yaml").stderr


def test_an_unknown_key_is_named_by_the_command(tmp_path):
    recipe, space = files(tmp_path, {"model.eve.priro": {"choices": ["standard"]}})
    result = invoke(recipe, "--space", space, "--output", tmp_path / "found")
    assert result.exit_code == 1 and "'priro': did you mean 'prior'?" in result.stderr


def test_without_optuna_the_command_says_how_to_install_it(tmp_path, monkeypatch):
    recipe, space = files(tmp_path, SPACE)
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = invoke(recipe, "--space", space, "--output", tmp_path / "found")
    assert result.exit_code == 1 and "pip install 'hf-variational[autopilot]'" in result.stderr


def test_the_page_works_offline_and_has_every_trial(tmp_path):
    space = {**SPACE, "gates": {"eval_mutual_information": {"min": 1e-4}}}
    outcome = run(tmp_path, space, trials=6, seeds=2)
    page = (tmp_path / "found" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!#)", page) and "<script" not in page
    assert all(f'<tr><th scope="row">{row.number}</th>' in page for row in outcome.rows)
    assert (tmp_path / "found" / "best.yaml").read_text().splitlines()[0].removeprefix("# ")[:20] in page
    drawn = {name for name, _, _, draw in FIGURES if draw(outcome) is not None}
    assert {"history", "slices"} <= drawn and "front" not in drawn
    assert {file.stem for file in (tmp_path / "found" / "plots").glob("*.png")} == drawn
    assert all(heading in page for name, heading, _, _ in FIGURES if name in drawn)
    notes = " ".join(notes_of(outcome))
    assert "the importances say next to nothing" in notes and re.search(r"can(not)? be told from trial", notes)
