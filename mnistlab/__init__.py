"""MNIST Lab: small models, one training loop, honest numbers.

import mnistlab as ml                 # before torchvision: see _torchvision.py

data = ml.load("mnist")
run = ml.fit(ml.build("cnn-8k"), data, ml.Recipe(epochs=1), seed=0)
print(ml.evaluate(run.model, data.val))
"""

import importlib
from importlib.metadata import version

# _torchvision has to come before torchvision.
from . import _torchvision, compress, data, distill, models, train  # noqa: F401
from .data import Augment, DataError, Dataset, Split, load, rotations
from .evaluate import (
    Comparison,
    Difference,
    Report,
    Summary,
    compare,
    difference,
    evaluate,
    wilson,
)
from .models import build
from .runs import Results, recorded, results, trained
from .train import Recipe, Run, fit, predict

__all__ = [
    "Augment",
    "Comparison",
    "DataError",
    "Dataset",
    "Difference",
    "Recipe",
    "Report",
    "Results",
    "Run",
    "Split",
    "Summary",
    "build",
    "compare",
    "compress",
    "difference",
    "distill",
    "evaluate",
    "fit",
    "load",
    "plots",
    "predict",
    "recorded",
    "results",
    "rotations",
    "trained",
    "wilson",
]
__version__ = version("mnistlab")


def __getattr__(name: str):
    """Import `plots` and `widgets` when first asked for: matplotlib and ipywidgets are slow."""
    if name in ("plots", "widgets"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
