"""Look on while a run trains, with the trackers that people use: hooks for `fit(on_epoch=...)`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .train import Recipe

Hook = Callable[[dict[str, Any], nn.Module], None]


def tensorboard(name: str, recipe: Recipe, seed: int, folder: Path = Path("tracked")) -> Hook:
    """Write each epoch's row, and histograms of the weights, for `tensorboard --logdir tracked`.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise _missing() from None
    writer = SummaryWriter(folder / f"{name}-{seed}")
    writer.add_text("recipe", "\n".join(f"    {k}: {v}" for k, v in recipe.describe().items()))

    def hook(row: dict[str, Any], model: nn.Module) -> None:
        for key, value in row.items():
            if key != "epoch":
                writer.add_scalar(key, value, row["epoch"])
        for key, weight in model.named_parameters():
            writer.add_histogram(key, weight, row["epoch"])
        writer.flush()

    return hook


def wandb(name: str, recipe: Recipe, seed: int, folder: Path = Path("tracked")) -> Hook:
    """Log each epoch's row to Weights & Biases; nothing leaves the machine unless $WANDB_MODE is
    "online".

    Raises:
        ValueError: wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise _missing() from None
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project="mnistlab",
        name=f"{name}-{seed}",
        config=recipe.describe() | {"seed": seed},
        mode=os.environ.get("WANDB_MODE", "offline"),
        dir=folder,
    )

    def hook(row: dict[str, Any], model: nn.Module) -> None:
        run.log(row, step=row["epoch"])
        if row["epoch"] == recipe.epochs:
            run.finish()

    return hook


def _missing() -> ValueError:
    return ValueError("this needs a tracker: pip install 'mnistlab[track]'")


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb}
