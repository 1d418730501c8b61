"""The results page: every record stands in its table, which sorts and filters in a browser, and
what may be compared in its chart, which zooms."""

import json
import math
import re
from html.parser import HTMLParser

import mnistlab as ml
import pytest
from mnistlab import cli, runs
from test_site import RESIZE, SCROLL, Page

pytestmark = pytest.mark.timeout(900)  # axe reads a long page for minutes on a slow machine

PAGE = "book/results.html"
OURS = (
    "sortable/sortable.min.js",
    "results/results.js",
    "results/results.css",
    "results/explorer.js",
)
LIBRARY = "results/plotly-basic-4.1.1.min.js"
READY = ".explorer[data-state=ready]"


class Table(HTMLParser):
    """The rows of the table by their anchors, each a list of its cells' texts."""

    def __init__(self, text: str):
        super().__init__()
        self.head, self.rows, self.cells, self.inside = [], {}, None, False
        self.feed(text[text.index('<table class="table sortable') :].partition("</table>")[0])

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            name = dict(attributes).get("id")
            self.cells = self.head if name is None else self.rows.setdefault(name, [])
        elif tag in ("td", "th"):
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data.strip()


@pytest.fixture(scope="module")
def rows(site) -> dict[str, dict[str, str]]:
    """Name of a recipe -> title of a column -> text of the cell."""
    table = Table((site / PAGE).read_text())
    return {name: dict(zip(table.head, row, strict=True)) for name, row in table.rows.items()}


@pytest.fixture(scope="module")
def explorer(site) -> dict:
    """What the page tells the chart."""
    inside = re.search('<script type="application/json">(.*?)</script>', (site / PAGE).read_text())
    return json.loads(inside[1])


def recorded() -> dict[str, ml.Results]:
    """What a chart may draw."""
    found = {name: ml.results(name) for name in runs.recorded()}
    return {name: known for name, known in found.items() if known.n >= 3 and known.mean > 0.5}


def resplit(known: ml.Results) -> bool:
    return bool(known.records[0]["recipe"].get("resplit"))


# --- the page as it is built --------------------------------------------------------------------


def test_every_recorded_recipe_has_a_row_with_its_numbers(rows):
    assert sorted(rows) == runs.recorded()
    for name, row in rows.items():
        known = ml.results(name)
        low, high = (f"{100 * end:.2f}" for end in known.interval)
        several = known.n > 1
        assert row["recipe"] == name
        assert row["family"] == cli.summary(known)["family"]
        assert row["parameters"] == f"{known.params:,}"
        assert row["MACs"] == f"{known.macs:,}"
        assert row["epochs"] == str(known.records[0]["epochs"])
        assert row["n"] == str(known.n)
        assert row["mean, %"] == f"{100 * known.mean:.2f}"
        assert row["sd"] == (f"{100 * known.sd:.2f}" if several else "")
        learnt = known.mean > 0.5
        assert row["95% interval"] == (f"{low} to {high}" if several and learnt else "")
        assert ("did not learn" in row["notes"]) == (not learnt)
        seeds = known.n + len(known.diverged)
        assert row["command"] == f"mnistlab train {name} --seeds {seeds}"
        assert ("diverged" in row["notes"]) == bool(known.diverged)


def test_what_the_sources_state_stands_beside_the_records(site):
    text = (site / PAGE).read_text()
    table = text[text.index('id="what-the-sources-state"') :].partition("</table>")[0]
    plain = [re.sub("<[^>]*>", "", f"<{row}".replace("</td>", "|")) for row in table.split("<tr")]
    body = [[cell.strip() for cell in row.split("|")[:-1]] for row in plain[2:]]
    assert len(body) >= 10
    for name, stated, ours, n, verdict, _ in body:
        known, figure = ml.results(name), float(stated.split()[-1])
        assert (int(n), float(ours.split()[0])) == (known.n, round(100 * known.mean, 2))
        low, high = (100 * end for end in known.interval)
        if known.n == 1:
            assert "a try" in verdict
        elif min(known.values) < 0.5:
            assert "did not learn" in verdict
        else:
            assert ("higher" in verdict, "lower" in verdict) == (low > figure, high < figure)


