"""Beside a CPU torch, `import torchvision` works after `import mnistlab`, and what that costs."""

import subprocess
import sys

import pytest

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
PRELUDE = f"""
import torch
def declare():
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms{NMS}")
    return library
"""


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def runs(code: str) -> str:
    done = python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def operators_load() -> bool:
    """Whether the torchvision here was compiled for the torch here."""
    return python("import torchvision").returncode == 0


def test_without_the_shim_torchvision_does_not_import(operators_load):
    if operators_load:
        pytest.skip("the operators of the torchvision installed here load")
    done = python("import torchvision")
    assert "operator torchvision::nms does not exist" in done.stderr


def test_with_it_data_sets_transforms_and_a_model_work(tmp_path, operators_load):
    code = f"""
import mnistlab, torch, torchvision, numpy as np
from torchvision import transforms
from torchvision.transforms import v2
image = np.arange(784, dtype=np.uint8).reshape(28, 28)
both = [t.Compose([t.ToPILImage(), t.RandomRotation(5), t.ToTensor()]) for t in (transforms, v2)]
assert all(t(image).shape == (1, 28, 28) for t in both)
fake = torchvision.datasets.FakeData(3, (3, 32, 32), 10, transform=transforms.ToTensor())
model = torchvision.models.mobilenet_v3_small(num_classes=10).eval()
assert model(torch.stack([x for x, _ in fake])).shape == (3, 10)
try:
    torchvision.datasets.MNIST({str(tmp_path)!r})
except RuntimeError as error:
    assert "not found" in str(error)
print(mnistlab._torchvision.LIBRARY is None)
"""
    assert runs(code) == str(operators_load)


def test_where_the_operators_are_there_nothing_is_declared():
    # Declaring beside real ones aborts the process; the fake ones would too.
    code = PRELUDE + "kept = declare()\nimport mnistlab\nprint(mnistlab._torchvision.LIBRARY)"
    assert runs(code) == "None"


def test_operators_that_load_are_loaded_and_nothing_is_declared():
    code = PRELUDE + "kept = []\n"
    code += "torch.ops.load_library = lambda path: kept or kept.append(declare())\n"
    code += "import mnistlab\nprint(len(kept), mnistlab._torchvision.LIBRARY)"
    assert runs(code) == "1 None"


def test_import_is_lean_and_draws_no_random_number():
    code = """
import random, sys, numpy, torch
before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
import mnistlab
assert torch.equal(torch.get_rng_state(), before[0])
assert random.getstate() == before[1] and (numpy.random.get_state()[1] == before[2]).all()
heavy = {"matplotlib", "scipy", "torchvision", "torchinfo", "tyro", "ipywidgets", "pandas"}
print(sorted(heavy & set(sys.modules)))
"""
    assert runs(code) == "[]"


def test_plots_are_imported_when_first_asked_for_and_other_names_are_refused():
    import mnistlab as ml

    assert callable(ml.plots.digits)
    with pytest.raises(AttributeError, match="'plotz'"):
        _ = ml.plotz


def test_every_public_name_is_there():
    import mnistlab as ml

    assert [name for name in ml.__all__ if not hasattr(ml, name)] == []
