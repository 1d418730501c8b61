"""The command line: `mnistlab`, also `python -m mnistlab`."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .data import DataError
from .train import Recipe


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one shape as text in columns; numbers to the right."""
    cells = [list(rows[0])] + [
        [f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [isinstance(v, int) for v in rows[0].values()]
    return "\n".join(
        "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    )


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows for a person, or as JSON for a program."""
    print(json.dumps(rows, indent=2) if as_json else table(rows))


@dataclass
class Data:
    """Load a data set, downloading it if need be, and say what is in it.

    Example: mnistlab data fashion-mnist
    """

    name: tyro.conf.Positional[str] = "mnist"
    """One of mnist, fashion-mnist, kmnist, cifar10, cifar100."""
    root: Path | None = None
    """Folder of data sets. Default: $MNISTLAB_DATA, else a cache in the home folder."""
    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        from .data import load

        data = load(self.name, self.root)
        rows = [
            {"split": s, "images": len(part), "shape": "x".join(map(str, part.images.shape[1:]))}
            for s, part in (("train", data.train), ("val", data.val), ("test", data.test))
        ]
        show(rows, self.json)


@dataclass
class Models:
    """List the presets: parameters, multiply-accumulates, source.

    Example: mnistlab models --json
    """

    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        from .models import catalogue

        show(catalogue(), self.json)


@dataclass
class Train:
    """Train one model, report it on the validation images, and keep its weights if asked.

    Example: mnistlab train --model cnn-8k --epochs 2 --augment.rotate 10
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    seed: int = 0
    """Of the weights, the order of images, augmentation and dropout."""
    device: str | None = None
    """cuda, mps or cpu. Default: the best there is."""
    checkpoint: Path | None = None
    """File written after each epoch; training goes on from it if it is there."""
    save: Path | None = None
    """Write the weights here, as safetensors."""
    test: bool = False
    """Report on the test images too. Do this once, when nothing is left to choose."""
    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        from .data import load
        from .evaluate import evaluate
        from .train import fit

        data = load(self.recipe.data)
        run = fit(
            self.recipe.model,
            data,
            self.recipe,
            seed=self.seed,
            device=self.device,
            checkpoint=self.checkpoint,
            progress=not self.json,
        )
        splits = {"val": data.val} | ({"test": data.test} if self.test else {})
        reports = {name: evaluate(run.model, split) for name, split in splits.items()}
        if self.save:
            from safetensors.torch import save

            from .train import write_atomically

            weights = {k: v.cpu().contiguous() for k, v in run.model.state_dict().items()}
            write_atomically(self.save, save(weights))
        if self.json:
            record = {"recipe": self.recipe.describe(), "seed": self.seed, "history": run.history}
            for name, report in reports.items():
                record[name] = {"correct": report.correct, "n": report.n, "loss": report.loss}
            print(json.dumps(record, indent=2))
        else:
            print(run)
            for name, report in reports.items():
                print(f"{name}: {report}")


@dataclass
class Bench:
    """Measure speed on this machine: the loop's overhead, and seconds to 99%.

    Example: mnistlab bench --only overhead
    """

    only: Literal["overhead", "dataloader", "to99"] | None = None
    """Run one part and record nothing. Default: all of them, recorded."""

    def run(self) -> None:
        from .bench import bench

        print(table(bench(self.only)))


Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def main() -> None:
    """Run the command line. Errors that a user can mend are one line, with exit code 1."""
    try:
        tyro.cli(Command, prog="mnistlab", description=__doc__, use_underscores=False).run()
    except (DataError, ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"mnistlab: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
