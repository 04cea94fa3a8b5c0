"""Make a pretrained Llama know when it does not know, without training it.

    python examples/retrofit_llama.py --model meta-llama/Llama-3.2-1B --text my_domain.txt
    python examples/retrofit_llama.py          # offline: first trains a small Llama on Python's language reference

Five steps: a stock model, variational units beside its weights, noise in proportion to what each unit does on your
text, as much noise as your text bears, and generation that says how sure it is of every token. The rival in the table
is the same model with a temperature fitted on the same text, not the bare model. (The small Llama is trained too
little to be overconfident, so noise has nothing to win there: it shows how, not how well.)
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_variational import (
    EVEConfig,
    calibrate_prior,
    fit_scale,
    fit_temperature,
    token_scores,
    token_windows,
    variationalize,
)
from hf_variational.training.data import load_text, pack, train_tokenizer


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="folder or Hub name; without it a small Llama is trained first")
    parser.add_argument("--text", default="pydoc_data.topics", help="text file, or the reference that Python carries")
    parser.add_argument("--output", default="runs/retrofit_llama", help="folder for the retrofitted model")
    parser.add_argument("--layers", default="all", help="all, last, last_quarter, or a regular expression")
    parser.add_argument("--samples", type=int, default=8, help="posterior samples")
    parser.add_argument("--tolerance", type=float, default=0.005, help="share of the NLL that dispersion may cost")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=64, help="windows for calibration, and again for the test")
    parser.add_argument("--prompt", default="The", help="what generation goes on from")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate")
    parser.add_argument("--base-steps", type=int, default=150, help="training steps of the small Llama")
    parser.add_argument("--seed", type=int, default=0, help="of training and noise")
    return parser.parse_args(argv)


def small_llama(text: str, folder: Path, length: int, steps: int, seed: int) -> str:
    """Trains a stock Llama of 1 million parameters and saves it, as if it came from the Hub."""
    tokenizer = train_tokenizer(Dataset.from_dict({"text": [text]}), vocab_size=1024)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )
    blocks = pack(Dataset.from_dict({"text": [text]}), tokenizer, block_size=length)
    Trainer(model=model, args=arguments, train_dataset=blocks, data_collator=default_data_collator).train()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return str(folder / "base")


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    torch.manual_seed(options.seed)
    output, text = Path(options.output), "\n".join(load_text(options.text)["text"])
    # Nothing of the last third is ever trained on or fitted to.
    seen, held_out = text[: 2 * len(text) // 3], text[2 * len(text) // 3 :]
    name = options.model or small_llama(seen, output, options.length, options.base_steps, options.seed)
    tokenizer = AutoTokenizer.from_pretrained(name)
    windows = {"length": options.length, "max_windows": 2 * options.windows}
    fitting = token_windows(held_out[: len(held_out) // 2], tokenizer, **windows)[: options.windows]
    test = token_windows(held_out[len(held_out) // 2 :], tokenizer, **windows)[: options.windows]

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    base_temperature = fit_temperature(model, fitting, num_posterior_samples=0).temperature
    rows = {
        "base": token_scores(model, test, 0),
        "base, tempered": token_scores(model, test, 0, temperature=base_temperature),
    }

    model = variationalize(model, eve=EVEConfig(scale="input", scale_rank=8, prior="centered"), layers=options.layers)
    calibrate_prior(model, fitting, scale=0.1)
    found = fit_scale(
        model, fitting, tolerance=options.tolerance, num_posterior_samples=options.samples, seed=options.seed
    )
    print("noise in shares of a unit's standard deviation:", end=" ")
    print({layer: round(0.1 * factor, 3) for (layer, _), factor in found.multipliers.items()})
    rows["retrofit"] = token_scores(model, test, options.samples)
    temperature = fit_temperature(model, fitting, num_posterior_samples=options.samples).temperature
    rows["retrofit, tempered"] = token_scores(model, test, options.samples, temperature=temperature)

    table = {}
    print(f"{'':20} {'NLL':>8} {'ECE':>8} {'mutual information':>20}")
    for row, scores in rows.items():
        values = scores.evaluation().compute()
        table[row] = {name: values[name] for name in ("nll", "expected_calibration_error")}
        table[row]["mutual_information"] = values.get("mutual_information", 0.0)
        print(
            "{:20} {nll:8.4f} {expected_calibration_error:8.4f} {mutual_information:20.4f}".format(row, **table[row])
        )

    model.generation_config.num_posterior_samples = options.samples
    model.save_pretrained(output / "retrofit")
    tokenizer.save_pretrained(output / "retrofit")
    again = AutoModelForCausalLM.from_pretrained(output / "retrofit").eval()
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    answer = again.generate(
        **inputs, max_new_tokens=options.new_tokens, return_dict_in_generate=True, output_uncertainty=True
    )
    new = answer.sequences[0, inputs["input_ids"].shape[1] :]
    for token, doubt in zip(new, answer.uncertainty.mutual_information[0], strict=True):
        print(f"{doubt.item():8.4f}  {tokenizer.decode(token)!r}")
    return {"table": table, "multipliers": found.multipliers, "folder": output / "retrofit"}


if __name__ == "__main__":
    main()
