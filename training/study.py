r"""The study: variational models beside what one would use instead, at matched parameters, tokens and tuning.

    python training/study.py --train wiki.train.txt --validation wiki.valid.txt --test wiki.test.txt \
        --other code=code.txt --other law=law.txt --output runs/study

Every arm of recipes/study/arms.yaml is tuned on the validation text with the first seed, trained with all seeds, and
measured on the test text: as it is, and with a temperature fitted on the validation text. What is there already is not
done again, so a study that was stopped goes on where it was. Files are plain text, or packed as .xz, .gz or .bz2.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from study_measures import Texts, converging, measure
from study_tables import markdown
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hf_variational  # noqa: F401  registers its classes with the Auto classes
from hf_variational.baselines import EnsembleForCausalLM, mc_dropout
from hf_variational.demo.texts import read_text
from hf_variational.training.data import train_tokenizer
from hf_variational.training.program import run
from hf_variational.training.recipe import load_recipe, read_yaml

RECIPES = Path(__file__).parent / "recipes" / "study"
DONE = "measured.json"


def named_file(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, path


def load_arms(path: Path, chosen: list[str] | None) -> dict[str, dict]:
    """The arms by name.

    Raises:
        ValueError: for a name that no arm has.
    """
    arms = read_yaml(path)
    unknown = sorted(set(chosen or []) - set(arms))
    if unknown:
        raise ValueError(f"No arm is named {', '.join(unknown)}; there are {', '.join(arms)}.")
    return {name: arm for name, arm in arms.items() if not chosen or name in chosen}


class Study:
    """Trains and measures, and keeps what it found in a folder."""

    def __init__(self, options):
        self.options = options
        self.folder = Path(options.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_texts()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder / "tokenizer")
        self.texts = Texts.read(self.folder / "texts", options, self.tokenizer)

    def _write_texts(self) -> None:
        options, texts = self.options, self.folder / "texts"
        parts = {
            "train": read_text(options.train)[: options.train_characters],
            "validation": read_text(options.validation)[: options.held_out_characters],
            "test": read_text(options.test)[: options.held_out_characters],
        }
        parts["watched"] = parts["validation"][: options.watched_characters]
        parts |= {f"other-{name}": read_text(path)[: options.held_out_characters] for name, path in options.other}
        texts.mkdir(exist_ok=True)
        for name, text in parts.items():
            file = texts / f"{name}.txt"
            if file.exists() and file.read_text(encoding="utf-8") != text:
                raise ValueError(f"{self.folder} has a study of another {name} text: name another --output.")
            file.write_text(text, encoding="utf-8")
        if not (self.folder / "tokenizer").exists():
            size = load_recipe(RECIPES / "base.yaml", options.set).tokenizer.vocab_size
            train_tokenizer([parts["train"]], size).save_pretrained(self.folder / "tokenizer")

    def result(self, arm: str, trial: dict, number: int, seed: int) -> dict:
        """What one trial of an arm with one seed measured; trained now if it was not before."""
        folder = self.folder / arm / f"trial-{number}-seed-{seed}"
        file = folder / DONE
        if file.exists():
            return json.loads(file.read_text())
        if folder.exists():  # stopped before it was measured
            shutil.rmtree(folder)
        started = time.perf_counter()
        self._train(folder, trial, seed)
        seconds = time.perf_counter() - started
        model = self.load(folder, trial)
        steps = load_recipe(RECIPES / "base.yaml", self.options.set).arguments
        tokens = steps["max_steps"] * steps["per_device_train_batch_size"] * self.texts.block_size
        found = measure(model, self.texts, self.options.samples)
        found |= {"trial": trial, "number": number, "seed": seed, "seconds": seconds, "training_tokens": tokens}
        file.write_text(json.dumps(found, indent=1))
        plain = found["rows"][""]
        print(f"{arm}, trial {number}, seed {seed}: validation NLL {found['validation_nll']:.4f}, test NLL "
              f"{plain['nll']:.4f}, ECE {plain['ece']:.4f}, {seconds:.0f} s", flush=True)  # fmt: skip
        return found

    def _train(self, folder: Path, trial: dict, seed: int) -> None:
        texts = self.folder / "texts"
        values = {
            "data.train": str(texts / "train.txt"),
            "data.validation": str(texts / "watched.txt"),
            "tokenizer.name": str(self.folder / "tokenizer"),
            "arguments.output_dir": str(folder),
            "arguments.seed": seed,
            **{name: value for name, value in trial.items() if name != "mc_dropout"},
        }
        recipe = load_recipe(RECIPES / "base.yaml", self.options.set, values)
        rate = trial.get("mc_dropout")
        run(recipe, prepare=None if rate is None else lambda model: mc_dropout(model, rate))
        for checkpoint in folder.glob("checkpoint-*"):  # the best of them is the model
            shutil.rmtree(checkpoint)

    def load(self, folder: Path, trial: dict):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        rate = trial.get("mc_dropout")
        return model if rate is None else mc_dropout(model, rate)

    def arm(self, name: str, arm: dict) -> dict:
        """The trials of an arm, and the best one with every seed."""
        seeds = list(self.options.seeds)
        trials = [self.result(name, trial, number, seeds[0]) for number, trial in enumerate(arm["trials"])]
        best = min(range(len(trials)), key=lambda number: trials[number]["validation_nll"])
        if arm.get("ensembles"):
            seeds = seeds + [max(seeds) + 1 + extra for extra in range(self.options.members - 1)]
        trial = arm["trials"][best]
        runs = [self.result(name, trial, best, seed) for seed in seeds]
        return {
            "tuning": trials,
            "best": best,
            "runs": runs[: len(self.options.seeds)],
            "members": [run["seed"] for run in runs] if arm.get("ensembles") else None,
            "convergence": self.convergence(name, arm["trials"][best], best, seeds[0])
            if arm.get("converges")
            else None,
        }

    def convergence(self, arm: str, trial: dict, number: int, seed: int) -> dict:
        """The metrics of one run at 1 to 32 samples."""
        folder = self.folder / arm / f"trial-{number}-seed-{seed}"
        file = folder / "convergence.json"
        if not file.exists():
            file.write_text(json.dumps(converging(self.load(folder, trial), self.texts), indent=1))
        return json.loads(file.read_text())

    def ensembles(self, found: dict) -> dict:
        """Ensembles of consecutive members; those of neighbouring seeds share members."""
        trial, members, size = found["runs"][0]["trial"], found["members"], self.options.members
        runs = []
        for first in range(len(self.options.seeds)):
            file = self.folder / "ensemble" / f"{size}-from-{first}.json"
            seeds = members[first : first + size]
            if not file.exists():
                folders = [self.folder / "deterministic" / f"trial-{found['best']}-seed-{seed}" for seed in seeds]
                model = EnsembleForCausalLM.from_members([self.load(folder, trial) for folder in folders]).eval()
                measured = measure(model, self.texts, size)
                training = [json.loads((folder / DONE).read_text()) for folder in folders]
                measured |= {
                    "seed": first,
                    "members": seeds,
                    "seconds": sum(run["seconds"] for run in training),
                    "training_tokens": sum(run["training_tokens"] for run in training),
                }
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(measured, indent=1))
            runs.append(json.loads(file.read_text()))
        return {"tuning": found["tuning"], "best": found["best"], "runs": runs, "members": None}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--other", type=named_file, action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--output", required=True, help="folder that keeps every run")
    parser.add_argument("--arms", nargs="+", help="only these (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--members", type=int, default=5, help="of an ensemble")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--train-characters", type=int, default=500_000)
    parser.add_argument("--held-out-characters", type=int, default=100_000)
    parser.add_argument("--watched-characters", type=int, default=30_000, help="of the validation text, in training")
    parser.add_argument("--windows", type=int, default=100, help="of each other text and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 32], help="tokens of such a window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="values of base.yaml")
    return parser


def main(argv: list[str] | None = None) -> dict:
    options = arguments().parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    arms = load_arms(RECIPES / "arms.yaml", options.arms)
    study = Study(options)
    results = {name: study.arm(name, arm) for name, arm in arms.items()}
    for name, arm in arms.items():
        if arm.get("ensembles"):
            results["ensemble"] = study.ensembles(results[name])
    (study.folder / "study.json").write_text(json.dumps(results, indent=1))
    tables = markdown(results, options, study.texts)
    (study.folder / "study.md").write_text(tables)
    print(tables)
    return results


if __name__ == "__main__":
    main()
