"""What a model is compared with: its own weights with dropout, an ensemble, other checkpoints."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..baselines import EnsembleForCausalLM, mc_dropout, remove_mc_dropout
from ..baselines.mc_dropout import dropout_rates
from ..evaluation import token_scores
from ..evaluation.report import Contender
from ..modeling.configuration_variational_gpt import VariationalGPTConfig
from ..retrofit import to_deterministic

__all__ = ["MC_DROPOUT", "baselines_of", "training_of"]

MC_DROPOUT = "MC dropout"
# Rates to choose from where the model was trained without dropout, or with little.
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
# Sequences of the validation data that the choice is made on.
_CHOICE = 64

Loaded = tuple[Any, str]


def baselines_of(
    model,
    samples: int,
    *,
    ensemble: Sequence[Loaded] = (),
    compared: Mapping[str, Loaded] | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[dict[str, Contender | Callable], list[str]]:
    """
    Args:
        model: What is evaluated, which stays as it is.
        samples: Posterior samples.
        ensemble: Members, loaded, each with its folder.
        compared: Other models, loaded, by name, each with its folder.
        batch_size, seed: Of the choice of a dropout rate.

    Returns:
        Baselines for [`evaluate_model`], and sentences about those that cannot be had.

    Raises:
        ValueError: for an ensemble of one, or models of other tokens.
    """
    found: dict[str, Contender | Callable] = {}
    notes: list[str] = []
    vocabulary = model.config.get_text_config().vocab_size
    for other, folder in [*ensemble, *(compared or {}).values()]:
        size = other.config.get_text_config().vocab_size
        if size != vocabulary:
            raise ValueError(
                f"{folder} has a vocabulary of {size} tokens and the model one of {vocabulary}: only models with the "
                "same tokenizer can be compared token by token."
            )
    try:
        base = deterministic(model)
    except ValueError as error:
        notes.append(f"{MC_DROPOUT} is left out: {error}")
    else:
        found[MC_DROPOUT] = lambda held: _with_dropout(base, samples, held, batch_size, seed)
    for name, (other, folder) in (compared or {}).items():
        drawn = samples if getattr(other, "variational_layers", None) else 0
        found[name] = Contender(other, drawn, tempered=True, training=training_of(folder))
    if len(ensemble) == 1:
        raise ValueError("An ensemble has two members or more: name another checkpoint with --ensemble.")
    if ensemble:
        members = EnsembleForCausalLM.from_members([member for member, _ in ensemble]).to(model.device)
        note = f"the members are {', '.join(Path(folder).name for _, folder in ensemble)}."
        training = {"members": len(ensemble)}
        found[f"ensemble of {len(ensemble)}"] = Contender(members, len(ensemble), notes=(note,), training=training)
    return found, notes


def deterministic(model):
    """A copy of the model at its posterior mean, of a stock class, with the same weights.

    Raises:
        ValueError: where there is none.
    """
    if not getattr(model, "variational_layers", None):
        return copy.deepcopy(model)
    if isinstance(model.config, VariationalGPTConfig):
        return _twin(model)
    if hasattr(model, "merge_and_unload"):
        return copy.deepcopy(model).merge_and_unload()
    return to_deterministic(copy.deepcopy(model))


def _twin(model):
    if model.config.eve is not None and model.config.eve.mean != "identity":
        raise ValueError(
            f"the mean of its units is {model.config.eve.mean!r}, which its deterministic twin does not have."
        )
    config = copy.deepcopy(model.config)
    config.eve = config.attention = config.variational_layers = config.attention_layers = None
    twin = type(model)(config).to(model.device, model.dtype).eval()
    weights = model.state_dict()
    twin.load_state_dict({name: weights[name] for name in twin.state_dict()})
    return twin


def _with_dropout(model, samples: int, held, batch_size: int, seed: int) -> Contender:
    """Dropout as the model has it; or else at the rate whose NLL on the validation data is lowest."""
    samples = max(1, samples)
    if _has_dropout(model):
        return Contender(mc_dropout(model), samples, notes=("at the rates that the model has.",))
    if held is None:
        note = f"the model was trained without dropout; the rate, {RATES[-2]}, was not chosen on any data."
        return Contender(mc_dropout(model, RATES[-2]), samples, notes=(note,))
    rows = [held[index] for index in range(min(len(held), _CHOICE))]
    nll = {}
    for rate in RATES:
        scores = token_scores(mc_dropout(model, rate), rows, samples, batch_size, seed=seed, progress=False)
        nll[rate] = float(scores.values["nll"].double().mean())
        remove_mc_dropout(model)
    best = min(nll, key=nll.__getitem__)
    note = (
        f"the model was trained without dropout. The rate is {best}, whose NLL on {len(rows)} sequences of the "
        f"validation data is the lowest of {', '.join(map(str, RATES))}."
    )
    return Contender(mc_dropout(model, best), samples, notes=(note,))


def _has_dropout(model) -> bool:
    """Whether some dropout of the model's own has a rate above 0."""
    return any(rate > 0 for module in model.modules() for _, rate in dropout_rates(module))


def training_of(folder: str) -> dict[str, Any]:
    """What the trainer's log beside a checkpoint says of its training; empty without one."""
    path = Path(folder).expanduser()
    candidates = [path / "trainer_state.json", *sorted(path.glob("checkpoint-*/trainer_state.json"), key=_step)]
    files = [file for file in candidates if file.is_file()]
    if not files:
        return {}
    state = json.loads(files[-1].read_text(encoding="utf-8"))
    history = state.get("log_history", [])
    found: dict[str, Any] = {}
    for prefix, steps in (("", "steps"), ("eval_", "eval_steps")):
        name = next((f"{prefix}{key}" for key in ("nll", "loss") if any(f"{prefix}{key}" in e for e in history)), None)
        logged = [entry for entry in history if name in entry]
        found[steps] = [entry["step"] for entry in logged]
        found[f"{prefix}nll"] = [entry[name] for entry in logged]
    tokens = state.get("num_input_tokens_seen") or None
    return {**found, "tokens": tokens, "flops": state.get("total_flos") or None}


def _step(file: Path) -> int:
    number = file.parent.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1