def test_notes_name_what_sets_a_recipe_apart(rows):
    for name, row in rows.items():
        recipe = ml.results(name).records[0]["recipe"]
        assert ("try" in row["notes"]) == (row["n"] == "1")
        assert ("views" in row["notes"]) == bool(recipe.get("tta"))
        assert ("averaged" in row["notes"]) == bool(recipe["ema"] or recipe.get("swa_epochs"))
        assert ("split anew" in row["notes"]) == bool(recipe.get("resplit"))


def test_chart_is_described_by_its_numbers(site):
    images = re.findall("<img [^>]*>", (site / PAGE).read_text())
    alt = re.search('alt="([^"]*)"', next(image for image in images if "results.svg" in image))[1]
    drawn = [known for known in recorded().values() if not resplit(known)]
    best = max(drawn, key=lambda known: known.mean)
    assert f"{len(drawn)} recipes" in alt
    assert f"{best.name} ({100 * (1 - best.mean):.2f}%)" in alt


def test_every_drawn_recipe_is_in_the_chart_with_its_numbers(explorer, rows):
    points, times = {point["name"]: point for point in explorer["recipes"]}, runs.speeds()
    assert set(points) == set(recorded())
    for name, known in recorded().items():
        point, recipe = points[name], known.records[0]["recipe"]
        assert (point["params"], point["macs"], point["n"]) == (known.params, known.macs, known.n)
        assert (point["mean"], point["sd"]) == (known.mean, known.sd)
        assert (point["low"], point["high"]) == known.interval
        assert point["bytes"] == math.ceil(bits(known) * known.params / 8)
        assert point["time"] == times.get(recipe["model"])
        assert point["images"].startswith(recipe["data"])
        assert ("split anew" in point["images"]) == resplit(known)
        told = {key: point[key] for key in ("family", "notes", "command")}
        assert told == {key: rows[name][key] for key in told}


def test_no_two_families_look_alike(explorer):
    looks = {name: (look["colour"], look["symbol"]) for name, look in explorer["looks"].items()}
    assert set(looks) == {point["family"] for point in explorer["recipes"]}
    assert len(set(looks.values())) == len(looks)
    assert {colour for colour, _ in looks.values()} <= set(ml.plots.COLOURS)


def test_no_other_page_loads_what_the_table_and_the_chart_need(site):
    assert all((site / part).is_file() for part in (*OURS, LIBRARY))
    loads = {}
    for path in site.rglob("*.html"):
        links = " ".join(Page(path.read_text()).links)
        loads[str(path.relative_to(site))] = [part for part in OURS if part in links]
    assert set(loads.pop(PAGE)) == set(OURS)
    assert [page for page, found in loads.items() if found] == []


# --- the page in a browser ----------------------------------------------------------------------


NAMES = """[...document.querySelectorAll(".results tbody tr")]
    .filter(row => row.getClientRects().length).map(row => row.id)"""


PICTURE = "figure img[src*=results]"


def click(tab, title: str) -> list[str]:
    """Click the heading, and read the recipes in their new order."""
    tab.get_by_role("button", name=title, exact=True).click()
    tab.wait_for_timeout(50)  # it sorts a moment later
    return tab.evaluate(NAMES)


@pytest.mark.parametrize(
    ("title", "value"),
    [
        ("mean, %", lambda known: known.mean),
        ("sd", lambda known: known.sd),
        ("MACs", lambda known: known.macs),
    ],
)
def test_a_click_on_a_heading_sorts_and_another_turns_the_order(open_page, title, value):
    tab, _ = open_page(PAGE)
    values = {name: value(ml.results(name)) for name in runs.recorded()}
    for way in ("ascending", "descending"):
        order = [values[name] for name in click(tab, title)]
        numbers = sorted(filter(math.isfinite, values.values()), reverse=way == "descending")
        assert order[: len(numbers)] == numbers  # and the blanks after them
        assert len(order) == len(values)
        sorted_by = tab.locator(".results th[aria-sort]")
        assert sorted_by.count() == 1
        assert sorted_by.inner_text() == title
        assert sorted_by.get_attribute("aria-sort") == way


def test_the_keyboard_sorts_too(open_page):
    tab, _ = open_page(PAGE)
    tab.get_by_role("button", name="recipe", exact=True).focus()
    tab.keyboard.press("Enter")
    tab.wait_for_timeout(50)
    assert tab.evaluate(NAMES) == sorted(runs.recorded())


