"""MACs as `EfficiencyReport` counts them beside what other counters say of the same network, in billions.

    python benchmarks/macs.py [--networks resnet18 vit_small_patch16_224 ...]

Counters that are not installed are left out: `pip install torchinfo thop ptflops fvcore`.
"""

import argparse
import contextlib
import io
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import timm
import torch
from common import markdown
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from callbacks.measure.macs import count_macs

NETWORKS = (
    "resnet18",
    "mobilenetv2_100",
    "convnext_tiny",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
)


def ours(network: nn.Module, images: Tensor) -> float:
    return count_macs(network, images).total


def of_torch(network: nn.Module, images: Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        network(images)
    return counter.get_total_flops() / 2


def of_torchinfo(network: nn.Module, images: Tensor) -> float:
    from torchinfo import summary

    return summary(network, input_data=images, verbose=0).total_mult_adds


def of_thop(network: nn.Module, images: Tensor) -> float:
    from thop import profile

    return profile(network, (images,), verbose=False)[0]


def of_fvcore(network: nn.Module, images: Tensor) -> float:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(network, images)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


def of_ptflops(backend: str) -> Callable[[nn.Module, Tensor], float]:
    def count(network: nn.Module, images: Tensor) -> float:
        from ptflops import get_model_complexity_info

        shape, options = tuple(images.shape[1:]), {"print_per_layer_stat": False, "as_strings": False}
        return get_model_complexity_info(network, shape, backend=backend, **options)[0]

    return count


COUNTERS: dict[str, tuple[str, Callable[[nn.Module, Tensor], Any]]] = {
    "ours": ("torch", ours),
    "torch": ("torch", of_torch),
    "torchinfo": ("torchinfo", of_torchinfo),
    "thop": ("thop", of_thop),
    "fvcore": ("fvcore", of_fvcore),
    "ptflops pytorch": ("ptflops", of_ptflops("pytorch")),
    "ptflops aten": ("ptflops", of_ptflops("aten")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", default=NETWORKS, help="names of timm, at their own image size"
    )
    arguments = parser.parse_args()
    counters = {name: call for name, (package, call) in COUNTERS.items() if find_spec(package)}
    rows = []
    for name in arguments.networks:
        row = [name]
        for call in counters.values():
            network = timm.create_model(name).eval()  # anew, since some counters leave hooks behind
            images = torch.zeros(1, *network.default_cfg["input_size"])
            with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
                row.append(f"{call(network, images) / 1e9:.3f}")
        rows.append(row)
    print(markdown(["network", *counters], rows))
    print(", ".join(sorted({f"{p} {version(p)}" for p, _ in COUNTERS.values() if find_spec(p)})))


if __name__ == "__main__":
    main()
