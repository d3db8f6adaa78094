"""Which tensors are pruned, and which optimiser owns them."""

from collections.abc import Mapping, Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import LBFGS, Optimizer

from lightning_modules.parts.selection import match, select_modules

TRAINING_ONLY = "objectives."  # projectors and exits of objectives are thrown away after training


def module_types(names: Sequence[str]) -> tuple[type[nn.Module], ...]:
    """Classes of `torch.nn` by name.

    Raises:
        MisconfigurationException: a name is no layer of `torch.nn`.
    """
    types = []
    for name in names:
        kind = getattr(nn, name, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise MisconfigurationException(
                f"modules: '{name}' is no layer of torch.nn; Conv2d and Linear are."
            )
        types.append(kind)
    if not types:
        raise MisconfigurationException("modules: name at least one type of layer, such as Conv2d.")
    return tuple(types)


def prunable_modules(
    root: nn.Module,
    modules: Sequence[str],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """Modules whose weight is pruned, by the name of that weight (`network.conv1.weight`), in module order.

    A weight that several modules share is listed once, under its first name. Parts of training objectives are
    left out, weights that are frozen too, with one line that names them.

    Args:
        root: usually the LightningModule.
        modules: type names in `torch.nn`; subclasses count.
        include: globs over module paths; None takes all.
        exclude: globs over module paths to leave out.

    Raises:
        ValueError: a pattern matches nothing, or no module is of these types.
        MisconfigurationException: nothing is left to prune, or a weight is not a plain parameter.
    """
    types = module_types(modules)
    candidates = select_modules(root, include or ["*"], types, option="include" if include else "modules")
    excluded = set(match(candidates, exclude, "exclude")) if exclude else set()
    chosen: dict[str, nn.Module] = {}
    frozen: list[str] = []
    owners: dict[int, str] = {}
    for path, module in candidates.items():
        if path in excluded or path.startswith(TRAINING_ONLY):
            continue
        weight = _plain_weight(path, module)
        if weight is None or weight.ndim < 2:
            continue
        if id(weight) in owners:
            rank_zero_info(f"{path} shares its weight with {owners[id(weight)]}: it is pruned once.")
        elif not weight.requires_grad:
            frozen.append(path)
        else:
            owners[id(weight)] = path
            chosen[f"{path}.weight"] = module
    if frozen:
        rank_zero_info(f"Frozen layers are not pruned: {', '.join(frozen)}.")
    if not chosen:
        raise MisconfigurationException(_nothing_to_prune(root, modules, frozen))
    return chosen


def _plain_weight(path: str, module: nn.Module) -> nn.Parameter | None:
    weight = getattr(module, "weight", None)
    lazy = isinstance(weight, UninitializedParameter)
    if weight is None or (isinstance(weight, nn.Parameter) and not lazy):
        return weight
    reason = "has no shape yet" if lazy else "is computed from others"
    raise MisconfigurationException(
        f"{path}.weight {reason} (weight norm, a parametrization, a lazy layer): it cannot be pruned in "
        f"place. Leave it out with exclude: ['{path}']."
    )


def _nothing_to_prune(root: nn.Module, modules: Sequence[str], frozen: Sequence[str]) -> str:
    if frozen:
        return f"Nothing is left to prune: all selected layers are frozen ({', '.join(frozen)})."
    seen = sorted({type(module).__name__ for module in root.modules()})
    return (
        f"No weight to prune in modules of type {', '.join(modules)} after include and exclude; "
        f"the types seen are {', '.join(seen)}."
    )


def owning_optimizer(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimiser that updates all the parameters.

    Raises:
        MisconfigurationException: none does, several do, or it is LBFGS, whose step has no single gradient.
    """
    owners: dict[str, list[int]] = {name: [] for name in parameters}
    names = {id(parameter): name for name, parameter in parameters.items()}
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in names:
                    owners[names[id(parameter)]].append(index)
    orphans = [name for name, indices in owners.items() if not indices]
    if orphans:
        raise MisconfigurationException(
            f"No optimiser updates {', '.join(orphans)}: take them out with exclude, or give them to an "
            "optimiser."
        )
    used = {index for indices in owners.values() for index in indices}
    if len(used) > 1:
        examples = "; ".join(
            f"optimiser {index} has " + next(name for name, indices in owners.items() if index in indices)
            for index in sorted(used)
        )
        raise MisconfigurationException(
            f"The weights to prune belong to {len(used)} optimisers ({examples}): one pruning callback "
            "follows the steps of one optimiser. Choose its layers with include."
        )
    owner = optimizers[used.pop()]
    if isinstance(owner, LBFGS):
        raise MisconfigurationException(
            "Pruning does not work with LBFGS: its steps have no single gradient."
        )
    return owner
