"""Speed, measured: what the loop costs over a bare one, and seconds to 99%.

Times on one machine say little about another. So each pair is measured in turn, A B A B, in one
run, and what is reported first is the ratio.
"""

import csv
import dataclasses
import datetime
import gzip
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import ASSETS, MNIST_FILES, Augment, Dataset, load
from .evaluate import Summary, evaluate
from .models import PRESETS, build, count_parameters
from .models.capsules import CapsuleNet
from .models.convnext import GRN, Block
from .runs import MALLOC, REFERENCE, SPEEDS, processor
from .train import LOSSES, Recipe, fit, has_bf16, pick_device, predict, write_atomically

RECORD = Path(__file__).parent / "results" / "bench.csv"

# Chosen on the validation images, among some thirty recipes of one and two epochs.
FASTEST = Recipe(
    model="fastcnn-106k",
    epochs=1,
    batch_size=128,
    optimizer="adam",
    lr=0.01,
    betas=(0.7, 0.9),
    weight_decay=0.0,
    label_smoothing=0.1,
    channels_last=True,
)
PLAIN = Recipe(epochs=1, lr=0.05)
AFFINE = Augment(rotate=10, shift=2, scale=0.1)
SMALL = "simplecnn-8k"  # the small CNN of which the data loader has the least to hide behind

Row = dict[str, str]


def bench(only: str | None = None) -> list[Row]:
    """Run every part, or only one; a full run replaces the records that the book shows.

    "presets" has a record of its own, replaced whenever it runs.
    """
    speeds = presets() if only in (None, "presets") else []
    if only == "presets":
        return speeds
    data = load("mnist")
    rows = [row for name, part in PARTS.items() if only in (None, name) for row in part(data)]
    rows += _conditions()
    if only is None:
        _write(RECORD, rows)
    return rows


def overhead(data: Dataset, pairs: int = 9, n: int = 25_600) -> Iterable[Row]:
    """fit() against the barest loop that does the same: normalised images in memory, shuffled."""
    small = dataclasses.replace(data, train=data.train[:n], val=data.val[:100])
    inputs, labels = small.train.inputs(), small.train.labels
    for name in ("dense-68k", "cnn-8k"):

        def ours(name=name) -> float:
            return fit(name, small, PLAIN, device="cpu", progress=False).images_per_second

        def bare(name=name) -> float:
            order = torch.randperm(n).split(PLAIN.batch_size)
            batches = ((inputs.index_select(0, index), labels[index]) for index in order)
            return n / _bare_loop(build(name), batches)

        yield _ratio(
            f"fit() over a bare loop, {name}: images a second",
            _in_turn(ours, bare, pairs),
            f"{n:,} images in batches of {PLAIN.batch_size}, shuffled; the bare loop has them "
            "normalised in memory",
        )


def dataloader(data: Dataset, pairs: int = 5, n: int = 5_120) -> Iterable[Row]:
    """fit() against the usual loop: a DataLoader, torchvision's transforms, image by image."""
    from torchvision import datasets, transforms

    tail = [transforms.ToTensor(), transforms.Normalize(data.train.mean, data.train.std)]
    affine = transforms.RandomAffine(10, (2 / 28, 2 / 28), (0.9, 1.1))
    elastic = transforms.ElasticTransform(17.0, 4.0)
    small = dataclasses.replace(data, train=data.train[:n], val=data.val[:100])
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "MNIST", "raw")
        raw.mkdir(parents=True)
        for file in MNIST_FILES:
            raw.joinpath(file[:-3]).write_bytes(gzip.decompress((ASSETS / file).read_bytes()))
        for label, augment, extra in (
            ("plain", Augment(), []),
            ("rotated, shifted, scaled", AFFINE, [affine]),
            ("and bent", dataclasses.replace(AFFINE, elastic=17), [affine, elastic]),
        ):
            images = datasets.MNIST(folder, transform=transforms.Compose(extra + tail))
            loader = torch.utils.data.DataLoader(
                torch.utils.data.Subset(images, range(n)), PLAIN.batch_size, shuffle=True
            )
            recipe = dataclasses.replace(PLAIN, augment=augment)

            def ours(recipe=recipe) -> float:
                run = fit(SMALL, small, recipe, device="cpu", progress=False)
                return run.images_per_second

            def usual(loader=loader) -> float:
                return n / _bare_loop(build(SMALL), loader)

            yield _ratio(
                f"fit() over a DataLoader loop, {SMALL}, images {label}: images a second",
                _in_turn(ours, usual, pairs),
                f"{n:,} images in batches of {PLAIN.batch_size}, no worker processes",
            )


