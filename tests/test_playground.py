"""The playground, used as a visitor would; and its parts, held to numpy, scipy and torch."""

import re

import mnistlab as ml
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

pytestmark = pytest.mark.timeout(900)

pytest.importorskip("jupyter_book", reason="the site needs the `book` extra")

PAGE = "book/playground.html"
IMPORT = "const load = (name) => import(new URL(`../playground/${name}.mjs`, location.href).href);"


@pytest.fixture(scope="module")
def opened(open_page):
    """The page, with its models; and its log."""
    tab, log = open_page(PAGE)
    tab.wait_for_selector("#playground[data-state=ready]", timeout=120_000)
    return tab, log


@pytest.fixture
def tab(opened):
    tab, _ = opened
    if tab.locator("#pg-clear").is_enabled():
        tab.click("#pg-clear")
    tab.click("#pg-sliders button")  # reset
    tab.wait_for_function("document.getElementById('pg-digit').textContent === '?'")
    return tab


def stroke(tab, *points):
    """Draw a line through points, in shares of the pad's side."""
    tab.locator("#pg-pad").scroll_into_view_if_needed()
    box = tab.locator("#pg-pad").bounding_box()
    for i, (x, y) in enumerate(points):
        tab.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if i == 0:
            tab.mouse.down()
    tab.mouse.up()


def seven(tab):
    stroke(tab, (0.25, 0.2), (0.75, 0.2), (0.45, 0.85))
    tab.wait_for_function("document.getElementById('pg-digit').textContent !== '?'")
    tab.wait_for_selector("#pg-rows > div", timeout=60_000)


# --- the pixels ---------------------------------------------------------------------------------


def reference(ink: np.ndarray) -> np.ndarray:
    """MNIST's own procedure: the box of the ink to 20 pixels, each the mean of what it covers;
    then whole pixels, until the centre of mass rounds to (14, 14)."""
    left, top, right, bottom = Image.fromarray(ink).getbbox()
    box = ink[top:bottom, left:right].astype(float)
    for axis in (0, 1):
        size = max(1, round(box.shape[axis] * 20 / max(bottom - top, right - left)))
        fine = np.repeat(box, size, axis)  # so that each new pixel is a whole number of these
        shape = (*box.shape[:axis], size, -1, *box.shape[axis + 1 :])
        box = fine.reshape(shape).mean(axis + 1)
    y, x = ndimage.center_of_mass(box)
    image, (height, width) = np.zeros((28, 28)), box.shape
    top, left = 14 - int(y + 0.5), 14 - int(x + 0.5)
    image[top : top + height, left : left + width] = box
    return image


def scribble(seed: int) -> np.ndarray:
    """A pad of 280x280 bytes with one bent line, smooth at its edges."""
    draw = np.random.default_rng(seed)
    image = Image.new("L", (1120, 1120))
    points = [tuple(point) for point in draw.integers(150, 970, (5, 2)).tolist()]
    ImageDraw.Draw(image).line(points, 255, int(draw.integers(40, 110)), "curve")
    return np.asarray(image.resize((280, 280), Image.Resampling.BOX))


def normalised(tab, pads: list[np.ndarray]) -> np.ndarray:
    side = len(pads[0])
    script = f"""async ([pads, side]) => {{ {IMPORT}
        const {{ normalise }} = await load("normalise");
        return pads.map((pad) => [...normalise(Uint8Array.from(pad), side, side)]) }}"""
    given = tab.evaluate(script, [[pad.ravel().tolist() for pad in pads], side])
    return np.array(given).reshape(-1, 28, 28)


def test_strokes_are_normalised_by_the_original_procedure(opened):
    pads = [scribble(seed) for seed in range(6)]
    for ours, pad in zip(normalised(opened[0], pads), pads, strict=True):
        assert abs(255 * ours - reference(pad)).max() < 0.51  # rounded to a byte


def test_an_enlarged_digit_of_mnist_comes_back_as_it_was(opened, mnist):
    digits = mnist.train.images[:25, 0].numpy()
    pads = [np.pad(np.kron(digit, np.ones((3, 3), np.uint8)), ((9, 0), (2, 7))) for digit in digits]
    assert (np.rint(255 * normalised(opened[0], pads)) == digits).all()


