"""What remains for inference is open_clip's CLIP; what training adds changes nothing of it."""

import math

import pytest
import torch
from open_clip import CLIP

from lightning_modules.lightclip import LightCLIPNet, Matching, Softening
from lightning_modules.lightclip.network import LARGEST_SCALE, similarity_scale
from lightning_modules.parts.options import OptionError

SMALL = {"image_size": 64, "embed_dim": 16, "width": 32, "heads": 2, "layers": 4, "context_length": 12}
SMALL |= {"vocabulary": 60, "start": 58, "end": 59, "align_width": 8}
IDS = torch.tensor([[58, 5, 0, 7, 59, 0, 0, 0, 0, 0, 0, 0], [58, 9, 59, 0, 0, 0, 0, 0, 0, 0, 0, 0]])


@pytest.mark.parametrize(("trunk", "act"), [("resnet18", "gelu"), ("mobilenetv2_100", "quick_gelu")])
def test_open_clip_loads_it_strictly(trunk, act):
    net = LightCLIPNet(trunk, act=act, **SMALL).eval()
    clip = CLIP(**net.open_clip_config()).eval()
    clip.load_state_dict(net.inference_state(), strict=True)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.encode_image(images), clip.encode_image(images))
        torch.testing.assert_close(net.encode_text(IDS), clip.encode_text(IDS))


def test_the_picture_reaches_masked_words_through_fusion_alone():
    masked = IDS.clone()
    masked[0, 1] = 60
    pictures = [torch.rand(2, 3, 64, 64) for _ in range(2)]
    for fusion in ("stages", "last", "none"):
        net = LightCLIPNet(fusion=fusion, **SMALL).eval()
        with torch.no_grad():
            hidden = [net.text_hidden(masked, net.visual.maps(picture)) for picture in pictures]
        assert torch.equal(*hidden) == (fusion == "none")


def test_a_word_changes_nothing_before_it():
    net = LightCLIPNet(**SMALL).eval()
    other = IDS.clone()
    other[:, 2] = 11
    with torch.no_grad():
        before, after = net.text_hidden(IDS), net.text_hidden(other)
    torch.testing.assert_close(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_swin_nano_has_the_papers_size():
    net = LightCLIPNet("swin_nano_patch4_window7_224", **{**SMALL, "image_size": 224}).eval()
    assert sum(p.numel() for p in net.visual.trunk.parameters()) == 6_914_634
    with torch.no_grad():
        shapes = [list(m.shape[1:]) for m in net.visual.maps(torch.rand(1, 3, 224, 224))]
    assert shapes == [[48, 56, 56], [96, 28, 28], [192, 14, 14], [384, 7, 7]]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LightCLIPNet("no_such_net", **SMALL), "no_such_net"),
        (lambda: LightCLIPNet(**{**SMALL, "layers": 3}), "layers"),
        (lambda: LightCLIPNet(**{**SMALL, "heads": 3}), "heads"),
        (lambda: Softening(start=0.3, end=0.2).check(), "softening.end"),
        (lambda: Matching(capacity=0).check(), "matching.capacity"),
        (lambda: Matching("bidirectional", capacity=1).check(), "matching.capacity"),
        (lambda: LightCLIPNet(**SMALL).encode_text(torch.zeros(1, 12, dtype=torch.long)), "end token"),
    ],
)
def test_options_out_of_range(make, named):
    with pytest.raises(OptionError, match=named):
        make()


def test_a_temperature_that_reached_its_largest_value_can_fall_again():
    logit_scale = torch.tensor(math.log(LARGEST_SCALE), requires_grad=True)
    scale = similarity_scale(logit_scale)
    scale.backward()
    assert scale.item() == pytest.approx(100, rel=1e-6)
    assert logit_scale.grad.item() == pytest.approx(100, rel=1e-6)
    assert similarity_scale(torch.tensor(9.0)).item() == pytest.approx(100, rel=1e-6)
    assert similarity_scale(torch.tensor(2.0)).item() == pytest.approx(math.exp(2))
