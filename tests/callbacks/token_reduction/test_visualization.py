import torch

from callbacks.token_reduction import MergeSimilar, PruneOrPool, attach_reducers, record_tokens
from callbacks.token_reduction.visualization import draw_layers, paint_groups, patch_groups


def test_groups_name_the_token_of_each_patch():
    sources = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=torch.uint8)
    assert patch_groups(sources, (2, 2), prefix=1).tolist() == [[1, 2], [-1, 1]]


def test_dropped_is_black_kept_is_shown_and_merged_is_painted_in_its_mean():
    image = torch.rand(3, 224, 224)
    painted = paint_groups(image, torch.tensor([[0, 1], [-1, 0]]))
    inner = slice(30, 80)
    assert painted[:, 112:, :112].eq(0).all()
    assert painted[:, :112, 112:].equal(image[:, :112, 112:])
    mean = (image[:, :112, :112].mean(dim=(1, 2)) + image[:, 112:, 112:].mean(dim=(1, 2))) / 2
    torch.testing.assert_close(painted[:, inner, inner], mean[:, None, None].expand(3, 50, 50))
    corner, far = painted[:, 0, 0], painted[:, -1, -1]
    assert corner.equal(far)  # one outline colour a token
    assert not torch.allclose(corner, mean, atol=1e-2)


def test_small_images_are_enlarged():
    assert paint_groups(torch.rand(3, 32, 32), torch.arange(16).view(4, 4)).shape == (3, 224, 224)


def test_one_panel_a_layer(make_vit, images):
    network = make_vit()
    attach_reducers(network, {0: MergeSimilar(3), 1: PruneOrPool(5, policy="prune")})
    with record_tokens(network, trace=True) as records:
        network(images)
    sheet = draw_layers(images[0].sigmoid(), records.passes[0], 0, (4, 4), prefix=1)
    assert sheet.width > 3 * 224
    assert sheet.height > 224
    groups = patch_groups(records.passes[0][1].sources[0], (4, 4), prefix=1)
    kept = len(groups[groups >= 0].unique())
    assert kept == records.passes[0][1].tokens - 1
