"""The results page: a table and a chart of all that is recorded, read anew by every build.

The chart is a picture; where scripts run, one to zoom and to filter takes its place. Plotly draws
that one, fetched by npm: error bars, logarithmic axes and zoom are its own, and nothing is asked
of another host.

The records are the only source, so the page cannot lag behind them. Records that no longer fit
their recipe are an error of the build.
"""

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.pyplot as plt
import mnistlab as ml
import npm
from docutils import nodes
from docutils.parsers.rst.directives.images import Figure
from docutils.statemachine import StringList
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox
from mnistlab import cli, runs
from mnistlab.data import data_root
from mnistlab.train import write_atomically
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

PLOTLY, VERSION = "plotly.js-basic-dist-min", "4.1.1"
SHA512 = "1oNF8PeQx2hv/y7tqEVWKD3JGwn/MGEMQ8mL9HUwsaqG9FGy/OU5FHUHvzqbqxN4mnwZGI9abTiE775C4kkjMQ=="
SCRIPT = "plotly-basic.min.js"
LIBRARY = f"plotly-basic-{VERSION}.min.js"  # on the site: another version has another address

TABLE = jinja2.Template(
    """\
<div class="results full-width">
<p class="results-filter" hidden>
<label>Filter <input type="search" placeholder="cnn, weights averaged, …" size="24"></label>
<span role="status"></span>
</p>
<div class="pst-scrollable-table-container" role="region" aria-label="Recorded results">
<table class="table sortable asc n-last">
<thead><tr>
<th scope="col">recipe</th>
{%- for title, text, value in columns %}
<th scope="col" {%- if value %} class="number"{% endif %}
{%- if title == "parameters" %} aria-sort="ascending"{% endif %}>{{ title }}</th>
{%- endfor %}
<th scope="col" class="no-sort">command</th>
</tr></thead>
<tbody>
{%- for known in rows %}
<tr id="{{ known.name }}" {%- if known.n == 1 %} class="try"{% endif %}>
<th scope="row"><a href="#{{ known.name }}">{{ known.name }}</a></th>
{%- for title, text, value in columns %}
<td {%- if value %} class="number" data-sort="{{ value(known) if text(known) else "" }}"{% endif %}>
{{- text(known) }}</td>
{%- endfor %}
<td><div class="highlight">
{#- -#}
<pre>{{ known.command }}</pre></div></td>
</tr>
{%- endfor %}
</tbody>
</table>
</div>
</div>
""",
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)

BESIDE = """\
| recipe | theirs, % | ours, % | n | ours is | theirs is |
|---|--:|--:|--:|---|---|"""

# Hidden until book/site/results/explorer.js has its library.
EXPLORER = jinja2.Template(
    """\
<div class="explorer" hidden>
<div class="explorer-choices">
<label>x axis <select name="across">
{%- for key, title in axes.items() %}
<option value="{{ key }}">{{ title }}</option>
{%- endfor %}
</select></label>
<label>Error scale <select name="scale">
<option>logarithmic</option><option>linear</option>
</select></label>
<label>Test images <select name="images">
{%- for name in images %}
<option>{{ name }}</option>
{%- endfor %}
</select></label>
</div>
<fieldset class="explorer-families">
<legend>Families</legend>
{%- for name, look in looks.items() %}
<label><input type="checkbox" value="{{ name }}" checked>
<svg viewBox="-6 -6 12 12" aria-hidden="true"><path d="{{ look.path }}" fill="{{ look.colour }}"/>
{#- -#}
</svg>{{ name }}</label>
{%- endfor %}
<button type="button" name="all">All</button>
<button type="button" name="none">None</button>
</fieldset>
<div class="explorer-plot" role="img"></div>
<div class="explorer-moves">
<div role="group" aria-label="View of the chart">
{%- for name, sign in moves.items() %}
<button type="button" aria-label="{{ name }}" title="{{ name }}">{{ sign }}</button>
{%- endfor %}
<button type="button">Reset view</button>
</div>
<span role="status"></span>
</div>
<script type="application/json">
{{- {"looks": looks, "axes": axes, "recipes": recipes, "library": library} | tojson -}}
</script>
</div>
<p class="explorer-message" role="status" hidden></p>
""",
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)
AXES = {
    "params": "trainable parameters",
    "macs": "multiply-accumulates for one image",
    "bytes": "bytes of weights",
    "time": f"measured time for one image ({runs.REFERENCE}: 1)",
}
MOVES = {
    "Zoom in": "+",
    "Zoom out": "−",
    "Move left": "←",
    "Move right": "→",
    "Move up": "↑",
    "Move down": "↓",
}
# Of matplotlib's markers: Plotly's name, and an outline for the list of families.
SYMBOLS = {
    "o": ("circle", "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0"),
    "s": ("square", "M-4.5-4.5H4.5V4.5H-4.5Z"),
    "^": ("triangle-up", "M-5 4.5H5L0-5Z"),
    "D": ("diamond", "M0-6L6 0L0 6L-6 0Z"),
    "v": ("triangle-down", "M-5-4.5H5L0 5Z"),
    "<": ("triangle-left", "M4.5-5V5L-5 0Z"),
    ">": ("triangle-right", "M-4.5-5V5L5 0Z"),
}


