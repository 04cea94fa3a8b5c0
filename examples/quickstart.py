"""Load a variational language model, generate with it, and read beside each token how uncertain it was.

    python examples/quickstart.py path/to/model --prompt "The with statement"

Without a model it makes a tiny one, untrained, in a temporary folder: it writes nonsense, but everything runs.
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_variational  # registers the classes with the Auto classes  # noqa: F401
from hf_variational import EVEConfig, VariationalGPTConfig


def save_tiny_model(folder: str) -> None:
    """Writes a model of a few thousand parameters and its tokenizer."""
    from hf_variational.training.data import train_tokenizer

    text = "The with statement is used to wrap the execution of a block with methods defined by a context manager."
    tokenizer = train_tokenizer([text], vocab_size=300)
    config = VariationalGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        eve=EVEConfig(initial_scale=0.5),
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or Hub name of a model; without it a tiny one is made")
    parser.add_argument("--prompt", default="The with statement is used to", help="what the text begins with")
    parser.add_argument("--samples", type=int, default=8, help="posterior samples")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="tokens to generate")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        if options.model is None:
            save_tiny_model(temporary)
        run(options.model or temporary, options)


def run(folder: str, options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)

    # A forward pass in eval mode is the mean pass: deterministic, one pass, no uncertainty.
    with torch.no_grad():
        mean_pass = model(**inputs)
    favourite = mean_pass.logits[0, -1].argmax()
    print(f"mean pass: after {options.prompt!r} the likeliest token is {tokenizer.decode(favourite)!r}\n")

    torch.manual_seed(0)
    generated = model.generate(
        **inputs,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        num_posterior_samples=options.samples,
        return_dict_in_generate=True,
        output_uncertainty=True,
    )
    measures = generated.uncertainty
    new_tokens = generated.sequences[0, inputs["input_ids"].shape[1] :]

    print(f"{options.samples} posterior samples; entropies in nats")
    print(f"{'token':<18}{'entropy':>9}{'expected':>9}{'mutual information':>20}{'top-1 flips':>13}")
    for position, token in enumerate(new_tokens):
        print(
            f"{tokenizer.decode(token)!r:<18}"
            f"{measures.predictive_entropy[0, position]:>9.3f}"
            f"{measures.expected_entropy[0, position]:>9.3f}"
            f"{measures.mutual_information[0, position]:>20.4f}"
            f"{measures.top1_flip_rate[0, position]:>13.2f}"
        )
    unsure = measures.mutual_information[0].argmax()
    print(f"\nthe samples disagree most about {tokenizer.decode(new_tokens[unsure])!r}")


if __name__ == "__main__":
    main()
