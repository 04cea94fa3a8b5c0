"""One self-contained page: every token coloured by a measure, all its measures on hover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from .measures import MEASURES, format_value, measure, scale_maximum
from .tokens import AnnotatedText, Chunk

__all__ = ["render_page", "write_page"]


def template_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hf_variational.presentation", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["value"] = format_value
    return environment


def _html(text: str, special: bool) -> Markup:
    """Escaped text in which whitespace that would be invisible has a mark that is not copied with it."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    if special:
        return escape(shown)
    mark = Markup('<span class="mark" aria-hidden="true">{}</span>')
    return escape(shown).replace("\n", mark.format("↵") + "\n")


def _hover(chunk: Chunk) -> str:
    lines = [repr(chunk.text)]
    for token in chunk.tokens:
        if len(chunk.tokens) > 1:
            lines.append(f"token {token.piece}")
        for m in MEASURES:
            if m.name in token.measures:
                lines.append(f"{m.label}: {format_value(token.value(m.name))} {m.unit}".rstrip())
    return "\n".join(lines)


def _note(passage: AnnotatedText) -> str:
    if not passage.has_measures:
        return ""
    mutual, total = passage.mean("mutual_information"), passage.mean("predictive_entropy")
    share = f", {100 * mutual / total:.1f} % of the predictive entropy ({format_value(total)} nats)" if total else ""
    return f"{len(passage.tokens)} tokens; mean mutual information {format_value(mutual)} nats{share}"


def render_page(
    passages: Sequence[AnnotatedText],
    title: str = "Generated text and its uncertainty",
    facts: Mapping[str, Any] | None = None,
    colour_by: str = "mutual_information",
) -> str:
    """The page as a string. `facts` (model, samples, seed ...) are shown under the title.

    Raises:
        ValueError: no passage has measures (a deterministic model, or 0 samples).
    """
    shown = measure(colour_by)
    if not any(passage.has_measures for passage in passages):
        raise ValueError("no token has measures: generate with num_posterior_samples >= 1 and output_uncertainty=True")
    present = [m for m in MEASURES if any(passage.values(m.name) for passage in passages)]
    maxima = {m.name: scale_maximum(m.name, [v for p in passages for v in p.values(m.name)]) for m in present}

    chunks: list[list[dict[str, Any]]] = []
    views = []
    for passage in passages:
        spans = []
        for chunk in passage.chunks:
            value = chunk.value(shown.name)
            share = None if math.isnan(value) else f"{min(value / maxima[shown.name], 1.0):.3f}"
            spans.append(
                {
                    "index": len(chunks),
                    "special": chunk.special,
                    "share": share,
                    "hover": _hover(chunk),
                    "html": _html(chunk.text, chunk.special),
                }
            )
            chunks.append([_token_data(token, present) for token in chunk.tokens])
        views.append({"title": passage.title, "prompt": passage.prompt, "spans": spans, "note": _note(passage)})
    described = [
        {
            "name": m.name,
            "label": m.label,
            "unit": m.unit,
            "meaning": m.meaning,
            "maximum": maxima[m.name],
            "maximum_shown": format_value(maxima[m.name]),
        }
        for m in present
    ]
    return (
        template_environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            facts=dict(facts or {}),
            measures=present,
            shown=shown,
            maxima=maxima,
            passages=views,
            data={"measures": described, "chunks": chunks},
        )
    )


def _token_data(token, present) -> dict[str, Any]:
    values = {m.name: token.value(m.name) for m in present}
    return {
        "id": token.id,
        "piece": token.piece,
        "values": {name: None if math.isnan(v) else float(f"{v:.6g}") for name, v in values.items()},
        "shown": {name: format_value(v) for name, v in values.items()},
    }


def write_page(path: str | Path, passages: Sequence[AnnotatedText], **options: Any) -> Path:
    path = Path(path)
    page = render_page(passages, **options)
    path.write_text(page, encoding="utf-8")
    return path
