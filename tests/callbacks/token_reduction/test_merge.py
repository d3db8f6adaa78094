import torch

from callbacks.token_reduction.merge import merge, merge_sources, take
from callbacks.token_reduction.pairing import Plan, choose, pair_tokens, prune


def mixed_plan(batch=3):
    pooled = torch.tensor([True, False, True])[:batch]
    return choose(pooled, prune(torch.rand(batch, 8), 5, 1), pair_tokens(torch.randn(batch, 9, 4), 3, 1))


def loop_merge(x, size, plan):
    """The definition, token by token, from the tokens before merging."""
    out, sizes = [], []
    for b in range(len(x)):
        rows, totals = [], []
        for place, position in enumerate(plan.kept[b].tolist()):
            members = [position]
            if plan.weight is None or plan.weight[b]:
                members += [
                    m
                    for m, i in zip(plan.merged[b].tolist(), plan.into[b].tolist(), strict=True)
                    if i == place
                ]
            totals.append(size[b, members].sum())
            rows.append((size[b, members, None] * x[b, members]).sum(dim=0) / totals[-1])
        out.append(torch.stack(rows))
        sizes.append(torch.stack(totals))
    return torch.stack(out), torch.stack(sizes)


def test_merge_is_the_size_weighted_mean_of_what_was_there_before():
    x, size = torch.randn(3, 9, 5), torch.randint(1, 5, (3, 9)).float()
    plan = mixed_plan()._replace(into=torch.full((3, 3), 5))  # all three into one token
    out, sizes = merge(x, size, plan)
    expected, expected_sizes = loop_merge(x, size, plan)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(sizes, expected_sizes)


def test_pooling_conserves_sizes_and_pruning_loses_them():
    size = torch.randint(1, 5, (3, 9)).float()
    _, sizes = merge(torch.randn(3, 9, 5), size, mixed_plan())
    lost = (size.sum(dim=1) - sizes.sum(dim=1)).tolist()
    assert lost[0] == lost[2] == 0
    assert lost[1] >= 3


def test_images_that_prune_are_only_gathered():
    x, plan = torch.randn(3, 9, 5), mixed_plan()
    out, _ = merge(x, torch.ones(3, 9), plan)
    assert out[1].equal(take(x, plan.kept)[1])


def test_merge_leaves_its_input_alone():
    x, size = torch.randn(3, 9, 5), torch.ones(3, 9)
    before = x.clone()
    merge(x, size, mixed_plan())
    assert x.equal(before)
    assert size.equal(torch.ones(3, 9))


def test_gradcheck_in_float64():
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 4, (2, 9)).double()
    plan = mixed_plan(2)
    assert torch.autograd.gradcheck(lambda tokens: merge(tokens, size, plan)[0], (x,))


def test_sources_follow_every_image_of_a_mixed_batch():
    eye = torch.eye(9, dtype=torch.uint8).expand(3, -1, -1)
    plan = mixed_plan()
    once = merge_sources(eye, plan)
    assert once.sum(dim=1).tolist()[0] == [1] * 9  # pooled: every patch is in exactly one token
    assert once[1].equal(eye[1][plan.kept[1]])  # pruned: the kept rows, nothing else
    again = merge_sources(once, Plan(torch.tensor([[0, 3], [0, 4], [0, 5]])))
    assert again[2].equal(once[2][[0, 5]])
