"""Setting a retrofit's priors and scales from data: what its units do on a few hundred sequences."""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.objective import IGNORE_INDEX, attended_positions
from .experts import ExpertsEVE
from .families import find_projections
from .ffn import eve_modules
from .model import VariationalMixin
from .sequences import batches_of

# A unit that never moves in the data gets this share of its layer's typical deviation.
_SMALLEST_SHARE = 1e-3


def calibrate_prior(
    model: PreTrainedModel,
    dataset,
    tokenizer=None,
    *,
    scale: float = 0.1,
    prior_scale: float | None = None,
    max_sequences: int = 256,
    max_length: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> PreTrainedModel:
    """Sets the prior and the initial scale of every variational unit from its activations on data, in place.

    With m_i and s_i the mean and the standard deviation of what unit i passes to the FFN's output projection, over the
    tokens of the data: the initial scale is sigma_i = `scale` * s_i; the empirical prior becomes
    N(m_i, (`prior_scale` * s_i)^2), and the centered one N(mu, (`prior_scale` * s_i)^2). A unit whose activations are
    of scale 0.01 and one of scale 10 so get the same share of noise. What depends on the input (`scale="input"`)
    starts at zero again.

    Args:
        model: what `variationalize` made, or a PEFT model with an EVE adapter.
        dataset: sequences: texts (with `tokenizer`), token ids, rows of `input_ids` (and `attention_mask`), or batches
            of them.
        scale: share of a unit's standard deviation.
        prior_scale: likewise of the prior; `None`: 1 for the empirical prior (which covers the unit's own spread),
            `scale` for the centered one.
        max_sequences: sequences that are read; the rest is left alone.
        max_length: tokens of a text that are read; `None`: the model's longest.
        batch_size: sequences of a pass.
        progress: shows a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: for a data set without a token, a model without variational units, a share that is not positive, or
            a `standard` or `autoregressive` prior asked for a `prior_scale`.
    """
    model = variational_model(model)
    units = eve_modules(model)
    if not units:
        raise ValueError(
            f"{type(model).__name__} has no variational units to calibrate: use variationalize(model, eve=...) first."
        )
    for name, value in (("scale", scale), ("prior_scale", 1.0 if prior_scale is None else prior_scale)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive share of each unit's standard deviation, got {value!r}.")
    moments = _activations(model, units, dataset, tokenizer, max_sequences, max_length, batch_size, progress)
    for index, eve in units.items():
        for one, moment in zip(eve if isinstance(eve, ExpertsEVE) else [eve], moments[index], strict=True):
            _set(one, *moment, scale, prior_scale)
    return model


@torch.no_grad()
def _set(eve, mean: Tensor, deviation: Tensor, scale: float, prior_scale: float | None) -> None:
    config = eve.config
    typical = deviation.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    deviation = deviation.clamp(min=_SMALLEST_SHARE * typical.item())
    low, high = config.log_scale_min, config.log_scale_max

    def per_unit(values: Tensor, like: Tensor) -> Tensor:
        return values.to(like).reshape(-1, *[1] * (like.ndim - 1)).expand_as(like)

    start = (typical if config.scale == "scalar" else deviation) * scale
    eve.log_scale.copy_(per_unit(start.log().clamp(low, high).reshape(-1), eve.log_scale))
    for name in ("scale_weight", "scale_up"):
        if hasattr(eve, name):
            getattr(eve, name).zero_()
    share = prior_scale if prior_scale is not None else (1.0 if config.prior == "empirical" else scale)
    if config.prior == "empirical":
        eve.prior_mean.copy_(mean.to(eve.prior_mean))
    if config.prior in ("empirical", "centered"):
        eve.prior_log_scale.copy_((share * deviation).log().to(eve.prior_log_scale))


@torch.no_grad()
def _activations(model, units, dataset, tokenizer, max_sequences, max_length, batch_size, progress) -> dict:
    """Layer number to (mean, standard deviation) of its units, [units] each, one pair for each expert."""
    device = next(model.parameters()).device
    sums = {index: _Moments(eve) for index, eve in units.items()}
    mask: list[Tensor] = []
    projections = find_projections(model, model.settings.target_modules)
    handles = [_listen(projections[index], eve, sums[index], mask) for index, eve in units.items()]
    was_training = model.training
    model.eval()
    try:
        reading = (max_sequences, max_length, batch_size, "calibrating", progress)
        for batch in batches_of(dataset, tokenizer, model, *reading):
            batch = {name: value.to(device) for name, value in batch.items()}
            if not model.config.is_encoder_decoder:  # whose decoder reads them
                batch.pop("labels", None)
            main = batch[model.main_input_name]
            mask[:] = [attended_positions(batch.get("attention_mask"), main) if main.ndim == 2 else None, None]
            if model.config.is_encoder_decoder:
                mask[1] = batch["labels"] != IGNORE_INDEX
            model(**batch, num_posterior_samples=0)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return {index: one.pairs() for index, one in sums.items()}


def _listen(projection: nn.Module, eve, moments: "_Moments", mask: list):
    """Hands what enters a projection, or each expert's, to `moments`; returns the handle to remove."""
    if isinstance(eve, ExpertsEVE):
        # Only our own loop over the experts has their activations in its hands.
        eve.listener = lambda expert, h, token: moments.add(
            expert, h if mask[eve.tower] is None else h[mask[eve.tower].flatten()[token]]
        )
        return _Listening(eve)

    def before(module, args):
        h, kept = args[0].reshape(-1, args[0].shape[-1]), mask[eve.tower]
        moments.add(0, h if kept is None else h[kept.flatten()])

    # Before EVE's own hook, for a learned mean is not what the unit passes on by itself.
    return projection.register_forward_pre_hook(before, prepend=True)


class _Listening:
    def __init__(self, eve: ExpertsEVE):
        self.eve = eve

    def remove(self) -> None:
        self.eve.listener = None


class _Moments:
    """Streaming mean and variance of a layer's units (Chan, Golub and LeVeque 1983), of each expert apart."""

    def __init__(self, eve):
        size = len(eve) if isinstance(eve, ExpertsEVE) else 1
        self.count, self.mean, self.squares = [0] * size, [0.0] * size, [0.0] * size

    def add(self, expert: int, h: Tensor) -> None:
        """Takes activations, [tokens, units]."""
        count = h.shape[0]
        if not count:
            return
        h = h.double() if h.device.type != "mps" else h.float()
        mean = h.mean(0)
        squares = (h - mean).square().sum(0)
        total, offset = self.count[expert] + count, mean - self.mean[expert]
        self.squares[expert] = self.squares[expert] + squares + offset.square() * (self.count[expert] * count / total)
        self.mean[expert] = self.mean[expert] + offset * (count / total)
        self.count[expert] = total

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        heard = [index for index, count in enumerate(self.count) if count]
        # An expert that no token was sent to is taken for a typical one.
        variances = {index: self.squares[index] / self.count[index] for index in heard}
        mean = sum(self.mean[index] for index in heard) / len(heard)
        variance = sum(variances.values()) / len(heard)
        return [
            (self.mean[index].float(), variances[index].sqrt().float())
            if index in variances
            else (mean.float(), variance.sqrt().float())
            for index in range(len(self.count))
        ]


def variational_model(model) -> PreTrainedModel:
    """The variational model inside a wrapper of peft, or the model itself; raises `ValueError` for any other."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, VariationalMixin):
        raise ValueError(f"{type(inner).__name__} is not variational: use variationalize first.")
    return inner
