"""Names: those that a person wrote, checked against those that exist, and those of parameters."""

import difflib
from collections.abc import Iterable

# Children that hold a posterior: of an FFN's units, of an adapter's, of attention weights.
_OF_A_POSTERIOR = ("eve", "eve_posterior", "posterior")


def refuse_unknown(given: Iterable, known: Iterable[str], where: str) -> None:
    """Raises `ValueError` that names what is unknown and the nearest name that is not."""
    known = list(known)
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"the names are {', '.join(known)}."
        raise ValueError(f"{where} has the unknown key {name!r}: {hint}")


def is_variational(parameter: str) -> bool:
    """Whether the parameter of that name belongs to a posterior, of feed-forward units or of attention weights."""
    return any(part in _OF_A_POSTERIOR for part in parameter.split("."))
