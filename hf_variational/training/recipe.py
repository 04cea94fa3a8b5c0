"""Recipes: a YAML file that names model, data, tokenizer and arguments of a training run."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .naming import refuse_unknown

# Keys of the section `model` that are no fields of its configuration.
MODEL_KEYS = ("pretrained", "attn_implementation")
TRAIN = ("none", "posterior", "ffn", "all")


@dataclass
class DataRecipe:
    """
    Section `data`.

    Args:
        train: A text source, see [`load_text`].
        validation: A text source; the run is evaluated on it.
        validation_fraction (`float`, defaults to 0): Share of the training blocks held out instead of `validation`.
        block_size (`int`, defaults to 256): Tokens of a block.
        separate_documents (`bool`, defaults to `False`): Whether documents in a block are kept apart.
        num_proc (`int`, *optional*): Processes that tokenize.
    """

    train: str | list | dict
    validation: str | list | dict | None = None
    validation_fraction: float = 0.0
    block_size: int = 256
    separate_documents: bool = False
    num_proc: int | None = None


@dataclass
class TokenizerRecipe:
    """
    Section `tokenizer`.

    Args:
        name (`str`, *optional*): A tokenizer's folder or its name on the Hub. Without it one is trained on the data.
        vocab_size (`int`, defaults to 4096): Size of the vocabulary that is trained.
        min_frequency (`int`, defaults to 2): Times a pair has to occur to become a token.
    """

    name: str | None = None
    vocab_size: int = 4096
    min_frequency: int = 2


@dataclass
class CalibrationRecipe:
    """
    Section `retrofit.calibration`.

    Args:
        sequences (`int`, defaults to 256): Sequences held out of the training text to calibrate on.
        scale (`float`, defaults to 0.1): Initial scale of a unit, as a share of its standard deviation on these.
        prior_scale (`float`, *optional*): Likewise of its prior, see [`calibrate_prior`].
        fit_scale (`bool`, defaults to `True`): Whether one multiplier of the scales per layer is fitted, see
            [`fit_scale`]; before any training.
        tolerance (`float`, *optional*): Has the scales raised as far as the NLL stays within this share of the base
            model's.
    """

    sequences: int = 256
    scale: float = 0.1
    prior_scale: float | None = None
    fit_scale: bool = True
    tolerance: float | None = None


@dataclass
class RetrofitRecipe:
    """
    Section `retrofit`: a pretrained causal language model of any family that is made variational.

    Args:
        model (`str`): Its folder, or its name on the Hub.
        eve (`dict`, *optional*):
            Fields of `EVEConfig`, whose `prior` is `"centered"` where it is left out. Null is for deterministic
            feed-forward networks.
        attention (`dict`, *optional*): Fields of `VariationalAttentionConfig`.
        layers (`str` or `list`, defaults to `"all"`): See [`variationalize`].
        train (`str`, defaults to `"posterior"`):
            `"posterior"`, `"ffn"` or `"all"`; `"none"`: calibrated and fitted, and that is all.
        adapter (`bool`, defaults to `False`): Whether the posterior is an adapter of PEFT: the base is not saved.
        dtype (`str`, defaults to `"float32"`): Of the pretrained weights; `"auto"` is that of their files.
        target_modules, kl_weight, objective, num_posterior_samples: See [`variationalize`].
        calibration: How scales and priors start.
    """

    model: str
    eve: dict | None = field(default_factory=dict)
    attention: dict | None = None
    layers: str | list = "all"
    train: str = "posterior"
    adapter: bool = False
    dtype: str = "float32"
    target_modules: str | list | None = None
    kl_weight: float = 1e-4
    objective: str = "elbo"
    num_posterior_samples: int = 1
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)


@dataclass
class Recipe:
    """
    A training run.

    Args:
        model (`dict`):
            Fields of `VariationalGPTConfig`, with `eve` a mapping of `EVEConfig` fields or null for deterministic
            units (left out: `EVEConfig`'s defaults), and `attention` a mapping of `VariationalAttentionConfig` fields
            or null for deterministic attention; both null is the deterministic twin. `vocab_size` follows the
            tokenizer where it is not given. `pretrained` names a checkpoint of the Llama architecture to start from,
            `attn_implementation` is transformers'.
        data: Where the text is.
        tokenizer: Which tokenizer; a retrofit has its base model's.
        arguments (`dict`): Fields of `VariationalTrainingArguments`; `output_dir` is required.
        retrofit (*optional*): Instead of `model`, a pretrained model that is made variational.
    """

    data: DataRecipe
    arguments: dict
    model: dict = field(default_factory=dict)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    retrofit: RetrofitRecipe | None = None

    def to_dict(self) -> dict:
        """Plain values, which `recipe_from_dict` takes back."""
        return dataclasses.asdict(self)


def read_yaml(path: str | Path) -> dict:
    """
    A YAML file whose top level is a mapping, read as a recipe is.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not YAML, a key stands twice, or it is no mapping.
    """
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no recipe {path}: give the path of a YAML file.") from None
    try:
        content = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a recipe: expected the sections data, arguments, model and tokenizer.")
    return content


def load_recipe(path: str | Path, overrides: Iterable[str] = (), values: Mapping[str, object] | None = None) -> Recipe:
    """
    Reads a recipe.

    Args:
        path: The YAML file.
        overrides: `section.key=value` with a YAML value, for example `arguments.max_steps=10`.
        values: Values by `section.key`, likewise; the overrides count before them.

    Raises:
        ValueError: for a key that does not exist, at any level (it names the nearest that does), for one that stands
            twice, and for a value of the wrong type.
    """
    return recipe_from_dict(read_content(path, overrides, values), where=str(path))


def read_content(path: str | Path, overrides: Iterable[str] = (), values: Mapping[str, object] | None = None) -> dict:
    """What a recipe's file says, with values set as [`load_recipe`] sets them; not checked."""
    content = read_yaml(path)
    for path_of_keys, value in (values or {}).items():
        set_value(content, path_of_keys, value)
    for override in overrides:
        _override(content, override)
    return content


def recipe_from_dict(content: Mapping, where: str = "The recipe") -> Recipe:
    """Checks a recipe that was read or written by hand; see [`load_recipe`]."""
    refuse_unknown(content, [f.name for f in dataclasses.fields(Recipe)], where)
    for name in ("data", "arguments"):
        if not content.get(name):
            raise ValueError(f"{where} has no section `{name}`.")
    for name, section in content.items():
        if section is not None and not isinstance(section, Mapping) and name != "tokenizer":
            raise ValueError(f"{where}: the section `{name}` is a mapping, got {section!r}.")
    tokenizer = content.get("tokenizer") or {}
    if isinstance(tokenizer, str):
        tokenizer = {"name": tokenizer}
    model, arguments = dict(content.get("model") or {}), dict(content["arguments"])
    _check_model(model, f"{where}, section `model`,")
    retrofit = _retrofit(content.get("retrofit"), model, f"{where}, section `retrofit`,")
    _check_arguments(arguments, f"{where}, section `arguments`,")
    data = _build(DataRecipe, content["data"], f"{where}, section `data`,")
    if not 0.0 <= data.validation_fraction < 1.0:
        raise ValueError(
            f"{where}: `validation_fraction` is a number in [0, 1), got {data.validation_fraction}: it is a share of "
            "the training blocks."
        )
    if data.validation is not None and data.validation_fraction:
        raise ValueError(f"{where}: give `validation` or `validation_fraction`, not both.")
    return Recipe(
        model=model,
        data=data,
        tokenizer=_build(TokenizerRecipe, tokenizer, f"{where}, section `tokenizer`,"),
        arguments=arguments,
        retrofit=retrofit,
    )


def _retrofit(section: Mapping | None, model: dict, where: str) -> RetrofitRecipe | None:
    from ..modeling import EVEConfig, VariationalAttentionConfig

    if section is None:
        return None
    if model:
        raise ValueError(f"{where} is there, and a section `model` too: a run has one or the other.")
    calibration = section.get("calibration") or {}
    if not isinstance(calibration, Mapping):
        raise ValueError(f"{where} `calibration` is a mapping, got {calibration!r}.")
    calibration = _build(CalibrationRecipe, calibration, f"{where} `calibration`")
    retrofit = _build(RetrofitRecipe, {**section, "calibration": calibration}, where)
    _check_nested("eve", retrofit.eve, EVEConfig, "units", where)
    _check_nested("attention", retrofit.attention, VariationalAttentionConfig, "attention", where)
    if retrofit.eve is None and retrofit.attention is None:
        raise ValueError(f"{where} has neither `eve` nor `attention`: nothing would be variational.")
    if retrofit.train not in TRAIN:
        raise ValueError(f"{where} `train` is one of {', '.join(TRAIN)}, got {retrofit.train!r}.")
    if calibration.sequences < 1:
        raise ValueError(f"{where} `calibration` needs at least 1 of `sequences`, got {calibration.sequences}.")
    if retrofit.adapter and (retrofit.attention is not None or retrofit.train in ("ffn", "all")):
        raise ValueError(
            f"{where} `adapter` holds the posterior of the units alone: leave `attention` out, and let `train` be "
            "posterior or none."
        )
    return retrofit


def _build(cls, content: Mapping, where: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    refuse_unknown(content, fields, where)
    for name, spec in fields.items():
        if name in content:
            _check_type(name, content[name], spec.type, where)
        elif spec.default is spec.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where} has no `{name}`.")
    return cls(**content)


def _check_model(model: dict, where: str) -> None:
    from ..modeling import EVEConfig, VariationalAttentionConfig, VariationalGPTConfig

    nested = {"eve": (EVEConfig, "units"), "attention": (VariationalAttentionConfig, "attention")}
    fields = {f.name: f for f in dataclasses.fields(VariationalGPTConfig) if f.init}
    refuse_unknown(model, [*fields, *MODEL_KEYS], where)
    for name, value in model.items():
        if name in nested:
            _check_nested(name, value, *nested[name], where)
        else:
            _check_type(name, value, fields[name].type if name in fields else str, where)


def _check_nested(name: str, value, cls, what: str, where: str) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} `{name}` is a mapping, or null for deterministic {what}, got {value!r}.")
    known = {f.name: f for f in dataclasses.fields(cls)}
    refuse_unknown(value, known, f"{where} `{name}`")
    for key, entry in value.items():
        _check_type(key, entry, known[key].type, where)


