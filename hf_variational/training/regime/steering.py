"""What the trainer does for regime control: it makes it, feeds it, saves it, and keeps its gate."""

from ...modeling import UnitWeights
from .callback import RegimeControlCallback
from .gate import Gate
from .measuring import UnitSums
from .settings import BandSettings, RegimeControl


class SteeringMixin:
    """Of [`VariationalTrainer`]; stands before transformers' `Trainer` among the bases."""

    _regime: RegimeControlCallback | None = None

    @property
    def _band(self) -> BandSettings | None:
        regime = RegimeControl.of(self.args.regime)
        return None if regime is None else regime.band

    def _make_regime(self) -> None:
        """
        Regime control of the model that is going to be trained, in its first state.

        Raises:
            ValueError: for one that does not fit the model, or sharded parameters that it would have to change.
        """
        if self._regime is not None:
            self.remove_callback(self._regime)
            self._regime = None
        # a search for hyperparameters sets arguments after they were checked
        regime = RegimeControl.of(self.args.regime)
        if regime is None:
            return
        if regime.writes_parameters and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "Regime control's projection, homeostasis and scale_guard change single rows of parameters, and FSDP "
                "and DeepSpeed leave each process a part of them: train with DDP, or keep to the penalty and the "
                "thermostat."
            )
        alone = self.accelerator.num_processes == 1
        self._regime = RegimeControlCallback(
            regime,
            self.model,
            self.args.device,
            self.kl_weight,
            None if alone else lambda vector: self.accelerator.reduce(vector, reduction="sum"),
        )
        self.add_callback(self._regime)

    def _will_measure(self) -> bool:
        return self._regime is not None and self._regime.measures_at(self.state.global_step)

    def _unit_weights(self) -> dict[str, dict[int, UnitWeights]]:
        """The argument of a training step's forward pass, or none."""
        weights = None if self._regime is None else self._regime.unit_weights()
        return {} if weights is None else {"unit_weights": weights}

    def _prepare_for_training(self, *args, **kwargs):
        # the model may be another one by now: a search makes one for each trial
        self._make_regime()
        return super()._prepare_for_training(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._regime is not None and checkpoint is not None:
            self._regime.load(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._regime is not None and self.args.should_save:
            self._regime.save(output_dir)

    def _regime_metrics(self, sums: UnitSums, prefix: str) -> dict[str, float]:
        """The shares of an evaluation's units under, inside and over the band, of all processes."""
        energy = sums.means(self.accelerator.reduce(sums.vector(), reduction="sum")).energy
        # what calibration has made of the band, where there is one
        limits = sums.units.limits(self._band, energy.device) if self._regime is None else self._regime.limits()
        return {f"{prefix}_regime_{name}": float(share) for name, share in limits.shares(energy)._asdict().items()}

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        gate = Gate.of(self.args)
        if gate is not None and not gate.admits(metrics):
            return False
        return super()._determine_best_metric(metrics, trial)

    def _say_if_none_was_admitted(self) -> None:
        gate = Gate.of(self.args)
        if gate is not None and self.state.best_metric is None:
            gate.warn_that_none_was_admitted(self.state.log_history)
