"""Figures: what is drawn, where, and whether it is legible on a light and on a dark page."""

import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import mnistlab as ml
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from mnistlab import Report, plots
from torch import nn

LIGHT, DARK = "#ffffff", "#121212"  # the theme's pages


@pytest.fixture(autouse=True)
def clean():
    with matplotlib.rc_context():
        yield
    plt.close("all")


def report(k: int = 4, n: int = 60) -> Report:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(k, (n,), generator=draw)
    logits = torch.randn(n, k, generator=draw)
    logits[torch.arange(n), labels] += 1.5
    return Report(logits.log_softmax(1), labels)


def perfect() -> Report:
    return Report(torch.eye(3).log_softmax(1), torch.arange(3))


@pytest.fixture(scope="module")
def run(tiny) -> ml.Run:
    model = ml.models.Dense(hidden=(), image_size=8, num_classes=4)
    return ml.fit(model, tiny, ml.Recipe(epochs=3), progress=False)


def images(n: int, channels: int) -> ml.Split:
    pixels = torch.randint(256, (n, channels, 8, 8), dtype=torch.uint8)
    return ml.Split(pixels, torch.zeros(n).long())


CONV = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU())
ROWS = [
    {"name": "a-1k", "family": "A", "params": 1_000, "mean": 0.97, "interval": (0.95, 0.98)},
    {"name": "b-9k", "family": "B", "params": 9_000, "mean": 0.98, "interval": (0.97, 0.985)},
    {"name": "a-5k", "family": "A", "params": 5_000, "mean": 0.99, "interval": (0.985, 0.995)},
]
CNNS = [ml.results("cnn-8k"), ml.results("cnn-68k")]


def bowl(w: torch.Tensor) -> torch.Tensor:
    return w.square().sum(-1)


CALLS = {
    "digits": lambda run, ax: plots.digits(images(7, 1).images, list("abcdefg"), columns=3, ax=ax),
    "digits in colour": lambda run, ax: plots.digits(images(7, 3).images, ax=ax),
    "one digit": lambda run, ax: plots.digits(images(1, 1).images, ax=ax),
    "digits [N, H, W]": lambda run, ax: plots.digits(torch.rand(4, 8, 8), ax=ax),
    "blank digits": lambda run, ax: plots.digits(torch.zeros(2, 3, 8, 8), ax=ax),
    "curves": lambda run, ax: plots.curves({"mine": run}, ax=ax),
    "confusion": lambda run, ax: plots.confusion(report(), tuple("abcd"), ax=ax),
    "confusion of 30": lambda run, ax: plots.confusion(report(30), ax=ax),
    "confusion, none wrong": lambda run, ax: plots.confusion(perfect(), ax=ax),
    "mistakes": lambda run, ax: plots.mistakes(report(), images(60, 1), ax=ax),
    "mistakes in colour": lambda run, ax: plots.mistakes(report(), images(60, 3), n=3, ax=ax),
    "filters": lambda run, ax: plots.filters(CONV[0].weight, ax=ax),
    "filters of 3 channels": lambda run, ax: plots.filters(torch.randn(4, 3, 5, 5), ax=ax),
    "filters of zero": lambda run, ax: plots.filters(torch.zeros(4, 1, 5, 5), ax=ax),
    "activations": lambda run, ax: plots.activations(CONV, CONV[1], torch.randn(1, 1, 8, 8), ax=ax),
    "frontier": lambda run, ax: plots.frontier(ROWS, ax=ax),
    "budget": lambda run, ax: plots.budget(CNNS, 20_000, ax=ax),
    "attention": lambda run, ax: plots.attention(torch.rand(8, 8), torch.rand(16), ax=ax),
    "walks": lambda run, ax: plots.walks(bowl, {"a": torch.ones(3, 2)}, ax=ax),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.filterwarnings("error")
def test_a_figure_is_drawn_on_the_axes_given_or_on_new_ones(run, call, given):
    plots.style()
    ax = plt.subplots()[1] if given else None
    drawn = call(run, ax)
    assert drawn is ax or not given
    assert len(plt.get_fignums()) == 1
    drawn.figure.canvas.draw()


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_digits_are_laid_out_row_by_row_with_their_titles():
    ax = plots.digits(torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 1, 6, 6), "abcde", columns=2)
    corners = [image.get_extent()[0::3] for image in ax.images]  # left, top
    assert [row for row, _ in corners] == [0, 8, 0, 8, 0]
    tops = [top for _, top in corners]
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]
    assert [image.get_array().mean() for image in ax.images] == [0, 1, 2, 3, 4]
    assert len({image.get_clim() for image in ax.images}) == 1  # one scale for all
    assert texts(ax) == list("abcde")
    assert not ax.axison


