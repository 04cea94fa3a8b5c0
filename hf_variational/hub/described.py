"""What a card reads off a model: its task, its size, and what is variational in it."""

from collections.abc import Mapping

from ..modeling.classification_variational_gpt import problem_type_of
from ..retrofit import VariationalMixin
from ..retrofit.families import layers_of
from ..training.naming import is_variational
from ..training.settings import settings_of

# end of a class's name -> its Auto class, the Hub's name of its task, and what the card calls it
_TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation", "causal language model"),
    "ForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text2text-generation", "sequence-to-sequence model"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask", "masked language model"),
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
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering", "question answering model"),
    "ForImageClassification": (
        "AutoModelForImageClassification",
        "image-classification",
        "image classification model",
    ),
    "Model": ("AutoModel", "feature-extraction", "model without a head"),
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


def auto_class(model) -> str:
    """Name of the Auto class that loads such a model."""
    return task(model)[0]


def task(model) -> tuple[str, str, str]:
    """Auto class, the Hub's name of the task, and a noun."""
    name = type(model).__name__
    return next((found for suffix, found in _TASKS.items() if name.endswith(suffix)), _TASKS["ForCausalLM"])


def noun(model) -> str:
    """What the card calls such a model."""
    word = task(model)[2]
    return word.replace("classification", "regression") if _problem(model) == "regression" else word


def predicts(model) -> str:
    """How an example uses it: `"text"`, `"classes"`, `"spans"`, `"values"` or `"states"`."""
    name = task(model)[1]
    if name in ("text-generation", "text2text-generation"):
        return "text"
    if name in ("question-answering", "feature-extraction"):
        return "spans" if name == "question-answering" else "states"
    return "classes" if _problem(model) == "single_label_classification" else "values"


def _problem(model) -> str:
    """What the model predicts, in transformers' words for the problem type; tokens are labels too."""
    if not type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
        return "single_label_classification"
    return problem_type_of(model.config)


def is_retrofit(model) -> bool:
    """Whether it is a stock model that was made variational; its class was made, and no file has its code."""
    return isinstance(model, VariationalMixin)


def stock_class(model) -> str | None:
    """Name of the stock class that computes the mean pass from the same files, if there is one."""
    if getattr(settings_of(model).eve, "mean", "identity") != "identity":
        return None
    if is_retrofit(model):
        return model.stock_class.__name__
    if getattr(model.config, "model_type", "") == "variational_gpt":
        return auto_class(model).replace("AutoModel", "Llama")
    return None


def unregistered_class(model) -> str | None:
    """Name of the stock class of a retrofit that the Auto classes do not know, so that it is loaded by that class."""
    # of the class: a configuration that was read from a file keeps the file's `model_type`, that of the base model
    known = not is_retrofit(model) or type(model.config).model_type.startswith("variational_")
    return None if known else model.stock_class.__name__


def posterior_layers(model) -> dict[str, list[int]]:
    """Numbers of the layers with posteriors over units (`"ffn"`) and over attention weights (`"attention"`)."""
    sites = getattr(model, "posterior_sites", None)
    if sites is None:
        sites = [(layer, "ffn") for layer in getattr(model, "variational_layers", None) or []]
    return {name: sorted(layer for layer, site in sites if site == name) for name in ("ffn", "attention")}


def layers_text(layers: list[int], model) -> str:
    """Which layers are meant, in words."""
    if not layers:
        return ""
    total, first = getattr(model.config, "num_hidden_layers", None), ""
    if is_retrofit(model):
        every = layers_of(model)
        total, first = len(every), ", the encoder's first" if every[-1].tower else ""
    if len(layers) == total:
        return f"all {total} layers" if total > 1 else "its one layer"
    names = ", ".join(str(layer) for layer in layers)
    return f"{len(layers)} of {total} layers (number {names}, counted from 0{first})"


def attention_text(model) -> str:
    """How the attention weights are distributed, in words."""
    settings = _nested(settings_of(model), "attention")
    return f"{_WEIGHTS[settings['kind']]} {_DEPENDENCE[settings['data_dependent']]}" if settings else ""


def model_rows(model, sites: dict[str, list[int]]) -> list[tuple[str, str]]:
    """The table of a model: labels and values."""
    config, variational = model.config, settings_of(model)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(parameters.values())
    added = sum(count for name, count in parameters.items() if is_variational(name))
    share = f", of which {added:,} ({100 * added / total:.2f} %) are variational" if added else ""
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
            ("ffn", "EVE", _nested(variational, "eve")),
            ("attention", "Attention posterior", _attention_settings(variational)),
        ):
            if sites[site]:
                rows.append((label, ", ".join(f"`{key}={value!r}`" for key, value in settings.items())))
        if sites["attention"]:
            rows.append(("Attention posterior's parameters", f"{attention:,}"))
        for field, label in (("objective", "Objective"), ("kl_weight", "KL weight")):
            if getattr(variational, field, None) is not None:
                rows.append((label, f"`{getattr(variational, field)!r}`"))
    return rows


def generation_samples(model) -> str:
    """How many samples `generate` draws without being told, in words."""
    samples = getattr(getattr(model, "generation_config", None), "num_posterior_samples", None)
    if not samples:
        return "none (the mean pass)"
    return f"{samples} posterior sample{'s' if samples != 1 else ''} (from the generation config)"


def _nested(variational, name: str) -> dict:
    """The settings of what is variational, `{}` where nothing of that name is."""
    settings = getattr(variational, name, None) or {}
    return dict(settings) if isinstance(settings, Mapping) else settings.to_dict()


def _attention_settings(variational) -> dict:
    """Those settings of the attention posterior that its kind has a use for."""
    settings = _nested(variational, "attention")
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
