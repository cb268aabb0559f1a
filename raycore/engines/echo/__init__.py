"""The echo engine: deterministic, timed by a model, no torch. For tests, benchmarks and simulations."""

from raycore.engines.echo.engine import EchoEngine
from raycore.engines.echo.options import EchoOptions

__all__ = ["EchoEngine", "EchoOptions"]
