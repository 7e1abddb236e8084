"""The saturation forecast: int8 model and inputs -> what x86 without VNNI clips, and what that does to the outputs."""

from exporter.forecast.measure import Clipped, Forecast, of_bundle, of_model, predict

__all__ = ["Clipped", "Forecast", "of_bundle", "of_model", "predict"]
