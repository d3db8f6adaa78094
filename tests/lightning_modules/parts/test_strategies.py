import pytest
from jsonargparse import Namespace
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from datamodules.base import SHARDED_STRATEGIES
from lightning_modules.parts.strategies import SHARDED, is_sharded


class Sub(FSDPStrategy):
    pass


@pytest.mark.parametrize(
    "strategy",
    [
        "fsdp",
        "fsdp_cpu_offload",
        "deepspeed_stage_2",
        "lightning.pytorch.strategies.FSDPStrategy",
        "ModelParallelStrategy",
        Namespace(class_path="lightning.pytorch.strategies.DeepSpeedStrategy", init_args=Namespace(stage=2)),
        {"class_path": "FSDPStrategy"},
        FSDPStrategy,
        FSDPStrategy(),
        ModelParallelStrategy(),
        Sub(),
    ],
)
def test_sharded(strategy):
    assert is_sharded(strategy)


@pytest.mark.parametrize(
    "strategy",
    [
        "auto",
        "ddp",
        "ddp_find_unused_parameters_true",
        None,
        Namespace(class_path="lightning.pytorch.strategies.DDPStrategy"),
        DDPStrategy,
        DDPStrategy(),
        SingleDeviceStrategy(),
    ],
)
def test_whole(strategy):
    assert not is_sharded(strategy)


def test_data_modules_mean_the_same_strategies():
    assert set(SHARDED_STRATEGIES) == set(SHARDED), (
        "they import nothing of ours, so the names stand there too"
    )
