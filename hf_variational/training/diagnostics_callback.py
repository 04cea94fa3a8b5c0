"""Histograms of what the units do, in the logs that the trainer keeps anyway."""

from collections.abc import Mapping

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback

from .regime.measuring import UnitSums

# Optimizer steps from one set of histograms to the next, at least: each costs kilobytes a layer on disk.
INTERVAL = 100
# What is smaller counts as this in a logarithm.
_SMALLEST = 1e-12


class DiagnosticsCallback(TrainerCallback):
    """
    Writes histograms over the units of each layer to TensorBoard and to trackio, where `report_to` names them.

    `unit_kl_log10/layer_<number>` (KL, nats a token), `unit_scale_log10/...` (σ) and `unit_energy_log10/...` (E[μ²])
    are histograms of log10, for the units of a layer differ by powers of ten. They are means over the tokens of a step
    that is logged, over all processes; of the first log, and then at least 100 steps apart. The trainer adds this
    callback itself. Without a writer it asks for nothing.

    Args:
        trainer: The trainer it is added to.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._next = 0
        self._sums = UnitSums()

    @property
    def _writers(self) -> list[TrainerCallback]:
        # On every process, though only the first one's writes: all of them take part in adding up.
        callbacks = self.trainer.callback_handler.callbacks
        return [one for one in callbacks if isinstance(one, (TensorBoardCallback, TrackioCallback))]

    def add(self, posteriors: Mapping | None) -> None:
        """Adds the statistics of a micro-batch of a step that is logged: `{layer: PosteriorStatistics}`."""
        if posteriors and self.trainer.state.global_step + 1 >= self._next and self._writers:
            self._sums.add(posteriors)

    def on_train_begin(self, args, state, control, **kwargs):
        self._next, self._sums = 0, UnitSums()

    def on_log(self, args, state, control, **kwargs):
        """Writes what has been added since the last log."""
        sums, self._sums = self._sums, UnitSums()
        if sums.units is None:
            return
        self._next = state.global_step + INTERVAL
        vector = self.trainer.accelerator.reduce(sums.vector(), reduction="sum").cpu()
        if not state.is_world_process_zero:
            return
        found = {}
        for name, values in sums.means(vector)._asdict().items():
            for layer, part in sums.units.split(values).items():
                finite = part[part.isfinite()].clamp(min=_SMALLEST).log10()
                if len(finite):
                    found[f"unit_{name}_log10/layer_{layer}"] = finite.numpy()
        for writer in self._writers:
            self._write(writer, found, state.global_step)

    @staticmethod
    def _write(writer: TrainerCallback, found: dict, step: int) -> None:
        if isinstance(writer, TrackioCallback):
            import trackio

            # Numbered as the callback of transformers numbers what it logs: trackio counts the calls itself.
            histograms = {name: trackio.Histogram(values) for name, values in found.items()}
            trackio.log({**histograms, "train/global_step": step})
        elif writer.tb_writer is not None:
            for name, values in found.items():
                writer.tb_writer.add_histogram(name, values, step)
