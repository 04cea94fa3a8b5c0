"""The card beside a saved adapter."""

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import peft
from huggingface_hub import ModelCard, ModelCardData

from ...version import __version__

if TYPE_CHECKING:
    from .config import EVEAdapterConfig

_TAGS = {"eve", "hf_variational", "variational"}
_MARK = "<!-- hf_variational: {} -->"
_MARKED = re.compile(r"<!-- hf_variational: (\w+) -->\s*$")
_CARD = """# EVE adapter

An adapter that makes the feed-forward units of {layers} of {base} random (method "EVE"): text is generated with the
uncertainty of each token beside it. {mean}

## How to use it

```bash
pip install 'hf-variational>={version}' peft
```

Importing `hf_variational` is enough to make the method known to peft; without it peft stops with `KeyError: 'EVE'`.

```python
import hf_variational  # registers the method
from peft import {auto_class}

model = {auto_class}.from_pretrained("PATH_OF_THIS_ADAPTER")
{use}
```

## What is in it

| | |
|---|---|
| layers | {numbers} |
| units | {eve} |
| objective | `{objective}`, KL weight {kl_weight:g} |

### Framework versions

- PEFT {peft}
- hf_variational {version}
"""
_GENERATE = """out = model.generate(
    **inputs, num_posterior_samples=8, output_uncertainty=True, return_dict_in_generate=True
)
out.uncertainty.mutual_information  # nats, of each generated token"""
_FORWARD = """out = model(**inputs, num_posterior_samples=8, output_uncertainty=True)
out.uncertainty.mutual_information  # nats"""
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def write_card(config: "EVEAdapterConfig", directory: str | os.PathLike) -> bool:
    """Writes `README.md` into an adapter's folder in the place of peft's empty form, or of our card as we left it.

    Returns:
        Whether it was written; a person's stays.
    """
    readme = Path(directory) / "README.md"
    card = None
    if readme.is_file():
        try:
            card = ModelCard.load(readme)
        except Exception:  # metadata that does not parse was written by a person
            return False
        if not _is_replaceable(card.text):
            return False
    text = _text(config)
    data = ModelCardData(library_name="peft", base_model=config.base_model_name_or_path) if card is None else card.data
    data["tags"] = sorted({*(data.get("tags") or []), *_TAGS})
    content = f"---\n{data.to_yaml()}\n---\n\n{text}\n{_MARK.format(_digest(text))}\n"
    readme.write_text(content, encoding="utf-8")
    return True


def _text(config: "EVEAdapterConfig") -> str:
    numbers = sorted(int(layer) for layer in config.to_dict()["layer_units"] or {})
    base = f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "its base model"
    identity = config.eve["mean"] == "identity"
    defaults = {"mean", "scale", "scale_rank", "prior", "initial_scale"}
    generates = config.task_type is None or config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    return _CARD.format(
        layers="1 layer" if len(numbers) == 1 else f"{len(numbers)} layers",
        base=base,
        mean="Its mean pass is the base model." if identity else "Its mean pass has learned means.",
        auto_class=_AUTO_CLASSES.get(config.task_type, "AutoPeftModel"),
        use=_GENERATE if generates else _FORWARD,
        numbers=", ".join(map(str, numbers)),
        eve=", ".join(f"`{name}={value!r}`" for name, value in config.eve.items() if name in defaults),
        objective=config.objective,
        kl_weight=config.kl_weight,
        peft=peft.__version__,
        version=__version__,
    )


def _is_replaceable(text: str) -> bool:
    mark = _MARKED.search(text.rstrip())
    if mark is not None:
        return _digest(text[: mark.start()]) == mark.group(1)
    form = ModelCard.from_template(ModelCardData()).text
    return not text.strip() or _lines(text) == [*_lines(form), "### Framework versions"]


def _lines(text: str) -> list[str]:
    # peft adds its version to whatever card it finds.
    return [line for line in text.strip().splitlines() if line.strip() and not line.startswith("- PEFT ")]


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(_lines(text)).encode()).hexdigest()[:16]
