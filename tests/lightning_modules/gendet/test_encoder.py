import copy

import open_clip
import pytest
import timm
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_modules.gendet import ImageEncoder

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def encoder(**options):
    return ImageEncoder(**{"model": "test_resnet", "source": "timm", "weights": None, **options})


def test_random_weights_are_always_the_same_and_leave_the_generator_alone():
    state = torch.random.get_rng_state()
    first = encoder()
    features = first(IMAGES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert features.shape == (2, first.width)
    assert torch.equal(encoder()(IMAGES), features)
    assert not torch.equal(encoder(seed=1)(IMAGES), features)


def test_it_is_in_no_state_dict_and_never_trains():
    holder = nn.Module()
    holder.encoder = encoder()
    before = holder.encoder(IMAGES)
    holder.train()
    assert not list(holder.parameters())
    assert not holder.state_dict()
    assert not holder.encoder.network.training
    assert torch.equal(holder.encoder(IMAGES), before)
    assert not before.requires_grad


def test_it_moves_with_its_holder():
    holder = nn.Module()
    holder.encoder = encoder()
    assert not holder.encoder._hidden, "built when it is needed"
    features = holder.encoder(IMAGES)
    holder.double()
    assert holder.encoder(IMAGES.double()).dtype == torch.float64
    torch.testing.assert_close(holder.encoder(IMAGES.double()).float(), features, atol=1e-4, rtol=1e-4)
    assert copy.deepcopy(holder).encoder._hidden


def test_images_are_normalised_with_the_model_s_statistics():
    own = encoder(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(own(IMAGES), own.network((IMAGES - mean) / std))
    assert encoder().mean.flatten().tolist() != own.mean.flatten().tolist()


def test_a_file_of_a_classifier_loads_without_its_classifier(tmp_path):
    network = timm.create_model("test_resnet", num_classes=7)
    file = tmp_path / "weights.pt"
    torch.save(network.state_dict(), file)
    loaded = encoder(weights=str(file))
    expected = network.eval().forward_head(
        network.forward_features((IMAGES - loaded.mean) / loaded.std), True
    )
    torch.testing.assert_close(loaded(IMAGES), expected)
    key = loaded.key
    torch.save({k: v + 1 for k, v in network.state_dict().items()}, file)
    assert encoder(weights=str(file)).key != key, "a file is known by its contents"


def test_keys_tell_encoders_apart():
    keys = {
        encoder().key,
        encoder(seed=1).key,
        encoder(model="test_vit").key,
        encoder(mean=(0.1, 0.1, 0.1)).key,
        encoder(model_args={"num_classes": 5}).key,
    }
    assert len(keys) == 5
    assert encoder(model_args={"num_classes": 5}).width == 5


@pytest.mark.parametrize("model", ["ViT-L-14-quickgelu", "ViT-B-32"])
def test_clip_s_width_is_known_without_building_it(model):
    clip = ImageEncoder(model, weights=None)
    assert clip.width == {"ViT-L-14-quickgelu": 768, "ViT-B-32": 512}[model]
    assert not clip._hidden
    assert clip.mean.flatten().tolist() == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_clip_gives_encode_image_without_normalisation(monkeypatch, tmp_path):
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-clip", config)
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny-clip").eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    own = ImageEncoder("tiny-clip", weights=str(tmp_path / "clip.pt"))
    with torch.no_grad():
        expected = clip.encode_image((IMAGES - own.mean) / own.std, normalize=False)
    torch.testing.assert_close(own(IMAGES), expected)
    assert own(IMAGES).norm(dim=1).sub(1).abs().min() > 1e-3


def test_faults():
    with pytest.raises(MisconfigurationException, match="open_clip has no model 'ViT-nothing'"):
        ImageEncoder("ViT-nothing")
    with pytest.raises(MisconfigurationException, match="neither a file nor a tag"):
        ImageEncoder("ViT-B-32", weights="nonsense")(IMAGES)
    with pytest.raises(MisconfigurationException, match="model_args is for timm"):
        ImageEncoder("ViT-B-32", model_args={"num_classes": 3})
    with pytest.raises(ValueError, match="no model 'resnet1x'"):
        encoder(model="resnet1x")
