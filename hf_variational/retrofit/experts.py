"""EVE in stacked experts, whose output projections are slices of one parameter, through transformers' interface."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling.configuration_variational_gpt import EVEConfig
from ..modeling.eve import EVE
from ..modeling.gaussian import weighted_sums
from ..modeling.posterior import PosteriorRecord, PosteriorStatistics, weights_of
from ..modeling.sample_axis import SampleAxis
from .passes import active_axis

try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:  # an older transformers keeps each expert's projections in modules
    ALL_EXPERTS_FUNCTIONS = None


class ExpertsEVE(nn.ModuleList):
    """An EVE for each expert of a layer: the units of two experts have nothing to do with each other.

    A token's KL is the sum over the experts that it is sent to; the noise of each of its places among the top k is
    drawn apart, so its latents are [rows, length, k * units].

    Raises:
        ValueError: for experts that are not gated, transposed or biased ones, or an autoregressive prior.
    """

    def __init__(self, config: EVEConfig, experts: nn.Module, layer_idx: int, tower: int = 0):
        odd = [name for name in ("is_transposed", "has_bias", "has_post_expert_norm") if getattr(experts, name, False)]
        if odd or not getattr(experts, "has_gate", False):
            raise ValueError(
                f"{type(experts).__name__} ({', '.join(odd) or 'no gate'}) is not of Mixtral's form: its experts "
                "cannot be made variational."
            )
        if config.prior == "autoregressive" or config.noise == "sequence" or config.latent_dim > 1:
            raise ValueError(
                "A token may be sent to other experts than the one before it, so experts take noise='token', "
                "latent_dim=1 and a prior other than 'autoregressive'."
            )
        if config.reconstruction_weight > 0:
            raise ValueError("Experts have no local reconstruction: use reconstruction_weight=0.")
        super().__init__(EVE(config, experts.intermediate_dim, layer_idx) for _ in range(experts.num_experts))
        self.config = config
        self.layer_idx, self.tower = layer_idx, tower
        self.units = experts.intermediate_dim
        # What calibration hears with: the expert's number, the activations, the numbers of their tokens.
        self.listener = None

    @property
    def current(self) -> "ExpertsEVE":
        """Itself; of an adapter's layer, which stands in the same place, the active adapter's."""
        return self


def variational_experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, stock
) -> Tensor:
    """An experts function in transformers' sense: EVE before each expert's W_out where the pass has samples or a
    tape, and `stock` otherwise.

    Shapes: hidden_states [rows * length, hidden]; top_k_index and top_k_weights [rows * length, k].
    """
    eves = getattr(experts, "eve", None)
    eves = None if eves is None else eves.current
    axis = None if eves is None else active_axis(eves.tower)
    if axis is not None:
        axis.visited.add((eves.layer_idx, "ffn"))
    if eves is None or (_is_mean(axis) and eves.config.mean == "identity" and eves.listener is None):
        return stock(experts, hidden_states, top_k_index, top_k_weights)
    tokens, places = top_k_index.shape
    noise = None
    if axis is not None and axis.num_samples:
        shape = (places * eves.units,)
        noise = axis.noise(eves.layer_idx, tokens // axis.rows, shape, hidden_states.device)
        noise = noise.reshape(tokens, places, eves.units).to(torch.promote_types(hidden_states.dtype, torch.float32))
    spent = _Spent(eves, axis, tokens, hidden_states) if axis is not None and axis.record else None
    output = torch.zeros_like(hidden_states)
    for expert, eve in enumerate(eves):
        token, place = torch.where(top_k_index == expert)
        gate_up = F.linear(hidden_states[token], experts.gate_up_proj[expert])
        h = experts._apply_gate(gate_up)
        if eves.listener is not None:
            eves.listener(expert, h, token)
        if noise is not None:
            scale = eve.raw_log_scale(h).clamp(eve.config.log_scale_min, eve.config.log_scale_max)
            z = (eve.mean(h) + scale.exp() * noise[token, place]).to(h.dtype)
        else:
            z = eve.pooled_mean(h)
        if spent is not None:
            spent.add(expert, eve, h, token)
        y = F.linear(z, experts.down_proj[expert]) * top_k_weights[token, place, None]
        output = output.index_add(0, token, y.to(output.dtype))
    if spent is not None:
        record = spent.record()
        if axis.tape is not None:
            axis.tape.append(record)
    return output


def _is_mean(axis: SampleAxis | None) -> bool:
    return axis is None or (axis.num_samples == 0 and not axis.record)


class _Spent:
    """The KL of a layer's tokens, gathered expert by expert."""

    def __init__(self, eves: ExpertsEVE, axis: SampleAxis, tokens: int, like: Tensor):
        self.eves, self.axis = eves, axis
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.kl = torch.zeros(tokens, dtype=dtype, device=like.device)
        self.unit_weights = weights_of(axis.unit_weights, eves.layer_idx, eves.units * len(eves))
        self.charged_kl = None if self.unit_weights.kl is None else torch.zeros_like(self.kl)
        self.energy = None if self.unit_weights.energy is None else torch.zeros_like(self.kl)
        self.weights = axis.weights(axis.rows, tokens // axis.rows, like.device).flatten().to(dtype)
        self.sums = {name: [] for name in ("kl_per_unit", "scale", "mean_energy")}

    def add(self, expert: int, eve: EVE, h: Tensor, token: Tensor) -> None:
        """Takes the tokens, numbered by `token`, that were sent to an expert with activations `h`."""
        config = eve.config
        log_scale = eve.raw_log_scale(h).clamp(config.log_scale_min, config.log_scale_max)
        mean = eve.mean(h).to(log_scale.dtype)
        elementwise = eve.elementwise_kl(mean, log_scale, self.axis)
        self.kl = self.kl.index_add(0, token, elementwise.sum(-1))
        own = slice(expert * eve.units, (expert + 1) * eve.units)
        kl_weights, energy_weights = (
            None if values is None else values[own] for values in (self.unit_weights.kl, self.unit_weights.energy)
        )
        charged_kl, energy = weighted_sums(elementwise[None], mean[None], kl_weights, energy_weights)
        if charged_kl is not None:
            self.charged_kl = self.charged_kl.index_add(0, token, charged_kl[0])
        if energy is not None:
            self.energy = self.energy.index_add(0, token, energy[0])
        if self.axis.statistics:
            with torch.no_grad():
                weights = self.weights[token, None]
                wide = {"kl_per_unit": elementwise, "scale": log_scale.exp().expand(*h.shape)}
                for name, value in {**wide, "mean_energy": mean.square()}.items():
                    self.sums[name].append((value * weights).sum(0))

    def record(self) -> PosteriorRecord:
        per_unit = {}
        if self.axis.statistics:
            tokens = self.weights.sum()
            total = tokens.clamp(min=1)
            per_unit = {name: (torch.cat(parts) / total).float() for name, parts in self.sums.items()}
            per_unit["tokens"] = tokens.float()
        rows = (self.axis.rows, -1)
        charged_kl, energy = (
            None if values is None else values.unflatten(0, rows) for values in (self.charged_kl, self.energy)
        )
        if energy is not None and self.unit_weights.constant is not None:
            energy = energy + self.unit_weights.constant
        statistics = PosteriorStatistics(self.kl.unflatten(0, rows), **per_unit)
        units = self.eves.units * len(self.eves)
        return PosteriorRecord(self.eves.layer_idx, statistics, units, charged_kl=charged_kl, energy=energy)


def _eager(experts: nn.Module, *args) -> Tensor:
    return type(experts).forward.__wrapped__(experts, *args)


def _variational(stock):
    def forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return variational_experts_forward(experts, hidden_states, top_k_index, top_k_weights, stock)

    return forward


# Our experts functions, by the stock implementation that runs their mean pass.
EXPERTS_IMPLEMENTATIONS: dict[str, str] = {}
if ALL_EXPERTS_FUNCTIONS is not None:
    for _name in ("eager", *list(ALL_EXPERTS_FUNCTIONS.keys())):
        _stock = _eager if _name == "eager" else ALL_EXPERTS_FUNCTIONS[_name]
        EXPERTS_IMPLEMENTATIONS[_name] = f"variational_{_name}"
        ALL_EXPERTS_FUNCTIONS.register(f"variational_{_name}", _variational(_stock))
