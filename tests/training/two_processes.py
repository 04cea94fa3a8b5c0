"""Run by test_two_processes.py, alone and under `accelerate launch`: trains a few steps and writes what came out.

Usage: two_processes.py OUTPUT given|own ACCUMULATION [CHECKPOINT]
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from training_models import make_arguments, make_blocks, make_model
from transformers import TrainerCallback

from hf_variational import VariationalAttentionConfig, VariationalTrainer, posterior_noise


class NoiseByMicroBatch:
    """Noise by layer and site and by the micro-batch's number in the data, whichever process it went to."""

    def __init__(self, process, processes):
        self.process, self.processes, self.seen = process, processes, {}

    def __call__(self, request):
        site = (request.layer, request.site)
        local = self.seen.get(site, 0)
        self.seen[site] = local + 1
        number = local * self.processes + self.process
        generator = torch.Generator().manual_seed(100 * number + request.layer + 50 * (request.site == "attention"))
        return torch.randn(request.shape, generator=generator)


class Watch(TrainerCallback):
    """What this process is about to train on, and where its generator stands."""

    def __init__(self):
        self.states = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.states.append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())


def main(output, noise, accumulation, checkpoint=None):
    output = Path(output)
    # an uneven number of targets and of rows: the last batches of an epoch, and of the evaluation, are shorter
    rows, watch = [], Watch()
    arguments = make_arguments(
        output,
        max_steps=7,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        kl_schedule="linear_warmup",
        kl_warmup_steps=3,
        kl_weight=0.05,
        save_strategy="steps",
        save_steps=3,
        eval_posterior_samples=2,
    )
    # units in both layers, attention in the second: every statistic there is
    model = make_model(
        seed=arguments.process_index if noise == "own" else 0,
        attention=VariationalAttentionConfig("dirichlet"),
        attention_layers=[1],
    )
    model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    trainer = VariationalTrainer(
        model,
        arguments,
        train_dataset=make_blocks(rows=16),
        eval_dataset=make_blocks(rows=7, seed=2),
        callbacks=[watch],
    )
    if noise == "given":
        with posterior_noise(NoiseByMicroBatch(arguments.process_index, arguments.world_size)):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trained_on = list(rows)
    metrics = trainer.evaluate()
    result = {
        "processes": arguments.world_size,
        "history": trainer.state.log_history,
        "generator": watch.states,
        "rows": trained_on,
        "metrics": metrics,
    }
    (output / f"result_{arguments.process_index}.json").write_text(json.dumps(result))
    torch.save(trainer.model.state_dict(), output / f"weights_{arguments.process_index}.pt")
    trainer.accelerator.wait_for_everyone()
    # gloo's threads now and then hang or abort an interpreter that shuts down; everything is on disk by now.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
