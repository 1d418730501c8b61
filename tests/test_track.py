"""Trackers: that they log what the run says, and send nothing."""

import sys
import time

import mnistlab as ml
import pytest
from mnistlab import track

RECIPE = ml.Recipe(model="linear-8k", epochs=2)


@pytest.fixture
def few(mnist):
    return ml.Dataset("few", mnist.train[:256], mnist.val[:64], test=None)


def test_tensorboard_holds_each_epochs_row(few, tmp_path, offline):
    pytest.importorskip("tensorboard", reason="the extra `track` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hook = track.tensorboard("linear-8k", RECIPE, 3, tmp_path)
    run = ml.fit("linear-8k", few, RECIPE, on_epoch=hook, progress=False)
    everything = {"histograms": 0}  # by default it keeps one of each
    events = EventAccumulator(str(tmp_path / "linear-8k-3"), everything).Reload()
    for key in ("train_loss", "val_loss", "val_accuracy", "lr"):
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        assert logged == [(row["epoch"], pytest.approx(row[key])) for row in run.history]
    assert len(events.Histograms("1.weight")) == 2


def test_wandb_logs_offline_unless_told_otherwise(few, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `track` is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    hook = track.wandb("linear-8k", RECIPE, 3, tmp_path)
    ml.fit("linear-8k", few, RECIPE, on_epoch=hook, progress=False)
    (logged,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # The process that writes the file may do so a moment after finish() has returned.
    deadline = time.monotonic() + 60
    while (content := logged.read_bytes()).count(b"val_accuracy") < 2:
        assert time.monotonic() < deadline, content
        time.sleep(0.1)
    assert content.count(b"val_accuracy") >= 2 and b"label_smoothing" in content


@pytest.mark.parametrize("name", track.TRACKERS)
def test_a_tracker_that_is_not_installed_is_answered_in_one_line(name, monkeypatch, tmp_path):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"pip install 'mnistlab\[track\]'"):
        track.TRACKERS[name]("x", RECIPE, 0, tmp_path)
