import copy

import numpy as np
import pytest
import torch
from torch import nn

from callbacks.pruning.masks import MaskBook, pack, unpack


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(7, 5)


def test_pack_is_numpys_packbits():
    torch.manual_seed(0)
    for shape in ((3, 5), (8,), (2, 4, 3, 3)):
        mask = torch.rand(shape) > 0.5
        packed = pack(mask)
        assert packed.numpy().tobytes() == np.packbits(mask.numpy().reshape(-1)).tobytes()
        assert torch.equal(unpack(packed, shape), mask)


def test_masks_hold_weights_gradients_and_states_in_place(layer):
    book = MaskBook({"weight": layer.weight})
    optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
    layer(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    address = layer.weight.data_ptr()
    book["weight"] = torch.arange(35).view(5, 7) % 3 == 0
    assert book.violations({"weight": layer.weight}) == ["weight"]
    book.clear({"weight": layer.weight})
    book.apply_to_gradients({"weight": layer.weight})
    book.apply_to_states({"weight": layer.weight}, optimizer)
    dead = ~book["weight"]
    assert layer.weight.data_ptr() == address
    assert book.violations({"weight": layer.weight}) == []
    assert not layer.weight[dead].any()
    assert not torch.signbit(layer.weight[dead]).any()
    assert not layer.weight.grad[dead].any()
    states = optimizer.state[layer.weight]
    assert {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"} <= states.keys()
    assert all(not states[key][dead].any() for key in states if key != "step")
    assert states["step"] == 1


def test_counts_density_and_checksum(layer):
    book = MaskBook({"weight": layer.weight})
    before = book.checksum()
    assert book.density() == 1
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[0] = False
    book["weight"] = mask
    assert book.counts() == {"weight": 28}
    assert book.density() == pytest.approx(0.8)
    assert book.checksum() != before


def test_state_round_trip_through_a_safe_file(layer, tmp_path):
    book = MaskBook({"weight": layer.weight})
    book["weight"] = layer.weight > 0
    torch.save(book.state_dict(), tmp_path / "masks.pt")
    state = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert state["weight"]["bits"].dtype == torch.uint8
    assert len(state["weight"]["bits"]) == 5
    other = MaskBook({"weight": layer.weight})
    other.load_state_dict(state)
    assert torch.equal(other["weight"], book["weight"])
    assert other.checksum() == book.checksum()


def test_foreign_masks_are_refused_with_the_differences(layer):
    state = copy.deepcopy(MaskBook({"weight": layer.weight, "old": layer.weight}).state_dict())
    state["weight"]["shape"] = [7, 5]
    with pytest.raises(
        ValueError, match=r"no saved mask for new; saved masks for old; other shapes in weight"
    ):
        MaskBook({"weight": layer.weight, "new": layer.weight}).load_state_dict(state)
