"""Data sets in memory, one call each; batches and augmentation on the model's device."""

import difflib
import functools
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
N_VAL = 5_000  # images set aside from the training file: every choice is made on these

# The four files as their owners published them, with the MD5 sums that torchvision lists.
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
DIGITS = tuple("0123456789")


class DataError(RuntimeError):
    """A data file is missing or damaged. The message is one line that says what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, held in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        mean, std: per channel, of pixels scaled to 0..1; what `normalise` subtracts and divides by.

    Raises:
        ValueError: the tensors do not have these shapes and types.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise ValueError(
                "images must be uint8 [N, C, H, W], not "
                f"{self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 [{len(self.images)}], one for each image, not "
                f"{self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> "Split":
        """The images that a slice, a mask or a tensor of indices picks."""
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> "Split":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in 0..1, float [N, C, H, W] -> what a model is fed: (pixels - mean) / std."""
        mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def inputs(self) -> Tensor:
        """All images as a model is fed them: float32 [N, C, H, W]."""
        return self.normalise(self.images.float() / 255)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits: `train` to fit, `val` to choose with, `test` to look at once."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...] = DIGITS

    def __repr__(self) -> str:
        parts = ", ".join(f"{k}={len(getattr(self, k)):,}" for k in ("train", "val", "test"))
        return f"Dataset({self.name!r}, {parts}, image={list(self.train.images.shape[1:])})"


def stratified_split(labels: Tensor, n_val: int = N_VAL) -> tuple[Tensor, Tensor]:
    """Set aside `n_val` images, each class in proportion, with no random number.

    The images are sorted by class, keeping the file's order within one, and every k-th goes to
    validation: the same split on every machine and in every version of every library.

    Args:
        labels: int64 [N], with N a multiple of `n_val`.

    Returns:
        Indices of the training and of the validation images, both in the file's order.
    """
    step = len(labels) // n_val
    by_class = torch.argsort(labels, stable=True)
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    is_val[by_class[step - 1 :: step]] = True
    return (~is_val).nonzero().flatten(), is_val.nonzero().flatten()


# --- reading ------------------------------------------------------------------------------------


