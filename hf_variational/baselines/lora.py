"""LoRA ensembles: low-rank adapters trained independently on one frozen base, each of which is one posterior sample.

Wang, Aitchison and Rudolph 2023 (*LoRA ensembles for large language model fine-tuning*, arXiv 2310.00035): with M
adapters B_m A_m beside the weights W of the base,

    p̄(y | x) = (1/M) Σ_m p(y | x, W + s B_m A_m).

The adapters are rows of one batch, by peft's inference with an adapter for each row: the base runs once for all.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.other import AuxiliaryTrainingWrapper

from .ensemble import check_at_most
from .samples import RowSamplesMixin, adopt


class LoraEnsembleMixin(RowSamplesMixin):
    """A language model whose posterior samples are LoRA adapters; see [`lora_ensemble`]."""

    def resolve_num_samples(self, num_posterior_samples: int | None) -> int:
        """The number of adapters of this pass; `None`: the mean pass in train mode, else all."""
        if num_posterior_samples is None:
            return 0 if self.training else len(self._adapter_names)
        return check_at_most(num_posterior_samples, len(self._adapter_names), "adapters")

    @contextmanager
    def sampling(self, num_samples: int, batch: int) -> Iterator[None]:
        """Row `b * S + s` has adapter `s` inside."""
        if self.training:
            raise ValueError(
                "peft computes with an adapter for each row at inference alone: call model.eval() first, or train one "
                "adapter at a time (num_posterior_samples=0)."
            )
        hook = partial(_name_adapters, self._adapter_names[:num_samples] * batch)
        with ExitStack() as handles:
            for module in self.modules():
                if isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper)):
                    handles.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield


def lora_ensemble(model: PeftModel, adapter_names: list[str] | None = None) -> PeftModel:
    """Makes the LoRA adapters of a language model its posterior samples, in place.

    Afterwards `forward` and `generate` take `num_posterior_samples`, by default all the adapters; S is the first S of
    them, and 0 the active adapter alone, as in peft. Training, saving and unloading stay peft's.

    Args:
        model: a PEFT model with LoRA adapters around a decoder-only language model.
        adapter_names: which, in order; `None`: all.

    Returns:
        The same model, whose base model is of a subclass of its class.

    Raises:
        ValueError: for no PEFT model with LoRA, adapters that are not there, merged ones, or DoRA.

    Example:

    ```python
    >>> model = AutoPeftModelForCausalLM.from_pretrained("lora-0", adapter_name="0")
    >>> for number in "1234":
    ...     model.load_adapter(f"lora-{number}", adapter_name=number)
    >>> out = lora_ensemble(model)(**inputs, output_uncertainty=True)
    ```
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, LoraModel):
        raise ValueError(f"lora_ensemble needs a PeftModel with LoRA adapters, got {type(model).__name__}.")
    names = list(model.peft_config) if adapter_names is None else list(adapter_names)
    if not names or (missing := [name for name in names if name not in model.peft_config]):
        raise ValueError(
            f"adapter_names={adapter_names!r} names {missing if names else 'nothing'}, and the adapters of this model "
            f"are {sorted(model.peft_config)}."
        )
    if dora := [name for name in names if model.peft_config[name].use_dora]:
        raise ValueError(f"The adapters {dora} use DoRA, and peft runs no batch with an adapter for each row then.")
    if any(isinstance(module, LoraLayer) and module.merged for module in model.modules()):
        raise ValueError("Adapters are merged into the base: call model.unmerge_adapter() first.")
    base = model.get_base_model()
    adopt(base, LoraEnsembleMixin)
    base._adapter_names = names
    base.generation_config.num_posterior_samples = len(names)
    return model


def _name_adapters(names: list[str], module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": names}
