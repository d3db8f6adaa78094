"""What holds for every method: what an average of its weights is made of, and the mode that it trains in."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lightning_modules import CausalLanguageModel, ImageClassifier, TextClassifier
from lightning_modules.deco import Deco, DecoDetector, DecoPlus
from lightning_modules.gendet import CNNDetector, GenDet, LinearProbe, NearestNeighbors
from lightning_modules.parts.averaging import AveragedWeights, average_weights_only, averaged_tensors
from lightning_modules.parts.encoder import ImageEncoder
from lightning_modules.parts.modes import train_what_is_trained
from lightning_modules.tinysam import SAM, TinySAMModule, TinyViT

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}


def encoder() -> ImageEncoder:
    return ImageEncoder("test_vit", "timm", None, {"img_size": 32})


def deco() -> Deco:
    sizes = {"hidden_dim": 64, "encoder_widths": (32, 48, 64), "encoder_depths": (1, 1, 1)}
    return Deco(10, backbone="small", num_queries=25, grid_height=5, decoder_layers=2, **sizes)


def deco_plus() -> DecoPlus:
    return DecoPlus(10, 18, num_queries=20, grid_height=4, hidden_dim=16, encoder_depth=1, decoder_layers=2)


def sam() -> SAM:
    encoder = TinyViT((8, 8, 16, 16), (1, 1, 1, 1), (1, 1, 2, 2), (7, 7, 4, 4), width=32)
    return SAM(64, encoder, width=32, hidden=32)


METHODS = {
    "ImageClassifier": lambda: ImageClassifier("resnet18", 4),
    "DECO": lambda: DecoDetector(deco()),
    "DECO+": lambda: DecoDetector(deco_plus()),
    "GenDet": lambda: GenDet(encoder(), dim=16, heads=2, dropout=0.1),
    "LinearProbe": lambda: LinearProbe(encoder()),
    "NearestNeighbors": lambda: NearestNeighbors(encoder()),
    "CNNDetector": lambda: CNNDetector("resnet18", None),
    "TinySAM": lambda: TinySAMModule(sam()),
    "TextClassifier": lambda: TextClassifier("bert", model_args=BERT, tokenizer="bytes"),
    "CausalLanguageModel": lambda: CausalLanguageModel("gpt2", GPT2, "bytes"),
}


@pytest.mark.parametrize("method", METHODS)
def test_only_weights_and_statistics_are_averaged(trainer, method):
    """The rest of what is saved is what the method itself has: counters, thresholds, banks."""
    module, callback = METHODS[method](), EMAWeightAveraging(decay=0.5)
    run = trainer(callbacks=[callback])
    average_weights_only(run)
    callback.setup(run, module, "fit")
    trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    statistics = {name for name in module.state_dict() if name.endswith(("running_mean", "running_var"))}
    first = {name: values.clone() for name, values in module.state_dict().items()}
    for number in (1, 3):
        for values in module.state_dict().values():
            values.copy_(torch.full_like(values, number))
        callback._average_model.update_parameters(module)
    checkpoint = {"state_dict": module.state_dict()}
    callback.on_save_checkpoint(run, module, checkpoint)
    assert checkpoint["state_dict"].keys() == first.keys()
    for name, values in checkpoint["state_dict"].items():
        averaged = name in trained | statistics
        assert torch.equal(values, torch.full_like(values, 2 if averaged else 3)), name
    saved = {name: values.clone() for name, values in checkpoint["state_dict"].items()}
    callback.on_train_end(run, module)
    for name, values in module.state_dict().items():
        assert torch.equal(values, saved[name]), name


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, {"use_buffers": False}])
def test_statistics_follow_the_options_of_the_average(options):
    network = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    average = AveragedWeights(network, **{"use_buffers": True, **options})
    for number in (1.0, 3.0):
        for _, values in averaged_tensors(network):
            values.data.fill_(number)
        average.update_parameters(network)
    assert average.module[0].weight.item() == pytest.approx(2)
    assert average.module[1].running_var.item() == pytest.approx(
        3 if options.get("use_buffers") is False else 2
    )


class Counting(ImageClassifier):
    """Counts its steps, and learns a threshold in validation."""

    def __init__(self):
        super().__init__("resnet18", 4)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("threshold", torch.tensor(0.0))

    def training_step(self, batch, batch_idx):
        self.count += 1
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        self.threshold.fill_(0.25 + 0.5 * float(self.count > 4))


@pytest.mark.parametrize("kind", [EMAWeightAveraging, partial(WeightAveraging, avg_fn=lambda a, b, _: a)])
def test_a_run_with_averaged_weights_keeps_what_validation_chose(trainer, blob_data, tmp_path, kind):
    class SaveInValidation(Callback):
        def on_validation_batch_end(self, trainer, module, *_):
            trainer.save_checkpoint(tmp_path / "inside.ckpt")
            self.weights = {name: values.clone() for name, values in module.state_dict().items()}

    module, average, saver = Counting(), kind(), SaveInValidation()
    run = trainer(max_epochs=2, limit_val_batches=1, num_sanity_val_steps=0, callbacks=[average, saver])
    run.fit(module, datamodule=blob_data(batch_size=16, length=48))
    assert type(average).__qualname__ in ("EMAWeightAveraging", "WeightAveraging")
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved["count"] == 6
    assert saved["threshold"] == 0.75
    assert module.threshold == 0.75
    inside = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    weights = averaged_tensors(module)
    assert all(torch.equal(inside["state_dict"][name], saver.weights[name]) for name, _ in weights)
    assert not torch.equal(inside["current_model_state"]["network.fc.bias"], saver.weights["network.fc.bias"])


# Modes


@pytest.mark.parametrize("method", METHODS)
def test_whatever_is_trained_trains_in_training_mode(method):
    module = METHODS[method]().eval()
    train_what_is_trained(module)
    frozen_parts: list[str] = []
    for name, part in module.named_modules():
        trained = [parameter.requires_grad for parameter in part.parameters()]
        if trained and not any(trained):
            frozen_parts.append(f"{name}.")
        assert part.training or f"{name}.".startswith(tuple(frozen_parts)), name
    frozen = [part for part in module.modules() if isinstance(part, ImageEncoder)]
    assert all(not part.network.training for part in frozen)


def test_what_is_frozen_stays_as_it_is():
    network = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout()),
        nn.BatchNorm1d(2),
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2)),
    )
    network[0].requires_grad_(False).eval()
    network[1].eval()  # a user's way to freeze statistics
    network[2].eval()  # as transformers hands it over
    train_what_is_trained(network)
    assert not any(part.training for part in network[0].modules())
    assert not network[1].training
    assert all(part.training for part in network[2].modules())


def test_a_folder_is_finetuned_with_dropout(trainer, tmp_path):
    METHODS["CausalLanguageModel"]().network.save_pretrained(tmp_path / "model")
    module = CausalLanguageModel(str(tmp_path / "model"), tokenizer="bytes")
    dropouts = [part for part in module.network.modules() if isinstance(part, nn.Dropout)]
    assert len(dropouts) == 7
    active = []

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            active.append(sum(part.training for part in dropouts))

        def on_validation_batch_start(self, *_):
            active.append(-sum(part.training for part in dropouts))

    rows = [{"input_ids": torch.arange(3, 11), "index": 0}]
    trainer(max_epochs=2, callbacks=[Watch()]).fit(module, rows_of(rows), rows_of(rows))
    assert active == [0, 7, 0, 7, 0]


def rows_of(rows):
    return torch.utils.data.DataLoader(rows)
