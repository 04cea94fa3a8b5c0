"""Fine-tune a language model by two adapters on one frozen base: LoRA for what it writes, EVE for how sure it is.

    python examples/retrofit_with_lora.py path/to/model --text my_domain.txt --output runs/adapters

Without a model it makes a tiny one, untrained, and without a text it takes the reference that Python carries. Both
adapters are megabytes, and whoever has the base model loads them, together or each alone; of the EVE adapter they need
`import hf_variational`.
"""

import argparse
import os
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments, set_seed

from hf_variational import EVEAdapterConfig, EVEConfig, calibrate_prior, evaluate_language_model
from hf_variational.training.data import load_text, pack, train_tokenizer

# peft warns of a second method on a base, which is what this program is about.
warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder or Hub name of a model; without it a tiny one is made")
    parser.add_argument("--text", default="pydoc_data.topics", help="text file, or the reference that Python carries")
    parser.add_argument("--output", default="runs/retrofit_with_lora", help="folder for the adapters")
    parser.add_argument("--layers", default="last_quarter", help="layers whose units become random")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA, and of the units' scales")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks in a step")
    parser.add_argument("--block-size", type=int, default=128, help="tokens in a block")
    parser.add_argument("--samples", type=int, default=8, help="posterior samples where the model is asked")
    parser.add_argument("--prompt", default="The with statement", help="what the text begins with")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    return parser.parse_args(argv)


def save_tiny_model(folder: str, text) -> None:
    """Writes a Llama of about 200,000 parameters and its tokenizer."""
    tokenizer = train_tokenizer(text, vocab_size=512)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    set_seed(0)
    text = load_text(options.text)
    with tempfile.TemporaryDirectory() as temporary:
        if options.model is None:
            save_tiny_model(temporary, text)
        return run(options.model or temporary, text, options)


def run(folder: str, text, options: argparse.Namespace) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = pack(text, tokenizer, options.block_size).train_test_split(test_size=0.1, seed=0)
    test = blocks["test"].select(range(min(32, len(blocks["test"]))))

    # ---- Two adapters on one base: each wrapper trains, runs and saves both ----
    base = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, lora, adapter_name="task")
    eve = EVEAdapterConfig(
        eve=EVEConfig(scale="input", scale_rank=options.rank, prior="centered"),
        layers=options.layers,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, eve, adapter_name="posterior")
    model.print_trainable_parameters()
    # Each unit's noise starts at a tenth of its own standard deviation; the mean pass is still the base model.
    calibrate_prior(model, blocks["train"].select(range(min(64, len(blocks["train"])))))

    # ---- A plain Trainer: the loss has the KL ----
    before = evaluate(model, test, options)
    arguments = TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=options.cpu,
    )
    Trainer(model, arguments, train_dataset=blocks["train"]).train()
    after = evaluate(model, test, options)
    print(f"NLL of held-out text, {options.samples} samples: {before:.3f} before, {after:.3f} after")

    # ---- Save both, and load them on a fresh base ----
    model.save_pretrained(options.output)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    sizes = {}
    for name in ("task", "posterior"):
        path = os.path.join(options.output, name)
        loaded = PeftModel.from_pretrained(loaded, path, adapter_name=name).get_base_model()
        sizes[name] = os.path.getsize(os.path.join(path, "adapter_model.safetensors"))
        print(f"{path}: {sizes[name] / 1e6:.2f} MB")
    show(loaded, tokenizer, options)
    return {"before": before, "after": after, "sizes": sizes, "loaded": evaluate(loaded, test, options)}


def evaluate(model, blocks, options: argparse.Namespace) -> float:
    """NLL of the predictive distribution, nats a token."""
    metrics = evaluate_language_model(
        model, blocks, num_posterior_samples=options.samples, batch_size=options.batch_size, progress=False, seed=0
    )
    return metrics["samples"]["nll"]


def show(model, tokenizer, options: argparse.Namespace) -> None:
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    torch.manual_seed(0)
    generated = model.eval().generate(
        **inputs,
        max_new_tokens=16,
        do_sample=False,
        num_posterior_samples=options.samples,
        return_dict_in_generate=True,
        output_uncertainty=True,
    )
    measures = generated.uncertainty
    print(f"\nafter {options.prompt!r}, in nats\n{'token':<18}{'entropy':>9}{'mutual information':>20}")
    for position, token in enumerate(generated.sequences[0, inputs["input_ids"].shape[1] :]):
        entropy, information = measures.predictive_entropy[0, position], measures.mutual_information[0, position]
        print(f"{tokenizer.decode(token)!r:<18}{entropy:>9.3f}{information:>20.4f}")


if __name__ == "__main__":
    main()
