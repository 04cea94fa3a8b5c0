"""What a retrofit prints, and what its card says."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..evaluation.domains import mean_over_domains
from ..presentation.measures import format_value, measure
from ..retrofit.scale import FittedScale
from ..training.recipe import Recipe, RetrofitRecipe
from ..training.retrofitting import base_facts, card_recipe
from .measured import Measured, Metrics
from .texts import RetrofitTexts, targets

__all__ = [
    "card_facts",
    "card_metrics",
    "columns",
    "fitted_text",
    "others_table",
    "summary",
    "texts_table",
]

# The measures of other texts that are shown; results.json has all of them.
_SHOWN = ("predictive_entropy", "expected_entropy", "mutual_information", "conditional_variance")
# A mutual information below this share of the predictive entropy is said to be next to nothing.
_DISAGREEMENT = 1e-3


def texts_table(texts: RetrofitTexts) -> Table:
    """What is read, and for what."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, column in enumerate(("", "text", "sequences", "tokens")):
        table.add_column(column, justify="left" if index < 2 else "right")
    parts = (
        ("to calibrate on", texts.data, texts.calibration),
        ("to train on", texts.data, texts.training),
        ("to measure on", texts.held_out, texts.test),
    )
    for label, name, rows in parts:
        if rows:
            table.add_row(label, Text(name), f"{len(rows):,}", f"{targets(rows):,}")
    for name, windows in texts.others.items():
        table.add_row("another text", Text(name), f"{len(windows):,}", f"{sum(len(row) - 1 for row in windows):,}")
    return table


def texts_note(texts: RetrofitTexts) -> str:
    """What happened to the rest, in a sentence."""
    notes = ["No sequence is in two parts."]
    if texts.overlapping:
        notes.append(f"{texts.overlapping:,} that the held-out text has too were left out.")
    return " ".join(notes)


def fitted_text(fitted: FittedScale | None, retrofit: RetrofitRecipe) -> str:
    """The scales, in a sentence."""
    calibration = retrofit.calibration
    starts = {}
    if retrofit.eve is not None:
        starts["ffn"] = f"each unit's noise is {format_value(calibration.scale)} of its standard deviation"
    if retrofit.attention is not None:
        starts["attention"] = "the noise of the attention weights is what it started with"
    if fitted is None:
        return "; ".join(starts.values())
    text = "; ".join(f"{start}, times {_span(fitted, site)}" for site, start in starts.items())
    if calibration.tolerance is None:
        return text
    return f"{text}: as much as costs {100 * calibration.tolerance:g} % of the base's NLL"


def _span(fitted: FittedScale, site: str) -> str:
    factors = [factor for (_, here), factor in fitted.multipliers.items() if here == site]
    ends = list(dict.fromkeys(map(format_value, (min(factors), max(factors)))))
    return f"{' to '.join(ends)} (by layer)" if len(ends) > 1 else ends[0]


def columns(base: Measured, after: Measured, mean_pass: Metrics | None, samples: int) -> tuple[dict, dict]:
    """Metrics by column, of the base model and of the retrofit."""
    others = {"base": base.plain, f"base, T {base.temperature.temperature:.2f}": base.tempered}
    own = {
        f"{samples} samples": after.plain,
        f"{samples} samples, T {after.temperature.temperature:.2f}": after.tempered,
    }
    if mean_pass is not None:
        own["mean pass"] = mean_pass
    return others, own


def summary(base: Measured, after: Measured) -> list[str]:
    """What the numbers say, in sentences: also where the retrofit is not better."""
    nll = 100 * (after.plain["nll"] / base.plain["nll"] - 1)
    tempered = 100 * (after.tempered["nll"] / base.tempered["nll"] - 1)
    ece = after.plain["expected_calibration_error"] / base.plain["expected_calibration_error"]
    lines = [
        f"On held-out text the retrofit's NLL is {_difference(nll)} the base's, and its calibration error "
        f"{format_value(ece)} times as large. With a temperature on both, its NLL is {_difference(tempered)} the "
        "base's."
    ]
    if after.plain["mutual_information"] < _DISAGREEMENT * after.plain["predictive_entropy"]:
        lines.append(
            "The samples hardly disagree, for on the calibration data the model predicts best almost without noise. "
            "--tolerance 0.01 raises it as far as it costs 1 % of the NLL."
        )
    if after.others:
        rival = mean_over_domains(base.tempered_others)["predictive_entropy"]
        own = mean_over_domains(after.others)
        best = max(_SHOWN, key=lambda name: own.get(name, 0.0))
        lines.append(
            f"The retrofit's best measure for telling other texts apart is the {measure(best).label} (mean AUROC "
            f"{own[best]:.3f}); the base's predictive entropy, with a temperature, has {rival:.3f}."
        )
    return lines


