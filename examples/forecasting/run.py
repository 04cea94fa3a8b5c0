"""The forecasting experiments: trains what is missing, then writes tables and figures.

    python -m examples.forecasting.run --data ../shared/data/timeseries

from the repository's root. It may be stopped at any time: each finished run is kept, and the next call goes on.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from hf_variational.files import write_whole

from .data import load
from .experiments import execute, groups
from .figures import FIGURES, write_figures
from .tables import write_tables

HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", default="../shared/data/timeseries", help="folder of the series")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of the results")
    parser.add_argument("--only", nargs="*", choices=list(groups()), help="experiments to run; all of them if empty")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each run")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    options = parser.parse_args(argv)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    wanted = groups(options.seeds)
    if not options.report_only:
        chosen = [run for name in options.only or wanted for run in wanted[name]]
        # One seed of everything before the next, so that what is there at any time can be compared.
        train_missing(sorted(chosen, key=lambda run: run.seed), options.data, out)
    results = read_results(out)
    (out / "tables.md").write_text(write_tables(results, options.seeds))
    write_figures(results, out, options.seeds)
    print(f"{out}: tables.md, {', '.join(f'{name}.png' for name in FIGURES)}")


def train_missing(runs, folder: str, out: Path) -> None:
    """Executes the runs whose results are not in `out/runs.json` yet, and adds each as soon as it is there."""
    results = read_results(out)
    loaded = {}
    missing = [run for run in dict.fromkeys(runs) if run.key not in results]
    for number, run in enumerate(missing, 1):
        place = run.dataset, run.stride
        if place not in loaded:
            loaded[place] = load(run.dataset, folder, stride=run.stride)
        result = execute(run, loaded[place])
        result["conditions"] = conditions()
        # Another process may have added its own in the meantime.
        results = {**read_results(out), run.key: rounded(result)}
        write_results(out, results)
        scores = ", ".join(f"{name} {result['test'][name]:.4f}" for name in ("mse", "crps"))
        print(f"{number}/{len(missing)} {run.key}: {scores}, {sum(result['cpu_seconds'].values()):.0f} s", flush=True)


def conditions() -> dict:
    """What the runs were made with."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}


def rounded(value):
    """The same with five significant digits, so that the file stays small."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read_results(out: Path) -> dict[str, dict]:
    """All finished runs by their keys."""
    path = out / "runs.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(out: Path, results: dict[str, dict]) -> None:
    """One run a line, written whole or not at all."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(results[key], separators=(',', ':'))}" for key in results)
    write_whole(out / "runs.json", "{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
