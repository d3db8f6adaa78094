"""Answers to sentences: the best pictures of a gallery, on a page without other files, and in a table."""

import base64
import csv
import html
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

from callbacks.run.directory import announce, replaced_atomically, run_directory
from callbacks.run.escaping import cells, printable
from callbacks.writers.base import PredictionWriter
from callbacks.writers.drawing import fit_into, open_picture
from lightning_modules.parts.contracts import HasIndexedGallery, datamodule_of, optional
from lightning_modules.parts.retrieval import best_matches

SIDES = ("path", "caption")
"""What a row of the gallery has, and one of the queries."""
QUERIES_AT_ONCE = 256
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


@dataclass
class _Gallery:
    """What is searched: names, identities where they are known, and the vectors by chunks."""

    paths: Sequence[str]
    identities: Sequence[int] | None
    chunks: Callable[[], Iterable[tuple[Tensor, Tensor]]]


class RetrievalWriter(PredictionWriter):
    """Writes `retrieval.html` and `retrieval.csv` after `predict`, of a gallery and of queries.

    The module's `predict_step` gives `features` (B, D) of unit length and `index`; with them `path` for
    pictures of the gallery, `caption` for queries, and `identity` where the truth is known. A gallery that
    the data module has an index of is read from there.

    Args:
        top: pictures an answer.
        most_queries: on the page; the table has all.
        thumbnail: height of a picture on the page, pixels.
    """

    def __init__(self, top: int = 10, most_queries: int = 50, thumbnail: int = 160) -> None:
        super().__init__()
        for name, value in (("top", top), ("most_queries", most_queries), ("thumbnail", thumbnail)):
            if value < 1:
                raise ValueError(f"RetrievalWriter: {name} must be at least 1, got {value}.")
        self.top, self.most_queries, self.thumbnail = top, most_queries, thumbnail

    def rows(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any
    ) -> Iterator[dict[str, Any]]:
        """One row a picture or sentence, with its vector.

        Raises:
            MisconfigurationException: the batch is of neither side.
        """
        kind = next((name for name in SIDES if isinstance(outputs, dict) and name in outputs), None)
        if kind is None or not {"features", "index"} <= outputs.keys():
            raise MisconfigurationException(
                "RetrievalWriter needs a predict_step that returns `features`, `index`, and `path` of "
                "pictures or `caption` of queries."
            )
        vectors = outputs["features"].float().cpu().numpy()
        known = outputs["identity"].tolist() if "identity" in outputs else [None] * len(vectors)
        columns = (outputs["index"].tolist(), vectors, outputs[kind], known)
        for index, vector, name, identity in zip(*columns, strict=True):
            packed = base64.b64encode(vector.tobytes()).decode()
            yield {"index": index, "side": kind, "name": str(name), "identity": identity, "vector": packed}

    def write(self, trainer: Trainer, module: LightningModule, rows: Iterator[dict[str, Any]]) -> None:
        """Rank, and write page and table.

        Raises:
            MisconfigurationException: there was no gallery, or there were no queries.
        """
        sides: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for row in rows:
            vector = torch.frombuffer(bytearray(base64.b64decode(row["vector"])), dtype=torch.float32)
            sides[row["side"]].append({**row, "vector": vector})
        data = optional(datamodule_of(trainer), HasIndexedGallery)
        gallery = (data and data.indexed_gallery()) or _collected(sides["path"])
        if not sides["caption"] or not gallery.paths:
            what = "queries" if gallery.paths else "gallery"
            raise MisconfigurationException(f"RetrievalWriter: there were no {what} to predict on.")
        answers = self._answers(sides["caption"], gallery)
        folder = run_directory(trainer)
        write_table(folder / "retrieval.csv", answers)
        shown = answers[: self.most_queries]
        needed = dict.fromkeys(path for answer in shown for path in answer.paths)
        thumbnails = {path: fit_into(open_picture(trainer, path), self.thumbnail) for path in needed}
        title = f"{len(shown)} of {len(answers)} queries on {len(gallery.paths)} pictures"
        with replaced_atomically(folder / "retrieval.html") as unfinished:
            unfinished.write_text(retrieval_page(shown, thumbnails, title), encoding="utf-8")
        announce(trainer, f"{len(answers)} queries answered in {folder / 'retrieval.html'} and retrieval.csv")

    def _answers(self, queries: Sequence[Mapping[str, Any]], gallery: _Gallery) -> list[Answer]:
        """Those to all queries, some at a time."""
        answers = []
        for begin in range(0, len(queries), QUERIES_AT_ONCE):
            some = queries[begin : begin + QUERIES_AT_ONCE]
            vectors = torch.stack([query["vector"] for query in some])
            found = best_matches(vectors, gallery.chunks(), self.top)
            for query, scores, places in zip(some, *(part.tolist() for part in found), strict=True):
                owners, wanted = gallery.identities, query["identity"]
                right = None
                if owners is not None and wanted is not None:
                    right = [owners[place] == wanted for place in places]
                paths = [gallery.paths[place] for place in places]
                answers.append(Answer(query["name"], paths, scores, right))
        return answers


def _collected(rows: Sequence[Mapping[str, Any]]) -> _Gallery:
    """The gallery that was predicted on."""
    known = bool(rows) and rows[0]["identity"] is not None
    vectors = torch.stack([row["vector"] for row in rows]) if rows else torch.empty(0)
    identities = [row["identity"] for row in rows] if known else None
    return _Gallery(
        [row["name"] for row in rows], identities, lambda: [(torch.arange(len(vectors)), vectors)]
    )
