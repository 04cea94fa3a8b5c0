"""Time series as windows: reading, the usual splits, standardisation, and rows of forecast origins.

A row of a batch is a short sequence of forecast origins of one channel, `step` rows apart and in time order. Each
origin has its own look-back and its own future, so a forecast reads `lookback` values and nothing else; what lies
along the sequence is the posterior, whose autoregressive prior needs a position before each position.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

IGNORED = -100.0
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """A data set and its usual splits.

    Attributes:
        file: name of the file in the data folder.
        rows: rows of the training, the validation and the test part; `None`: 70 %, 10 % and 20 % of the file.
        step: rows between the origins of one sequence.
        stride: every which origin an evaluation takes; divides `step`.
    """

    file: str
    rows: tuple[int, int, int] | None
    step: int
    stride: int


SOURCES = {
    "ETTh1": Source("ETTh1.csv.xz", (8640, 2880, 2880), step=24, stride=12),
    "Exchange": Source("exchange_rate.csv.xz", None, step=8, stride=8),
    "Weather": Source("weather.csv.xz", None, step=72, stride=72),
}


def read_series(path: str | Path) -> pd.DataFrame:
    """Reads a CSV file (plain or compressed) whose column `date`, if it has one, is left out.

    Returns:
        [rows, channels], all float64.

    Raises:
        ValueError: for a value that is missing or no finite number; names the file, the column and the row.
    """
    path = Path(path)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="replace")
    frame = frame.drop(columns="date", errors="ignore")
    if frame.empty:
        raise ValueError(f"{path}: {len(frame)} rows of {len(frame.columns)} channels hold no series.")
    values = frame.apply(pd.to_numeric, errors="coerce")
    bad = ~np.isfinite(values.to_numpy(np.float64))
    if bad.any():
        row, column = map(int, np.argwhere(bad)[0])
        text, name = frame.iloc[row, column], frame.columns[column]
        if text.strip().lower() in ("", "nan", "na", "null", "inf", "-inf"):
            what = f"is missing or not finite ({text!r}): fill the gap, or cut the series there"
        else:
            what = f"is {text!r}, no number: drop the column, or encode it"
        raise ValueError(f"{path}: column {name!r}, row {row + 1} (after the header) {what}.")
    return values.astype(np.float64)


def borders(num_rows: int, rows: tuple[int, int, int] | None) -> dict[str, tuple[int, int]]:
    """The rows [first, end) whose values each part forecasts.

    Args:
        num_rows: rows of the file.
        rows: rows of each part; `None`: 70 %, 10 % and 20 %, rounded as everyone does (Zeng et al. 2023).

    Raises:
        ValueError: for a file with fewer rows than the parts need.
    """
    if rows is None:
        train, test = int(num_rows * 0.7), int(num_rows * 0.2)
        rows = (train, num_rows - train - test, test)
    if sum(rows) > num_rows:
        raise ValueError(f"The parts {rows} need {sum(rows)} rows, but the file has {num_rows}.")
    ends = np.cumsum((0, *rows)).tolist()
    return {name: (ends[i], ends[i + 1]) for i, name in enumerate(SPLITS)}


class Windows(Dataset):
    """Rows of forecast origins of one channel.

    An origin t forecasts rows t, ..., t + horizon - 1 from rows t - lookback, ..., t - 1. An item holds `past`
    [length, lookback] and `labels` [length, horizon], float32. In training every origin may begin a sequence. In an
    evaluation each origin that is a multiple of `stride` from the first comes exactly once; where a sequence would run
    out of the part its labels are -100 and its past is 0.

    Args:
        values: [rows, channels], standardised.
        part: rows [first, end) that may be forecast.
        lookback, horizon: of an origin.
        length: origins of a sequence.
        step: rows between them.
        stride: `None` in training; in an evaluation every which origin is taken, a divisor of `step`.
        name: what an error calls the part.

    Raises:
        ValueError: for a part with too few rows for one sequence (one window in an evaluation), or a stride that does
            not divide the step.
    """

    def __init__(self, values, part, lookback, horizon, length=4, step=24, stride=None, name="the series"):
        if stride is not None and step % stride:
            raise ValueError(f"stride={stride} does not divide step={step}: origins would come twice or never.")
        self.values = torch.as_tensor(np.asarray(values), dtype=torch.float32).T.contiguous()
        self.lookback, self.horizon, self.step = lookback, horizon, step
        # The look-back of a later part reaches into the one before it, what is forecast never does.
        first, self.last = max(part[0], lookback), part[1] - horizon
        needed = 1 if stride is not None else 1 + (length - 1) * step
        if self.last - first + 1 < needed:
            raise ValueError(
                f"{name}: rows {part[0]} to {part[1]} of {len(values)} are too few for one window: {lookback} rows of "
                f"look-back and {horizon} to forecast" + (f", at {length} origins {step} apart" * (needed > 1)) + "."
            )
        if stride is None:
            self.starts = torch.arange(first, self.last - needed + 2)
        else:
            blocks = torch.arange(first, self.last + 1, length * step)
            starts = (blocks[:, None] + torch.arange(0, step, stride)).flatten()
            self.starts = starts[starts <= self.last]
        self.offsets = torch.arange(length) * step

    def __len__(self) -> int:
        return len(self.starts) * len(self.values)

    @property
    def num_origins(self) -> int:
        """Origins that are forecast, over all channels; one that is in several sequences counts in each."""
        return int((self.starts[:, None] + self.offsets <= self.last).sum()) * len(self.values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start, channel = divmod(index, len(self.values))
        series = self.values[channel]
        past = series.new_zeros(len(self.offsets), self.lookback)
        labels = series.new_full((len(self.offsets), self.horizon), IGNORED)
        for place, origin in enumerate((self.starts[start] + self.offsets).tolist()):
            if origin <= self.last:
                past[place] = series[origin - self.lookback : origin]
                labels[place] = series[origin : origin + self.horizon]
        return {"past": past, "labels": labels}


def load(
    name: str, folder: str | Path, lookback: int = 336, horizon: int = 96, length: int = 4, stride: int | None = None
) -> dict[str, Windows]:
    """The three parts of a data set, standardised with the mean and deviation of its training rows.

    Args:
        name: one of `SOURCES`.
        folder: where its file is.
        lookback, horizon, length: as in [`Windows`].
        stride: of the validation and the test part; `None`: the source's.
    """
    source = SOURCES[name]
    frame = read_series(Path(folder) / source.file)
    return split(frame.to_numpy(), source, lookback, horizon, length, stride, f"{source.file}")


def split(values, source: Source, lookback, horizon, length, stride=None, name="the series") -> dict[str, Windows]:
    """`load` of an array [rows, channels]."""
    parts = borders(len(values), source.rows)
    training = values[slice(*parts["train"])]
    scale = training.std(0)
    # A channel that stands still in training carries no unit of its own.
    standardised = (values - training.mean(0)) / np.where(scale > 0, scale, 1.0)
    strides = {"train": None, "validation": stride or source.stride, "test": stride or source.stride}
    return {
        part: Windows(
            standardised, rows, lookback, horizon, length, source.step, strides[part], f"{name}, {part} part"
        )
        for part, rows in parts.items()
    }
