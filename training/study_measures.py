"""What the study measures of one model, and the texts that it is measured on."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, tensor
from transformers import PreTrainedTokenizerBase

from hf_variational.baselines import measure_cost
from hf_variational.evaluation import (
    TokenScores,
    aurc,
    domain_auroc,
    fit_temperature,
    sample_convergence,
    scores_at_temperatures,
    token_windows,
)

TEMPERED = "temperature"
BATCH_SIZE = 16
OTHER = "other-"
CONVERGENCE_WINDOWS = 64
CONVERGING = ("nll", "expected_calibration_error", "predictive_entropy", "mutual_information", "conditional_variance")


@dataclass(frozen=True)
class Texts:
    """Windows of the study's texts.

    Attributes:
        validation, test: of `block_size` tokens.
        windows: by length, then by the name of the text; `"test"` is the domain's own.
        block_size: tokens.
    """

    validation: list[list[int]]
    test: list[list[int]]
    windows: dict[int, dict[str, list[list[int]]]]
    block_size: int

    @classmethod
    def read(cls, folder: Path, options, tokenizer: PreTrainedTokenizerBase) -> "Texts":
        """Cuts the texts of a study's folder.

        Raises:
            ValueError: if a text is shorter than a window, or the validation and the test text share one.
        """
        texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))}
        block_size = 128
        validation, test = (token_windows(texts[name], tokenizer, block_size) for name in ("validation", "test"))
        common = {tuple(window) for window in validation} & {tuple(window) for window in test}
        if common:
            raise ValueError(
                f"The validation and the test text have {len(common)} windows of {block_size} tokens in common: the "
                "one is to choose with, the other to measure with."
            )
        named = {"test": texts["test"]}
        named |= {name.removeprefix(OTHER): text for name, text in texts.items() if name.startswith(OTHER)}
        windows = {
            length: {
                name: token_windows(text, tokenizer, length, options.windows, prefix=[tokenizer.eos_token_id])
                for name, text in named.items()
            }
            for length in options.lengths
        }
        return cls(validation, test, windows, block_size)


def measure(model, texts: Texts, samples: int) -> dict:
    """Every number of one model: `{"validation_nll", "rows": {"": ..., "temperature": ...}, "mean_pass", "cost"}`."""
    sampled = samples if getattr(model, "variational_layers", None) else 0
    fitted = fit_temperature(model, texts.validation, samples, BATCH_SIZE, progress=False)
    temperatures = {"": 1.0, TEMPERED: fitted.temperature}
    test = _scores(model, texts.test, temperatures, samples)
    windows = {
        length: {name: _scores(model, parts, temperatures, samples) for name, parts in named.items()}
        for length, named in texts.windows.items()
    }
    rows = {}
    for index, (name, temperature) in enumerate(temperatures.items()):
        rows[name] = {"temperature": temperature, **quality(test[index])}
        rows[name]["domains"] = {
            str(length): {
                other: domain_auroc(named["test"][index], scores[index])
                for other, scores in named.items()
                if other != "test"
            }
            for length, named in windows.items()
        }
    batch = {"input_ids": tensor(texts.test[:8])}
    cost = measure_cost(model, batch, samples, repeats=1)
    return {
        "validation_nll": fitted.untempered_nll,
        "num_posterior_samples": sampled,
        "rows": rows,
        "mean_pass": quality(_scores(model, texts.test, {"": 1.0}, 0)[0]) if has_mean_pass(model, sampled) else None,
        "cost": vars(cost),
    }


def converging(model, texts: Texts) -> dict:
    """Metrics at 1 to 32 samples on some windows of the test text, `{samples: {metric: {"mean", "sd", "bias"}}}`: the
    standard deviation over draws, and the expected difference from 32.
    """
    found = sample_convergence(model, texts.test[:CONVERGENCE_WINDOWS], progress=False)
    rows: dict = {str(size): {} for size in found.values}
    for name in CONVERGING:
        bias = found.bias(name)
        for size, estimate in found.estimates(name).items():
            rows[str(size)][name] = {"mean": estimate.mean, "sd": estimate.sd, "draws": estimate.n}
            rows[str(size)][name]["bias"] = bias[size].mean if size in bias else None
    return {"windows": min(len(texts.test), CONVERGENCE_WINDOWS), "rows": rows}


def has_mean_pass(model, sampled: int) -> bool:
    """Whether there is a pass without samples: an ensemble has only members."""
    return bool(sampled) and not hasattr(model, "members")


def quality(scores: TokenScores) -> dict:
    """Numbers of one table: likelihood, calibration, means of the measures, and what ranks wrong tokens first."""
    metrics = scores.evaluation().compute()
    wrong: Tensor = (~scores.correct).double()
    return {
        "nll": metrics["nll"],
        "ece": metrics["expected_calibration_error"],
        "accuracy": metrics["accuracy"],
        "cvar_nll": metrics["cvar_nll"],
        "brier": scores.values["brier"].double().mean().item(),
        "mutual_information": metrics.get("mutual_information"),
        "predictive_entropy": metrics["predictive_entropy"],
        "wrong": scores.error_auroc(),
        "aurc": {name: aurc(scores.values[name], wrong) for name in scores.error_auroc()},
    }


def _scores(model, windows, temperatures: dict[str, float], samples: int) -> list[TokenScores]:
    batch_size = max(1, BATCH_SIZE * 128 // len(windows[0]))
    return scores_at_temperatures(
        model, windows, list(temperatures.values()), samples, batch_size, seed=0, progress=False
    )
