"""The results page: every record stands in its table, which sorts and filters in a browser."""

import math
import re
from html.parser import HTMLParser

import mnistlab as ml
import pytest
from mnistlab import cli, runs
from test_site import RESIZE, SCROLL, Page

pytestmark = pytest.mark.timeout(900)  # axe reads a long page for minutes on a slow machine

PAGE = "book/results.html"
OURS = ("sortable/sortable.min.js", "results/results.js", "results/results.css")


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
    drawn = [
        known
        for known in map(ml.results, runs.recorded())
        if known.n >= 3 and known.mean > 0.5 and not known.records[0]["recipe"].get("resplit")
    ]
    best = max(drawn, key=lambda known: known.mean)
    assert f"{len(drawn)} recipes" in alt
    assert f"{best.name} ({100 * (1 - best.mean):.2f}%)" in alt


def test_no_other_page_loads_what_the_table_needs(site):
    assert all((site / part).is_file() for part in OURS)
    loads = {}
    for path in site.rglob("*.html"):
        links = " ".join(Page(path.read_text()).links)
        loads[str(path.relative_to(site))] = [part for part in OURS if part in links]
    assert set(loads.pop(PAGE)) == set(OURS)
    assert [page for page, found in loads.items() if found] == []


# --- the page in a browser ----------------------------------------------------------------------


NAMES = """[...document.querySelectorAll(".results tbody tr")]
    .filter(row => row.getClientRects().length).map(row => row.id)"""


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


def test_without_scripts_the_table_is_whole(browser, base):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(base + PAGE)
    assert tab.locator(".results tbody tr:visible").count() == len(runs.recorded())
    assert not tab.get_by_label("Filter").is_visible()  # it would do nothing
    context.close()


def test_an_address_leads_to_a_row(open_page):
    tab, _ = open_page(f"{PAGE}#cnn-8k")
    box = tab.locator("#cnn-8k").bounding_box()
    assert 50 < box["y"] < 800  # in sight, below the bar at the top


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_table_in_use_is_accessible_and_scrolls_by_itself(open_page, base, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    tab, log = open_page(PAGE, width, scheme)
    click(tab, "mean, %")
    tab.get_by_label("Filter").fill("cnn")
    tab.wait_for_timeout(RESIZE)
    found = Axe().run(tab, options={"preload": False}).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    assert tab.evaluate(SCROLL) <= 0
    table = ".results .pst-scrollable-table-container"
    assert tab.evaluate(f"(t => t.scrollWidth > t.clientWidth)(document.querySelector('{table}'))")
    assert [url for url in log.requests if not url.startswith((base, "data:", "blob:"))] == []
    assert {base + part for part in OURS} <= {url.partition("?")[0] for url in log.requests}
    assert log.failures + log.errors == []
