import json
import math
import signal

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from searches import comparable, files, run
from transformers import TrainerCallback

from hf_variational.autopilot import runs as runs_module
from hf_variational.autopilot.sampling import Halved
from hf_variational.autopilot.study import open_study, storage_of
from hf_variational.training import program
from hf_variational.training.recipe import load_recipe

RATE = "arguments.learning_rate"
SCALE = "model.eve.initial_scale"
# of fewer than eight trials the better quarter is the best
TWO = {RATE: {"choices": [1e-6, 2e-2]}, "halving": {"factor": 4}}
SPACE = {
    RATE: {"low": 1e-3, "high": 2e-2, "log": True},
    "model.eve.prior": {"choices": ["standard", "centered"]},
    "model.variational_layers": {"choices": [[1], [0, 1]]},
    "gates": {"eval_mutual_information": {"min": 1e-7}},
    "halving": {"factor": 2},
}
INFORMATION = "eval_mutual_information"


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def interrupt(monkeypatch, trial, step):
    """Ctrl-C in the given trial of the next search, counted from 0."""
    inner, made = runs_module.make_trainer, []

    def make(*arguments):
        trainer = inner(*arguments)
        if len(made) == trial:
            trainer.add_callback(StopAt(step))
        made.append(trainer)
        return trainer

    monkeypatch.setattr(runs_module, "make_trainer", make)


def test_halving_keeps_the_better_of_two_known_recipes(tmp_path):
    outcome = run(tmp_path, TWO, trials=9)
    good = [row for row in outcome.rows if row.values[RATE] == 2e-2]
    bad = [row for row in outcome.rows if row.values[RATE] == 1e-6]
    assert good and len(bad) > 1
    assert outcome.best.row.values[RATE] == 2e-2
    assert {row.state for row in good} == {"complete"} and len({row.nll for row in good}) == 1
    later = [row for row in bad if row.number > good[0].number]
    assert later and all(row.state == "pruned" and row.curve[-1][0] == 2 for row in later)
    assert [row.curve[-1][0] for row in good] == [6] * len(good)


def pruned(values, factor, min_resource=1, steps=8, interrupted=()):
    """Which of the trials with these values at every step are stopped, and at which step."""
    study = optuna.create_study(pruner=Halved(min_resource=min_resource, reduction_factor=factor))
    stopped = []
    for number, value in enumerate(values):
        trial = study.ask()
        trial.set_user_attr("max_steps", steps)
        ended = None
        for step in range(1, steps + 1):
            trial.report(value, step)
            if trial.should_prune():
                ended = step
                break
        state = TrialState.PRUNED if ended else TrialState.COMPLETE
        if number in interrupted:
            state = TrialState.FAIL
        study.tell(trial, None if state != TrialState.COMPLETE else value, state=state)
        stopped.append(ended)
    return stopped


def test_halving_by_hand():
    # of 1, 2, 3 ... trials at the first rung the better half is 1, 1, 1, 2, 2
    assert pruned([3.0, 4.0, 2.0, 2.5, 1.0], factor=2) == [None, 1, None, 2, None]
    # trained to its end it is left alone, though it is the worse at the rung of the last step
    assert pruned([1.0, 2.0], factor=2, min_resource=8) == [None, None]


def test_an_interrupted_trial_does_not_halve_others():
    assert pruned([1.0, 2.0], factor=2, interrupted=(0,)) == [None, None]
    assert pruned([1.0, 2.0], factor=2) == [None, 1]


def test_a_search_that_stops_and_goes_on_is_one_that_did_not_stop(tmp_path, monkeypatch):
    whole = run(tmp_path, SPACE, "whole", trials=5)
    run(tmp_path, SPACE, "parts", trials=2)
    with monkeypatch.context() as patch:
        interrupt(patch, trial=1, step=1)
        with pytest.raises(KeyboardInterrupt, match=r"keeps 3 trials; the same command goes on"):
            run(tmp_path, SPACE, "parts", trials=5)
    parts = run(tmp_path, SPACE, "parts", trials=5)
    assert comparable(parts) == comparable(whole)
    assert (whole.interrupted, parts.interrupted) == (0, 1)
    assert parts.best.row.values == whole.best.row.values
    assert (tmp_path / "parts" / "best.yaml").read_text().replace("parts", "whole") == (
        tmp_path / "whole" / "best.yaml"
    ).read_text().replace(f"Trial {whole.best.row.number}", f"Trial {parts.best.row.number}")
    again = run(tmp_path, SPACE, "parts", trials=5, seeds=0)
    assert comparable(again) == comparable(whole), "a search that is done does nothing"


def test_a_trial_that_was_killed_is_repeated(tmp_path):
    run(tmp_path, SPACE, trials=1)
    storage = storage_of(tmp_path / "found")
    study = optuna.load_study(study_name="autopilot", storage=storage)
    study.ask()
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.RUNNING]
    outcome = run(tmp_path, SPACE, trials=2)
    assert len(outcome.rows) == 2 and outcome.interrupted == 1
    assert [trial.state for trial in open_study(storage, "nll").trials][1] == TrialState.FAIL