def test_the_first_order_is_by_parameters(open_page):
    tab, _ = open_page(PAGE)
    sizes = [ml.results(name).params for name in tab.evaluate(NAMES)]
    assert sizes == sorted(sizes)
    assert tab.locator(".results th[aria-sort=ascending]").inner_text() == "parameters"


def test_typing_filters_and_sorting_keeps_the_filter(open_page, rows):
    tab, _ = open_page(PAGE)
    every, box = runs.recorded(), tab.get_by_label("Filter")
    status = tab.locator(".results [role=status]")
    assert status.inner_text() == f"{len(every)} of {len(every)} recipes"
    box.press_sequentially("68K dense")
    said = {name: " ".join(row.values()).lower() for name, row in rows.items()}
    wanted = {name for name, text in said.items() if "68k" in text and "dense" in text}
    assert 0 < len(wanted) < len(every)
    assert set(tab.evaluate(NAMES)) == wanted
    assert status.inner_text() == f"{len(wanted)} of {len(every)} recipes"
    assert set(click(tab, "mean, %")) == wanted
    box.fill("no such recipe")
    assert tab.evaluate(NAMES) == []
    box.fill("")
    assert sorted(tab.evaluate(NAMES)) == every


def test_without_scripts_the_table_is_whole_and_the_picture_there(browser, base):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(base + PAGE)
    assert tab.locator(".results tbody tr:visible").count() == len(runs.recorded())
    assert not tab.get_by_label("Filter").is_visible()  # it would do nothing
    assert tab.locator(PICTURE).is_visible()
    assert not tab.locator(".explorer").is_visible()
    context.close()


def test_an_address_leads_to_a_row(open_page):
    tab, _ = open_page(f"{PAGE}#cnn-8k")
    box = tab.locator("#cnn-8k").bounding_box()
    assert 50 < box["y"] < 800  # in sight, below the bar at the top


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_use_is_accessible_and_the_table_scrolls_by_itself(
    open_page, base, width, scheme
):
    from axe_playwright_python.sync_playwright import Axe

    tab, log = open_page(PAGE, width, scheme)
    tab.wait_for_selector(READY)
    click(tab, "mean, %")
    tab.get_by_label("Filter").fill("cnn")
    tab.wait_for_timeout(RESIZE)
    found = Axe().run(tab, options={"preload": False}).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    assert tab.evaluate(SCROLL) <= 0
    table = ".results .pst-scrollable-table-container"
    assert tab.evaluate(f"(t => t.scrollWidth > t.clientWidth)(document.querySelector('{table}'))")
    assert [url for url in log.requests if not url.startswith((base, "data:", "blob:"))] == []
    assert {base + part for part in (*OURS, LIBRARY)} <= {
        url.partition("?")[0] for url in log.requests
    }
    assert log.failures + log.errors == []


# --- the chart in a browser ---------------------------------------------------------------------

POINTS = """() => Object.fromEntries(document.querySelector(".explorer-plot").data
    .filter((trace) => trace.name !== "frontier")
    .flatMap((t) => t.customdata.map((name, i) => [name, {
        x: t.x[i], y: t.y[i], family: t.name, text: t.hovertext[i],
        low: t.y[i] - t.error_y.arrayminus[i], high: t.y[i] + t.error_y.array[i] }])))"""
EDGE = "document.querySelector('.explorer-plot').data.find((t) => t.name === 'frontier').y"
RANGES = (
    "['xaxis', 'yaxis'].map((a) => [...document.querySelector('.explorer-plot').layout[a].range])"
)
CHOICES = {"across": "params", "scale": "logarithmic", "images": "mnist"}


@pytest.fixture(scope="module")
def opened(open_page):
    tab, _ = open_page(PAGE)
    tab.wait_for_selector(READY)
    return tab


@pytest.fixture
def chart(opened):
    """The page, its chart as at first."""
    opened.click(".explorer button[name=all]")
    for name, value in CHOICES.items():
        opened.select_option(f".explorer [name={name}]", value)
    show(opened)
    return opened


def only(tab, family: str):
    tab.click(".explorer button[name=none]")
    tab.get_by_label(family, exact=True).check()


