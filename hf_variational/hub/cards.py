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

from ..modeling.classification_variational_gpt import problem_type_of
from ..training.naming import is_variational

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
    "kl": "KL",
    "num_tokens": "Scored tokens",
}
_INDEXED_METRICS = ("perplexity", "accuracy", "expected_calibration_error")
_DATA_LABELS = {"dataset": "Dataset", "data_url": "Source", "tokenizer": "Tokenizer", "training_tokens": "Tokens seen"}
_RECIPE_LABELS = {
    "base_model": "Started from",
    "command": "Command",
    "hardware": "Hardware",
    "training_seconds": "Training time (s)",
    "seeds": "Seeds",
}
# class of a model -> its Auto class, the Hub's name of its task, and what the card calls it
_TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation", "causal language model"),
    "ForSequenceClassification": (
        "AutoModelForSequenceClassification",
        "text-classification",
        "sequence classification model",
    ),
    "ForTokenClassification": (
        "AutoModelForTokenClassification",
        "token-classification",
        "token classification model",
    ),
}
_WEIGHTS = {
    "gaussian": "softmax of logits that are Gaussian around the ordinary ones, with a scale σ",
    "dirichlet": "Dirichlet-distributed around the ordinary ones, with a concentration a",
    "approximate_dirichlet": "Dirichlet-distributed (in an approximation) around the ordinary ones, with a "
    "concentration a",
}
_DEPENDENCE = {
    False: "that is learned for each head",
    "query": "that a small network computes from the query",
    True: "that a small network computes from the row of logits",
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


def auto_class(model) -> str:
    """Name of the Auto class that loads such a model."""
    return _task(model)[0]


def _task(model) -> tuple[str, str, str]:
    name = type(model).__name__
    return next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), _TASKS["ForCausalLM"])


def _problem(model) -> str:
    """What the model predicts, in transformers' words for the problem type; tokens are labels too."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return "single_label_classification"
    return problem_type_of(model.config)


def _noun(model) -> str:
    noun = _task(model)[2]
    return noun.replace("classification", "regression") if _problem(model) == "regression" else noun


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
            `license`, `limits`, `tags`. Any other key is listed under its own name.
        metrics (`dict`, *optional*):
            What `evaluate_language_model` returns, or several of those by the name of the text, or a flat log of the
            Trainer (`eval_nll`, `eval_mean_pass_nll`, ...). An entry `"conditions"` says how it was measured.
        path (`str`): What `from_pretrained` is given in the examples.
        has_code, has_tokenizer (`bool`): Whether these lie beside the weights.

    Example:

    ```python
    >>> print(model_card(model, {"data": "WikiText-2"}, evaluate_language_model(model, dataset)))
    ```
    """
    from jinja2 import Environment, StrictUndefined

    facts = {key: value for key, value in (facts or {}).items() if value not in (None, "", [], {})}
    name = str(facts.get("name") or path.rstrip("/").split("/")[-1])
    layers = list(getattr(model, "variational_layers", None) or [])
    sites = _sites(model, layers)
    evaluations = _evaluations(metrics, bool(layers))
    recipe = _yaml(facts["recipe"]) if "recipe" in facts else ""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    environment.filters["quoted"] = lambda value: json.dumps(str(value), ensure_ascii=False)
    known = {"description": "", "data": "", "limits": "", **facts}
    labelled = {**_DATA_LABELS, **_RECIPE_LABELS}
    card = environment.from_string(template_path().read_text(encoding="utf-8")).render(
        metadata=_metadata(name, facts, evaluations, sites, _task(model)[1]),
        name=name,
        facts=known,
        variational=bool(layers),
        noun=_noun(model),
        auto_class=auto_class(model),
        generates=_task(model)[1] == "text-generation",
        measures=_problem(model) == "single_label_classification",
        eve_layers_text=_layers_text(sites["ffn"], model.config),
        attention_layers_text=_layers_text(sites["attention"], model.config),
        attention_text=_attention_text(model.config),
        model_rows=_model_rows(model, sites),
        path=path,
        has_code=has_code,
        has_tokenizer=has_tokenizer,
        reads_as_llama=_reads_as_llama(model),
        generation_samples_text=_generation_samples(model),
        data_rows=[(label, _text(facts[key])) for key, label in _DATA_LABELS.items() if key in facts],
        recipe_rows=[(label, _text(facts[key])) for key, label in _RECIPE_LABELS.items() if key in facts],
        recipe=recipe,
        recipe_fence="`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe)), default=0)),
        evaluations=evaluations,
        note_rows=[(key, _text(value)) for key, value in facts.items() if key not in _PLACED and key not in labelled],
        versions=_versions(),
    )
    card = re.sub(r"\n{3,}", "\n\n", card).strip() + "\n"
    return f"{card}\n{_MARK_TEXT.format(_digest(card))}\n"


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


