"""A recipe of a few thousand parameters, its space, and searches that take a second or two."""

import io
import json

from rich.console import Console

from hf_variational.autopilot import search

TEXT = "the cat sat on the mat. the dog sat on the log. " * 24
ARGUMENTS = {
    "output_dir": "unused",
    "seed": 0,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-2,
    "logging_steps": 6,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_posterior_samples": 2,
    "use_cpu": True,
}


def recipe_content(folder, **arguments):
    text = folder / "text.txt"
    text.write_text(TEXT)
    return {
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "eve": {"scale": "unit", "initial_scale": 0.3},
        },
        "data": {"train": str(text), "validation_fraction": 0.2, "block_size": 16},
        "tokenizer": {"vocab_size": 270},
        "arguments": {**ARGUMENTS, **arguments},
    }


def write(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def files(folder, space, **arguments):
    """Paths of a recipe and a space, written."""
    return write(folder / "recipe.yaml", recipe_content(folder, **arguments)), write(folder / "space.yaml", space)


def run(folder, space, output="found", console=None, arguments=None, **options):
    recipe, space = files(folder, space, **(arguments or {}))
    console = console or Console(file=io.StringIO())
    settings = {"trials": 4, "seeds": 0, "progress": False, "console": console, **options}
    return search(recipe, space, folder / output, **settings)


def comparable(outcome):
    """All of the trials but the time they took."""
    return [(row.state, row.values, row.metrics, row.violations, row.curve) for row in outcome.rows]
