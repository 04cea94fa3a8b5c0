"""The forecasting experiments: a trained run, steered and not, what is kept of it, and the report."""

from dataclasses import replace

import pytest
import torch
from forecasting_series import HORIZON, LOOKBACK, UNITS, batch_of, tiny, tiny_parts

from examples.forecasting import data, experiments, figures, metrics, run, tables
from examples.forecasting.dlinear import DLinear
from examples.forecasting.trainer import ForecastTrainer
from hf_variational import VariationalTrainingArguments
from hf_variational.evaluation.streaming import mask_repeated_rows

# ---- Training ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_logs_and_scores(tmp_path, accumulation):
    parts = tiny_parts()
    args = VariationalTrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        eval_posterior_samples=4,
    )
    trainer = ForecastTrainer(tiny(objective="mc_nll"), args, train_dataset=parts["train"])
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "nll" in entry)
    assert {"kl", "kl/layer_0", "kl_weight", "mean_energy", "posterior_scale"} < set(logged)
    scores = trainer.evaluate(parts["test"])
    assert {"eval_crps", "eval_coverage_80", "eval_mean_pass_mse", "eval_kl", "eval_loss"} < set(scores)
    assert scores["eval_num_values"] == parts["test"].num_origins * HORIZON
    # each value counts once, however the test is cut into batches
    past, labels = batch_of(parts["test"], len(parts["test"]))
    with torch.no_grad():
        error = (trainer.model.eval()(past).forecast - labels)[labels != data.IGNORED].square().mean()
    assert scores["eval_mean_pass_mse"] == pytest.approx(error.item(), rel=1e-5)


def test_repeated_rows_of_any_labels_are_masked():
    class State:
        end_of_dataloader, remainder = True, 3

    class Accelerator:
        num_processes, process_index, gradient_state = 2, 1, State()

    for shape in ((2, 5), (2, 5, 3)):
        masked = mask_repeated_rows(torch.zeros(shape), Accelerator())
        assert (masked[0] == 0).all() and (masked[1] == data.IGNORED).all()


