"""An inspection from a text to its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets

from ..diagnostics import Band, Diagnostics, Drift, diagnose, drift
from ..diagnostics.neurons import neurons_of
from ..evaluation_program.texts import read_rows, source_name
from ..presentation.inspect_page import write_inspection
from ..training.regime.settings import BandSettings

__all__ = ["check_output", "run"]


def check_output(output: Path) -> None:
    """
    Raises:
        ValueError: for a page that cannot be written, or whose file of numbers would have its name.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(
            f"--output {output} cannot be written: give a file, such as inspect.html, in a folder that exists."
        )
    if output.suffix == ".json":
        raise ValueError(f"--output {output} is the page, and the numbers go to a .json beside it: name it .html.")


def run(
    model,
    tokenizer,
    name: str,
    data: object,
    output: Path,
    *,
    against: Callable[[], tuple[object, str]] | Path | None = None,
    other_data: object | None = None,
    band: BandSettings | None = None,
    samples: int = 1,
    length: int = 256,
    batch_size: int = 8,
    max_sequences: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Diagnostics, Drift | None]:
    """
    Diagnoses a model on a text and writes the page, and beside it a JSON file of the same name with the numbers.

    Args:
        model, tokenizer: Loaded; `name` is where from.
        data: Text source, see [`source_of`].
        output: The page's file.
        against: What to compare with on the same text: a file of numbers, or what loads a model and says its name.
        other_data: Another text to compare with; a text source.
        band: Where the mean energy of the units should be.
        samples: Posterior samples; 0 is the mean pass.
        length: Tokens of a sequence.
        max_sequences: Sequences that are read of each text.

    Raises:
        ValueError: for a model without a posterior, text that is too short, a comparison of what cannot be compared.
    """
    datasets.disable_progress_bars()
    bands = None if band is None else _bands(model, band)

    def state(network, label: str, source, option: str) -> Diagnostics:
        rows = read_rows(source, tokenizer, length, max_sequences, option)
        return diagnose(
            network,
            rows,
            bands,
            num_posterior_samples=samples,
            batch_size=batch_size,
            name=_title(label),
            data_name=source_name(source),
            seed=seed,
            progress=progress,
        )

    found = state(model, name, data, "--data")
    changes = None
    if other_data is not None:
        changes = drift(found, state(model, name, other_data, "--other-data"))
    elif isinstance(against, Path):
        changes = drift(Diagnostics.load(against), found)
    elif against is not None:
        other, other_name = against()
        changes = drift(state(other, other_name, data, "--data"), found)
    found.save(output.with_suffix(".json"))
    write_inspection(output, found, changes)
    return found, changes


def _bands(model, settings: BandSettings) -> dict[int, Band]:
    """A band for each layer, of as many units as the layer has."""
    layers = {layer: sum(one.units for one in modules) for layer, modules in neurons_of(model).items()}
    if not layers:
        raise ValueError(
            f"--band-target is of the mean energy of variational neurons, and this {type(model).__name__} has none: "
            "leave it out."
        )
    return {layer: settings.of(units, layer) for layer, units in layers.items()}


def _title(name: str) -> str:
    """What a model is called: without the folders of this machine."""
    return Path(name).name if Path(name).expanduser().is_dir() else name
