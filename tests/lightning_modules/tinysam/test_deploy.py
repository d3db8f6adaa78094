"""The decoder as a network of its own: as the predictor says, as SAM's ONNX files say, and as a file."""

import json

import numpy as np
import pytest
import torch

from callbacks import ONNXExport, Results
from lightning_modules import TinySAMModule
from lightning_modules.tinysam.deploy import PromptedDecoder
from lightning_modules.tinysam.network import SAM
from lightning_modules.tinysam.predictor import Predictor
from tests.lightning_modules.tinysam.tiny import tiny_sam


def prompts(points, labels, side):
    count = len(points)
    return (
        torch.tensor(points),
        torch.tensor(labels),
        torch.zeros(count, 1, side, side),
        torch.zeros(count),
    )


def test_it_says_what_the_predictor_says():
    torch.manual_seed(0)
    network = tiny_sam().eval()
    predictor = Predictor(network)
    predictor.set_image(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    decoder = PromptedDecoder(network)
    given = prompts([[[10.0, 20.0], [0.0, 0.0]], [[4.0, 6.0], [40.0, 30.0]]], [[1.0, -1.0], [2.0, 3.0]], 16)
    with torch.no_grad():
        masks, ious = decoder(predictor.embedding, *given)
    asked = [{"points": [[10, 20]], "labels": [1]}, {"box": [4, 6, 40, 30]}]
    for number, prompt in enumerate(asked):
        for rows, several in ((slice(1, 4), True), (slice(0, 1), False)):
            found = predictor.predict(**prompt, multimask_output=several)
            np.testing.assert_allclose(masks[number, rows], found.logits, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(ious[number, rows], found.iou, rtol=1e-4, atol=1e-5)
    again = predictor.predict(points=[[10, 20]], labels=[1], mask=masks[0, 1:2].numpy())
    with torch.no_grad():
        refined, _ = decoder(predictor.embedding, given[0][:1], given[1][:1], masks[:1, 1:2], torch.ones(1))
    np.testing.assert_allclose(refined[0, 1:], again.logits, rtol=1e-4, atol=1e-5)
    assert not np.allclose(refined[0, 1:], masks[0, 1:])


def test_it_says_what_the_onnx_files_of_segment_anything_say():
    pytest.importorskip("segment_anything")
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
    from segment_anything.utils.onnx import SamOnnxModel

    torch.manual_seed(0)
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=64, num_heads=8)
    encoder = torch.nn.Identity()
    encoder.img_size = 64
    theirs = Sam(
        encoder,
        PromptEncoder(256, (4, 4), (64, 64), 16),
        MaskDecoder(transformer_dim=256, transformer=transformer),
    ).eval()
    ours = SAM(64, torch.nn.Identity(), hidden=64).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("pixel_")})
    embedding = torch.randn(1, 256, 4, 4)
    points = torch.tensor([[[10.0, 20.0], [30.0, 40.0], [4.0, 6.0], [40.0, 30.0]]])
    labels = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    mask, given = torch.randn(1, 1, 16, 16), torch.ones(1)
    size = torch.tensor([48.0, 64.0])
    for has in (given, 0 * given):
        _, scores, low = SamOnnxModel(theirs, return_single_mask=False)(
            embedding, points, labels, mask, has, size
        )
        with torch.no_grad():
            masks, ious = PromptedDecoder(ours)(embedding, points, labels, mask, has)
        torch.testing.assert_close(masks, low, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ious, scores, rtol=1e-4, atol=1e-4)


def test_encoder_and_decoder_are_two_files(data, trainer, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    encoder = torch.nn.Conv2d(3, 32, 16, 16)  # a quick one: torch.onnx takes its time for each operator
    module = TinySAMModule(SAM(64, encoder, width=32, hidden=32))
    del module.network.mask_decoder.transformer.layers[1]  # and a decoder of half the depth
    trainer(callbacks=[Results(), ONNXExport()]).test(module, data(), verbose=False)
    module.eval()
    report = json.loads((tmp_path / "results.json").read_text())["onnx"]
    assert report["parts"]["decoder"]["path"] == str(tmp_path / "model_decoder.onnx")
    encoder, decoder = (
        onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "model_decoder.onnx")
    )
    image = np.random.RandomState(0).rand(1, 3, 64, 64).astype(np.float32)
    image[:, :, 48:] = 0  # a picture of 64 x 48, and padding
    (embedding,) = encoder.run(None, {"image": image, "size": np.array([[48, 64]])})
    with torch.no_grad():
        wanted = module(torch.from_numpy(image), torch.tensor([[48, 64]]))
    np.testing.assert_allclose(embedding, wanted, atol=1e-4)
    for count, places in ((1, 1), (5, 3)):  # neither number is the exported one
        given = (
            torch.rand(count, places, 2) * 64,
            torch.ones(count, places),
            torch.zeros(count, 1, 16, 16),
            torch.zeros(count),
        )
        names = ("point_coords", "point_labels", "mask_input", "has_mask_input")
        feeds = dict(zip(names, (x.numpy() for x in given), strict=True))
        masks, ious = decoder.run(None, {"image_embeddings": embedding, **feeds})
        with torch.no_grad():
            low, scores = PromptedDecoder(module.network)(wanted, *given)
        np.testing.assert_allclose(masks, low, atol=1e-4)
        np.testing.assert_allclose(ious, scores, atol=1e-4)
