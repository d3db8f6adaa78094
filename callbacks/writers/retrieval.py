"""Answers to sentences: the best pictures of a gallery, on a page without other files, and in a table."""

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.run.escaping import cells, printable
from callbacks.writers.drawing import fit_into, open_picture
from lightning_modules.parts.distributed import rows_of_all_ranks

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem;
  color: #222; background: #fafafa }
section { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 1rem 1.2rem;
  margin: 1.2rem 0 }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; font-weight: 500; margin: 0 0 .8rem }
ol { display: flex; flex-wrap: wrap; gap: .8rem; list-style: none; margin: 0; padding: 0 }
li { width: 9rem; font-size: .8rem; overflow-wrap: anywhere }
figure { margin: 0; padding: 4px; border: 2px solid #ccc; border-radius: 6px; text-align: center }
.hit figure { border-color: #2e7d32 } .miss figure { border-color: #c62828 }
img { max-width: 100%; height: 8.5rem; object-fit: contain }
b { font-variant-numeric: tabular-nums }
"""


@dataclass(frozen=True)
class Answer:
    """A query and the pictures that answer it, best first.

    Args:
        query: the sentence.
        paths: of the pictures.
        scores: of the pictures.
        relevant: whether each is right, where that is known.
    """

    query: str
    paths: Sequence[str]
    scores: Sequence[float]
    relevant: Sequence[bool] | None = None


def retrieval_page(answers: Sequence[Answer], thumbnails: Mapping[str, Image.Image], title: str) -> str:
    """An HTML page with everything inside.

    Args:
        answers: in the order of the page.
        thumbnails: pictures by path; one that is missing is named only.
        title: of the page.
    """
    embedded = {path: _data_uri(picture) for path, picture in thumbnails.items()}
    sections = []
    for answer in answers:
        items = []
        for place, (path, score) in enumerate(zip(answer.paths, answer.scores, strict=True)):
            kind = "" if answer.relevant is None else ("hit" if answer.relevant[place] else "miss")
            name = html.escape(printable(Path(path).name))
            shown = f'<img alt="{name}" src="{embedded[path]}">' if path in embedded else "(not readable)"
            word = {"hit": " right", "miss": " wrong", "": ""}[kind]
            items.append(
                f'<li class="{kind}"><figure>{shown}<figcaption><b>{place + 1}. {score:.4f}</b>{word}<br>'
                f"{name}</figcaption></figure></li>"
            )
        sections.append(f"<section><h2>{html.escape(answer.query)}</h2><ol>{''.join(items)}</ol></section>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{html.escape(title)}</h1>{''.join(sections)}"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}"


def _data_uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def write_table(path: Path, answers: Sequence[Answer]) -> None:
    """A CSV file with the columns `query`, `rank`, `score`, `path`, `relevant`."""
    with replaced_atomically(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["query", "rank", "score", "path", "relevant"])
        for answer in answers:
            known: Sequence[bool | str] = answer.relevant or [""] * len(answer.paths)
            rows = zip(answer.scores, answer.paths, known, strict=True)
            for rank, (score, name, right) in enumerate(rows, 1):
                table.writerow(cells([answer.query, rank, f"{score:.6f}", name, right]))


class RetrievalWriter(Callback):
    """Writes `retrieval.html` and `retrieval.csv` after `predict`, of a gallery and of queries.

    The module's `predict_step` gives `features` (B, D) of unit length and `index`; with them `path` for
    pictures of the gallery, `caption` for queries, and `identity` where the truth is known.

    Args:
        top: pictures an answer.
        most_queries: on the page; the table has all.
        thumbnail: height of a picture on the page, pixels.
    """

    def __init__(self, top: int = 10, most_queries: int = 50, thumbnail: int = 160) -> None:
        for name, value in (("top", top), ("most_queries", most_queries), ("thumbnail", thumbnail)):
            if value < 1:
                raise ValueError(f"RetrievalWriter: {name} must be at least 1, got {value}.")
        self.top, self.most_queries, self.thumbnail = top, most_queries, thumbnail
        self._sides: dict[str, list[dict[str, Any]]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew; keep nothing twice."""
        trainer.predict_loop.return_predictions = False
        self._sides = {"path": [], "caption": []}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch.

        Raises:
            MisconfigurationException: it is of neither side.
        """
        side = next((name for name in self._sides if isinstance(outputs, dict) and name in outputs), None)
        if side is None or not {"features", "index"} <= outputs.keys():
            raise MisconfigurationException(
                "RetrievalWriter needs a predict_step that returns `features`, `index`, and `path` of "
                "pictures or `caption` of queries."
            )
        self._sides[side].append(
            {key: value.cpu() if isinstance(value, Tensor) else value for key, value in outputs.items()}
        )

    def _gathered(self, side: str, device: torch.device) -> tuple[Tensor, Tensor | None, list[str]]:
        """Features, identities where they are known, and names, of all ranks, by index."""
        batches = self._sides[side]
        if not batches:
            what = {"path": "gallery", "caption": "queries"}[side]
            raise MisconfigurationException(f"RetrievalWriter: there were no {what} to predict on.")
        index = torch.cat([batch["index"] for batch in batches]).to(device)
        columns = [torch.cat([batch["features"] for batch in batches]).to(device)]
        if "identity" in batches[0]:
            columns.append(torch.cat([batch["identity"] for batch in batches]).to(device))
        index, features, *identity = rows_of_all_ranks(index, *columns)
        names = [dict(zip(batch["index"].tolist(), batch[side], strict=True)) for batch in batches]
        known = {place: name for part in names for place, name in part.items()}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, known)
            known = {place: name for part in parts for place, name in part.items()}
        return features, identity[0] if identity else None, [str(known[place]) for place in index.tolist()]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank, and write on rank 0."""
        device = pl_module.device
        gallery, owners, paths = self._gathered("path", device)
        queries, wanted, captions = self._gathered("caption", device)
        self._sides = {}
        if not trainer.is_global_zero:
            return
        answers = []
        for begin in range(0, len(queries), 256):
            best = (queries[begin : begin + 256] @ gallery.T).topk(min(self.top, len(gallery)), dim=1)
            for row, (scores, places) in enumerate(zip(best.values, best.indices, strict=True), begin):
                known = owners is not None and wanted is not None
                right = (owners[places] == wanted[row]).tolist() if known else None  # type: ignore[index]
                names = [paths[place] for place in places.tolist()]
                answers.append(Answer(captions[row], names, scores.tolist(), right))
        folder = run_directory(trainer)
        write_table(folder / "retrieval.csv", answers)
        shown = answers[: self.most_queries]
        needed = dict.fromkeys(path for answer in shown for path in answer.paths)
        thumbnails = {path: fit_into(open_picture(trainer, path), self.thumbnail) for path in needed}
        title = f"{len(shown)} of {len(answers)} queries on {len(paths)} pictures"
        with replaced_atomically(folder / "retrieval.html") as unfinished:
            unfinished.write_text(retrieval_page(shown, thumbnails, title), encoding="utf-8")
        announce(trainer, f"{len(answers)} queries answered in {folder / 'retrieval.html'} and retrieval.csv")
