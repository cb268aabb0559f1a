"""The torch engine: a causal language model through transformers."""

from raycore.engines.torch.engine import TorchEngine
from raycore.engines.torch.options import TorchEngineOptions

__all__ = ["TorchEngine", "TorchEngineOptions"]
