"""What several test files share: a tiny data set, and a machine without a network."""

import contextlib
import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import mnistlab as ml
import pytest
import torch
from filelock import FileLock
from mnistlab import train
from torch import Tensor


def squares(n: int, seed: int = 0) -> ml.Split:
    """Images of 8x8 noise with one bright quadrant, which is the label: easy, but not trivial."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 160, (n, 1, 8, 8), generator=draw, dtype=torch.uint8)
    rows, columns = labels // 2 * 4, labels % 2 * 4
    for image, row, column in zip(images, rows, columns, strict=True):
        image[0, row : row + 4, column : column + 4] += 60
    return ml.Split(images, labels, (0.35,), (0.2,))


@pytest.fixture(scope="session")
def tiny() -> ml.Dataset:
    """256 images to train, 64 to validate, in 4 classes; no test split, so none can be touched."""
    return ml.Dataset(
        "squares", squares(256), squares(64, seed=1), test=None, classes=tuple("abcd")
    )


@pytest.fixture(scope="session")
def mnist() -> ml.Dataset:
    return ml.load("mnist")


@pytest.fixture
def offline(monkeypatch):
    """Any connection fails, as it does where there is no network."""

    def refuse(*_, **__):
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cut_off():
    """with cut_off(n): a training that is stopped, as by Ctrl-C, when epoch n begins."""

    @contextlib.contextmanager
    def cut_off(n: int):
        epoch = train.Loop.epoch

        def interrupted(self, number, bar):
            if number == n:
                raise KeyboardInterrupt
            return epoch(self, number, bar)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train.Loop, "epoch", interrupted)
            yield

    return cut_off


@pytest.fixture
def random_state_is_kept():
    """The caller's random numbers go on as if the test had not run."""
    before: Tensor = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


# --- the site: built from the stored outputs, and served ----------------------------------------

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",  # the tests may run as root
    "--disable-gpu",
    # Nothing that the browser does on its own account:
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the built pages, made anew: an old build would hide a failure. Workers of one
    run share it."""
    pytest.importorskip("jupyter_book", reason="the site needs the `book` extra")
    pytest.importorskip("onnxscript", reason="the site needs the `playground` extra")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "site"
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ROOT, "-W", "-n"]
    command += ["--keep-going", "--path-output", out]
    with FileLock(shared / "site.lock"):
        if not (said := shared / "site.txt").exists():
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            said.write_text(f"{done.returncode}\n{done.stdout}{done.stderr}")
    status, _, text = said.read_text().partition("\n")
    problems = [line for line in text.splitlines() if re.search("WARNING|ERROR|rror:", line)]
    assert status == "0", "\n".join(problems) or text[-3000:]
    return out / "_build" / "html"


@pytest.fixture(scope="session")
def base(site):
    """The address under which a thread of this process serves the site."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the `test` extra")
    names = [os.environ.get("CHROMIUM"), *BROWSERS]
    path = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}, or set CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def open_page(browser, base):
    """open_page(name, width, scheme): the page, loaded in a fresh profile, and a log of it."""
    contexts = []

    def open_page(name: str, width: int = 1280, scheme: str = "light"):
        size = {"width": width, "height": 800}
        contexts.append(browser.new_context(viewport=size, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(20_000)
        log = SimpleNamespace(requests=[], failures=[], errors=[])

        def answered(response):
            if response.status >= 400:
                log.failures.append(f"{response.url}: {response.status}")

        def said(message):
            if message.type in ("error", "warning"):
                log.errors.append(message.text)

        tab.on("request", lambda request: log.requests.append(request.url))
        tab.on("requestfailed", lambda r: log.failures.append(f"{r.url}: {r.failure}"))
        tab.on("response", answered)
        tab.on("console", said)
        tab.on("pageerror", lambda error: log.errors.append(str(error)))
        tab.goto(base + name, wait_until="networkidle")
        return tab, log

    yield open_page
    for context in contexts:
        context.close()
