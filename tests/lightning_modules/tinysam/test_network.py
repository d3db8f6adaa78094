"""TinySAM's networks against the recorded numbers, and against segment_anything with equal weights."""

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from callbacks.measure.macs import count_macs
from lightning_modules.tinysam.network import SAM, TinyViT, load_sam, sam_vit
from lightning_modules.tinysam.predictor import Predictor, frame_size, full_size, normalised_frame, to_frame
from tests.golden.fill import fill, inputs
from tests.lightning_modules.tinysam.tiny import agrees, recorded


@pytest.fixture(scope="module")
def student():
    return fill(SAM(256)).eval()


def test_names_and_sizes_are_the_released_ones():
    network = SAM(1024)
    ours = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    released = recorded("state_dict")
    unused = {
        name for name in released if name.startswith(("image_encoder.head.", "image_encoder.norm_head."))
    }
    assert {name: list(shape) for name, shape in released.items() if name not in unused} == ours
    counts = recorded("counts")
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    # SAM's count of the prompt encoder has the fixed frequencies too
    assert sizes["image_encoder"] == counts["encoder_5m_1024"]["params_without_head"]
    assert sizes["mask_decoder"] == counts["parts"]["mask_decoder"]
    assert sizes["prompt_encoder"] == counts["parts"]["prompt_encoder"]