ANEW = "all images split anew"
LEARNT = 0.5  # accuracy: less is a failure to train, which a chart has no place for


def family(known: ml.Results) -> str:
    """The name of its class of models."""
    return cli.summary(known)["family"]


def epochs(known: ml.Results) -> int:
    """Epochs of a run."""
    return known.records[0]["epochs"]


def scatter(known: ml.Results) -> str:
    """Standard deviation over seeds, in percent; one seed has none."""
    return f"{100 * known.sd:.2f}" if known.n > 1 else ""


def interval(known: ml.Results) -> str:
    """Interval of the mean, in percent; one seed has none, and where some runs fail to learn their
    scatter is no bell curve's."""
    low, high = known.interval
    fits = known.n > 1 and known.mean >= LEARNT
    return f"{100 * low:.2f} to {100 * high:.2f}" if fits else ""


def notes(known: ml.Results) -> str:
    """What a reader who compares must know of a recipe."""
    first = known.records[0]
    recipe = ml.Recipe().describe() | first["recipe"]  # a field younger than the record
    devices = sorted({record["device"] for record in known.records})
    said = {
        "one seed: a try": known.n == 1,
        "did not learn": known.mean < LEARNT,
        f"{len(known.diverged)} of {known.tried} runs diverged": known.diverged,
        f"on {recipe['data']}": recipe["data"] != "mnist",
        ANEW: recipe["resplit"],
        "weights averaged": recipe["ema"] or recipe["swa_epochs"],
        f"taught by {recipe['teacher']}": recipe["teacher"],
        f"weights of {recipe['weight_bits']} bits": recipe["weight_bits"],
        f"mean of {len(recipe['tta'])} rotated views": recipe["tta"],
        f"trained on {' and '.join(devices)}": devices != ["cpu"],
    }
    return "; ".join(text for text, holds in said.items() if holds)


# Between recipe and command: title, text, and the number to sort by (None: sort by the text).
COLUMNS = [
    ("parameters", lambda known: f"{known.params:,}", lambda known: known.params),
    ("mean, %", lambda known: f"{100 * known.mean:.2f}", lambda known: known.mean),
    ("sd", scatter, lambda known: known.sd),
    ("95% interval", interval, lambda known: known.interval[0]),
    ("n", lambda known: f"{known.n}", lambda known: known.n),
    ("epochs", lambda known: f"{epochs(known)}", epochs),
    ("seconds", lambda known: f"{known.seconds:,.0f}", lambda known: known.seconds),
    ("MACs", lambda known: f"{known.macs:,}", lambda known: known.macs),
    ("family", family, None),
    ("notes", notes, None),
]


def against(known: ml.Results, stated: float) -> str:
    """Where the mean over seeds stands, beside a figure of another's in percent."""
    if known.n == 1:
        return "one seed: a try"
    if failed := sum(value < LEARNT for value in known.values):
        return f"a mean of {known.n}, of which {failed} did not learn"
    low, high = (100 * end for end in known.interval)
    return "higher" if low > stated else "lower" if high < stated else "not told apart"


def images(known: ml.Results) -> str:
    """Whose test images they are: a data set's own, or drawn by the seed from all of its images."""
    recipe = known.records[0]["recipe"]
    return f"{recipe['data']}, {ANEW}" if recipe.get("resplit") else recipe["data"]


def drawn(recorded: Iterable[ml.Results]) -> list[ml.Results]:
    """Those that a chart has a place for: seeds enough for an interval, and more than a guess. The
    smallest first; of one size, the best first."""
    found = [known for known in recorded if known.n >= 3 and known.mean >= LEARNT]
    return sorted(found, key=lambda known: (known.params, -known.mean))


def comparable(recorded: Iterable[ml.Results]) -> list[ml.Results]:
    """Those of `drawn` that may stand side by side at first: on MNIST's own test images."""
    return [known for known in drawn(recorded) if images(known) == "mnist"]


