"""Things to touch, in a notebook with a live kernel: JupyterLab, Binder.

Each explorer wires controls to a function of `plots`; on a page, which has no kernel, a chapter
shows the figure that this function draws. What goes wrong in a callback, the widget says in a line.
"""

import functools
import html
import io
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from . import plots, recipes
from .data import SOURCES, Split, normalise
from .models import CNN, PRESETS, ViT, count_macs, count_parameters
from .models.capsules import CapsuleNet, route, tweak
from .models.vit import attention_maps, rollout
from .runs import Results, power_law, recorded, results, trained
from .train import predict

try:
    import ipycanvas
    import ipywidgets as W
    import traitlets
except ImportError as error:
    raise ImportError(f"widgets need {error.name}: pip install 'mnistlab[book]'") from None


# JupyterLab may hand each control's messages to a thread of its own, and matplotlib's settings are
# for all threads: one callback at a time.
TURN = threading.RLock()


def explore(
    draw: Callable[..., str],
    controls: dict[str, W.Widget],
    *,
    size: tuple[float, float] = (6.4, 3),
    columns: Sequence[float] = (1,),
) -> W.VBox:
    """Controls, and beside them what `draw` makes of their values, anew at each change.

    Args:
        draw: called as draw(axes, **values), with empty Axes, one for each column; it returns a
            line of text, which stands below both.
        controls: widgets with a `value`, by the name of draw's argument.
        size: of the figure, inches.
        columns: relative widths of the Axes.
    """
    with _style():
        figure = Figure(size, dpi=100, layout="constrained")
        axes = figure.subplots(1, len(columns), width_ratios=columns, squeeze=False)[0]
    picture, said = W.Image(format="png", layout=W.Layout(max_width="100%")), W.HTML()

    def update(_=None) -> None:
        with TURN:
            try:
                with _style():
                    _empty(axes)
                    values = {name: control.value for name, control in controls.items()}
                    line = draw(axes, **values)
                    picture.value = _png(figure)
                if all(ax.get_visible() for ax in axes):
                    figure.set_layout_engine("none")  # stays as laid out: quicker, no jumps
                said.value, picture.layout.visibility = html.escape(line), "visible"
            except Exception as error:  # whatever it is, the reader should see it
                first = (str(error).splitlines() or [""])[0]
                said.value = (
                    f'<span role="alert" style="color:{plots.COLOURS[1]}">'
                    f"{type(error).__name__}: {html.escape(first)}</span>"
                )
                picture.layout.visibility = "hidden"  # it shows other values than the controls

    for control in controls.values():
        control.observe(update, "value")
    update()
    wrap = W.Layout(flex_flow="row wrap", align_items="center")  # one below the other on a phone
    return W.VBox([W.Box([W.VBox(list(controls.values())), picture], layout=wrap), said])


@contextmanager
def _style() -> Iterator[None]:
    """The style of our figures, whatever the notebook has set."""
    with matplotlib.rc_context():
        plots.style()
        yield


def _empty(axes: Sequence[Axes]) -> None:
    """Remove what was drawn. The Axes and their ticks stay: to make these anew takes longest."""
    for ax in axes:
        for artist in (*ax.lines, *ax.patches, *ax.images, *ax.collections, *ax.texts):
            artist.remove()
        ax.containers.clear()
        if legend := ax.get_legend():
            legend.remove()
        ax.relim()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # savefig would draw twice
    return buffer.getvalue()


def _slider(name: str, low: int, high: int, value: int) -> W.IntSlider:
    return W.IntSlider(value, low, high, description=name)


# --- draw a digit -------------------------------------------------------------------------------

Strokes = tuple[tuple[tuple[float, float], ...], ...]  # of each stroke its points (x, y)
SIDE, PEN = 280, 11  # of the pad, and half the width of a line, in pixels of the screen


