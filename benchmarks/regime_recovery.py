"""What regime control does: units from starts that have gone wrong, and what it costs in likelihood.

    python benchmarks/regime_recovery.py

A small language model on Python's language reference. The band is around what the units of a healthy run have, their
median E[mu^2] (first seed). From each start every seed is trained twice on the same batches, without control and with
it, and both are measured on held-out text. The thermostat starts far outside its range: half of the KL that the units
end at without it, by 20 % up and down.
"""

import argparse
import statistics
import tempfile

import torch
from report import machine, show
from scipy import stats
from transformers import PrinterCallback, default_data_collator

from hf_variational import (
    EVEConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    VariationalTrainer,
    VariationalTrainingArguments,
)
from hf_variational.diagnostics import diagnose
from hf_variational.training.data import load_text, pack, train_tokenizer

LOW, HIGH = 0.2, 5.0  # ends of the band over its target
# Share of the target that E[mu^2] starts with, and sigma.
STARTS = {"collapsed": (1e-4, 1.0), "exploding": (100.0, 0.1)}
SCALE = 0.1  # of a usual start
RATE = 3e-3
# A scale moves by the learning rate, and the thermostat's range is far away.
THERMOSTAT_RATE = 1e-2


class Experiment:
    """Text, sizes and settings that all runs share."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        text = load_text("pydoc_data.topics")
        self.tokenizer = train_tokenizer(text, vocab_size=512)
        self.blocks = pack(text, self.tokenizer, block_size=64).train_test_split(test_size=256, seed=0)

    def model(self, seed: int, scale: float = SCALE) -> VariationalGPTForCausalLM:
        torch.manual_seed(seed)
        width = self.options.width
        return VariationalGPTForCausalLM(
            VariationalGPTConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                kl_weight=1e-4,
                eve=EVEConfig(mean="gain", scale="unit", prior="standard", initial_scale=scale),
            )
        )

    def started(self, seed: int, start: str, target: float) -> VariationalGPTForCausalLM:
        """A model whose units all have the scale of a start and its share of the target."""
        share, scale = STARTS[start]
        model = self.model(seed, scale)
        ids = torch.tensor(self.blocks["train"][:64]["input_ids"])
        for layer, block in enumerate(model.model.layers):  # the second reads what the first has become
            with torch.no_grad():
                posteriors = model(ids, labels=ids, num_posterior_samples=0, output_posteriors=True).posteriors
                block.mlp.eve.gain.mul_((share * target / posteriors[layer].mean_energy).sqrt())
        return model

    def train(self, model, seed: int, rate: float, regime: dict | None) -> dict[str, float]:
        """What the trainer's evaluation on held-out text finds after a training with this learning rate."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = VariationalTrainer(
                model,
                VariationalTrainingArguments(
                    output_dir=folder,
                    max_steps=self.options.steps,
                    per_device_train_batch_size=16,
                    per_device_eval_batch_size=32,
                    learning_rate=rate,
                    warmup_steps=20,
                    logging_steps=50,
                    eval_posterior_samples=8,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    use_cpu=True,
                    seed=seed,
                    regime=regime,
                ),
                train_dataset=self.blocks["train"],
                eval_dataset=self.blocks["test"],
                data_collator=default_data_collator,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            return trainer.evaluate()

    def units(self, model) -> dict[str, torch.Tensor]:
        """KL and E[mu^2] of all units on held-out text."""
        layers = diagnose(model, self.blocks["test"], batch_size=32, progress=False).layers
        return {
            name: torch.cat([getattr(layers[layer], field) for layer in sorted(layers)])
            for name, field in (("kl", "kl"), ("energy", "mean_energy"))
        }


