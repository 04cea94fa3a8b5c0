"""A healthy, a collapsed and an exploding layer, from three short trainings, drawn and in numbers.

    python examples/three_layers.py --output docs/images

The three runs share the text, the architecture and the seed. They differ in what makes a layer live or die: how the KL
is charged, how the mean is made, and the learning rate.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import default_data_collator

from hf_variational import (
    EVEConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    VariationalTrainer,
    VariationalTrainingArguments,
)
from hf_variational.diagnostics import Band, diagnose
from hf_variational.presentation.figures import colour_of, figure_of, title_of
from hf_variational.presentation.inspect_plots import histograms_of
from hf_variational.presentation.plots import INK, plain
from hf_variational.training.data import load_text, pack, train_tokenizer

# What a run is: the neurons, beta and the learning rate.
RUNS = {
    "healthy": (EVEConfig(), 1e-4, 3e-3),
    "collapsed": (EVEConfig(mean="gain", prior="standard"), 1.0, 1e-2),
    "exploding": (EVEConfig(mean="linear"), 0.0, 3e-2),
}
LAYER = 1  # the middle one of three
CURVES = (("nll", "NLL, nats a token"), ("active_fraction", "active units"), ("mean_energy", "mean energy μ²"))


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the two pictures")
    parser.add_argument("--text", default="pydoc_data.topics", help="a text source; Python's reference by default")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--units", type=int, default=128)
    options = parser.parse_args(arguments)

    text = load_text(options.text)
    tokenizer = train_tokenizer(text, vocab_size=1024)
    blocks = pack(text, tokenizer, block_size=64).train_test_split(test_size=0.05, seed=0)
    models, curves = {}, {}
    for name, (eve, kl_weight, rate) in RUNS.items():
        torch.manual_seed(0)
        model = VariationalGPTForCausalLM(
            VariationalGPTConfig(
                vocab_size=len(tokenizer),
                hidden_size=options.units // 2,
                intermediate_size=options.units,
                num_hidden_layers=3,
                num_attention_heads=2,
                max_position_embeddings=64,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                kl_weight=kl_weight,
                eve=eve,
            )
        )
        trainer = VariationalTrainer(
            model,
            VariationalTrainingArguments(
                output_dir=tempfile.mkdtemp(),
                max_steps=options.steps,
                per_device_train_batch_size=16,
                learning_rate=rate,
                warmup_steps=min(20, options.steps // 2),
                logging_steps=max(1, options.steps // 30),
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=blocks["train"],
            data_collator=default_data_collator,
        )
        trainer.train()
        curves[name] = [entry for entry in trainer.state.log_history if "nll" in entry]
        models[name] = model

    # The band is around what the healthy layer does.
    healthy = diagnose(models["healthy"], blocks["test"], progress=False).layers[LAYER]
    band = Band.homogeneous(float(healthy.mean_energy.median()), options.units, 0.1, 10.0)
    layers = {name: diagnose(m, blocks["test"], band, progress=False).layers[LAYER] for name, m in models.items()}
    numbers = {}
    for name, layer in layers.items():
        numbers[name] = {**layer.summary(), "nll": curves[name][-1]["nll"]}
        shown = ", ".join(f"{key} {value:.3g}" for key, value in numbers[name].items())
        print(f"{name}: {shown}")
    options.output.mkdir(parents=True, exist_ok=True)
    histograms_of(layers).savefig(options.output / "three_layers.png", dpi=80)
    _curves(curves).savefig(options.output / "three_runs.png", dpi=80)
    return numbers


def _curves(curves: dict[str, list[dict]]):
    """What the trainer logged of the three runs."""
    figure = figure_of(3.9 * len(CURVES), 3.0)
    for axes, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        plain(axes)
        for index, (run, entries) in enumerate(curves.items()):
            steps, values = [entry["step"] for entry in entries], [entry[name] for entry in entries]
            axes.plot(steps, values, color=colour_of(index), linewidth=1.8, label=run)
        if name == "mean_energy":
            axes.set_yscale("log")
        title_of(axes, label)
        axes.set_xlabel("step", color=INK)
    figure.axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


if __name__ == "__main__":
    main()
