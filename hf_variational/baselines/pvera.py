"""PVeRA: peft's probabilistic adapters, whose low-rank activations are Gaussian.

peft's `PveraConfig` (arXiv 2512.07703): beside a frozen layer W, with frozen random A and B shared by all layers and
learned vectors λ_d, λ_b,

    (μ, log σ²) = λ_d ⊙ A x,   z ~ N(μ, σ²),   y = W x + λ_b ⊙ B z.

peft draws z in train mode, and at inference where `sample_at_inference` says so; here a posterior sample is one draw
of every z. peft trains these adapters without a KL, so there is none to report.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.pvera import PveraLayer

from ..retrofit.families import layers_of
from .samples import RowSamplesMixin, adopt


class PveraSamplesMixin(RowSamplesMixin):
    """A language model whose posterior samples are draws of its PVeRA adapter; see [`pvera_samples`]."""

    @property
    def variational_layers(self) -> list[int]:
        """Numbers of the layers with an adapter."""
        adapted = {module for module in self.modules() if isinstance(module, PveraLayer)}
        return [layer.index for layer in layers_of(self) if adapted & set(layer.module.modules())]

    @contextmanager
    def sampling(self, num_samples: int, batch: int) -> Iterator[None]:
        """Adapters draw inside, and outside in train mode alone."""
        layers = [module for module in self.modules() if isinstance(module, PveraLayer)]
        if any(layer.merged or layer.disable_adapters for layer in layers):
            raise ValueError("The PVeRA adapter is merged or disabled, so nothing is random: unmerge or enable it.")
        _set_sampling(self, True)
        try:
            yield
        finally:
            _set_sampling(self, False)


def pvera_samples(model: PeftModel) -> PeftModel:
    """Makes draws of a PVeRA adapter the posterior samples of a language model, in place.

    Afterwards `forward` and `generate` take `num_posterior_samples`; 0, the mean pass, has every z at its mean,
    whatever `sample_at_inference` says. The noise is the global generator's. Training, saving and unloading stay
    peft's.

    Args:
        model: a PEFT model with PVeRA adapters around a decoder-only language model.

    Returns:
        The same model, whose base model is of a subclass of its class.

    Raises:
        ValueError: for a model without PVeRA adapters, or adapters with a generator of their own.

    Example:

    ```python
    >>> model = get_peft_model(base, PveraConfig(r=64, target_modules=["q_proj", "v_proj"]))
    >>> Trainer(model=model, ...).train()
    >>> out = pvera_samples(model)(**inputs, num_posterior_samples=8, output_uncertainty=True)
    ```
    """
    if not isinstance(model, PeftModel) or not any(isinstance(module, PveraLayer) for module in model.modules()):
        raise ValueError(f"pvera_samples needs a PeftModel with PVeRA adapters, got {type(model).__name__}.")
    seeded = [
        name for name, config in model.peft_config.items() if getattr(config, "generator_seed", None) is not None
    ]
    if seeded:
        raise ValueError(
            f"The adapters {seeded} have a generator_seed, and with a generator of their own seeding the evaluation "
            "would not repeat a run: load them with generator_seed=None."
        )
    base = model.get_base_model()
    adopt(base, PveraSamplesMixin)
    _set_sampling(base, False)
    return model


def _set_sampling(model, draws: bool) -> None:
    for module in model.modules():
        if isinstance(module, PveraLayer):
            module.sample_at_inference.update(dict.fromkeys(module.sample_at_inference, draws))
