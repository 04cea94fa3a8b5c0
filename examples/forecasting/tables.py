"""The tables of the experiments, as markdown, from the file of finished runs."""

from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from hf_variational.evaluation.statistics import correlation, over_seeds, paired_difference

from .data import SOURCES
from .experiments import HIGH, LOW, OCTAVES, REGIMES, STARTS, TARGETS, TUNED, Run, compared, groups, tuning

TITLES = {
    ("dlinear", "mse"): "DLinear",
    ("twin", "mse"): "twin, MSE",
    ("eve", "mse"): "EVE, MSE",
    ("twin", "nll"): "twin, Gaussian",
    ("eve", "nll"): "EVE, NLL",
    ("eve", "mc_nll"): "EVE, MC-NLL",
}
# Marks a number that is of one seed.
ONE_SEED = "¹"
# A bootstrap over fewer settings says nothing.
LEAST_SETTINGS = 5
# Of the bootstrap of a correlation.
RESAMPLES = 1000
SETTINGS = ("objective", "latent_dim", "prior", "regime", "start", "target")


def shares(look: dict, target: float) -> tuple[float, float, float]:
    """Shares of the units under, inside and over the band of a target, of a look of the probe."""
    counts = np.asarray(look["counts"], dtype=float)
    upper = np.append(OCTAVES.numpy(), np.inf)
    lower = np.insert(OCTAVES.numpy(), 0, -np.inf)
    under = counts[upper <= np.log2(LOW * target) + 1e-9].sum()
    over = counts[lower >= np.log2(HIGH * target) - 1e-9].sum()
    total = counts.sum()
    return float(under / total), float((total - under - over) / total), float(over / total)


class Finished:
    """The finished runs, gathered over seeds."""

    def __init__(self, results: dict[str, dict], seeds: int = 3):
        self.results = results
        self.seeds = seeds

    def of(self, run: Run) -> list[dict]:
        """The results of a run's seeds, in their order, as far as they are there."""
        keys = [replace(run, seed=seed).key for seed in range(self.seeds)]
        return [self.results[key] for key in keys if key in self.results]

    def scores(self, run: Run, name: str, part: str = "test") -> list[float]:
        return [result[part][name] for result in self.of(run) if name in result[part]]

    def outside(self, run: Run, look: int = -1) -> list[tuple[float, float, float]]:
        return [shares(result["energy"][look], run.target) for result in self.of(run)]

    def groups(self) -> dict[str, list[Run]]:
        """The experiments with each run once, whatever its seed."""
        return {
            name: list(dict.fromkeys(replace(run, seed=0) for run in runs))
            for name, runs in groups(self.seeds).items()
        }


def cell(values: list[float], digits: int = 3, spread: bool = True) -> str:
    """Mean and standard deviation over seeds; says so where it is of one seed; a dash without any."""
    if not values:
        return "–"
    estimate = over_seeds(values)
    text = f"{estimate.mean:.{digits}f}"
    if len(values) == 1:
        return text + ONE_SEED
    return f"{text} ± {estimate.sd:.{digits}f}" if spread else text


def change(first: list[float], second: list[float]) -> str:
    """By how much the first is above the second, per cent of the second, with the interval over pairs of seeds."""
    # seeds are run in order, so what one has more than the other is at its end
    ratio = [100.0 * (a / b - 1.0) for a, b in zip(first, second, strict=False)]
    if not ratio:
        return "–"
    estimate = paired_difference(ratio, [0.0] * len(ratio))
    if estimate.interval is None:
        return f"{estimate.mean:+.1f} %{ONE_SEED}"
    low, high = estimate.interval
    return f"{estimate.mean:+.1f} % [{low:+.1f}, {high:+.1f}]"


def percent(values) -> str:
    one = ONE_SEED if len(values) == 1 else ""
    return "–" if not len(values) else f"{100 * float(np.mean(values)):.0f} %{one}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    text = "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
    return f"{text}\n\n{ONE_SEED} one seed" if ONE_SEED in text else text


def main_table(finished: Finished) -> str:
    parts = []
    head = ["model", "MSE", "MAE", "NLL", "CRPS", "pinball 0.1", "0.5", "0.9", "coverage", "width"]
    plain = ("pinball_0.1", "pinball_0.5", "pinball_0.9", "coverage_80", "width_80")
    for dataset in SOURCES:
        rows = []
        for (model, objective), title in TITLES.items():
            run = compared(dataset, model, objective)
            wide = [cell(finished.scores(run, name)) for name in ("mse", "mae", "nll", "crps")]
            rows.append([title, *wide, *(cell(finished.scores(run, name), spread=False) for name in plain)])
        parts.append(f"**{dataset}**\n\n" + table(head, rows))
    return "\n\n".join(parts)


