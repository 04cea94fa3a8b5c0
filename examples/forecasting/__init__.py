"""Forecasting with a bank of EVE neurons: the experiments of arXiv 2602.18250 on ETTh1, Exchange and Weather."""

from transformers import AutoConfig, AutoModel

from .configuration import EVEForecasterConfig
from .modeling import EVEForecaster

AutoConfig.register("eve_forecaster", EVEForecasterConfig, exist_ok=True)
AutoModel.register(EVEForecasterConfig, EVEForecaster, exist_ok=True)
EVEForecaster.register_for_auto_class("AutoModel")

__all__ = ["EVEForecaster", "EVEForecasterConfig"]
