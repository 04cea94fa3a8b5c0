"""Run by test_regime_processes.py, alone and under `accelerate launch`: a few steered steps, and what came out.

Usage: regime_processes.py OUTPUT ACCUMULATION
"""

import json
import os
import sys
from pathlib import Path

import torch
from training_models import make_arguments, make_blocks, make_model
from two_processes import NoiseByMicroBatch

from hf_variational import EVEConfig, VariationalTrainer, posterior_noise

REGIME = {
    "interval": 2,
    "band": {"target": 0.02, "spread": 2.0},
    "penalty": {"weight": 0.5},
    "projection": {"interval": 4},
    "homeostasis": {},
    "thermostat": {"kl_min": 0.5, "kl_max": 1.5},
    "scale_guard": {"floor": 0.05, "ceiling": 0.25},
    "calibration": {},
}


def main(output, accumulation):
    output = Path(output)
    # rows with another number of targets each: a mean of the processes' means would be another number
    arguments = make_arguments(
        output,
        max_steps=6,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=accumulation,
        kl_weight=0.05,
        eval_posterior_samples=0,
        regime=REGIME,
        report_to="tensorboard",
    )
    eve = EVEConfig(mean="gain", scale="unit", initial_scale=0.3)
    trainer = VariationalTrainer(
        make_model(eve=eve, initializer_range=0.2),
        arguments,
        train_dataset=make_blocks(rows=16),
        eval_dataset=make_blocks(rows=7, seed=2),
    )
    histograms = {}
    trainer._diagnostics._write = lambda writer, found, step: histograms.update(found)
    with posterior_noise(NoiseByMicroBatch(arguments.process_index, arguments.world_size)):
        trainer.train()
    result = {
        "processes": arguments.world_size,
        "history": trainer.state.log_history,
        "metrics": trainer.evaluate(),
        "histograms": {name: values.tolist() for name, values in histograms.items()},
        "state": {name: value.tolist() for name, value in trainer._regime.controller.state_dict().items()},
    }
    (output / f"result_{arguments.process_index}.json").write_text(json.dumps(result))
    torch.save(trainer.model.state_dict(), output / f"weights_{arguments.process_index}.pt")
    trainer.accelerator.wait_for_everyone()
    # gloo's threads now and then hang or abort an interpreter that shuts down; everything is on disk by now.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
