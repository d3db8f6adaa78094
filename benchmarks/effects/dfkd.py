"""What a student learns without the task's text, by where its text comes from; on GLUE, several seeds.

    python benchmarks/effects/dfkd.py --glue glue --task sst2 --corpus wikitext2/valid.txt [--seeds 0 1 2]

Teacher and students are small BERTs over the most frequent words of corpus and task, trained from scratch, so
that nothing is downloaded; the general corpus is real text. All students take the same number of steps. A
student of another family (DistilBERT) is then trained on the corpus that the generator wrote. `--glue` alone
missing: the procedural language of the quick start. `--body` names a folder with a pretrained encoder: the
teacher is fine-tuned from it, and all read its tokens.
"""

import argparse
import logging
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import spread, table
from lightning.pytorch import Trainer, seed_everything

from callbacks import DataFreeTeacher, GeneratedTextWriter
from datamodules import CorpusToTask, GlueDataModule
from datamodules.samples.sentiment import SPECIAL, write_sentiment, write_tokenizer
from datamodules.text.corpora import read_documents
from lightning_modules import (
    DataFreeDistillation,
    GeneratorObjective,
    Relaxation,
    Schedule,
    TextClassifier,
    TextModel,
)
from lightning_modules.dfkd_t3 import Weights

MODES = ("original_data", "general_corpus", "random_text", "t3", "t3 without token diversity")


def bert(width: int, layers: int, length: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": length + 8,
    }


