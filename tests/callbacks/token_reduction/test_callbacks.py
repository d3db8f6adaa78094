import json
import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from timm.models.vision_transformer import Block, VisionTransformer

from callbacks.run.results import Results
from callbacks.token_reduction import EViT, TokenPruningPooling, ToMe
from lightning_modules.classification import ImageClassifier

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


def classifier(**options):
    return ImageClassifier("vit_tiny_patch16_224", 4, model_args={**SMALL, **options})


def ppt(threshold=1e-4, blocks=(1, 2), **options):
    return TokenPruningPooling(list(blocks), 4, threshold, **options)


def is_plain(module):
    return type(module.network) is VisionTransformer and all(
        type(block) is Block for block in module.network.blocks
    )


@pytest.mark.parametrize("callback", [ppt(visualize=2), ToMe(2, visualize=2), EViT([1, 2], 0.6, visualize=2)])
def test_all_four_commands(trainer, blob_data, tmp_path, callback):
    module, data = classifier(), blob_data(length=12, batch_size=8)
    keys = list(module.state_dict())
    make = trainer(callbacks=[callback, Results()], limit_train_batches=1)
    make.fit(module, datamodule=data)
    assert make.callback_metrics[f"{callback.name}/macs"] > 0
    assert is_plain(module)
    make.validate(module, datamodule=data, verbose=False)
    make.test(module, datamodule=data, verbose=False)
    assert is_plain(module)
    report = json.loads((tmp_path / "results.json").read_text())
    part = report[callback.name]
    assert part["macs"] < part["macs_without"]
    assert part["tokens_after_blocks"][-1] < 17
    assert report["metrics"][f"{callback.name}/macs"] == part["macs"]
    names = [f"{callback.name}_00000{index}.png" for index in (0, 1)]
    assert [path.name for path in sorted((tmp_path / "tokens").iterdir())] == names
    for path in (tmp_path / "tokens").iterdir():
        path.unlink()
    make.predict(module, datamodule=data)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    assert list(module.state_dict()) == keys
    assert is_plain(module)


class Watcher(TokenPruningPooling):
    """Keeps the record of block 1 of every test batch."""

    def on_test_start(self, trainer, pl_module):
        self.seen = []

    def on_test_batch_end(self, *arguments):
        super().on_test_batch_end(*arguments)
        self.seen.append(self.records.passes[0][1])


def test_shares_count_images_and_not_batches(trainer, blob_data):
    module, data = classifier(), blob_data(length=11, batch_size=8)
    watcher = Watcher([1, 2], 4)
    trainer(callbacks=[watcher]).test(module, datamodule=data, verbose=False)
    variances = torch.cat([block.variance for block in watcher.seen]).sort().values
    watcher = Watcher([1, 2], 4, threshold=variances[4:6].mean().item())
    run = trainer(callbacks=[watcher])
    run.test(module, datamodule=data, verbose=False)
    assert [len(block.pooled) for block in watcher.seen] == [8, 3]
    assert sum(block.pooled.sum() for block in watcher.seen) == 5
    assert run.callback_metrics["ppt/pooled_block1"].item() == pytest.approx(5 / 11)


def test_sources_are_kept_for_the_last_batch(trainer, blob_data):
    watcher = Watcher([1, 2], 4, trace_source=True)
    trainer(callbacks=[watcher]).test(
        classifier(), datamodule=blob_data(length=11, batch_size=8), verbose=False
    )
    assert watcher.records.passes[0][2].sources.shape == (3, 9, 17)


def test_only_the_stages_asked_for(trainer, blob_data):
    module, data = classifier(), blob_data(length=8)
    seen = {}

    class Looker(TokenPruningPooling):
        def on_train_start(self, trainer, pl_module):
            seen["fit"] = is_plain(pl_module)

        def on_test_start(self, trainer, pl_module):
            seen["test"] = is_plain(pl_module)

    run = trainer(callbacks=[Looker([1], 4, stages=["test"])], limit_val_batches=0)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    assert seen == {"fit": True, "test": False}


def test_the_network_is_restored_after_an_error(trainer, blob_data):
    module = classifier()
    module.test_step = lambda *a: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer(callbacks=[ppt()]).test(module, datamodule=blob_data(length=8), verbose=False)
    assert is_plain(module)


