"""The module: what a weight of 0 leaves out, a batch of one identity, rates by parameter, bad options."""

import math

import pytest
import torch

from lightning_modules.cfam import LossSettings


def batch(identities):
    stream = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 49000, (len(identities), 40), generator=stream)
    ids[:, 0], ids[:, 30], ids[:, 31:] = 49406, 49407, 0
    images = torch.rand(len(identities), 3, 48, 16, generator=stream)
    return {"image": images, "input_ids": ids, "identity": torch.tensor(identities)}


def test_a_batch_of_one_identity_has_positives_alone_and_finite_gradients(make_cfam):
    module = make_cfam(LossSettings(id_weight=1.0))
    terms = module.losses(module.compute(batch([3, 3, 3, 3])), batch([3, 3, 3, 3]))
    assert set(terms) == {"gs", "ls", "m", "cid", "id"}
    sum(terms.values()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    found = module.matcher(*(module.compute(batch([3] * 4))[key] for key in ("fv", "ft")))
    positives = torch.nn.functional.softplus(-found).mean()
    torch.testing.assert_close(terms["m"], positives, rtol=1e-5, atol=1e-6)


def test_every_trainable_parameter_has_a_gradient_and_a_weight_of_zero_builds_nothing(make_cfam):
    for settings, absent in (
        (LossSettings(id_weight=1.0), []),
        (LossSettings(match_weight=0), ["matcher", "classifier"]),
        (LossSettings(local_weight=0, match_weight=0), ["matcher", "classifier", "granularity_decoder"]),
        (LossSettings(cid_weight=0), ["cid_head", "classifier"]),
    ):
        module = make_cfam(settings)
        given = batch([0, 0, 1, 2])
        sum(module.losses(module.compute(given), given).values()).backward()
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        assert [part for part in absent if getattr(module, part) is not None] == []


def test_rates_of_the_authors_family(make_cfam):
    module = make_cfam(LossSettings(id_weight=1.0), optimizer=None, lr_multipliers=None)
    optimizer = module.configure_optimizers()
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = (group["lr"], group["weight_decay"])
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 5 if name.split(".")[0] != "base_model" or name == "base_model.positional_embedding" else 1
        factor = 2 if "bias" in name else factor
        factor = 5 if "classifier" in name else factor
        decay = 0.0 if "bias" in name else 4e-5
        assert rates[id(parameter)] == pytest.approx((factor * 1e-5, decay)), name
    assert optimizer.defaults["eps"] == 1e-3
    assert math.isclose(optimizer.defaults["betas"][1], 0.999)


def test_an_identity_that_is_no_training_identity_is_refused(make_cfam):
    module = make_cfam()
    given = batch([0, 1, 2, 12])
    with pytest.raises(ValueError, match="identity 12 of a batch is not below num_classes=12"):
        module.losses(module.compute(given), given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"num_queries": 0}, "num_queries"),
        ({"context_length": 2}, "context_length"),
        ({"image_size": (8, 16)}, "image_size"),
        ({"score": "local"}, "score"),
    ],
)
def test_options_out_of_range(options, message, make_cfam):
    with pytest.raises(ValueError, match=message):
        make_cfam(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"mining": "soft"}, "mining"),
        ({"global_loss": "l2"}, "global_loss"),
        ({"local_weight": -1.0}, "local_weight"),
    ],
)
def test_loss_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(**options)
