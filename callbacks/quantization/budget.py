"""Bits of each layer from a budget: where a rounded weight costs the loss most, there are more of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from callbacks.quantization.experts import Expert, stored_parameter
from callbacks.quantization.grid import fit_grid, from_integers, to_integers
from callbacks.quantization.layers import matrix_of
from callbacks.quantization.ranks import total
from callbacks.quantization.scheme import Scheme
from lightning_modules.language_model import token_nll

WIDTHS = (2, 3, 4, 5, 6, 8)


@torch.enable_grad()
def squared_gradients(network: nn.Module, names: Sequence[str], segments: Tensor) -> dict[str, Tensor]:
    """Mean over segments of the squared gradient of the loss of a token, (d_out, d_in) for each layer.

    Args:
        network: causal language model, in eval mode.
        names: of its layers.
        segments: token ids (segments, length), passed one at a time.
    """
    layers = {name: network.get_submodule(name) for name in names}
    owners = {name: stored_parameter(layer) for name, layer in layers.items()}
    states = {parameter: parameter.requires_grad for parameter in network.parameters()}
    wanted = list(dict.fromkeys(owners.values()))
    squares = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in wanted}
    for parameter in states:
        parameter.requires_grad_(parameter in squares)
    try:
        for ids in segments.split(1):
            ids = ids.to(wanted[0].device)
            loss = token_nll(network(ids, use_cache=False).logits, ids).mean()
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            for parameter, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    squares[parameter] += gradient.float().square()
    finally:
        for parameter, state in states.items():
            parameter.requires_grad_(state)
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        square = squares[owners[name]] / len(segments)
        if isinstance(layer, Expert):
            found[name] = square[layer.index].T if layer.transposed else square[layer.index]
        else:
            # a weight that is kept transposed has its gradient transposed, too
            found[name] = square if square.shape == matrix_of(layer).shape else square.T
    return found


@torch.no_grad()
def rounding_costs(
    network: nn.Module, schemes: Mapping[str, Scheme], squares: Mapping[str, Tensor], widths: Sequence[int]
) -> Tensor:
    """Second-order estimate of what rounding costs the loss, (layers, widths): sum of g^2 (W - Q(W))^2."""
    rows = []
    for name, scheme in schemes.items():
        weight = matrix_of(network.get_submodule(name)).float()
        row = []
        for bits in widths:
            grid = fit_grid(weight, bits, scheme.group_size, scheme.symmetric)
            error = from_integers(to_integers(weight, grid), grid) - weight
            row.append((squares[name] * error.square()).sum().double())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def allocate(costs: Tensor, sizes: Sequence[int], widths: Sequence[int], average: float) -> list[int]:
    """Bits of each layer: from the fewest on, always the step that saves most for each bit that it adds.

    Args:
        costs: (layers, widths).
        sizes: weights of each layer.
        widths: ascending.
        average: bits that a weight may have on average.
    """
    places = [0] * len(sizes)
    spare = average * sum(sizes) - widths[0] * sum(sizes)
    while True:
        best, step = None, (0.0, 0, 0)
        for layer, place in enumerate(places):
            for higher in range(place + 1, len(widths)):
                price = (widths[higher] - widths[place]) * sizes[layer]
                gain = float(costs[layer, place] - costs[layer, higher]) / price
                if price <= spare + 1e-6 and gain > step[0]:
                    best, step = layer, (gain, higher, price)
        if best is None:
            return [widths[place] for place in places]
        places[best], spare = step[1], spare - step[2]


def within_budget(
    network: nn.Module,
    schemes: Mapping[str, Scheme],
    segments: Tensor,
    average: float,
    common: Scheme,
    widths: Sequence[int] = WIDTHS,
) -> dict[str, Scheme]:
    """The schemes with other bits: those of layers that have the `common` scheme, `average` over them.

    Args:
        network: in eval mode.
        schemes: of its layers.
        segments: this rank's token ids (segments, length).
        average: bits that a weight may have on average.
        common: what nothing else was said of.
        widths: that may be given.
    """
    free = {name: scheme for name, scheme in schemes.items() if scheme == common}
    squares = squared_gradients(network, list(free), segments)
    costs = total(rounding_costs(network, free, squares, widths)).cpu()
    sizes = [matrix_of(network.get_submodule(name)).numel() for name in free]
    bits = dict(zip(free, allocate(costs, sizes, widths, average), strict=True))
    return {name: replace(scheme, bits=bits.get(name, scheme.bits)) for name, scheme in schemes.items()}
