"""Temperature scaling: a deterministic model whose logits are divided by one number, fitted on validation data.

Guo, Pleiss, Sun and Weinberger 2017 (*On Calibration of Modern Neural Networks*, arXiv 1706.04599), equation 9:

    p_T(y | x) = softmax(logits / T).

`hf_variational.evaluation.fit_temperature` fits T. The weights are one point, so every posterior sample is the same
and the predictive entropy is all aleatoric.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from ..evaluation.temperature import check_temperature
from .samples import ARGUMENTS, TARGETS, RowSamplesMixin, abandon, adopt, join_samples


class TemperedMixin(RowSamplesMixin):
    """A language model at a temperature; see [`tempered`]."""

    @property
    def variational_layers(self) -> list[int]:
        """None: there is nothing random."""
        return []

    @contextmanager
    def sampling(self, num_samples: int, batch: int) -> Iterator[None]:
        """All samples are the same."""
        yield

    def _stock_pass(self, inputs: dict):
        outputs = super()._stock_pass({name: value for name, value in inputs.items() if name not in TARGETS})
        logits = outputs.logits / self._temperature
        scored = join_samples(logits, None, 1, inputs, ARGUMENTS)
        return type(outputs)(**{**outputs, **scored, "logits": logits})


def tempered(model: PreTrainedModel, temperature: float) -> PreTrainedModel:
    """Divides the logits of a deterministic language model by a temperature, in `forward`, its loss and `generate`, in
    place.

    `num_posterior_samples` is understood, so that the entropy is had in the same way as of other methods; every sample
    is the same. A model with posterior samples is tempered where it is evaluated (`token_scores(temperature=...)`).

    Args:
        model: a decoder-only language model, whose checkpoint stays that of the stock class, without T.
        temperature: T; 1 changes nothing.

    Returns:
        The same model, of a subclass of its class, which `untempered` takes away again.

    Raises:
        ValueError: for a temperature that is not a finite number above 0; for a model that samples or is tempered
            already.

    Example:

    ```python
    >>> fitted = fit_temperature(model, validation)
    >>> evaluate_language_model(tempered(model, fitted.temperature), test)
    ```
    """
    temperature = check_temperature(temperature)
    if isinstance(model, TemperedMixin):
        raise ValueError(f"This model is at temperature {model._temperature} already: call untempered(model) first.")
    adopt(model, TemperedMixin)
    model._temperature = temperature
    return model


def untempered(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `tempered`, in place.

    Raises:
        ValueError: for a model that `tempered` did not make.
    """
    abandon(model, TemperedMixin, "tempered")
    del model._temperature
    return model