def test_a_gate_is_worth_more_than_nll(tmp_path):
    space = {SCALE: {"choices": [1e-4, 0.5]}, "gates": {INFORMATION: {"min": 1e-6}}, "halving": {"factor": 2}}
    outcome = run(tmp_path, space, trials=5)
    silent = [row for row in outcome.rows if row.values[SCALE] == 1e-4]
    loud = [row for row in outcome.rows if row.values[SCALE] == 0.5]
    assert silent and loud
    for row in silent:
        assert row.violations[INFORMATION] == pytest.approx(1 - row.metrics[INFORMATION] / 1e-6)
        assert row.violations[INFORMATION] > 0
    assert not any(row.missed for row in loud)
    assert outcome.best.row.values[SCALE] == 0.5
    assert all(row.state == "pruned" for row in silent if row.number > loud[0].number)
    study = optuna.load_study(study_name="autopilot", storage=storage_of(tmp_path / "found"))
    assert study.best_trial.params[SCALE] == "0.5"
    assert study.trials[silent[0].number].constraints[INFORMATION] == silent[0].violations[INFORMATION]


def test_a_gate_that_no_trial_passes(tmp_path):
    space = {RATE: SPACE[RATE], "gates": {INFORMATION: {"min": 5.0}}}
    with pytest.raises(ValueError, match=r"No trial passes the gates.*eval_mutual_information ≥ 5 \(it has .*\)"):
        run(tmp_path, space, trials=2)
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert results["best"] is None and len(results["trials"]) == 2
    assert not (tmp_path / "found" / "best.yaml").exists()
    assert "no best recipe" in (tmp_path / "found" / "report.html").read_text()


def test_a_gate_on_the_regime(tmp_path):
    space = {"arguments.regime.band.target": {"choices": [1e-3, 1e12]}, "gates": {"eval_regime_inside": {"min": 0.5}}}
    band = {"low_factor": 1e-11, "high_factor": 1e6, "target": 1.0}
    outcome = run(tmp_path, space, trials=3, arguments={"regime": {"band": band}})
    inside = {row.values["arguments.regime.band.target"]: row.metrics["eval_regime_inside"] for row in outcome.rows}
    assert inside == {1e-3: 1.0, 1e12: 0.0}
    assert outcome.best.row.values["arguments.regime.band.target"] == 1e-3


def test_a_gate_on_what_is_not_measured(tmp_path):
    space = {RATE: SPACE[RATE], "gates": {"eval_regime_isnide": {"min": 0.5}}}
    with pytest.raises(ValueError, match=r"`gates` names eval_regime_isnide.*eval_nll"):
        run(tmp_path, space)


def test_values_that_exclude_each_other_fail_alone(tmp_path):
    space = {"model.num_attention_heads": {"choices": [1, 2, 3]}}
    outcome = run(tmp_path, space, trials=6)
    failed = [row for row in outcome.rows if row.state == "failed"]
    assert failed and all(row.values["model.num_attention_heads"] == 3 and row.error for row in failed)
    assert len(outcome.rows) == 6 and outcome.best.row.values["model.num_attention_heads"] != 3
    assert failed[0].error in (tmp_path / "found" / "report.html").read_text()


def test_a_space_in_which_nothing_can_be_trained_is_given_up(tmp_path):
    space = {"model.num_attention_heads": {"choices": [3, 5]}}
    with pytest.raises(ValueError, match="None of the first 3 trials could be trained"):
        run(tmp_path, space, trials=9)
    assert len(optuna.load_study(study_name="autopilot", storage=storage_of(tmp_path / "found")).trials) == 3


def test_the_best_recipe_trains_to_the_trials_nll(tmp_path):
    outcome = run(tmp_path, SPACE, trials=3)
    recipe = load_recipe(tmp_path / "found" / "best.yaml")
    assert recipe.arguments["output_dir"] == str(tmp_path / "found" / "best")
    values = outcome.best.row.values
    assert recipe.arguments["learning_rate"] == values[RATE]
    assert recipe.model["variational_layers"] == values["model.variational_layers"]
    trainer = program.run(recipe)
    metrics = json.loads((tmp_path / "found" / "best" / "metrics.json").read_text())["evaluation"]
    assert trainer.state.global_step == 6 and metrics["eval_nll"] == outcome.best.row.nll


def test_an_evaluation_at_the_end_is_made_where_the_steps_have_none(tmp_path):
    outcome = run(tmp_path, {RATE: SPACE[RATE]}, trials=1, arguments={"max_steps": 5})
    assert [step for step, *_ in outcome.rows[0].curve] == [2, 4, 5]