def to99(data: Dataset, seeds: int = 10) -> Iterable[Row]:
    """Our fastest recipe against train_mnist_fast: whole runs, each tested once at its end."""
    precision = "bf16" if has_bf16(pick_device("cpu")) else "fp32"
    recipe = dataclasses.replace(FASTEST, precision=precision)
    parts = (data.train, data.val)  # train_mnist_fast trains on all 60,000
    inputs, labels = torch.cat([p.inputs() for p in parts]), torch.cat([p.labels for p in parts])
    accuracies: dict[str, list[float]] = {"fastest recipe": [], "train_mnist_fast": []}
    of_ours, of_theirs = accuracies.values()

    def ours() -> float:
        started, seed = time.perf_counter(), len(of_ours)
        run = fit(recipe.model, data, recipe, seed=seed, device="cpu", progress=False)
        seconds = time.perf_counter() - started
        of_ours.append(evaluate(run.model, data.test).accuracy)
        return seconds

    def theirs() -> float:
        torch.manual_seed(len(of_theirs))
        started = time.perf_counter()
        model = train_mnist_fast(inputs, labels)
        seconds = time.perf_counter() - started
        of_theirs.append(evaluate(model, data.test).accuracy)
        return seconds

    pairs = _in_turn(ours, theirs, seeds, warm_up=False)
    yield _ratio(
        "fastest recipe over train_mnist_fast: seconds",
        pairs,
        f"{recipe.model}, 1 epoch of 55,000, {precision}; theirs as published, 1 epoch of 60,000",
    )
    for name, values in accuracies.items():
        yield {
            "measure": f"test accuracy, {name}",
            "value": str(Summary(tuple(values))).split(" (")[0],
            "range": f"{100 * min(values):.2f} to {100 * max(values):.2f}%",
            "n": f"{seeds} seeds",
            "how": "mean ± sd; each run tested once, after its last batch",
        }


