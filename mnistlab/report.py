"""All that is recorded of a recipe, as one HTML page that needs nothing beside it."""

import base64
import csv
import io
from pathlib import Path
from types import SimpleNamespace

import jinja2
import matplotlib.pyplot as plt
from torch import Tensor

from . import plots, runs
from .data import ASSETS, load
from .evaluate import Report
from .recipes import find

ALT = {
    "curves": "Loss against epochs, a colour for each seed: validation solid, training dashed.",
    "confusion": "Counts of each digit (row) taken for each class (column); the colours show the "
    "mistakes alone.",
    "mistakes": "The most confident mistakes: label, arrow, prediction, confidence.",
    "samples": "The first test images: prediction and confidence.",
}


def report(name: str, folder: Path = runs.RESULTS) -> str:
    """The page of a recipe: settings, curves and their CSV; and, where the weights of seed 0 are
    kept, confusion, mistakes and sample predictions on the test images.

    Raises:
        ValueError: no records, or they are stale.
    """
    known = runs.results(name, folder)
    first = known.records[0]
    histories = {
        f"seed {record['seed']}": SimpleNamespace(history=record["history"])
        for record in known.records
    }
    with plt.rc_context():
        plots.style()
        figures = {"curves": _png(plots.curves(histories))}
        tested = None
        if "weights" in first:
            recipe = find(name)
            data = load(recipe.data, resplit=0 if recipe.resplit else None)
            tested = runs.tested(runs.trained(name, folder=folder), data.test, recipe)
            figures["confusion"] = _png(plots.confusion(tested, data.classes))
            figures["mistakes"] = _png(plots.mistakes(tested, data.test))
            figures["samples"] = _png(_samples(tested, data.test.images))
    template = (ASSETS / "report.html").read_text("utf-8")
    return jinja2.Template(template, autoescape=True, undefined=jinja2.StrictUndefined).render(
        name=name,
        headline=f"{known}." if known.n > 1 else f"{100 * known.mean:.2f}%.",
        n=known.n,
        command=known.command,
        diverged=known.diverged,
        params=known.params,
        macs=known.macs,
        runs=[_row(record) for record in known.records],
        figures=figures,
        alt=ALT,
        csv=_uri("text/csv", _csv(known).encode()),
        report=tested and str(tested),
        settings={key: value for key, value in first["recipe"].items() if value not in ({}, [])},
        conditions={key: first[key] for key in ("device", "threads", "machine", "versions")}
        | {"commits": ", ".join(sorted({str(record["commit"]) for record in known.records}))},
    )


def _row(record: runs.Record) -> dict[str, str]:
    return {
        "seed": str(record["seed"]),
        "validation, %": f"{100 * record['val']['correct'] / record['val']['n']:.2f}",
        "test, %": f"{100 * record['test']['correct'] / record['test']['n']:.2f}",
        "test loss": f"{record['test']['loss']:.4f}",
        "seconds": f"{record['seconds']:.0f}",
        "images/s": f"{record['images_per_second']:,.0f}",
        "date": record["date"][:10],
    }


def _samples(tested: Report, images: Tensor, n: int = 20) -> plt.Axes:
    titles = [f"{tested.predictions[i]} {100 * tested.confidence[i]:.0f}%" for i in range(n)]
    return plots.digits(images[:n], titles, columns=10)


def _csv(known: runs.Results) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["seed", *known.records[0]["history"][0]], lineterminator="\n")
    writer.writeheader()
    for record in known.records:
        writer.writerows({"seed": record["seed"]} | row for row in record["history"])
    return text.getvalue()


def _png(axes: plt.Axes) -> str:
    """The figure of these axes as a data URI; the figure is closed."""
    buffer = io.BytesIO()
    axes.figure.savefig(buffer, format="png", dpi=130)
    plt.close(axes.figure)
    return _uri("image/png", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
