"""DLinear, the linear reference (Zeng et al. 2023, arXiv 2205.13504): a linear map of trend, another of season."""

import torch
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from .data import IGNORED
from .modeling import ForecastOutput, trend_of


class DLinear(nn.Module):
    """As published, with weights shared over channels, without normalising the window.

    Shapes: `past` [batch, length, lookback] to `forecast` [batch, length, horizon].
    """

    def __init__(self, lookback: int, horizon: int, moving_average: int = 25):
        super().__init__()
        self.moving_average = moving_average
        self.trend = nn.Linear(lookback, horizon)
        self.season = nn.Linear(lookback, horizon)
        for layer in (self.trend, self.season):
            nn.init.constant_(layer.weight, 1.0 / lookback)

    @can_return_tuple
    def forward(self, past: Tensor, labels: Tensor | None = None, **kwargs) -> ForecastOutput:
        trend = trend_of(past, self.moving_average)
        forecast = self.trend(trend) + self.season(past - trend)
        loss = None
        if labels is not None:
            counts = labels != IGNORED
            num_items = kwargs.get("num_items_in_batch")
            error = torch.where(counts, forecast - labels, 0.0).square().sum()
            loss = error / (counts.sum() if num_items is None else num_items)
        return ForecastOutput(loss=loss, nll=loss, forecast=forecast, locations=forecast.unsqueeze(1))
