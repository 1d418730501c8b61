"""The site: built from the stored outputs, then used in a browser as a reader would use it."""

import functools
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag, urljoin

import pytest

pytestmark = pytest.mark.timeout(900)  # axe reads a long page for minutes on a slow machine

pytest.importorskip("jupyter_book", reason="the site needs the `book` extra")

ROOT = Path(__file__).parent.parent
# In the order of the book; the names are read without YAML so that ids exist before the build.
DOCS = re.findall(r"^[ -]*(?:root|file): *(\S+)", (ROOT / "_toc.yml").read_text(), re.MULTILINE)
PAGES = [f"{doc}.html" for doc in DOCS] + ["search.html", "genindex.html", "404.html"]
BASE_URL = re.search(r"baseurl: *(\S+)", (ROOT / "_config.yml").read_text())[1]

# --- the build ----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, "index.html"])
def test_page_exists(site, page):
    assert (site / page).stat().st_size > 0


class Page(HTMLParser):
    """A page's anchors, its references to other files, and its images."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.images = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.update(attributes[key] for key in ("id", "name") if attributes.get(key))
        if tag in ("a", "link", "script", "img", "source", "iframe", "form"):
            values = (attributes.get(key) for key in ("href", "src", "action"))
            self.links.update(value for value in values if value)
        if tag == "img":
            self.images.append(attributes)


@pytest.fixture(scope="session")
def parsed(site) -> dict[str, Page]:
    paths = [p for p in site.rglob("*.html") if "_static" not in p.parts]  # templates lie there
    return {str(p.relative_to(site)): Page(p.read_text()) for p in paths}


def test_internal_links_resolve(site, parsed):
    dead = []
    for name, page in parsed.items():
        for link in page.links:
            target, anchor = urldefrag(urljoin(BASE_URL + name, link))
            if not target.startswith(BASE_URL):
                continue  # another site, or mailto:
            path = unquote(target.removeprefix(BASE_URL).partition("?")[0]) or "index.html"
            if not (site / path).is_file():
                dead.append(f"{name}: {link}")
            elif anchor and path in parsed and unquote(anchor) not in parsed[path].ids:
                dead.append(f"{name}: {link} (no such anchor)")
    assert not dead, "\n".join(dead)


def test_every_image_has_alt_text(parsed):
    bare = [
        f"{name}: {image.get('src')}"
        for name, page in parsed.items()
        for image in page.images
        if not (image.get("alt") or "").strip()
    ]
    assert not bare, "\n".join(bare)


def test_alt_text_is_not_a_file_name(parsed):
    # Sphinx puts the image's path where a notebook gives no alt text.
    named = [
        f"{name}: {image['alt']}"
        for name, page in parsed.items()
        for image in page.images
        if re.search(r"\.(png|svg|jpe?g)$", image.get("alt") or "")
    ]
    assert not named, "\n".join(named)


# --- the browser --------------------------------------------------------------------------------


SCROLL = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
TOO_WIDE = """[...document.querySelectorAll("body *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .map(e => e.outerHTML.slice(0, 90))"""
IMAGES = """[...document.querySelectorAll("article img")].map(e => {
    const style = getComputedStyle(e);
    return {src: e.src, background: style.backgroundColor, filter: style.filter,
            loaded: e.complete && e.naturalWidth > 0}})"""


@pytest.fixture(scope="module")
def visit(open_page):
    """visit(page): what one look at a page shows, light, dark and on a phone. One look each."""
    from axe_playwright_python.sync_playwright import Axe

    def issues(tab, mode, **options):
        asked = {"preload": False, "resultTypes": ["violations"], **options}
        found = Axe().run(tab, options=asked).response["violations"]
        return [
            f"{mode}: {v['id']} ({v['impact']}): {v['help']}: {node['html'][:160]}"
            for v in found
            if v["impact"] in ("serious", "critical")
            for node in v["nodes"]
            if not any(v["id"] == rule and part in node["html"] for rule, part in NOT_OURS)
        ]

    @functools.cache
    def visit(page: str) -> SimpleNamespace:
        tab, log = open_page(page)
        seen = SimpleNamespace(**{key: list(value) for key, value in vars(log).items()})
        seen.formulas = tab.locator("mjx-container").count()
        seen.bad_formulas = tab.locator("mjx-merror, [data-mjx-error]").count()
        tab.set_viewport_size({"width": 375, "height": 800})
        tab.wait_for_timeout(RESIZE)
        seen.overflow = tab.evaluate(SCROLL)
        seen.too_wide = tab.evaluate(TOO_WIDE) if seen.overflow > 0 else []
        tab.evaluate(UNWRAP_CODE)
        # Colours do not depend on the width.
        seen.issues = issues(tab, "phone", rules={"color-contrast": {"enabled": False}})
        tab.set_viewport_size({"width": 1280, "height": 900})
        tab.wait_for_timeout(RESIZE)
        seen.issues += issues(tab, "light")
        tab.emulate_media(color_scheme="dark")
        if tab.locator("html[data-theme]").count():  # 404.html has no theme to switch
            tab.wait_for_selector("html[data-theme=dark]")
        tab.wait_for_timeout(SETTLE)
        seen.issues += issues(tab, "dark", runOnly=["color-contrast", "link-in-text-block"])
        seen.images = tab.evaluate(IMAGES)
        tab.close()
        return seen

    return visit


# A chapter has thousands of pieces of code in some 25 colours, and each costs axe milliseconds:
# of a kind, the first keeps its element, and the others their text alone.
UNWRAP_CODE = """() => {
    const kinds = new Set(), place = ".cell_input, .cell_output, [class*=highlight-]";
    for (const piece of document.querySelectorAll(".highlight pre span")) {
        const kind = `${piece.className} in ${piece.closest(place)?.className}`;
        if (kinds.has(kind) && !piece.children.length) piece.replaceWith(piece.textContent);
        kinds.add(kind);
    }
    for (const code of document.querySelectorAll(".highlight pre")) code.normalize();
}"""

SETTLE = 200  # ms: colours fade, and axe would measure one on its way
RESIZE = 600  # ms: the theme makes what scrolls focusable, a while after a resize

# Serious by axe's rules, and not of our making: (rule, part of the element).
NOT_OURS = [
    # docutils writes bibliographies as a list of items with the role doc-biblioentry.
    ("aria-required-children", 'class="citation-list"'),
]


@pytest.mark.parametrize("page", PAGES)
def test_page_asks_no_other_host(visit, base, page):
    requests = visit(page).requests
    assert base + page in requests  # else the log is broken
    assert [url for url in requests if not url.startswith((base, "data:", "blob:"))] == []


@pytest.mark.parametrize("page", PAGES)
def test_page_loads_without_an_error(visit, page):
    seen = visit(page)
    troubles = seen.failures + seen.errors
    assert not troubles, "\n".join(troubles)


@pytest.mark.parametrize("page", PAGES)
def test_page_is_accessible(visit, page):
    issues = visit(page).issues
    assert not issues, "\n".join(issues)


@pytest.mark.parametrize("page", PAGES)
def test_page_never_scrolls_sideways_on_a_phone(visit, page):
    seen = visit(page)
    assert seen.overflow <= 0, "\n".join(seen.too_wide)


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_legible_in_the_dark(visit, page):
    # Their text is mid-grey: a light box behind it, or a filter, would make it hard to read.
    for image in visit(page).images:
        assert image["loaded"], image
        assert image["background"] == "rgba(0, 0, 0, 0)", image
        assert image["filter"] == "none", image


def test_home_page_shows_its_chart(visit):
    assert any("chart" in image["src"] for image in visit("book/index.html").images)


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_drawn_and_only_then_is_mathjax_loaded(visit, site, page):
    seen = visit(page)
    assert seen.bad_formulas == 0
    has_math = re.search('class="math ', (site / page).read_text()) is not None
    assert (seen.formulas > 0) == has_math
    assert any("mathjax" in url for url in seen.requests) == has_math


def test_protocol_has_formulas(visit):
    assert visit("book/protocol.html").formulas > 5


@pytest.mark.parametrize("width", [1280, 375])
def test_search_finds_a_word(open_page, width):
    tab, _ = open_page("book/index.html", width)
    tab.locator(".search-button__button:visible").first.click()
    tab.keyboard.type("stratified")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=stratified*")
    tab.wait_for_selector("#search-results li a[href*='book/glossary.html']")


def test_search_finds_nothing_for_no_word(open_page):
    tab, _ = open_page("search.html?q=qwertyzxcv")
    tab.wait_for_selector("#search-results p.search-summary:has-text('did not match')")
    assert tab.locator("#search-results li").count() == 0


def test_dark_mode_switch(open_page):
    tab, _ = open_page("book/index.html")
    background = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for _ in range(3):  # the button goes through auto, light and dark
        tab.locator(".theme-switch-button:visible").first.click()
        tab.wait_for_timeout(SETTLE)
        theme = tab.evaluate("document.documentElement.dataset.theme")
        seen[theme] = tab.evaluate(background)
    assert set(seen) == {"light", "dark"}
    assert brightness(seen["light"]) > 200 > 60 > brightness(seen["dark"])
    # The choice outlives the page.
    tab.locator(".theme-switch-button:visible").first.click()
    theme = tab.evaluate("document.documentElement.dataset.mode")
    tab.reload()
    assert tab.evaluate("document.documentElement.dataset.mode") == theme


def brightness(colour: str) -> float:
    """Mean of the channels of "rgb(r, g, b)", 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def sidebar_is_seen(tab) -> bool:
    link = tab.locator(".bd-sidebar-primary a:has-text('Glossary')").first
    return link.is_visible() and link.bounding_box()["x"] >= 0


@pytest.mark.parametrize(("width", "at_first"), [(1280, True), (375, False)])
def test_sidebar_button(open_page, width, at_first):
    tab, _ = open_page("book/protocol.html", width)
    assert sidebar_is_seen(tab) == at_first
    tab.locator(".primary-toggle:visible").first.click()
    tab.wait_for_timeout(600)  # it slides
    assert sidebar_is_seen(tab) != at_first
    if at_first:
        tab.locator(".primary-toggle:visible").first.click()
    else:
        tab.keyboard.press("Escape")
    tab.wait_for_timeout(600)
    assert sidebar_is_seen(tab) == at_first


def test_a_missing_page_leads_home(parsed):
    page = parsed["404.html"]  # served for any address, at any depth: nothing relative in it
    assert BASE_URL in page.links
    assert [link for link in page.links if not link.startswith((BASE_URL, "data:"))] == []
