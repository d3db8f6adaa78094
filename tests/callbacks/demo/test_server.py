"""What the server answers, and refuses."""

import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from PIL import Image

import featherlight
from callbacks.deploy.demo import Demo, application
from callbacks.deploy.demo.server import PICTURES, Refusal, png
from lightning_modules.tinysam.everything import Everything
from tests.callbacks.demo.discs import DISCS, discs_network, discs_picture

PICTURE = png(Image.fromarray(discs_picture()))


@pytest.fixture(scope="module")
def demo():
    return Demo(discs_network(), max_megabytes=0.2, max_megapixels=0.05)


@pytest.fixture(scope="module")
def server(demo):
    import uvicorn

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(application(demo), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


def ask(address, body=None, **headers):
    """Status and sentence."""
    request = urllib.request.Request(address, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["detail"]


@pytest.mark.parametrize(
    ("content", "status", "sentence"),
    [
        (b"no picture", 415, "no picture that can be read"),
        (PICTURE[: len(PICTURE) // 2], 415, "damaged"),
        (b"x" * 200_001, 413, "limit of 0.2 MB"),
        (png(Image.new("RGB", (300, 300))), 413, "300 x 300 pixels, more than the limit of 0.05 megapixels"),
        (png(Image.new("RGB", (3000, 2))), 400, "no short side left"),
    ],
)
def test_a_file_that_cannot_be_taken_gets_a_sentence(server, content, status, sentence):
    found = ask(f"{server}/pictures", content)
    assert found[0] == status
    assert sentence in found[1]


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ({"points": [[500, 10]], "labels": [1]}, "outside of the picture of 240 x 160"),
        ({"points": [[5, 10]], "labels": [3]}, "labels of points are 1, 0 or -1, not 3"),
        ({"box": [30, 10, 20, 40]}, "x0 <= x1"),
        ({"box": ["a", 1, 2, 3]}, "prompts: "),
        ({}, "a point or a box is needed"),
        ([], "prompts are an object"),
    ],
)
def test_a_prompt_that_cannot_be_taken_gets_a_sentence(demo, prompts, sentence):
    name = demo.open(PICTURE)["id"]
    with pytest.raises(Refusal, match=sentence):
        demo.segment(name, prompts)


def test_only_its_own_page_on_this_machine_reaches_it(server):
    page, about = ask(server), ask(f"{server}/about", Origin=server)
    assert (page[0], about[0]) == (200, 200)
    assert b"http" not in page[1].replace(b"http-equiv", b"")  # nothing from elsewhere
    assert ask(f"{server}/about", Host="rebound.example")[0] == 403
    assert ask(f"{server}/pictures", PICTURE, Origin="http://elsewhere.example")[0] == 403


def test_the_picture_unused_for_longest_is_forgotten(demo):
    names = [demo.open(PICTURE)["id"] for _ in range(PICTURES + 1)]
    with pytest.raises(Refusal, match="open it again"):
        demo.segment(names[0], {"box": [1, 1, 9, 9]})
    demo.picture(names[1])
    with pytest.raises(Refusal, match="no mask yet"):
        demo.file(names[1], "mask.png")


def test_a_cut_out_is_the_masks_part_of_the_picture(demo):
    name = demo.open(PICTURE)["id"]
    x, y, radius = DISCS[0]
    demo.segment(name, {"points": [[x, y]], "labels": [1]})
    cut = Image.open(io.BytesIO(demo.file(name, "cutout.png")[0]))
    assert abs(cut.width - 2 * radius) < 8
    assert cut.getpixel((cut.width // 2, cut.height // 2)) == (200, 40, 40, 255)
    assert cut.getpixel((0, 0))[3] == 0


def test_everything_reports_its_progress_and_its_failure():
    small = Demo(discs_network(), everything=Everything(points_per_side=8, output="coco_rle"))
    name = small.open(PICTURE)["id"]
    small.start_everything(name)
    while not (state := small.state(name))["finished"]:
        time.sleep(0.02)
    assert state["done"] == state["planned"] > 0
    tiny = small.open(png(Image.new("RGB", (40, 4))))["id"]
    small.start_everything(tiny)
    with pytest.raises(Refusal, match="lower points_per_side"):  # noqa: PT012
        while True:
            small.state(tiny)
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--config names no recipe"),
        (["--config", "configs/quickstart.yaml"], "not ImageClassifier"),
        (["--config", "configs/tinysam/quickstart.yaml", "--ckpt_path", "auto"], "no checkpoint in"),
        (["--config", "configs/tinysam/quickstart.yaml", "--ckpt_path", "absent.ckpt"], "absent.ckpt"),
        (["--config", "configs/tinysam/quickstart.yaml", "--max_megabytes", "0"], "above 0"),
    ],
)
def test_the_command_ends_with_a_sentence(arguments, sentence, capfd, tmp_path):
    root = [f"--trainer.default_root_dir={tmp_path}"] if arguments else []
    assert featherlight.main(["demo", *arguments, *root]) == 2
    assert sentence in capfd.readouterr().err


def test_untrained_weights_are_told():
    from featherlight_demo import loaded

    network, warning = loaded(None, ["--config", "configs/tinysam/quickstart.yaml"])
    assert not network.training
    assert "not trained" in warning
