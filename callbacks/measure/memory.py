"""Peak memory of a stretch of work: of the device, or of the process on the CPU."""

import contextlib
from pathlib import Path

import torch


class PeakMemory:
    """Counts from its making until `stop`.

    On CUDA it is what the allocator had in use at most. On the CPU it is the largest resident size of the
    process, model and caches included; Linux lets it be reset, elsewhere it is the peak since the process
    began.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def stop(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