def test_fine_tuning_with_averaged_weights_and_resuming(trainer, blob_data, tmp_path):
    from lightning.pytorch.callbacks import WeightAveraging

    module, data = classifier(), blob_data(length=8)
    run = trainer(callbacks=[ppt(), WeightAveraging()], limit_val_batches=1)
    run.fit(module, datamodule=data)
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    torch.load(path, weights_only=True)
    for callback, warns in ((ppt(dispatch="split"), False), (ppt(2e-4), True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(callbacks=[callback], max_epochs=2, limit_val_batches=0).fit(
                classifier(), datamodule=data, ckpt_path=path, weights_only=True
            )
        assert any("was trained with" in str(entry.message) for entry in caught) == warns


def test_a_budget_sets_r(trainer, blob_data):
    module = classifier()
    callback = ppt(target_macs=1.6e6)
    callback.setup(trainer(), module, "test")
    found = callback.results(None, module)
    assert found["macs"] <= 1.6e6 < found["macs_without"]
    callback.teardown(trainer(), module, "test")
    smaller = TokenPruningPooling([1, 2], found["r"] - 1)
    smaller.setup(trainer(), module, "test")
    assert smaller.results(None, module)["macs"] > 1.6e6
    smaller.teardown(trainer(), module, "test")


def test_one_r_and_one_policy_a_block(trainer):
    module = classifier()
    callback = TokenPruningPooling([0, 2], [3, 5], policy=["pool", "prune"])
    callback.setup(trainer(), module, "test")
    assert callback.results(None, module)["tokens_after_blocks"] == [14, 14, 9, 9]
    assert callback.results(None, module)["policy"] == ["pool", "prune"]
    callback.teardown(trainer(), module, "test")


def test_an_empty_list_of_blocks_warns_and_does_nothing(trainer):
    module, callback = classifier(), TokenPruningPooling([])
    with pytest.warns(UserWarning, match="compress_blocks is empty"):
        callback.setup(trainer(), module, "fit")
    assert is_plain(module)
    assert callback.results(None, module) == {}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TokenPruningPooling([1, 1]), "compress_blocks lists a block twice"),
        (lambda: TokenPruningPooling([1, 2], [5]), "r lists 1 values"),
        (lambda: TokenPruningPooling([1, 2], -1), "r must not be negative"),
        (lambda: TokenPruningPooling([1], policy=["pool", "pool"]), "policy lists 2 values"),
        (lambda: TokenPruningPooling([1], threshold=math.nan), "threshold"),
        (lambda: TokenPruningPooling([1], stages=["training"]), "stages: training"),
        (lambda: TokenPruningPooling([1], visualize=-1), "visualize"),
        (lambda: EViT(keep_rate=0), "keep_rate"),
    ],
)
def test_wrong_options_are_named_at_once(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_options_that_do_not_fit_the_network_are_named(trainer):
    for callback, named in (
        (ToMe([1, 2]), "r lists 2 values"),
        (TokenPruningPooling([3, 6]), "compress_blocks: 6"),
    ):
        module = classifier()
        with pytest.raises(ValueError, match=named):
            callback.setup(trainer(), module, "test")
        assert is_plain(module)


class Several(LightningModule):
    def __init__(self, count):
        super().__init__()
        self.towers = torch.nn.ModuleList(VisionTransformer(**SMALL, num_classes=4) for _ in range(count))
        self.other = torch.nn.Linear(1, 1)


def test_the_target_is_found_or_what_there_is_gets_listed(trainer):
    run = trainer()
    with pytest.raises(MisconfigurationException, match="Several has none"):
        ppt().setup(run, Several(0), "fit")
    with pytest.raises(MisconfigurationException, match=r"several.*towers\.0 .*towers\.1 "):
        ppt().setup(run, Several(2), "fit")
    with pytest.raises(MisconfigurationException, match=r"target='other'.*towers\.0"):
        ppt(target="other").setup(run, Several(1), "fit")
    module, callback = Several(2), ppt(target="towers.1")
    callback.setup(run, module, "fit")
    assert type(module.towers[0]) is VisionTransformer
    assert type(module.towers[1]) is not VisionTransformer
    callback.teardown(run, module, "fit")
    assert type(module.towers[1]) is VisionTransformer
