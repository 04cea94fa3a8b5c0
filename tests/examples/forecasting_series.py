"""A sine with noise, and forecasters of a dozen units, for the tests of examples/forecasting."""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.forecasting import EVEForecaster, EVEForecasterConfig, data
from examples.forecasting.configuration import linear_eve

LOOKBACK, HORIZON, UNITS = 16, 4, 12


def series(rows=400, channels=2):
    time = np.arange(rows)[:, None]
    noise = np.random.default_rng(0).normal(size=(rows, channels))
    return np.sin(time / 5.0 + np.arange(channels)) * 3.0 + 10.0 + 0.3 * noise


def tiny(**fields):
    set_seed(0)
    eve = fields.pop("eve", {})
    config = {"lookback": LOOKBACK, "horizon": HORIZON, "units": UNITS, "moving_average": 5, **fields}
    return EVEForecaster(EVEForecasterConfig(eve=linear_eve(**eve), **config))


def tiny_parts(length=3, step=4, stride=2, **kwargs):
    source = data.Source("sine", None, step, stride)
    return data.split(series(**kwargs), source, LOOKBACK, HORIZON, length)


def batch_of(part, count=6):
    items = [part[index] for index in range(count)]
    return torch.stack([item["past"] for item in items]), torch.stack([item["labels"] for item in items])