@torch.no_grad()
def test_encoder_is_the_recorded_one(student):
    case = recorded("encoder_256")
    images = inputs(case["input_label"], tuple(case["input_shape"]))
    agrees(student.image_encoder(images), case["out"])
    stages = recorded("encoder_256_stages")
    x = student.image_encoder.patch_embed(images)
    names = list(stages)
    agrees(x, next(stages[name] for name in names if "patch" in name), 1e-3)
    for place, layer in enumerate(student.image_encoder.layers):
        x = layer(x)
        summary = next(stages[name] for name in names if name.endswith(str(place)) and "patch" not in name)
        agrees(x if x.ndim == 3 else x.flatten(2).transpose(1, 2), summary, 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("side", [256, 1024])
def test_prompts_are_the_recorded_ones(side):
    case = recorded(f"prompt_{side}")
    tag = case["tag"]
    encoder = (
        fill(SAM(side, encoder=TinyViT((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2)))).eval().prompt_encoder
    )
    coords = inputs(f"{tag}/coords", (2, 3, 2)) * side / 8 + side / 2
    points = coords, torch.tensor(case["labels"])
    corners = [inputs(f"{tag}/b0", (2, 2)).abs() * side / 16 + side / 8]
    corners.append(inputs(f"{tag}/b1", (2, 2)).abs() * side / 16 + side / 2)
    boxes = torch.cat(corners, dim=1)
    masks = inputs(f"{tag}/mask", (2, 1, side // 4, side // 4))
    given = {
        "points": (points, None, None),
        "points_boxes": (points, boxes, None),
        "boxes": (None, boxes, None),
        "points_boxes_mask": (points, boxes, masks),
    }
    assert set(given) <= set(case["cases"])
    for name, prompts in given.items():
        sparse, dense = encoder(*prompts)
        agrees(sparse, case["cases"][name]["sparse"])
        if "dense" in case["cases"][name]:
            agrees(dense, case["cases"][name]["dense"])
    agrees(encoder.get_dense_pe(), case.get("dense_pe") or case["cases"]["dense_pe"])


@torch.no_grad()
def test_decoder_is_the_recorded_one(student):
    case = recorded("decoder_256")
    tag, count = case["tag"], case["num_prompts"]
    embedding = inputs(f"{tag}/emb", (1, 256, 16, 16))
    coords = inputs(f"{tag}/coords", (count, 2, 2)) * 256 / 8 + 128
    sparse, dense = student.prompt_encoder((coords, torch.tensor([[1, 0]] * count)), None, None)
    position = student.prompt_encoder.get_dense_pe()
    decoder = student.mask_decoder
    masks, iou, tokens = decoder(embedding, position, sparse, dense)
    agrees(masks, case["masks"])
    agrees(iou, case["iou"])
    agrees(tokens, case["output_tokens"])
    single, single_iou, _ = decoder(embedding, position, sparse, dense, multimask_output=False)
    agrees(torch.cat([single, masks], dim=1), case["masks_all4"])
    agrees(torch.cat([single_iou, iou], dim=1), case["iou_all4"])
    shared = decoder(embedding, position, sparse, dense[:1])
    torch.testing.assert_close(shared[0], masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shared[1], iou, rtol=1e-4, atol=1e-4)


def test_macs_are_the_recorded_ones():
    network = SAM(1024).eval()
    counted = count_macs(network.image_encoder.to("meta"), torch.zeros(1, 3, 1024, 1024, device="meta"))
    assert counted.total == recorded("counts")["encoder_5m_1024"]["macs_total"]


@torch.no_grad()
def test_predictions_are_the_recorded_ones(student):
    case = recorded("predict_256")
    height, width = case["H"], case["W"]
    image = np.random.RandomState(case["seed"]).randint(0, 256, size=(height, width, 3), dtype=np.uint8)
    resized = to_frame(image, 256)
    assert list(resized.shape) == case["resized_shape"]
    assert int(resized.sum()) == case["resized_sum"]
    agrees(normalised_frame(resized, 256), case["normalised_padded"], 1e-5)
    predictor = Predictor(student)
    predictor.set_image(image)
    agrees(predictor.embedding, case["embedding"])
    point, box = case["point"], case["box"]
    by_point = predictor.predict(point["coords"], [1])
    by_box = predictor.predict(box=box["xyxy"])
    for found, want in ((by_point, point), (by_box, box)):
        low = torch.from_numpy(found.logits)
        agrees(low, want["low_res"])
        agrees(full_size(low[None], 256, predictor.size, (height, width))[0], want["logits"])
        np.testing.assert_allclose(found.iou, want["iou"], rtol=1e-4, atol=3e-4)
    both = predictor.predict(point["coords"], [1], box["xyxy"], by_box.logits[1:2])
    assert both.masks.sum(axis=(1, 2)).tolist() == case["point_box_mask"]["areas"]
    agrees(torch.from_numpy(both.logits), case["point_box_mask"]["low_res"])
    assert both.best is not None


@torch.no_grad()
def test_teacher_is_the_recorded_one():
    case = recorded("teacher_mini")
    network = sam_vit(
        "samvit_base_patch16",
        case["image_size"],
        embed_dim=case["embed_dim"],
        depth=case["depth"],
        num_heads=case["num_heads"],
        window_size=case["window"],
        global_attn_indexes=tuple(case["global_blocks"]),
    ).eval()
    names = {
        name: name.replace("image_encoder.network.", "image_encoder.")
        .replace(".mlp.fc1.", ".mlp.lin1.")
        .replace(".mlp.fc2.", ".mlp.lin2.")
        for name, _ in network.named_parameters()
    }
    from tests.golden.fill import values

    for name, parameter in network.named_parameters():
        parameter.copy_(values(names[name], tuple(parameter.shape)))
    side = case["image_size"]
    agrees(network.image_encoder(inputs(case["label"], (1, 3, side, side))), case["out"])


def test_a_released_file_loads_and_another_is_refused(tmp_path):
    network = fill(SAM(64, TinyViT((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2))))
    state = network.state_dict()
    torch.save({**state, "image_encoder.head.weight": torch.zeros(1)}, tmp_path / "tinysam.pth")
    other = SAM(64, TinyViT((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2)))
    load_sam(other, tmp_path / "tinysam.pth")
    assert all(torch.equal(state[name], tensor) for name, tensor in other.state_dict().items())
    torch.save(
        {name: tensor for name, tensor in state.items() if "iou_token" not in name}, tmp_path / "half.pth"
    )
    with pytest.raises(MisconfigurationException, match=r"mask_decoder\.iou_token"):
        load_sam(other, tmp_path / "half.pth")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"points": [[5, 5]]}, "points and labels come together"),
        ({"points": [[5, 5]], "labels": [2]}, "labels of points are 1, 0 or -1, not 2"),
        ({"points": [[91, 5]], "labels": [1]}, r"a point at \(91, 5\) is outside of the picture of 90 x 60"),
        ({"points": [[float("nan"), 5]], "labels": [1]}, "outside of the picture"),
        ({"box": [1, 2, 3]}, r"a box is x0, y0, x1, y1, not \[1, 2, 3\]"),
        ({"box": [1, "x", 3, 4]}, r"a box is x0, y0, x1, y1, not \[1, 'x', 3, 4\]"),
        (
            {"points": [[5, 5], [6]], "labels": [1, 1]},
            r"points are \(k, 2\) as x, y, not \[\[5, 5\], \[6\]\]",
        ),
        ({"box": [9, 2, 3, 4]}, "x0 <= x1"),
        ({"box": [0, 0, 3, 61]}, r"corner of a box at \(3, 61\) is outside"),
        ({"mask": np.zeros((1, 3, 3))}, r"logits of \(1, 16, 16\), not \(1, 3, 3\)"),
    ],
)
def test_prompts_that_are_none(prompt, said):
    predictor = Predictor(SAM(64, TinyViT((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2))))
    with pytest.raises(RuntimeError, match="`set_image` comes before"):
        predictor.predict(points=[[1, 1]], labels=[1])
    predictor.set_image(np.zeros((60, 90, 3), np.uint8))
    with pytest.raises(ValueError, match=said):
        predictor.predict(**prompt)


