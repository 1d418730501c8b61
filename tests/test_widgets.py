"""Widgets: their callbacks, without a browser; and that an error of a callback is seen."""

import importlib
import math
import sys
import threading
import time

import matplotlib
import mnistlab as ml
import pytest
import torch
from mnistlab import plots
from mnistlab.models import capsules
from mnistlab.models.vit import attention_maps, rollout

pytest.importorskip("ipycanvas", reason="widgets need the `book` extra")

import ipywidgets as W
from mnistlab import widgets


@pytest.fixture(scope="module")
def images(mnist):
    return mnist.val[:4].inputs()


def controls(box):
    """By their labels; the pad, which has none, is "pad"."""
    return {getattr(c, "description", "pad"): c for c in box.children[0].children[0].children}


def line(box) -> str:
    return box.children[1].value


def picture(box) -> bytes:
    image = box.children[0].children[1]
    assert image.layout.visibility == "visible"
    return bytes(image.value)


def test_without_its_libraries_the_error_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipycanvas", None)
    monkeypatch.delitem(sys.modules, "mnistlab.widgets")
    with pytest.raises(
        ImportError, match=r"^widgets need ipycanvas: pip install 'mnistlab\[book\]'$"
    ):
        importlib.import_module("mnistlab.widgets")


# --- controls, callback, picture ----------------------------------------------------------------


@pytest.fixture
def box():
    def draw(axes, n):
        axes[0].plot(range(n), label="line")
        axes[0].bar(range(n), n * [1])
        axes[0].errorbar([1], [n], [1])
        axes[0].legend()
        drawn.append({k: len(getattr(axes[0], k)) for k in ("lines", "patches", "containers")})
        drawn[-1]["top"] = axes[0].dataLim.y1
        if n == 13:
            raise ValueError("<b>no thirteen</b>\nreally")
        return f"{n} < 100"

    drawn = []
    box = widgets.explore(draw, {"n": W.IntSlider(5, 0, 20, description="n")})
    box.drawn = drawn
    return box


def test_a_picture_is_drawn_at_once_and_at_each_change(box):
    first = picture(box)
    assert first.startswith(b"\x89PNG") and line(box) == "5 &lt; 100"
    controls(box)["n"].value = 6
    assert picture(box) != first and line(box) == "6 &lt; 100"


def test_what_was_drawn_before_is_gone(box):
    for n in (20, 5):
        controls(box)["n"].value = n
    assert box.drawn[0] == box.drawn[-1] and box.drawn[0]["top"] == 6


def test_an_error_is_one_line_in_the_widget_and_goes_with_the_next_change(box):
    controls(box)["n"].value = 13
    assert "ValueError: &lt;b&gt;no thirteen&lt;/b&gt;</span>" in line(box)
    assert 'role="alert"' in line(box) and plots.COLOURS[1] in line(box)
    assert box.children[0].children[1].layout.visibility == "hidden"
    controls(box)["n"].value = 4
    assert picture(box) and line(box) == "4 &lt; 100"


def test_changes_from_two_threads_are_drawn_one_after_the_other():
    def draw(axes, a, b):
        drawing.append(True)
        together.append(len(drawing))
        time.sleep(0.05)
        drawing.pop()
        return f"{a} {b}"

    drawing, together = [], []
    box = widgets.explore(draw, {k: W.IntSlider(description=k) for k in "ab"})
    own = controls(box)
    threads = [threading.Thread(target=setattr, args=(own[k], "value", 9)) for k in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1, 1, 1] and line(box) == "9 9"


def test_the_notebooks_own_style_is_left_alone(box):
    before = dict(matplotlib.rcParams)
    controls(box)["n"].value = 7
    assert dict(matplotlib.rcParams) == before


# --- the pad ------------------------------------------------------------------------------------


def send(pad, event, *points):
    """What the page sends when something happens on the canvas."""
    content = {"event": event, "touches": [{"x": x, "y": y} for x, y in points]}
    if points:
        content |= {"x": points[0][0], "y": points[0][1]}
    pad.canvas._handle_frontend_event(None, content, [])


def test_a_stroke_is_what_lies_between_press_and_release():
    pad = widgets.Pad()
    send(pad, "mouse_move", (5, 5))  # hovers
    for event, at in (("down", (10, 20)), ("move", (30, 40)), ("up", (30, 40)), ("move", (9, 9))):
        send(pad, f"mouse_{event}", at)
    stroke = ((10, 20), (10, 20), (30, 40))  # a dot too has a length of 0
    assert pad.value == (stroke,)
    for event, points in (("start", [(1, 2), (7, 7)]), ("move", [(3, 4)]), ("end", [])):
        send(pad, f"touch_{event}", *points)
    assert pad.value == (stroke, ((1, 2), (1, 2), (3, 4)))
    send(pad, "mouse_down", (10, 20))
    pad.clear()
    send(pad, "mouse_up", (10, 20))
    assert pad.value == ()