class Experiment:
    """The data, the tokenizer and the teacher that all students share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.root, self.corpus, self.corpus_root = options.glue, options.corpus, Path.cwd()
        if options.glue is None:
            self.root = self.corpus_root = folder / "sample"
            self.corpus = "corpus.txt"
            write_sentiment(self.root)
            self.tokenizer = str(self.root / "tokenizer")
        else:
            self.tokenizer = str(options.body or folder / "tokenizer")
            if options.body is None:
                self._learn_vocabulary()
        self.teacher = folder / "teacher.ckpt"

    def _learn_vocabulary(self) -> None:
        """The most frequent words of the corpus, and of the task, which the teacher's tokenizer knows."""
        task = GlueDataModule(root=self.root, task=self.options.task)
        task.read("train")
        counts = Counter(w for e in task.datasets["train"].examples for w in e.sentences[0].split())
        for passage in read_documents(self.corpus_root, str(self.corpus), document="line"):
            counts.update(passage.split())
        words = [word for word, _ in counts.most_common(self.options.vocabulary) if word not in SPECIAL]
        write_tokenizer(Path(self.tokenizer), [*SPECIAL, *words])

    def task(self, **options: Any) -> GlueDataModule:
        length = self.options.length
        return GlueDataModule(
            root=self.root,
            task=self.options.task,
            max_length=length + 1,
            batch_size=32,
            eval_batch_size=256,
            num_workers=0,
            **options,
        )

    def trainer(self, **options: Any) -> Trainer:
        quiet = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        return Trainer(accelerator="cpu", devices=1, default_root_dir=self.folder, **{**quiet, **options})

    def classifier(
        self, model: str, arguments: dict[str, Any] | None, steps: int, rate: float = 1e-3, **data: Any
    ) -> tuple[Any, float]:
        module = TextClassifier(
            model,
            model_args=arguments,
            tokenizer=self.tokenizer,
            optimizer=partial(torch.optim.AdamW, lr=rate),
        )
        task = self.task(**data)
        self.trainer(max_steps=steps, limit_val_batches=0, max_epochs=-1).fit(module, datamodule=task)
        return module, self.measured(module, task)

    def measured(self, module: Any, data: Any) -> float:
        (found,) = self.trainer().validate(module, datamodule=data, verbose=False)
        return next(value for name, value in found.items() if name.startswith("val/"))

    def train_teacher(self) -> float:
        seed_everything(1, verbose=False)
        if self.options.body is not None:
            module, score = self.classifier(
                str(self.options.body), None, self.options.teacher_steps, self.options.body_rate
            )
        else:
            arguments = bert(64, 2, self.options.length)
            module, score = self.classifier("bert", arguments, self.options.teacher_steps)
        state = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        torch.save(state, self.teacher)
        return score

    def student(self, mode: str, seed: int) -> dict[str, float]:
        """Score of one student, what its text was like, and the score of another family's student on it."""
        seed_everything(seed, verbose=False)
        options, generated = self.options, mode.startswith("t3")
        weights = Weights() if mode == "t3" else Weights(token=0, content=0.03)
        copying = options.copy_steps if generated else 0
        module = DataFreeDistillation(
            TextModel("bert", bert(32, 1, options.length)),
            TextModel("bert", bert(48, 2, options.length)),
            tokenizer=self.tokenizer,
            mode="t3" if generated else mode,  # type: ignore[arg-type]
            relaxation=Relaxation(decoding="parallel"),
            objective=GeneratorObjective(weights=weights),
            schedule=Schedule(steps=options.steps + copying, warm_start=copying, warm_start_lr=1e-3),
            length=options.length,
            generator_lr=2e-3,
            student_lr=2e-3,
        )
        data = CorpusToTask(
            task=self.task(),
            root=self.corpus_root,
            corpus=str(self.corpus),
            length=options.length,
            batch_size=32,
            eval_batch_size=256,
            num_workers=0,
            max_sentences=options.sentences,
            train_on="task" if mode == "original_data" else "corpus",
        )
        teacher = DataFreeTeacher(weights=self.teacher)
        run = self.trainer(max_epochs=-1, limit_val_batches=0, callbacks=[teacher], log_every_n_steps=10)
        run.fit(module, datamodule=data)
        values = {k[10:]: float(v) for k, v in run.logged_metrics.items() if k.startswith("generator/")}
        values["score"] = self.measured(module, data)
        if mode == "t3":
            writer = GeneratedTextWriter(samples=3)
            self.trainer(callbacks=[teacher, writer]).predict(module, datamodule=data)
            print((self.folder / "samples.txt").read_text(), flush=True)
            sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}
            sizes["max_position_embeddings"] = options.length + 8
            generated_file = self.folder / "generated.tsv"
            values["other"] = self.classifier("distilbert", sizes, options.steps, generated=generated_file)[1]
        return values


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", type=Path, help="folder with SST-2 and CoLA; none: a procedural language")
    parser.add_argument("--task", default="sst2", choices=["sst2", "cola"])
    parser.add_argument("--corpus", type=Path, help="general text, a passage a line")
    parser.add_argument("--body", type=Path, help="folder of a pretrained encoder, the teacher's body")
    parser.add_argument("--body-rate", type=float, default=1e-4, help="rate of its fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--steps", type=int, default=250, help="of each student")
    parser.add_argument("--copy-steps", type=int, default=300, help="of the generator, before")
    parser.add_argument("--teacher-steps", type=int, default=375)
    parser.add_argument("--length", type=int, default=12, help="most tokens of a sentence")
    parser.add_argument("--vocabulary", type=int, default=2000, help="words")
    parser.add_argument("--sentences", type=int, default=8000, help="of the general corpus")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        experiment = Experiment(options, Path(name))
        print(f"teacher: {100 * experiment.train_teacher():.1f}", flush=True)
        rows = []
        for mode in options.modes:
            found = [experiment.student(mode, seed) for seed in options.seeds]
            columns = ("score", "confidence", "class_entropy", "changed", "distinct_1", "distinct_2", "other")
            cells = [
                spread([run[column] for run in found], 100 if column in ("score", "other") else 1)
                if column in found[0]
                else ""
                for column in columns
            ]
            rows.append([mode, *cells])
            print(" | ".join(rows[-1]), flush=True)
    heads = [
        "student's text",
        "score, %",
        "confidence",
        "class entropy",
        "changed",
        "distinct-1",
        "distinct-2",
    ]
    print(table([*heads, "other student, %"], rows))


if __name__ == "__main__":
    main()