class Pad(W.VBox):
    """A canvas for mouse, pen or finger; `value` holds the strokes that are finished."""

    value = traitlets.Tuple()

    def __init__(self):
        self.canvas = ipycanvas.Canvas(width=SIDE, height=SIDE)
        self.canvas.layout.border = f"1px solid {plots.INK}"
        self.canvas.line_width, self.canvas.line_cap = 2 * PEN, "round"
        self.canvas.stroke_style = plots.INK
        self.stroke: list[tuple[float, float]] = []
        clear = W.Button(description="Clear")
        super().__init__([self.canvas, clear])
        self.canvas.on_mouse_down(self.start)
        self.canvas.on_mouse_move(self.move)
        self.canvas.on_mouse_up(self.end)
        self.canvas.on_mouse_out(self.end)
        self.canvas.on_touch_start(lambda touches: self.start(*touches[0]))
        self.canvas.on_touch_move(lambda touches: self.move(*touches[0]))
        self.canvas.on_touch_end(lambda touches: self.end())
        self.canvas.on_touch_cancel(lambda touches: self.end())
        clear.on_click(self.clear)

    def start(self, x: float, y: float) -> None:
        self.stroke = [(x, y)]
        self.move(x, y)

    def move(self, x: float, y: float) -> None:
        if self.stroke:
            self.canvas.stroke_line(*self.stroke[-1], x, y)
            self.stroke.append((x, y))

    def end(self, *_: float) -> None:
        if self.stroke:
            stroke, self.stroke = tuple(self.stroke), []
            self.value = (*self.value, stroke)

    def clear(self, _=None) -> None:
        self.canvas.clear()
        self.stroke, self.value = [], ()


def ink(strokes: Strokes, side: int = 56) -> Tensor:
    """The pad as an image: float [side, side] in 0..1, anti-aliased."""
    scale = side / SIDE
    y, x = torch.meshgrid(*2 * [torch.arange(side) + 0.5], indexing="ij")
    image = torch.zeros(side, side)
    for stroke in strokes:
        points = scale * torch.tensor(stroke)
        (x0, y0), (dx, dy) = points[:-1].T[..., None, None], points.diff(dim=0).T[..., None, None]
        along = ((x - x0) * dx + (y - y0) * dy) / (dx**2 + dy**2).clamp(min=1e-9)
        along = along.clamp(0, 1)  # of each piece of line, the point nearest to each pixel
        distance = torch.hypot(x - x0 - along * dx, y - y0 - along * dy).amin(0)
        image = image.maximum((scale * PEN + 0.5 - distance).clamp(0, 1))
    return image


