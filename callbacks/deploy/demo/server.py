"""The server of the page: pictures stay in memory, nothing is written to disk."""

import base64
import io
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from callbacks.writers.masks import cut_out, overlay_of
from lightning_modules.tinysam.everything import Everything, MaskGenerator
from lightning_modules.tinysam.network import SAM
from lightning_modules.tinysam.predictor import Predictor

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

PICTURES = 4
"""Pictures whose embeddings are kept; the one that was not used for longest goes."""
HOSTS = ("127.0.0.1", "localhost")


class Refusal(Exception):
    """What the page says to the person, with a status of HTTP."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass
class Job:
    """Everything in one picture, as far as it is.

    Attributes:
        done: prompts that are decoded.
        planned: of so many.
        finished: whether `records` are complete.
        milliseconds: that it took.
        error: the sentence it ended with, if it failed.
        records: see `MaskGenerator.generate`, with COCO's run lengths.
        overlay: all masks in colours, as a PNG's address.
    """

    done: int = 0
    planned: int = 0
    finished: bool = False
    milliseconds: int = 0
    error: str | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    overlay: str = ""


@dataclass
class Picture:
    """A picture that was opened.

    Attributes:
        image: uint8 RGB (height, width, 3).
        predictor: holds its embedding.
        mask: the last one that was asked for, bool (height, width).
        job: everything in it, once that was asked for.
    """

    image: NDArray[np.uint8]
    predictor: Predictor
    mask: NDArray[np.bool_] | None = None
    job: Job | None = None


class Demo:
    """What the page asks for, apart from HTTP.

    Args:
        network: in eval mode.
        warning: shown on the page, such as that the weights are random; empty says nothing.
        max_megabytes: largest file.
        max_megapixels: largest picture, decoded.
        everything: how everything mode covers a picture.
    """

    def __init__(
        self,
        network: SAM,
        warning: str = "",
        max_megabytes: float = 20.0,
        max_megapixels: float = 50.0,
        everything: Everything | None = None,
    ) -> None:
        if max_megabytes <= 0 or max_megapixels <= 0:
            raise ValueError("demo: max_megabytes and max_megapixels are above 0.")
        self.network = network.eval()
        self.warning = warning
        self.max_megabytes, self.max_megapixels = max_megabytes, max_megapixels
        self.everything = everything or Everything(output="coco_rle")
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def max_bytes(self) -> int:
        """Of a file."""
        return int(self.max_megabytes * 1e6)

    def too_large(self) -> Refusal:
        """For a file above the limit."""
        return Refusal(
            413, f"The file is larger than the limit of {self.max_megabytes:g} MB; save it smaller."
        )

    def open(self, content: bytes) -> dict[str, Any]:
        """Embed the picture of a file's bytes.

        Raises:
            Refusal: too large, or no picture.
        """
        if len(content) > self.max_bytes:
            raise self.too_large()
        image = self._decoded(content)
        begun = time.perf_counter()
        predictor = Predictor(self.network)
        try:
            predictor.set_image(image)
        except ValueError as error:
            raise Refusal(400, f"The file: {error}") from error
        milliseconds = round(1000 * (time.perf_counter() - begun))
        name = secrets.token_hex(8)
        with self._lock:
            self._pictures[name] = Picture(image, predictor)
            while len(self._pictures) > PICTURES:
                self._pictures.popitem(last=False)
        height, width = image.shape[:2]
        return {"id": name, "width": width, "height": height, "milliseconds": milliseconds}

    def _decoded(self, content: bytes) -> NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(content)) as picture:
                width, height = picture.size
                if width * height > self.max_megapixels * 1e6:
                    raise Refusal(
                        413,
                        f"The picture has {width} x {height} pixels, more than the limit of "
                        f"{self.max_megapixels:g} megapixels; save it smaller.",
                    )
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        except Image.DecompressionBombError as error:
            raise Refusal(413, f"The picture is too large: {error}") from error
        except (OSError, SyntaxError, ValueError) as error:
            raise Refusal(
                415, f"The file is no picture that can be read, or is damaged ({error})."
            ) from error

    def picture(self, name: str) -> Picture:
        """One that is open.

        Raises:
            Refusal: it is not.
        """
        with self._lock:
            if name not in self._pictures:
                raise Refusal(404, "The picture is no longer open; open it again.")
            self._pictures.move_to_end(name)
            return self._pictures[name]

    def segment(self, name: str, prompts: Any) -> dict[str, Any]:
        """The mask of the highest predicted IoU for `points` with `labels`, and `box`.

        Raises:
            Refusal: no such picture or prompt.
        """
        picture = self.picture(name)
        if not isinstance(prompts, dict):
            raise Refusal(400, "prompts are an object with points and labels, or a box.")
        points, labels, box = (prompts.get(key) or None for key in ("points", "labels", "box"))
        if points is None and box is None:
            raise Refusal(400, "prompts: a point or a box is needed.")
        try:
            found = picture.predictor.predict(points, labels, box)
        except (ValueError, TypeError) as error:
            raise Refusal(400, f"prompts: {error}") from error
        picture.mask = found.best
        return {
            "overlay": address(overlay_of([picture.mask])),
            "area": int(picture.mask.sum()),
            "iou": float(found.iou.max()),
        }

    def start_everything(self, name: str) -> dict[str, Any]:
        """Begin everything mode in a thread of its own, unless it runs already."""
        picture = self.picture(name)
        with self._lock:
            running = picture.job is not None and not (picture.job.finished or picture.job.error)
            if not running:
                picture.job = Job()
                threading.Thread(target=self._everything, args=(picture, picture.job), daemon=True).start()
        return self.state(name)

    def state(self, name: str) -> dict[str, Any]:
        """How far everything mode is.

        Raises:
            Refusal: it was not begun, or failed.
        """
        job = self.picture(name).job
        if job is None:
            raise Refusal(404, "Everything was not asked for on this picture.")
        if job.error is not None:
            raise Refusal(400, job.error)
        known = {"done": job.done, "planned": job.planned, "finished": job.finished}
        return {
            **known,
            "count": len(job.records),
            "overlay": job.overlay,
            "milliseconds": job.milliseconds,
        }

    def _everything(self, picture: Picture, job: Job) -> None:
        def progress(done: int, planned: int) -> None:
            job.done, job.planned = done, planned

        begun = time.perf_counter()
        try:
            records = MaskGenerator(self.network, self.everything).generate(picture.image, progress)
            from pycocotools import mask as coco_mask

            masks = [coco_mask.decode(record["segmentation"]).astype(bool) for record in records]
            job.overlay = address(overlay_of(masks, picture.image.shape[:2]))
            job.records = records
            job.milliseconds = round(1000 * (time.perf_counter() - begun))
            job.finished = True
        except Exception as error:  # whatever it is, the page has to hear of it
            job.error = f"Everything mode ended: {error}"

    def file(self, name: str, kind: str) -> tuple[bytes, str]:
        """Content and media type of `picture.png`, `mask.png`, `cutout.png` or `masks.json`.

        Raises:
            Refusal: there is no such thing (yet).
        """
        picture = self.picture(name)
        if kind == "picture.png":
            return png(Image.fromarray(picture.image)), "image/png"
        if kind in ("mask.png", "cutout.png"):
            if picture.mask is None:
                raise Refusal(404, "There is no mask yet: click on an object first.")
            shown = (
                Image.fromarray(picture.mask) if kind == "mask.png" else cut_out(picture.image, picture.mask)
            )
            return png(shown), "image/png"
        if kind == "masks.json" and picture.job is not None and picture.job.finished:
            return json.dumps(picture.job.records).encode(), "application/json"
        raise Refusal(404, f"There is no {kind} of this picture.")


def png(picture: Image.Image) -> bytes:
    """A file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def address(picture: Image.Image) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def application(demo: Demo) -> "FastAPI":
    """The page and what it asks for, over HTTP.

    Other sites cannot reach it: a request has to name this machine as its host, and come from its own page.

    Raises:
        ModuleNotFoundError: the extra `demo` is missing.
    """
    try:
        from fastapi import FastAPI
        from fastapi.responses import HTMLResponse, JSONResponse
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("demo needs fastapi and uvicorn: pip install featherlight[demo]") from error
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refused(request: Any, refusal: Refusal) -> "Response":
        return JSONResponse({"detail": str(refusal)}, refusal.status)

    @app.middleware("http")
    async def guard(request: Any, following: Callable[[Any], Awaitable["Response"]]) -> "Response":
        origin = request.headers.get("origin")
        own = request.url.hostname in HOSTS and origin in (None, f"http://{request.headers.get('host')}")
        if not own:
            return JSONResponse({"detail": "The demo answers its own page on this machine only."}, 403)
        response = await following(request)
        response.headers["Cache-Control"] = "no-store"
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
            "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
        )
        return response

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.get("/about")
    def about() -> dict[str, str]:
        return {"warning": demo.warning}

    _add_pictures(app, demo)
    return app


