"""What several test files share: a tiny data set, and a machine without a network."""

import socket

import mnistlab as ml
import pytest
import torch
from torch import Tensor


def squares(n: int, seed: int = 0) -> ml.Split:
    """Images of 8x8 noise with one bright quadrant, which is the label: easy, but not trivial."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 160, (n, 1, 8, 8), generator=draw, dtype=torch.uint8)
    rows, columns = labels // 2 * 4, labels % 2 * 4
    for image, row, column in zip(images, rows, columns, strict=True):
        image[0, row : row + 4, column : column + 4] += 60
    return ml.Split(images, labels, (0.35,), (0.2,))


@pytest.fixture(scope="session")
def tiny() -> ml.Dataset:
    """256 images to train, 64 to validate, in 4 classes; no test split, so none can be touched."""
    return ml.Dataset(
        "squares", squares(256), squares(64, seed=1), test=None, classes=tuple("abcd")
    )


@pytest.fixture(scope="session")
def mnist() -> ml.Dataset:
    return ml.load("mnist")


@pytest.fixture
def offline(monkeypatch):
    """Any connection fails, as it does where there is no network."""

    def refuse(*_, **__):
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def random_state_is_kept():
    """The caller's random numbers go on as if the test had not run."""
    before: Tensor = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)
