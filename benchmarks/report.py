"""How every benchmark says what it measured: a table for people, or JSON for programs."""

import argparse
import json
import platform

import torch
import transformers
from rich.console import Console
from rich.table import Table

NOT_MEASURED = "not measured"


def arguments(description: str, rounds: int, threads: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="runs of each row that count (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--tiny", action="store_true", help="a model of toy size, to see that the script works")
    return parser


def machine(threads: int) -> dict:
    """What the numbers depend on besides the code."""
    return {
        "cpu": _cpu_name(),
        "threads": threads,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def cell(summary: dict | None, clock: str) -> str:
    """A ratio with the range it spans."""
    if summary is None:
        return NOT_MEASURED
    low, high = summary[f"{clock}_ratio_range"]
    return f"{summary[f'{clock}_ratio']:.2f}  ({low:.2f} to {high:.2f})"


def show(title: str, columns: list[str], rows: list[list[str]], result: dict, as_json: bool) -> None:
    """Prints the table, or `result` as JSON."""
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    table = Table(title=title, title_justify="left", caption=_caption(result), caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 150).print(table)


def _caption(result: dict) -> str:
    parts = [f"{name.replace('_', ' ')}: {value}" for name, value in result["conditions"].items()]
    parts += [f"{name}: {value}" for name, value in result["machine"].items() if value is not None]
    return "; ".join(parts)
