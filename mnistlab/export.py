"""Shipped models as ONNX files, for the book's playground and for whatever else runs them."""

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import recipes, runs
from .data import SOURCES
from .models import PRESETS
from .models.capsules import CapsuleNet
from .models.steps import StepCNN
from .models.vit import ViT, attention_maps, rollout
from .train import write_atomically

LARGEST = 250_000  # parameters: a page loads all its models at once, on a phone too
FEATURES = nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm
ACTIVATIONS = nn.ReLU | nn.SiLU | nn.GELU


class Exported(nn.Module):
    """A model that takes pixels and tells more than its logits.

    Input: pixels in 0..1, float32 [N, 1, 28, 28]; normalised here, as MNIST is for training.
    Output: logits [N, 10], then what `extras` names, where the model has it:

    maps: [N, C, H, W], what leaves the first convolution, its norm and its activation.
    attention: [N, P, P], how much of each patch the read-out sees (see `attended`).
    reconstruction: [N, 28, 28], pixels in 0..1, what the decoder draws of the winning capsule.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.eval()
        self.stem = stem(model)
        mnist = SOURCES["mnist"]
        self.mean, self.std = mnist.mean[0], mnist.std[0]
        self.extras: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        if self.stem is not None:
            self.extras["maps"] = lambda images, _: self.stem(images)
        if isinstance(model, ViT):
            self.extras["attention"] = lambda images, _: attended(model, images)
        if isinstance(model, CapsuleNet) and model.decoder is not None:
            self.extras["reconstruction"] = self.redraw

    def redraw(self, images: Tensor, logits: Tensor) -> Tensor:
        """What the decoder makes of the pose of the most probable class alone."""
        winner = nn.functional.one_hot(logits.argmax(1), logits.shape[1]).to(images.dtype)
        drawn = self.model.decoder((self.model.poses(images) * winner[..., None]).flatten(1))
        return (drawn.view(-1, *images.shape[2:]) * self.std + self.mean).clamp(0, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        images = (pixels - self.mean) / self.std
        logits = self.model(images)
        # What these compute a second time, the runtime shares with the model.
        return (logits, *(extra(images, logits) for extra in self.extras.values()))


def stem(model: nn.Module) -> nn.Sequential | None:
    """The layers up to the first activation, of a net that begins with a convolution; else None."""
    layers = []
    for layer in getattr(model, "trunk", model).modules():
        if isinstance(layer, nn.Sequential):
            continue
        layers.append(layer)
        if isinstance(layer, ACTIVATIONS):
            return nn.Sequential(*layers) if isinstance(layers[0], nn.Conv2d) else None
        if not isinstance(layer, FEATURES):
            return None
    return None


def attended(model: ViT, images: Tensor) -> Tensor:
    """How much of each patch the read-out sees, by attention rollout: [N, C, H, W] -> [N, P, P],
    adding up to 1. It is read at the class token, or as the mean of all tokens."""
    flow = rollout(attention_maps(model, images))
    seen = flow[:, 0, 1:] if model.pool == "class" else flow.mean(1)
    seen = seen / seen.sum(1, keepdim=True)
    side = round(seen.shape[1] ** 0.5)
    return seen.unflatten(1, (side, side))


def to_onnx(model: nn.Module) -> bytes:
    """The content of an ONNX file: input "pixels", outputs "logits" and the `extras`.

    The number of images is free. Raises ValueError where the packages for it are missing.
    """
    try:
        import onnxscript  # noqa: F401  torch says so at length, and late
    except ImportError:
        raise ValueError("this needs onnx: pip install 'mnistlab[playground]'") from None
    exported = Exported(model)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own code
        program = torch.onnx.export(
            exported,
            (torch.rand(2, 1, 28, 28),),
            input_names=["pixels"],
            output_names=["logits", *exported.extras],
            dynamic_shapes=({0: torch.export.Dim("images", min=1, max=10_000)},),
            dynamo=True,
            verbose=False,
        )
    proto = program.model_proto
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.functions, proto.graph, proto):
        part.ClearField("metadata_props")  # stack traces, larger than the weights
        part.ClearField("doc_string")
    return proto.SerializeToString()


def select(folder: Path = runs.RESULTS) -> list[str]:
    """Recipes that have weights and stand side by side: of MNIST, up to `LARGEST`, right more often
    than wrong; smallest first.

    Of those that share preset, loss and teacher, one: the preset's own recipe, or that with most
    validation images right. Of those with weights of few bits, one. The steps from one family to
    another are none of their own.
    """
    best: dict[Any, tuple[tuple[bool, float], runs.Results]] = {}
    for name in runs.recorded(folder):
        known, recipe = runs.results(name, folder), recipes.find(name)
        shipped = (folder.parent / "weights" / f"{name}.safetensors").exists()
        fits = known.params <= LARGEST and recipe.data == "mnist" and not recipe.resplit
        step = PRESETS[recipe.model].family is StepCNN
        if step or not (shipped and fits and known.mean > 0.5):
            continue
        rank = (name == recipe.model, known.validated)
        bits = recipe.weight_bits > 0
        key = bits or (recipe.model, recipe.loss, recipe.teacher)
        if key not in best or rank > best[key][0]:
            best[key] = rank, known
    chosen = [known for _, known in best.values()]
    return [known.name for known in sorted(chosen, key=lambda known: (known.params, known.name))]


def export(
    names: Sequence[str] = (), out: Path = Path("models"), folder: Path = runs.RESULTS
) -> list[dict[str, Any]]:
    """Write NAME.onnx for each recipe, and models.json, which lists them.

    A file that was written before from the same weights by the same code is left as it is.

    Args:
        names: of recipes that have weights. Default: `select()`.
        out: folder; made if it is not there.

    Returns:
        The list, a dict a model: name, family, params, macs; mean and sd (None for one seed) of
        the recorded test accuracy, as fractions, and n; file, bytes, sha256; extras, the names of
        the outputs after the logits; source, a hash of what the file was made from.

    Raises:
        ValueError: unknown name, no weights, stale records; or a package is missing.
    """
    listing, before = out / "models.json", {}
    if listing.exists():
        before = {row["name"]: row for row in json.loads(listing.read_text())}
    rows = []
    bar = tqdm(names or select(folder), unit="model", disable=bool(os.environ.get("TQDM_DISABLE")))
    for name in bar:
        bar.set_postfix_str(name)
        known, path = runs.results(name, folder), out / f"{name}.onnx"
        model = Exported(runs.trained(name, folder=folder))
        source = _source(known)
        if before.get(name, {}).get("source") != source or not path.exists():
            write_atomically(path, to_onnx(model.model))
        content = path.read_bytes()
        rows.append(
            {
                "name": name,
                "family": PRESETS[known.model].family.__name__,
                "params": known.params,
                "macs": known.macs,
                "mean": known.mean,
                "sd": known.sd if known.n > 1 else None,
                "n": known.n,
                "file": path.name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "extras": list(model.extras),
                "source": source,
            }
        )
        write_atomically(listing, json.dumps(rows, indent=1).encode())  # a cut-off call goes on
    return rows


def _source(known: runs.Results) -> str:
    """Of the weights, and of the code that makes a file of them."""
    code = [Path(__file__), *sorted((Path(__file__).parent / "models").glob("*.py"))]
    parts = [next(r["weights"] for r in known.records if "weights" in r), version("torch")]
    parts += [hashlib.sha256(path.read_bytes()).hexdigest() for path in code]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
