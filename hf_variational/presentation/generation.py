"""Generate from a prompt and keep each new token beside its measures."""

from __future__ import annotations

import torch

from .tokens import AnnotatedText, annotate

__all__ = ["generate_annotated"]


def generate_annotated(
    model,
    tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    num_posterior_samples: int = 8,
    do_sample: bool = False,
    temperature: float | None = None,
    seed: int | None = None,
    title: str = "",
    **options,
) -> AnnotatedText:
    """What `model.generate` adds to `prompt`, cut into text with the measures of each token.

    Args:
        num_posterior_samples: 0 for a deterministic model or the mean pass; the text then has no measures.
        seed: seeds the global generator, which both the noise and the sampling draw from.
        options: handed to `model.generate`.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise ValueError(f"the prompt {prompt!r} has no tokens: give some text to go on from")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and length + max_new_tokens > longest:
        raise ValueError(
            f"the prompt's {length} tokens and {max_new_tokens} new ones are more than the model's {longest} "
            "positions: shorten the prompt or ask for fewer"
        )
    if getattr(model, "variational_layers", ()):
        options["num_posterior_samples"] = num_posterior_samples
        if num_posterior_samples:
            options["output_uncertainty"] = True
    if temperature is not None:
        options["temperature"] = temperature
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        options.setdefault("pad_token_id", tokenizer.eos_token_id)
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=do_sample, return_dict_in_generate=True, **options
        )
    ids = out.sequences[0].tolist()
    uncertainty = out.uncertainty if num_posterior_samples else None
    return annotate(tokenizer, ids[:length], ids[length:], uncertainty, title=title)
