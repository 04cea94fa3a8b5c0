"""From the looks at tokens to what was decided about each, whether the looks are drawn one by one or were kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..evaluation.selective import RiskCoverage
from ..evaluation.token_scores import TokenScores
from .looks import MEASURES, DrawnSamples, draw_looks
from .policy import Action

# From open tokens' scores, and whether it is the last look, to the action about each token, [tokens], int8.
Act = Callable[[TokenScores, bool], Tensor]


@dataclass(frozen=True)
class Acted:
    """What was decided about a data set, at which cost, and what the predictions are worth.

    Attributes:
        scores: of each token at the look that settled it, as `draw_looks` makes them.
        samples: posterior samples behind them, [tokens], int64.
        actions: [`Action`] about each, `ANSWER` or `ABSTAIN`, [tokens], int8.
        cost: what was drawn.
        measure: the measure whose Monte Carlo error counts, by which predictions are ranked.
    """

    scores: TokenScores
    samples: Tensor
    actions: Tensor
    cost: DrawnSamples
    measure: str

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of all tokens, answered or not, nats."""
        return float(self.scores.values["nll"].double().mean())

    @property
    def coverage(self) -> float:
        """Share of the tokens that were answered."""
        return float((self.actions == Action.ANSWER).double().mean())

    @property
    def selective_risk(self) -> float:
        """Share wrong among the answered; nan if none is."""
        return float((~self.scores.correct[self.actions == Action.ANSWER]).double().mean())

    def aurc(self, score: str | None = None) -> float:
        """Area under the risk-coverage curve of all tokens (errors), ranked by `score`; `None`: by `measure`."""
        return RiskCoverage.of(self.scores, score or self.measure).area()


def act_on_data(model, data, act: Act, schedule: Sequence[int], measure: str, **options) -> Acted:
    """Draws as many samples as `act` asks for.

    Args:
        model, data, schedule, options: as in [`draw_looks`].
        act: decides; a token that draws more takes the rest of its sequence along, as generation does, where a
            sequence's samples go on once they are there.
        measure: of `MEASURES`.
    """
    parts: list[tuple[TokenScores, Tensor, Tensor]] = []

    def settle(look: int, scores: TokenScores) -> Tensor:
        actions, moved = _settled(act, scores, look == len(schedule) - 1)
        parts.append((scores.select(~moved), actions[~moved], torch.full((int((~moved).sum()),), schedule[look])))
        return moved

    cost = draw_looks(model, data, schedule, settle, **options)
    return _joined(parts, cost, measure)


@dataclass(frozen=True)
class KeptLooks:
    """All looks at all tokens of a data set, from one pass with the most samples: any policy's decisions and costs
    follow from them without the model.

    Attributes:
        schedule: numbers of samples of the looks.
        looks: the scores at each.
    """

    schedule: tuple[int, ...]
    looks: tuple[TokenScores, ...]

    @classmethod
    def draw(cls, model, data, schedule: Sequence[int], **options) -> "KeptLooks":
        """Arguments as in [`draw_looks`]."""
        schedule = tuple(schedule)
        parts: list[list[TokenScores]] = [[] for _ in schedule]

        def settle(look: int, scores: TokenScores) -> Tensor:
            parts[look].append(scores)
            return torch.full((len(scores),), look < len(schedule) - 1)

        draw_looks(model, data, schedule, settle, **options)
        return cls(schedule, tuple(_table(part) for part in parts))

    def at(self, schedule: Sequence[int]) -> "KeptLooks":
        """The looks at some of the numbers of samples.

        Raises:
            ValueError: if one of them was not looked at.
        """
        missing = [size for size in schedule if size not in self.schedule]
        if missing:
            raise ValueError(f"There was no look at {missing[0]} samples, but at {self.schedule}.")
        return KeptLooks(tuple(schedule), tuple(self.looks[self.schedule.index(size)] for size in schedule))

    def act(self, act: Act, measure: str) -> Acted:
        """What [`act_on_data`] would do with these samples. Without the sequences at hand a token costs what a
        predicted one does."""
        check_measure(measure)
        parts, cost = [], DrawnSamples(tokens=len(self.looks[0]), drawn=[0] * len(self.schedule))
        lengths = torch.bincount(self.looks[0].windows, minlength=self.looks[0].num_windows)
        open_tokens = torch.arange(len(self.looks[0]))
        drawn = 0
        for look, (size, table) in enumerate(zip(self.schedule, self.looks, strict=True)):
            if not open_tokens.numel():
                break
            scores = table.select(open_tokens)
            tokens = int(lengths[scores.windows.unique()].sum())
            cost.drawn[look] += tokens
            cost.sample_tokens += tokens * (size - drawn)
            drawn = size
            actions, moved = _settled(act, scores, look == len(self.schedule) - 1)
            parts.append((scores.select(~moved), actions[~moved], torch.full((int((~moved).sum()),), size)))
            open_tokens = open_tokens[moved]
        return _joined(parts, cost, measure)


def check_measure(measure: str) -> str:
    if measure not in MEASURES:
        raise ValueError(f"`measure` is one of {', '.join(MEASURES)}, got {measure!r}.")
    return measure


def sequence_means(values: Tensor, windows: Tensor) -> Tensor:
    """The mean of each token's sequence, at every token of it, [tokens]; float64."""
    _, place, counts = windows.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, place, values.double())
    return (sums / counts)[place]


def _settled(act: Act, scores: TokenScores, last: bool) -> tuple[Tensor, Tensor]:
    """The actions, and which tokens go on: those that draw more and all behind them in their sequence."""
    actions = act(scores, last)
    more = (actions == Action.DRAW_MORE).long()
    _, place, counts = scores.windows.unique_consecutive(return_inverse=True, return_counts=True)
    so_far = more.cumsum(0)
    start = counts.cumsum(0) - counts
    return actions, so_far - (so_far - more)[start][place] > 0


def _table(parts: list[TokenScores]) -> TokenScores:
    """One table of parts whose sequences have their numbers in the whole already."""
    joined = TokenScores.concatenate([replace(part, num_windows=0) for part in parts])
    return replace(joined, num_windows=int(joined.windows.max()) + 1)


def _joined(parts: list[tuple[TokenScores, Tensor, Tensor]], cost: DrawnSamples, measure: str) -> Acted:
    tables, actions, samples = zip(*parts, strict=True)
    scores = _table(list(tables))
    # Back into the order of the data: sequences in order, and the tokens of each by position.
    order = torch.arange(len(scores))
    order = order[scores.positions[order].argsort(stable=True)]
    order = order[scores.windows[order].argsort(stable=True)]
    return Acted(scores.select(order), torch.cat(samples)[order], torch.cat(actions)[order], cost, measure)