def test_dlinear_is_linear():
    model = DLinear(LOOKBACK, HORIZON, 5)
    past = torch.randn(2, 3, LOOKBACK)
    zero, one = model(torch.zeros_like(past)).forecast, model(torch.ones_like(past)).forecast
    expected = 3.0 * (model(past).forecast - zero) + one
    assert torch.allclose(model(3.0 * past + 1.0).forecast, expected, atol=1e-5)
    assert model(past, torch.zeros(2, 3, HORIZON)).loss.item() == pytest.approx(
        model(past).forecast.square().mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("model", experiments.MODELS)
def test_a_run(model):
    spec = experiments.Run("sine", model=model, objective="mse" if model == "dlinear" else "nll", steps=2, stride=2)
    options = {"lookback": LOOKBACK, "horizon": HORIZON, "units": UNITS, "moving_average": 5}
    result = experiments.execute(spec, tiny_parts(), **options)
    assert result["run"]["model"] == model and result["test"]["mse"] > 0 and len(result["log"]) == 2
    if model == "eve":
        assert [look["step"] for look in result["energy"]] == [0, 1, 2]
        assert all(sum(look["counts"]) == UNITS for look in result["energy"])


def test_runs_are_kept_and_not_repeated(tmp_path, monkeypatch, capsys):
    calls = []

    def execute(spec, parts):
        calls.append(spec)
        return {"run": {}, "test": {"mse": 1 / 3, "crps": 0.5}, "cpu_seconds": {"training": 1.0}}

    monkeypatch.setattr(run, "execute", execute)
    monkeypatch.setattr(run, "load", lambda *args, **kwargs: None)
    first = experiments.Run("ETTh1")
    second = replace(first, seed=1)
    run.train_missing([first], "", tmp_path)
    run.train_missing([first, second, second], "", tmp_path)
    assert calls == [first, second]
    assert run.read_results(tmp_path)[second.key]["test"]["mse"] == 0.33333


def test_no_two_runs_share_a_key():
    runs = [each for group in experiments.groups().values() for each in group]
    assert len({each.key for each in runs}) == len(set(runs))


@pytest.mark.parametrize(("regime", "start"), [("homeostasis", 8.0), ("homeostasis", 1 / 32), ("projection", 8.0)])
def test_a_steered_run_comes_into_its_band(regime, start):
    """From 64 times and from a thousandth of the usual mean energy, with the trainer's own control."""
    spec = experiments.Run("sine", objective="nll", start=start, regime=regime, steps=50)
    options = {"lookback": LOOKBACK, "horizon": HORIZON, "units": UNITS, "moving_average": 5}
    left_alone, steered = (
        experiments.execute(replace(spec, regime=name), tiny_parts(), **options)["energy"][-1]["mean"]
        for name in ("off", regime)
    )
    low, high = experiments.LOW * spec.target, experiments.HIGH * spec.target
    # what the task's gradient does between two control steps leaves some units a little over the end
    assert low <= steered <= 1.5 * high
    assert not low / 4 <= left_alone <= 4 * high


def test_learned_phi_is_trained():
    past, labels = batch_of(tiny_parts()["train"])
    model = tiny(eve={"prior": "autoregressive", "learn_autoregressive_coefficient": True}).train()
    model(past, labels).loss.backward()
    assert model.bank.prior_coefficient.grad.abs().sum() > 0


# ---- The report ----


def test_shares_of_a_histogram():
    model = tiny()
    probe = experiments.EnergyProbe(batch_of(tiny_parts()["train"])[0], 10)
    with torch.no_grad():
        model.bank.mean_weight.zero_()
        energies = torch.tensor([0.1, 0.13, 0.3, 0.49, 0.51, 2e9] * (UNITS // 6))
        model.bank.mean_bias.copy_(energies.sqrt())
    probe._look(0, model)
    shares = tables.shares(probe.history[0], 0.25)
    assert shares == pytest.approx((1 / 6, 3 / 6, 2 / 6))


def fake_results(seeds):
    """Numbers for every run: seeds differ, and the error rises with the share of units out of the band."""
    results = {}
    for spec in {each for group in experiments.groups(seeds).values() for each in group}:
        out = {"off": 0.5, "projection": 0.1, "homeostasis": 0.2}[spec.regime] + 0.01 * spec.seed
        counts = [0] * (len(experiments.OCTAVES) + 1)
        counts[73], counts[100] = round(1000 * (1 - out)), round(1000 * out)
        scores = dict.fromkeys(metrics.SCORES, 0.4) | {"kl": 1.0, "mse": 0.3 + 0.1 * out + 0.001 * spec.seed}
        if spec.model == "dlinear":
            scores.pop("nll")
        looks = [{"step": step, "counts": counts} for step in (0, spec.steps)]
        results[spec.key] = {
            "run": {},
            "test": scores,
            "mean_pass": scores,
            "validation": scores,
            "log": [{"step": 1, "nll": 1.0}, {"step": 2, "nll": 0.5}],
            "energy": looks if spec.model == "eve" else [],
            "cpu_seconds": {"training": 1.0, "test": 1.0},
        }
    return results


def test_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESAMPLES", 50)
    results = fake_results(2)
    text = tables.write_tables(results, 2)
    assert all(f"## {title}" in text for title in tables.TABLES)
    rows = [line for line in text.splitlines() if line.startswith("| ETTh1 | homeostasis")]
    assert rows and "80 %" in rows[0] and "-8." in rows[0]
    finished = tables.Finished(results, 2)
    (row, *_) = [line for line in tables.correlation_table(finished).splitlines() if line.startswith("| ETTh1, 150")]
    assert "+0.9" in row or "+1.0" in row
    figures.write_figures(results, tmp_path, 2)
    assert {path.name for path in tmp_path.glob("*.png")} == {f"{name}.png" for name in figures.FIGURES}


def test_a_report_of_nothing_yet(tmp_path):
    assert "–" in tables.write_tables({})
    figures.write_figures({}, tmp_path)


def test_one_seed_says_so():
    assert tables.cell([0.5]) == "0.500¹" and tables.cell([]) == "–"
    assert tables.change([1.1], [1.0]) == "+10.0 %¹" and tables.change([1.0], []) == "–"
    assert tables.table(["a"], [["0.500¹"]]).endswith("¹ one seed") and "¹" not in tables.table(["a"], [["b"]])
    assert tables.change([1.1, 1.2], [1.0, 1.0]).startswith("+15.0 % [")
