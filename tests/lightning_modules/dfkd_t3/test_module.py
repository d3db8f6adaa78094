"""The alternating module: who gets gradients, what is read, modes, prediction, errors."""

import sys

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import DataFreeTeacher, GeneratedTextWriter
from datamodules import GlueDataModule
from datamodules.samples.sentiment import VOCABULARY, write_tokenizer
from lightning_modules import DataFreeDistillation, GeneratorObjective, Relaxation, Schedule, TextModel
from lightning_modules.dfkd_t3 import Weights, WrittenText
from lightning_modules.dfkd_t3.options import mode_weights
from lightning_modules.dfkd_t3.report import CollapseWatch
from tests.lightning_modules.dfkd_t3.conftest import BERT, T5


def weights_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(network, before):
    return all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.fixture
def ready(distillation, data, teacher, trainer):
    """A module in the middle of a run, with a batch."""

    def make(**options):
        module, datamodule = distillation(**options), data()
        callback, run = DataFreeTeacher(weights=teacher), trainer(callbacks=[])
        run.strategy.connect(module)
        module.trainer = datamodule.trainer = run
        run.datamodule = datamodule
        datamodule.task.tokenizer = module.tokenizer
        datamodule.setup("fit")
        callback.setup(run, module, "fit")
        module.setup("fit")
        module.log_dict = lambda *_, **__: None  # no loop is running that would take it
        batch = next(iter(datamodule.train_dataloader()))
        return module, batch

    return make


@pytest.mark.parametrize("t5", [False, True])
def test_the_generator_learns_through_teacher_and_student_and_leaves_them_alone(ready, t5):
    module, batch = ready(t5=t5)
    module._phase = "generator"
    sum(module.losses(module.compute(batch), batch).values()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.generator.parameters())
    assert all(p.grad is None for p in module.teacher.network.parameters())
    embedding = module.student.get_input_embeddings().weight
    assert embedding.grad is None
    module.zero_grad()
    module._phase = "student"
    sum(module.losses(module.compute(batch), batch).values()).backward()
    assert all(p.grad is None for p in module.generator.parameters())
    assert embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("t5", [False, True])
def test_the_students_step_takes_no_path_of_gradients(ready, monkeypatch, t5):
    """Its text is hard ids, written without a graph: no relaxed token, no noise with one, no bridge."""
    module, batch = ready(t5=t5)

    def refuse(*_, **__):
        raise AssertionError("the student's step asked for a gradient through text")

    monkeypatch.setattr("lightning_modules.dfkd_t3.bridge.Relaxation.relax", refuse)
    monkeypatch.setattr("lightning_modules.dfkd_t3.bridge.embed_and_pass", refuse)
    module._phase = "student"
    outputs = module.compute(batch)
    assert outputs["text"].probabilities is None
    assert outputs["text"].logits is None
    assert not outputs["teacher"].requires_grad
    assert outputs["student"].requires_grad


@pytest.mark.parametrize("weights", ["specificity", "adversarial", "token", "balance", "content"])
def test_each_term_alone_reaches_the_generator(ready, weights):
    chosen = Weights(**dict.fromkeys(("specificity", "balance", "adversarial", "token", "content"), 0.0))
    objective = GeneratorObjective(weights=Weights(**{**vars(chosen), weights: 1.0}))
    module, batch = ready(objective=objective)
    module._phase = "generator"
    (term,) = module.losses(module.compute(batch), batch).values()
    term.backward()
    assert sum(p.grad.abs().sum() for p in module.generator.parameters() if p.grad is not None) > 0


def test_hard_text_is_read_alike_as_ids_and_through_the_bridge(ready):
    module, batch = ready()
    source = WrittenText(batch["input_ids"], batch["mask"])
    text = module.writer.write(source, 1.0)
    module.teacher.prefix = [*module.teacher.prefix, 12, 57]  # a prompt
    with torch.no_grad():
        soft = module.teacher(text)
        hard = module.teacher(WrittenText(text.ids, text.mask))
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=1e-5)


def test_nothing_behind_the_end_changes_a_logit(ready):
    module, batch = ready(t5=True)
    text = module.writer.write(WrittenText(batch["input_ids"], batch["mask"]), 1.0)
    text.mask[:, 3:] = False
    other = WrittenText(text.ids.clone(), text.mask, text.probabilities)
    other.ids[:, 3:] = 77
    with torch.no_grad():
        assert torch.equal(module.teacher(text), module.teacher(other))


