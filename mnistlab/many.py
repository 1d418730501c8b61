"""Many runs in one pass, for a GPU, of which the steps of one small model use little.

A step of every run is a branch of one CUDA graph, so Python has a single call to make for all. On
an H100 a run of cnn-8k took a fifth of the time of `fit`, in a pass of eight as in one of 32. On a
CPU, processes side by side are quicker.
"""

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import Dataset
from .train import Loop, Recipe, Run, conditions, pick_device, prepared

ALONE = ("compile", "precision", "target", "resplit")  # what a pass does not do
TOGETHER = ("data", "epochs", "batch_size", "teacher")  # in which its runs must agree
WARM_UP = 3  # steps before the capture, for what is allocated and chosen in the first ones


def can_stack(*recipes: Recipe) -> bool:
    """Whether `fit_many` can run these recipes in one pass."""
    default = Recipe()
    return all(
        all(getattr(recipe, name) == getattr(default, name) for name in ALONE)
        and all(getattr(recipe, name) == getattr(recipes[0], name) for name in TOGETHER)
        for recipe in recipes
    )


def fit_many(
    data: Dataset,
    jobs: Sequence[tuple[Recipe, int]],
    *,
    teacher: nn.Module | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[Run | FloatingPointError]:
    """Train many models at once; what `fit` would give, but for the draws of dropout.

    Args:
        jobs: recipe and seed of each run; each draws its own weights, order of images and
            augmentation, as in `fit`.
        teacher: where the recipes name one, its model.
        device: default the best there is.

    Returns:
        A Run for each job, or the error of one whose loss is no longer finite. `seconds` is its
        share of the pass.

    Raises:
        ValueError: the recipes ask for what a pass does not do.
    """
    if not can_stack(*(recipe for recipe, _ in jobs)):
        raise ValueError(
            f"fit_many takes recipes of the same {', '.join(TOGETHER)}, and no {', '.join(ALONE)}"
        )
    device = pick_device(device)
    data = replace(data, train=data.train.to(device), val=data.val.to(device))  # once for all
    with conditions(device), ExitStack() as stack:
        gpu = device.type == "cuda"
        loops = [
            stack.enter_context(prepared(recipe.model, data, recipe, seed, device, teacher, gpu))
            for recipe, seed in jobs
        ]
        step = Steps(loops, device)
        histories = [[] for _ in loops]
        epochs = range(1, jobs[0][0].epochs + 1) if jobs else ()
        for epoch in tqdm(epochs, unit="epoch", leave=False, disable=not progress):
            started = time.perf_counter()
            for parts in zip(*(loop.begin(epoch) for loop in loops), strict=True):
                step(parts)
                for loop in loops:
                    loop.after_step()
            means = [loop.end(epoch) for loop in loops]
            seconds = (time.perf_counter() - started) / len(loops)
            for loop, mean, history in zip(loops, means, histories, strict=True):
                history.append(loop.validate(epoch, mean, seconds))
    return [_ended(loop, history) for loop, history in zip(loops, histories, strict=True)]


def _ended(loop: Loop, history: list[dict[str, float]]) -> Run | FloatingPointError:
    for row in history:
        if not math.isfinite(row["train_loss"]):
            return FloatingPointError(f"the loss is {row['train_loss']} in epoch {row['epoch']}")
    return loop.run(history)


class Steps:
    """The next step of each loop, all in one call."""

    def __init__(self, loops: list[Loop], device: torch.device):
        self.loops, self.graph, self.taken = loops, None, 0
        self.streams = [torch.cuda.Stream() for _ in loops] if device.type == "cuda" else []

    def __call__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take a step with a batch, images and labels, for each loop."""
        self.taken += 1
        if not self.streams:
            for loop, part in zip(self.loops, parts, strict=True):
                loop.step(*part)
        elif self.taken <= WARM_UP:
            with warnings.catch_warnings():  # that it is not captured
                warnings.simplefilter("ignore")
                self.branches(parts)
        else:
            if self.graph is None:
                self.inputs = [tuple(x.clone() for x in part) for part in parts]
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):  # records, and runs nothing
                    self.branches(self.inputs)
            for i in (0, 1):
                torch._foreach_copy_([own[i] for own in self.inputs], [part[i] for part in parts])
            self.graph.replay()

    def branches(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        here = torch.cuda.current_stream()
        for loop, stream, part in zip(self.loops, self.streams, parts, strict=True):
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                loop.step(*part)
        for stream in self.streams:
            here.wait_stream(stream)
