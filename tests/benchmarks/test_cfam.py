"""CFAM's speed and effect experiments: the same numbers both ways, and variants that train."""

import argparse

import pytest
import torch


def test_the_plain_calculation_and_ours_agree(load):
    speed = load("speed_cfam")
    data = speed.vectors(argparse.Namespace(queries=60, images=40))
    plain, ours = (speed.WAYS[way](*data) for way in ("plain", "ours"))
    assert set(plain) == set(ours)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-9)
    assert 0 < plain["R1"] < 100


@pytest.mark.parametrize("name", ["plain CLIP, 77 tokens", "CFAM"])
def test_a_variant_trains_once_and_is_kept(name, load, tmp_path):
    effects = load("cfam")
    options = argparse.Namespace(runs=tmp_path, identities=16, steps=2)
    found = effects.run(name, 0, options)
    assert set(effects.METRICS) < set(found)
    assert effects.run(name, 0, options) == found
