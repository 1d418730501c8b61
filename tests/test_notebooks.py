"""The chapters' frame: what every notebook has, in which order, and how it is stored.

That its cells run and print what is stored is tested by `pytest --nbval notebooks`.
"""

import base64
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECTIONS = [
    *("Set-up", "Build it", "Train it", "Compare", "Look inside"),
    *("Exercises", "Recap", "Terms", "Check yourself", "Further reading"),
]
EXERCISES = ["Exercise 1: check", "Exercise 2: change", "Exercise 3: extend"]
MAX_WIDTH, MAX_LINES = 75, 25  # longer lines scroll sideways on the site


class Chapter:
    """A notebook: its cells, those of code, and its text."""

    def __init__(self, path: Path):
        self.path = path
        self.book = nbformat.read(path, as_version=4)
        self.cells = self.book.cells
        self.code = [c for c in self.cells if c.cell_type == "code"]
        self.text = "\n\n".join(c.source for c in self.cells if c.cell_type == "markdown")

    def headings(self, level: int) -> list[str]:
        return re.findall(rf"^#{{{level}}} (.+)$", self.text, re.M)

    def parts(self) -> Iterator:
        """Cells of code, and pieces of text, each of which has one heading at most, at its top."""
        for cell in self.cells:
            if cell.cell_type == "code":
                yield cell
            else:
                yield from re.split(r"^(?=#+ )", cell.source, flags=re.M)

    def section(self, title: str, level: int = 2) -> tuple[str, list]:
        """Text and cells of code from this heading to the next of its level or above."""
        text, code, inside = [], [], False
        for part in self.parts():
            if not isinstance(part, str):
                code += [part] * inside
                continue
            heading = re.match(r"(#+) (.+)", part)
            if heading and len(heading[1]) <= level:
                inside = heading[2] == title
            text += [part] * inside
        return "\n".join(text), code


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def has_image(cell) -> bool:
    kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
    return any(kind.startswith("image/") for kind in kinds)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def chapter(request) -> Chapter:
    return Chapter(request.param)


def test_the_chapters_are_those_of_the_contents_in_order():
    listed = re.findall(r"file: *notebooks/(\S+)", (ROOT / "_toc.yml").read_text("utf-8"))
    assert listed == [path.stem for path in FILES]
    numbers = [int(name[:2]) for name in listed]  # a chapter keeps its number before others exist
    assert numbers == sorted(set(numbers)) and numbers[:3] == [1, 2, 3]


# --- how it is stored ---------------------------------------------------------------------------


def test_it_is_a_valid_notebook_of_any_python_3(chapter):
    nbformat.validate(chapter.book)
    assert chapter.book.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in chapter.cells}) == len(chapter.cells)


def test_every_cell_was_run_once_from_top_to_bottom(chapter):
    counts = [cell.execution_count for cell in chapter.code]
    assert counts == list(range(1, len(counts) + 1))


def test_no_cell_is_empty(chapter):
    assert [i for i, cell in enumerate(chapter.cells) if not cell.source.strip()] == []


def test_no_output_is_an_error_or_a_warning(chapter):
    kinds = {(o.output_type, o.get("name", "")) for cell in chapter.code for o in cell.outputs}
    assert not {kind for kind in kinds if "error" in kind or "stderr" in kind}


def test_no_state_of_a_widget_and_no_progress_bar_is_stored(chapter):
    assert "widgets" not in chapter.book.metadata
    shown = [str(output) for cell in chapter.code for output in cell.outputs]
    assert [text[:200] for text in shown if re.search(r"\d%\|| \[\d\d:\d\d<", text)] == []


def test_the_file_is_under_2_mb(chapter):
    assert chapter.path.stat().st_size < 2_000_000


# --- cells --------------------------------------------------------------------------------------


def test_every_figure_has_alt_text(chapter):
    for cell in filter(has_image, chapter.code):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt.split()) >= 5, cell.source


def test_a_cell_with_a_figure_ends_by_showing_it(chapter):
    # Else the value of its last line is printed, and nbval compares that.
    ends = [cell.source.rstrip().splitlines()[-1] for cell in filter(has_image, chapter.code)]
    assert [end for end in ends if end != "plt.show()"] == []


def test_code_fits_on_the_page(chapter):
    lines = [line for cell in chapter.code for line in cell.source.splitlines()]
    assert [line for line in lines if len(line) > MAX_WIDTH] == []


def test_cells_are_short(chapter):
    long = [cell.source for cell in chapter.code if len(cell.source.splitlines()) > MAX_LINES]
    assert long == []


def test_a_result_that_may_differ_is_held_by_an_assertion(chapter):
    timed = chapter.code[0], chapter.code[-1]  # they print versions, and minutes
    for title in chapter.headings(2):
        free = []  # its text is not compared, and no assertion has followed yet
        for cell in chapter.section(title)[1]:
            if "nbval-ignore-output" in tags(cell) and cell not in timed:
                free.append(cell.source)
            if re.search(r"^ *assert ", cell.source, re.M):
                free.clear()
        assert free == []


