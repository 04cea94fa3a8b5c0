"""`hf-variational` on the command line. It parses, calls and prints; what it calls is imported when it is needed."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .autopilot.command import autopilot
from .command_line import Device, Model, Seed, Trust, check_whole, fail, load, reported, samples_of
from .presentation.measures import MEASURES

app = typer.Typer(
    help="Language models with variational neurons or variational attention: train them or make them of pretrained "
    "ones, evaluate them, see how uncertain each token is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended

Colouring = Enum("Colouring", {m.name: m.name for m in MEASURES})
Training = Enum("Training", {name: name for name in ("none", "posterior", "ffn", "all")})
Attention = Enum("Attention", {name: name for name in ("gaussian", "approximate_dirichlet", "dirichlet")})


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(help="Train on this text file instead of Python's reference.")] = None,
    output: Annotated[Path, typer.Option(help="Where the results go.")] = Path("demo_output"),
    steps: Annotated[int | None, typer.Option(help="Training steps of each model.")] = None,
    seed: Seed = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A very small model for a few steps: a try, no result.")
    ] = False,
) -> None:
    """Train a deterministic and a variational model of the same size, compare them, and look at their uncertainty."""
    check_whole("--steps", steps, 1)
    if text is not None and not text.is_file():
        fail(f"--text {text} is no file: give a text file, or leave it out for Python's language reference", 2)
    with reported("", FloatingPointError):
        from .demo.program import run

        run(text=text, output=output, steps=steps, seed=seed, quick=quick)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values to set in the recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    resume_from: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
) -> None:
    """Train the model of a recipe. For several processes: accelerate launch training/train.py RECIPE."""
    if not recipe.is_file():
        fail(f"{recipe} is no file: give a YAML recipe", 2)
    with reported("", FloatingPointError):
        from .training.program import run
        from .training.recipe import load_recipe

        try:
            run(load_recipe(recipe, overrides or ()), resume=str(resume_from) if resume_from else resume)
        except KeyboardInterrupt as interrupt:
            fail(f"{interrupt} Go on with --resume." if str(interrupt) else "interrupted", INTERRUPTED)


@app.command()
def retrofit(
    model: Model,
    data: Annotated[
        str,
        typer.Option(help="Text of the model's own kind: a .txt or .jsonl file, also .xz, or '{dataset: NAME, ...}'."),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write to.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values to set in the recipe.")
    ] = None,
    train: Annotated[
        Training | None,
        typer.Option(help="What is trained, if anything; none fits the scales alone.  [default: none]"),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="all, last, last_quarter, numbers like 0,1, or a regular expression.")
    ] = None,
    attention: Annotated[
        Attention | None, typer.Option(help="Make the attention variational too, of this kind.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML recipe with a section `retrofit`, instead of the package's.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Held-out text to measure on; without it a part of --data is held out.")
    ] = None,
    other: Annotated[
        list[str] | None,
        typer.Option(
            "--ood",
            "--other",
            metavar="NAME=FILE",
            help="Text of another kind, to be told apart; may be given several times.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Posterior samples.  [default: 8]")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Raise the noise as far as the NLL stays within this share of the base's (0.01: 1 %)."),
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="Sequences to calibrate on, at most.  [default: 256]")
    ] = None,
    test_sequences: Annotated[int, typer.Option(help="Sequences to measure on, at most.")] = 256,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence.  [default: 128]")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch (of the training the recipe's).")] = 8,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Save the posterior as an adapter of PEFT, without the base model.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise and of the training.  [default: 0]")] = None,
    trust_remote_code: Trust = False,
    device: Device = None,
) -> None:
    """Make a pretrained model variational: calibrate it, fit or train its noise, measure it before and after."""
    counts = {"--samples": samples, "--max-sequences": max_sequences, "--test-sequences": test_sequences}
    for name, value in {**counts, "--batch-size": batch_size}.items():
        check_whole(name, value, 1)
    check_whole("--length", length, 2)
    if tolerance is not None and not tolerance >= 0:
        fail(f"--tolerance is {tolerance}: it must be 0 or more", 2)
    if recipe is not None and not recipe.is_file():
        fail(f"--recipe {recipe} is no file: give a YAML recipe", 2)
    from .retrofit_program.options import named_source, recipe_for

    with reported("", FloatingPointError):
        asked = recipe_for(
            model,
            data,
            output,
            recipe=recipe,
            train=train and train.value,
            layers=layers,
            attention=attention and attention.value,
            test=test,
            tolerance=tolerance,
            samples=samples,
            max_sequences=max_sequences,
            length=length,
            seed=seed,
            adapter=adapter,
            overrides=overrides or (),
        )
        others = dict(named_source(text) for text in other or ())
        network, tokenizer, variational = load(model, trust_remote_code, device, dtype=asked.retrofit.dtype)
        if variational:
            fail(f"{model} is variational already: start from the pretrained model")
        from .retrofit_program import run

        try:
            run(
                network,
                tokenizer,
                asked,
                others=others,
                test_sequences=test_sequences,
                batch_size=batch_size,
                overwrite=overwrite,
                progress=sys.stderr.isatty(),
            )
        except KeyboardInterrupt:
            fail(f"interrupted; {output} has what was computed" if output.is_dir() else "interrupted", INTERRUPTED)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to go on from; - reads it from the standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 64,
    samples: Annotated[int | None, typer.Option(help="Posterior samples; 0 is the mean pass.  [default: 8]")] = None,
    do_sample: Annotated[
        bool | None, typer.Option("--do-sample/--greedy", help="Draw tokens, or take the likeliest.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Above 0; implies --do-sample.")] = None,
    seed: Seed = 0,
    colour_by: Annotated[Colouring, typer.Option(help="The measure that colours the tokens.")] = "mutual_information",
    html: Annotated[
        Path | None, typer.Option(help="Also write a page that shows each token's measures on hover.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tokens and their measures as JSON.")] = False,
    trust_remote_code: Trust = False,
    device: Device = None,
) -> None:
    """Generate text, each token coloured by how much the posterior samples disagree about it."""
    check_whole("--max-new-tokens", max_new_tokens, 1)
    check_whole("--samples", samples, 0)
    if temperature is not None and not 0 < temperature < float("inf"):
        fail(f"--temperature is {temperature}: it must be above 0; for the likeliest token use --greedy", 2)
    if temperature is not None and do_sample is False:
        fail(f"--temperature {temperature} has no effect with --greedy: leave one of them out", 2)
    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        fail(f"--html {html} cannot be written: give a file in a folder that exists", 2)
    if prompt == "-":
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            fail(f"--prompt - needs text, but the standard input is not valid {error.encoding}", 2)
    if not prompt.strip():
        fail("--prompt is empty: give some text to go on from", 2)
    if html is not None and samples == 0:
        fail("--html shows uncertainty, and --samples 0 has none: leave out one of them", 2)

    network, tokenizer, variational = load(model, trust_remote_code, device)
    count = samples_of(samples, variational, model)
    if html is not None and not count:
        fail(f"--html shows uncertainty, and {model} is deterministic: leave it out", 2)
    from .presentation.generation import generate_annotated

    with reported():
        passage = generate_annotated(
            network,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            num_posterior_samples=count,
            do_sample=temperature is not None or bool(do_sample),
            temperature=temperature,
            seed=seed,
        )
        if html is not None:
            from .presentation.html import write_page

            facts = {"model": model, "posterior samples": count, "seed": seed}
            write_page(html, [passage], facts=facts, colour_by=colour_by.value)
    if as_json:
        facts = {"model": model, "num_posterior_samples": count, "seed": seed}
        typer.echo(json.dumps({**facts, **passage.to_dict()}, ensure_ascii=False, indent=1))
        return
    from rich.console import Console

    from .presentation.terminal import panel

    if not count:
        reason = "--samples 0 is the mean pass" if variational else f"{model} is deterministic"
        typer.echo(f"{reason}: no uncertainty to show", err=True)
    Console().print(panel(passage, colour_by.value))
    if html is not None:
        typer.echo(f"wrote {html}", err=True)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        list[str],
        typer.Option(help="A text file; may be given several times. With --output also the name of a data set."),
    ],
    samples: Annotated[
        int | None, typer.Option(help="Posterior samples; 0 is the mean pass alone.  [default: 8]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write a report to this folder: report.html, report.json, the plots.")
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Text to fit on; without it the front fifth of --data is split off.")
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Text of another kind, to be told apart; may be given several times."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Compare with the mean pass, temperature scaling and MC dropout.")
    ] = False,
    ensemble: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A member of an ensemble to compare with; twice or more.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Another model to compare with; may be given several times."),
    ] = None,
    corruption: Annotated[
        bool, typer.Option("--corruption", help="Also measure on contexts with tokens replaced.")
    ] = False,
    readouts: Annotated[bool, typer.Option("--readouts", help="Also choose among ways to join the samples.")] = False,
    target_risk: Annotated[
        float, typer.Option(help="Share of wrong answers that the selective policy keeps to.")
    ] = 0.2,
    block_size: Annotated[
        int | None,
        typer.Option("--block-size", "--length", help="Tokens in a block.  [default: 256, or what the model takes]"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks in a batch.")] = 8,
    max_batches: Annotated[int | None, typer.Option(help="Look at so many batches of each file only.")] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="With --output: read so many sequences of each text only.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report that is in the folder.")] = False,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
    trust_remote_code: Trust = False,
    device: Device = None,
) -> None:
    """Measure likelihood, calibration and uncertainty; with --output in a report, beside baselines and other texts."""
    check_whole("--samples", samples, 0)
    check_whole("--block-size", block_size, 2)
    check_whole("--batch-size", batch_size, 1)
    check_whole("--max-batches", max_batches, 1)
    check_whole("--max-sequences", max_sequences, 2)
    if not 0 < target_risk < 1:
        fail(f"--target-risk is {target_risk}: it must be between 0 and 1", 2)
    asked = {
        "--validation": validation,
        "--ood": ood,
        "--baselines": baselines,
        "--ensemble": ensemble,
        "--compare": compare,
        "--corruption": corruption,
        "--readouts": readouts,
        "--max-sequences": max_sequences,
        "--overwrite": overwrite,
    }
    if output is None:
        if given := [option for option, value in asked.items() if value]:
            fail(f"{given[0]} needs --output, the folder of the report", 2)
        from .evaluation_program.files import evaluate_files

        evaluate_files(
            model, data, samples, block_size, batch_size, max_batches, seed, as_json, trust_remote_code, device
        )
        return
    if len(data) > 1:
        fail(f"--output is of one text, and --data names {len(data)}: run it once for each", 2)
    if max_batches is not None:
        fail("--max-batches has no effect with --output: use --max-sequences", 2)
    from .evaluation_program.program import check_output, run
    from .evaluation_program.texts import named, source_of

    with reported():
        check_output(output, overwrite)
        source = source_of(data[0], "--data")
        held = None if validation is None else source_of(validation, "--validation")
        others = {name: source_of(text, f"--ood {name}") for name, text in named(ood or [], "--ood").items()}
        paths = named(compare or [], "--compare")
    network, tokenizer, _ = load(model, trust_remote_code, device)
    longest = getattr(network.config, "max_position_embeddings", None) or 256
    with reported():
        report = run(
            network,
            tokenizer,
            model,
            source,
            output,
            validation=held,
            ood=others,
            baselines=baselines,
            ensemble=[(load(path, trust_remote_code, device)[0], path) for path in ensemble or []],
            compared={name: (load(path, trust_remote_code, device)[0], path) for name, path in paths.items()},
            samples=8 if samples is None else samples,
            length=block_size or min(256, longest),
            batch_size=batch_size,
            max_sequences=max_sequences,
            target_risk=target_risk,
            corruption=corruption,
            readouts=readouts,
            seed=seed,
            progress=sys.stderr.isatty(),
            quiet=as_json,
        )
    if as_json:
        typer.echo(report.to_json(), nl=False)
    typer.echo(f"wrote {output / 'report.html'}", err=True)


@app.command()
def inspect(
    model: Model,
    data: Annotated[str, typer.Option(help="A text file, or the name of a data set.")],
    output: Annotated[Path, typer.Option(help="The page; its numbers go to a .json beside it.")] = Path(
        "inspect.html"
    ),
    against: Annotated[
        str | None, typer.Option(help="What has changed since: another checkpoint, or the .json of an inspection.")
    ] = None,
    other_data: Annotated[str | None, typer.Option(help="What changes on another text: a file, or a name.")] = None,
    band_target: Annotated[
        float | None, typer.Option(help="Where the mean energy of a unit should be: the band's target.")
    ] = None,
    band_low: Annotated[
        float | None, typer.Option(help="The band's lower end, as a multiple of the target.  [default: 0.5]")
    ] = None,
    band_high: Annotated[float | None, typer.Option(help="Its upper end, likewise.  [default: 2]")] = None,
    band_spread: Annotated[
        float | None,
        typer.Option(help="Targets rise with the unit's number from target / SPREAD to target * SPREAD."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Posterior samples of each token; 0 is the mean pass.")] = 1,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence.  [default: 256, or what the model takes]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.")] = 8,
    max_sequences: Annotated[int | None, typer.Option(help="Read so many sequences of each text only.")] = None,
    seed: Seed = 0,
    trust_remote_code: Trust = False,
    device: Device = None,
) -> None:
    """Look inside: KL, scale and mean energy of every unit, dead and exploding ones by number, what has drifted."""
    check_whole("--samples", samples, 0)
    check_whole("--length", length, 2)
    check_whole("--batch-size", batch_size, 1)
    check_whole("--max-sequences", max_sequences, 1)
    if against is not None and other_data is not None:
        fail("--against compares models and --other-data texts: leave one of them out", 2)
    from .diagnostics_program.options import band_settings
    from .diagnostics_program.program import check_output, run
    from .evaluation_program.texts import source_of

    with reported():
        check_output(output)
        band = band_settings(band_target, band_low, band_high, band_spread)
        source = source_of(data, "--data")
        other = None if other_data is None else source_of(other_data, "--other-data")
    network, tokenizer, variational = load(model, trust_remote_code, device)
    if not variational:
        fail(f"{model} is deterministic: it has no variational neurons to look inside; retrofit or train one that has")
    compared = None
    if against is not None:
        is_file = against.endswith(".json")
        compared = Path(against) if is_file else lambda: (load(against, trust_remote_code, device)[0], against)
    longest = getattr(network.config, "max_position_embeddings", None) or 256
    with reported():
        found, changes = run(
            network,
            tokenizer,
            model,
            source,
            output,
            against=compared,
            other_data=other,
            band=band,
            samples=samples,
            length=length or min(256, longest),
            batch_size=batch_size,
            max_sequences=max_sequences,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
    typer.echo(found.table())
    if changes is not None:
        typer.echo(f"\n{changes.table()}")
    typer.echo(f"wrote {output} and {output.with_suffix('.json')}", err=True)


app.command()(autopilot)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
