"""What sampling the attention weights does to a pretrained language model that was never trained for it.

    python benchmarks/attention_on_pretrained.py MODEL --text held_out.txt

Nothing is trained: every layer gets the posterior of each row of the table, on the same windows of the text.
"""

import argparse
import copy
import json

import torch
from report import machine, show
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_variational import VariationalAttentionConfig, evaluate_language_model, variationalize
from hf_variational.demo.texts import read_text

ROWS = {
    "gaussian": ("initial_scale", (0.05, 0.1, 0.3, 1.0)),
    "approximate_dirichlet": ("initial_concentration", (1000.0, 100.0, 10.0)),
    "dirichlet": ("initial_concentration", (1000.0, 300.0, 100.0, 30.0, 10.0, 1.0)),
}
PUBLISHED = {"initial_raw": -7.0}
METRICS = ("nll", "expected_calibration_error", "accuracy", "mutual_information")


def windows(tokenizer, text: str, length: int, count: int) -> list[list[int]]:
    tokens = tokenizer(text[: 8 * length * count])["input_ids"]
    return [tokens[start : start + length] for start in range(0, min(len(tokens), length * count), length)]


def configurations() -> dict[str, VariationalAttentionConfig]:
    rows = {}
    for kind, (field, values) in ROWS.items():
        symbol = "sigma" if kind == "gaussian" else "a"
        for value in values:
            rows[f"{kind}, {symbol} = {value:g}"] = VariationalAttentionConfig(
                kind, data_dependent=False, **{field: value}
            )
    for kind in ROWS:
        rows[f"{kind}, published start (0.0009)"] = VariationalAttentionConfig(kind, data_dependent=False, **PUBLISHED)
    return rows


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub name of a causal language model")
    parser.add_argument("--text", required=True, help="file with held-out text of its domain")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", default="", help="only the rows whose name contains the text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = windows(tokenizer, read_text(options.text), options.length, options.windows)

    def measure(model) -> dict:
        return evaluate_language_model(model, data, options.samples, batch_size=8, progress=False, seed=0)

    reference = measure(base)["mean_pass"]
    measured = {"the model as it is": reference}
    for name, attention in configurations().items():
        if options.only in name:
            model = variationalize(copy.deepcopy(base), attention=attention)
            measured[name] = measure(model)["samples"]
    result = {
        "claim": "attention sampled without training",
        "conditions": {
            "model": options.model.rstrip("/").rsplit("/", 1)[-1],
            "text": f"{len(data)} windows of {options.length} tokens",
            "samples": options.samples,
            "layers": "all",
        },
        "machine": machine(options.threads),
        "rows": {name: {metric: row.get(metric) for metric in METRICS} for name, row in measured.items()},
    }
    rows = [
        [
            name,
            f"{row['nll']:.4f}",
            f"{row['nll'] / reference['nll'] - 1:+.2%}",
            f"{row['expected_calibration_error']:.4f}",
            f"{row['accuracy']:.4f}",
            "" if row["mutual_information"] is None else f"{row['mutual_information']:.4f}",
        ]
        for name, row in result["rows"].items()
    ]
    columns = ["attention", "NLL", "change", "ECE", "accuracy", "mutual information"]
    show("Attention sampled without training", columns, rows, result, options.json)
    return json.loads(json.dumps(result))


if __name__ == "__main__":
    main()
