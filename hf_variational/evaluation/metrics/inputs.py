"""What the modules take: few kinds of inputs, so that those which answer one question combine."""

import datasets
import evaluate
import torch
from torch import Tensor

from ...modeling.predictive import measures_of_log_probabilities

_NUMBER = datasets.Value("float64")
_DISTRIBUTION = datasets.Sequence(datasets.Value("float64"))
_CLASS = datasets.Value("int64")

NUMBERS = datasets.Features({"predictions": _NUMBER})
PAIRS = datasets.Features({"predictions": _NUMBER, "references": _NUMBER})
CLASSES = datasets.Features({"predictions": _DISTRIBUTION, "references": _CLASS})
SAMPLES = datasets.Features({"predictions": datasets.Sequence(_DISTRIBUTION)})


def module_info(documentation: str, features, citation: str, arguments: str = "") -> evaluate.MetricInfo:
    """The description of a module.

    Args:
        documentation: its docstring.
        features: its inputs; of several the first that fits.
        citation: where the definition is from.
        arguments: what `compute` takes beside the inputs.
    """
    described = " or ".join(str(dict(kind)) for kind in (features if isinstance(features, list) else [features]))
    return evaluate.MetricInfo(
        description=documentation,
        citation=citation,
        inputs_description=f"\nInputs: {described}.\n{arguments}",
        features=features,
        format=None if isinstance(features, list) or features == CLASSES else "numpy",
    )


def sides(predictions, references) -> tuple[Tensor, Tensor]:
    """The scores whose reference is 0, and those whose reference is 1."""
    predictions, references = torch.as_tensor(predictions), torch.as_tensor(references)
    outside = (references != 0) & (references != 1)
    if outside.any():
        raise ValueError(f"`references` is 0 or 1 for each prediction, got {float(references[outside][0])}.")
    return predictions[references == 0], predictions[references == 1]


def mean_measure(name: str, predictions) -> float:
    """The mean of a predictive measure over tokens.

    Args:
        name: of the measure.
        predictions: its value for each token, [tokens]; or each sample's probabilities, [tokens, S, classes].
    """
    predictions = torch.as_tensor(predictions, dtype=torch.float64)
    if predictions.dim() == 1:
        return float(predictions.mean())
    total = predictions.sum(-1)
    off = (total - 1).abs() > 1e-3
    if off.any() or (predictions < 0).any():
        got = f"a sum of {float(total[off][0]):g}" if off.any() else f"a probability of {float(predictions.min()):g}"
        raise ValueError(
            "Expected each sample's probabilities, [tokens, samples, classes], which are at least 0 and add up to 1, "
            f"got {got}."
        )
    measures, _ = measures_of_log_probabilities(predictions.log().unsqueeze(2))
    return float(measures[name].double().mean())
