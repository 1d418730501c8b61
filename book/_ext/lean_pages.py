"""Keep scripts off pages that do not use them.

MathJax (2 MB): Sphinx looks for formulas in a page and in all pages below it, so the home page
would always load it. Thebe: jupyter-book puts its set-up on every page, twice, which is a
script error in the browser, and it would come from another host. We do not use it.
"""

from docutils import nodes
from sphinx.application import Sphinx


def drop_scripts(app: Sphinx, page: str, template: str, context: dict, doctree) -> None:
    """Take what the page does not use out of its list of scripts."""
    unused = ["thebe"]
    if not doctree or not any(doctree.findall(is_formula)):
        unused.append("mathjax")

    def used(script) -> bool:
        says = f"{script.filename} {script.attributes.get('body')}".lower()
        return not any(word in says for word in unused)

    context["script_files"] = list(filter(used, context["script_files"]))


def is_formula(node: nodes.Node) -> bool:
    """Whether MathJax has something to draw here."""
    return isinstance(node, nodes.math | nodes.math_block)


def setup(app: Sphinx) -> dict:
    """Called by Sphinx."""
    app.connect("html-page-context", drop_scripts, priority=900)  # after all have been added
    return {"parallel_read_safe": True, "parallel_write_safe": True}
