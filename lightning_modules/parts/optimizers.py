"""Whether the optimisers of a checkpoint are those of the run that resumes from it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch.optim import Optimizer


class SavedOptimizer(NamedTuple):
    """What a checkpoint tells of an optimiser: its class (None in old ones), and how many tensors its groups
    have.
    """

    name: str | None
    groups: list[int]


def saved_optimizers(checkpoint: Mapping[str, Any]) -> list[SavedOptimizer] | None:
    """The optimisers of a checkpoint; None where it has none, or in a form of its own (sharded)."""
    states = checkpoint.get("optimizer_states")
    if not isinstance(states, list) or not all(
        isinstance(state, Mapping) and isinstance(state.get("param_groups"), list) for state in states
    ):
        return None
    names = checkpoint.get("optimizers") or [None] * len(states)
    return [
        SavedOptimizer(name, [len(group["params"]) for group in state["param_groups"]])
        for name, state in zip(names, states, strict=False)
    ]


def optimizer_fault(saved: list[SavedOptimizer], present: Sequence[Optimizer]) -> str | None:
    """In which respect the saved optimisers are others than the present ones; None if in none."""
    ours = [
        SavedOptimizer(type(optimizer).__name__, [len(group["params"]) for group in optimizer.param_groups])
        for optimizer in present
    ]
    if len(saved) != len(ours):
        return f"it has {len(saved)} of them, this run {len(ours)}"
    for theirs, own in zip(saved, ours, strict=True):
        if theirs.name is not None and theirs.name != own.name:
            return f"{theirs.name}, this run has {own.name}"
        if theirs.groups != own.groups:
            return (
                f"its groups have {_listed(theirs.groups)} tensors, those of this run {_listed(own.groups)} "
                "(lr_multipliers, no_decay, decay_1d, or what is frozen)"
            )
    return None


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + ", ..." * (len(numbers) > 5)