def _check_arguments(arguments: dict, where: str) -> None:
    from .arguments import VariationalTrainingArguments
    from .regime.settings import RegimeControl

    fields = {f.name: f for f in dataclasses.fields(VariationalTrainingArguments) if f.init}
    refuse_unknown(arguments, fields, where)
    if not arguments.get("output_dir"):
        raise ValueError(f"{where} has no `output_dir`: name the folder the run is written to.")
    for name, value in arguments.items():
        _check_type(name, value, fields[name].type, where)
    if isinstance(arguments.get("regime"), Mapping):
        try:
            RegimeControl.of(arguments["regime"])
        except ValueError as error:
            raise ValueError(f"{where} `regime`: {error}") from error


def _check_type(name: str, value, annotation, where: str) -> None:
    """Checks plain types; what is not plain is left to those who use it."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    plain = (bool, int, float, str, list, dict, type(None))
    options = [typing.get_origin(option) or option for option in options]
    if not all(option in plain for option in options):
        return
    if isinstance(value, bool):
        fits = bool in options
    elif isinstance(value, int):
        fits = int in options or float in options
    elif isinstance(value, float):
        fits = float in options and math.isfinite(value)
    else:
        fits = any(isinstance(value, option) for option in options if option not in (bool, int, float))
    if not fits:
        names = " or ".join("null" if option is type(None) else option.__name__ for option in options)
        raise ValueError(f"{where} `{name}` is {names}, got {value!r}.")


def _override(content: dict, override: str) -> None:
    import yaml

    keys, separator, value = override.partition("=")
    if not separator or not all(keys.strip().split(".")):
        raise ValueError(f"{override!r} does not set a value: write section.key=value, like arguments.max_steps=10.")
    set_value(content, keys.strip(), yaml.load(value, Loader=_loader()))


def set_value(content: dict, path: str, value) -> None:
    """
    Sets `section.key` of what a recipe says; sections that are not there, or null, are made.

    Raises:
        ValueError: if a key on the way is no section.
    """
    *sections, last = path.split(".")
    section = content
    for key in sections:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ValueError(f"{path!r} is a key of {key!r}, which is no section.")
    section[last] = value


def _loader():
    """
    A safe loader that refuses a key that stands twice, and reads as YAML 1.2 what PyYAML reads as 1.1: 1e-4 is a
    number, and no, off, yes and on are words (`eval_strategy: no`).
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=deep)
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    boolean = "tag:yaml.org,2002:bool"
    Loader.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != boolean]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(boolean, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
    return Loader