def test_token_after_token_is_what_one_pass_gives(ready):
    """The key-value cache, with a gradient, against teacher forcing on what was written."""
    module, batch = ready(t5=True)
    module.generator.eval()
    source = WrittenText(batch["input_ids"], batch["mask"])
    text = module.writer.write(source, 1.0)
    reference = module.writer.reference_logits(module.generator, source, text)
    valid = text.mask
    torch.testing.assert_close(text.logits[valid], reference[valid], atol=1e-4, rtol=1e-4)
    assert text.logits.requires_grad


def test_special_tokens_are_never_written(ready):
    module, batch = ready(t5=True)
    text = module.writer.sample(WrittenText(batch["input_ids"], batch["mask"]), 5.0)
    written = set(text.ids[text.mask].tolist())
    assert written <= {1, *range(10, len(VOCABULARY))}


def test_the_first_generator_anchors_the_content(ready):
    module, batch = ready(t5=True)
    module.eval()
    module._phase = "generator"
    outputs = module.compute(batch)
    assert module.losses(outputs, batch)["generator/content"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "mode", ["t3", "zskt", "dafl_text", "random_text", "general_corpus", "original_data", "as_dfd"]
)
def test_every_mode_trains_the_student(distillation, data, fitted, mode):
    module = distillation(mode=mode)
    module.load()
    before = weights_of(module.student)
    run = fitted(module, data(train_on="task" if mode == "original_data" else "corpus"))
    assert module.steps_done == 3
    assert not same(module.student, before)
    assert run.logged_metrics["train/student/kd"].isfinite()
    assert ("generator" in module._modules) == (mode in ("t3", "zskt", "dafl_text"))


def test_a_general_corpus_is_plain_distillation(distillation, data, fitted, teacher):
    """Step for step what KD on the corpus's own batches gives."""
    module, losses = distillation(mode="general_corpus", schedule=Schedule(steps=2)), []
    module.load()
    plain = distillation(mode="general_corpus")
    plain.load()
    plain.student.load_state_dict(module.student.state_dict())
    step = DataFreeDistillation.losses

    def record(self, outputs, batch):
        terms = step(self, outputs, batch)
        losses.append((batch["input_ids"], terms["student/kd"].item(), outputs["student"].detach()))
        return terms

    module.losses = record.__get__(module)
    fitted(module, data())
    callback = DataFreeTeacher(weights=teacher)
    network, _, _ = callback.built("sequence", 2)
    network.eval()
    ids, found, student = losses[0]
    prefix = torch.full((len(ids), 1), 3)
    whole = torch.cat([prefix, ids], 1)
    with torch.no_grad():
        p = network(whole, (whole != 0).long()).logits.softmax(-1)
    expected = (p * (p.log() - student.log_softmax(-1))).sum(-1).mean()
    assert found == pytest.approx(expected.item(), rel=1e-5)


OPENED: list[str] = []
WATCHING = [False]


def _audit(event, arguments):
    if WATCHING[0] and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(_audit)


@pytest.mark.parametrize("train_on", ["corpus", "task"])
def test_the_tasks_training_file_is_never_opened(distillation, data, fitted, train_on):
    OPENED.clear()
    module = distillation(mode="original_data" if train_on == "task" else "t3", schedule=Schedule(steps=1))
    WATCHING[0] = True
    try:
        fitted(module, data(train_on=train_on), limit_val_batches=1)
    finally:
        WATCHING[0] = False
    assert any(name.endswith("dev.tsv") for name in OPENED)
    assert any(name.endswith("train.tsv") for name in OPENED) == (train_on == "task")


def test_what_is_written_trains_another_model(distillation, data, trainer, teacher, tmp_path, language):
    module = distillation(objective=GeneratorObjective(spec="label"))
    run = trainer(callbacks=[DataFreeTeacher(weights=teacher), GeneratedTextWriter(samples=2)])
    run.predict(module, datamodule=data(max_sentences=20))
    lines = (tmp_path / "generated.tsv").read_text().splitlines()
    assert lines[0] == "sentence\tlabel\tp_0\tp_1"
    assert len(lines) == 21
    sentence, label, *p = lines[1].split("\t")
    assert set(sentence.split()) <= set(VOCABULARY)
    assert int(label) == max(range(2), key=lambda i: float(p[i]))
    assert "positive" in (tmp_path / "samples.txt").read_text() + "positive"
    other = GlueDataModule(root=language, generated=tmp_path / "generated.tsv", batch_size=4, num_workers=0)
    other.tokenizer = module.tokenizer
    other.setup("fit")
    batch = next(iter(other.train_dataloader()))
    assert batch["probabilities"].sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)