def test_pictures_that_are_none():
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match="an image is uint8"):
            to_frame(image, 64)
    for row in recorded("amg")["resize_shape"]:
        height, width, side, *want = row
        if min(want) < 1:
            with pytest.raises(ValueError, match="no short side left"):
                frame_size(height, width, side)
        else:
            assert list(frame_size(height, width, side)) == want


# segment_anything


@pytest.fixture(scope="module")
def pair():
    """Our SAM with timm's encoder and Meta's, with equal weights."""
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder = ImageEncoderViT(
        img_size=1024,
        patch_size=16,
        out_chans=256,
        qkv_bias=True,
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=(1,),
        norm_layer=torch.nn.LayerNorm,
        **sizes,
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=256, num_heads=8)
    theirs = Sam(
        encoder,
        PromptEncoder(256, (64, 64), (1024, 1024), 16),
        MaskDecoder(transformer_dim=256, transformer=transformer),
    ).eval()
    fill(theirs)
    ours = sam_vit("samvit_base_patch16", 1024, window_size=14, global_attn_indexes=(1,), **sizes)
    decoder = SAM(1024, ours.image_encoder, hidden=256)
    return decoder.eval(), theirs


def test_segment_anything_gives_the_same_masks(pair, tmp_path):
    from segment_anything import SamPredictor

    ours, theirs = pair
    torch.save(theirs.state_dict(), tmp_path / "sam.pth")
    load_sam(ours, tmp_path / "sam.pth")
    image = np.random.RandomState(1).randint(0, 256, size=(48, 64, 3), dtype=np.uint8)
    first, second = Predictor(ours), SamPredictor(theirs)
    first.set_image(image)
    second.set_image(image)
    torch.testing.assert_close(first.embedding, second.features, rtol=1e-3, atol=1e-3)
    points, labels = np.array([[20.0, 30.0], [5.0, 6.0]]), np.array([1, 0])
    for prompt in ({"points": points, "labels": labels}, {"box": np.array([4.0, 5.0, 40.0, 30.0])}):
        mine = first.predict(**prompt)
        names = {"points": "point_coords", "labels": "point_labels", "box": "box"}
        masks, iou, low = second.predict(**{names[name]: value for name, value in prompt.items()})
        np.testing.assert_allclose(mine.logits, low, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(mine.iou, iou, rtol=1e-3, atol=1e-3)
        assert (mine.masks != masks).mean() < 1e-3
