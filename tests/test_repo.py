"""What several files of the repository say about one thing, they say alike."""

import re
import shutil
import subprocess
import tomllib
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import yaml
from mnistlab.runs import MALLOC
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OWNER, NAME = PROJECT["urls"]["Repository"].split("/")[-2:]
EXTRAS = PROJECT["optional-dependencies"]


@cache
def texts() -> dict[str, str]:
    """Path and content of every text file of ours: what git knows, or all where git is not."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        made = {".git", ".venv", "_build", "build", "__pycache__"}
        paths = [p for p in ROOT.rglob("*") if not made & set(p.relative_to(ROOT).parts)]
    found = {}
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        if not path.is_file() or name.startswith("book/site/"):  # others' files, as published
            continue
        with suppress(UnicodeDecodeError):  # not text
            found[name] = path.read_text("utf-8")
    return found


def mentions(pattern: str) -> dict[str, list[str]]:
    """Where `pattern` occurs: file -> what it matched."""
    hits = {name: [m[0] for m in re.finditer(pattern, text)] for name, text in texts().items()}
    return {name: found for name, found in hits.items() if found}


def test_every_address_of_the_repository_is_the_one_in_pyproject():
    slug = r"(?P<owner>[\w-]+)/(?P<name>[\w-]+(?:\.[\w-]+)*)"
    launch = r"(?:mybinder\.org/v2/gh|colab\.research\.google\.com/github)/"  # always ours
    github = r"(?:github\.com[/:]|raw\.githubusercontent\.com/|img\.shields\.io/github/[\w/-]+?/)"
    pages = r"(?P<owner>[\w-]+)\.github\.io/(?P<name>[\w-]+)"
    right, wrong = set(), []
    for name, text in texts().items():
        for kind in (launch + slug, github + slug, pages):
            for hit in re.finditer(kind, text):
                said = hit["owner"], hit["name"].removesuffix(".git")
                # Other people's repositories are cited too. Ours is known by its name.
                alike = re.search("mnist-?lab", "/".join(said), re.I) or NAME in said
                if said == (OWNER, NAME):
                    right.add(name)
                elif alike or kind.startswith(launch):
                    wrong.append((name, hit[0]))
    assert not wrong
    assert right >= {"README.md", "_config.yml", "CITATION.cff", "pyproject.toml"}
    assert PROJECT["urls"]["Documentation"] == f"https://{OWNER}.github.io/{NAME}/"


def test_environment_yml_has_the_dependencies_of_pyproject():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    assert pip == {"pip": ["-e ."]}
    builds = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
    said = {}
    for line in conda:
        name, spec = re.fullmatch(r"([\w-]+)(.*)", line).groups()
        said[builds.get(name, name)] = spec
    assert said.pop("pip") == ""
    python = said.pop("python").removeprefix("=")
    assert python in SpecifierSet(PROJECT["requires-python"])
    ours = map(Requirement, PROJECT["dependencies"] + EXTRAS["book"])
    assert {k: SpecifierSet(v) for k, v in said.items()} == {r.name: r.specifier for r in ours}


def test_constraints_pin_every_dependency_within_its_range():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    # Nothing but pins: no path, no editable line, no "+cpu", which other machines do not have.
    assert [p for p in pins if not re.fullmatch(r"[\w.-]+==[\w.!]+", p)] == []
    pinned = {canonicalize_name(k): Version(v) for k, v in (p.split("==") for p in pins)}
    assert len(pinned) == len(pins)
    assert not {"pip", "setuptools", "wheel", "mnistlab"} & set(pinned)
    for line in sum(EXTRAS.values(), PROJECT["dependencies"]):
        need = Requirement(line)
        assert pinned[canonicalize_name(need.name)] in need.specifier


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_help_lists_every_target_that_the_documents_name():
    out = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True)
    listed = set(re.findall(r"^ +make (\w+) +\S", out.stdout, re.M))
    named = {}
    for name, text in texts().items():
        if name.endswith((".md", ".ipynb")):
            code = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
            calls = re.findall(r"^make((?: [a-z]+)+)", code, re.M)
            calls += re.findall(r"`make((?: [a-z]+)+)", text)
        elif name.startswith((".github/", ".ci/")):
            calls = re.findall(r"^ *(?:- )?(?:run: )?make((?: [a-z]+)+)", text, re.M)
        else:
            continue
        named |= dict.fromkeys(" ".join(calls).split(), name)
    assert {"book", "test", "check", "execute"} <= set(named)
    assert {target: name for target, name in named.items() if target not in listed} == {}


def test_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == PROJECT["version"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_local_links_lead_to_files(page):
    links = re.findall(r"\]\((?!\w+:)([^)#\s]+)", texts()[page])
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_file_names_the_host_of_a_package_registry():
    # A mirror or an index is each reader's own setting.
    hosts = [("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "(?:org|com)"), ("debian", "org")]
    hosts += [("anaconda", "(?:org|com)"), ("prefix", "dev"), ("download.pytorch", "org")]
    assert mentions("|".join(rf"\b{re.escape(a)}\.{b}\b" for a, b in hosts)) == {}


def test_no_file_holds_a_path_of_one_machine():
    assert mentions(r"(?:(?<![\w.~$/:-])|\\n)/(?:home|root|Users|work|tmp|private)/[\w.-]+") == {}


def test_notebooks_keep_freed_memory_as_recorded_runs_do():
    assert "=".join(MALLOC) in (ROOT / "Makefile").read_text("utf-8")
