"""The state of regime control and its step: what was measured goes in, neurons and weights come out changed."""

import math

import torch
from torch import Tensor
from transformers.utils import logging

from ...modeling import EVE, UnitWeights
from . import rules
from .measuring import UnitMeans, Units
from .neurons import rescale_means, shift_log_scales
from .rules import Limits
from .settings import RegimeControl

logger = logging.get_logger(__name__)

_LOGGED = "logged."
# Of the state, beside the averages.
_STATE = ("nll", "previous_kl", "kl_integral", "kl_log_weight", "band_log_factor", "autoregressive_log_weight")


class RegimeController:
    """
    Regime control of a model's units, all of them in one vector.

    Its state is averages over time of what was measured, the log-weights of the units' KL and two log-factors: tensors
    on the device, which `state_dict` hands out and `load_state_dict` takes back.

    Args:
        settings: What to do.
        neurons: Layer number to its EVE modules.
        device: Where the state is.
    """

    def __init__(self, settings: RegimeControl, neurons: dict[int, list[EVE]], device: torch.device):
        self.settings = settings
        self.neurons = neurons
        self.units = Units({layer: sum(eve.units for eve in here) for layer, here in neurons.items()})
        self._bands = None if settings.band is None else self.units.limits(settings.band, device)
        zeros = torch.zeros(self.units.total, device=device)
        self.means = UnitMeans(zeros, zeros, zeros)
        self.previous_kl = zeros
        self.nll = torch.zeros((), device=device)
        self.kl_integral = self.kl_log_weight = zeros
        self.band_log_factor = torch.zeros((), device=device)
        self.autoregressive_log_weight = torch.zeros((), device=device)
        self.measurements = 0
        self.step = 0
        self._logged: dict[str, Tensor] = {}
        self._stuck: Tensor | None = None
        self._reported = torch.zeros(self.units.total, dtype=torch.bool)
        self._weights: dict[int, UnitWeights] | None = None

    # ---- The step ----

    @torch.no_grad()
    def act(self, measured: UnitMeans, nll: Tensor, step: int, kl_weight: float, optimizer=None) -> None:
        """
        A control step.

        Args:
            measured: Of the accumulated batch of all processes.
            nll: Its negative log-likelihood per target, 0-dim.
            step: Optimizer steps that are done.
            kl_weight: Of the last one.
            optimizer: Of the training, whose momenta move with the parameters.
        """
        self._average(measured, nll)
        self.step = step
        logged: dict[str, Tensor] = {}
        if self._bands is not None:
            self._measure_band(logged)
        if self.settings.rescales:
            self._rescale(step, optimizer, logged)
        if self.settings.scale_guard is not None:
            self._guard_scales(step)
        if self.settings.weighs_kl and kl_weight > 0:
            self._weigh_kl(step, kl_weight, logged)
        self._logged = logged
        self._weights = None

    def _average(self, measured: UnitMeans, nll: Tensor) -> None:
        stays = self.settings.decay if self.measurements else 0.0
        self.previous_kl = self.means.kl if self.measurements else measured.kl
        self.means = UnitMeans(
            *(stays * old + (1.0 - stays) * new for old, new in zip(self.means, measured, strict=True))
        )
        self.nll = stays * self.nll + (1.0 - stays) * nll
        self.measurements += 1

    def limits(self) -> Limits:
        """The band in force, [all units]."""
        return self._bands.times(self.band_log_factor.exp())

    def _measure_band(self, logged: dict[str, Tensor]) -> None:
        found = self.limits().shares(self.means.energy)
        calibration = self.settings.calibration
        if calibration is not None:
            if calibration.acts_at(self.step):
                self.band_log_factor = rules.calibration_step(
                    self.band_log_factor,
                    found.under,
                    found.over,
                    (calibration.under, calibration.over),
                    calibration.rate,
                    calibration.max_step,
                )
            logged["band_factor"] = self.band_log_factor.exp()
        logged.update(found._asdict())
        self._stuck = (self.means.energy == 0) & (self._bands.low > 0)

    def _rescale(self, step: int, optimizer, logged: dict[str, Tensor]) -> None:
        total = torch.ones_like(self.means.energy)
        projection, homeostasis = self.settings.projection, self.settings.homeostasis
        if projection is not None and step % projection.interval == 0 and step >= projection.warmup_steps:
            total = total * self._move(rules.JUST_INSIDE, 1.0, projection.max_factor)
        if homeostasis is not None and step >= homeostasis.warmup_steps:
            outside = self.limits().outside(self.means.energy).float().mean()
            eta = homeostasis.eta + (homeostasis.eta_max - homeostasis.eta) * outside
            way = 1.0 if homeostasis.toward == "center" else rules.JUST_INSIDE
            total = total * self._move(way, eta, homeostasis.max_factor)
        for layer, factor in self.units.split(total).items():
            rescale_means(self.neurons[layer], factor, optimizer)
        logged["rescaled"] = (total != 1).float().mean()

    def _move(self, way: float, eta: Tensor | float, max_factor: float) -> Tensor:
        """Factors on mu; the average energy is from here on that of the rescaled units."""
        factor = rules.rescaling_factor(self.means.energy, self.limits(), way, eta, max_factor)
        self.means = self.means._replace(energy=self.means.energy * factor.square())
        return factor

    def _guard_scales(self, step: int) -> None:
        guard = self.settings.scale_guard
        if step < guard.warmup_steps:
            return
        kl, scale, _ = self.means
        shift = rules.scale_shift(scale, kl, guard.floor, guard.ceiling, guard.kick, guard.max_shift)
        self.means = self.means._replace(scale=scale * shift.exp())
        for layer, own in self.units.split(shift).items():
            shift_log_scales(self.neurons[layer], own)

    def _weigh_kl(self, step: int, kl_weight: float, logged: dict[str, Tensor]) -> None:
        thermostat, control = self.settings.thermostat, self.settings.autoregressive
        kl = self.means.kl
        if thermostat is not None:
            low, high = thermostat.kl_min, thermostat.kl_max
            if step >= thermostat.warmup_steps:
                parts = (self.units.split(one).values() for one in (self.kl_integral, kl, self.previous_kl))
                options = (low, high, thermostat.rate, thermostat.gain, thermostat.ratio, thermostat.emergency_step)
                layers = [rules.thermostat_step(*layer, *options) for layer in zip(*parts, strict=True)]
                self.kl_integral, self.kl_log_weight = (torch.cat(part) for part in zip(*layers, strict=True))
                shift = rules.within_share(self.kl_log_weight, kl_weight * kl, self.nll, thermostat.max_share)
                # The integral goes with it: it would go on rising for as long as the weights may not.
                self.kl_integral, self.kl_log_weight = self.kl_integral + shift, self.kl_log_weight + shift
            logged["kl_inside"] = ((kl >= low) & (kl <= high)).float().mean()
            logged["kl_log_weight"] = self.kl_log_weight.mean()
        if control is not None:
            cost = kl_weight * (self.kl_log_weight.exp() * kl).sum()
            logged["autoregressive_share"] = rules.autoregressive_share(self.autoregressive_log_weight, cost, self.nll)
            if step >= control.warmup_steps:
                self.autoregressive_log_weight = rules.autoregressive_step(
                    self.autoregressive_log_weight,
                    cost,
                    self.nll,
                    control.share,
                    control.max_share,
                    control.rate,
                    control.ratio,
                )
            logged["autoregressive_weight"] = self.autoregressive_log_weight.exp()

    # ---- What the loss gets ----

    @torch.no_grad()
    def unit_weights(self) -> dict[int, UnitWeights] | None:
        """The weights of the units until the next control step, by layer; `None` where nothing is weighed."""
        if self.settings.penalty is None and not self.settings.weighs_kl:
            return None
        if self._weights is None:
            kl = energy = constant = dict.fromkeys(self.units.layers)
            if self.settings.weighs_kl:
                kl = self.units.split((self.kl_log_weight + self.autoregressive_log_weight).exp())
            if self.settings.penalty is not None:
                energy, constant = self._linear_penalty()
            self._weights = {
                layer: UnitWeights(kl[layer], energy[layer], constant[layer]) for layer in self.units.layers
            }
        return self._weights

    def _linear_penalty(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        measured = self.means.energy
        if self.measurements:
            low, high = self.settings.penalty.weights_at(self.step)
            relative = self.settings.penalty.hinge == "relative"
            value, slope = rules.band_penalty(measured, self.limits(), low, high, relative)
        else:
            value = slope = torch.zeros_like(measured)
        self._logged["band_penalty"] = value.sum()
        rest = {layer: part.sum() for layer, part in self.units.split(value - slope * measured).items()}
        return self.units.split(slope), rest

    # ---- What a log and a checkpoint get ----

    def logs(self) -> dict[str, float]:
        """What the last control step has found, as numbers; names units that cannot be steered. Waits for the device,
        once.
        """
        if not self.measurements:
            return {}
        self.unit_weights()
        names = list(self._logged)
        stuck = torch.zeros(()) if self._stuck is None else self._stuck.sum()
        values = torch.stack([stuck.to(self.nll), *(self._logged[name].to(self.nll) for name in names)]).tolist()
        if values[0] > 0:
            self._name_stuck()
        return {f"regime/{name}": value for name, value in zip(names, values[1:], strict=True)}

    def _name_stuck(self) -> None:
        stuck = self._stuck.cpu()
        new = stuck & ~self._reported
        self._reported |= stuck
        if new.any():
            logger.warning(
                f"{int(new.sum())} units have a mean energy E[mu^2] of exactly 0, from which no rescaling and no "
                f"penalty recovers them: {self.units.names(new)}. Their mean or the activation they read is 0: "
                "initialise these again, or train without them."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors on the CPU."""
        state = {**self.means._asdict(), **{name: getattr(self, name) for name in _STATE}}
        state |= {"measurements": torch.tensor(self.measurements), "step": torch.tensor(self.step)}
        state |= {f"{_LOGGED}{name}": value for name, value in self._logged.items()}
        # copies, for a file has no room for two names of one tensor
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """
        Takes back what `state_dict` gave.

        Raises:
            ValueError: if it is of a model with another number of units.
        """
        if len(state["energy"]) != self.units.total:
            raise ValueError(
                f"The checkpoint's regime control is of {len(state['energy'])} units, and this model has "
                f"{self.units.total}: resume with the model that it was saved with."
            )
        device = self.nll.device
        self.means = UnitMeans(*(state[name].to(device) for name in UnitMeans._fields))
        for name in _STATE:
            setattr(self, name, state[name].to(device))
        self.measurements, self.step = int(state["measurements"]), int(state["step"])
        logged = [name for name in state if name.startswith(_LOGGED)]
        self._logged = {name.removeprefix(_LOGGED): state[name].to(device) for name in logged}
        self._weights = None


def check_neurons(settings: RegimeControl, neurons: dict[int, list[EVE]], kind: str) -> None:
    """
    Raises `ValueError` for a control that these neurons cannot have, with the way out.

    Args:
        settings: The control.
        neurons: Layer number to its EVE modules.
        kind: Name of the model's class.
    """
    if not neurons:
        raise ValueError(
            f"Regime control steers EVE units, and this {kind} has none: give its config an EVEConfig (or make it "
            "variational), or leave `regime` out."
        )
    config = next(iter(neurons.values()))[0].config
    if settings.rescales and config.mean == "identity":
        which = "projection" if settings.projection is not None else "homeostasis"
        raise ValueError(
            f"Regime control's {which} rescales a unit's mean, and mean='identity' has nothing to rescale: choose "
            "mean='gain' (one number a unit) or mean='linear'."
        )
    guard = settings.scale_guard
    if guard is not None and guard.kick > 0 and config.scale == "scalar":
        raise ValueError(
            "Regime control's kick moves the log-scale of single units, and scale='scalar' is one number for all of "
            "them: choose scale='unit' or scale='input', or kick=0."
        )
    if guard is not None:
        low, high = math.exp(config.log_scale_min), math.exp(config.log_scale_max)
        for name, value in (("floor", guard.floor), ("ceiling", guard.ceiling)):
            if value is not None and not low <= value <= high:
                raise ValueError(
                    f"Regime control's {name}={value} lies outside the scales that the units can have, [{low:.3g}, "
                    f"{high:.3g}] = exp([log_scale_min, log_scale_max]): choose another, or widen that range."
                )
    if settings.autoregressive is not None and config.prior != "autoregressive":
        raise ValueError(
            "Regime control's `autoregressive` steers the share of the autoregressive prior, and the prior is "
            f"{config.prior!r}: set prior='autoregressive', or leave it out."
        )
