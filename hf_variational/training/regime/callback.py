"""Regime control in a training: when it measures, when it acts, what it saves."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ...diagnostics.neurons import neurons_of
from ...modeling import UnitWeights
from .controller import RegimeController, check_neurons
from .measuring import UnitSums
from .rules import Limits
from .settings import RegimeControl

STATE_FILE = "regime.safetensors"


class RegimeControlCallback(TrainerCallback):
    """
    Measures the units at control steps and steers them after the optimizer's step; needs nothing of a model but its
    tape and its neurons.

    The [`VariationalTrainer`] adds one where its arguments have `regime`. It asks `measures_at` whether a step's
    forward passes report their posteriors and hands these to `measure`; their loss gets `unit_weights`.

    Args:
        settings: What to do.
        model: The model that is trained; its neurons are found at once.
        device: Where it is trained.
        kl_weight: Tells the KL weight of the step that is being taken.
        add_up: Adds a vector up over the processes; `None`: there is one.

    Raises:
        ValueError: for a model that the control does not fit; see `check_neurons`.
    """

    def __init__(
        self,
        settings: RegimeControl,
        model: nn.Module,
        device: torch.device,
        kl_weight: Callable[[], float],
        add_up: Callable[[Tensor], Tensor] | None = None,
    ):
        self.settings = settings
        neurons = neurons_of(model)
        check_neurons(settings, neurons, type(model).__name__)
        self.controller = RegimeController(settings, neurons, device)
        self._kl_weight = kl_weight
        self._add_up = add_up
        self._forget()

    def _forget(self) -> None:
        self._sums = UnitSums()
        self._nll: Tensor | None = None

    def measures_at(self, step: int) -> bool:
        """Whether the optimizer step after `step` steps is one that is measured."""
        return (step + 1) % self.settings.interval == 0

    def measure(self, posteriors: Mapping, nll: Tensor) -> None:
        """
        Takes in a micro-batch of a step that is measured.

        Args:
            posteriors: `{layer: PosteriorStatistics}` of the forward pass.
            nll: The micro-batch's share of the batch's NLL per target, 0-dim: those of all micro-batches and processes
                add up to it.
        """
        self._sums.add(posteriors)
        self._nll = nll if self._nll is None else self._nll + nll

    def unit_weights(self) -> dict[int, UnitWeights] | None:
        """What the forward passes of a training step are given as `unit_weights`."""
        return self.controller.unit_weights()

    def on_step_begin(self, args, state, control, **kwargs):
        self._forget()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._nll is None:
            return
        vector = torch.cat([self._sums.vector(), self._nll.detach().float().reshape(1)])
        if self._add_up is not None:
            vector = self._add_up(vector)
        means = self._sums.means(vector[:-1])
        self.controller.act(means, vector[-1], state.global_step + 1, self._kl_weight(), optimizer)
        self._forget()

    def limits(self) -> Limits:
        """The band in force, of all units."""
        return self.controller.limits()

    def logs(self) -> dict[str, float]:
        """What the last control step has found, under the names of the training log."""
        return self.controller.logs()

    def save(self, folder: str) -> None:
        """Writes its state into a checkpoint."""
        save_file(self.controller.state_dict(), Path(folder) / STATE_FILE)

    def load(self, folder: str) -> None:
        """
        Reads its state from a checkpoint.

        Raises:
            ValueError: if the checkpoint has none, or another model's.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {STATE_FILE}: it was saved by a run without regime control, whose averages and "
                "weights it would go on from. Resume without `regime`, or start again."
            )
        self.controller.load_state_dict(load_file(path))
