"""The playground's files: models by `mnistlab export`, onnxruntime-web by npm, sample digits.

They are made in the cache of data sets, so that only a change of weights, code or version costs
time again, and copied into the site. The page's own scripts lie in book/site/playground.
"""

import base64
import hashlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import mnistlab as ml
import npm
import torch
from filelock import FileLock
from mnistlab.data import data_root
from mnistlab.export import export
from mnistlab.train import write_atomically
from sphinx.application import Sphinx

PAGE = "book/playground"
VERSION = "1.30.0"  # of onnxruntime-web
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
WASM = "ort-wasm-simd-threaded.wasm"
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", WASM)
HARD = 12  # how many of the hard digits, and how many of one label at most
OF_ONE = 2


def choose(names: list[str]) -> list[dict[str, Any]]:
    """Sample digits, of the validation images: never of the test images, which choose nothing.

    Of each class the image that the least sure model is surest of; and those that most models
    get wrong, with the lowest mean probability of the label.
    """
    val = ml.load("mnist").val
    reports = [ml.evaluate(ml.trained(name), val) for name in names]
    sure = torch.stack([r.log_probs.gather(1, val.labels[:, None])[:, 0] for r in reports])
    wrong = torch.stack([~r.right for r in reports]).sum(0)
    clear = [
        max((val.labels == digit).nonzero()[:, 0].tolist(), key=sure.min(0).values.__getitem__)
        for digit in range(10)
    ]
    hard: list[int] = []
    ranked = sorted(range(len(val)), key=lambda i: (-wrong[i].item(), sure[:, i].mean().item()))
    for i in ranked:
        if sum(val.labels[j] == val.labels[i] for j in hard) < OF_ONE and len(hard) < HARD:
            hard.append(i)
    return [
        {
            "kind": kind,
            "label": val.labels[i].item(),
            "wrong": wrong[i].item(),
            "of": len(names),
            "pixels": base64.b64encode(val.images[i].numpy().tobytes()).decode(),
        }
        for kind, chosen in (("clear", clear), ("hard", hard))
        for i in chosen
    ]


def make(app: Sphinx) -> None:
    """The files, for a build of pages."""
    if app.builder.format != "html":
        return
    cache = data_root() / "playground"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):  # two builds at a time: the second finds all made
        fill(cache, Path(app.outdir, "playground"))


def fill(cache: Path, site: Path) -> None:
    """Make what the cache lacks, and copy what the page needs."""
    runtime = cache / f"onnxruntime-web-{VERSION}"
    files = [f"dist/{name}" for name in RUNTIME]
    npm.fetch("onnxruntime-web", VERSION, SHA512, files, runtime)
    rows = export(out=cache / "models")
    key = hashlib.sha256("".join(row["source"] for row in rows).encode())
    key.update(inspect.getsource(choose).encode())
    samples = cache / f"samples-{key.hexdigest()[:16]}.json"
    if not samples.exists():
        write_atomically(samples, json.dumps(choose([row["name"] for row in rows])).encode())
    page = {
        "runtime": {"version": VERSION, "wasm": WASM, "bytes": (runtime / WASM).stat().st_size},
        "samples": json.loads(samples.read_text()),
    }
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(runtime, site / "ort")
    for row in rows:
        write_atomically(
            site / "models" / row["file"], (cache / "models" / row["file"]).read_bytes()
        )
    write_atomically(site / "models.json", json.dumps(rows).encode())
    write_atomically(site / "page.json", json.dumps(page).encode())


def add_scripts(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Give its own page, and no other, its script and its style."""
    if page == PAGE:
        app.add_css_file("../playground/playground.css")
        app.add_js_file("../playground/page.mjs", type="module")


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.connect("builder-inited", make)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
