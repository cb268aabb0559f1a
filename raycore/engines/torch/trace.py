"""What `profile` records of a torch engine: a trace that chrome://tracing and Perfetto open."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class TorchTrace:
    """torch's profiler on the step thread: operators, and CUDA kernels where there is a device."""

    suffix = ".pt.trace.json"

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)

    def start(self) -> None:
        """Begin to record."""
        self._profile.start()

    def stop(self, path: Path) -> None:
        """End and write."""
        self._profile.stop()
        self._profile.export_chrome_trace(str(path))
