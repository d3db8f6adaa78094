"""TextClassifier: label words, metrics, the four commands, what plugs into it."""

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import CBQ, GPTQ, RTN, MagnitudePruning, ONNXExport, SubmissionWriter, TextTeacher
from datamodules import GlueDataModule
from datamodules.samples.sentiment import write_sentiment
from lightning_modules import TextClassifier
from lightning_modules.parts.text_metrics import EntityF1, MatthewsCorrelation

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 24,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentiment") / "data"
    write_sentiment(root, 64)
    return root


@pytest.fixture
def data(language):
    return GlueDataModule(root=language, max_length=16, batch_size=16, num_workers=0)


@pytest.fixture
def make(language):
    def build(model="bert", **options):
        torch.manual_seed(0)
        arguments = {"bert": BERT, "t5": T5}.get(model)
        tokenizer = str(language / "tokenizer")
        return TextClassifier(model, **{"model_args": arguments, "tokenizer": tokenizer, **options})

    return build


def test_label_words_answer_with_their_first_tokens(make):
    module = make("t5", label_words=["bad", "good"])
    module.eval()
    ids = torch.randint(10, 300, (3, 5))
    start = torch.zeros(3, 1, dtype=torch.int64)
    with torch.no_grad():
        whole = module.network.model(input_ids=ids, decoder_input_ids=start).logits[:, 0]
        words = [module.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("bad", "good")]
        found = module.task_logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(found, whole[:, words])


