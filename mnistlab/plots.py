"""Figures. Each function draws on an Axes (a new one by default) and returns it.

Call `style()` once: transparent background, grey text, and colours that colour-blind readers
can tell apart; all of it legible on a light and on a dark page.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator
from torch import Tensor, nn

from .data import Split
from .evaluate import Report
from .runs import REFERENCE, Results, power_law, results, speeds
from .train import Run

# Four of Okabe & Ito (2008) and two violets: each stands out from a light and a dark page (3:1),
# and colour-blind readers can tell any two apart. Tests compute both.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A2BE2", "#9772FE")
MARKERS = "os^Dv<>"  # one more than there are colours, so that a pair stands for one family
INK = "#7f7f7f"  # grey: 4:1 against a white page, 5:1 against a black one
# Zero is grey; away from it, blue and vermilion, as bright on light as on dark.
DIVERGING = LinearSegmentedColormap.from_list("mnistlab", ["#0072B2", "#dcdcdc", "#D55E00"])


def style() -> None:
    """Set matplotlib's defaults for figures that sit on the page, light or dark."""
    plt.rcParams.update(
        {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "legend.framealpha": 0.0,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "grid.alpha": 0.3,
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "image.cmap": "gray",
            "image.interpolation": "nearest",  # crisp pixels, and small files
        }
        | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), INK)
        | dict.fromkeys(("xtick.color", "ytick.color", "grid.color", "legend.labelcolor"), INK)
    )