def test_trials_leave_numbers_and_no_weights(tmp_path):
    run(tmp_path, SPACE, trials=2)
    assert not list((tmp_path / "found").rglob("*.safetensors")) and not (tmp_path / "found" / "running").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe, space: space.update({SCALE: {"low": 0.1, "high": 0.2}}), f"{SCALE}.*nothing"),
        (lambda recipe, space: space[RATE].update(high=0.03), r"high=0\.02, and this one 0\.03"),
        (lambda recipe, space: recipe["model"].update(hidden_size=32), "hidden_size=16, and this one 32"),
    ],
)
def test_another_search_in_the_folder_is_refused(tmp_path, change, message):
    run(tmp_path, SPACE, trials=1)
    recipe, space = json.loads((tmp_path / "recipe.yaml").read_text()), json.loads(json.dumps(SPACE))
    change(recipe, space)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    (tmp_path / "space.yaml").write_text(json.dumps(space))
    from hf_variational.autopilot import search

    with pytest.raises(ValueError, match=message):
        search(tmp_path / "recipe.yaml", tmp_path / "space.yaml", tmp_path / "found", trials=2, progress=False)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        run(tmp_path, SPACE)


def test_two_searches_in_one_folder(tmp_path):
    filelock = pytest.importorskip("filelock")
    (tmp_path / "found").mkdir()
    with filelock.FileLock(tmp_path / "found" / ".lock"), pytest.raises(ValueError, match="Another search is at work"):
        run(tmp_path, SPACE)


def test_a_budget_ends_the_trials_and_counts_over_calls(tmp_path):
    first = run(tmp_path, SPACE, trials=1, budget=3600)
    study = optuna.load_study(study_name="autopilot", storage=storage_of(tmp_path / "found"))
    assert study.user_attrs["seconds"] == first.facts["seconds"] == first.rows[0].seconds > 0
    study.set_user_attr("seconds", 2500.0)
    second = run(tmp_path, SPACE, trials=50, budget=3600, seeds=1)
    assert comparable(second) == comparable(first), "no trial begins after two thirds"
    assert second.best.shared == (1,), "the rest is for the last rung"
    study.set_user_attr("seconds", 3700.0)
    third = run(tmp_path, SPACE, trials=50, budget=3600, seeds=2)
    assert third.best.shared == (1,) and third.facts["seconds"] == 3700.0
    page = (tmp_path / "found" / "report.html").read_text()
    assert "1 of 50 trials are done" in page and "Of 2 further seeds the whole last rung has run 1." in page


def test_what_halving_needs(tmp_path):
    with pytest.raises(ValueError, match=r"set arguments.eval_strategy=steps"):
        run(tmp_path, SPACE, arguments={"eval_strategy": "no"})
    with pytest.raises(ValueError, match=r"set `halving: \{min_steps"):
        run(tmp_path, SPACE, arguments={"eval_strategy": "epoch"})
    outcome = run(tmp_path, SPACE, trials=1, arguments={"eval_steps": 0.5})
    assert outcome.facts["first_rung"] == 3


def test_what_is_refused_before_a_trial(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="objective='loss' is unknown"):
        run(tmp_path, SPACE, objective="loss")
    recipe, space = files(tmp_path, SPACE)
    content = json.loads(recipe.read_text())
    content["data"].pop("validation_fraction")
    recipe.write_text(json.dumps(content))
    from hf_variational.autopilot import search

    with pytest.raises(ValueError, match=r"holds no text out.*data.validation"):
        search(recipe, space, tmp_path / "found", progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="in one process"):
        run(tmp_path, SPACE)


def test_seeds_are_recorded(tmp_path):
    run(tmp_path, {RATE: SPACE[RATE]}, trials=1, seeds=2, arguments={"seed": 5})
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert results["seed"] == 5 and results["further_seeds"] == [6, 7]
    assert results["last_rung"][0]["seeds"] == [6, 7]
    assert yaml.safe_load((tmp_path / "found" / "best.yaml").read_text())["arguments"]["seed"] == 5
    assert all(math.isfinite(run["eval_nll"]) for run in results["last_rung"][0]["runs"].values())


def test_the_samplers_next_proposal_follows_from_the_finished_trials():
    from hf_variational.autopilot.sampling import RepeatableSampler

    def study_of(fail):
        study = optuna.create_study(sampler=RepeatableSampler(7))
        for number in range(14):
            if number == fail:
                study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), state=TrialState.FAIL)
            trial = study.ask()
            study.tell(trial, (trial.suggest_float("x", 0, 1) - 0.3) ** 2)
        return [trial.params["x"] for trial in study.trials if trial.state == TrialState.COMPLETE]

    assert study_of(None) == study_of(5) == study_of(13)
    assert len(set(study_of(None))) == 14


def test_the_importance_is_of_the_trials_that_ended():
    from hf_variational.autopilot.importance import importance_of

    study = optuna.create_study()
    for x in (0.1, 0.5, 0.9, 0.3):
        trial = study.ask()
        trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        trial.set_user_attr("metrics", {"eval_nll": x})
        study.tell(trial, x)
    shares = importance_of(study, "nll")["eval_nll"]
    assert set(shares) == {"x", "y"} and sum(shares.values()) == pytest.approx(1)
    assert importance_of(optuna.create_study(), "nll") == {}