def looks(known: Iterable[ml.Results]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each family, in the order of their coming."""
    families = dict.fromkeys(map(family, known))
    pairs = zip(cycle(ml.plots.COLOURS), cycle(ml.plots.MARKERS), strict=False)
    return dict(zip(families, pairs, strict=False))


def frontier(compared: Sequence[ml.Results]) -> list[ml.Results]:
    """Those of `comparable` that nothing of their size or smaller beats."""
    best, found = 0.0, []
    for known in compared:
        if known.mean > best:
            best = known.mean
            found.append(known)
    return found


def error(accuracy: float) -> float:
    """In percent."""
    return 100 * (1 - accuracy)


def chart(compared: Sequence[ml.Results]) -> Axes:
    """Test error against parameters: a colour and a marker for each family, names where there is
    room.

    Args:
        compared: as `comparable` gives them.
    """
    _, ax = plt.subplots(figsize=(7.2, 5.4))
    families: dict[str, list[ml.Results]] = {}
    for known in compared:
        families.setdefault(family(known), []).append(known)
    look = looks(compared)
    sizes = [known.params for known in compared]
    points, bars = {}, {}
    for i, known in enumerate(compared):
        middle = sizes.index(known.params) + (sizes.count(known.params) - 1) / 2
        x, y = known.params * 1.04 ** (i - middle), error(known.mean)  # one size: side by side
        high, low = map(error, known.interval)
        points[known.name], bars[known.name] = (x, y), ((x, low), (x, high))
        colour, marker = look[family(known)]
        ax.errorbar(x, y, [[y - low], [high - y]], fmt=marker, color=colour, capsize=3)
    edge = [known.name for known in frontier(compared)]
    stairs = [points[edge[0]]]
    for name in edge[1:]:
        x, y = points[name]
        stairs += [(x, stairs[-1][1]), (x, y)]
    ax.plot(*zip(*stairs, strict=True), ":", color=ml.plots.INK, zorder=1)
    ax.set(xscale="log", yscale="log", xlabel="trainable parameters", ylabel="test error, %")
    ax.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.7)
    for axis, subs in ((ax.xaxis, (1, 2, 5)), (ax.yaxis, (1, 1.5, 2, 3, 4, 5, 7))):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axis.set_minor_locator(NullLocator())
    handles = [ax.plot([], [], m, color=c, label=name)[0] for name, (c, m) in look.items()]
    ax.figure.legend(handles=handles, loc="outside upper center", ncols=4)

    ax.figure.canvas.draw()  # fixes the layout, hence the pixels
    to_pixels = ax.transData.transform
    taken = [Bbox(to_pixels(ends)).padded(1) for ends in pairwise(stairs)]
    taken += [Bbox(to_pixels(ends)).padded(4) for ends in bars.values()]
    taken += [Bbox([to_pixels(point)] * 2).padded(7) for point in points.values()]
    largest = [max(own, key=lambda known: (known.params, known.mean)) for own in families.values()]
    must = dict.fromkeys([*edge, *(known.name for known in largest)])
    alone = [known.name for known in compared if sizes.count(known.params) == 1]
    for name in dict.fromkeys([*must, *alone]):
        write_name(ax, name, points[name], taken, name in must)
    return ax


def write_name(ax: Axes, name: str, point: Sequence[float], taken: list[Bbox], must: bool) -> None:
    """Write a name beside its point, where it covers nothing of `taken`, and add it to that; if
    there is no such place, where it covers least if it `must` be there, else not at all."""
    text = ax.annotate(name, point, (0, 0), textcoords="offset points", va="center", fontsize=8.5)

    def covered(place: tuple[int, int]) -> int:
        text.set(position=place, ha="left" if place[0] > 0 else "right")
        box = text.get_window_extent()
        outside = box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1
        return box.count_overlaps(taken) + 10 * outside

    places = [(aside, lift) for lift in (0, 9, -9, 18, -18, 27, -27) for aside in (9, -9)]
    best = min(places, key=covered)  # the first of equals
    if covered(best) and not must:  # the call also puts it there
        text.remove()
    else:
        taken.append(text.get_window_extent())


def describe(compared: Sequence[ml.Results]) -> str:
    """The chart in words, for readers who do not see it."""
    edge = [f"{known.name} ({error(known.mean):.2f}%)" for known in frontier(compared)]
    return (
        "Test error in percent against number of trainable parameters, both on logarithmic axes: "
        f"{len(compared)} recipes of {len({family(known) for known in compared})} families. "
        f"From small to large, those with the lowest error so far are {', '.join(edge)}. "
        "The table below holds every number."
    )


def point(known: ml.Results, times: Mapping[str, float]) -> dict[str, Any]:
    """What the chart to zoom knows of a recipe.

    Args:
        times: of presets, as `runs.speeds` gives them; it lacks some.
    """
    low, high = known.interval
    bits = known.records[0]["recipe"].get("weight_bits") or 32
    return {
        "name": known.name,
        "family": family(known),
        "images": images(known),
        "params": known.params,
        "macs": known.macs,
        "bytes": math.ceil(known.params * bits / 8),
        "time": times.get(known.model),
        "n": known.n,
        "mean": known.mean,
        "sd": known.sd,
        "low": low,
        "high": high,
        "command": known.command,
        "notes": notes(known),
    }


def explorer(recorded: Sequence[ml.Results]) -> str:
    """The chart to zoom: its controls, and what it draws."""
    # Those of the picture first, so that families look the same in both.
    every = sorted(drawn(recorded), key=lambda known: images(known) != "mnist")
    styles = {
        name: dict(zip(("symbol", "path"), SYMBOLS[marker], strict=True)) | {"colour": colour}
        for name, (colour, marker) in looks(every).items()
    }
    times = runs.speeds()
    return EXPLORER.render(
        images=dict.fromkeys(map(images, every)),
        axes=AXES,
        looks=styles,
        moves=MOVES,
        recipes=[point(known, times) for known in every],
        library=LIBRARY,
    )


class Reader(SphinxDirective):
    """Reads the records once for a page, at each build."""

    def read(self) -> list[ml.Results]:
        self.env.note_reread()
        if "results" not in self.env.temp_data:
            try:
                self.env.temp_data["results"] = [ml.results(name) for name in runs.recorded()]
            except ValueError as problem:
                raise self.error(str(problem)) from None
        return self.env.temp_data["results"]


class ResultsTable(Reader):
    """```{results-table}```"""

    def run(self) -> list[nodes.Node]:
        rows = sorted(self.read(), key=lambda known: (known.params, known.name))
        html = TABLE.render(columns=COLUMNS, rows=rows)
        table = nodes.raw("", html, format="html", classes=["results"])
        if not (lost := runs.lost()):
            return [table]
        return [table, nodes.paragraph("", f"Every recorded run diverged: {', '.join(lost)}.")]


class ResultsBeside(Reader):
    """```{results-beside}```, with lines of `recipe, percent that its source states, what that is`;
    "over 98.5" is a percent too."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        recorded, lines = {known.name: known for known in self.read()}, BESIDE.splitlines()
        for line in csv.reader(self.content, skipinitialspace=True):
            if len(line) != 3 or line[0] not in recorded:
                raise self.error(f"{line}: a recipe that has records, what is stated, what that is")
            known, stated, how = recorded[line[0]], *line[1:]
            ours = f"{100 * known.mean:.2f}"
            ours += f"\xa0±\xa0{100 * known.sd:.2f}" if known.n > 1 else ""  # on one line
            verdict = against(known, float(stated.removeprefix("over ")))
            link = f'<a href="#{known.name}">{known.name}</a>'
            lines.append(f"| {link} | {stated} | {ours} | {known.n} | {verdict} | {how} |")
        holder = nodes.container()
        self.state.nested_parse(StringList(lines), self.content_offset, holder)
        return holder.children


class ResultsChart(Reader, Figure):
    """```{results-chart}```, with the caption as its content."""

    required_arguments = optional_arguments = 0

    def run(self) -> list[nodes.Node]:
        compared = comparable(self.read())
        if not compared:
            raise self.error("no recipe has three seeds yet, so there is nothing to draw")
        path = Path(self.env.doctreedir, "results.svg")
        with plt.rc_context():
            ml.plots.style()
            figure = chart(compared).figure
            figure.savefig(path)
            plt.close(figure)
        self.arguments = ["/" + os.path.relpath(path, self.env.srcdir)]
        self.options["alt"] = describe(compared)
        [figure] = super().run()
        figure.insert(1, nodes.raw("", explorer(self.read()), format="html"))  # over the caption
        return [figure]


def make(app: Sphinx) -> None:
    """Fetch the library, for a build of pages."""
    if app.builder.format == "html":
        folder = data_root() / "npm" / f"{PLOTLY}-{VERSION}"
        npm.fetch(PLOTLY, VERSION, SHA512, [SCRIPT], folder)
        place = Path(app.outdir, "results", LIBRARY)
        write_atomically(place, (folder / SCRIPT).read_bytes())


def add_scripts(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Give the page that holds the table what sorts, filters and styles it."""
    if doctree and any("results" in raw["classes"] for raw in doctree.findall(nodes.raw)):
        app.add_css_file("../results/results.css")
        app.add_js_file("../sortable/sortable.min.js", loading_method="defer")
        app.add_js_file("../results/results.js", loading_method="defer")
        app.add_js_file("../results/explorer.js", loading_method="defer")


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.add_directive("results-table", ResultsTable)
    app.add_directive("results-beside", ResultsBeside)
    app.add_directive("results-chart", ResultsChart)
    app.connect("builder-inited", make)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
