"""A model, and what it is compared with, measured on the same tokens: one pass over the test data each."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from tqdm.auto import tqdm

from ...checks import check_whole
from .contender import Column, Measuring
from .data import ReportData
from .report import EvaluationReport
from .settings import Contender, EvaluationSettings

MEAN_PASS = "mean pass"


def evaluate_model(
    model,
    dataset,
    num_posterior_samples: int = 8,
    *,
    name: str = "model",
    validation=None,
    ood: Mapping[str, object] | None = None,
    baselines: Mapping[str, object] | None = None,
    cost: Callable | None = None,
    corrupt_with=None,
    readouts: bool = False,
    facts: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    settings: EvaluationSettings | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EvaluationReport:
    """
    Measures a causal language model: likelihood, calibration, what its uncertainty is good for, and what it costs.

    Args:
        model:
            A variational model, a baseline, or a deterministic model, which has no posterior samples to compare, as
            the report then says.
        dataset:
            Test data: a list or dataset of rows with `input_ids` [, `attention_mask`, `labels`], or of bare token ids.
            Rows may say which `document` they are from, and how many bytes their predicted text has (`num_bytes`);
            [`text_rows`] makes such rows of text.
        num_posterior_samples (`int`, defaults to 8): Posterior samples; 0 is the mean pass.
        name (`str`): What the model is called in the report.
        validation (*optional*):
            Data of the same kind that nothing was trained on: temperatures, combined scores and policies are fitted on
            it. Without it the front of `dataset` is split off, and the report says so.
        ood (`Mapping`, *optional*): Other texts by name, as rows.
        baselines (`Mapping`, *optional*):
            What to compare with, by name: models, [`Contender`]s, or functions that make one of the validation data
            (`None` if there is none). If it is given, be it empty, the model's own mean pass and temperatures (Guo et
            al. 2017) are columns as well.
        cost (*optional*):
            `cost(model, batch, num_posterior_samples)` returns a dataclass of what a pass costs, as
            `hf_variational.baselines.measure_cost` does; without it only parameters are counted.
        corrupt_with (*optional*):
            The model's tokenizer, if the model is also to be measured on corrupted contexts (see
            [`corruption_sweep`]): seven passes over a part of the data.
        readouts (`bool`, defaults to `False`):
            Whether to choose among the ways to join the samples (see [`select_readout`]): two more passes.
        facts (`Mapping`, *optional*): Sections of the configuration; `{"data": {"name": ...}}` names the data.
        training (`Mapping`, *optional*): What is known of the model's training, see [`Contender`].
        settings ([`EvaluationSettings`], *optional*): How the report is made.
        seed (`int`, defaults to 0): Of the posterior noise, in every pass the same, and of the resamples.
        progress (`bool`, defaults to `True`): Whether to show progress bars.

    Raises:
        ValueError: for data that is empty, validation data that has windows of the test data, other texts without a
            window, or logits that are not numbers (the error names contender, batch and row).

    Example:

    ```python
    >>> report = evaluate_model(model, text_rows(texts, tokenizer, length=128), num_posterior_samples=8)
    >>> report.value("model", "quality", "expected_calibration_error")
    >>> print(report.table())
    ```
    """
    settings = settings or EvaluationSettings()
    check_whole("num_posterior_samples", num_posterior_samples, 0)
    data = ReportData.prepare(dataset, validation, ood or {}, settings)
    contenders = _contenders(model, name, num_posterior_samples, baselines, training or {}, data.validation)
    measuring = Measuring(data, settings, seed, progress, cost)
    columns: dict[str, Column] = {}
    work = {title: max(1, contender.num_posterior_samples) for title, contender in contenders.items()}
    with tqdm(total=sum(work.values()), desc="Evaluating", unit="sample", disable=not progress) as bar:
        for title, contender in contenders.items():
            bar.set_description(title)
            try:
                columns |= measuring.columns(title, contender)
            except ValueError as error:
                raise ValueError(f"{title}: {error}") from error
            bar.update(work[title])
    _add_own(columns[name], contenders[name], measuring, corrupt_with, readouts)
    notes = [*data.notes, *_notes(contenders, name, seed)]
    return EvaluationReport(
        model=name,
        seed=seed,
        configuration=_configuration(model, num_posterior_samples, data, settings, facts or {}),
        versions=_versions(),
        notes=notes,
        contenders={title: column.sections for title, column in columns.items()},
        curves={title: column.curves for title, column in columns.items()},
        times={title: column.times for title, column in columns.items()},
    )


def _contenders(model, name: str, samples: int, baselines, training: Mapping, held) -> dict[str, Contender]:
    compared = baselines is not None
    own = Contender(model, _drawn(model, samples), tempered=compared, training=training)
    contenders = {name: own}
    if compared and own.num_posterior_samples:
        contenders[MEAN_PASS] = Contender(model, 0, tempered=True)
    for title, baseline in (baselines or {}).items():
        if title in contenders:
            raise ValueError(f"Two contenders are called {title!r}: give the baseline another name.")
        if callable(baseline) and not hasattr(baseline, "parameters"):
            baseline = baseline(held)
        is_contender = isinstance(baseline, Contender)
        contenders[title] = baseline if is_contender else Contender(baseline, _drawn(baseline, samples))
    return contenders


def _drawn(model, samples: int) -> int:
    return samples if getattr(model, "variational_layers", None) else 0


def _add_own(column: Column, contender: Contender, measuring: Measuring, tokenizer, readouts: bool) -> None:
    """What takes passes of its own, of the model alone."""
    if tokenizer is not None:
        column.sections["corruption"], column.curves["corruption"] = measuring.corruption(contender, tokenizer)
    if readouts and contender.num_posterior_samples and measuring.data.validation is not None:
        column.sections["readouts"] = measuring.readouts(contender)


def _notes(contenders: Mapping[str, Contender], name: str, seed: int) -> list[str]:
    notes = [
        f"One seed ({seed}) of the noise, and one training of each model: the intervals are over the test data, and "
        "say nothing of another training."
    ]
    own = contenders[name]
    if not own.num_posterior_samples:
        variational = bool(getattr(own.model, "variational_layers", None))
        notes.append(
            f"{name} {'is at its mean pass' if variational else 'is deterministic'}: mutual information, expected "
            "entropy, conditional variance and top-1 flip rate compare posterior samples, and need posteriors to draw "
            "them from."
        )
    if any(contender.tempered for contender in contenders.values()):
        notes.append("Tempered: at the temperature with the lowest NLL on the validation data.")
    return notes + [f"{title}: {note}" for title, contender in contenders.items() for note in contender.notes]


def _configuration(model, samples: int, data: ReportData, settings: EvaluationSettings, facts: Mapping) -> dict:
    parameter = next(model.parameters())
    sections = {**data.configuration(settings)}
    for key, value in facts.items():
        sections[key] = {**sections.get(key, {}), **value} if isinstance(value, Mapping) else value
    sections["data"].setdefault("name", "evaluation data")
    return {
        "num_posterior_samples": samples,
        **sections,
        "settings": asdict(settings),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
    }


def _versions() -> dict[str, str]:
    names = ("hf-variational", "torch", "transformers", "scikit-learn", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