def test_ink_is_as_wide_as_the_pen_and_round_at_its_ends():
    side = 112
    scale, pen = side / widgets.SIDE, widgets.PEN
    drawn = widgets.ink((((80, 60), (200, 60)), ((80, 220), (80, 220))), side)
    area = (2 * pen * 120 + 2 * math.pi * pen**2) * scale**2
    assert drawn.shape == (side, side) and drawn.max() == 1
    assert drawn.sum().item() == pytest.approx(area, rel=0.02)
    row, column = drawn[: side // 2].nonzero().float().add(0.5).mean(0) / scale
    assert (row.item(), column.item()) == (pytest.approx(60, abs=0.5), pytest.approx(140, abs=0.5))


ONE = (((150, 50), (140, 140), (130, 230)),)


def test_the_pad_shows_what_each_model_takes_a_drawing_for():
    box = widgets.draw_pad(["cnn-8k", "dense-8k"])
    assert line(box) == "Draw a digit, large."
    empty, pad = picture(box), controls(box)["pad"]
    pad.value = ONE
    assert "cnn-8k: 1, dense-8k: 1" in line(box) and picture(box) != empty
    pad.clear()
    assert line(box) == "Draw a digit, large." and picture(box) == empty


def test_probabilities_are_those_of_the_model_on_normalised_pixels(mnist):
    net = ml.trained("dense-8k")
    found = widgets.read(mnist.val.images[0, 0] / 255, {"a": net})["a"]
    with torch.no_grad():
        torch.testing.assert_close(found, net(mnist.val[:1].inputs())[0].softmax(0))


def test_an_error_of_a_model_is_shown_on_the_pad(monkeypatch):
    box = widgets.draw_pad(["dense-8k"])
    monkeypatch.setattr(widgets, "predict", lambda *_: 1 / 0)
    controls(box)["pad"].value = ONE
    assert "ZeroDivisionError" in line(box)


def test_a_pad_without_weights_or_of_other_data_is_refused_before_it_is_shown(monkeypatch):
    with pytest.raises(ValueError, match="no weights"):
        widgets.draw_pad(["linear-8k"])
    other = {"shirts": ml.Recipe(model="dense-8k", data="fashion-mnist")}
    monkeypatch.setattr(ml.recipes, "RECIPES", other)
    with pytest.raises(ValueError, match="'shirts' reads fashion-mnist"):
        widgets.draw_pad(["shirts"])


# --- budget -------------------------------------------------------------------------------------


def test_a_net_is_counted_and_its_error_read_off_the_line():
    known = [ml.results("cnn-8k"), ml.results("cnn-68k")]
    params, text = widgets.appraise((12, 20, 16, 16), known)
    assert params == known[0].params == 7_942 and "736,336 multiply-accumulates" in text
    assert "interpolated on the line through 2 recorded" in text
    assert text.endswith(f"{100 * (1 - known[0].mean):.2f}%")  # two points lie on their line
    assert "extrapolated (a guess)" in widgets.appraise((4, 4), known)[1]


def test_the_line_goes_through_recorded_cnns_alone():
    names = {found.name for found in widgets.recorded_cnns()}
    assert {"cnn-8k", "cnn-68k"} <= names
    assert not names & {"dense-8k", "simplecnn-8k", "cnn-8k-resplit"}


def test_layers_beyond_the_depth_are_disabled_and_do_not_count():
    box = widgets.budget_explorer()
    assert line(box).startswith("7,942 parameters")
    own = controls(box)
    own["width 5"].value = 90  # is not a layer yet
    assert line(box).startswith("7,942 parameters")
    own["layers"].value = 3
    params = ml.models.count_parameters(ml.models.CNN((12, 20, 16)))
    assert line(box).startswith(f"{params:,} parameters")
    assert [own[f"width {i}"].disabled for i in (3, 4)] == [False, True]


# --- look inside --------------------------------------------------------------------------------


def test_what_a_token_takes_is_picked_from_the_maps():
    maps = torch.rand(3, 2, 5, 5).softmax(-1)
    for layer, head, token, expected in (
        (1, 0, 4, maps[1, 0, 4]),
        (2, "mean", 0, maps[2, :, 0].mean(0)),
        (0, 1, "mean", maps[0, 1].mean(0)),
        ("rollout", 1, 3, rollout(maps[None])[0, 3]),
    ):
        torch.testing.assert_close(widgets.taken(maps, layer, head, token), expected)


@pytest.mark.parametrize("name", ["vit-8k", "vit-38k"])  # with the mean; with a class token
def test_attention_of_any_token_block_and_head_is_drawn(name, images, monkeypatch):
    seen = {}
    monkeypatch.setattr(plots, "attention", lambda *args, **more: seen.update(more, args=args))
    model = ml.build(name)
    box, maps = widgets.attention_explorer(model, images), attention_maps(model, images)
    own, extra = controls(box), maps.shape[-1] - 49
    assert seen["asking"] is None and seen["args"][1].shape == (49,)
    own["image"].value, own["layer"].value, own["head"].value = 2, 1, 1
    own["token"].label = "1, 3"
    assert seen["asking"] == 10 and torch.equal(seen["args"][0], images[2, 0])
    torch.testing.assert_close(seen["args"][1], maps[2, 1, 1, 10 + extra, extra:])
    if extra:
        own["token"].label = "class"
        assert seen["asking"] is None
        torch.testing.assert_close(seen["args"][1], maps[2, 1, 1, 0, 1:])
    own["layer"].value = "rollout"
    assert own["head"].disabled and "Error" not in line(box)


def test_shares_settle_as_route_says():
    votes = torch.randn(3, 6, 4)
    shares = widgets.settle(votes, 4, scale=2.0)
    assert shares.shape == (4, 3, 6)
    torch.testing.assert_close(shares[0], torch.full((3, 6), 1 / 3))
    torch.testing.assert_close(shares[3], capsules.route(2 * votes[None], 4)[1][0])


def test_parts_of_a_whole_are_counted_at_the_round_chosen():
    agree = torch.tensor([1.0, 0.0]).expand(4, 2)
    votes = torch.stack((agree, -agree * torch.tensor([1, 1, -1, -1])[:, None])) * 2
    box = widgets.routing_explorer(votes)  # all votes for whole 0 agree, those for 1 do not
    own = controls(box)
    own["round"].value = 8
    assert line(box) == "After 8 round(s), 4 of 4 parts give most to whole 0." and picture(box)
    own["whole"].value = 1
    assert "0 of 4 parts give most to whole 1" in line(box)


def test_a_pose_that_is_not_moved_changes_nothing_and_a_moved_one_is_drawn(images):
    torch.manual_seed(0)
    net = ml.models.EfficientCapsNet(((4, 5, 2), (8, 3, 2)), 4, 4, padded=True, decoder=(8,))
    box = widgets.capsule_explorer(net, images[:1])
    assert not net.training and "pixels change by 0.0%" in line(box)
    before = picture(box)
    controls(box)["moved by"].value = 0.6
    assert "Number 0 moved by +0.60" in line(box) and picture(box) != before
    assert controls(box)["number"].max == 3


def test_a_capsule_net_without_a_decoder_is_refused_before_it_is_shown(images):
    with pytest.raises(ValueError, match="no decoder"):
        widgets.capsule_explorer(ml.build("capsules-8k"), images[:1])


# --- the valley ---------------------------------------------------------------------------------


def test_sgd_walks_by_its_two_factors():
    path = widgets.walk("SGD", 0.03, 0.0, 20)
    factors = 1 - 0.03 * widgets.CURVATURE
    steps = torch.arange(21.0, dtype=torch.float64)[:, None]
    torch.testing.assert_close(path, widgets.START * factors**steps)


@pytest.mark.parametrize("optimizer", ["SGD", "Nesterov"])
@pytest.mark.parametrize("momentum", [0.3, 0.9])
def test_the_largest_rate_parts_walks_that_come_home_from_those_that_do_not(optimizer, momentum):
    limit = widgets.largest_rate(optimizer, momentum)
    for rate, home in ((0.97 * limit, True), (1.03 * limit, False)):
        path = widgets.walk(optimizer, rate, momentum, 400)
        assert (widgets.valley(path[-1]) < widgets.valley(widgets.START)) == home


def test_the_playground_walks_with_what_is_chosen_and_shows_what_torch_refuses():
    box = widgets.learning_rate_playground()
    own = controls(box)
    own["momentum"].value = 0.9
    assert "SGD: stable below a rate of 0.152" in line(box)
    own["optimiser"].value = "Adam"
    end = widgets.valley(widgets.walk("Adam", own["rate"].value, 0.9, own["steps"].value)[-1])
    assert f"f = {end:.2g}. Adam: no largest stable rate." in line(box)
    own["optimiser"].value, own["momentum"].value = "Nesterov", 0.0
    assert "ValueError: Nesterov momentum requires a momentum" in line(box)
