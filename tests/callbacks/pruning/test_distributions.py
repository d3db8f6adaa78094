import pytest
import torch

from callbacks.pruning.distributions import erk_densities, layer_densities

SHAPES = {"first": (8, 3, 3, 3), "second": (16, 8, 3, 3), "classifier": (10, 16)}


def test_erk_resnet50_is_golden(golden):
    from torchvision.models import resnet50

    with torch.device("meta"):
        shapes = {
            name: tuple(weight.shape) for name, weight in resnet50().named_parameters() if weight.ndim > 1
        }
    for case in golden["erk_resnet50"]["cases"]:
        densities = erk_densities(shapes, case["density_target"])
        assert list(densities.values()) == pytest.approx(case["densities"], rel=1e-8)
        assert [name for name, density in densities.items() if density == 1] == case["dense_layers"]


@pytest.mark.parametrize(("density", "dense"), [(0.3, 16), (0.2, 8), (0.1, 1), (0.05, 0), (0.02, 0)])
def test_erk_resnet50_dense_layers(density, dense):
    from torchvision.models import resnet50

    with torch.device("meta"):
        shapes = {
            name: tuple(weight.shape) for name, weight in resnet50().named_parameters() if weight.ndim > 1
        }
    assert sum(value == 1 for value in erk_densities(shapes, density).values()) == dense


def test_erk_of_everything_is_dense():
    assert set(erk_densities(SHAPES, 1.0).values()) == {1.0}


def test_uniform_spares_the_first_layer_and_those_named():
    assert layer_densities("uniform", SHAPES, 0.1) == {"first": 1.0, "second": 0.1, "classifier": 0.1}
    assert layer_densities("uniform", SHAPES, 0.1, ["classifier"])["classifier"] == 1.0
    assert layer_densities("uniform", {"only": (4, 4)}, 0.1) == {"only": 0.1}
    assert set(layer_densities("uniform_all", SHAPES, 0.1).values()) == {0.1}