def show(tab):
    place = "{block: 'center', behavior: 'instant'}"
    tab.evaluate(f"document.querySelector('.explorer-plot').scrollIntoView({place})")


def middle(locator) -> tuple[float, float]:
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def bits(known: ml.Results) -> int:
    return known.records[0]["recipe"].get("weight_bits") or 32  # of a weight


def beaten_by_none(known: list[ml.Results], value) -> list[float]:
    """Errors, in percent, of those that nothing smaller beats, from small to large."""
    best = []
    for one in sorted(known, key=lambda one: (value(one), -one.mean)):
        if not best or 100 * (1 - one.mean) < best[-1]:
            best.append(100 * (1 - one.mean))
    return best


@pytest.mark.parametrize(
    ("axis", "value"),
    [
        ("params", lambda known: known.params),
        ("macs", lambda known: known.macs),
        ("bytes", lambda k: math.ceil(bits(k) * k.params / 8)),
        ("time", lambda known: runs.speeds().get(known.model)),
    ],
)
def test_the_axis_moves_the_points(chart, axis, value):
    chart.select_option(".explorer [name=across]", axis)
    points = chart.evaluate(POINTS)
    known = {name: one for name, one in recorded().items() if not resplit(one) and value(one)}
    assert set(points) == set(known)
    for name, point in points.items():
        alone = [value(one) for one in known.values()].count(value(known[name])) == 1
        close = 1e-9 if alone else 0.042  # of one size: side by side
        low, high = known[name].interval
        assert point["x"] == pytest.approx(value(known[name]), rel=close)
        assert point["y"] == pytest.approx(100 * (1 - known[name].mean))
        assert point["low"] == pytest.approx(100 * (1 - high))
        assert point["high"] == pytest.approx(100 * (1 - low))
    assert chart.evaluate(EDGE) == pytest.approx(beaten_by_none(list(known.values()), value))


def test_other_test_images_stand_alone(chart, explorer):
    for images in {point["images"] for point in explorer["recipes"]}:
        chart.select_option(".explorer [name=images]", images)
        wanted = {p["name"] for p in explorer["recipes"] if p["images"] == images}
        assert set(chart.evaluate(POINTS)) == wanted
        status = chart.locator(".explorer [role=status]")
        assert status.inner_text() == f"{len(wanted)} of {len(wanted)} recipes"


def test_families_are_hidden_and_the_line_follows(chart):
    before = chart.evaluate(RANGES)
    only(chart, "Dense")
    dense = {name: known for name, known in recorded().items() if name.startswith("dense")}
    points = chart.evaluate(POINTS)
    assert set(points) == set(dense)
    assert {point["family"] for point in points.values()} == {"Dense"}
    found = beaten_by_none(list(dense.values()), lambda known: known.params)
    assert chart.evaluate(EDGE) == pytest.approx(found)
    assert chart.evaluate(RANGES) == before  # the rest stays where it was
    chart.click(".explorer button[name=none]")
    assert chart.evaluate(POINTS) == {}
    chart.select_option(".explorer [name=across]", "macs")  # with nothing to fit


def test_the_mouse_reads_a_point_and_a_click_leads_to_its_row(chart):
    for name, point in chart.evaluate(POINTS).items():
        known = ml.results(name)
        said = [name, f"n = {known.n}", f"± {100 * known.sd:.2f}%", f"{known.params:,} parameters"]
        said.append(f"mnistlab train {name} --seeds {known.n + len(known.diverged)}")
        assert [text for text in said if text not in point["text"]] == []
    only(chart, "Dense")
    chart.get_by_label("Filter").fill("no such recipe")
    show(chart)
    chart.mouse.move(*middle(chart.locator(".explorer .point").first), steps=3)
    label = chart.locator(".explorer .hovertext").text_content()
    name = re.search(r"mnistlab train (\S+)", label)[1]
    assert ml.results(name).records and f"n = {ml.results(name).n}" in label
    chart.mouse.down()
    chart.mouse.up()
    chart.wait_for_url(f"**#{name}")
    chart.wait_for_function(
        f"Math.abs(document.getElementById('{name}').getBoundingClientRect().top - 250) < 200"
    )
    assert chart.locator(f"[id='{name}'] a").evaluate("link => link === document.activeElement")


