"""The tables of `retrofit_on_pretrained.py`, as Markdown."""

import statistics

from hf_variational.evaluation.domains import mean_over_domains

MODELS = {
    "base": "base",
    "fit_scale": "fit_scale, no training",
    "trained": "posterior trained",
    "control": "LoRA trained, no noise",
}
TEMPERED = ", temperature"
# What a temperature changes among the scores of a window; the other measures are those of the samples.
MOVED = ("predictive_entropy", "one_minus_confidence", "nll")
# These have to see the token that came.
OBSERVED = ("nll", "brier", "token_variance")


def over_seeds(values: list[float], digits: int = 4) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(row: str) -> str:
    name = row.removesuffix(TEMPERED)
    return MODELS[name] + row.removeprefix(name)


def predictions_table(seeds: list[dict]) -> str:
    rows = []
    for name in seeds[0]["rows"]:
        runs = [seed["rows"][name] for seed in seeds]
        rivals = [seed["rows"]["base" + TEMPERED] for seed in seeds]
        change = statistics.mean(run["nll"] / rival["nll"] - 1 for run, rival in zip(runs, rivals, strict=True))
        rows.append(
            [
                label(name),
                over_seeds([run["temperature"] for run in runs], 3) if name.endswith(TEMPERED) else "1",
                over_seeds([run["nll"] for run in runs]),
                f"{change:+.2%}",
                over_seeds([run["ece"] for run in runs]),
                over_seeds([run["accuracy"] for run in runs]),
                over_seeds([run["wrong"]["predictive_entropy"] for run in runs], 3),
            ]
        )
    columns = ["", "temperature", "NLL", "against the tempered base", "ECE", "accuracy"]
    return table([*columns, "wrong tokens, AUROC of the predictive entropy"], rows)


def mean_auroc(seeds: list[dict], row: str, measure: str, domain: str | None = None) -> list[float]:
    """Of each seed, for one other text or the mean over them."""
    found = []
    for seed in seeds:
        domains = seed["rows"][row]["domains"]
        found.append(mean_over_domains(domains)[measure] if domain is None else domains[domain][measure])
    return found


def domains_table(seeds: list[dict]) -> str:
    others = list(seeds[0]["rows"]["base"]["domains"])
    rows = []
    for name, row in seeds[0]["rows"].items():
        for measure in next(iter(row["domains"].values())):
            if name.endswith(TEMPERED) and measure not in MOVED:
                continue
            cells = [f"{statistics.mean(mean_auroc(seeds, name, measure, other)):.3f}" for other in others]
            rows.append([label(name), measure, *cells, over_seeds(mean_auroc(seeds, name, measure), 3)])
    return table(["", "measure", *others, "mean"], rows)


def wrong_table(seeds: list[dict]) -> str:
    rows = []
    for name, row in seeds[0]["rows"].items():
        for measure in row["wrong"]:
            if not name.endswith(TEMPERED) or measure in MOVED:
                values = [seed["rows"][name]["wrong"][measure] for seed in seeds]
                rows.append([label(name), measure, over_seeds(values, 3)])
    return table(["", "measure", "AUROC, wrong tokens against right ones"], rows)


def targets_table(seeds: list[dict], low_entropy: str | None) -> str:
    """What the numbers were to be, and what they are."""

    def mean(row, value):
        return statistics.mean(seed["rows"][row][value] for seed in seeds)

    rival = "base" + TEMPERED
    best_of_trained = min(("trained", "trained" + TEMPERED), key=lambda row: mean(row, "nll"))
    entropy = statistics.mean(mean_auroc(seeds, rival, "predictive_entropy"))
    candidates = {
        (row, measure): statistics.mean(mean_auroc(seeds, row, measure))
        for row in seeds[0]["rows"]
        if not row.startswith(("base", "control"))
        for measure in next(iter(seeds[0]["rows"][row]["domains"].values()))
        if measure not in OBSERVED
    }
    best = max(candidates, key=candidates.get)
    right = {
        row: statistics.mean(seed["rows"][row]["wrong"]["predictive_entropy"] for seed in seeds)
        for row in ("base", "fit_scale", "trained")
    }
    checks = [
        ("fit_scale, NLL against the base", mean("fit_scale", "nll") / mean("base", "nll") - 1, -0.003, "{:+.2%}"),
        ("fit_scale, ECE over the base's", mean("fit_scale", "ece") / mean("base", "ece"), 0.7, "{:.2f}"),
        (
            f"{label(best_of_trained)}, NLL against the tempered base",
            mean(best_of_trained, "nll") / mean(rival, "nll") - 1,
            -0.005,
            "{:+.2%}",
        ),
        (f"{label(best_of_trained)}, ECE", mean(best_of_trained, "ece"), mean(rival, "ece"), "{:.4f}"),
    ]
    rows = [
        [what, "at most " + form.format(bar), form.format(value), "yes" if value <= bar else "no"]
        for what, value, bar, form in checks
    ]
    least = [(f"other texts, best single measure ({best[1]}, {label(best[0])})", candidates[best], entropy, True)]
    if low_entropy:
        code = statistics.mean(mean_auroc(seeds, rival, "predictive_entropy", low_entropy))
        information = {
            row: statistics.mean(mean_auroc(seeds, row, "mutual_information", low_entropy))
            for row in ("fit_scale", "trained")
        }
        least += [
            (f"{low_entropy}, mutual information, {label(row)}", value, code, True)
            for row, value in information.items()
        ]
    least += [
        (f"wrong tokens, predictive entropy, {label(row)}", right[row], right["base"], False)
        for row in ("fit_scale", "trained")
    ]
    for what, value, bar, strictly in least:
        met = value > bar if strictly else value >= bar
        rows.append([what, f"{'above' if strictly else 'at least'} {bar:.3f}", f"{value:.3f}", "yes" if met else "no"])
    return table(["", "was to be", "is", "met"], rows)


def markdown(result: dict) -> str:
    seeds = result["seeds"]
    conditions = "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in result["conditions"].items())
    took = {name: over_seeds([seed["seconds"][name] for seed in seeds], 0) for name in seeds[0]["seconds"]}
    took["training"] = over_seeds([seed["training"]["seconds"] for seed in seeds], 0)
    took["processor time of the training"] = over_seeds([seed["training"]["cpu_seconds"] for seed in seeds], 0)
    steps = sorted({seed["training"]["steps"] for seed in seeds})
    stopped = any(seed["training"]["stopped_by_the_clock"] for seed in seeds)
    conditions += "\n- seconds: " + ", ".join(f"{name} {value}" for name, value in took.items())
    conditions += f"\n- parameters trained: {seeds[0]['training']['parameters']:,}, steps {', '.join(map(str, steps))}"
    conditions += " (stopped by the clock)" if stopped else ""
    control = [seed["control"] for seed in seeds]
    conditions += (
        f"\n- control: {control[0]['parameters']:,} parameters, learning rate {control[0]['learning_rate']:g}, steps "
        f"{control[0]['steps']}, seconds {over_seeds([run['seconds'] for run in control], 0)}"
    )
    machine_line = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    window = result["conditions"]["window of another text"]
    parts = [
        "### Held-out text of its own domain",
        predictions_table(seeds),
        f"### Other texts, {window}: AUROC of each measure against windows of the held-out text",
        domains_table(seeds),
        "### Wrong tokens",
        wrong_table(seeds),
        "### Targets",
        targets_table(seeds, result["low_entropy"]),
        "### Conditions",
        f"{conditions}\n- {machine_line}",
    ]
    return "\n\n".join(parts) + "\n"
