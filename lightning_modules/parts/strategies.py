"""Which of Lightning's strategies spread a network's weights over the ranks."""

from typing import Any

SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
"""Their classes, by name: not all of them can be imported on every machine."""

_REGISTERED = ("fsdp", "deepspeed", "model_parallel", "modelparallel")


def is_sharded(strategy: Any) -> bool:
    """Whether no rank has whole weights under `strategy`, and its forward pass is a collective.

    Args:
        strategy: a strategy object, its class, or what a config says: a registered name such as
            `deepspeed_stage_2`, a class path, or a mapping or namespace with a `class_path`.
    """
    if isinstance(strategy, str):
        name = strategy.rpartition(".")[2].lower()
        return any(kind in name for kind in _REGISTERED)
    path = strategy.get("class_path") if isinstance(strategy, dict) else getattr(strategy, "class_path", None)
    if isinstance(path, str):
        return is_sharded(path)
    kind = strategy if isinstance(strategy, type) else type(strategy)
    return any(base.__name__ in SHARDED for base in kind.__mro__)
