"""Data sets: what is in them, what is refused; batches and augmentation against torchvision."""

import functools
import gzip
import hashlib
import http.server
import os
import pickle
import shutil
import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import mnistlab as ml
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from mnistlab import Augment, DataError, Split, data
from mnistlab.data import batches, read_idx, stratified_split, warp
from torchvision.transforms import v2

# --- MNIST --------------------------------------------------------------------------------------


@functools.cache
def train_file() -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of MNIST's training file, in its order."""
    images, labels = (f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    return read_idx(data.ASSETS / images), read_idx(data.ASSETS / labels).long()


def test_mnist_has_the_sizes_and_types_promised(mnist):
    assert (
        repr(mnist) == "Dataset('mnist', train=55,000, val=5,000, test=10,000, image=[1, 28, 28])"
    )
    for part, n in ((mnist.train, 55_000), (mnist.val, 5_000), (mnist.test, 10_000)):
        assert part.images.shape == (n, 1, 28, 28) and part.images.dtype == torch.uint8
        assert part.labels.shape == (n,) and part.labels.dtype == torch.int64


def test_mnist_is_the_published_file_in_its_order(mnist):
    images, labels = train_file()
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels.bincount().tolist() == [
        *(5923, 6742, 5958, 6131, 5842),
        *(5421, 5918, 6265, 5851, 5949),
    ]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.test.labels.bincount().tolist() == test
    assert images[0].sum() == 27_525  # the first 5


def test_the_split_is_two_parts_of_the_file(mnist):
    images, labels = train_file()
    train, val = stratified_split(labels)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(60_000))
    assert torch.equal(images[train], mnist.train.images[:, 0])
    assert torch.equal(images[val], mnist.val.images[:, 0])
    assert torch.equal(labels[val], mnist.val.labels)