def digits(
    images: Tensor,
    titles: Sequence[Any] | None = None,
    *,
    columns: int = 10,
    cmap: Any = "gray",
    limit: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A grid of images, row by row, each with its title above it.

    Args:
        images: [N, C, H, W] or [N, H, W], uint8 or float; C is 1 or 3.
        titles: N of them.
        limit: colours run from -limit to limit; else over the values of all images together.

    Raises:
        ValueError: there are no images.
    """
    if len(images) == 0:
        raise ValueError("there are no images to show")
    images = images.detach().cpu().float()
    if images.ndim == 4:
        images = images.permute(0, 2, 3, 1).squeeze(-1)  # [N, H, W] or [N, H, W, 3]
    n, h, w = images.shape[:3]
    columns = min(columns, n)
    rows = -(-n // columns)
    gap, head = 2, (h // 3 if titles is not None else 0)  # in pixels of the images
    if ax is None:
        size = max(0.45, 6.5 / columns)
        height = size * rows * (h + gap + head) / (w + gap)
        _, ax = plt.subplots(figsize=(size * columns, height))
    low, high = (-limit, limit) if limit else (images.min().item(), images.max().item())
    for i, image in enumerate(images.numpy()):
        x, y = (i % columns) * (w + gap), (i // columns) * (h + gap + head) + head
        if image.ndim == 3:
            image = image / (high or 1)
        ax.imshow(image, cmap=cmap, vmin=low, vmax=high, extent=(x, x + w, y + h, y))
        if titles is not None:
            ax.text(x + w / 2, y - 1, str(titles[i]), ha="center", va="bottom", fontsize=8)
    ax.set(xlim=(0, columns * (w + gap) - gap), ylim=(rows * (h + gap + head), 0))
    ax.axis("off")
    return ax


def curves(runs: Run | Sequence[Run] | Mapping[str, Run], *, ax: Axes | None = None) -> Axes:
    """Loss against epochs: training dashed, validation solid, a colour for each run."""
    if isinstance(runs, Run):
        runs = [runs]
    named = runs.items() if isinstance(runs, Mapping) else [(f"seed {r.seed}", r) for r in runs]
    ax = ax or plt.subplots(figsize=(5, 3))[1]
    for (name, run), colour in zip(named, cycle(COLOURS), strict=False):
        epochs = [row["epoch"] for row in run.history]
        for key, line, label in (("train_loss", "--", None), ("val_loss", "-", name)):
            values = [row[key] for row in run.history]
            ax.plot(epochs, values, line, marker=".", color=colour, label=label)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="epoch", ylabel="loss (dashed: training)", yscale="log")
    ax.legend()
    return ax


def confusion(
    report: Report, classes: Sequence[str] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Counts of each label (row) taken for each class (column); the mistakes set the colours."""
    counts = report.confusion.numpy()
    k = len(counts)
    wrong = counts * (1 - np.eye(k, dtype=counts.dtype))
    ax = ax or plt.subplots(figsize=(4.5, 4.5))[1]
    ax.imshow(np.where(np.eye(k, dtype=bool), np.nan, wrong), cmap="cividis", vmin=0)
    top = max(1, wrong.max())
    for row, column in np.ndindex(k, k):
        if counts[row, column] and k <= 20:
            dark = row != column and wrong[row, column] < 0.465 * top
            colour = INK if row == column else "white" if dark else "black"
            ax.text(
                column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=7
            )
    names = classes or [str(i) for i in range(k)]
    ax.set(xticks=range(k), yticks=range(k), xlabel="predicted", ylabel="label")
    ax.set_xticklabels(names, rotation=0 if max(map(len, names)) < 3 else 90)
    ax.set_yticklabels(names)
    return ax


def mistakes(
    report: Report, split: Split, *, n: int = 20, columns: int = 8, ax: Axes | None = None
) -> Axes:
    """The most confident mistakes: label, arrow, prediction, confidence."""
    index = report.mistakes[:n]
    titles = [
        f"{report.labels[i]}→{report.predictions[i]} {100 * report.confidence[i]:.0f}%"
        for i in index
    ]
    return digits(split.images[index.to(split.images.device)], titles, columns=columns, ax=ax)


def filters(weight: Tensor, *, columns: int = 8, ax: Axes | None = None) -> Axes:
    """Weights as small images, blue below zero and vermilion above, all on one scale.

    Args:
        weight: [out, in, H, W] of a convolution (each input channel its own image), or [N, H, W].
    """
    maps = weight.detach().cpu().flatten(0, -3)
    return digits(maps, columns=columns, cmap=DIVERGING, limit=maps.abs().max().item(), ax=ax)


@torch.no_grad()
def activations(
    model: nn.Module, layer: nn.Module, image: Tensor, *, columns: int = 8, ax: Axes | None = None
) -> Axes:
    """What one layer of a model in eval mode gives for one image: a picture for each channel.

    Args:
        layer: a module of the model, with output [1, C, H, W].
        image: normalised, [1, C, H, W].
    """
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    was_training = model.training
    try:
        model.eval()(image)
    finally:
        hook.remove()
        model.train(was_training)
    return digits(seen[0][0], columns=columns, cmap="viridis", ax=ax)


def frontier(rows: Sequence[Mapping[str, Any]], *, ax: Axes | None = None) -> Axes:
    """Accuracy against parameters, with intervals: one point a model, one colour a family.

    Args:
        rows: each with `name`, `family`, `params`, `mean` and `interval` (low, high); accuracies
            are fractions.
    """
    ax = ax or plt.subplots(figsize=(6.4, 3.8))[1]
    families = dict.fromkeys(r["family"] for r in rows)
    for family, colour in zip(families, cycle(COLOURS), strict=False):
        own = sorted((r for r in rows if r["family"] == family), key=lambda r: r["params"])
        mean = 100 * np.array([r["mean"] for r in own])
        low, high = 100 * np.array([r["interval"] for r in own]).T
        params = [r["params"] for r in own]
        ax.plot(params, mean, color=colour, alpha=0.8, linewidth=1.2)
        ax.errorbar(
            params, mean, (mean - low, high - mean), fmt="o", capsize=4, color=colour, label=family
        )
        for row, y in zip(own, mean, strict=True):  # its name beside it, away from the line
            left = row is not own[-1]
            ax.annotate(
                row["name"],
                (row["params"], y),
                (-8 if left else 8, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=9,
            )
    ax.set(xscale="log", xlabel="trainable parameters", ylabel="accuracy, %")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(_short))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(True, axis="y")
    ax.margins(x=0.3, y=0.08)  # room for the names
    ax.legend(loc="lower right")
    return ax


def comparison(names: Sequence[str], *, axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Test error of recorded recipes, with the interval of its mean, against parameters, against
    multiply-accumulates, and against measured time. A colour and a marker for each family.

    Args:
        names: of recipes, `<family>-<size>`; any other stands for itself.
        axes: three.

    Raises:
        ValueError: a recipe has no records, or stale ones.
    """
    found = {name: results(name) for name in names}
    times = speeds()
    scales = {
        "trainable parameters": lambda known: known.params,
        "multiply-accumulates": lambda known: known.macs,
        f"time of an image ({REFERENCE}: 1)": lambda known: times[known.model],
    }
    if axes is None:
        axes = plt.subplots(1, 3, figsize=(7.4, 3.4), sharey=True)[1]
    family_of = {name: re.sub(r"-\d+[km]$", "", name) for name in names}
    families = dict.fromkeys(family_of.values())
    for family, colour, marker in zip(families, cycle(COLOURS), cycle(MARKERS), strict=False):
        own = [known for name, known in found.items() if family_of[name] == family]
        error = 100 * (1 - np.array([known.mean for known in own]))
        high, low = 100 * (1 - np.array([known.interval for known in own])).T
        for ax, value in zip(axes, scales.values(), strict=True):
            x = [value(known) for known in own]
            ax.errorbar(
                x,
                error,
                (error - low, high - error),
                fmt=f"{marker}-",
                lw=0.8,
                capsize=3,
                color=colour,
                label=family,
            )
    for ax, (label, value) in zip(axes, scales.items(), strict=True):
        ends = sorted(map(value, found.values()))
        ax.set(xscale="log", yscale="log", xlabel=label, xlim=(ends[0] / 1.6, ends[-1] * 1.6))
        ax.tick_params(axis="x", labelsize=7.5)
        between = (1, 3) if ends[-1] < 2000 * ends[0] else (1,)  # else the labels touch
        for axis, subs in ((ax.xaxis, between), (ax.yaxis, (1, 1.5, 2, 3, 5, 7))):
            axis.set_major_locator(LogLocator(subs=subs))
            axis.set_major_formatter(FuncFormatter(_short))
            axis.set_minor_locator(NullLocator())
        ax.grid(True, axis="y")
    axes[0].set_ylabel("test error, %")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return axes


def answers(
    image: Tensor, probabilities: Mapping[str, Tensor], *, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """One image, and beside it what several models take it for: a bar for each class and model.

    Args:
        image: [H, W].
        probabilities: of each model, [K].
        axes: two.
    """
    if axes is None:
        axes = plt.subplots(1, 2, figsize=(6.4, 2.4), width_ratios=(1, 2.4))[1]
    digits(image[None], ax=axes[0])
    wide = 0.8 / len(probabilities)
    for i, ((name, values), colour) in enumerate(
        zip(probabilities.items(), cycle(COLOURS), strict=False)
    ):
        best = int(values.argmax())
        x = np.arange(len(values)) + wide * (i - (len(probabilities) - 1) / 2)
        label = f"{name}: {best} ({100 * values[best]:.0f}%)"
        axes[1].bar(x, values.tolist(), wide, color=colour, label=label)
    axes[1].set(ylim=(0, 1), xticks=range(len(values)), xlabel="class", ylabel="probability")
    axes[1].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, borderpad=0)
    return axes


def budget(known: Sequence[Results], params: int, *, ax: Axes | None = None) -> Axes:
    """Where a network of so many parameters would lie on the line through recorded results: a star
    on `power_law(known)`, which is dotted beyond the sizes recorded."""
    ax = ax or plt.subplots(figsize=(5.6, 3))[1]
    law, sizes = power_law(known), sorted(found.params for found in known)
    error = 100 * (1 - np.array([found.mean for found in known]))
    high, low = 100 * (1 - np.array([found.interval for found in known])).T
    x = [found.params for found in known]
    ax.errorbar(x, error, (error - low, high - error), fmt="o", capsize=3, color=COLOURS[0])
    for found, y in zip(known, error, strict=True):
        ax.annotate(found.name, (found.params, y), (6, 6), textcoords="offset points", fontsize=8)
    ends = min(sizes[0], params) / 1.5, max(sizes[-1], params) * 1.5
    for xs, line in ((ends, ":"), ((sizes[0], sizes[-1]), "-")):
        ax.plot(xs, [100 * law(size) for size in xs], line, lw=1.2, color=COLOURS[0])
    ax.plot(params, 100 * law(params), "*", ms=14, color=COLOURS[1])
    ax.set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="test error, %")
    for axis, subs in ((ax.xaxis, (1, 2, 5)), (ax.yaxis, (1, 1.5, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(_short))
        axis.set_minor_locator(NullLocator())
    ax.grid(True, axis="y")
    return ax


def attention(
    image: Tensor, share: Tensor, *, asking: int | None = None, ax: Axes | None = None
) -> Axes:
    """How much was taken from each patch, bright is much, under the outline of the image.

    Args:
        image: [H, W].
        share: of each patch, row by row, [T]; T is a square number.
        asking: the patch to frame.
    """
    ax = ax or plt.subplots(figsize=(2.4, 2.4))[1]
    (h, w), side = image.shape, round(len(share) ** 0.5)
    heat = share.detach().cpu().view(side, side).numpy()
    ax.imshow(heat, cmap="viridis", vmin=0, extent=(-0.5, w - 0.5, h - 0.5, -0.5))
    image = image.cpu().float().numpy()
    middle = (image.min() + image.max()) / 2
    ax.contour(image, levels=[middle], colors="white", linewidths=0.8)
    if asking is not None:
        corner = (asking % side * w / side - 0.5, asking // side * h / side - 0.5)
        ax.add_patch(plt.Rectangle(corner, w / side, h / side, fill=False, ec="white", lw=2))
    ax.axis("off")
    return ax


def routing(
    shares: Tensor, whole: int, at: int, *, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """Coupling coefficients of a routing by agreement: all of one round, and how the parts' shares
    in one whole settle over the rounds.

    Args:
        shares: after 1, 2 ... R rounds, [R, K, I], of K wholes and I parts.
        whole: 0 to K-1, whose shares are followed.
        at: the round shown on the left, 1 to R.
        axes: two.
    """
    if axes is None:
        axes = plt.subplots(1, 2, figsize=(7, 2.6))[1]
    shares = shares.detach().cpu().numpy()
    rounds, wholes, parts = shares.shape
    axes[0].imshow(shares[at - 1], cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes[0].set(xlabel="part", ylabel="whole", yticks=range(wholes), title=f"shares, round {at}")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    colours = [COLOURS[int(share >= 0.5)] for share in shares[-1, whole]]
    for share, colour in zip(shares[:, whole].T, colours, strict=True):
        axes[1].plot(range(1, rounds + 1), share, lw=1, color=colour, alpha=max(0.1, 4 / parts))
    axes[1].axvline(at, color=INK, ls=":", lw=1)
    axes[1].set(xlabel="round", ylabel=f"share of whole {whole}", ylim=(0, 1))
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    return axes


def walks(
    f: Callable[[Tensor], Tensor],
    paths: Mapping[str, Tensor],
    *,
    xlim: tuple[float, float] = (-10.5, 4.5),
    ylim: tuple[float, float] = (-4, 4),
    ax: Axes | None = None,
) -> Axes:
    """Paths of optimisers, each from its dot, over the contours of a function of two weights.

    Args:
        f: [..., 2] -> [...].
        paths: positions, [steps + 1, 2]; what is not finite is left out.
    """
    ax = ax or plt.subplots(figsize=(5.6, 3))[1]
    x, y = torch.linspace(*xlim, 100), torch.linspace(*ylim, 100)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).double()
    ax.contour(x, y, f(grid), np.logspace(-1, 3, 13), colors=INK, linewidths=0.4)
    for (name, path), colour in zip(paths.items(), cycle(COLOURS), strict=False):
        path = path[path.abs().amax(1) < 1e6].numpy()  # a canvas has no place for larger numbers
        ax.plot(*path.T, ".-", ms=4, lw=1, color=colour, label=name)
        ax.plot(*path[0], "o", ms=6, color=colour)
    ax.set(xlim=xlim, ylim=ylim, xlabel="x", ylabel="y")
    return ax


def _short(value: float, _: int = 0) -> str:
    """30_000 -> "30k", 0.3 -> "0.3"."""
    return EngFormatter(sep="")(value) if value >= 1_000 else f"{value:g}"
