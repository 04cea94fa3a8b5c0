"""The model card: what a checkpoint is, and what was measured on it, rendered from `model_cards/template.md`.

A card states only what it is given or can read off the model: whatever nobody recorded is said to be missing.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from .described import (
    attention_text,
    auto_class,
    generation_samples,
    is_retrofit,
    layers_text,
    model_rows,
    noun,
    posterior_layers,
    predicts,
    stock_class,
    task,
    unregistered_class,
)

_MARK = re.compile(r"\n*<!-- hf_variational card ([0-9a-f]{16}): .*? -->\s*\Z", re.DOTALL)
_MARK_TEXT = "<!-- hf_variational card {}: once edited by hand, this file is kept when the model is saved again -->"

METRIC_LABELS = {
    "nll": "NLL",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy (next token)",
    "expected_calibration_error": "Expected calibration error",
    "cvar_nll": "CVaR-NLL (worst 5 %)",
    "predictive_entropy": "Predictive entropy",
    "expected_entropy": "Expected entropy",
    "mutual_information": "Mutual information",
    "conditional_variance": "Conditional variance",
    "token_variance": "Token variance",
    "top1_flip_rate": "Top-1 flip rate",
    "wrong_token_auroc": "AUROC of the predictive entropy, wrong tokens against right ones",
    "kl": "KL",
    "num_tokens": "Scored tokens",
}
_INDEXED_METRICS = ("perplexity", "accuracy", "expected_calibration_error")
_DATA_LABELS = {"dataset": "Dataset", "data_url": "Source", "tokenizer": "Tokenizer", "training_tokens": "Tokens seen"}
_RECIPE_LABELS = {
    "base_model": "Started from",
    "base": "Started from",
    "fitted": "Fitted",
    "trained": "Trained",
    "command": "Command",
    "hardware": "Hardware",
    "training_seconds": "Training time (s)",
    "seeds": "Seeds",
}
# facts with a place of their own in the template or in its metadata; any other is listed under its own name
_PLACED = {"name", "description", "data", "recipe", "license", "language", "limits", "tags"}


def template_path() -> Path:
    """The template: in a wheel it lies beside this module, in a checkout in `model_cards/`."""
    packaged = Path(__file__).with_name("template.md")
    checkout = Path(__file__).resolve().parents[2] / "model_cards" / "template.md"
    for path in (packaged, checkout):
        if path.is_file():
            return path
    raise FileNotFoundError(f"The card template is missing: neither {packaged} nor {checkout} is there.")


def model_card(
    model,
    facts: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    *,
    path: str = "path/to/this/folder",
    has_code: bool = False,
    has_tokenizer: bool = False,
) -> str:
    """
    The text of a model's card, with its YAML metadata.

    Args:
        model: The model the card is about; its size and variational settings are read off it.
        facts (`dict`, *optional*):
            `name`, `description`, `data`, `dataset` (Hub ids), `data_url`, `tokenizer`, `training_tokens`, `recipe` (a
            dict or YAML), `command`, `hardware`, `training_seconds`, `seeds`, `base_model` (Hub ids), `language`,
            `license`, `limits`, `tags`; of a retrofit also `base` (of a base model that is not on the Hub), `fitted`
            and `trained`. Any other key is listed under its own name.
        metrics (`dict`, *optional*):
            What `evaluate_language_model` returns, or several of those by the name of the text, or a flat log of the
            Trainer (`eval_nll`, `eval_mean_pass_nll`, ...). An entry `"conditions"` says how it was measured. In the
            place of `"samples"` and `"mean_pass"` there may be `"columns"`, of this model, and `"others"`, that it is
            compared with: `{title: metrics}`; or a table of another kind: `"header"`, and `"rows"` of a label and
            values.
        path (`str`): What `from_pretrained` is given in the examples.
        has_code, has_tokenizer (`bool`): Whether these lie beside the weights.

    Example:

    ```python
    >>> print(model_card(model, {"data": "WikiText-2"}, evaluate_language_model(model, dataset)))
    ```
    """

    facts = _given(facts)
    name = str(facts.get("name") or path.rstrip("/").split("/")[-1])
    variational = bool(getattr(model, "variational_layers", None))
    sites = posterior_layers(model)
    evaluations = _evaluations(metrics, variational)
    card = _template().render(
        metadata=_metadata(name, facts, evaluations, sites, task(model)[1]),
        name=name,
        variational=variational,
        noun=noun(model),
        auto_class=auto_class(model),
        unregistered_class=unregistered_class(model),
        retrofit=is_retrofit(model),
        predicts=predicts(model),
        task=task(model)[1],
        main_input=getattr(model, "main_input_name", "input_ids"),
        eve_layers_text=layers_text(sites["ffn"], model),
        attention_layers_text=layers_text(sites["attention"], model),
        attention_text=attention_text(model),
        model_rows=model_rows(model, sites),
        path=path,
        has_code=has_code,
        has_tokenizer=has_tokenizer,
        stock_class=stock_class(model),
        generation_samples_text=generation_samples(model),
        versions=_versions(),
        **_record(facts, evaluations),
    )
    card = re.sub(r"\n{3,}", "\n\n", card).strip() + "\n"
    return f"{card}\n{_MARK_TEXT.format(_digest(card))}\n"


def record(facts: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None) -> str:
    """The sections of a card about data, recipe and measurements alone, for a card of another kind."""
    template = _template()
    values = _record(_given(facts), _evaluations(metrics, True))
    text = "".join(template.blocks["record"](template.new_context(values)))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _template():
    from jinja2 import Environment, StrictUndefined

    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    environment.filters["quoted"] = lambda value: json.dumps(str(value), ensure_ascii=False)
    return environment.from_string(template_path().read_text(encoding="utf-8"))


def _given(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (facts or {}).items() if value not in (None, "", [], {})}


def _record(facts: Mapping[str, Any], evaluations: list[dict]) -> dict[str, Any]:
    """What the template is given of facts and measurements."""
    recipe = _yaml(facts["recipe"]) if "recipe" in facts else ""
    labelled = {**_DATA_LABELS, **_RECIPE_LABELS}
    return {
        "facts": {"description": "", "data": "", "limits": "", **facts},
        "data_rows": [(label, _text(facts[key])) for key, label in _DATA_LABELS.items() if key in facts],
        "recipe_rows": [(label, _text(facts[key])) for key, label in _RECIPE_LABELS.items() if key in facts],
        "recipe": recipe,
        "recipe_fence": "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe)), default=0)),
        "evaluations": evaluations,
        "note_rows": [
            (key, _text(value)) for key, value in facts.items() if key not in _PLACED and key not in labelled
        ],
    }


def is_untouched(card: str) -> bool:
    """Whether a card is one of ours that nobody edited. Tags that a push adds to its metadata do not count."""
    mark = _MARK.search(card)
    return mark is not None and _digest(card[: mark.start()]) == mark.group(1)


def _digest(card: str) -> str:
    from huggingface_hub import ModelCard

    try:
        parsed = ModelCard(card)
    except Exception:  # whatever cannot be read as one of our cards was not left as we wrote it
        return ""
    data = {key: value for key, value in parsed.data.to_dict().items() if key != "tags"}
    content = json.dumps(data, sort_keys=True, default=str) + "\n".join(parsed.text.strip().splitlines())
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _metadata(name: str, facts: Mapping, evaluations: list[dict], sites: dict[str, list[int]], task: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for evaluation in evaluations:
        title = evaluation["title"] or "Evaluation data"
        for column, values in evaluation["values"].items():
            for metric in _INDEXED_METRICS:
                if isinstance(values.get(metric), int | float) and math.isfinite(values[metric]):
                    results.append(
                        EvalResult(
                            task_type=task,
                            dataset_type=re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "evaluation-data",
                            dataset_name=title,
                            metric_type=metric,
                            metric_name=f"{METRIC_LABELS[metric]} ({column})",
                            metric_value=float(f"{values[metric]:.6g}"),
                        )
                    )
    own_tags = [tag for site, tag in (("ffn", "eve"), ("attention", "variational-attention")) if sites[site]]
    own_tags = ["variational", "uncertainty", *own_tags] if own_tags else ["deterministic-twin"]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[*own_tags, *as_list(facts.get("tags"))],
        license=facts.get("license"),
        language=as_list(facts.get("language")) or None,
        datasets=_hub_ids(facts.get("dataset")),
        base_model=_hub_ids(facts.get("base_model")),
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def as_list(value) -> list:
    return list(value) if isinstance(value, list | tuple | set) else [value] if value else []


def _hub_ids(value) -> list[str] | None:
    """What of the value can be a name on the Hub: the Hub refuses metadata with a local path in its place."""
    return [entry for entry in as_list(value) if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(entry))] or None


def _text(value) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple | set):
        return ", ".join(str(entry) for entry in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items())
    return " ".join(str(value).split())


def _yaml(recipe) -> str:
    if isinstance(recipe, str):
        return recipe.strip()
    import yaml

    plain = json.loads(json.dumps(recipe, default=str))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).strip()


def _versions() -> str:
    names = []
    for name in ("hf-variational", "transformers", "torch"):
        try:
            names.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            names.append(name)
    return ", ".join(names)


def _evaluations(metrics: Mapping[str, Any] | None, variational: bool) -> list[dict]:
    """The evaluations of a card as tables: a title, columns, rows of formatted numbers, and the conditions."""
    if not metrics:
        return []
    if not any(isinstance(value, Mapping) for value in metrics.values()):
        metrics = _from_log(metrics, variational)
    if {"samples", "mean_pass", "columns", "rows"} & set(metrics):
        metrics = {"": metrics}
    return [_table(title, evaluation) for title, evaluation in metrics.items()]


def _table(title: str, evaluation: Mapping[str, Any]) -> dict:
    if not isinstance(evaluation, Mapping):
        raise ValueError(
            f"metrics[{title!r}] is {evaluation!r}; expected what `evaluate_language_model` returns, several of "
            "those by name, or a flat log with names like eval_nll."
        )
    conditions = dict(evaluation.get("conditions") or {})
    table = {"title": title, "conditions": "; ".join(f"{key} {_text(value)}" for key, value in conditions.items())}
    if "rows" in evaluation:
        rows = [(label, [_text(value) for value in values]) for label, values in evaluation["rows"]]
        return {**table, "columns": list(evaluation["header"]), "values": {}, "rows": rows, "of_tokens": False}
    samples = conditions.get("num_posterior_samples")
    drawn = f"{samples} posterior samples" if samples else "posterior samples"
    names = {"samples": drawn, "mean_pass": "mean pass"}
    own = {names[key]: evaluation[key] for key in names if evaluation.get(key)} | dict(evaluation.get("columns") or {})
    if not own:
        raise ValueError(f"metrics[{title!r}] has neither 'samples' nor 'mean_pass', but {sorted(evaluation)}.")
    columns = dict(evaluation.get("others") or {}) | own
    rows = [
        (label, [_text(column[key]) if key in column else "–" for column in columns.values()])
        for key, label in METRIC_LABELS.items()
        if any(key in column for column in columns.values())
    ]
    # the values are what the metadata say of this model
    return {**table, "columns": list(columns), "values": own, "rows": rows, "of_tokens": True}


def _from_log(log: Mapping[str, Any], variational: bool) -> dict[str, dict]:
    found: dict[str, dict] = {"samples": {}, "mean_pass": {}}
    for key, value in log.items():
        name = key.removeprefix("eval_")
        # the mean pass is all that a deterministic model has, whatever name it was logged under
        kind = "samples" if variational and not name.startswith("mean_pass_") else "mean_pass"
        name = name.removeprefix("mean_pass_")
        if name in METRIC_LABELS:
            found[kind].setdefault(name, value)
    if not any(found.values()):
        raise ValueError(f"None of the metrics is one a card shows: {sorted(log)}.")
    return {key: values for key, values in found.items() if values}