def test_digits_in_colour_keep_their_colours():
    split = images(2, 3)
    shown = plots.digits(split.images).images[1].get_array()
    expected = split.images[1].permute(1, 2, 0) / split.images.max()
    np.testing.assert_allclose(np.asarray(shown, float), expected, atol=1 / 255)


def test_curves_show_training_dashed_and_validation_solid(run):
    ax = plots.curves([run, run])
    assert ax.get_xlabel() == "epoch" and "loss" in ax.get_ylabel()
    dashed, solid = ax.lines[:2]
    assert (dashed.get_linestyle(), solid.get_linestyle()) == ("--", "-")
    assert dashed.get_ydata().tolist() == [row["train_loss"] for row in run.history]
    assert solid.get_ydata().tolist() == [row["val_loss"] for row in run.history]
    assert dashed.get_xdata().tolist() == [1, 2, 3]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["seed 0", "seed 0"]


def test_curves_take_one_run(run):
    assert len(plots.curves(run).lines) == 2


def test_confusion_writes_every_count_and_names_both_axes():
    ax = plots.confusion(report(), ("ant", "bee", "cat", "dog"))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "label")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["ant", "bee", "cat", "dog"]
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): t for t in ax.texts}
    counts = report().confusion
    assert {k: int(t.get_text()) for k, t in written.items()} == {
        (i, j): int(counts[i, j]) for i in range(4) for j in range(4) if counts[i, j]
    }


def test_mistakes_say_label_prediction_and_confidence_the_surest_first():
    judged = report()
    ax = plots.mistakes(judged, images(60, 1), n=5)
    first = judged.mistakes[0]
    label, guess = judged.labels[first], judged.predictions[first]
    assert len(ax.texts) == 5
    assert texts(ax)[0] == f"{label}→{guess} {100 * judged.confidence[first]:.0f}%"


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        plots.mistakes(perfect(), images(3, 1))


def test_filters_share_one_scale_with_zero_in_its_middle():
    weight = torch.tensor([-1.0, 3.0]).view(2, 1, 1, 1).expand(2, 2, 3, 3)
    ax = plots.filters(weight)
    assert len(ax.images) == 4
    assert {image.get_clim() for image in ax.images} == {(-3, 3)}


def test_activations_show_every_channel_and_leave_the_model_as_it_was():
    image, model = torch.randn(1, 1, 8, 8), CONV.train()
    ax = plots.activations(model, CONV[0], image)
    shown = np.stack([np.asarray(i.get_array()) for i in ax.images])
    np.testing.assert_allclose(shown, CONV[0](image)[0].detach(), atol=1e-6)
    assert model.training and not CONV[0]._forward_hooks


def test_frontier_draws_means_intervals_and_names():
    ax = plots.frontier(ROWS)
    assert ax.get_xscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("trainable parameters", "accuracy, %")
    assert sorted(texts(ax)) == ["a-1k", "a-5k", "b-9k"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["A", "B"]
    (a, _, (bars,)), _ = ax.containers
    assert (a.get_xdata().tolist(), a.get_ydata().tolist()) == ([1_000, 5_000], [97, 99])
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [[95, 98], [98.5, 99.5]])


def test_frontier_draws_every_family_however_many():
    rows = [ROWS[0] | {"family": f"family {i}", "name": f"{i}"} for i in range(9)]
    assert len(plots.frontier(rows).containers) == 9


def test_comparison_draws_error_against_size_arithmetic_and_time():
    names = ["dense-8k", "cnn-8k", "dense-68k"]
    axes = plots.comparison(names)
    dense, cnn = (container for container in axes[0].containers)
    assert [dense.get_label(), cnn.get_label()] == ["dense", "cnn"]
    large = ml.results("dense-68k")
    x, y = (values[1] for values in dense.lines[0].get_data())
    assert (x, y) == (large.params, 100 * (1 - large.mean))
    (bars,) = dense.lines[2]
    ends = sorted(bars.get_segments()[1][:, 1])
    np.testing.assert_allclose(ends, sorted(100 * (1 - end) for end in large.interval))
    assert axes[1].containers[0].lines[0].get_xdata()[1] == large.macs
    assert axes[2].containers[1].lines[0].get_xdata()[0] == 1  # the reference itself
    assert len(axes[0].figure.legends[0].get_texts()) == 2


def test_answers_draw_a_bar_for_each_class_and_model_and_name_the_best():
    shares = {"a": torch.tensor([0.2, 0.8, 0.0]), "b": torch.tensor([0.6, 0.3, 0.1])}
    axes = plots.answers(torch.rand(4, 4), shares)
    assert len(axes[0].images) == 1
    bars = [[bar.get_height() for bar in container] for container in axes[1].containers]
    np.testing.assert_allclose(bars, [values.tolist() for values in shares.values()])
    said = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert said == ["a: 1 (80%)", "b: 0 (60%)"]
    edges = sorted((bar.get_x(), bar.get_width()) for c in axes[1].containers for bar in c)
    assert all(x + width <= right + 1e-9 for (x, width), (right, _) in itertools.pairwise(edges))


