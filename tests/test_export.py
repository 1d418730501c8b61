"""The exported models: as torch says, for any number of images, and written once."""

import json

import mnistlab as ml
import numpy as np
import pytest
import torch
from filelock import FileLock
from mnistlab import runs
from mnistlab.data import data_root
from mnistlab.export import LARGEST, Exported, export, select, to_onnx
from mnistlab.recipes import RECIPES

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the `test` extra")
pytest.importorskip("onnxscript", reason="needs the `playground` extra")


def answers(content: bytes, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """What ONNX Runtime gives, by the names of the outputs."""
    session = onnxruntime.InferenceSession(content)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixels": pixels.numpy()}), strict=True))


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The models of the playground, from the cache that the site's build shares."""
    cache = data_root() / "playground"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        return export(out=cache / "models")


def test_every_shipped_model_answers_as_torch_does(rows, mnist):
    digits = mnist.val[:64]
    pixels = digits.images.float() / 255
    assert len(rows) >= 5
    for row in rows:
        given = answers((data_root() / "playground/models" / row["file"]).read_bytes(), pixels)
        assert list(given) == ["logits", *row["extras"]]
        wanted = ml.predict(ml.trained(row["name"]), digits)
        assert torch.from_numpy(given["logits"]).allclose(wanted, rtol=0, atol=1e-4), row["name"]


def test_the_list_is_that_of_the_records(rows):
    for row in rows:
        known = ml.results(row["name"])
        assert (row["params"], row["macs"], row["n"]) == (known.params, known.macs, known.n)
        assert row["mean"] == known.mean
        assert row["sd"] == (known.sd if known.n > 1 else None)
    assert [row["params"] for row in rows] == sorted(row["params"] for row in rows)


def test_one_model_of_a_kind_is_chosen(rows):
    recipes = [RECIPES[row["name"]] for row in rows]
    exact = [recipe for recipe in recipes if not recipe.weight_bits]
    kinds = [(recipe.model, recipe.loss, recipe.teacher) for recipe in exact]
    assert len(set(kinds)) == len(kinds) >= len(recipes) - 1  # and one with weights of few bits
    assert not any(row["name"].startswith("step-") for row in rows)
    assert {"cnn-8k", "dense-8k"} <= {row["name"] for row in rows}  # not cnn-8k-resplit
    assert all(row["params"] <= LARGEST for row in rows)


def test_models_are_picked_up_as_their_weights_come(tmp_path):
    folder = tmp_path / "results"
    (tmp_path / "weights").mkdir()
    folder.mkdir()
    for name in ("cnn-8k", "dense-8k", "cnn-8k-resplit"):
        (folder / f"{name}.jsonl").symlink_to(runs.RESULTS / f"{name}.jsonl")
    assert select(folder) == []
    for name in ("cnn-8k", "cnn-8k-resplit"):
        (tmp_path / "weights" / f"{name}.safetensors").touch()
    assert select(folder) == ["cnn-8k"]
    (tmp_path / "weights/dense-8k.safetensors").touch()
    assert select(folder) == ["cnn-8k", "dense-8k"]


def test_what_is_there_is_not_written_again(rows, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("mnistlab.export.to_onnx", lambda model: calls.append(model) or b"net")
    first = export(["dense-8k"], tmp_path)
    assert json.loads((tmp_path / "models.json").read_text()) == first
    assert export(["dense-8k"], tmp_path) == first and len(calls) == 1
    (tmp_path / "dense-8k.onnx").unlink()
    export(["dense-8k"], tmp_path)
    assert len(calls) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense-8k.onnx", "models.json"]


@pytest.mark.parametrize("name", ["linear-8k", "nothing-8k"])
def test_a_model_without_weights_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        export([name], tmp_path)
    assert not list(tmp_path.glob("*.onnx"))


FAMILIES = {  # those of which few or no weights are shipped; what they give beside the logits
    "efficientnet-8k": ["maps"],
    "ghostnet-8k": ["maps"],
    "convnext-8k": [],
    "shared-1k": [],
    "vit-8k": ["attention"],
    "capsules-8k": ["maps"],
    "hvc-68k": ["maps"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_exported(name):
    torch.manual_seed(0)
    check(ml.build(name), FAMILIES[name])


def test_a_class_token_and_a_decoder_are_exported_too():
    torch.manual_seed(0)
    check(ml.models.ViT(7, 8, 2, 2, pre_logits=True), ["attention"])
    check(ml.models.CapsNet(channels=8, part_dim=4, decoder=(16,)), ["reconstruction"])


def check(model: torch.nn.Module, extras: list[str]) -> None:
    """Of a fresh model: all outputs, for one image and for five."""
    for module in model.modules():  # what training leaves there
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    content = to_onnx(model)
    for n in (1, 5):
        pixels = torch.rand(n, 1, 28, 28)
        with torch.no_grad():
            wanted = Exported(model)(pixels)
        given = answers(content, pixels)
        assert list(given) == ["logits", *extras]
        for ours, theirs in zip(given.values(), wanted, strict=True):
            assert torch.from_numpy(ours).allclose(theirs, rtol=0, atol=1e-4)


def test_attention_rolls_out_to_shares():
    torch.manual_seed(0)
    for pool in ("class", "mean"):
        model = ml.models.ViT(7, 8, 2, 2, pool=pool)
        with torch.no_grad():
            _, seen = Exported(model)(torch.rand(3, 1, 28, 28))
        assert seen.shape == (3, 4, 4) and (seen >= 0).all()
        assert seen.sum((1, 2)).allclose(torch.ones(3))


def test_attention_without_content_is_even():
    model = ml.models.ViT(7, 8, 2, 2, pool="mean")
    for block in model.blocks:  # all queries and keys alike: nothing is looked at more
        torch.nn.init.zeros_(block.attention.qkv.weight)
    with torch.no_grad():
        _, seen = Exported(model)(torch.rand(1, 1, 28, 28))
    assert seen.allclose(torch.full((1, 4, 4), 1 / 16))
