"""The EVE forecaster: an encoder of two windows, a bank of EVE neurons, a head that reads each posterior sample."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from hf_variational.modeling.eve import EVE
from hf_variational.modeling.heads import check_samples_for
from hf_variational.modeling.objective import ScoredTokens, following_positions, posterior_penalties
from hf_variational.modeling.posterior import (
    PosteriorRecord,
    PosteriorStatistics,
    UnitWeights,
    check_complete,
    check_unit_weights,
)
from hf_variational.modeling.sample_axis import SampleAxis

from .configuration import EVEForecasterConfig
from .data import IGNORED

# Standardised units. The least output scale: a window of a gauge that stands still would else have none.
LEAST_SCALE = 1e-2
LAYER = 0


@dataclass
class ForecastUncertainty:
    """The two parts of a forecast's variance over posterior samples (law of total variance), standardised units.

    Attributes:
        expected_variance: mean over samples of the output's variance, [batch, length, horizon]; 0 without one.
        variance_of_mean: variance over samples of the output's mean, [batch, length, horizon].
    """

    expected_variance: Tensor
    variance_of_mean: Tensor


@dataclass
class ForecastOutput(ModelOutput):
    """What a forecaster answers with, all in the units of `past`.

    Attributes:
        loss: nll + kl_weight * kl, 0-dim, with labels.
        forecast: the aggregated forecast, [batch, length, horizon].
        locations: each sample's forecast, [batch, S, length, horizon]; S = 1 in the mean pass.
        log_scales: log of each sample's Gaussian scale, like `locations`; `None` for the objective `"mse"`.
        nll: the objective without its KL per forecast value, 0-dim, with labels: nats, or the squared error.
        kl: KL per forecast value summed over units, nats, before its weight, 0-dim, with labels.
        kl_per_layer: the same of the one layer, [1].
        reconstruction: local reconstruction error per forecast value, 0-dim, where the units have it.
        uncertainty: with `output_uncertainty=True`.
        posteriors: `{0: PosteriorStatistics}`, with `output_posteriors=True`.
    """

    loss: Tensor | None = None
    forecast: Tensor | None = None
    locations: Tensor | None = None
    log_scales: Tensor | None = None
    nll: Tensor | None = None
    kl: Tensor | None = None
    kl_per_layer: Tensor | None = None
    reconstruction: Tensor | None = None
    uncertainty: ForecastUncertainty | None = None
    posteriors: dict[int, PosteriorStatistics] | None = None


def trend_of(values: Tensor, width: int) -> Tensor:
    """Centred moving average along the last axis, whose ends are repeated (Zeng et al. 2023, arXiv 2205.13504)."""
    rows = F.pad(values.flatten(0, -2).unsqueeze(1), (width // 2, width // 2), mode="replicate")
    return F.avg_pool1d(rows, width, stride=1).reshape(values.shape)


def gaussian_log_density(target: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
    """log N(target; location, exp(log_scale)^2), elementwise, nats."""
    return -0.5 * ((target - location) * torch.exp(-log_scale)).square() - log_scale - 0.5 * math.log(2 * math.pi)


def objective_of(kind: str, forecast: Tensor, locations: Tensor, log_scales: Tensor | None, target: Tensor) -> Tensor:
    """The objective of each value, [batch, length, horizon].

    Args:
        kind: `"mse"` (target - forecast)^2; `"nll"` the mean over samples of -log N; `"mc_nll"` -log of the mean over
            samples of N: the same for one sample, and for more never larger (Jensen).
        forecast, target: [batch, length, horizon].
        locations, log_scales: [batch, S, length, horizon].
    """
    if kind == "mse":
        return (target - forecast).square()
    log_density = gaussian_log_density(target.unsqueeze(1), locations, log_scales)
    if kind == "nll":
        return -log_density.mean(1)
    return math.log(log_density.shape[1]) - log_density.logsumexp(1)


class WindowEncoder(nn.Module):
    """Summary h of a look-back: trend and season of its previous and its current half, mixed by a gate.

    h = g (A trend_c + B season_c) + (1 - g) (C trend_p + D season_p), g = sigmoid(E [previous, current]) per unit. It
    is linear but for the gate, so that what DLinear can say the bank can hear.

    Shapes: [..., lookback] to [..., units].
    """

    def __init__(self, config: EVEForecasterConfig):
        super().__init__()
        half, units = config.lookback // 2, config.units
        self.moving_average = config.moving_average
        self.previous = nn.Linear(2 * half, units)
        self.current = nn.Linear(2 * half, units)
        self.gate = nn.Linear(2 * half, units)

    def forward(self, past: Tensor) -> Tensor:
        trend = trend_of(past, self.moving_average)
        parts = zip(trend.chunk(2, -1), (past - trend).chunk(2, -1), strict=True)
        previous, current = (torch.cat(pair, -1) for pair in parts)
        gate = torch.sigmoid(self.gate(past))
        return torch.lerp(self.previous(previous), self.current(current), gate)


class EVEForecaster(PreTrainedModel):
    """Forecasts each channel of a series by itself, all with the same weights.

    A window is normalised by its own mean and deviation and the forecast is put back (Kim et al. 2022, RevIN, without
    its affine part). Encoder, bank and head then work on each position of a row, which is a forecast origin; positions
    meet nowhere but in the autoregressive prior.

    Example:

    ```python
    >>> model = EVEForecaster(EVEForecasterConfig(objective="mc_nll"))
    >>> out = model(past, num_posterior_samples=32)  # past: [batch, length, lookback]
    >>> out.forecast, out.locations  # [batch, length, horizon], [batch, 32, length, horizon]
    ```
    """

    config_class = EVEForecasterConfig
    base_model_prefix = "forecaster"
    main_input_name = "past"
    _keep_in_fp32_modules_strict = ["log_scale", "scale_down", "scale_up", "log_floor", "prior_coefficient"]

    def __init__(self, config: EVEForecasterConfig):
        super().__init__(config)
        self.encoder = WindowEncoder(config)
        self.bank = EVE(config.eve, config.units, LAYER)
        self.location_head = nn.Linear(config.units, config.horizon)
        if config.objective != "mse":
            self.scale_head = nn.Linear(config.units, config.horizon)
            self.log_floor = nn.Parameter(torch.empty(config.horizon))
        if config.aggregation == "score":
            self.score_head = nn.Linear(config.units, 1)
        if config.deterministic:
            for name, parameter in self.bank.named_parameters():
                parameter.requires_grad_(name in ("gain", "mean_weight", "mean_bias"))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EVE):
            module.init_weights()
        elif isinstance(module, nn.Linear):
            # The forecast starts near the window's mean, with its deviation.
            heads = [head for name, head in self.named_children() if name.endswith("_head")]
            scale = 0.1 if any(module is head for head in heads) else 1.0
            init.normal_(module.weight, std=scale / math.sqrt(module.in_features))
            init.zeros_(module.bias)
        elif isinstance(module, EVEForecaster) and module.config.objective != "mse":
            init.constant_(module.log_floor, math.log(0.1))

    @property
    def variational_layers(self) -> list[int]:
        return [] if self.config.deterministic else [LAYER]

    @property
    def posterior_sites(self) -> list[tuple[int, str]]:
        """(layer, site) of each posterior that a complete tape has."""
        return [(layer, "ffn") for layer in self.variational_layers]

    def _resolve_num_samples(self, num_samples: int | None) -> int:
        if num_samples is None:
            return self.config.num_posterior_samples if self.training and self.variational_layers else 0
        if num_samples and not self.variational_layers:
            raise ValueError(f"num_posterior_samples={num_samples}, but this is the deterministic twin: use 0.")
        return num_samples

    @can_return_tuple
    def forward(
        self,
        past: Tensor,
        labels: Tensor | None = None,
        num_posterior_samples: int | None = None,
        output_uncertainty: bool = False,
        output_posteriors: bool = False,
        kl_weight: Tensor | float | None = None,
        free_bits: float = 0.0,
        unit_weights: dict[int, UnitWeights] | None = None,
        **kwargs,
    ) -> ForecastOutput:
        """
        Args:
            past: [batch, length, lookback], in float32 whatever the model's dtype; positions are origins in time
                order.
            labels: [batch, length, horizon]; an origin whose labels are -100 is left out.
            num_posterior_samples: S; 0 is the mean pass; `None`: 0 in eval mode, the config's in train mode.
            output_uncertainty: returns `uncertainty`; needs S >= 1.
            output_posteriors: returns `posteriors`.
            kl_weight: beta, a number or a 0-dim tensor; `None`: the config's.
            free_bits: nats that a unit may spend before its KL is charged.
            unit_weights: `{0: UnitWeights}`, what regime control charges each unit.
            num_items_in_batch (in `kwargs`): forecast values of the whole accumulated batch, the loss's divisor.

        Raises:
            ValueError: for a `past` of another shape, or samples or unit weights of the deterministic twin.
            RuntimeError: if no posterior is recorded where one is expected.
        """
        if past.ndim != 3 or past.shape[-1] != self.config.lookback:
            raise ValueError(f"past must be [batch, length, {self.config.lookback}], got {tuple(past.shape)}.")
        num_samples = self._resolve_num_samples(num_posterior_samples)
        check_samples_for(num_samples, output_uncertainty=output_uncertainty)
        scored = None if labels is None else _scored(labels, kwargs.get("num_items_in_batch"))
        check_unit_weights(unit_weights, self.variational_layers)
        axis = self._sample_axis(past, num_samples, scored, output_posteriors, unit_weights)

        centre = past.mean(-1, keepdim=True)
        scale = (past.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        h = self.encoder(((past - centre) / scale).to(self.location_head.weight.dtype))
        z = self.bank(h, axis).unflatten(0, (past.shape[0], -1))
        locations = self.location_head(z).to(past.dtype) * scale.unsqueeze(1) + centre.unsqueeze(1)
        log_scales = self._log_scales(z, scale) if self.config.objective != "mse" else None
        fields = {"forecast": self._aggregate(locations, z), "locations": locations, "log_scales": log_scales}
        if output_uncertainty:
            fields["uncertainty"] = _uncertainty(locations, log_scales)
        if axis.record:
            check_complete(tuple(axis.tape), self.posterior_sites)
        if output_posteriors:
            fields["posteriors"] = {r.layer: r.statistics.over_samples(past.shape[0]) for r in axis.tape}
        if scored is not None:
            fields |= self._loss(fields, axis.tape, scored, kl_weight, free_bits)
        return ForecastOutput(**fields)

    def _sample_axis(self, past: Tensor, num_samples: int, scored: ScoredTokens | None, asked, unit_weights):
        batch, length = past.shape[:2]
        record = bool(self.variational_layers) and (asked or scored is not None)
        weights = torch.ones(batch, length, dtype=torch.bool, device=past.device) if scored is None else scored.weights
        positions = torch.arange(length, device=past.device).unsqueeze(0)
        return SampleAxis(
            num_samples,
            batch,
            positions,
            record=record,
            statistics=record and asked,
            token_weights=weights,
            follows=following_positions(weights, positions) if record else None,
            tape=[],
            unit_weights=unit_weights,
        )

    def _log_scales(self, z: Tensor, scale: Tensor) -> Tensor:
        """log of sqrt((window's deviation * learned)^2 + floor^2), with a learned floor for each step ahead."""
        relative = self.scale_head(z).float().clamp(-7.0, 5.0) + scale.log().float().unsqueeze(1)
        floor = self.log_floor.float().clamp(min=math.log(LEAST_SCALE))
        return 0.5 * torch.logaddexp(2.0 * relative, 2.0 * floor.expand_as(relative))

    def _aggregate(self, locations: Tensor, z: Tensor) -> Tensor:
        if self.config.aggregation == "median":
            # of an even number the mean of the middle two; torch's own takes the lower one
            return locations.quantile(0.5, dim=1)
        if self.config.aggregation == "score":
            return (locations * self.score_head(z).softmax(1)).sum(1)
        return locations.mean(1)

    def _loss(
        self, fields: dict, tape: list[PosteriorRecord], scored: ScoredTokens, kl_weight, free_bits: float
    ) -> dict:
        answers = fields["forecast"], fields["locations"], fields["log_scales"]
        values = objective_of(self.config.objective, *answers, scored.targets)
        nll = (values * scored.weights.unsqueeze(-1)).sum() / scored.num_items
        if not self.variational_layers:
            return {"loss": nll, "nll": nll, "kl": torch.zeros_like(nll)}
        spent = posterior_penalties(tuple(tape), scored, free_bits)
        weight = self.config.kl_weight if kl_weight is None else kl_weight
        loss = spent.added_to(nll, weight, self.config.eve)
        parts = {"kl": spent.kl, "kl_per_layer": spent.kl_per_layer, "reconstruction": spent.reconstruction}
        return {"loss": loss, "nll": nll, **parts}


def _scored(labels: Tensor, num_items: Tensor | int | None) -> ScoredTokens:
    """The targets [batch, length, horizon], and 1 for each origin that has them, [batch, length]."""
    has_target = labels != IGNORED
    if num_items is None:
        num_items = has_target.sum().clamp(min=1)
    elif torch.is_tensor(num_items):
        num_items = num_items.to(labels.device)
    return ScoredTokens(labels, has_target.all(-1), num_items)


def _uncertainty(locations: Tensor, log_scales: Tensor | None) -> ForecastUncertainty:
    spread = locations.var(1, unbiased=False)
    inner = torch.zeros_like(spread) if log_scales is None else torch.exp(2.0 * log_scales).mean(1)
    return ForecastUncertainty(inner, spread)