def bars_table(finished: Finished) -> str:
    """The two bars of the comparison with the twin, and what the published reference leaves on the table."""
    rows = []
    for dataset in SOURCES:

        def of(model, objective, name, dataset=dataset):
            return finished.scores(compared(dataset, model, objective), name)

        gaussian = of("twin", "nll", "crps")
        rows.append(
            [
                dataset,
                change(of("eve", "mse", "mse"), of("twin", "mse", "mse")),
                change(of("eve", "mc_nll", "mse"), of("twin", "nll", "mse")),
                change(of("eve", "nll", "crps"), gaussian),
                change(of("eve", "mc_nll", "crps"), gaussian),
                change(of("eve", "mc_nll", "mse"), of("dlinear", "mse", "mse")),
            ]
        )
    head = ["", "MSE: EVE against twin", "MSE: EVE MC-NLL against Gaussian twin", "CRPS: EVE NLL against it"]
    return table([*head, "CRPS: EVE MC-NLL against it", "MSE: EVE MC-NLL against DLinear"], rows)


def regime_rows(finished: Finished, runs: list[Run], base) -> list[list[str]]:
    rows = []
    for run in runs:
        last = finished.outside(run)
        start = finished.outside(run, 0)
        column = [[look[place] for look in last] for place in range(3)]
        rows.append(
            [
                percent([look[1] for look in start]),
                *(percent(values) for values in column),
                cell(finished.scores(run, "mse")),
                cell(finished.scores(run, "crps")),
                "" if run == base(run) else change(finished.scores(run, "mse"), finished.scores(base(run), "mse")),
            ]
        )
    return rows


REGIME_HEAD = ["inside at the start", "under", "inside", "over at the end", "MSE", "CRPS", "MSE against off"]


def regimes_table(finished: Finished) -> str:
    runs = [Run(dataset, regime=regime) for dataset in SOURCES for regime in REGIMES]
    rows = regime_rows(finished, runs, lambda run: replace(run, regime="off"))
    names = [[run.dataset, run.regime] for run in runs]
    return table(["", "regime", *REGIME_HEAD], [a + b for a, b in zip(names, rows, strict=True)])


def starts_table(finished: Finished) -> str:
    runs = [Run("ETTh1", objective="nll", steps=100, start=start, regime=r) for start in STARTS for r in REGIMES]
    rows = regime_rows(finished, runs, lambda run: replace(run, regime="off"))
    names = [[f"× {run.start**2:.3g}", run.regime] for run in runs]
    return table(["μ² starts", "regime", *REGIME_HEAD], [a + b for a, b in zip(names, rows, strict=True)])


def bands_table(finished: Finished) -> str:
    runs = [Run("ETTh1", objective="nll", steps=100, target=t, regime=r) for t in TARGETS for r in REGIMES[1:]]
    rows = regime_rows(finished, runs, lambda run: replace(run, regime="off", target=Run.target))
    names = [[f"{run.target:g}", run.regime] for run in runs]
    return table(["target", "regime", *REGIME_HEAD], [a + b for a, b in zip(names, rows, strict=True)])


def varied_table(finished: Finished, head: str, runs: list[tuple[str, Run]]) -> str:
    """One row for each run, against the first of its data set."""
    rows, first = [], {}
    for title, run in runs:
        base = first.setdefault(run.dataset, run)
        scores = [cell(finished.scores(run, name)) for name in ("mse", "mae", "nll", "crps")]
        against = "" if run == base else change(finished.scores(run, "mse"), finished.scores(base, "mse"))
        seconds = [result["cpu_seconds"]["training"] for result in finished.of(run)]
        kl = cell(finished.scores(run, "kl"), 2)
        rows.append([title, *scores, kl, against, cell(seconds, 0, spread=False)])
    return table([head, "MSE", "MAE", "NLL", "CRPS", "KL", "MSE against the first", "CPU s"], rows)


def width_table(finished: Finished) -> str:
    runs = [run for run in finished.groups()["width"] if run.seed == 0]
    return varied_table(finished, "k", [(str(run.latent_dim), run) for run in runs])


def prior_table(finished: Finished) -> str:
    names = {"standard": "off", "autoregressive": "on, φ = 0.9", "learned": "on, φ learned"}
    runs = [
        (f"{dataset}, {title}", Run(dataset, prior=prior))
        for dataset in SOURCES
        for prior, title in names.items()
        if prior != "learned" or dataset == "ETTh1"
    ]
    return varied_table(finished, "autoregressive prior", runs)