def read(image: Tensor, models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What each model takes an image for: float [28, 28] in 0..1 -> probabilities [10]."""
    pixels = (255 * image).round().byte()[None, None]
    split = Split(pixels, torch.zeros(1).long(), SOURCES["mnist"].mean, SOURCES["mnist"].std)
    return {name: predict(model, split)[0].softmax(0).cpu() for name, model in models.items()}


def draw_pad(models: Sequence[str] = ("cnn-8k", "dense-8k")) -> W.VBox:
    """Draw a digit; it is normalised as MNIST's were, and the models answer after each stroke.

    Args:
        models: recipes whose weights are shipped.

    Raises:
        ValueError: no such recipe or no weights of it; or it is for another data set.
    """
    for name in models:
        if recipes.find(name).data != "mnist":
            raise ValueError(f"{name!r} reads {recipes.find(name).data}, not MNIST's digits")
    nets = {name: trained(name) for name in models}

    def draw(axes, strokes: Strokes) -> str:
        for ax in axes:
            ax.set_visible(bool(strokes))
        if not strokes:
            return "Draw a digit, large."
        image = normalise(ink(strokes))
        found = read(image, nets)
        plots.answers(image, found, axes=axes)
        said = {name: int(values.argmax()) for name, values in found.items()}
        return "Left, as the models see it. " + ", ".join(f"{k}: {v}" for k, v in said.items())

    return explore(draw, {"strokes": Pad()}, size=(6.4, 2.6), columns=(1, 2.4))


# --- spend a budget -----------------------------------------------------------------------------


def recorded_cnns() -> list[Results]:
    """The recorded results of the presets of `CNN`, each by the recipe of its own name."""
    own = (name for name in recorded() if recipes.find(name).model == name)
    return [results(name) for name in own if PRESETS[name].family is CNN]


def appraise(widths: Sequence[int], known: Sequence[Results]) -> tuple[int, str]:
    """Parameters of a `CNN` of these widths; and what it costs and may reach, in words."""
    model = CNN(widths)
    params, sizes = count_parameters(model), [found.params for found in known]
    inside = min(sizes) <= params <= max(sizes)
    return params, (
        f"{params:,} parameters, {count_macs(model):,} multiply-accumulates. Test error, "
        f"{'interpolated' if inside else 'extrapolated (a guess)'} on the line through "
        f"{len(known)} recorded CNNs, nothing trained: {100 * power_law(known)(params):.2f}%"
    )


def budget_explorer(widths: Sequence[int] = (12, 20, 16, 16), most: int = 6) -> W.VBox:
    """Choose depth and widths of a `CNN`: its cost, and its place on the line through the records.

    Args:
        widths: to begin with.
        most: layers on offer.

    Raises:
        ValueError: too few CNNs are recorded for a line.
    """
    known = recorded_cnns()
    power_law(known)  # raises now, not in the widget
    start = [*widths, *(most - len(widths)) * [widths[-1]]]
    sliders = {f"width{i + 1}": _slider(f"width {i + 1}", 2, 96, w) for i, w in enumerate(start)}

    def draw(axes, depth: int, **chosen: int) -> str:
        for i, slider in enumerate(sliders.values()):
            slider.disabled = i >= depth
        params, line = appraise(list(chosen.values())[:depth], known)
        plots.budget(known, params, ax=axes[0])
        return line

    depth = _slider("layers", 2, most, len(widths))
    return explore(draw, {"depth": depth, **sliders}, size=(5.6, 3))


# --- look inside --------------------------------------------------------------------------------


def taken(maps: Tensor, layer: int | str, head: int | str, token: int | str) -> Tensor:
    """The share that one token takes from each.

    Args:
        maps: of one image, [depth, heads, T, T].
        layer: or "rollout", which is over all heads.
        head, token: or "mean", over all.

    Returns:
        [T]
    """
    if layer == "rollout":
        asked = rollout(maps[None])[0]
    else:
        asked = maps[layer].mean(0) if head == "mean" else maps[layer, head]
    return asked.mean(0) if token == "mean" else asked[token]


def attention_explorer(model: ViT, images: Tensor) -> W.VBox:
    """Which patches a token takes from, in one block and head, or through all (rollout). A token is
    named by the row and column of its patch.

    Args:
        model: is put into eval mode.
        images: as the model is fed them, [N, 1, H, W].
    """
    maps = attention_maps(model.eval(), images)  # [N, depth, heads, T, T]
    depth, heads, tokens = maps.shape[1:4]
    extra = int(model.pool == "class")  # the class token comes first, and is no patch
    side = round((tokens - extra) ** 0.5)

    def draw(axes, image: int, layer: int | str, head: int | str, token: int | str) -> str:
        controls["head"].disabled = layer == "rollout"
        share = taken(maps[image], layer, head, token)[extra:]
        asking = None if token == "mean" or token < extra else token - extra
        plots.attention(images[image, 0], share, asking=asking, ax=axes[0])
        return f"Largest share {share.max():.0%}; an equal one would be {1 / tokens:.0%}."

    places = [(f"{i // side}, {i % side}", i + extra) for i in range(side**2)]
    options = {
        "layer": [*range(depth), "rollout"],
        "head": ["mean", *range(heads)],
        "token": [("mean", "mean"), *[("class", 0)][:extra], *places],
    }
    controls = {"image": _slider("image", 0, len(images) - 1, 0)} | {
        name: W.SelectionSlider(options=o, description=name) for name, o in options.items()
    }
    return explore(draw, controls, size=(3, 3))


def settle(votes: Tensor, rounds: int, scale: float = 1.0) -> Tensor:
    """Shares after 1, 2 ... R rounds of `capsules.route`: votes [K, I, D], times scale ->
    [R, K, I]."""
    scaled = scale * votes.detach()[None]
    return torch.stack([route(scaled, r)[1][0] for r in range(1, rounds + 1)])


def routing_explorer(votes: Tensor, rounds: int = 8) -> W.VBox:
    """How routing by agreement (Sabour et al. 2017) shares parts out, round by round, also where
    the votes are longer or shorter.

    Args:
        votes: [K, I, D] of one image: `model.votes(model.parts(image))[0]`.
        rounds: at most.
    """
    settled = functools.cache(lambda scale: settle(votes, rounds, scale))

    def draw(axes, whole: int, at: int, scale: float) -> str:
        shares = settled(scale)
        plots.routing(shares, whole, at, axes=axes)
        own = shares[at - 1].argmax(0).eq(whole).sum()
        return f"After {at} round(s), {own} of {votes.shape[1]} parts give most to whole {whole}."

    controls = {
        "whole": _slider("whole", 0, len(votes) - 1, 0),
        "at": _slider("round", 1, rounds, min(3, rounds)),
        "scale": W.FloatSlider(1, min=0.25, max=4, step=0.25, description="votes times"),
    }
    return explore(draw, controls, size=(7, 2.6), columns=(1, 1))


def capsule_explorer(model: CapsuleNet, image: Tensor, label: int | None = None) -> W.VBox:
    """Move one number of a class's pose, and see what the decoder draws.

    Args:
        model: with a decoder; is put into eval mode.
        image: as the model is fed it, [1, 1, H, W].
        label: whose pose; None takes the longest one.

    Raises:
        ValueError: the model has no decoder.
    """
    drawn = functools.partial(tweak, model.eval(), image, label=label)
    drawn(0, torch.zeros(1))  # raises now, not in the widget
    with torch.no_grad():
        dimensions = model.poses(image).shape[2]

    def draw(axes, dimension: int, offset: float) -> str:
        pictures = torch.cat((image, drawn(dimension, torch.tensor([0.0, offset]))))
        pictures = pictures.clamp(image.min(), image.max())
        plots.digits(pictures, ("image", "drawn", f"{offset:+.2f}"), ax=axes[0])
        changed = (pictures[2] - pictures[1]).abs().mean() / (image.max() - image.min())
        return (
            f"Number {dimension} moved by {offset:+.2f}: pixels change by {changed:.1%}, in mean."
        )

    controls = {
        "dimension": _slider("number", 0, dimensions - 1, 0),
        "offset": W.FloatSlider(0, min=-0.6, max=0.6, step=0.05, description="moved by"),
    }
    return explore(draw, controls, size=(4.8, 2))


# --- walk down a valley -------------------------------------------------------------------------

CURVATURE = torch.tensor([1.0, 25.0], dtype=torch.float64)
START = torch.tensor([-9.0, 1.5], dtype=torch.float64)
WALKERS = {
    "SGD": lambda w, lr, beta: torch.optim.SGD(w, lr, momentum=beta),
    "Nesterov": lambda w, lr, beta: torch.optim.SGD(w, lr, momentum=beta, nesterov=True),
    "RMSprop": lambda w, lr, beta: torch.optim.RMSprop(w, lr, momentum=beta),
    "Adam": lambda w, lr, beta: torch.optim.Adam(w, lr, betas=(beta, 0.999)),
}


def valley(w: Tensor) -> Tensor:
    """The valley of chapter 8, half the sum of curvature times square: [..., 2] -> [...]"""
    return 0.5 * (CURVATURE * w**2).sum(-1)


def walk(optimizer: str, lr: float, momentum: float, steps: int) -> Tensor:
    """The positions of an optimiser of torch in the valley, float64 [steps + 1, 2]."""
    w, path = START.clone(), [START]
    walker = WALKERS[optimizer]([w], lr, momentum)
    for _ in range(steps):
        w.grad = CURVATURE * w
        walker.step()
        path.append(w.clone())
    return torch.stack(path)


def largest_rate(optimizer: str, momentum: float) -> float | None:
    """The rate at which the steepest direction no longer converges; None where there is no such
    limit, since the gradient's size is divided out."""
    ahead = {"SGD": 0, "Nesterov": 2 * momentum}.get(optimizer)
    return None if ahead is None else 2 * (1 + momentum) / (1 + ahead) / CURVATURE.max().item()


def learning_rate_playground() -> W.VBox:
    """Walk down the valley of chapter 8 with another rate, momentum or optimiser."""

    def draw(axes, optimizer: str, lr: float, momentum: float, steps: int) -> str:
        path = walk(optimizer, lr, momentum, steps)
        plots.walks(valley, {optimizer: path}, ax=axes[0])
        limit = largest_rate(optimizer, momentum)
        known = "no largest stable rate" if limit is None else f"stable below a rate of {limit:.3f}"
        return f"After {steps} steps f = {valley(path[-1]):.2g}. {optimizer}: {known}."

    controls = {
        "optimizer": W.Dropdown(options=list(WALKERS), description="optimiser"),
        "lr": W.FloatLogSlider(0.02, min=-3, max=0, step=0.02, description="rate"),
        "momentum": W.FloatSlider(0, min=0, max=0.99, step=0.01, description="momentum"),
        "steps": _slider("steps", 1, 200, 40),
    }
    return explore(draw, controls, size=(5.6, 3))