def test_the_split_never_changes():
    _, val = stratified_split(train_file()[1])
    digest = hashlib.sha256(val.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == "6138b33ce230f31775532aeb90c67164cbfa5502db1bf8b695d4ad08b330375c"


def test_the_split_is_stratified(mnist):
    share = mnist.val.labels.bincount() * 12 - train_file()[1].bincount()
    assert share.abs().max() <= 12  # to within one image of every class


@pytest.mark.parametrize(("n", "n_val"), [(100, 10), (12, 12), (30, 1)])
def test_stratified_split_sets_aside_as_many_as_asked(n, n_val):
    train, val = stratified_split(torch.arange(n) % 3, n_val)
    assert (len(train), len(val)) == (n - n_val, n_val)
    assert torch.equal(val, val.sort().values)


def test_mean_and_std_are_those_of_the_training_file(mnist):
    pixels = train_file()[0].float() / 255
    assert mnist.train.mean == pytest.approx([pixels.mean().item()], abs=5e-5)
    assert mnist.train.std == pytest.approx([pixels.std().item()], abs=5e-5)
    assert (mnist.test.mean, mnist.test.std) == (mnist.train.mean, mnist.train.std)


def test_a_second_load_returns_the_same_object(mnist):
    assert ml.load("mnist") is mnist
    assert ml.load() is mnist


def test_mnist_needs_no_network(offline, tmp_path):
    fresh = data._load.__wrapped__("mnist", tmp_path / "nowhere", download=False)
    assert len(fresh.test) == 10_000
    assert not (tmp_path / "nowhere").exists()


# --- files that are damaged ---------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes, after the description at its owners' site."""
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


WHOLE = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
PACKED = gzip.compress(WHOLE, mtime=0)


@pytest.mark.parametrize(("name", "raw"), [("whole", WHOLE), ("whole.gz", PACKED)])
def test_read_idx_reads_what_was_written(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    assert torch.equal(read_idx(tmp_path / name), torch.arange(24).view(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "raw"),
    {
        "empty": ("a", b""),
        "cut header": ("a", WHOLE[:9]),
        "cut pixels": ("a", WHOLE[:-1]),
        "more than it says": ("a", WHOLE + b"\0"),
        "signed": ("a", b"\0\0\x09" + WHOLE[3:]),
        "bad magic": ("a", b"\1" + WHOLE[1:]),
        "no dimension": ("a", b"\0\0\x08\0"),
        "negative size": ("a", idx(np.empty(0, np.uint8))[:4] + struct.pack(">i", -5)),
        "a page of HTML": ("a.gz", b"<!DOCTYPE html>"),
        "empty gz": ("a.gz", b""),
        "cut gz": ("a.gz", PACKED[:-9]),
        "flipped bit in gz": ("a.gz", PACKED[:20] + bytes([PACKED[20] ^ 1]) + PACKED[21:]),
        "gz of a cut file": ("a.gz", gzip.compress(WHOLE[:-1], mtime=0)),
    }.values(),
)
def test_read_idx_refuses_a_damaged_file_in_one_line(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    assert str(tmp_path / name) in one_line(lambda: read_idx(tmp_path / name))


def one_line(call) -> str:
    """The message of the DataError that `call` raises, which is one line."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("file", data.MNIST_FILES)
def test_a_damaged_mnist_file_is_named(tmp_path, monkeypatch, file):
    for name in data.MNIST_FILES:
        (tmp_path / name).symlink_to(data.ASSETS / name)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    (tmp_path / file).write_bytes(whole[:-100])
    monkeypatch.setattr(data, "ASSETS", tmp_path)
    message = one_line(lambda: data._load.__wrapped__("mnist", tmp_path, download=True))
    assert str(tmp_path / file) in message and data.MNIST_FILES[file] in message


@pytest.mark.parametrize(
    ("images", "labels", "named"),
    [
        (torch.zeros(3, 1, 4, 4), torch.zeros(3).long(), "images must be uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), "images must be uint8"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), "one for each image"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3), "labels must be int64"),
    ],
)
def test_a_split_of_another_shape_or_type_is_refused(images, labels, named):
    with pytest.raises(ValueError, match=named):
        Split(images, labels)


def test_a_split_is_indexed_by_slice_mask_and_indices(tiny):
    third = tiny.train[2:3]
    assert torch.equal(third.images[0], tiny.train.images[2]) and third.mean == tiny.train.mean
    assert tiny.train[tiny.train.labels == 1].labels.unique().tolist() == [1]
    assert torch.equal(tiny.train[torch.tensor([5, 0])].labels, torch.tensor([1, 0]))


# --- data sets that are not in the package ------------------------------------------------------

PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
PARTS += ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture
def idx_files(monkeypatch) -> dict[str, bytes]:
    """Four small IDX files, whose gzipped checksums Fashion-MNIST and KMNIST now list."""
    draw = np.random.default_rng(0)
    labels = (np.arange(10_000) % 10).astype(np.uint8)
    arrays = (draw.integers(256, size=(10_000, 2, 2), dtype=np.uint8), labels)
    arrays += (draw.integers(256, size=(20, 2, 2), dtype=np.uint8), labels[:20])
    files = {name: idx(array) for name, array in zip(PARTS, arrays, strict=True)}
    listed = [
        (f"{k}.gz", hashlib.md5(gzip.compress(v, mtime=0)).hexdigest()) for k, v in files.items()
    ]
    for known in (torchvision.datasets.FashionMNIST, torchvision.datasets.KMNIST):
        monkeypatch.setattr(known, "resources", listed)
    return files


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address under which a thread of this process serves `tmp_path / "server"`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(Quiet, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/"
        served.shutdown()


def put(folder: Path, files: dict[str, bytes], packed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("fashion-mnist", "fashion-mnist"),
        ("fashion-mnist", "FashionMNIST/raw"),
        ("kmnist", "kmnist"),
        ("kmnist", "KMNIST/raw"),
    ],
)
def test_idx_files_that_are_there_are_used(idx_files, offline, tmp_path, name, folder, packed):
    put(tmp_path / folder, idx_files, packed)
    loaded = ml.load(name, root=tmp_path)
    assert [len(s) for s in (loaded.train, loaded.val, loaded.test)] == [5_000, 5_000, 20]
    assert torch.equal(loaded.test.labels, torch.arange(20) % 10)
    last = np.frombuffer(idx_files[PARTS[2]][-4:], np.uint8)
    assert loaded.test.images[-1].flatten().tolist() == last.tolist()
    assert len(set(loaded.classes)) == 10


def test_a_damaged_download_is_named(idx_files, offline, tmp_path):
    put(tmp_path / "kmnist", idx_files, packed=True)
    damaged = tmp_path / "kmnist" / f"{PARTS[2]}.gz"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert str(damaged) in one_line(lambda: ml.load("kmnist", root=tmp_path))


def test_mnistlab_data_names_the_folder(idx_files, offline, tmp_path, monkeypatch):
    put(tmp_path / "kmnist", idx_files, packed=True)
    monkeypatch.setenv("MNISTLAB_DATA", str(tmp_path))
    assert data.data_root() == tmp_path
    assert len(ml.load("kmnist").test) == 20
    assert data.data_root("elsewhere") == Path("elsewhere")  # an argument comes first
    monkeypatch.delenv("MNISTLAB_DATA")
    assert data.data_root() == Path.home() / ".cache" / "mnistlab"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.gz"),
        ("kmnist", "train-images-idx3-ubyte.gz"),
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
    ],
)
@pytest.mark.parametrize("download", [True, False])
def test_offline_and_absent_says_what_is_missing_and_where_to_put_it(
    offline, tmp_path, name, file, download
):
    message = one_line(lambda: ml.load(name, root=tmp_path, download=download))
    assert message.startswith(f"{name}: {file} is missing")
    assert f"put it in {tmp_path / name}" in message and "MNISTLAB_DATA" in message
    assert ("no network" if download else "download=False") in message
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_an_unknown_data_set_suggests_the_near_one():
    with pytest.raises(ValueError, match=r"'fashion-mnist'.*known: mnist, "):
        ml.load("fashion_mnist")


def test_what_is_missing_is_downloaded(idx_files, server, tmp_path, monkeypatch):
    put(tmp_path / "server", idx_files, packed=True)
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [server])
    assert len(ml.load("kmnist", root=tmp_path / "cache").train) == 5_000
    cached = {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert cached == {f"{name}.gz" for name in PARTS}


def test_a_download_with_another_checksum_is_not_kept(idx_files, server, tmp_path, monkeypatch):
    files = idx_files | {PARTS[0]: b"not what was published"}
    put(tmp_path / "server", files, packed=True)
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [server])
    assert PARTS[0] in one_line(lambda: ml.load("kmnist", root=tmp_path / "cache"))
    assert not any(p.is_file() for p in (tmp_path / "cache").rglob("*"))


def test_the_second_mirror_serves_where_the_first_fails(idx_files, server, tmp_path, monkeypatch):
    put(tmp_path / "server", idx_files, packed=True)
    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", [server + "gone/", server])
    assert len(ml.load("kmnist", root=tmp_path / "cache").test) == 20


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_a_download_that_breaks_off_leaves_nothing(offline, tmp_path, monkeypatch, error):
    def half(url, root, filename, md5):
        Path(root, filename).write_bytes(b"the first half")
        raise error("cable pulled")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", half)
    with pytest.raises(
        KeyboardInterrupt if error is KeyboardInterrupt else DataError, match="cable"
    ):
        ml.load("kmnist", root=tmp_path)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch) -> tuple[str, Path, Path]:
    """Tiny python batches with their checksums listed: name, folder of the batches, archive."""
    known = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    known, folder = known[request.param], tmp_path / "server" / known[request.param].base_folder
    folder.mkdir(parents=True)
    meta = known.meta["filename"]
    labels = [i % 10 for i in range(5_000)]

    def dump(file: str, content: dict) -> tuple[str, str]:
        (folder / file).write_bytes(pickle.dumps(content))
        return file, hashlib.md5((folder / file).read_bytes()).hexdigest()

    # load() would keep each of them, 60 MB.
    monkeypatch.setattr(data, "_load", functools.cache(data._load.__wrapped__))
    key = "labels" if request.param == "cifar10" else "fine_labels"
    pixels = np.random.default_rng(0).integers(256, size=(10, 3072), dtype=np.uint8)
    plain = np.zeros((5_000, 3072), np.uint8)
    train = [dump(f, {"data": plain, key: labels}) for f in ("batch_1", "batch_2")]
    test = [dump("test", {"data": pixels, key: labels[:10]})]
    _, md5 = dump(meta, {known.meta["key"]: [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(known, "train_list", train)
    monkeypatch.setattr(known, "test_list", test)
    monkeypatch.setattr(known, "meta", known.meta | {"md5": md5})
    archive = tmp_path / "server" / known.filename
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, arcname=known.base_folder)
    monkeypatch.setattr(known, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return request.param, folder, archive


def check_cifar(loaded: ml.Dataset, folder: Path) -> None:
    assert [len(s) for s in (loaded.train, loaded.val, loaded.test)] == [5_000, 5_000, 10]
    raw = pickle.loads((folder / "test").read_bytes())["data"][9]
    # The owners' description: 1,024 bytes of red, then of green, then of blue, row by row.
    assert loaded.test.images[9].flatten().tolist() == raw.tolist()
    assert loaded.test.labels.tolist() == list(range(10))
    assert loaded.classes[3] == "class 3"
    assert len(loaded.train.mean) == len(loaded.train.std) == 3


@pytest.mark.parametrize("below", ["", "{name}"])
def test_cifar_batches_that_are_there_are_used(cifar, offline, tmp_path, below):
    name, folder, _ = cifar
    root = tmp_path / "root"
    shutil.copytree(folder, root / below.format(name=name) / folder.name)
    check_cifar(ml.load(name, root=root), folder)


def test_cifar_is_downloaded_and_unpacked(cifar, server, tmp_path, monkeypatch):
    name, folder, archive = cifar
    known = getattr(torchvision.datasets, data.SOURCES[name].torchvision)
    monkeypatch.setattr(known, "url", server + archive.name)
    check_cifar(ml.load(name, root=tmp_path / "cache"), folder)


def test_a_cifar_archive_put_where_the_message_says_is_used(cifar, offline, tmp_path):
    name, folder, archive = cifar
    (tmp_path / "root" / name).mkdir(parents=True)
    shutil.copy(archive, tmp_path / "root" / name)
    check_cifar(ml.load(name, root=tmp_path / "root"), folder)


def test_a_damaged_cifar_archive_is_named(cifar, offline, tmp_path):
    name, _, archive = cifar
    put(tmp_path / name, {archive.name: archive.read_bytes()[:-9]}, packed=False)
    assert str(tmp_path / name / archive.name) in one_line(lambda: ml.load(name, root=tmp_path))


def test_a_damaged_or_missing_cifar_batch_is_named(cifar, offline):
    name, folder, _ = cifar
    where = folder.parent
    whole = (folder / "batch_2").read_bytes()
    (folder / "batch_2").write_bytes(whole[:-1])
    assert str(folder / "batch_2") in one_line(lambda: ml.load(name, root=where))
    (folder / "batch_2").unlink()
    assert f"{folder / 'batch_2'} is missing" in one_line(lambda: ml.load(name, root=where))


@pytest.mark.parametrize("name", [n for n in data.SOURCES if n != "mnist"])
def test_the_real_data_set_has_the_statistics_listed(name, offline):
    if "MNISTLAB_DATA" not in os.environ:
        pytest.skip("set MNISTLAB_DATA to a folder that holds it")
    try:
        loaded = ml.load(name, download=False)
    except DataError as error:
        pytest.skip(str(error))
    assert len(loaded.val) == 5_000 and len(loaded.test) == 10_000
    assert loaded.val.labels.bincount().unique().tolist() == [5_000 // len(loaded.classes)]
    pixels = torch.cat([loaded.train.images, loaded.val.images]).float().div_(255)
    assert loaded.train.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=6e-5)
    assert loaded.train.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), abs=6e-5)


# --- batches ------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("size", "sizes"), [(100, (100, 100, 56)), (255, (255, 1))])
def test_batches_keep_the_order_of_the_file_by_default(tiny, size, sizes):
    found, labels = zip(*((len(y), y) for _, y in batches(tiny.train, size)), strict=True)
    assert found == sizes
    assert torch.equal(torch.cat(labels), tiny.train.labels)


@pytest.mark.parametrize(("size", "sizes"), [(100, [100, 100]), (256, [256]), (300, [])])
def test_drop_last_leaves_out_a_batch_that_is_not_full(tiny, size, sizes):
    assert [len(y) for _, y in batches(tiny.train, size, drop_last=True)] == sizes


def test_shuffling_is_a_seeded_permutation_that_keeps_labels_with_images(tiny):
    def one_pass(seed):
        images, labels = zip(*batches(tiny.train, 100, shuffle=seeded(seed)), strict=True)
        return torch.cat(images), torch.cat(labels)

    images, labels = one_pass(0)
    everything = tiny.train.inputs()
    found = torch.cdist(images.flatten(1), everything.flatten(1)).argmin(1)
    assert torch.equal(found.sort().values, torch.arange(256))
    assert not torch.equal(found, torch.arange(256))
    assert torch.equal(labels, tiny.train.labels[found])
    assert torch.equal(one_pass(0)[0], images)
    assert not torch.equal(one_pass(1)[0], images)


def test_two_passes_of_one_generator_differ(tiny):
    draw = seeded()
    first, second = (next(iter(batches(tiny.train, 256, shuffle=draw)))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_normalisation_is_that_of_torchvision(mnist):
    theirs = torchvision.transforms.Compose(
        [
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(mnist.val.mean, mnist.val.std),
        ]
    )
    images, _ = next(iter(batches(mnist.val, 20)))
    expected = torch.stack([theirs(image[0].numpy()) for image in mnist.val.images[:20]])
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(mnist.val[:20].inputs(), expected)


def test_normalisation_is_per_channel():
    split = Split(
        torch.full((1, 2, 1, 1), 255, dtype=torch.uint8),
        torch.zeros(1).long(),
        (0.5, 0.0),
        (0.5, 2.0),
    )
    assert split.inputs().flatten().tolist() == [1.0, 0.5]


def test_batches_augment_pixels_in_0_to_1(tiny):
    seen = []

    def spy(pixels, generator):
        seen.append((pixels.min() >= 0) & (pixels.max() <= 1) & (generator is draw))
        return torch.zeros_like(pixels)

    draw = seeded()
    images, _ = next(batches(tiny.train, 8, shuffle=draw, augment=spy))
    assert seen == [True]
    torch.testing.assert_close(images, torch.full_like(images, -0.35 / 0.2))


# --- augmentation -------------------------------------------------------------------------------


@pytest.fixture
def digits(mnist) -> torch.Tensor:
    return mnist.val.images[:20].float() / 255


def test_warp_is_torchvisions_affine_with_one_draw_for_each_image(digits):
    draw = np.random.default_rng(0)
    angle, shear = draw.uniform(-60, 60, 20), draw.uniform(-30, 30, 20)
    scale, shift = draw.uniform(0.6, 1.5, 20), draw.uniform(-5, 5, (20, 2))
    tensor = functools.partial(torch.tensor, dtype=torch.float32)
    ours = warp(
        digits, angle=tensor(angle), shift=tensor(shift), scale=tensor(scale), shear=tensor(shear)
    )
    for i, image in enumerate(digits):
        theirs = v2.functional.affine(
            image,
            angle[i],
            shift[i].tolist(),
            scale[i],
            [shear[i], 0.0],
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(ours[i], theirs, atol=1e-4, rtol=0)


def test_warp_treats_sides_of_different_length_and_channels_as_torchvision(mnist):
    image = torch.rand(3, 12, 20, generator=seeded())
    theirs = v2.functional.affine(
        image, 25.0, [2.0, -1.0], 1.2, [10.0, 0.0], v2.InterpolationMode.BILINEAR
    )
    ours = warp(image[None], angle=25, shift=(2, -1), scale=1.2, shear=10)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_warp_by_nothing_changes_nothing(digits):
    torch.testing.assert_close(warp(digits), digits, atol=1e-5, rtol=0)


def test_warp_shifts_by_whole_pixels_right_and_down(digits):
    shifted = warp(digits, shift=(3, 2))
    torch.testing.assert_close(shifted[..., 2:, 3:], digits[..., :-2, :-3], atol=1e-5, rtol=0)
    assert shifted[..., :2, :].abs().max() == 0 and shifted[..., :3].abs().max() == 0


def test_warp_displaces_as_torchvisions_elastic_does(digits):
    displacement = 3 * torch.randn(20, 2, 28, 28, generator=seeded())
    ours = warp(digits, displacement=displacement)
    for image, field, got in zip(digits, displacement, ours, strict=True):
        share = field.permute(1, 2, 0)[None] * 2 / 28  # torchvision's unit: half an image
        theirs = v2.functional.elastic(image, share, v2.InterpolationMode.BILINEAR, fill=0)
        torch.testing.assert_close(got, theirs, atol=1e-4, rtol=0)


ALL = Augment(rotate=10, shift=2, scale=0.1, shear=5, elastic=20, sigma=4, crop=1, flip=True)


def test_every_image_of_a_batch_gets_its_own_draw(digits):
    same = digits[:1].expand(8, -1, -1, -1)
    changed = ALL(same, seeded())
    assert changed.shape == same.shape
    assert torch.pdist(changed.flatten(1)).min() > 0.5


@pytest.mark.parametrize("field", ["rotate", "shift", "scale", "shear", "elastic", "crop", "flip"])
def test_every_field_alone_changes_images_each_in_its_own_way(digits, field):
    augment = Augment(**{field: getattr(ALL, field)})
    assert augment
    changed = augment(digits[:1].expand(12, -1, -1, -1), seeded())
    assert len(changed.unique(dim=0)) > 1


def test_the_same_generator_gives_the_same_images(digits, random_state_is_kept):
    assert torch.equal(ALL(digits, seeded(3)), ALL(digits, seeded(3)))
    assert not torch.equal(ALL(digits, seeded(3)), ALL(digits, seeded(4)))


def test_an_augment_of_nothing_is_false_and_changes_nothing(digits):
    assert not Augment() and not Augment(sigma=2)
    torch.testing.assert_close(Augment()(digits, seeded()), digits, atol=1e-5, rtol=0)


def point(n: int) -> torch.Tensor:
    """n images with one bright pixel at row 8, column 7 of 15."""
    images = torch.zeros(n, 1, 15, 15)
    images[:, :, 8, 7] = 1
    return images


def test_crop_shifts_by_every_whole_number_of_pixels_in_range():
    moved = Augment(crop=2)(point(2000), seeded())
    torch.testing.assert_close(moved.amax((1, 2, 3)), torch.ones(2000), atol=1e-5, rtol=0)
    places = {divmod(i, 15) for i in moved.flatten(1).argmax(1).tolist()}
    assert places == {(row, column) for row in range(6, 11) for column in range(5, 10)}
    rows = moved.sum((0, 1, 3))[6:11] / 2000
    torch.testing.assert_close(rows, torch.full((5,), 0.2), atol=0.03, rtol=0)  # all as often


def test_shift_stays_within_its_range_and_is_no_whole_number():
    moved = Augment(shift=2)(point(500), seeded())
    rows = (moved.sum((1, 3)) @ torch.arange(15.0)) - 8
    assert 1.9 < rows.abs().max() <= 2.001
    assert 0.2 < (rows - rows.round()).abs().mean() < 0.3  # 0.25 if uniform


def test_flip_mirrors_half_of_the_images_left_to_right():
    images = torch.zeros(1000, 1, 3, 3)
    images[..., 0] = 1
    left = Augment(flip=True)(images, seeded())[:, 0, 1, 0].round()
    assert 450 < left.sum() < 550


def test_rotate_and_scale_stay_within_their_range(monkeypatch):
    drawn = {}
    monkeypatch.setattr(data, "warp", lambda images, **fields: drawn.update(fields))
    Augment(rotate=10, scale=0.2, shear=5)(point(2000), seeded())
    for name, low, high in (("angle", -10, 10), ("scale", 0.8, 1.2), ("shear", -5, 5)):
        slack = 0.01 * (high - low)
        assert low <= drawn[name].min() < low + slack and high - slack < drawn[name].max() <= high
    assert drawn["displacement"] is None and drawn["shift"].abs().max() == 0


def test_the_elastic_field_is_smoothed_by_the_gaussian_of_scipy():
    from scipy.ndimage import gaussian_filter1d

    line = np.zeros(81, np.float32)
    line[40] = 1
    ours = data._gaussian(81, 4.0, torch.zeros(1)) @ torch.from_numpy(line)
    np.testing.assert_allclose(ours, gaussian_filter1d(line, 4.0, truncate=9), atol=1e-6)
    edges = data._gaussian(28, 4.0, torch.zeros(1)).sum(1)
    torch.testing.assert_close(edges, torch.ones(28))


@pytest.mark.parametrize(
    "field", [{"rotate": -1}, {"scale": 1.0}, {"sigma": 0}, {"crop": -1}, {"elastic": -0.1}]
)
def test_a_field_out_of_range_is_named(field):
    with pytest.raises(ValueError, match=f"Augment: {next(iter(field))}="):
        Augment(**field)


def test_rotations_are_views_by_these_degrees(digits):
    clockwise, still = ml.rotations(90, 0)
    torch.testing.assert_close(clockwise(digits), digits.rot90(-1, (2, 3)), atol=1e-4, rtol=0)
    torch.testing.assert_close(still(digits), digits, atol=1e-5, rtol=0)


def drawing(seed: int) -> torch.Tensor:
    """A crooked polygon, its lines 9 pixels wide, somewhere on 150x200 pixels."""
    from PIL import Image, ImageDraw

    draw = np.random.default_rng(seed)
    image = Image.new("L", (200, 150))
    width, height = draw.integers(5, 90, 2)
    corners = draw.integers(0, (width, height), (5, 2)) + draw.integers(10, 50, 2)
    ImageDraw.Draw(image).line([tuple(map(int, c)) for c in corners], 255, 9, joint="curve")
    return torch.from_numpy(np.asarray(image) / np.float32(255))


@pytest.mark.parametrize("seed", range(5))
def test_strokes_are_normalised_as_pil_and_scipy_would(seed):
    from PIL import Image
    from scipy.ndimage import center_of_mass, shift

    strokes = drawing(seed)
    image = Image.fromarray(strokes.numpy())
    box = image.crop(Image.fromarray((strokes > 0).numpy()).getbbox())
    size = [max(1, round(20 * side / max(box.size))) for side in box.size]
    small = np.asarray(box.resize(size, Image.Resampling.BILINEAR))
    corner = np.zeros((28, 28), np.float32)
    corner[: small.shape[0], : small.shape[1]] = small
    move = [round(14 - c) for c in center_of_mass(small)]
    ours = data.normalise(strokes)
    np.testing.assert_allclose(ours, shift(corner, move, order=0), atol=1e-5)
    rows, columns = (ours.amax(axis).nonzero() for axis in (1, 0))
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) == 19


def test_mnists_own_digits_enlarged_and_moved_come_back(mnist):
    few = mnist.val[:200]
    pixels = few.images[:, 0].float() / 255
    large = F.interpolate(few.images.float() / 255, scale_factor=8)[:, 0]
    back = [
        data.normalise(F.pad(image, (i % 70, 70 - i % 70, i * 7 % 60, 60 - i * 7 % 60)))
        for i, image in enumerate(large)
    ]
    assert (torch.stack(back) - pixels).abs().mean() < 0.03
    again = torch.stack(back).mul(255).round().byte()[:, None]
    net = ml.trained("cnn-8k")
    same = ml.predict(net, replace(few, images=again)).argmax(1) == ml.predict(net, few).argmax(1)
    assert same.float().mean() >= 0.98


def test_ink_far_from_the_middle_of_its_box_stays_within_the_image():
    strokes = torch.zeros(60, 60)
    strokes[:10, :40], strokes[:60, 0] = 1, 1  # a heavy head
    box = F.interpolate(strokes[None, None, :, :40], (20, 13), mode="bilinear", antialias=True)
    placed = data.normalise(strokes)
    torch.testing.assert_close(placed.sum(), box.sum())
    assert placed[27].max() > 0  # the centre of mass is above the middle, and cannot be moved there


def test_an_empty_drawing_is_refused():
    with pytest.raises(ValueError, match="nothing is drawn"):
        data.normalise(torch.zeros(9, 9))


def test_a_resplit_deals_out_the_same_images_by_its_seed(mnist):
    first, again, other = (ml.load("mnist", resplit=seed) for seed in (0, 0, 1))
    assert [len(s) for s in (first.train, first.val, first.test)] == [55_000, 5_000, 10_000]
    assert first is again and not torch.equal(first.test.labels, other.test.labels)

    def images(data):  # a number for each image, whichever part it is in
        parts = (data.train, data.val, data.test)
        weights = torch.arange(1, 785)
        sums = [(s.images.flatten(1).long() * weights).sum(1) * 10 + s.labels for s in parts]
        return torch.cat(sums).sort().values

    assert torch.equal(images(first), images(mnist)) and torch.equal(images(other), images(mnist))
