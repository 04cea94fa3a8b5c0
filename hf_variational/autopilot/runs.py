"""A trial's run: the recipe of its values, the data, the model and the trainer."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import default_data_collator
from transformers.trainer_callback import PrinterCallback

from ..baselines.costs import measure_cost
from ..training.arguments import VariationalTrainingArguments
from ..training.callbacks import own_noise
from ..training.program import RunData, make_model, make_trainer, read_data
from ..training.recipe import Recipe
from ..training.trainer import VariationalTrainer
from .dimensions import Space
from .objective import COST, NLL
from .space import recipe_with

__all__ = ["TrialRuns", "metrics_of"]

# A trial leaves numbers, and no weights.
_OF_A_TRIAL = {
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": [],
    "disable_tqdm": True,
    "push_to_hub": False,
}


class TrialRuns:
    """
    Makes what a trial trains; texts are read and tokenizers trained once.

    Args:
        content: What the recipe says, as [`read_content`] reads it.
        space: What varies.
        folder: The search's.
        costs: Whether the operations of a forward pass are counted.
    """

    def __init__(self, content: Mapping, space: Space, folder: Path, costs: bool):
        self.content, self.space, self.folder, self.costs = content, space, folder, costs
        self._scratch = folder / "running"
        self._data: dict[str, RunData] = {}
        self._made: tuple[dict, VariationalTrainingArguments] | None = None

    def recipe(self, values: Mapping[str, Any], seed: int | None = None) -> Recipe:
        """The recipe of a trial, with its own seed or another."""
        own = {} if seed is None else {"arguments.seed": seed}
        return recipe_with(self.content, {**values, **own})

    def arguments(self, recipe: Recipe) -> VariationalTrainingArguments:
        """
        The arguments of a recipe's trial. Making them resets accelerate's state, which a trainer that is there already
        still needs; asked for the recipe that was asked for last, they are a copy.
        """
        given = {**recipe.arguments, **_OF_A_TRIAL, "output_dir": str(self._scratch)}
        if self._made is None or self._made[0] != given:
            self._made = copy.deepcopy(given), VariationalTrainingArguments(**given)
        return copy.copy(self._made[1])

    def data(self, recipe: Recipe) -> RunData:
        """
        Raises:
            ValueError: if the recipe holds no text out.
        """
        if recipe.data.validation is None and not recipe.data.validation_fraction:
            raise ValueError(
                "The recipe holds no text out to measure trials on: set data.validation or data.validation_fraction."
            )
        sections = recipe.to_dict()
        named = {name: sections[name] for name in ("data", "tokenizer")} | {"retrofit": sections["retrofit"]}
        if named["retrofit"] is not None:
            named["retrofit"] = {name: named["retrofit"][name] for name in ("model", "calibration")}
        text = json.dumps(named, sort_keys=True)
        if text not in self._data:
            folder = self.folder / "tokenizers" / hashlib.sha256(text.encode()).hexdigest()[:12]
            arguments = self.arguments(recipe)
            arguments.output_dir = str(folder)
            self._data[text] = read_data(recipe, arguments)
        return self._data[text]

    def model(self, trial=None):
        """The model of an Optuna trial, for the Trainer's `model_init`; without one that of the recipe itself."""
        recipe = self.recipe({} if trial is None else self.space.suggest(trial))
        return make_model(recipe, self.arguments(recipe), self.data(recipe), calibrated=trial is None)

    def trainer(self, recipe: Recipe, model) -> VariationalTrainer:
        """A trainer of its own for a trial: its recipe also decides on callbacks and on what is trained on."""
        trainer = make_trainer(model, self.arguments(recipe), self.data(recipe))
        trainer.remove_callback(PrinterCallback)
        return trainer

    def cost(self, trainer: VariationalTrainer) -> dict[str, float]:
        """`COST` of the trainer's model, if it is asked for; leaves the generators where they stood."""
        if not self.costs:
            return {}
        args = trainer.args
        batch = default_data_collator([next(iter(trainer.eval_dataset))])
        batch = {name: value.to(args.device) for name, value in batch.items()}
        with own_noise(args.seed, 0, "cost", args.device):
            cost = measure_cost(trainer.model, batch, args.eval_posterior_samples, repeats=1)
        return {COST: cost.inference_flops_per_token}

    def train(self, values: Mapping[str, Any], seed: int) -> dict[str, float]:
        """
        Trains a trial's recipe with another seed, to its end; in all else as the trial was.

        Returns:
            The metrics of the evaluation at its end.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        recipe = self.recipe(values, seed)
        try:
            model = make_model(recipe, self.arguments(recipe), self.data(recipe))
            trainer = self.trainer(recipe, model)
            cost = self.cost(trainer)
            trainer.train()
            return metrics_of(trainer.evaluate()) | cost
        finally:
            self.clear()

    def clear(self) -> None:
        """Takes away what a trainer left in its folder."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def metrics_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """
    The metrics of an evaluation without its speed.

    Raises:
        FloatingPointError: if the NLL is not finite.
    """
    speed = ("_runtime", "_per_second", "_preparation_time")
    metrics = {
        name: float(value)
        for name, value in evaluation.items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith(speed)
    }
    if not math.isfinite(metrics[NLL]):
        raise FloatingPointError(f"The NLL of the evaluation is {metrics[NLL]}.")
    return metrics
