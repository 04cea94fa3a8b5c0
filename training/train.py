r"""Trains a variational language model as a YAML recipe says.

    python training/train.py training/recipes/eve.yaml
    accelerate launch training/train.py training/recipes/eve.yaml
    accelerate launch --config_file training/accelerate/two_cpu_processes.yaml \
        training/train.py training/recipes/eve.yaml

`--resume` goes on with the run in the recipe's output folder. Values of the recipe can be set on the command line:
`arguments.max_steps=100 arguments.output_dir=runs/short`.
"""

import argparse
import os
import sys

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
INTERRUPTED = 130


def refuse_lost_processes(environment) -> None:
    """
    `accelerate launch --cpu --num_processes 2` without MPI starts one process and says nothing (accelerate 1.15).

    It leaves an address for the processes to meet at, but no number of them.
    """
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if on_cpu and "MASTER_ADDR" in environment and not any(name in environment for name in _WORLD_SIZES):
        raise SystemExit(
            "accelerate launch was asked for several CPU processes and started one: with --cpu it needs MPI for more. "
            "Use `accelerate launch --config_file training/accelerate/two_cpu_processes.yaml` (with `--num_processes "
            "N` for more), or torchrun."
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to set in the recipe")
    parser.add_argument("--resume", action="store_true", help="go on from the output folder's newest checkpoint")
    parser.add_argument("--resume-from", metavar="CHECKPOINT", help="go on from this checkpoint")
    options = parser.parse_args(argv)
    refuse_lost_processes(os.environ)

    from hf_variational.training import load_recipe, run

    try:
        run(load_recipe(options.recipe, options.overrides), resume=options.resume_from or options.resume)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"{interrupt} Go on with --resume." if str(interrupt) else "Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
