import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.token_reduction import MergeSimilar, PruneOrPool, attach_reducers, record_tokens
from callbacks.token_reduction.state import Evidence, TokenState


def evidence(batch=6, tokens=17):
    queries, keys, values = torch.randn(3, batch, 3, tokens, 8).unbind(0)
    return Evidence(4 * queries, keys, values, 8**-0.5, None)


def reduce(rule, seen, x, record=True):
    state = TokenState(prefix=1, record=record, trace=True)
    return rule.reduce(0, x, seen, state), state


def middle_threshold(seen, x):
    variance = reduce(PruneOrPool(5, 1.0), seen, x)[1].records[0].variance.sort().values
    return (variance[2] + variance[3]).item() / 2


@pytest.mark.parametrize(
    ("threshold", "policy", "expected"),
    [
        (0.0, "adaptive", "prune"),
        (math.inf, "adaptive", "pool"),
        (0.0, "reversed", "pool"),
        (math.inf, "reversed", "prune"),
        (1.0, "prune", "prune"),
        (0.0, "pool", "pool"),
        (1.0, "adaptive", None),
    ],
)
def test_settled_policies(threshold, policy, expected):
    rule = PruneOrPool(5, threshold, policy)
    assert rule.settled == expected
    assert rule.needs_class_token == (expected != "pool")


def test_both_ways_of_dispatch_agree_in_mixed_and_in_uniform_batches():
    seen, x = evidence(), torch.randn(6, 17, 12)
    for threshold in (middle_threshold(seen, x), 1e-9, 1.0):
        both, split = (reduce(PruneOrPool(5, threshold, dispatch=d), seen, x) for d in ("both", "split"))
        assert both[0].equal(split[0])
        assert both[1].sizes(x[:, :12]).equal(split[1].sizes(x[:, :12]))
        assert both[1].sources.equal(split[1].sources)


def test_an_image_does_as_the_fixed_policies_do():
    seen, x = evidence(), torch.randn(6, 17, 12)
    threshold = middle_threshold(seen, x)
    mixed, state = reduce(PruneOrPool(5, threshold), seen, x)
    pooled = state.records[0].pooled
    assert pooled.sum() == 3
    assert mixed[pooled].equal(reduce(PruneOrPool(5, policy="pool"), seen, x)[0][pooled])
    assert mixed[~pooled].equal(reduce(PruneOrPool(5, policy="prune"), seen, x)[0][~pooled])
    reverse = reduce(PruneOrPool(5, threshold, "reversed"), seen, x)[1].records[0].pooled
    assert reverse.equal(~pooled)


def test_raising_the_threshold_only_turns_pruning_into_pooling():
    seen, x = evidence(), torch.randn(6, 17, 12)
    before = torch.zeros(6, dtype=torch.bool)
    for threshold in torch.logspace(-6, 0, 12).tolist():
        pooled = reduce(PruneOrPool(5, threshold), seen, x)[1].records[0].pooled
        assert (pooled | ~before).all()
        before = pooled
    assert before.all()


def test_uniform_scores_pool_at_any_threshold():
    flat = Evidence(torch.zeros(2, 3, 17, 8), torch.randn(2, 3, 17, 8), torch.ones(2, 3, 17, 8), 1.0, None)
    assert reduce(PruneOrPool(5, 1e-12), flat, torch.randn(2, 17, 4))[1].records[0].pooled.all()


def test_cv2_is_compared_with_a_threshold_that_does_not_depend_on_the_tokens():
    seen, x = evidence(), torch.randn(6, 17, 12)
    variance, cv2 = (
        reduce(PruneOrPool(5, 1.0, threshold_mode=mode), seen, x)[1].records[0].variance
        for mode in ("variance", "cv2")
    )
    torch.testing.assert_close(cv2, 256 * variance)


def test_the_value_norm_can_be_left_out():
    seen, x = evidence(), torch.randn(6, 17, 12)
    loud = Evidence(seen.queries, seen.keys, seen.values * torch.arange(17.0)[:, None], seen.scale, None)
    with_norm, without = (
        [reduce(PruneOrPool(5, policy="prune", score=score), e, x)[0] for e in (seen, loud)]
        for score in ("cls_attn_vnorm", "cls_attn")
    )
    assert not with_norm[0].equal(with_norm[1])
    assert without[0].equal(without[1])


class Watch(TorchDispatchMode):
    """Operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def test_dispatch_both_never_waits_for_the_device():
    seen, x = evidence(), torch.randn(6, 17, 12)
    waiting = {}
    for dispatch in ("both", "split"):
        with Watch() as watch:
            PruneOrPool(5, 1e-3, dispatch=dispatch).reduce(0, x, seen, TokenState(prefix=1))
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "item", "_to_copy_to_cpu")
        waiting[dispatch] = [name for name in watch.seen if any(wait in name for wait in waits)]
    assert waiting["both"] == []
    assert waiting["split"] == ["aten._local_scalar_dense.default"]


def test_no_gradient_through_the_choice():
    seen, x = evidence(), torch.randn(6, 17, 12, requires_grad=True)
    keys = seen.keys.clone().requires_grad_()
    seen = Evidence(seen.queries, keys, seen.values, seen.scale, None)
    out, _ = reduce(PruneOrPool(5, middle_threshold(seen, x)), seen, x)
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert keys.grad is None


def test_always_pooling_is_tome(make_vit, images):
    blocks = {0: 3, 1: 2, 3: 4}
    logits = []
    for rules in (
        {block: PruneOrPool(r, math.inf) for block, r in blocks.items()},
        {block: MergeSimilar(r) for block, r in blocks.items()},
    ):
        network = make_vit()
        attach_reducers(network, rules)
        logits.append(network(images))
    assert logits[0].equal(logits[1])


def test_pruning_alone_needs_no_sizes(make_vit, images):
    network = make_vit()
    attach_reducers(network, {1: PruneOrPool(4, policy="prune"), 3: PruneOrPool(4, policy="prune")})
    with record_tokens(network) as records:
        network(images)
    assert records.passes[0][3].size is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"r": -1}, "r must not be negative"),
        ({"threshold": -1e-5}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"policy": "merge"}, "policy must be one of"),
        ({"score": "norm"}, "score must be one of"),
        ({"threshold_mode": "std"}, "threshold_mode must be one of"),
        ({"dispatch": "where"}, "dispatch must be one of"),
    ],
)
def test_wrong_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        PruneOrPool(**{"r": 5, **options})
