import pytest
from torch import nn

from lightning_modules.parts.selection import match, select_modules


@pytest.fixture
def network():
    block = nn.Sequential()
    block.add_module("conv1", nn.Conv2d(3, 3, 1))
    block.add_module("bn1", nn.BatchNorm2d(3))
    root = nn.Sequential()
    root.add_module("layer1", block)
    root.add_module("fc", nn.Linear(3, 2))
    return root


def test_globs_cross_dots_and_keep_module_order(network):
    assert list(select_modules(network, ["fc", "layer?.conv?"])) == ["layer1.conv1", "fc"]


def test_type_filter(network):
    assert list(select_modules(network, types=(nn.Conv2d, nn.Linear))) == ["layer1.conv1", "fc"]


def test_a_pattern_without_a_match_names_the_option_and_near_misses(network):
    with pytest.raises(ValueError, match=r"include: the pattern 'layer1.conv2'.*Near misses: layer1.conv1"):
        select_modules(network, ["layer1.conv2"], option="include")


def test_a_type_without_a_match_lists_the_types_seen(network):
    with pytest.raises(ValueError, match=r"no module of type LSTM.*BatchNorm2d, Conv2d, Linear"):
        select_modules(network, types=(nn.LSTM,))


def test_every_pattern_must_match_on_its_own():
    with pytest.raises(ValueError, match="'zzz' matches nothing"):
        match(["a", "b"], ["a", "zzz"], "no_decay")


def test_brackets_are_globs_too():
    assert match(["layer1", "layer2", "layer3"], ["layer[13]"], "layers") == ["layer1", "layer3"]