def recoveries(experiment: Experiment, target: float, start: str) -> list[dict]:
    """Of each seed, without homeostasis and with it."""
    band = {"target": target, "low_factor": LOW, "high_factor": HIGH}
    rows = []
    for seed in range(experiment.options.seeds):
        pair = []
        for regime in ({"band": band}, {"band": band, "homeostasis": {}}):
            found = experiment.train(experiment.started(seed, start, target), seed, RATE, regime)
            pair.append({"inside": found["eval_regime_inside"], "nll": found["eval_nll"]})
        rows.append({"seed": seed, "without": pair[0], "with": pair[1]})
    return rows


def thermostats(experiment: Experiment, free: float) -> list[dict]:
    """Of each seed, from the usual start: shares of units whose KL is in the range."""
    low, high = 0.5 * free / 1.2, 0.5 * free * 1.2
    rows = []
    for seed in range(experiment.options.seeds):
        pair = []
        for regime in (None, {"thermostat": {"kl_min": low, "kl_max": high}}):
            model = experiment.model(seed)
            nll = experiment.train(model, seed, THERMOSTAT_RATE, regime)["eval_nll"]
            kl = experiment.units(model)["kl"]
            pair.append({"inside": ((kl >= low) & (kl <= high)).float().mean().item(), "nll": nll})
        rows.append({"seed": seed, "without": pair[0], "with": pair[1]})
    return rows


def shares(rows: list[dict], which: str) -> str:
    """The mean over seeds and the range, in per cent."""
    values = [100 * row[which]["inside"] for row in rows]
    return f"{statistics.mean(values):.1f} %, {min(values):.1f} to {max(values):.1f}"


def cost(rows: list[dict]) -> str:
    """NLL with over without: mean over seeds, its 95 % interval (Student's t), and the range."""
    changes = [100 * (row["with"]["nll"] / row["without"]["nll"] - 1) for row in rows]
    mean, interval = statistics.mean(changes), ""
    if len(changes) > 1:
        half = stats.t.ppf(0.975, len(changes) - 1) * statistics.stdev(changes) / len(changes) ** 0.5
        interval = f" [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"{mean:+.2f} %{interval}, {min(changes):+.2f} to {max(changes):+.2f}"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that the script works")
    options = parser.parse_args(argv)
    if options.tiny:
        options.seeds, options.steps, options.width = 1, 2, 8
    torch.set_num_threads(options.threads)

    experiment = Experiment(options)
    healthy = {rate: experiment.model(0) for rate in (RATE, THERMOSTAT_RATE)}
    nlls = [experiment.train(model, 0, rate, None)["eval_nll"] for rate, model in healthy.items()]
    target = experiment.units(healthy[RATE])["energy"].median().item()
    free = experiment.units(healthy[THERMOSTAT_RATE])["kl"].median().item()
    found = {f"homeostasis, {start}": recoveries(experiment, target, start) for start in STARTS}
    found["thermostat"] = thermostats(experiment, free)
    result = {
        "conditions": {
            "model": f"2 layers of {options.width}, {2 * options.width} units each, mean='gain'",
            "parameters": f"{healthy[RATE].num_parameters():,}",
            "text": f"Python's language reference, {options.steps} steps of 16 x 64 tokens",
            "learning rate": f"{RATE:g}, thermostat {THERMOSTAT_RATE:g}",
            "seeds": options.seeds,
            "starts": "; ".join(
                f"{name}: E[mu^2] {share:g} of the target, sigma {s}" for name, (share, s) in STARTS.items()
            ),
            "band": f"{LOW} to {HIGH} times {target:.3g}",
            "range": f"{0.5 * free / 1.2:.3g} to {0.5 * free * 1.2:.3g} nats (without it the median is {free:.3g})",
            "NLL of a usual start": ", ".join(f"{nll:.3f}" for nll in nlls),
        },
        "machine": machine(options.threads),
        "rows": found,
    }
    rows = [
        [name, shares(seeds, "without"), shares(seeds, "with"), cost(seeds)] for name, seeds in result["rows"].items()
    ]
    columns = ["control", "units inside, without", "with", "NLL with / without: mean [95 %], range"]
    show("Regime control on a small language model", columns, rows, result, options.json)
    return result


if __name__ == "__main__":
    main()
