"""Train a variational language model in a loop of your own, with Accelerate and without a Trainer.

    python examples/accelerate_loop.py
    accelerate launch --config_file training/accelerate/two_cpu_processes.yaml examples/accelerate_loop.py

(`accelerate launch --cpu --num_processes 2` without that file starts one process, unless there is MPI.)

Three things differ from the loop of a deterministic model, and each is marked below:

1. The loss is a sum over tokens divided by the target tokens of the *whole* accumulated batch. A mean for each
   micro-batch would multiply the KL by the accumulation steps and weigh short micro-batches too much.
2. The weight of the KL is a tensor that a schedule moves.
3. Every process draws posterior noise of its own.
"""

import argparse
from contextlib import nullcontext
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_cosine_schedule_with_warmup

from hf_variational import EVEConfig, VariationalGPTConfig, evaluate_language_model
from hf_variational.training.data import load_text, pack, train_tokenizer
from hf_variational.training.schedules import linear_warmup


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--text", default="pydoc_data.topics", help="text file, or the reference that Python carries")
    parser.add_argument("--output", default="runs/accelerate_loop", help="folder for the tokenizer and the model")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks in a micro-batch of one process")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of one process in a step")
    parser.add_argument("--block-size", type=int, default=128, help="tokens in a block")
    parser.add_argument("--width", type=int, default=192, help="hidden size")
    parser.add_argument("--vocab-size", type=int, default=2048, help="size of the tokenizer that is trained")
    parser.add_argument("--kl-weight", type=float, default=1e-4, help="full weight of the KL")
    parser.add_argument("--eval-batches", type=int, default=8, help="batches of the evaluation")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    options = parse(argv)
    # Processes without an accelerator find each other only if they are told that they run on the CPU.
    accelerator = Accelerator(cpu=options.cpu or not torch.accelerator.is_available())
    accelerator.print(f"processes: {accelerator.num_processes}, device: {accelerator.device}")
    set_seed(options.seed)

    # ---- Data, tokenizer, model: the same on every process ----
    text = load_text(options.text)
    if accelerator.is_main_process:
        train_tokenizer(text, options.vocab_size).save_pretrained(options.output)
    accelerator.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(options.output)
    blocks = pack(text, tokenizer, options.block_size).train_test_split(test_size=0.1, seed=options.seed)
    config = VariationalGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4 * options.block_size,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eve=EVEConfig(prior="empirical", scale="input", scale_rank=8),
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    loader = DataLoader(
        blocks["train"],
        batch_size=options.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(options.seed),
        collate_fn=default_data_collator,
        drop_last=True,
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # Stepped by hand once a step, so it is not prepared: that would step it once for each process.
    learning_rate = get_cosine_schedule_with_warmup(optimizer, options.steps // 10, options.steps)

    # 3. From here on the processes draw different noise. The order of the data has a generator of its own.
    set_seed(options.seed, device_specific=True)
    # 2. A 0-dim tensor: a compiled model is not compiled again when the weight moves.
    kl_weight = torch.zeros((), device=accelerator.device)

    history = []
    model.train()
    batches = endless(loader)
    for step in range(options.steps):
        kl_weight.fill_(options.kl_weight * linear_warmup(step, options.steps // 10))
        history.append(train_step(accelerator, model, optimizer, batches, options.accumulation, kl_weight))
        learning_rate.step()
        if step % max(1, options.steps // 10) == 0:
            accelerator.print(
                f"step {step:4d}  nll {history[-1]['nll']:.4f}  kl {history[-1]['kl']:9.2f}  weight {kl_weight:.1e}"
            )

    # ---- Evaluate and save ----
    bare = accelerator.unwrap_model(model)
    metrics = evaluate_language_model(
        bare,
        blocks["test"],
        num_posterior_samples=8,
        batch_size=options.batch_size,
        max_batches=options.eval_batches,
        progress=False,
        seed=options.seed,
        accelerator=accelerator,
    )
    for name in ("samples", "mean_pass"):
        accelerator.print(f"{name:>10}: nll {metrics[name]['nll']:.4f} over {metrics[name]['num_tokens']} tokens")
    accelerator.print(f"mutual information: {metrics['samples']['mutual_information']:.4f} nats a token")
    bare.save_pretrained(options.output, is_main_process=accelerator.is_main_process)
    # A process that leaves right after its last exchange can wait for ever for gloo's threads: leave together.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return {"history": history, "metrics": metrics}


def endless(loader):
    while True:
        yield from loader


def train_step(accelerator, model, optimizer, batches, accumulation: int, kl_weight) -> dict[str, float]:
    """One optimizer step over `accumulation` micro-batches of each process; returns nll and kl per target token."""
    micro_batches = list(islice(batches, accumulation))

    # 1. Targets of the whole step: all micro-batches of all processes. The first token of a row is no target.
    targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches)
    targets = accelerator.reduce(targets, reduction="sum")

    sums = torch.zeros(2, device=accelerator.device)
    for number, batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            out = model(**batch, kl_weight=kl_weight, num_items_in_batch=targets)
            # Data-parallel training averages gradients over the processes; the loss is already a share of the sum.
            accelerator.backward(out.loss * accelerator.num_processes)
        sums += torch.stack([out.nll, out.kl]).detach()
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    nll, kl = accelerator.reduce(sums, reduction="sum").tolist()
    return {"nll": nll, "kl": kl}


if __name__ == "__main__":
    main()
