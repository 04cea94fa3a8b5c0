"""Callbacks of the trainer: noise that differs between processes, and an interrupt that loses nothing."""

import contextlib
import hashlib
import signal
import threading
import time

import torch
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

# A launcher hands its workers the signal that the terminal has sent them already.
_ECHO_SECONDS = 5.0


def noise_seed(seed: int, rank: int, purpose: str) -> int:
    """A seed for each process and purpose; unlike a sum, rank 1 of seed 0 differs from rank 0 of seed 1."""
    digest = hashlib.sha256(f"{seed}/{rank}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@contextlib.contextmanager
def own_noise(seed: int, rank: int, purpose: str, device: torch.device):
    """Inside the block the global generator is seeded for `purpose`; afterwards it stands where it stood."""
    devices = [device] if device.type != "cpu" else []
    kind = device.type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(noise_seed(seed, rank, purpose))
        yield


class RankNoiseCallback(TrainerCallback):
    """
    Seeds every process but the first for itself when training begins.

    The Trainer seeds all processes alike, so they would draw the same posterior noise for different data. Weights are
    made before, and the order of the data has a generator of its own. On resuming, the generators of the checkpoint
    come after this.

    Args:
        rank: Number of this process among those with different data (tensor-parallel ones share theirs).
    """

    def __init__(self, rank: int):
        self.rank = rank

    def on_train_begin(self, args, state, control, **kwargs):
        if self.rank > 0:
            torch.manual_seed(noise_seed(args.seed, self.rank, "training"))


class InterruptCallback(TrainerCallback):
    """
    Turns Ctrl-C into: finish this step, save a checkpoint, then raise `KeyboardInterrupt`. A second one stops at once.

    In a distributed run the processes agree on the step: on the CPU at every step, elsewhere at the steps that are
    logged, because agreeing means waiting for the accelerator.

    Args:
        trainer: The trainer it is added to.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.requested = False
        self.agreed = False
        self.at_once = False
        self.in_optimizer_step = False
        self._when = 0.0
        self._previous = None

    @property
    def _alone(self) -> bool:
        return self.trainer.args.world_size == 1

    def _handle(self, signum, frame):
        now = time.monotonic()
        if self.requested and (self._alone or now - self._when > _ECHO_SECONDS):
            self.at_once = True
            raise KeyboardInterrupt("Interrupted again: stopped without saving.")
        if not self.requested:
            self.requested, self._when = True, now
            logger.warning("Interrupted: saving a checkpoint after this step. Interrupt again to stop at once.")

    def install(self) -> None:
        """Takes SIGINT over, where Ctrl-C arrives at all: in the main thread of a process that does not ignore it."""
        self.requested = self.agreed = self.at_once = self.in_optimizer_step = False
        if self._previous is not None or threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signal.SIGINT)
        if previous != signal.SIG_IGN:
            self._previous = signal.default_int_handler if previous is None else previous
            signal.signal(signal.SIGINT, self._handle)

    def uninstall(self) -> None:
        """Gives SIGINT back."""
        self.requested = self.agreed = False
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _agree(self, args, control) -> bool:
        if self._alone:
            return self.requested
        if args.device.type != "cpu" and not control.should_log:
            return False
        flag = torch.tensor([float(self.requested)], device=args.device)
        return self.trainer.accelerator.reduce(flag, reduction="sum").item() > 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.in_optimizer_step = True

    def on_step_end(self, args, state, control, **kwargs):
        self.in_optimizer_step = False
        if self._agree(args, control):
            self.agreed = True
            control.should_evaluate = False
            control.should_save = True

    def on_prediction_step(self, args, state, control, **kwargs):
        # an evaluation can be long, and the training stands still at the end of a step: nothing to wait for
        if self.requested and self._alone:
            raise KeyboardInterrupt("Interrupted in an evaluation.")

    def on_save(self, args, state, control, **kwargs):
        if self.agreed:
            raise KeyboardInterrupt(f"Interrupted: checkpoint-{state.global_step} is saved in {args.output_dir}.")