def check_md5(path: Path, expected: str) -> bytes:
    """The file's bytes, if their MD5 sum is the expected one; DataError names the file if not."""
    raw = path.read_bytes()
    if (found := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != expected:
        raise DataError(
            f"{path} is damaged: its MD5 is {found}, not {expected}; delete it and load again"
        )
    return raw


def read_idx(path: Path, md5: str | None = None) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or not, whole or not at all.

    Args:
        path: the file; gunzipped if its name ends in .gz.
        md5: checked first, where given.

    Returns:
        uint8, shaped as the header says: [N] for labels, [N, H, W] for images.
    """
    raw = check_md5(path, md5) if md5 else path.read_bytes()
    try:
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and load again") from None
    # Header: 0, 0, 8 (unsigned byte), number of dimensions, then each as a big-endian int32.
    ndim = raw[3] if raw[:3] == b"\x00\x00\x08" else 0
    start = 4 + 4 * ndim
    shape = np.frombuffer(raw[4:start], ">i4").tolist() if len(raw) >= start else []
    if ndim not in (1, 3) or len(raw) != start + int(np.prod(shape)):
        raise DataError(f"{path} is damaged: not a complete IDX file; delete it and load again")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).view(shape)


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and its statistics over the training file."""

    torchvision: str  # class in torchvision.datasets, which knows the addresses and checksums
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = DIGITS  # None: named in the files


SOURCES = {
    "mnist": Source("MNIST", (0.1307,), (0.3081,)),
    "fashion-mnist": Source(
        "FashionMNIST",
        (0.2860,),
        (0.3530,),
        (
            *("T-shirt", "trouser", "pullover", "dress", "coat"),
            *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
        ),
    ),
    "kmnist": Source(
        "KMNIST", (0.1918,), (0.3483,), ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    ),
    "cifar10": Source("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), None),
    "cifar100": Source("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), None),
}


def data_root(root: str | Path | None = None) -> Path:
    """The folder of downloaded data sets: `root`, else `$MNISTLAB_DATA`, else a cache at home."""
    root = root or os.environ.get("MNISTLAB_DATA") or "~/.cache/mnistlab"
    return Path(root).expanduser()


def load(
    name: str = "mnist",
    root: str | Path | None = None,
    download: bool = True,
    *,
    resplit: int | None = None,
) -> Dataset:
    """Load a data set: MNIST from the package itself, the others from a cache or their owners.

    Args:
        name: "mnist", "fashion-mnist", "kmnist", "cifar10" or "cifar100".
        root: folder of data sets, instead of `$MNISTLAB_DATA` or the cache. Files already under
            `root/name`, or where torchvision keeps them, are used as they are.
        download: fetch what is missing (each file is checked against its published checksum).
        resplit: forget the owners' split: put all images together and share them out by chance,
            drawn from this seed, into parts of the usual sizes.

    Returns:
        A Dataset; the next call with the same arguments returns the same object.

    Raises:
        ValueError: unknown name.
        DataError: files missing and not to be had, or damaged.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown data set {name!r}{hint} (known: {', '.join(SOURCES)})")
    return _load(name, data_root(root), download, resplit)


@functools.cache
def _load(name: str, root: Path, download: bool, resplit: int | None = None) -> Dataset:
    source = SOURCES[name]
    if name == "mnist":
        arrays = [read_idx(ASSETS / file, md5) for file, md5 in MNIST_FILES.items()]
        classes = source.classes
    elif name.startswith("cifar"):
        arrays, classes = _read_cifar(name, root, download)
    else:
        arrays, classes = _read_idx_family(name, root, download), source.classes

    def split(images: Tensor, labels: Tensor) -> Split:
        if images.ndim == 3:
            images = images.unsqueeze(1)  # [N, H, W] -> [N, 1, H, W]
        return Split(images, labels.long(), source.mean, source.std)

    full, test = split(*arrays[:2]), split(*arrays[2:])
    if resplit is None:
        train, val = (full[index] for index in stratified_split(full.labels))
    else:
        images, labels = (torch.cat(pair) for pair in zip(arrays[:2], arrays[2:], strict=True))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(resplit))
        sizes = [len(full) - N_VAL, N_VAL, len(test)]
        train, val, test = (split(images[i], labels[i]) for i in order.split(sizes))
    return Dataset(name, train, val, test, classes)


def _read_idx_family(name: str, root: Path, download: bool) -> list[Tensor]:
    """Fashion-MNIST and KMNIST: four IDX files, gzipped or raw, found or fetched."""
    import torchvision

    known = getattr(torchvision.datasets, SOURCES[name].torchvision)
    folders = (root / name, root / known.__name__ / "raw")
    arrays = []
    for file, md5 in known.resources:
        candidates = [folder / n for folder in folders for n in (file, file.removesuffix(".gz"))]
        path = next((p for p in candidates if p.is_file()), None)
        if path is None:
            path = folders[0] / file
            _download(name, [mirror + file for mirror in known.mirrors], path, md5, download)
        arrays.append(read_idx(path, md5 if path.suffix == ".gz" else None))
    return arrays


def _read_cifar(name: str, root: Path, download: bool) -> tuple[list[Tensor], tuple[str, ...]]:
    """CIFAR's python batches, found or fetched, each checked, then read by torchvision."""
    import torchvision

    known = getattr(torchvision.datasets, SOURCES[name].torchvision)
    where = next((p for p in (root / name, root) if (p / known.base_folder).is_dir()), root / name)
    if not (where / known.base_folder).is_dir():
        archive = where / known.filename
        if archive.is_file():
            check_md5(archive, known.tgz_md5)
        else:
            _download(name, [known.url], archive, known.tgz_md5, download)
        torchvision.datasets.utils.extract_archive(archive, where)
    meta = (known.meta["filename"], known.meta["md5"])
    for file, md5 in [*known.train_list, *known.test_list, meta]:
        path = where / known.base_folder / file
        if not path.is_file():
            raise DataError(f"{name}: {path} is missing; put it there, or delete its folder")
        check_md5(path, md5)
    arrays = []
    for train in (True, False):
        part = known(where, train=train)
        arrays += [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()]
        arrays += [torch.tensor(part.targets)]
    return arrays, tuple(part.classes)


def _download(name: str, urls: list[str], path: Path, md5: str, allowed: bool) -> None:
    """Fetch one file into place: checked first, then moved, so that no half file is ever seen."""
    from torchvision.datasets.utils import download_url

    reason = "download=False"
    for url in urls if allowed else []:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                download_url(url, folder, path.name, md5)
                os.replace(Path(folder) / path.name, path)
            return
        except (OSError, RuntimeError) as error:  # no network, server error, wrong checksum
            reason = str(error)
    raise DataError(
        f"{name}: {path.name} is missing and could not be downloaded ({reason}); "
        f"put it in {path.parent}, or set MNISTLAB_DATA to a folder that holds {name}/{path.name}"
    )


# --- drawings -----------------------------------------------------------------------------------


def normalise(strokes: Tensor) -> Tensor:
    """Bring a drawing into MNIST's form: its size and place, not its scale of grey.

    As LeCun et al. (1998) did with NIST's scans: the box around the ink is scaled, with
    anti-aliasing, until its longer side has 20 pixels, and is laid into 28x28 pixels, moved by
    whole ones, with the centre of mass in the middle. In MNIST's files that is pixel 14, rounded.

    Args:
        strokes: ink in 0..1 on an empty ground of 0, float [H, W].

    Returns:
        float [28, 28] in 0..1.

    Raises:
        ValueError: there is no ink.
    """
    rows, columns = (strokes.amax(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    if not rows:
        raise ValueError("nothing is drawn")
    box = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(1, round(20 * side / max(box.shape))) for side in box.shape]
    box = F.interpolate(box[None, None], size, mode="bilinear", antialias=True)[0, 0]
    placed = strokes.new_zeros(28, 28)
    corner = []
    for axis, side in enumerate(size):
        mass = box.sum(1 - axis)
        centre = (mass @ torch.arange(side, dtype=box.dtype) / mass.sum()).item()
        corner.append(min(max(round(14 - centre), 0), 28 - side))  # never off the edge
    top, left = corner
    placed[top : top + size[0], left : left + size[1]] = box
    return placed


# --- batches and augmentation -------------------------------------------------------------------


def batches(
    split: Split,
    batch_size: int,
    *,
    shuffle: torch.Generator | None = None,
    augment: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
    drop_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over a split, on the device it lies on: no workers, no Python per image.

    Args:
        shuffle: draws the order and the augmentation; None keeps the file's order.
        augment: (pixels in 0..1, `shuffle`) -> pixels, applied to each batch, such as an Augment.
        drop_last: leave out a last batch that is not full.

    Yields:
        Normalised images, float32 [B, C, H, W], and labels, int64 [B].
    """
    n, device = len(split), split.labels.device
    mean, std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (split.mean, split.std))
    if shuffle is not None:
        order = torch.randperm(n, generator=shuffle, device=shuffle.device).to(device)
    for start in range(0, n - batch_size + 1 if drop_last else n, batch_size):
        stop = start + batch_size
        if shuffle is None:
            images, labels = split.images[start:stop], split.labels[start:stop]
        else:  # index_select: many times quicker than images[index]
            index = order[start:stop]
            images, labels = split.images.index_select(0, index), split.labels[index]
        if augment is None:  # in place, and scaled to 0..1 on the way: it is the commonest case
            yield images.float().sub_(255 * mean).div_(255 * std), labels
        else:
            yield (augment(images.float().div_(255), shuffle) - mean).div_(std), labels


def warp(
    images: Tensor,
    *,
    angle: Tensor | float = 0.0,
    shift: Tensor | tuple[float, float] = (0.0, 0.0),
    scale: Tensor | float = 1.0,
    shear: Tensor | float = 0.0,
    displacement: Tensor | None = None,
) -> Tensor:
    """Rotate, scale, shear, shift and bend images in one bilinear resampling; outside is 0.

    The affine part follows torchvision's `affine`, with one set of numbers for each image.

    Args:
        images: float [N, C, H, W].
        angle: degrees, clockwise. Scalar or [N].
        shift: pixels to the right and down. (x, y) or [N, 2].
        scale: magnification about the centre. Scalar or [N].
        shear: degrees, along x. Scalar or [N].
        displacement: pixels, [N, 2, H, W], added to where each output pixel looks (x, y).

    Returns:
        float [N, C, H, W].
    """
    n, _, h, w = images.shape
    as_column = functools.partial(torch.as_tensor, dtype=images.dtype, device=images.device)
    angle, shear = (torch.deg2rad(as_column(v)).expand(n) for v in (angle, shear))
    scale, shift = as_column(scale).expand(n), as_column(shift).expand(n, 2)
    # Output pixel -> input pixel, so the inverse: undo the shift, the scale, then rotation . shear
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    inverse = torch.stack((cos - sin * tan, sin + cos * tan, -sin, cos), 1).view(n, 2, 2)
    inverse = inverse / scale.view(n, 1, 1)
    x = torch.arange(w, device=images.device, dtype=images.dtype) - (w - 1) / 2
    y = torch.arange(h, device=images.device, dtype=images.dtype) - (h - 1) / 2
    centred = torch.stack(torch.meshgrid(x, y, indexing="xy")).view(1, 2, h * w)
    source = inverse @ (centred - shift.unsqueeze(2))  # [N, 2, H*W], pixels from the centre
    if displacement is not None:
        source = source + displacement.flatten(2)
    size = source.new_tensor([w, h]).view(1, 2, 1)
    grid = (source * 2 / size).permute(0, 2, 1).view(n, h, w, 2)  # -1..1 over the image
    return F.grid_sample(images, grid, align_corners=False)


@dataclass(frozen=True)
class Augment:
    """Random changes that keep a digit's meaning; every image of a batch gets its own draw.

    The elastic field is that of Simard et al. (2003): uniform noise in -1..1, smoothed by a
    Gaussian and multiplied by alpha. Their values for MNIST: elastic=34, sigma=4.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    rotate: float = 0.0  # degrees; the angle is uniform in -rotate..rotate
    shift: float = 0.0  # pixels, in x and in y
    scale: float = 0.0  # 0.1 magnifies by 0.9..1.1
    shear: float = 0.0  # degrees
    elastic: float = 0.0  # alpha, pixels
    sigma: float = 4.0  # of the elastic field, pixels
    crop: int = 0  # pad by so many pixels and crop at random: a whole-pixel shift
    flip: bool = False  # mirror half of the images (never for digits)

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0 or (name == "scale" and value >= 1) or (name == "sigma" and value == 0):
                raise ValueError(f"Augment: {name}={value} is out of range")

    def __bool__(self) -> bool:
        """Whether it changes anything."""
        return any(value for name, value in vars(self).items() if name != "sigma")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change a batch, float [N, C, H, W]; the result has the same shape."""
        n, _, h, w = images.shape

        def uniform(*shape: int) -> Tensor:  # in -1..1
            draw = torch.rand(shape, generator=generator, device=generator.device)
            return draw.to(images.device) * 2 - 1

        shift = self.shift * uniform(n, 2)
        if self.crop:
            shift = shift + (uniform(n, 2) * (self.crop + 0.5)).round().clamp(-self.crop, self.crop)
        displacement = None
        if self.elastic:
            smooth_x, smooth_y = (_gaussian(size, self.sigma, images) for size in (w, h))
            displacement = self.elastic * (smooth_y @ uniform(n, 2, h, w) @ smooth_x.T)
        if self.flip:
            images = torch.where(uniform(n, 1, 1, 1) > 0, images.flip(3), images)
        return warp(
            images,
            angle=self.rotate * uniform(n),
            shift=shift,
            scale=1 + self.scale * uniform(n),
            shear=self.shear * uniform(n),
            displacement=displacement,
        )


def _gaussian(size: int, sigma: float, like: Tensor) -> Tensor:
    """Gaussian smoothing of a line of pixels as a matrix [size, size]; each row sums to 1."""
    i = torch.arange(size, device=like.device, dtype=like.dtype)
    weights = torch.exp(-((i - i.view(-1, 1)) ** 2) / (2 * sigma**2))
    return weights / weights.sum(1, keepdim=True)


def rotations(*degrees: float) -> list[Callable[[Tensor], Tensor]]:
    """Views for test-time augmentation: `evaluate(model, split, tta=rotations(-3, 0, 3))`."""
    return [functools.partial(warp, angle=float(d)) for d in degrees]
