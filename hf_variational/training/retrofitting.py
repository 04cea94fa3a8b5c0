"""A pretrained model made variational as a recipe's section `retrofit` says, and its scales and priors from data."""

from pathlib import Path

import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from ..modeling import EVEConfig, VariationalAttentionConfig
from ..retrofit import variationalize
from ..retrofit.calibrate import calibrate_prior
from ..retrofit.scale import FittedScale, fit_scale
from .naming import is_variational
from .recipe import Recipe, RetrofitRecipe
from .settings import settings_of


def base_facts(name: str) -> dict:
    """What a card says of the base model: a folder is no name that others could look up."""
    return {"base": f"{Path(name).resolve().name} (a local folder)"} if Path(name).is_dir() else {"base_model": name}


def card_recipe(recipe: Recipe) -> dict:
    """What a card shows of a recipe: without the folders of the machine that ran it."""
    content = recipe.to_dict()
    places = ("model", "output_dir", "logging_dir")
    kept = {name: {k: v for k, v in content[name].items() if k not in places} for name in ("retrofit", "arguments")}
    return {**kept, "data": {"block_size": recipe.data.block_size}}


def load_pretrained(recipe: RetrofitRecipe):
    """The base model."""
    return AutoModelForCausalLM.from_pretrained(recipe.model, dtype=recipe.dtype)


def make_variational(model, recipe: RetrofitRecipe):
    """
    The base model with the recipe's posteriors, not calibrated yet: the same model, or one of PEFT around it.

    Raises:
        ValueError: as `variationalize`; for a model that is not causal, and an adapter where peft is not installed.
    """
    options = {
        "layers": recipe.layers,
        "target_modules": recipe.target_modules,
        "kl_weight": recipe.kl_weight,
        "objective": recipe.objective,
        "num_posterior_samples": recipe.num_posterior_samples,
    }
    eve = None if recipe.eve is None else EVEConfig(**{"prior": "centered", **recipe.eve})
    if recipe.adapter:
        model = _with_adapter(model, eve, options)
    else:
        attention = None if recipe.attention is None else VariationalAttentionConfig(**recipe.attention)
        train = "posterior" if recipe.train == "none" else recipe.train
        model = variationalize(model, eve=eve, attention=attention, train=train, **options)
    _check_causal(model, recipe.model)
    return model


@torch.no_grad()
def _check_causal(model, name: str) -> None:
    """Refuses an encoder: some have the head of a language model, which sees the very token that it is to predict."""
    training = model.training
    model.eval()
    first, second = model(torch.tensor([[1, 2], [1, 3]], device=model.device)).logits[:, 0].float()
    model.train(training)
    # rows of one batch may be rounded apart
    rounding = torch.finfo(model.dtype).eps ** 0.5 * first.abs().max()
    if (first - second).abs().max() > rounding:
        raise ValueError(
            f"{name} predicts a token from the tokens after it too: it is an encoder, and no causal language model. "
            "Call `variationalize` on it with a head of its own, such as AutoModelForMaskedLM's."
        )


def _with_adapter(model, eve: EVEConfig, options: dict):
    try:
        from peft import get_peft_model

        from ..retrofit.peft import EVEAdapterConfig
    except ImportError:
        raise ValueError("An adapter needs the package peft: pip install peft.") from None
    return get_peft_model(model, EVEAdapterConfig(eve=eve, task_type="CAUSAL_LM", **options))


def calibrate(
    model, recipe: RetrofitRecipe, rows, *, num_posterior_samples: int, batch_size: int, seed: int, progress: bool
) -> FittedScale | None:
    """Sets priors and scales from `rows`, sequences as [`cut`] gives them; what `fit_scale` found, if it was asked."""
    calibration = recipe.calibration
    longest = max(len(row["input_ids"]) for row in rows)
    reading = {"max_sequences": len(rows), "max_length": longest, "batch_size": batch_size, "progress": progress}
    if settings_of(model).eve is not None:
        calibrate_prior(model, rows, scale=calibration.scale, prior_scale=calibration.prior_scale, **reading)
    if not calibration.fit_scale:
        return None
    return fit_scale(
        model,
        rows,
        tolerance=calibration.tolerance,
        num_posterior_samples=num_posterior_samples,
        seed=seed,
        **reading,
    )


@torch.no_grad()
def send_posteriors(model) -> None:
    """Gives every process the first one's posteriors."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_variational(name):
            distributed.broadcast(tensor, src=0)