def _difference(percent: float) -> str:
    if abs(percent) < 0.005:
        return "equal to"
    return f"{format_value(abs(percent))} % {'below' if percent < 0 else 'above'}"


def others_rows(base: Measured, after: Measured) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Header and rows of the table of other texts."""
    shown = [name for name in _SHOWN if all(name in row for row in after.others.values())]
    header = ["base, T: predictive entropy", *(measure(name).label for name in shown)]
    rival, own = dict(base.tempered_others), dict(after.others)
    if len(own) > 1:
        rival["mean"], own["mean"] = mean_over_domains(rival), mean_over_domains(own)
    rows = [(name, [rival[name]["predictive_entropy"], *(own[name][key] for key in shown)]) for name in own]
    return header, rows


def others_table(base: Measured, after: Measured) -> Group:
    """How well each measure tells other texts from the model's own, for the terminal."""
    header, rows = others_rows(base, after)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for column in header:
        table.add_column(column, justify="right")
    for name, values in rows:
        best = format_value(max(values))
        table.add_row(Text(name), *(Text(cell, "bold" if cell == best else "") for cell in map(format_value, values)))
    return Group(Text("Other texts told from the held-out one (AUROC, short windows)", "bold"), table)


def card_facts(
    recipe: Recipe, texts: RetrofitTexts, fitted: FittedScale | None, training: dict | None, base: str, seed: int
) -> dict[str, Any]:
    """What the card says beside the measurements."""
    retrofit = recipe.retrofit
    where = {
        "none": "Every pretrained weight is as it was, and nothing was trained",
        "posterior": "Every pretrained weight is as it was; the posteriors were trained",
        "ffn": "The posteriors and the feed-forward networks of these layers were trained",
        "all": "The posteriors and all pretrained weights were trained",
    }[retrofit.train]
    trained = None
    if training is not None:
        trained = (
            f"{training['parameters']:,} parameters in {_counted(training['steps'], 'step')}, "
            f"{training['seconds']:.0f} s, on "
            f"{len(texts.training):,} sequences"
        )
    return {
        "description": f"A retrofit of {base_title(base)}. {where}.",
        **base_facts(base),
        "data": (
            f"{len(texts.calibration):,} sequences of up to {recipe.data.block_size} tokens of {texts.data} to "
            f"calibrate on{f', {len(texts.training):,} to train on' if texts.training else ''}; "
            f"{len(texts.test):,} of {texts.held_out} to measure on. No sequence is in two parts."
        ),
        "fitted": fitted_text(fitted, retrofit),
        "trained": trained or "nothing",
        "hardware": training and training["hardware"],
        "seeds": [seed],
        "recipe": card_recipe(recipe),
    }


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def base_title(base: str) -> str:
    """The base model's name, in code."""
    return f"`{base_facts(base).get('base_model') or base_facts(base)['base'].partition(' (')[0]}`"


def card_metrics(
    base: Measured, after: Measured, mean_pass: Metrics | None, texts: RetrofitTexts, samples: int, seed: int
) -> dict[str, dict]:
    """The measurements as a card takes them."""
    others, own = columns(base, after, mean_pass, samples)
    conditions = {"num_posterior_samples": samples, "seed": seed}
    temperature = {"T": f"a temperature, fitted to the {len(texts.calibration):,} sequences of the calibration"}
    metrics = {texts.held_out: {"others": others, "columns": own, "conditions": {**conditions, **temperature}}}
    if after.others:
        header, rows = others_rows(base, after)
        metrics["Other texts"] = {
            "header": header,
            "rows": rows,
            "conditions": {
                "area under the ROC curve of the mean of each measure over a window": "other texts against held-out",
                "predicted tokens of a window": len(texts.windows[0]) - 1,
                **conditions,
            },
        }
    return metrics
