"""Loading a checkpoint, whatever kind it is, with its tokenizer."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_variational  # noqa: F401 - registers its classes with the Auto classes


def load_model(source: str, **options):
    """
    A causal language model, or a PEFT model where `source` is an adapter, and its tokenizer.

    Args:
        source: A folder, or a name on the Hub.
        options: Handed to `from_pretrained`.
    """
    if not (Path(source) / "adapter_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(source, **_without_dtype(options))
        return AutoModelForCausalLM.from_pretrained(source, **options), tokenizer
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(source, **options)
    beside = (Path(source) / "tokenizer_config.json").is_file()
    base = model.peft_config[model.active_adapter].base_model_name_or_path
    return model, AutoTokenizer.from_pretrained(source if beside else base, **_without_dtype(options))


def _without_dtype(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "dtype"}
