"""Histograms of what the units do, in the logs that the trainer keeps anyway."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback

# Optimizer steps from one set of histograms to the next, at least: each costs kilobytes a layer on disk.
INTERVAL = 100
# The statistics of a unit, and what the histogram of their logarithm is called.
HISTOGRAMS = {"kl_per_unit": "unit_kl_log10", "scale": "unit_scale_log10", "mean_energy": "unit_mean_energy_log10"}
# What is smaller counts as this in a logarithm.
_SMALLEST = 1e-12


class DiagnosticsCallback(TrainerCallback):
    """
    Writes histograms over the units of each layer to TensorBoard and to trackio, where `report_to` names them.

    `unit_kl_log10/layer_<number>` (KL, nats a token), `unit_scale_log10/...` (σ) and `unit_mean_energy_log10/...`
    (E[μ²]) are histograms of log10, for the units of a layer differ by powers of ten. They are means over the tokens
    of a step that is logged, over all processes; at the first log and then at least 100 steps apart. The trainer adds
    this callback itself. Without a writer it asks for nothing.

    Args:
        trainer: The trainer it is added to.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._next = 0
        # By layer: the statistics of its units one after the other, and the tokens that they are sums over.
        self._sums: dict[int, Tensor] = {}

    @property
    def _writers(self) -> list[TrainerCallback]:
        # On every process, though only the first one's writes: all of them take part in adding up.
        callbacks = self.trainer.callback_handler.callbacks
        return [one for one in callbacks if isinstance(one, (TensorBoardCallback, TrackioCallback))]

    @torch.no_grad()
    def add(self, posteriors: Mapping | None) -> None:
        """Adds the statistics of a micro-batch of a step that is logged: `{layer: PosteriorStatistics}`."""
        if not posteriors or self.trainer.state.global_step + 1 < self._next or not self._writers:
            return
        for layer, statistics in posteriors.items():
            # Below the split a layer has fewer rows than above it: each counts its own.
            sums = [getattr(statistics, name).float() * statistics.tokens for name in HISTOGRAMS]
            vector = torch.cat([*sums, statistics.tokens.float().reshape(1)]).to(self.trainer.args.device)
            self._sums[layer] = self._sums[layer] + vector if layer in self._sums else vector

    def on_train_begin(self, args, state, control, **kwargs):
        self._next, self._sums = 0, {}

    def on_log(self, args, state, control, **kwargs):
        """Writes what has been added since the last log."""
        if not self._sums:
            return
        sums, self._sums = self._sums, {}
        self._next = state.global_step + INTERVAL
        vector = self.trainer.accelerator.reduce(torch.cat(list(sums.values())), reduction="sum").cpu()
        if not state.is_world_process_zero:
            return
        found = {}
        for layer, part in zip(sums, vector.split([len(one) for one in sums.values()]), strict=True):
            means = (part[:-1] / part[-1].clamp(min=1)).view(len(HISTOGRAMS), -1)
            for name, values in zip(HISTOGRAMS.values(), means, strict=True):
                finite = values[values.isfinite()].clamp(min=_SMALLEST).log10()
                if len(finite):
                    found[f"{name}/layer_{layer}"] = finite.numpy()
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