def test_no_ink_is_no_digit(opened):
    script = f"""async () => {{ {IMPORT}
        return (await load("normalise")).normalise(new Uint8Array(100), 10, 10) }}"""
    assert opened[0].evaluate(script) is None


@pytest.mark.parametrize(
    "settings", [{"rotate": 30}, {"scale": 0.7}, {"shift": 2.5, "rotate": -70, "scale": 1.3}]
)
def test_distortions_are_scipys(opened, mnist, settings):
    digit = mnist.train.images[3, 0].numpy() / 255
    script = f"""async ([pixels, settings]) => {{ {IMPORT}
        return [...(await load("distort")).distort(Float32Array.from(pixels), settings)] }}"""
    given = np.array(opened[0].evaluate(script, [digit.ravel().tolist(), settings]))
    angle, scale = np.radians(settings.get("rotate", 0)), settings.get("scale", 1)
    # Rows and columns: clockwise, as y points down.
    back = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    middle = np.array([13.5, 13.5])
    offset = middle - back @ (middle + np.array([0, settings.get("shift", 0)]))
    wanted = ndimage.affine_transform(digit, back, offset, order=1, mode="grid-constant")
    assert abs(given.reshape(28, 28) - wanted).max() < 1e-5


# --- the models ---------------------------------------------------------------------------------


def test_the_page_computes_what_torch_computes(opened, mnist):
    # A test of arithmetic, which chooses nothing: so test images may serve.
    digits = mnist.test[:100]
    script = f"""async (bytes) => {{ {IMPORT}
        const {{ models }} = await load("models");
        const pixels = Float32Array.from(bytes, (v) => v / 255);
        const given = {{}};
        for (const model of models) given[model.name] = [...(await model.run(pixels)).logits.data];
        return given }}"""
    given = opened[0].evaluate(script, digits.images.flatten().tolist())
    assert len(given) >= 5
    for name, logits in given.items():
        wanted = ml.predict(ml.trained(name), digits)
        assert torch.tensor(logits).view(100, 10).allclose(wanted, rtol=0, atol=1e-4), name


def test_a_drawn_digit_is_read_by_every_model(tab):
    seven(tab)
    cards = tab.locator(".pg-card")
    assert cards.count() == tab.evaluate("document.querySelectorAll('#pg-models > li').length")
    for card in cards.all():
        assert re.fullmatch(r"\d", card.locator(".pg-reads").inner_text())
        assert re.fullmatch(r"(over )?[\d.]+%", card.locator(".pg-sure").inner_text())
        assert re.fullmatch(r"[\d.]+ ms", card.locator(".pg-time").inner_text())
    assert tab.inner_text("#pg-digit") == "7"
    assert re.search("read a 7", tab.inner_text("#pg-verdict"))
    seen = "document.getElementById('pg-seen').getContext('2d').getImageData(0, 0, 28, 28).data"
    pixels = np.array(tab.evaluate(f"[...{seen}]")).reshape(28, 28, 4)[..., 0] / 255
    y, x = ndimage.center_of_mass(pixels)
    assert pixels.max() == 1 and abs(y - 14) < 0.51 and abs(x - 14) < 0.51


def test_those_that_differ_are_marked(tab):
    for sample in tab.locator("#pg-hard-ones button").all():
        sample.press("Enter")
        tab.wait_for_function("/label is/.test(document.getElementById('pg-verdict').textContent)")
        tab.wait_for_timeout(300)
        said = tab.inner_text("#pg-verdict")
        reads = tab.locator(".pg-reads").all_inner_texts()
        other = [read for read in reads if read != tab.inner_text("#pg-digit")]
        assert tab.locator(".pg-differs").count() == len(other)
        assert ("All" in said) == (not other)


def test_the_keyboard_reaches_samples_and_clear(tab):
    sample = tab.locator("#pg-clear-ones button").nth(4)
    sample.focus()
    tab.keyboard.press("Space")
    tab.wait_for_function("/label is 4/.test(document.getElementById('pg-verdict').textContent)")
    assert tab.inner_text("#pg-verdict").startswith("All")  # it is a clear one
    assert sample.get_attribute("aria-pressed") == "true"
    tab.locator("#pg-clear").press("Enter")
    assert tab.inner_text("#pg-digit") == "?"


def test_look_inside_shows_the_first_layer(tab):
    seven(tab)
    tab.select_option("#pg-which", "cnn-8k")
    tab.wait_for_function("document.querySelectorAll('#pg-maps canvas').length === 12")
    assert "first convolution" in tab.inner_text("#pg-inside-text")


