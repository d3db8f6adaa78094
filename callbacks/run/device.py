"""The name of the device that a number was taken on."""

import contextlib
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The name a person would look up: of the GPU, or of the processor for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    import platform

    return platform.processor() or platform.machine() or device.type