def _add_pictures(app: "FastAPI", demo: Demo) -> None:
    from fastapi import Request as HttpRequest
    from fastapi import Response as HttpResponse
    from fastapi.concurrency import run_in_threadpool

    async def open_picture(request: "Request") -> Any:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > demo.max_bytes:
                raise demo.too_large()
        return await run_in_threadpool(demo.open, bytes(content))

    async def segment(name: str, request: "Request") -> Any:
        try:
            prompts = json.loads(await request.body())
        except ValueError as error:
            raise Refusal(400, f"prompts are not JSON: {error}") from error
        return await run_in_threadpool(demo.segment, name, prompts)

    for function in (open_picture, segment):
        function.__annotations__["request"] = HttpRequest  # imported here: the extra may be missing
    app.post("/pictures")(open_picture)
    app.post("/pictures/{name}/mask")(segment)
    app.post("/pictures/{name}/everything")(demo.start_everything)
    app.get("/pictures/{name}/everything")(demo.state)

    @app.get("/pictures/{name}/{kind}")
    def file(name: str, kind: str) -> Any:
        content, media = demo.file(name, kind)
        named = {} if kind == "picture.png" else {"Content-Disposition": f'attachment; filename="{kind}"'}
        return HttpResponse(content, media_type=media, headers=named)


def serve(demo: Demo, port: int = 8000) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C.

    Args:
        demo: what it shows.
        port: 0 takes a free one.

    Raises:
        ModuleNotFoundError: the extra `demo` is missing.
        OSError: the port is taken.
    """
    import socket

    app = application(demo)
    import uvicorn

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        except OSError as error:
            raise OSError(
                f"demo: port {port} of 127.0.0.1 cannot be had ({error.strerror}); choose --port."
            ) from error
        print(f"The page is at http://127.0.0.1:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listener])