def test_a_distortion_breaks_them_and_the_first_to_fail_is_on_top(tab):
    seven(tab)
    tab.select_option("#pg-way", "shift")
    tab.wait_for_function("/−12 px/.test(document.getElementById('pg-strip-text').textContent)")
    rows = tab.locator("#pg-rows > div")
    assert rows.count() == tab.locator(".pg-card").count()
    said = rows.locator("small").all_inner_texts()
    holds = [float(re.search(r"at ([\d.]+)", text)[1]) if "at" in text else 99 for text in said]
    assert holds == sorted(holds) and holds[0] < 12
    before = tab.locator(".pg-sure").all_inner_texts()
    tab.locator("#pg-shift").focus()
    for _ in range(8):
        tab.keyboard.press("ArrowRight")
    assert tab.inner_text("#pg-sliders output >> nth=1") == "4 px"
    tab.wait_for_timeout(500)
    assert tab.locator(".pg-sure").all_inner_texts() != before


# --- the site -----------------------------------------------------------------------------------


def test_nothing_leaves_the_host(opened, base):
    tab, log = opened
    seven(tab)
    assert any(url.endswith(".wasm") for url in log.requests)
    assert [url for url in log.requests if not url.startswith((base, "data:", "blob:"))] == []
    assert log.failures + log.errors == []


def test_other_pages_load_nothing_of_it(open_page):
    for page in ("book/index.html", "book/results.html"):
        _, log = open_page(page)
        assert [url for url in log.requests if "/playground/" in url or "onnx" in url] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_accessible_and_fits_with_a_digit_on_it(open_page, width):
    from axe_playwright_python.sync_playwright import Axe

    tab, _ = open_page(PAGE, width, "dark" if width == 390 else "light")
    tab.wait_for_selector("#playground[data-state=ready]", timeout=120_000)
    tab.locator("#pg-hard-ones button").first.click()
    tab.wait_for_selector("#pg-rows > div", timeout=60_000)
    options = {"preload": False}
    found = Axe().run(tab, context="#playground", options=options).response["violations"]
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found] == []
    scroll = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert tab.evaluate(scroll) <= 0


def test_the_pad_works_before_the_models_arrive(browser, base):
    context, held = browser.new_context(), []
    tab = context.new_page()
    tab.route("**/*.wasm", lambda route: held.append(route))
    tab.goto(base + PAGE)
    tab.wait_for_selector("#playground[data-state=loading]")
    tab.wait_for_function("document.getElementById('pg-message').textContent.startsWith('Load')")
    stroke(tab, (0.25, 0.2), (0.75, 0.2), (0.45, 0.85))
    seen = "document.getElementById('pg-seen').getContext('2d').getImageData(0, 0, 28, 28).data"
    assert max(tab.evaluate(f"[...{seen}].filter((_, i) => i % 4 === 0)")) == 255
    assert set(tab.locator(".pg-time").all_inner_texts()) == {"loading"}
    held[0].continue_()
    tab.wait_for_selector("#playground[data-state=ready]", timeout=120_000)
    tab.wait_for_function(
        "/^All|^[0-9]+ of/.test(document.getElementById('pg-verdict').textContent)"
    )
    context.close()


def test_a_browser_without_webassembly_is_told(browser, base):
    context = browser.new_context()
    context.add_init_script("delete window.WebAssembly")
    tab = context.new_page()
    tab.goto(base + PAGE)
    tab.wait_for_selector("#playground[data-state=failed]")
    assert "no WebAssembly" in tab.inner_text("#pg-message")
    context.close()


def test_a_missing_file_is_told(browser, base):
    context = browser.new_context()
    tab = context.new_page()
    tab.route("**/models/*.onnx*", lambda route: route.fulfill(status=404))
    tab.goto(base + PAGE)
    tab.wait_for_selector("#playground[data-state=failed]")
    assert re.search(r"could be loaded.*\.onnx.*404", tab.inner_text("#pg-message"))
    context.close()


def test_a_page_opened_as_a_file_says_what_to_do(browser, site):
    context = browser.new_context()
    tab = context.new_page()
    tab.goto((site / PAGE).as_uri())
    assert "python -m http.server" in tab.inner_text("#pg-message")
    context.close()
