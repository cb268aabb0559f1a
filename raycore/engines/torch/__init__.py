"""The torch engine: a language model through transformers, to generate or to embed."""

from raycore.engine import EMBED, Engine
from raycore.engines.torch.embed_engine import EmbedEngine
from raycore.engines.torch.engine import TorchEngine
from raycore.engines.torch.loading import find_source, load_config
from raycore.engines.torch.options import TorchEngineOptions, check_options
from raycore.engines.torch.pooling import task_of
from raycore.engines.torch.weight_copy import take_model
from raycore.weight_copies import WeightSource

__all__ = ["EmbedEngine", "TorchEngine", "TorchEngineOptions", "make_torch_engine"]


def make_torch_engine(options: TorchEngineOptions, peers: WeightSource | None = None) -> Engine:
    """The engine of the task that the options, or else the checkpoint, ask for; ConfigurationError names what is wrong.

    `peers`: ranks that serve; what they give is not read from disk.
    """
    check_options(options)
    taken = take_model(peers, options)
    if taken is not None:
        return EmbedEngine.create(options, taken) if taken.task == EMBED else TorchEngine.create(options, taken)
    source = find_source(options.model)
    is_for_embedding = options.task == EMBED
    if options.task == "auto" and not source.gguf:  # a GGUF file is read for minutes, and holds what generates
        is_for_embedding = task_of(options.task, source.directory, load_config(source)) == EMBED
    return EmbedEngine.create(options) if is_for_embedding else TorchEngine.create(options)