def _sites(model, layers: list[int]) -> dict[str, list[int]]:
    """Numbers of the layers with posteriors over units (`"ffn"`) and over attention weights (`"attention"`)."""
    sites = getattr(model, "posterior_sites", None)
    if sites is None:
        sites = [(layer, "ffn") for layer in layers]
    return {name: sorted(layer for layer, site in sites if site == name) for name in ("ffn", "attention")}


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


def _layers_text(layers: list[int], config) -> str:
    if not layers:
        return ""
    total = getattr(config, "num_hidden_layers", None)
    if len(layers) == total:
        return f"all {total} layers"
    names = ", ".join(str(layer) for layer in layers)
    return f"{len(layers)} of {total} layers (number {names}, counted from 0)"


def _nested(config, name: str) -> dict:
    """The settings of what is variational, `{}` where nothing of that name is."""
    settings = getattr(config, name, None) or {}
    return dict(settings) if isinstance(settings, Mapping) else settings.to_dict()


def _attention_settings(config) -> dict:
    """Those settings of the attention posterior that its kind has a use for."""
    settings = _nested(config, "attention")
    if not settings:
        return {}
    unused = {"prior_concentration", "initial_concentration"}
    if settings["kind"] != "gaussian":
        unused = {"prior_scale", "initial_scale"}
    if not settings["data_dependent"]:
        unused.add("hidden_size")
    if settings.get("initial_raw") is None:
        unused.add("initial_raw")
    else:
        unused |= {"initial_scale", "initial_concentration"}
    return {name: value for name, value in settings.items() if name not in unused}


def _attention_text(config) -> str:
    settings = _nested(config, "attention")
    return f"{_WEIGHTS[settings['kind']]} {_DEPENDENCE[settings['data_dependent']]}" if settings else ""


def _model_rows(model, sites: dict[str, list[int]]) -> list[tuple[str, str]]:
    config = model.config
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(parameters.values())
    variational = sum(count for name, count in parameters.items() if is_variational(name))
    share = f", of which {variational:,} ({100 * variational / total:.2f} %) are variational" if variational else ""
    rows = [("Class", f"`{type(model).__name__}`"), ("Parameters", f"{total:,}{share}")]
    for field, label in (
        ("num_hidden_layers", "Layers"),
        ("hidden_size", "Width"),
        ("intermediate_size", "Feed-forward width"),
        ("num_attention_heads", "Attention heads"),
        ("num_key_value_heads", "Key-value heads"),
        ("vocab_size", "Vocabulary"),
        ("max_position_embeddings", "Longest context"),
    ):
        if getattr(config, field, None) is not None:
            rows.append((label, f"{getattr(config, field):,}"))
    rows.append(("Weights", str(getattr(model, "dtype", "")).removeprefix("torch.")))
    if any(sites.values()):
        attention = sum(count for name, count in parameters.items() if ".posterior." in name)
        for site, label, settings in (
            ("ffn", "EVE", _nested(config, "eve")),
            ("attention", "Attention posterior", _attention_settings(config)),
        ):
            if sites[site]:
                rows.append((label, ", ".join(f"`{key}={value!r}`" for key, value in settings.items())))
        if sites["attention"]:
            rows.append(("Attention posterior's parameters", f"{attention:,}"))
        for field, label in (("objective", "Objective"), ("kl_weight", "KL weight")):
            if getattr(config, field, None) is not None:
                rows.append((label, f"`{getattr(config, field)!r}`"))
    return rows


def _reads_as_llama(model) -> bool:
    mean = _nested(model.config, "eve").get("mean", "identity")
    return getattr(model.config, "model_type", "") == "variational_gpt" and mean == "identity"


def _generation_samples(model) -> str:
    samples = getattr(getattr(model, "generation_config", None), "num_posterior_samples", None)
    if not samples:
        return "none (the mean pass)"
    return f"{samples} posterior sample{'s' if samples != 1 else ''} (from the generation config)"


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
    if "samples" in metrics or "mean_pass" in metrics:
        metrics = {"": metrics}
    tables = []
    for title, evaluation in metrics.items():
        if not isinstance(evaluation, Mapping):
            raise ValueError(
                f"metrics[{title!r}] is {evaluation!r}; expected what `evaluate_language_model` returns, several of "
                "those by name, or a flat log with names like eval_nll."
            )
        conditions = dict(evaluation.get("conditions") or {})
        samples = conditions.get("num_posterior_samples")
        drawn = f"{samples} posterior samples" if samples else "posterior samples"
        names = {"samples": drawn, "mean_pass": "mean pass"}
        values = {names[key]: evaluation[key] for key in names if evaluation.get(key)}
        if not values:
            raise ValueError(f"metrics[{title!r}] has neither 'samples' nor 'mean_pass', but {sorted(evaluation)}.")
        rows = [
            (label, [_text(column[key]) if key in column else "–" for column in values.values()])
            for key, label in METRIC_LABELS.items()
            if any(key in column for column in values.values())
        ]
        tables.append(
            {
                "title": title,
                "columns": list(values),
                "values": values,
                "rows": rows,
                "conditions": "; ".join(f"{key} {_text(value)}" for key, value in conditions.items()),
            }
        )
    return tables


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
