"""The bias of the approximate Dirichlet: mean, variance and gradient of its samples beside the Dirichlet's.

    python benchmarks/approximate_dirichlet.py

prints a Markdown table for one key of several with a mean of 1/4: w is its weight, alpha its concentration. In
brackets is the Monte Carlo standard error, in units of the last digit. The line below the table is the control: the
exact sampler, put through the same estimators.
"""

import argparse
import json
import math

import torch

from hf_variational.modeling.dirichlet import sample_dirichlet

CONCENTRATIONS = (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0)
# The concentrations of all keys, in units of the first one's.
ROWS = {"2": (1.0, 3.0), "4": (1.0, 1.0, 1.0, 1.0)}
MEASURES = ("mean", "variance", "gradient")


def closed_form(alpha: torch.Tensor) -> dict[str, float]:
    """E[w_1], Var[w_1] and d E[w_1] / d log alpha_1 of Dirichlet(alpha)."""
    total = alpha.sum().item()
    mean = alpha[0].item() / total
    spread = mean * (1.0 - mean)
    return {"mean": mean, "variance": spread / (total + 1.0), "gradient": spread}


def estimate(alpha: torch.Tensor, draws: int, approximate: bool) -> dict[str, tuple[float, float]]:
    """The same of samples, each with its standard error; the gradient is the reparameterisation's."""
    log_alpha = alpha.log().expand(draws, -1).clone().requires_grad_()
    weight = sample_dirichlet(log_alpha, approximate=approximate)[:, 0]
    gradient = torch.autograd.grad(weight.sum(), log_alpha)[0][:, 0]
    weight = weight.detach()
    deviation = (weight - weight.mean()).square()
    values = {"mean": weight, "variance": deviation, "gradient": gradient}
    return {name: (each.mean().item(), each.std().item() / math.sqrt(draws)) for name, each in values.items()}


def measure(draws: int) -> list[dict]:
    """One entry for each row of keys and each concentration."""
    entries = []
    for keys, shares in ROWS.items():
        for concentration in CONCENTRATIONS:
            alpha = concentration * torch.tensor(shares, dtype=torch.float64)
            entries.append(
                {
                    "keys": keys,
                    "alpha": concentration,
                    "closed_form": closed_form(alpha),
                    "approximate": estimate(alpha, draws, approximate=True),
                    "exact": estimate(alpha, draws, approximate=False),
                }
            )
    return entries


def largest_deviation(entries: list[dict]) -> float:
    """Of the exact sampler's estimates from the closed forms, in standard errors."""
    return max(
        abs(entry["exact"][name][0] - entry["closed_form"][name]) / entry["exact"][name][1]
        for entry in entries
        for name in MEASURES
    )


def with_error(value: float, error: float) -> str:
    """A number to the first digit of its standard error, as 0.1234(5)."""
    digit, exponent = f"{error:.0e}".split("e")
    return f"{value:.{max(0, -int(exponent))}f}({digit})"


def table(entries: list[dict]) -> str:
    columns = ["keys", "alpha"]
    for name in ("E[w]", "Var[w]", "d E[w] / d log alpha"):
        columns += [f"{name}, Dirichlet", "approximate", "ratio"]
    lines = [columns, ["---:"] * len(columns)]
    for entry in entries:
        line = [entry["keys"], f"{entry['alpha']:g}"]
        for name in MEASURES:
            exact, (value, error) = entry["closed_form"][name], entry["approximate"][name]
            line += [f"{exact:.5f}", with_error(value, error), f"{value / exact:.3f}"]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1_000_000, help="samples of each row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the global generator (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--tiny", action="store_true", help="few samples, to see that the script works")
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    draws = 1_000 if options.tiny else options.draws
    entries = measure(draws)
    control = largest_deviation(entries)
    result = {
        "claim": "samples of the approximate Dirichlet / the Dirichlet's closed forms",
        "conditions": {"draws": draws, "seed": options.seed, "precision": "float64", "torch": torch.__version__},
        "largest_deviation_of_the_exact_sampler": control,
        "rows": entries,
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return result
    print(table(entries))
    print(
        f"\n{draws:,} draws a row, seed {options.seed}, float64. Exact sampler: all {len(entries) * len(MEASURES)} "
        f"estimates within {control:.1f} standard errors of the closed form."
    )
    return result


if __name__ == "__main__":
    main()
