"""Let `import torchvision` succeed beside a CPU build of torch.

The torchvision wheel for Linux is linked against the CUDA build of torch. Beside a CPU torch its
compiled operators do not load, and `import torchvision` stops at "operator torchvision::nms does
not exist", although data sets, transforms and classification models use no such operator.
Declaring the two missing operators mends it. Declaring them beside real ones would abort the
process, so the real ones are tried first.
"""

import importlib.util
from pathlib import Path

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_missing_operators() -> torch.library.Library | None:
    """Declare `nms` and `qnms` if torchvision's own cannot be loaded.

    Returns:
        The library object, which must be kept alive; None where nothing had to be declared
        (torchvision is absent, already imported, or its compiled operators load).
    """
    spec = importlib.util.find_spec("torchvision")  # finds the package, does not import it
    if spec is None or hasattr(torch.ops.torchvision, "nms"):
        return None
    compiled = sorted(Path(spec.origin).parent.glob("_C*.so"))
    try:
        for path in compiled:
            torch.ops.load_library(path)
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + SCHEMA)
        return library
    return None


LIBRARY = declare_missing_operators()