def test_entities_are_distilled_token_by_token(distillation, data, language, trainer, teacher, tmp_path):
    from datamodules import CorpusToTask, EntityDataModule
    from lightning_modules import TextClassifier

    (tmp_path / "eng.testa").write_text("glad NNP I-NP I-PER\nbad NN I-NP O\n\n")
    tagger = TextClassifier("bert", 9, BERT, str(language / "tokenizer"), "tokens")
    weights = tmp_path / "tagger.ckpt"
    torch.save({"state_dict": tagger.state_dict(), "hyper_parameters": dict(tagger.hparams)}, weights)
    task = EntityDataModule(root=tmp_path, num_workers=0, max_length=16)
    corpus = CorpusToTask(task=task, root=language, batch_size=8, num_workers=0, length=12)
    module = distillation(num_classes=9, task="tokens", schedule=Schedule(steps=2))
    run = trainer(max_epochs=-1, callbacks=[DataFreeTeacher(weights=weights)])
    run.fit(module, datamodule=corpus)
    assert {"train/generator/balance", "val/entity_f1"} <= run.logged_metrics.keys()


def test_collapse_is_announced(recwarn):
    watch, text = CollapseWatch(), WrittenText(torch.ones(10, 3, dtype=torch.int64), torch.ones(10, 3).bool())
    for _ in range(100):
        watch.see(text, 0.25)
    messages = [str(warning.message) for warning in recwarn]
    assert any("objective.weights.token=0.25" in message for message in messages)


def test_weights_of_the_baselines():
    assert mode_weights("zskt", Weights()) == Weights(0, 0, 1, 0, 0, 0.1)
    assert mode_weights("dafl_text", Weights()) == Weights(1, 1, 0, 0, 0, 0.1)


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Weights(token=-1.0), "objective.weights.token"),
        (lambda: mode_weights("t3", Weights(0, 0, 0, 0, 0, 0)), "all 0"),
        (lambda: Schedule(rho=1.0), "schedule.rho"),
        (lambda: Schedule(rho=0.6, replay_share=0.4), "rho \\+ replay_share"),
        (lambda: Schedule(steps=2, warm_start=2), "warm_start"),
        (lambda: DataFreeDistillation(TextModel("bert", BERT), None, "bytes"), "needs a `generator`"),
        (
            lambda: DataFreeDistillation(TextModel("bert", BERT), TextModel("t5", T5), "bytes", length=0),
            "length",
        ),
    ],
)
def test_bad_options(make, message):
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        make()


def test_the_data_must_be_of_the_mode(distillation, data, fitted):
    with pytest.raises(MisconfigurationException, match=r"t3 trains on the corpus's text.*train_on is task"):
        fitted(distillation(), data(train_on="task"))
    with pytest.raises(MisconfigurationException, match="original_data trains on the task's text"):
        fitted(distillation(mode="original_data"), data())


def test_a_run_without_a_teacher_is_refused(distillation, data, fitted):
    with pytest.raises(MisconfigurationException, match="add a DataFreeTeacher"):
        fitted(distillation(), data(), callbacks=[])


def test_other_vocabularies_are_refused(distillation, data, fitted, language, tmp_path):
    other = [*VOCABULARY[:-2], VOCABULARY[-1], VOCABULARY[-2]]
    write_tokenizer(tmp_path / "other", other)
    with pytest.raises(MisconfigurationException, match=r"The teacher's tokenizer is not the student's: 'ta"):
        fitted(distillation(tokenizer=str(tmp_path / "other")), data())
    generator = TextModel("bert", {**BERT, "vocab_size": 400})
    module = DataFreeDistillation(
        TextModel("bert", BERT),
        generator,
        str(language / "tokenizer"),
        relaxation=Relaxation(decoding="parallel"),
    )
    with pytest.raises(MisconfigurationException, match="generator has a vocabulary of 400 tokens"):
        module.load()


def test_a_masked_language_model_cannot_write_token_after_token(distillation, data, fitted):
    with pytest.raises(MisconfigurationException, match="set parallel"):
        fitted(distillation(relaxation=Relaxation()), data())