def train_mnist_fast(inputs: Tensor, labels: Tensor) -> nn.Module:
    """One epoch of the final recipe of github.com/tuomaso/train_mnist_fast (2021), written anew.

    Args:
        inputs: normalised, float32 [N, 1, 28, 28], taken in their order, as there.
    """
    model = nn.Sequential(
        *(nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(24, 32, 3), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    batches = list(zip(inputs.split(256), labels.split(256), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.7, 0.9))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, total_steps=len(batches), cycle_momentum=False
    )
    _bare_loop(model, batches, optimizer, schedule.step)
    return model


def _bare_loop(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """The least that training takes; returns its seconds."""
    optimizer = optimizer or torch.optim.SGD(
        model.parameters(), PLAIN.lr, PLAIN.momentum, nesterov=PLAIN.nesterov
    )
    started = time.perf_counter()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after_step()
    return time.perf_counter() - started


def _in_turn(
    a: Callable[[], float], b: Callable[[], float], pairs: int, warm_up: bool = True
) -> list[tuple[float, float]]:
    """Measure a and b in turn, so that a machine that slows down slows both."""
    if warm_up:
        a(), b()
    return [(a(), b()) for _ in tqdm(range(pairs), unit="pair", leave=False)]


def _ratio(measure: str, pairs: list[tuple[float, float]], how: str) -> Row:
    ratios = sorted(a / b for a, b in pairs)
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "measure": measure,
        "value": f"{statistics.median(ratios):.2f} ({a:,.4g} / {b:,.4g})",
        "range": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        "n": f"{len(pairs)} pairs",
        "how": f"median of the ratio of each pair (medians of both); {how}",
    }


def mended(data: Dataset, pairs: int = 7) -> Iterable[Row]:
    """What was done to make slow models fast: a training step before and after."""
    images = data.train[:128].inputs()

    class PaperGRN(GRN):
        """As equations 1 to 3 are written."""

        def forward(self, x: Tensor) -> Tensor:
            size = x.norm(dim=(1, 2), keepdim=True)
            share = size / (size.mean(-1, keepdim=True) + 1e-6)
            return self.gamma * (x * share) + self.beta + x

    def paper(model: nn.Module) -> nn.Module:
        for block in model.modules():
            if isinstance(block, Block):
                block.grn.__class__ = PaperGRN
        return model

    cases = {
        "GRN in fewer passes, convnext-68k": (
            lambda: paper(build("convnext-68k")),
            lambda: build("convnext-68k"),
        ),
        "channels last, efficientnet-68k": (
            lambda: build("efficientnet-68k"),
            lambda: build("efficientnet-68k").to(memory_format=torch.channels_last),
        ),
        "2 heads of 20 for 5 of 8, vit-68k": (
            lambda: build("vit-68k", heads=5),
            lambda: build("vit-68k", heads=2),
        ),
    }
    for name, makers in cases.items():
        steps = [_training_step(make(), images, data.train.labels[:128]) for make in makers]
        before, after = (lambda step=step: 10 / _seconds(step, 10) for step in steps)
        yield _ratio(
            f"{name}: training steps a second, after over before",
            _in_turn(after, before, pairs),
            "batches of 128",
        )
    model, some = build("shared-8k"), data.val[:1000]
    after, before = (
        lambda n=n: 1 / _seconds(lambda: predict(model, some, batch_size=n), 1)
        for n in (None, 1000)
    )
    yield _ratio(
        "250 images at once for 1,000, shared-8k: predictions a second, after over before",
        _in_turn(after, before, pairs),
        "1,000 images, on a CPU",
    )
    code = (
        "import mnistlab as ml; from dataclasses import replace; d = ml.load('mnist');"
        "d = replace(d, train=d.train[:12800], val=d.val[:100]); print(ml.fit('simplecnn-421k', d,"
        "ml.Recipe(epochs=1, lr=0.05, channels_last=True), progress=False).images_per_second)"
    )

    def fresh(**environment: str) -> float:
        own = {k: v for k, v in os.environ.items() if k != MALLOC[0]} | environment
        done = subprocess.run(
            [sys.executable, "-c", code], env=own, capture_output=True, check=True
        )
        return float(done.stdout)

    if platform.libc_ver()[0] == "glibc":
        yield _ratio(
            "freed memory kept, simplecnn-421k: images a second, after over before",
            _in_turn(lambda: fresh(**dict([MALLOC])), fresh, pairs),
            "fit() in a new process, 12,800 images",
        )


def presets(rounds: int = 7) -> list[Row]:
    """Each preset's time for an image, one thread, over that of `REFERENCE` in the same round; the
    book's charts of accuracy against time read this record."""
    images = torch.randn(128, 1, 28, 28)
    labels = torch.arange(128) % 10
    work = {}
    for name in PRESETS:
        models = [build(name), build(name).to(memory_format=torch.channels_last)]
        if count_parameters(models[0]) < 1e6:
            work[name] = [
                (_forward(model, images), _training_step(model, images, labels)) for model in models
            ]
    taken: dict[str, list[list[float]]] = {name: [] for name in work}
    for _ in tqdm(range(rounds + 1), unit="round", leave=False):
        for name, layouts in work.items():  # the quicker memory layout counts
            seconds = [[_seconds(step, 2) for step in steps] for steps in layouts]
            taken[name].append([min(pair) for pair in zip(*seconds, strict=True)])
    rows = []
    for name, own in taken.items():
        pairs = list(zip(own, taken[REFERENCE], strict=True))[1:]  # the first round warms up
        row = {"name": name, "rounds": str(rounds)}
        for i, what in enumerate(("inference", "training")):
            ratios = [a[i] / b[i] for a, b in pairs]
            row[what] = f"{statistics.median(ratios):.3g}"
            row[f"{what}_range"] = f"{min(ratios):.3g} to {max(ratios):.3g}"
        rows.append(row | {"machine": processor(), "date": datetime.date.today().isoformat()})
    _write(SPEEDS, rows)
    return rows


def _forward(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def step() -> None:
        model.eval()
        with torch.no_grad():
            model(images)

    return step


def _training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    loss = LOSSES["capsules" if isinstance(model, CapsuleNet) else "cross-entropy"]
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()

    return step


def _seconds(step: Callable[[], object], times: int) -> float:
    """Of the processor, on one thread: what else the machine does counts less so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.process_time()
    for _ in range(times):
        step()
    seconds = time.process_time() - started
    torch.set_num_threads(threads)
    return seconds


def _write(path: Path, rows: list[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


PARTS = {"overhead": overhead, "dataloader": dataloader, "to99": to99, "mended": mended}


def _conditions() -> list[Row]:
    said = {
        "machine": f"{processor()}, {torch.get_num_threads()} threads, {platform.system()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }
    return [dict(measure=k, value=v, range="", n="", how="") for k, v in said.items()]
