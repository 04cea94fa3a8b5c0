"""What regime control is asked to do: plain dataclasses, read from Python, from dictionaries and from recipes."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass

from ...checks import check_number, check_whole
from ...diagnostics.band import Band, check_band
from ..naming import refuse_unknown

TOWARD = ("center", "band")
HINGES = ("relative", "absolute")


def _number(owner, name: str, low: float, high: float = math.inf, **ends: bool) -> None:
    check_number(name, getattr(owner, name), low, high, where=f"{_label(owner)} ", **ends)


def _whole(owner, name: str, least: int) -> None:
    check_whole(name, getattr(owner, name), least, where=f"{_label(owner)} ")


def _one_of(owner, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{_label(owner)} `{name}`={value!r} is unknown: choose one of {known}.")


def _label(owner) -> str:
    return f"{type(owner).__name__}:"


@dataclass
class BandSettings:
    """
    The band of each layer's units: mean energy E[mu^2] in [low_factor * target, high_factor * target].

    Args:
        target: E[mu^2] that a unit is meant to have; of a heterogeneous band the geometric mean over units.
        low_factor, high_factor: Ends of the band as multiples of a unit's target.
        spread: At 1 all units have one target; above, the targets of a layer are equally spaced in logarithm over
            [target / spread, target * spread].
        order: `"sorted"`, rising with the unit's number, or `"shuffled"`.
        seed: Of the shuffling; each layer has its own order.
    """

    target: float
    low_factor: float = 0.5
    high_factor: float = 2.0
    spread: float = 1.0
    order: str = "sorted"
    seed: int = 0

    def __post_init__(self):
        check_band(self.target, self.low_factor, self.high_factor, self.spread, self.order)
        _whole(self, "seed", 0)

    def of(self, units: int, layer: int) -> Band:
        """The band of the units of a layer."""
        return Band.heterogeneous(
            self.target, units, self.low_factor, self.high_factor, self.spread, self.order, self.seed + layer
        )


@dataclass
class BandPenalty:
    """
    A squared hinge in the loss: the sum over units of weight * (distance of E[mu^2] from the band)^2.

    Args:
        weight: Of the whole penalty.
        hinge: `"relative"`: the distance is divided by the unit's target; `"absolute"`.
        low_weight, high_weight: Weights of the units under and over their band, beside `weight`.
        warmup_steps: Optimizer steps before it acts.
        ramp_steps: Steps over which the low side then rises from 0 to its weight, and after it the high side.
    """

    weight: float = 0.01
    hinge: str = "relative"
    low_weight: float = 1.0
    high_weight: float = 1.0
    warmup_steps: int = 0
    ramp_steps: int = 0

    def __post_init__(self):
        for name in ("weight", "low_weight", "high_weight"):
            _number(self, name, 0.0)
        _one_of(self, "hinge", HINGES)
        for name in ("warmup_steps", "ramp_steps"):
            _whole(self, name, 0)

    def weights_at(self, step: int) -> tuple[float, float]:
        """Weights of the low and of the high side after `step` optimizer steps."""
        past = step - self.warmup_steps
        if past < 0:
            return 0.0, 0.0
        ramp = self.ramp_steps
        low, high = (1.0, 1.0) if ramp == 0 else (min(1.0, past / ramp), min(1.0, max(0.0, past / ramp - 1.0)))
        return self.weight * self.low_weight * low, self.weight * self.high_weight * high


@dataclass
class Projection:
    """
    The means of units out of their band are rescaled into it, to a tenth of the way (in logarithm) from the nearer end
    to the target.

    Args:
        interval: Optimizer steps between projections, a multiple of the control's.
        max_factor: The most that mu is multiplied or divided by at once.
        warmup_steps: Optimizer steps before the first.
    """

    interval: int = 100
    max_factor: float = 2.0
    warmup_steps: int = 0

    def __post_init__(self):
        _whole(self, "interval", 1)
        _number(self, "max_factor", 1.0, open_low=True)
        _whole(self, "warmup_steps", 0)


@dataclass
class Homeostasis:
    """
    A gentle step for units out of their band: mu is multiplied by (aim / E[mu^2])^(eta / 2).

    Args:
        eta: Share of the distance, in logarithm, that a step goes when no unit is out of its band.
        eta_max: The same when all are; in between it rises with their share.
        toward: The aim: `"center"`, the target; or `"band"`, just inside its nearer end, as a projection's.
        max_factor: The most that mu is multiplied or divided by at once.
        warmup_steps: Optimizer steps before the first.
    """

    eta: float = 0.3
    eta_max: float = 0.5
    toward: str = "center"
    max_factor: float = 1.25
    warmup_steps: int = 0

    def __post_init__(self):
        for name in ("eta", "eta_max"):
            _number(self, name, 0.0, 1.0, open_low=True)
        if self.eta > self.eta_max:
            raise ValueError(f"{_label(self)} `eta`={self.eta} is above `eta_max`={self.eta_max}: lower one.")
        _one_of(self, "toward", TOWARD)
        _number(self, "max_factor", 1.0, open_low=True)
        _whole(self, "warmup_steps", 0)


@dataclass
class Thermostat:
    """
    A weight of the KL for each unit, beside `kl_weight`, that holds the unit's KL in [kl_min, kl_max].

    Its logarithm is moved by the distance of log KL from the inner part of the range, up where the KL is too large.

    Args:
        kl_min, kl_max: Nats per token that a unit may spend.
        rate: What the distance adds to the logarithm for good, per control step.
        gain: What it adds as long as it lasts.
        ratio: The most that a unit's weight (without what `gain` adds) is above or below its layer's (geometric) mean.
        emergency_step: What the logarithm goes down by where the unit is dead (KL below 1e-4).
        max_share: Share of the loss that the weights never let the KL exceed, C / (|NLL| + C) with C the weighted KL
            as last measured; where it does without weights, they do not add to it. An optimizer like Adam moves a
            scale by its learning rate, so a KL that drowns the likelihood brings a range that is far away no nearer.
        warmup_steps: Optimizer steps before it acts.
    """

    kl_min: float
    kl_max: float
    rate: float = 0.5
    gain: float = 10.0
    ratio: float = 100.0
    emergency_step: float = 1.0
    max_share: float = 0.5
    warmup_steps: int = 0

    def __post_init__(self):
        _number(self, "kl_min", 0.0)
        _number(self, "kl_max", 0.0, open_low=True)
        if not self.kl_min < self.kl_max:
            raise ValueError(
                f"{_label(self)} `kl_min`={self.kl_min!r} must be below `kl_max`={self.kl_max!r}: each unit's KL is "
                "held between them, in nats."
            )
        _number(self, "rate", 0.0, open_low=True)
        _number(self, "gain", 0.0)
        _number(self, "ratio", 1.0, open_low=True)
        _number(self, "emergency_step", 0.0)
        _number(self, "max_share", 0.0, 1.0, open_low=True, open_high=True)
        _whole(self, "warmup_steps", 0)


@dataclass
class ScaleGuard:
    """
    Keeps each unit's mean scale sigma in [floor, ceiling] by moving its log-scale, and kicks dead units.

    Args:
        floor, ceiling: Ends of the range; `None`: none.
        kick: What the log-scale of a dead unit (KL below 1e-4) goes down by, away from its prior's; 0: no kick.
        max_shift: The most that a log-scale moves at once.
        warmup_steps: Optimizer steps before it acts.
    """

    floor: float | None = None
    ceiling: float | None = None
    kick: float = 0.0
    max_shift: float = 0.5
    warmup_steps: int = 0

    def __post_init__(self):
        for name in ("floor", "ceiling"):
            if getattr(self, name) is not None:
                _number(self, name, 0.0, open_low=True)
        if self.floor is not None and self.ceiling is not None and not self.floor < self.ceiling:
            raise ValueError(f"{_label(self)} `floor`={self.floor!r} must be below `ceiling`={self.ceiling!r}.")
        _number(self, "kick", 0.0)
        _number(self, "max_shift", 0.0, open_low=True)
        _whole(self, "warmup_steps", 0)
        if self.floor is None and self.ceiling is None and self.kick == 0:
            raise ValueError(
                f"{_label(self)} it has neither `floor`, `ceiling` nor `kick`: give one, or leave it out."
            )


@dataclass
class BandCalibration:
    """
    Moves all bands by one factor, toward given shares of the units under and over them. What the targets of units and
    layers are to each other stays.

    Its logarithm moves by `rate` times ((share over - over) - (share under - under)).

    Args:
        under, over: Shares of the units that are meant to be under and over.
        rate: Per control step.
        max_step: The most that the logarithm moves at once.
        warmup_steps: Optimizer steps before it acts.
        steps: Optimizer steps, after these, at which the band is frozen; `None`: never.
    """

    under: float = 0.05
    over: float = 0.05
    rate: float = 0.5
    max_step: float = 0.1
    warmup_steps: int = 0
    steps: int | None = None

    def __post_init__(self):
        for name in ("under", "over"):
            _number(self, name, 0.0, 1.0, open_high=True)
        if self.under + self.over >= 1:
            raise ValueError(
                f"{_label(self)} `under`={self.under} and `over`={self.over} leave no unit inside: they must add up "
                "to less than 1."
            )
        for name in ("rate", "max_step"):
            _number(self, name, 0.0, open_low=True)
        _whole(self, "warmup_steps", 0)
        if self.steps is not None:
            _whole(self, "steps", 1)

    def acts_at(self, step: int) -> bool:
        """Whether the band still moves after `step` optimizer steps."""
        past = step - self.warmup_steps
        return past >= 0 and (self.steps is None or past < self.steps)


@dataclass
class AutoregressiveControl:
    """
    A weight of the KL from the autoregressive prior, beside `kl_weight`, that holds its share of the loss.

    With C = kl_weight * weight * KL the share is C / (|NLL| + C).

    Args:
        share: Meant share of the loss.
        max_share: Share that the weight never lets it exceed, for the KL and the NLL as last measured.
        rate: What the logarithm of the weight moves by, times log(share / measured share), per control step.
        ratio: The most that `kl_weight` is multiplied or divided by, but for `max_share`.
        warmup_steps: Optimizer steps before it acts.
    """

    share: float = 0.05
    max_share: float = 0.2
    rate: float = 0.1
    ratio: float = 100.0
    warmup_steps: int = 0

    def __post_init__(self):
        for name in ("share", "max_share"):
            _number(self, name, 0.0, 1.0, open_low=True, open_high=True)
        if self.share > self.max_share:
            raise ValueError(f"{_label(self)} `share`={self.share} is above `max_share`={self.max_share}: lower one.")
        _number(self, "rate", 0.0, open_low=True)
        _number(self, "ratio", 1.0, open_low=True)
        _whole(self, "warmup_steps", 0)


@dataclass
class RegimeControl:
    """
    Regime control of the EVE units of a model; the field `regime` of [`VariationalTrainingArguments`].

    Each part is off where it is `None`, and may be given as a dictionary of its fields. The statistics it goes by are
    measured every `interval` optimizer steps, over the accumulated batch of all processes, and averaged over time.

    Args:
        band: Where the mean energies of the units should be. Alone it changes nothing: the shares of the units under,
            inside and over it are logged as `regime/...`, and of an evaluation as `eval_regime_...`.
        penalty, projection, homeostasis, calibration: About the band, which they need.
        thermostat, scale_guard, autoregressive: About KL and scale of the units.
        min_inside: Floor of `eval_regime_inside` below which a checkpoint is no candidate for the best one.
        interval: Optimizer steps between two control steps.
        decay: How much of the average over time stays at a control step; 0: the last measurement alone.

    Raises:
        ValueError: for a value that makes no sense, naming it, and for an unknown key of a dictionary.

    Example:

    ```python
    >>> RegimeControl(band={"target": 0.02, "low_factor": 0.25, "high_factor": 4.0}, homeostasis={})
    ```
    """

    band: BandSettings | None = None
    penalty: BandPenalty | None = None
    projection: Projection | None = None
    homeostasis: Homeostasis | None = None
    thermostat: Thermostat | None = None
    scale_guard: ScaleGuard | None = None
    calibration: BandCalibration | None = None
    autoregressive: AutoregressiveControl | None = None
    min_inside: float | None = None
    interval: int = 5
    decay: float = 0.5

    def __post_init__(self):
        for name, cls in _PARTS.items():
            setattr(self, name, _part(name, getattr(self, name), cls))
        _whole(self, "interval", 1)
        _number(self, "decay", 0.0, 1.0, open_high=True)
        if self.min_inside is not None:
            _number(self, "min_inside", 0.0, 1.0)
        for name in ("penalty", "projection", "homeostasis", "calibration", "min_inside"):
            if getattr(self, name) is not None and self.band is None:
                raise ValueError(
                    f"{_label(self)} `{name}` is about the band, and there is none: give `band`, with the mean energy "
                    "that the units should have as its `target`."
                )
        if self.projection is not None and self.projection.interval % self.interval:
            raise ValueError(
                f"{_label(self)} `projection.interval`={self.projection.interval} is no multiple of "
                f"`interval`={self.interval}, at which the units are measured."
            )

    @classmethod
    def of(cls, value: "RegimeControl | Mapping | None") -> "RegimeControl | None":
        """From what the training arguments have: itself, or its dictionary."""
        return _part("regime", value, cls)

    def to_dict(self) -> dict:
        """Plain values that `of` reads back."""
        return dataclasses.asdict(self)

    @property
    def rescales(self) -> bool:
        """Whether means are rescaled."""
        return self.projection is not None or self.homeostasis is not None

    @property
    def writes_parameters(self) -> bool:
        """Whether parameters are changed beside the optimizer."""
        return self.rescales or self.scale_guard is not None

    @property
    def weighs_kl(self) -> bool:
        """Whether units have a weight of their KL."""
        return self.thermostat is not None or self.autoregressive is not None


_PARTS = {
    name: next(option for option in typing.get_args(annotation) if option is not type(None))
    for name, annotation in typing.get_type_hints(RegimeControl).items()
    if any(dataclasses.is_dataclass(option) for option in typing.get_args(annotation))
}


def _part(name: str, value, cls: type):
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"`{name}` is a {cls.__name__}, a mapping of its fields or null, got {value!r}.")
    fields = dataclasses.fields(cls)
    refuse_unknown(value, [item.name for item in fields], f"`{name}` of the regime control")
    missing = [
        item.name
        for item in fields
        if item.default is item.default_factory is dataclasses.MISSING and item.name not in value
    ]
    if missing:
        raise ValueError(f"`{name}` of the regime control has no `{'` and no `'.join(missing)}`.")
    return cls(**value)