def test_buttons_and_the_mouse_zoom_and_all_comes_back(chart):
    def sizes():
        return [high - low for low, high in chart.evaluate(RANGES)]

    whole, all_of_it = chart.evaluate(RANGES), sizes()
    chart.get_by_label("Zoom in").press("Enter")
    assert all(now < before for now, before in zip(sizes(), all_of_it, strict=True))
    chart.get_by_label("Zoom out").press("Enter")
    assert sizes() == pytest.approx(all_of_it)
    chart.get_by_label("Move right").press("Enter")
    chart.get_by_label("Move down").press("Enter")
    (left, _), (floor, _) = chart.evaluate(RANGES)
    assert left > whole[0][0] and floor < whole[1][0]
    chart.get_by_text("Reset view").press("Enter")
    assert chart.evaluate(RANGES) == whole

    x, y = middle(chart.locator(".explorer .nsewdrag"))
    chart.mouse.move(x, y)
    chart.mouse.down()
    chart.mouse.move(x + 100, y + 100, steps=4)
    chart.mouse.up()
    chart.wait_for_function(
        f"JSON.stringify({RANGES}) !== '{json.dumps(whole)}'.replaceAll(' ', '')"
    )
    assert all(now < before / 2 for now, before in zip(sizes(), all_of_it, strict=True))
    chart.mouse.dblclick(x, y)
    chart.wait_for_function(
        f"JSON.stringify({RANGES}) === '{json.dumps(whole)}'.replaceAll(' ', '')"
    )


def test_the_error_may_be_linear(chart):
    chart.select_option(".explorer [name=scale]", "linear")
    floor, top = chart.evaluate(RANGES)[1]
    assert floor == 0
    assert top > max(point["high"] for point in chart.evaluate(POINTS).values())


def test_the_chart_follows_the_colour_scheme(chart):
    ink = "document.querySelector('.explorer-plot').layout.font.color"
    light = chart.evaluate(ink)
    chart.emulate_media(color_scheme="dark")
    chart.wait_for_function(f"{ink} !== '{light}'")
    chart.emulate_media(color_scheme="light")
    chart.wait_for_function(f"{ink} === '{light}'")


def test_a_finger_reads_at_the_first_tap_and_goes_at_the_second(browser, base, explorer):
    size = {"width": 390, "height": 800}
    context = browser.new_context(viewport=size, has_touch=True, is_mobile=True)
    tab = context.new_page()
    tab.goto(base + PAGE)
    tab.wait_for_selector(READY)
    known = [one for one in explorer["recipes"] if one["images"] == "mnist"]
    family = max(known, key=lambda one: len(one["name"]))["family"]
    # Taps: a mouse would stay where it clicked, and leave the point when the page scrolls.
    tab.locator(".explorer button[name=none]").tap()
    tab.get_by_label(family, exact=True).tap()
    show(tab)
    place = middle(tab.locator(".explorer .point").first)
    tab.touchscreen.tap(*place)
    label = tab.locator(".explorer .hovertext")
    said, box = label.text_content(), label.bounding_box()
    assert "tap again" in said
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    tab.wait_for_timeout(700)  # browsers tell of a tap twice
    assert "#" not in tab.url
    tab.touchscreen.tap(*place)
    tab.wait_for_url("**#" + re.search(r"mnistlab train (\S+)", said)[1])
    context.close()


def test_without_the_library_the_picture_stays_and_a_line_says_so(browser, base):
    context = browser.new_context()
    tab = context.new_page()
    tab.route(f"**/{LIBRARY}", lambda route: route.abort())
    tab.goto(base + PAGE)
    tab.wait_for_selector(".explorer[data-state=failed]", state="attached")
    assert "could not be loaded" in tab.locator(".explorer-message").inner_text()
    assert tab.locator(PICTURE).is_visible()
    assert not tab.locator(".explorer").is_visible()
    context.close()


def test_chart_and_table_work_in_a_page_opened_as_a_file(browser, site):
    context = browser.new_context()
    tab = context.new_page()
    tab.goto((site / PAGE).as_uri())
    tab.wait_for_selector(READY)
    assert tab.locator(".explorer .point").count() > 5
    assert not tab.locator(PICTURE).is_visible()
    assert set(click(tab, "recipe")) == set(runs.recorded())
    assert tab.get_by_label("Filter").is_visible()
    context.close()