def aggregation_table(finished: Finished) -> str:
    runs = [(a, Run("ETTh1", objective="mse", steps=100, aggregation=a)) for a in ("mean", "median", "score")]
    return varied_table(finished, "aggregation", runs)


class Point(NamedTuple):
    """A run: its setting, the share of its units out of the band, and the logarithm of its test MSE, less the mean of
    its family's runs and less that of those of its own seed.
    """

    setting: str
    outside: float
    error: float
    error_in_seed: float


def points(finished: Finished) -> dict[str, list[Point]]:
    """The runs of each family: one data set and one length of training, so that errors can be compared.

    The band is the one that all are judged by, around `Run.target`.
    """
    families = defaultdict(list)
    chosen = {
        run
        for name in ("regimes", "prior", "start", "band")
        for run in finished.groups()[name]
        if run.model == "eve" and run.objective != "mse"
    }
    for run in sorted(chosen, key=lambda run: run.key):
        setting = " ".join(str(getattr(run, name)) for name in SETTINGS)
        for seed, result in enumerate(finished.of(run)):
            outside = 1.0 - shares(result["energy"][-1], Run.target)[1]
            families[f"{run.dataset}, {run.steps} steps"].append(
                (setting, outside, seed, np.log(result["test"]["mse"]))
            )
    return {name: _against_means(runs) for name, runs in families.items()}


def _against_means(runs: list[tuple[str, float, int, float]]) -> list[Point]:
    seeds, errors = (np.array([run[place] for run in runs]) for place in (2, 3))
    means = {seed: errors[seeds == seed].mean() for seed in set(seeds)}
    return [
        Point(setting, outside, error - errors.mean(), error - means[seed]) for setting, outside, seed, error in runs
    ]


def correlation_table(finished: Finished) -> str:
    rows = []
    for name, runs in points(finished).items():
        settings = [run.setting for run in runs]
        if len(set(settings)) < LEAST_SETTINGS:
            continue
        numbers = {setting: place for place, setting in enumerate(dict.fromkeys(settings))}
        clusters = np.array([numbers[setting] for setting in settings])
        outside = np.array([run.outside for run in runs])
        found = []
        for error in ("error", "error_in_seed"):
            values = np.array([getattr(run, error) for run in runs])
            for kind in ("pearson", "spearman"):
                estimate = correlation(outside, values, clusters, kind=kind, num_resamples=RESAMPLES)
                low, high = estimate.interval
                found.append(f"{estimate.mean:+.2f} [{low:+.2f}, {high:+.2f}]")
        span = f"{outside.min():.2f} to {outside.max():.2f}"
        rows.append([name, str(len(runs)), str(len(numbers)), span, *found])
    head = ["", "runs", "settings", "share out of the band", "Pearson", "Spearman", "Pearson in a seed", "Spearman"]
    return table(head, rows)


def every_origin_table(finished: Finished) -> str:
    rows = []
    for dataset in SOURCES:
        some, every = (compared(dataset, "dlinear", "mse", stride=stride) for stride in (None, 1))
        rows.append([dataset, cell(finished.scores(every, "mse")), cell(finished.scores(some, "mse")[:1])])
    return table(["DLinear's MSE", "on every window", "on the windows of the tables"], rows)


def tuning_table(finished: Finished) -> str:
    """The mean squared error on the validation part, first seed."""
    columns = [tuning(dataset) for dataset in SOURCES]
    rows = []
    for runs in zip(*columns, strict=True):
        run = runs[0]
        chosen = TUNED[run.model] == (run.steps, run.learning_rate)
        scores = [cell(finished.scores(each, "mse", "validation")[:1]).removesuffix(ONE_SEED) for each in runs]
        rows.append([run.model, str(run.steps), f"{run.learning_rate:g}", *scores, "chosen" if chosen else ""])
    return table(["", "steps", "learning rate", *SOURCES, ""], rows)


TABLES = {
    "Models": main_table,
    "The bars": bars_table,
    "What the steps and the learning rate were chosen by": tuning_table,
    "The windows of the test": every_origin_table,
    "Regimes": regimes_table,
    "From a collapsed and from an exploding start": starts_table,
    "A band in another place": bands_table,
    "Out of the band, and the error": correlation_table,
    "Latent width": width_table,
    "Autoregressive prior": prior_table,
    "Aggregation": aggregation_table,
}


def write_tables(results: dict[str, dict], seeds: int = 3) -> str:
    """All tables, one section each."""
    finished = Finished(results, seeds)
    return "\n\n".join(f"## {title}\n\n{make(finished)}" for title, make in TABLES.items()) + "\n"
