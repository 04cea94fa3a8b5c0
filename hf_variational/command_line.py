"""What the commands share: an error is a line, a checkpoint is loaded or a line says why not.

What is heavy is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

__all__ = ["Device", "Model", "Seed", "Trust", "check_whole", "fail", "load", "reported", "samples_of"]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, or its name on the Hub.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that the checkpoint brings along.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise (and of the sampling).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps ...; by default an accelerator, where there is one.")]


def fail(message: object, code: int = 1) -> NoReturn:
    """One line on stderr. Code 2: the arguments are wrong; 1: what they name is."""
    typer.echo("error: " + " ".join(str(message).split()), err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def reported(what: str = "", *more: type[BaseException]):
    """Bad input is a line, not a traceback; with HF_VARIATIONAL_TRACEBACK=1 it is both."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, OSError, SafetensorError, *more) as error:
        if os.environ.get("HF_VARIATIONAL_TRACEBACK"):
            raise
        text = str(error) or type(error).__name__
        fail(f"{what}: {text}" if what else text)


def check_whole(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        fail(f"{name} is {value}: it must be {least} or more", 2)


def device_named(name: str | None) -> str:
    import torch

    if name is None:
        return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"--device {name} cannot be used ({str(error).splitlines()[0]}): leave it out, or try cpu", 2)
    return name


def load(name: str, trust_remote_code: bool, device: str | None, **options):
    """The model in eval mode, its tokenizer, and whether it has variational layers."""
    device = device_named(device)
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.is_dir():
        fail(f"{name} is no folder: give a checkpoint's folder (with config.json in it) or a name on the Hub")
    if folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        inside = sorted(p.parent.name for p in folder.glob("*/config.json"))
        hint = f"; did you mean {' or '.join(str(folder / n) for n in inside)}?" if inside else ""
        fail(f"{name} has no config.json, so it is no checkpoint{hint}")
    from transformers.utils import logging

    from .loading import load_model

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        source = str(folder) if folder.is_dir() else name
        model, tokenizer = load_model(source, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        if os.environ.get("HF_VARIATIONAL_TRACEBACK"):
            raise
        # Loaders raise their own kinds of errors for damaged and foreign files; none is this program's.
        text = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in text and not trust_remote_code:
            fail(f"{name} brings its own code: add --trust-remote-code if you trust its author")
        if "Unrecognized configuration class" in text:
            fail(f"{name} is no causal language model: AutoModelForCausalLM has no class for it")
        fail(f"cannot load {name}: {text[:400]}; is it a complete checkpoint, with its tokenizer beside it?")
    return model.to(device).eval(), tokenizer, bool(getattr(model, "variational_layers", ()))


def samples_of(requested: int | None, variational: bool, name: str) -> int:
    if requested and not variational:
        fail(f"{name} is deterministic: it has no posterior to draw --samples {requested} from; use --samples 0", 2)
    if requested is None:
        return 8 if variational else 0
    return requested
