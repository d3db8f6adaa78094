"""TinySAMModule: what a step computes, what learns, and how it is measured."""

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from datamodules import InstancePromptsDataModule
from datamodules.samples.sa1b import write_prompted_coco
from lightning_modules.tinysam import HardPrompts, Protocol
from lightning_modules.tinysam.frame import framed, inside
from lightning_modules.tinysam.losses import mask_iou
from lightning_modules.tinysam.protocols import View


def test_a_step(student, batch):
    module = student()
    outputs = module.compute(batch)
    assert outputs["embedding"].shape == (2, 32, 4, 4)
    assert outputs["masks"].shape == (6, 3, 16, 16)
    assert outputs["tokens"].shape == (6, 5, 32)
    rows = ((outputs["points"][:, 0] - 1.5) / 4).long()
    assert batch["masks"][torch.arange(6), rows[:, 1], rows[:, 0]].all()
    for owner, valid in zip(batch["owner"], outputs["valid"], strict=True):
        height, width = ((batch["size"][owner] + 2) // 4).tolist()
        assert valid[:height, :width].all()
        assert valid.sum() == height * width
    terms = module.losses(outputs, batch)
    sum(terms.values()).backward()
    assert set(terms) == {"mask", "iou"}


def test_what_learns(student, batch):
    module = student()
    outputs = module.compute(batch)
    sum(module.losses(outputs, batch).values()).backward()
    for name, parameter in module.network.named_parameters():
        frozen = name.startswith(("prompt_encoder.", "mask_decoder.output_hypernetworks_mlps.0."))
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is not None) is not frozen, name  # DDP would complain of one without
    assert not any(p.requires_grad for p in student(train_decoder=False).network.mask_decoder.parameters())


def test_a_batch_without_masks_joins_the_backward_pass(student, batch):
    module = student()
    empty = {**batch, "masks": batch["masks"][:0], "owner": batch["owner"][:0]}
    loss = sum(module.losses(module.compute(empty), empty).values())
    loss.backward()
    assert loss == 0
    for name, parameter in module.network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() == 0


def test_chunks_change_nothing(student, batch):
    gradients = []
    for size in (None, 4):
        module = student(prompts_per_chunk=size, prompts=HardPrompts(enabled=False))
        torch.manual_seed(5)
        sum(module.losses(module.compute(batch), batch).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_prompts_are_boxes_now_and_then(student, batch):
    module = student(prompts=HardPrompts(box_prob=1.0, enabled=False))
    boxed = module.compute(batch)
    assert boxed["boxed"].all()
    module.prompts = HardPrompts(enabled=False)
    assert not module.compute(batch)["boxed"].any()


def test_hard_prompts_ask_the_student(student, batch, monkeypatch):
    module, asked = student(), []
    decode = type(module)._decode

    def counted(self, *arguments):
        asked.append(torch.is_grad_enabled())
        return decode(self, *arguments)

    monkeypatch.setattr(type(module), "_decode", counted)
    counts = set()
    for step in range(12):
        monkeypatch.setattr(type(module), "global_step", step)
        asked.clear()
        module.compute(batch)
        assert asked[-1]
        assert not any(asked[:-1])
        counts.add(len(asked))
    assert counts <= set(range(1, 11))
    assert len(counts) > 4
    module.prompts = HardPrompts(enabled=False)
    asked.clear()
    module.compute(batch)
    assert asked == [True]


def test_the_padding_is_zero_behind_the_normalisation(student):
    module = student()
    picture = inside(torch.tensor([[10, 16], [16, 5]]), 16)
    assert picture.sum(dim=(1, 2)).tolist() == [160, 80]
    seen = framed(torch.full((2, 3, 16, 16), 0.3), picture, module.mean, module.std)
    assert seen[0, :, 10:].abs().max() == 0
    assert torch.equal(seen[0, :, :10], module.normalize(torch.full((2, 3, 16, 16), 0.3))[0, :, :10])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HardPrompts(rounds=-1), r"prompts\.rounds=-1: it must be at least 0"),
        (lambda: HardPrompts(box_prob=1.5), r"prompts\.box_prob=1.5: it must be in \[0, 1\]"),
        (lambda: Protocol(clicks=0), r"protocol\.clicks=0: it must be at least 1"),
    ],
)
def test_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_clicks_are_measured(student, data, trainer):
    module = student(protocol=Protocol(clicks=2))
    made = data(val_masks=3)
    scores = trainer().test(module, made, verbose=False)[0]
    assert set(scores) == {"test/miou1", "test/miou2"}
    assert 0 <= scores["test/miou1"] <= 1


def test_boxes_are_measured(student, trainer, tmp_path):
    write_prompted_coco(tmp_path / "coco", size=8, image_size=48)
    detections = tmp_path / "coco" / "detections_val2017.json"
    options = {"root": tmp_path / "coco", "image_size": 64, "num_workers": 0}
    made = InstancePromptsDataModule(detections=detections, **options)
    module = student(protocol=Protocol("boxes"))
    scores = trainer().test(module, made, verbose=False)[0]
    assert set(scores) == {f"test/{name}" for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}


def test_a_protocol_says_what_it_needs(student, data, trainer):
    with pytest.raises(MisconfigurationException, match="needs `boxes` in its batches"):
        trainer().test(student(protocol=Protocol("boxes")), data(), verbose=False)


class Square:
    """A segmenter that gives a square around each point, and a box as it is."""

    side = 16

    def prompt_encoder(self, points, boxes, masks):
        self.asked = points[0][:, -1] if boxes is None else boxes
        return torch.zeros(len(self.asked), 2, 256), torch.zeros(len(self.asked), 256, 4, 4)

    def mask_decoder(self, embedding, position, sparse, dense):
        y, x = torch.meshgrid(*(torch.arange(16) * 4 + 1.5,) * 2, indexing="ij")
        masks = []
        for row in self.asked:
            if len(row) == 2:
                masks.append(torch.maximum((x - row[0]).abs(), (y - row[1]).abs()) < 8)
            else:
                masks.append((x > row[0]) & (x < row[2]) & (y > row[1]) & (y < row[3]))
        logits = torch.stack(masks)[:, None].float() * 20 - 10
        return logits.expand(-1, 3, -1, -1), torch.zeros(len(masks), 3), None


def test_prompts_and_masks_are_in_pixels_of_the_picture():
    network = Square()
    network.prompt_encoder_method = None
    view = View(_with_position(network), torch.zeros(1, 256, 4, 4), (32, 64), (100, 200), batch=1)
    boxes = torch.tensor([[50.0, 25.0, 150.0, 75.0], [0.0, 0.0, 200.0, 100.0]])
    masks = torch.from_numpy(view.of_boxes(boxes))
    assert masks.shape == (2, 100, 200)
    expected = torch.zeros(100, 200, dtype=torch.bool)
    expected[25:75, 50:150] = True
    assert mask_iou(masks[:1, None].float() * 2 - 1, expected[None]).item() > 0.9
    assert masks[1].float().mean() > 0.9
    (mask,) = view.of_points(torch.tensor([[[150.0, 40.0]]]), torch.ones(1, 1, dtype=torch.int64))
    assert mask[40, 150]
    assert not mask[40, 100]
    assert view.of_boxes(boxes[:0]).shape == (0, 100, 200)


def _with_position(network):
    class Network:
        image_size = 64
        mask_decoder = staticmethod(network.mask_decoder)

        class prompt_encoder:
            get_dense_pe = staticmethod(lambda: None)

            def __new__(cls, **options):
                return network.prompt_encoder(**options)

    return Network
