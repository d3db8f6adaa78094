"""A CLIP as teacher, pruning by YAML, token reduction on a ViT, and what leaves the framework."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file

from callbacks import CLIPExport, CLIPTeacher, TokenPruningPooling
from callbacks.deploy.clip import CONFIG, WEIGHTS
from callbacks.distillation.clip import affinity_loss
from datamodules import ImageTextDataModule, ImageTransforms, RetrievalSet, ZeroShotSet
from datamodules.samples.scenes import write_scenes
from featherlight_cli import make_cli
from lightning_modules import ImageClassifier, LightCLIP

REPOSITORY = Path(__file__).parents[3]
NETWORK = {"image_size": 32, "embed_dim": 16, "width": 16, "heads": 2, "layers": 4, "context_length": 16}
NETWORK |= {"trunk": "test_convnext", "align_width": 8}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(root, 16, 32, shards=2)
    return root


def data(root):
    return ImageTextDataModule(
        root=root,
        batch_size=8,
        num_workers=0,
        context_length=16,
        transforms=ImageTransforms(image_size=32, augmentation="none"),
        zero_shot=[ZeroShotSet("things", Path("zeroshot"), Path("zeroshot.json"))],
        retrieval=[RetrievalSet("scenes", Path("scenes_karpathy.json"), Path("test"))],
    )


def tiny_teacher(width=24):
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
    text = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=width, vision_cfg=vision, text_cfg=text)


@pytest.mark.parametrize("width", [16, 24])
def test_a_teacher_adds_three_terms_and_stays_outside(drawn, trainer, width):
    teacher = CLIPTeacher(tiny_teacher(width))
    module = LightCLIP(NETWORK, w_tok=0, w_mlm=0)
    run = trainer(callbacks=[teacher], max_steps=2, max_epochs=None)
    run.fit(module, data(drawn))
    logged = {name for name in run.callback_metrics if "clip_teacher" in name}
    assert logged == {f"train/clip_teacher/{term}" for term in ("feature", "similarity", "affinity")}
    assert not any("clip." in name for name in module.state_dict())


def test_the_teacher_of_itself_has_nothing_to_teach():
    cosine = torch.randn(5, 5)
    probability = cosine.softmax(1)
    entropy = -(probability * probability.log()).sum(1).mean()
    other = -(cosine.T.softmax(1) * cosine.T.log_softmax(1)).sum(1).mean()
    assert affinity_loss(cosine, cosine) == pytest.approx((entropy + other).item() / 2, abs=1e-6)
    moved = cosine.clone().requires_grad_()
    affinity_loss(moved, cosine).backward()
    assert moved.grad.abs().max() < 1e-6


def test_a_teacher_of_transformers(drawn, trainer, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 49408, "max_position_embeddings": 20, "eos_token_id": 49407}
    vision = {**small, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
        tmp_path / "hf"
    )
    teacher = CLIPTeacher(str(tmp_path / "hf"), weights=None, source="transformers", affinity_weight=0)
    run = trainer(callbacks=[teacher], max_steps=1, max_epochs=None)
    run.fit(LightCLIP(NETWORK, w_tok=0, w_mlm=0), data(drawn))
    assert run.callback_metrics["train/clip_teacher/feature"] > 0


def test_faults_of_the_teacher(drawn, trainer):
    with pytest.raises(ValueError, match="temperature=0: it must be positive"):
        CLIPTeacher(tiny_teacher(), temperature=0)
    with pytest.raises(ValueError, match="nor all 0"):
        CLIPTeacher(tiny_teacher(), feature_weight=0, similarity_weight=0, affinity_weight=0)
    with pytest.raises(Exception, match="CLIPTeacher distils into LightCLIP, not ImageClassifier"):
        CLIPTeacher(tiny_teacher()).student(ImageClassifier("test_vit", 2, model_args={"img_size": 32}))


def test_rpg_by_yaml(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((REPOSITORY / "configs/lightclip/quickstart.yaml").read_text())
    recipe["model"]["init_args"]["network"] = {**NETWORK, "trunk": "test_resnet"}
    recipe["data"]["init_args"] |= {
        "root": str(drawn),
        "sample": False,
        "batch_size": 4,
        "context_length": 16,
    }
    recipe["data"]["init_args"]["transforms"]["image_size"] = 32
    recipe["trainer"] |= {"max_epochs": 3, "callbacks": [], "limit_val_batches": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rpg = yaml.safe_load((REPOSITORY / "configs/callbacks/rpg.yaml").read_text())
    rpg["init_args"] |= {"update_every": 1, "target_sparsity": 0.8}
    (tmp_path / "rpg.yaml").write_text(yaml.safe_dump(rpg))
    made = make_cli(["fit", "--config", "recipe.yaml", "--trainer.callbacks+=rpg.yaml"])
    trunk = made.model.network.visual.trunk
    weights = torch.cat([p.flatten() for name, p in trunk.named_parameters() if p.ndim == 4])
    assert (weights == 0).float().mean() > 0.5


def test_ppt_on_a_vit_tower(drawn, trainer):
    module = LightCLIP({**NETWORK, "trunk": "vit_tiny_patch16_224", "image_size": 64}, w_tok=0, w_mlm=0)
    source = data(drawn)
    source.transforms = ImageTransforms(image_size=64, augmentation="none")
    reduction = TokenPruningPooling(compress_blocks=[3], r=4, threshold=1e-4, stages=["test"])
    run = trainer(callbacks=[reduction])
    metrics = run.test(module, source, verbose=False)[0]
    assert 0 <= metrics["test/things/top1"] <= 100
    assert reduction.state_dict()  # it acted


def test_an_export_is_refused_before_the_work(trainer, monkeypatch):
    run = trainer()
    with pytest.raises(MisconfigurationException, match="CLIPExport exports LightCLIP, not ImageClassifier"):
        CLIPExport().setup(run, ImageClassifier("test_vit", 2, model_args={"img_size": 32}), "test")
    module = LightCLIP(NETWORK, w_tok=0, w_mlm=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match=r"CLIPExport needs onnx, .*pip install featherlight\[export\]"
    ):
        CLIPExport().setup(run, module, "test")
    CLIPExport().setup(run, module, "fit")  # nothing is exported there
    CLIPExport(onnx=False).setup(run, module, "test")
    sharded = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="CLIPExport exports no sharded network"):
        CLIPExport(onnx=False).setup(sharded, module, "test")


@pytest.fixture(scope="module")
def exported(drawn, tmp_path_factory):
    from lightning.pytorch import Trainer

    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    module = LightCLIP({**NETWORK, "trunk": "resnet18"})
    run = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        callbacks=[CLIPExport()],
    )
    run.test(module, data(drawn), verbose=False)
    return module.eval(), folder


def batch(count):
    stream = torch.Generator().manual_seed(count)
    ids = torch.zeros(count, 16, dtype=torch.int64)
    ids[:, :6] = torch.tensor([49406, 320, 1000, 0, 2000, 49407])
    return torch.rand(count, 3, 32, 32, generator=stream), ids


def test_onnx_towers_give_what_torch_gives_for_any_batch(exported):
    module, folder = exported
    for count in (1, 5):
        images, ids = batch(count)
        for tower, given, wanted in (
            ("image", images, module.encode_image(images)),
            ("text", ids, module.encode_text(ids)),
        ):
            session = onnxruntime.InferenceSession(str(folder / f"{tower}_tower.onnx"))
            name = {"image": "image", "text": "input_ids"}[tower]
            found = session.run(["features"], {name: given.numpy()})[0]
            assert np.abs(found - wanted.detach().numpy()).max() < 1e-4


def test_open_clip_loads_the_folder_strictly_and_sees_the_same(exported):
    module, folder = exported
    content = json.loads((folder / "open_clip" / CONFIG).read_text())
    clip = open_clip.CLIP(**content["model_cfg"]).eval()
    clip.load_state_dict(load_file(folder / "open_clip" / WEIGHTS), strict=True)
    images, ids = batch(3)
    normalised = module.normalize(images)
    with torch.no_grad():
        torch.testing.assert_close(
            F.normalize(clip.encode_image(normalised), dim=-1), module.encode_image(images)
        )
        torch.testing.assert_close(F.normalize(clip.encode_text(ids), dim=-1), module.encode_text(ids))
    if hasattr(open_clip.factory, "LOCAL_DIR_PREFIX"):
        loaded, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'open_clip'}")
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval().encode_text(ids), clip.encode_text(ids))
        assert "0.485" in str(preprocess)
