"""Monte Carlo dropout: a network trained with dropout, whose masks are drawn at prediction too.

Gal and Ghahramani 2016 (*Dropout as a Bayesian Approximation*, arXiv 1506.02142), equation 6: with masks m_s of
Bernoulli(1 - p) / (1 - p) entries,

    p̄(y | x) = (1/S) Σ_s p(y | x, m_s ⊙ activations).

A posterior sample is one draw of every mask: each row, position and unit has its own. While decoding with a cache the
keys and values of the tokens before keep the masks that they were computed with.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from ..retrofit.families import find_projections, is_experts, layers_of
from .samples import RowSamplesMixin, abandon, adopt

_CHILD = "mc_dropout"


class MCDropoutMixin(RowSamplesMixin):
    """A stock language model whose posterior samples are draws of its dropout masks; see [`mc_dropout`]."""

    @property
    def variational_layers(self) -> list[int]:
        """Numbers of the layers in which the samples come apart: from the first dropout on."""
        layers = layers_of(self)
        inside = [layer.index for layer in layers if any(one in self._dropouts for one in layer.module.modules())]
        outside = self._dropouts - {one for layer in layers for one in layer.module.modules()}
        first = 0 if outside else min(inside, default=len(layers))
        return [layer.index for layer in layers if layer.index >= first]

    @contextmanager
    def sampling(self, num_samples: int, batch: int) -> Iterator[None]:
        """Dropout is active inside, whatever mode the model is in."""
        before = {module: module.training for module in self._dropouts}
        for module in before:
            if getattr(module, "gradient_checkpointing", False):
                raise ValueError(
                    f"{type(module).__name__} applies its dropout itself, and under gradient checkpointing would "
                    "leave out the cache: call model.gradient_checkpointing_disable() before you sample."
                )
        try:
            for module in before:
                module.training = True
            yield
        finally:
            for module, mode in before.items():
                module.training = mode


def mc_dropout(
    model: PreTrainedModel, rate: float | None = None, modules: list[str] | str | None = None
) -> PreTrainedModel:
    """Makes draws of the dropout masks the posterior samples of a language model, in place.

    Afterwards `forward` and `generate` take `num_posterior_samples`. In train mode the same dropout trains the model,
    whose checkpoint stays that of the stock class.

    Args:
        model: a decoder-only language model.
        rate: probability of dropping; `None`: as the model's own dropout has it.
        modules: names (or ends of names, or one regular expression for whole names) of modules whose input gets
            dropout; `None`: where the model has dropout itself (embeddings, attention weights, residuals), or of a
            model without any at the input of each layer's W_out, the FFN's output projection.

    Returns:
        The same model, of a subclass of its class, which `remove_mc_dropout` takes away again.

    Raises:
        ValueError: for a rate outside [0, 1), no rate where the model has no dropout, or modules that are not there.

    Example:

    ```python
    >>> model = mc_dropout(AutoModelForCausalLM.from_pretrained("gpt2"))
    >>> out = model(**inputs, num_posterior_samples=8, output_uncertainty=True)
    >>> out.uncertainty.mutual_information  # [batch, length]
    ```
    """
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if rate is not None and not (is_number and 0 <= rate < 1):
        raise ValueError(f"rate is a probability in [0, 1), or None for the model's own, got {rate!r}.")
    adopt(model, MCDropoutMixin)
    model._rates, model._handles = [], []
    try:
        own = _own_dropouts(model) if modules is None else set()
        if own:
            if rate is not None:
                _set_rates(model, own, float(rate))
            model._dropouts = own
        else:
            model._dropouts = _put_dropouts(model, rate, modules)
    except ValueError:
        remove_mc_dropout(model)
        raise
    return model


def remove_mc_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `mc_dropout`, in place: the stock class, its own rates, nothing at the modules' inputs.

    Raises:
        ValueError: for a model that `mc_dropout` did not make.
    """
    abandon(model, MCDropoutMixin, "mc_dropout")
    for module, name, before in model._rates:
        setattr(module, name, before)
    for module, handle in model._handles:
        handle.remove()
        delattr(module, _CHILD)
    for name in ("_rates", "_handles", "_dropouts"):
        model.__dict__.pop(name, None)
    return model


def _own_dropouts(model: PreTrainedModel) -> set[nn.Module]:
    """The dropout modules, and the modules that drop in their own `forward`; empty if nothing drops."""
    dropouts = {module for module in model.modules() if isinstance(module, _DropoutNd)}
    # Attention of some families hands the rate of a dropout module of its own to the kernel, and so asks its own mode.
    inside = [module for layer in layers_of(model) for module in layer.module.modules()]
    holders = {module for module in inside if any(child in dropouts for child in module.children())}
    functional = {module for module in model.modules() if any(value > 0 for _, value in dropout_rates(module))}
    return dropouts | holders | functional if dropouts or functional else set()


def dropout_rates(module: nn.Module) -> list[tuple[str, float]]:
    """The names and values of a module's own rates, of which `F.dropout` or an attention kernel is told."""
    if isinstance(module, _DropoutNd):
        return [("p", module.p)]
    if hasattr(module, "layerdrop"):  # a stack that leaves whole layers out in train mode, which is another method
        return []
    return [(name, value) for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]


def _set_rates(model: PreTrainedModel, dropouts: set[nn.Module], rate: float) -> None:
    if model.config.model_type == "falcon" and model.config.hidden_dropout:
        raise ValueError(
            f"rate={rate} does not reach Falcon's residual dropout, which is read from config.hidden_dropout="
            f"{model.config.hidden_dropout}: set that to 0 or to the rate first."
        )
    for module in dropouts:
        for name, before in dropout_rates(module):
            model._rates.append((module, name, before))
            setattr(module, name, rate)


def _put_dropouts(model: PreTrainedModel, rate: float | None, modules: list[str] | str | None) -> set[nn.Module]:
    if rate is None:
        raise ValueError(f"{type(model).__name__} has no dropout of its own: say at which rate, as in rate=0.1.")
    if modules is None:
        targets = list(find_projections(model).values())
    else:
        targets = [module for name, module in model.named_modules() if _is_named(name, modules)]
        if not targets:
            raise ValueError(f"modules={modules!r} names no module of {type(model).__name__}.")
    for module in targets:
        if is_experts(module):
            raise ValueError(
                f"The FFNs' output projections of {type(model).__name__} are slices of a {type(module).__name__}'s "
                "parameters, whose input cannot be reached: name modules whose input gets dropout, as in "
                "modules=['o_proj']."
            )
        setattr(module, _CHILD, nn.Dropout(float(rate)).train(module.training))
        model._handles.append((module, module.register_forward_pre_hook(_drop_input)))
    return {getattr(module, _CHILD) for module in targets}


def _drop_input(module: nn.Module, args: tuple) -> tuple:
    hidden: Tensor = args[0]
    return (getattr(module, _CHILD)(hidden), *args[1:])


def _is_named(name: str, modules: list[str] | str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in modules)