def test_budget_puts_the_star_on_the_line_which_is_dotted_beyond_the_records():
    ax = plots.budget(CNNS, 2_000)
    lines = {line.get_linestyle(): line for line in ax.lines if len(line.get_xdata()) == 2}
    assert lines["-"].get_xdata()[0] == CNNS[0].params
    np.testing.assert_allclose(lines["-"].get_ydata(), [100 * (1 - k.mean) for k in CNNS])
    assert lines[":"].get_xdata()[0] < 2_000
    (star,) = (line for line in ax.lines if line.get_marker() == "*")
    (x,), (y,) = star.get_data()
    assert x == 2_000 and y == pytest.approx(100 * ml.runs.power_law(CNNS)(2_000))


def test_attention_frames_the_patch_that_asks():
    share = torch.arange(16.0)
    ax = plots.attention(torch.rand(8, 8), share, asking=6)
    np.testing.assert_array_equal(ax.images[0].get_array(), share.view(4, 4))
    (frame,) = ax.patches
    assert (*frame.get_xy(), frame.get_width()) == (3.5, 1.5, 2)  # row 1, column 2, of 2x2 pixels


def test_routing_follows_every_part_and_marks_the_round():
    shares = torch.rand(5, 3, 4).softmax(1)
    axes = plots.routing(shares, 2, 4)
    np.testing.assert_allclose(axes[0].images[0].get_array(), shares[3])
    *lines, mark = axes[1].lines
    np.testing.assert_allclose([line.get_ydata() for line in lines], shares[:, 2].T)
    assert list(mark.get_xdata()) == [4, 4]


def test_a_walk_that_diverges_is_drawn_as_far_as_numbers_go():
    path = torch.tensor([[1.0, 1.0], [-30.0, 2.0], [float("inf"), 3.0], [float("nan"), 4.0]])
    ax = plots.walks(bowl, {"a": path}, xlim=(-2, 2), ylim=(-2, 2))
    ax.figure.canvas.draw()
    assert ax.lines[0].get_xdata().tolist() == [1, -30] and ax.get_xlim() == (-2, 2)


# --- colours ------------------------------------------------------------------------------------


def test_style_makes_the_background_transparent():
    plots.style()
    figure, ax = plt.subplots()
    assert figure.get_facecolor()[3] == 0 and ax.get_facecolor()[3] == 0
    ax.plot([0, 1], label="line")
    figure.canvas.draw()
    assert np.asarray(figure.canvas.buffer_rgba())[0, 0, 3] == 0
    assert ax.legend().get_frame().get_alpha() == 0
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_legend().get_texts()):
        assert to_hex(text.get_color()) == plots.INK


def linear(colour: str) -> np.ndarray:
    """Linear RGB, 0 to 1, of an sRGB colour."""
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    """Relative luminance, of WCAG 2.2."""
    return float(linear(colour) @ (0.2126, 0.7152, 0.0722))


def contrast(a: str, b: str) -> float:
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("white", "black") == pytest.approx(21)
    assert contrast("#777777", "white") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("page", [LIGHT, DARK])
@pytest.mark.parametrize("colour", [plots.INK, *plots.COLOURS])
def test_every_colour_stands_out_from_both_pages(colour, page):
    assert contrast(colour, page) >= 3  # WCAG 1.4.11, graphical objects


# Linear RGB as seen without one kind of cone: Machado et al. (2009), severity 1.
BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, kind: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as seen with one kind of colour blindness."""
    seen = np.clip(np.array(BLINDNESS[kind]) @ linear(colour), 0, 1)
    t = XYZ @ seen / XYZ.sum(1)
    x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_are_told_apart_by_colour_blind_readers(kind):
    seen = {colour: lab(colour, kind) for colour in plots.COLOURS}
    near = {
        (a, b): round(float(np.linalg.norm(seen[a] - seen[b])), 1)
        for a, b in itertools.combinations(seen, 2)
    }
    # Okabe and Ito's own six are 16 apart; about 2 is just noticeable, side by side.
    assert {pair: distance for pair, distance in near.items() if distance < 15} == {}


def test_counts_on_a_confusion_matrix_stand_out_from_their_cells():
    plots.style()
    ax = plots.confusion(report(8, 2000))
    ax.figure.canvas.draw()
    image = ax.images[0]
    for text in ax.texts:
        column, row = (round(v) for v in text.get_position())
        if row != column:
            cell = image.cmap(image.norm(image.get_array()[row, column]))
            assert contrast(text.get_color(), cell[:3]) >= 4.5