def test_text_is_plain_markdown_that_every_reader_shows(chapter):
    assert not re.search(
        r"^(?:```|:::)\{|\{(?:cite|ref|glue|term|doc|numref)\S*\}`", chapter.text, re.M
    )
    assert chapter.text.count("<details>") == chapter.text.count("</details>")
    assert not re.search(r"</summary>\n?[^\n]", chapter.text)  # Markdown needs the blank line


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = Chapter(path).text if path.suffix == ".ipynb" else path.read_text("utf-8")
    explicit = re.findall(r"^\(([\w-]+)\)=", text, re.M)
    return {slug(h) for h in re.findall(r"^#+ (.+)$", text, re.M)} | set(explicit)


def test_relative_links_lead_somewhere(chapter):
    links = re.findall(r"\]\((?!\w+:)([^)\s]+)\)", chapter.text)
    assert any(link.startswith("../book/glossary.md#") for link in links)
    dead = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = chapter.path.parent / name if name else chapter.path
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


# --- the frame ----------------------------------------------------------------------------------


def test_it_opens_with_number_question_aims_needs_and_time(chapter):
    (title,) = chapter.headings(1)
    assert title.startswith(f"{int(chapter.path.stem[:2])}. ")
    opening = chapter.text.split("\n## ")[0]
    assert re.search(r"\*\*[^*]+\?\*\*", opening), "one question, in bold"
    aims = re.search(r"\*\*You will be able to:\*\*\n((?:\n?[ -] .+)+)", opening)[1]
    assert 3 <= len(re.findall(r"^- ", aims, re.M)) <= 5
    assert "**Before this:**" in opening and "**Time:**" in opening


def test_its_sections_are_those_of_the_frame_in_order(chapter):
    assert [h for h in chapter.headings(2) if h in SECTIONS] == SECTIONS
    assert [title for title in SECTIONS if not chapter.section(title)[0]] == []


def test_it_has_one_set_up_cell_and_it_is_the_first(chapter):
    assert [i for i, cell in enumerate(chapter.code) if "setup" in tags(cell)] == [0]
    _, (setup,) = chapter.section("Set-up")
    assert setup is chapter.code[0]
    for line in (
        'if "google.colab" in sys.modules:',
        "import mnistlab as ml",
        "torch.manual_seed(0)",
    ):
        assert line in setup.source
    assert "nbval-ignore-output" in tags(setup)  # versions


def test_it_asks_before_it_answers(chapter):
    asked = [i for i, cell in enumerate(chapter.cells) if "**Predict.**" in cell.source]
    assert len(asked) >= 3
    for i in asked:
        assert "?" in chapter.cells[i].source
        assert any(c.cell_type == "code" for c in chapter.cells[i + 1 :])


def test_the_test_images_are_looked_at_in_compare_alone(chapter):
    allowed = [cell.id for cell in chapter.section("Compare")[1]]
    looks = [c.id for c in chapter.code if re.search(r"\bevaluate\([^)]*\.test\b", c.source)]
    assert looks and set(looks) <= set(allowed)


def test_it_looks_inside_with_two_figures_or_more(chapter):
    assert sum(map(has_image, chapter.section("Look inside")[1])) >= 2


def test_it_shows_a_comparison_with_a_figure_and_a_paired_test(chapter):
    _, cells = chapter.section("Compare")
    assert any(map(has_image, cells))
    source = "\n".join(cell.source for cell in cells)
    assert "compare(" in source and "Summary(" in source


def test_it_has_three_exercises(chapter):
    assert [h for h in chapter.headings(3) if h.startswith("Exercise")] == EXERCISES
    assert len([c for c in chapter.code if "starter" in tags(c)]) == 3
    assert len([c for c in chapter.code if "solution" in tags(c)]) == 3


@pytest.mark.parametrize("title", EXERCISES)
def test_an_exercise_has_a_starter_and_a_folded_solution_that_asserts(chapter, title):
    text, (starter, solution) = chapter.section(title, level=3)
    assert len(text.splitlines()) > 1
    assert tags(starter) >= {"starter"} and tags(solution) >= {"solution", "hide-cell"}
    assert solution.metadata.jupyter.source_hidden is True
    assert "assert" in solution.source


def test_it_ends_with_recap_terms_questions_and_reading(chapter):
    recap, terms, check, reading = (chapter.section(title)[0] for title in SECTIONS[-4:])
    assert 3 <= len(re.findall(r"^- ", recap, re.M)) <= 6
    assert "../book/glossary.md#" in terms
    assert 3 <= check.count("<details>") <= 5
    assert len(re.findall(r"\]\(https?://", reading)) >= 3


def test_the_last_cell_of_code_prints_the_minutes(chapter):
    assert "time.perf_counter() - started" in chapter.code[-1].source
    assert "nbval-ignore-output" in tags(chapter.code[-1])


def test_it_leads_to_the_chapter_before_and_to_the_next(chapter):
    i = FILES.index(chapter.path)
    opening, end = chapter.text.split("\n## ")[0], chapter.cells[-1].source
    if i > 0:
        assert f"]({FILES[i - 1].name}" in opening
    if i + 1 < len(FILES):
        assert chapter.cells[-1].cell_type == "markdown" and f"]({FILES[i + 1].name}" in end


def test_the_home_pages_chart_is_the_figure_stored_in_a_chapter():
    cells = [cell for path in FILES for cell in nbformat.read(path, 4).cells]
    tagged = [c for c in cells if "home-chart" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    stored = base64.b64decode(tagged[0].outputs[-1].data["image/png"])
    assert (ROOT / "book/assets/chart.png").read_bytes() == stored