def test_label_words_that_share_a_token_are_refused(make):
    with pytest.raises(MisconfigurationException, match="'good' and 'good' share their first token"):
        make("t5", label_words=["good", "good"])
    with pytest.raises(MisconfigurationException, match="2 words, and there are 3 classes"):
        make("t5", label_words=["bad", "good"], num_classes=3)


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_fit_test_predict_prune_distil_export(make, data, trainer, tmp_path, model):
    options = {"label_words": ["bad", "good"]} if model == "t5" else {}
    teacher = make(model, **options)
    weights = tmp_path / "teacher.ckpt"
    torch.save({"state_dict": teacher.state_dict(), "hyper_parameters": dict(teacher.hparams)}, weights)
    module = make(model, **options)
    pruning = MagnitudePruning(target_sparsity=0.5, update_every=1)
    run = trainer(callbacks=[TextTeacher(weights=weights), pruning], limit_val_batches=1)
    run.fit(module, datamodule=data)
    assert {"train/ce", "train/text_teacher/kd", "val/accuracy"} <= run.logged_metrics.keys()
    pytest.importorskip("onnxruntime")
    (found,) = trainer(callbacks=[ONNXExport()]).test(module, datamodule=data, verbose=False)
    assert 0 <= found["test/accuracy"] <= 1
    assert (tmp_path / "model.onnx").is_file()
    trainer(callbacks=[SubmissionWriter()]).predict(module, datamodule=data)
    with (tmp_path / "SST-2.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [int(row["index"]) for row in rows] == list(range(16))
    assert {row["prediction"] for row in rows} <= {"0", "1"}


def test_the_teacher_must_have_the_students_classes(make, data, trainer, tmp_path):
    teacher = make(num_classes=3)
    weights = tmp_path / "teacher.ckpt"
    torch.save({"state_dict": teacher.state_dict(), "hyper_parameters": dict(teacher.hparams)}, weights)
    with pytest.raises(MisconfigurationException, match="has 3 classes, the student 2"):
        trainer(callbacks=[TextTeacher(weights=weights)]).fit(make(), datamodule=data)


def test_soft_labels_are_learned(make):
    module, batch = make(), {"label": torch.tensor([0]), "probabilities": torch.tensor([[0.25, 0.75]])}
    logits = torch.tensor([[1.0, 2.0]])
    expected = -(batch["probabilities"] * logits.log_softmax(-1)).sum()
    assert module.losses({"logits": logits}, batch)["ce"].item() == pytest.approx(expected.item())


def test_scores_are_a_regression(make, trainer, tmp_path):
    header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    folder = tmp_path / "STS-B"
    folder.mkdir()
    rows = [f"{i}\tm\tf\t1\t1\tn\tn\tgood\tbad kind\t{i % 5}.5" for i in range(8)]
    rows = [row if not row.endswith("4.5") else row.replace("4.5", "4.0") for row in rows]
    (folder / "dev.tsv").write_text("\n".join([header, *rows]) + "\n")
    data = GlueDataModule(root=tmp_path, task="stsb", num_workers=0, max_length=16)
    module = make(num_classes=1)
    (found,) = trainer().validate(module, datamodule=data, verbose=False)
    assert found.keys() == {"val/pearson", "val/spearman"}
    assert "mse" in module.losses({"logits": torch.zeros(2, 1)}, {"label": torch.ones(2)})


def test_matthews_is_sklearns():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for truth, guess in ((generator.integers(2, size=50), generator.integers(2, size=50)), ([1, 0], [1, 1])):
        metric = MatthewsCorrelation()
        metric.update(torch.as_tensor(guess), torch.as_tensor(truth))
        assert metric.compute().item() == pytest.approx(sklearn.matthews_corrcoef(truth, guess), abs=1e-6)


def test_classes_of_data_and_model_must_agree(make, data, trainer):
    with pytest.raises(MisconfigurationException, match=r"2 classes, but model\.num_classes is 3"):
        trainer().validate(make(num_classes=3), datamodule=data)


def test_a_model_that_is_not_there(make):
    module = TextClassifier("nobody/has-this")
    with pytest.raises(MisconfigurationException, match="'nobody/has-this' cannot be loaded"):
        module.load()


@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_the_blocks_of_an_encoder_are_quantized(make, data, trainer, method):
    module, callback = make(), method(bits=4, group_size=8)
    (found,) = trainer(callbacks=[callback]).test(module, datamodule=data, verbose=False)
    assert 0 <= found["test/accuracy"] <= 1
    assert callback.matrices
    layer = module.network.bert.encoder.layer[0].output.dense
    groups = layer.weight.detach().view(-1, 8)
    assert max(len(group.unique()) for group in groups) <= 16


def test_what_cannot_be_quantized_is_said(make, data, trainer):
    module = make("t5", label_words=["bad", "good"])
    with pytest.raises(MisconfigurationException, match="answers with label words: use RTN or GPTQ"):
        trainer(callbacks=[RTN(bits=4, group_size=8)]).test(module, datamodule=data)
    with pytest.raises(MisconfigurationException, match="CBQ does not quantize a TextClassifier that"):
        trainer(callbacks=[CBQ(bits=4, group_size=8)]).test(make(), datamodule=data)


@pytest.mark.parametrize("iob1", [False, True])
def test_entities_count_by_span_and_type_in_both_schemes(iob1):
    """Positions without a word are left out, also inside an entity; IOB1 begins with I- where IOB2 has B-."""
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    begin = 1 if iob1 else 0
    person, place = 1 + begin, 3 + begin
    metric = EntityF1(tags)
    truth = torch.tensor([[person, -100, 2, 0, place], [0, place, -100, 0, 0]])
    guess = torch.tensor([[person, 4, 2, 0, person], [0, place, 3, 3, 0]])
    metric.update(guess, truth)
    assert metric.counts.tolist() == [2, 4, 3]
    assert metric.compute().item() == pytest.approx(4 / 7)
    metric.update(guess, truth)
    assert metric.counts.tolist() == [4, 8, 6]


def test_a_decoder_from_model_args_begins_with_the_padding(language):
    module = TextClassifier(
        "t5", model_args=T5, tokenizer=str(language / "tokenizer"), label_words=["good", "bad"]
    )
    assert module.network.config.decoder_start_token_id == module.tokenizer.pad_token_id
