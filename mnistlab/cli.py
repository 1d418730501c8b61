"""The command line: `mnistlab`, also `python -m mnistlab`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import runs
from .data import DataError
from .models import PRESETS
from .train import Recipe, write_atomically


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one shape as text in columns; numbers to the right."""
    if not rows:
        return "nothing yet"
    cells = [list(rows[0])] + [
        [
            "" if v is None else f"{v:,}" if isinstance(v, int) else str(v)
            for v in map(row.get, rows[0])
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [isinstance(v, int | float) for v in rows[0].values()]
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
    """List the presets: parameters, multiply-accumulates, source; or the layers of one.

    Examples: mnistlab models --json / mnistlab models convnext-8k
    """

    name: tyro.conf.Positional[str | None] = None
    """Of a preset: print its layers, the shape of what leaves each, and their parameters."""
    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        from .models import build, catalogue

        model = build(self.name).eval() if self.name else None  # an unknown name ends it here
        if model is None or self.json:
            show([row for row in catalogue() if self.name in (None, row["name"])], self.json)
            return
        from torchinfo import summary

        columns = ("output_size", "kernel_size", "num_params")
        print(summary(model, (1, 1, 28, 28), col_names=columns, device="cpu", verbose=0))


@dataclass
class Train:
    """Train a named recipe. With --seeds, record every seed; with --set, try a change.

    Examples: mnistlab train cnn-8k --set epochs=2 augment.rotate=10 /
    mnistlab train cnn-8k --seeds 5 / mnistlab train --list
    """

    name: tyro.conf.Positional[str] = "cnn-8k"
    """Of a recipe, or of a preset, which is then trained by the default recipe."""
    set: tuple[str, ...] = ()
    """Fields of the recipe to change, each as field=value. Their names: --list."""
    seeds: int | None = None
    """Train and record seeds 0 to SEEDS - 1; those that are recorded already are left alone."""
    workers: int | None = None
    """With --seeds: runs side by side. Default: one a core, or one where there is a GPU."""
    on: Literal["here", "ray"] = "here"
    """With --seeds: on this machine, or on Ray, at $RAY_ADDRESS or else started here."""
    watch: bool = False
    """With --seeds: keep the predictions on the test images after every epoch (chapter 15)."""
    seed: int = 0
    """Without --seeds: of the weights, the order of images, augmentation and dropout."""
    device: str | None = None
    """cuda, mps or cpu. Default: the best there is."""
    checkpoint: Path | None = None
    """File written after each epoch; training goes on from it if it is there."""
    save: Path | None = None
    """Write the weights here, as safetensors."""
    quick: bool = False
    """One epoch of ten batches, to see that it works."""
    track: Literal["tensorboard", "wandb"] | None = None
    """Without --seeds: log each epoch under ./tracked."""
    test: bool = False
    """Report on the test images too. Do this once, when nothing is left to choose."""
    list: bool = False
    """List the recipes and the fields that --set knows, and stop."""
    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        from .recipes import RECIPES, find, override

        if self.list:
            rows = {name: recipe.describe() for name, recipe in RECIPES.items()}
            if self.json:
                print(json.dumps(rows, indent=2))
                return
            fields = ("model", "data", "epochs", "optimizer", "lr", "schedule")
            show([{"recipe": n} | {f: r[f] for f in fields} for n, r in rows.items()], False)
            print("\nFields of --set:", ", ".join(Recipe().describe()))
            print("of augment:", ", ".join(f"augment.{f}" for f in Recipe().describe()["augment"]))
            print("whole: augment=none, augment=mild; of the model: arguments.dropout, ...")
            return
        if self.seeds is not None:
            alone = ("set", "quick", "seed", "device", "checkpoint", "save", "track", "test")
            if given := [f for f in alone if getattr(self, f) != getattr(Train, f)]:
                raise ValueError(f"records keep their recipe: --seeds goes with no --{given[0]}")
            known = runs.train_seeds(
                self.name, self.seeds, workers=self.workers, on=self.on, watch=self.watch
            )
            show([summary(known)], self.json)
            return
        if self.watch or self.workers or self.on != "here":
            raise ValueError("--watch, --workers and --on are for records: they go with --seeds")
        self.train(override(find(self.name), self.set))

    def train(self, recipe: Recipe) -> None:
        """One run, reported and not recorded."""
        from dataclasses import replace

        from .data import load
        from .track import TRACKERS
        from .train import fit

        data = load(recipe.data, resplit=self.seed if recipe.resplit else None)
        if self.quick:
            recipe = replace(recipe, epochs=1, swa_epochs=min(1, recipe.swa_epochs))
            data = replace(data, train=data.train[: 10 * recipe.batch_size])
        hook = TRACKERS[self.track](self.name, recipe, self.seed) if self.track else None
        run = fit(
            recipe.model,
            data,
            recipe,
            seed=self.seed,
            teacher=runs.teacher_of(recipe),
            device=self.device,
            checkpoint=self.checkpoint,
            on_epoch=hook,
            progress=not self.json,
        )
        splits = {"val": data.val} | ({"test": data.test} if self.test else {})
        reports = {name: runs.tested(run.model, split, recipe) for name, split in splits.items()}
        if self.save:
            from safetensors.torch import save

            weights = {k: v.cpu().contiguous() for k, v in run.model.state_dict().items()}
            write_atomically(self.save, save(weights))
        if self.json:
            record = {"recipe": recipe.describe(), "seed": self.seed, "history": run.history}
            for name, report in reports.items():
                record[name] = {"correct": report.correct, "n": report.n, "loss": report.loss}
            print(json.dumps(record, indent=2))
        else:
            print(run)
            for name, report in reports.items():
                print(f"{name}: {report}")


def summary(known: runs.Results) -> dict[str, Any]:
    """One line of a table of results; accuracies in percent."""
    first = known.records[0]
    return {
        "name": known.name,
        "family": PRESETS[known.model].family.__name__,
        "params": known.params,
        "macs": known.macs,
        "n": known.n,
        "mean": round(100 * known.mean, 3),
        "sd": round(100 * known.sd, 3) if known.n > 1 else None,
        "epochs": first["epochs"],
        "dataset": first["recipe"]["data"],
        "seeds": known.seeds,
        "diverged": list(known.diverged),
        "commit": first["commit"],
        "device": first["device"],
    }


@dataclass
class Results:
    """Print what is recorded: mean and sd of test accuracy over seeds, in percent.

    Examples: mnistlab results / mnistlab results cnn-8k --json / mnistlab results cnn-8k --check
    """

    name: tyro.conf.Positional[str | None] = None
    """Of a recipe. Default: all that have records."""
    check: bool = False
    """Train the first recorded seed again and compare."""
    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        names = [self.name] if self.name else runs.recorded()
        if self.check:
            for name in names:
                for line in runs.check(name):
                    print(line)
            return
        rows = [summary(runs.results(name)) for name in names]
        if not self.json:  # what does not fit on a line of text
            rows = [
                {k: v for k, v in row.items() if k not in ("seeds", "commit")}
                | {"diverged": len(row["diverged"]) or None}
                for row in rows
            ]
        show(rows, self.json)
        for name in [] if self.name else runs.lost():
            print(f"{name}: every recorded run diverged", file=sys.stderr)


@dataclass
class Sweep:
    """Search for a recipe's settings on the validation images, with Ray and Optuna.

    Examples: mnistlab sweep cnn-8k --over lr=0.05,0.1,0.2 augment=none,mild /
    mnistlab sweep cnn-8k --over lr=0.01..0.5 weight_decay=1e-5..1e-2 --trials 20
    """

    name: tyro.conf.Positional[str]
    """Of a recipe."""
    over: tuple[str, ...] = ()
    """What to vary: field=a,b,c for these values, field=low..high for a range (logarithmic)."""
    trials: int | None = None
    """How many, proposed by Optuna. Default: every combination of the values."""
    seed: int = 0
    """Of the search and of each run."""
    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        from .sweep import sweep

        over = {}
        for text in self.over:
            field, equals, values = text.partition("=")
            if not equals:
                raise ValueError(f"--over {text}: write it as field=values, such as lr=0.05,0.1")
            over[field] = values
        rows = sweep(self.name, over, self.trials, seed=self.seed)
        if not self.json:
            keys = ("epochs", "seconds")
            rows = [
                {
                    **{
                        k: f"{v:.4g}" if isinstance(v, float) else v
                        for k, v in r["settings"].items()
                    },
                    "val": f"{100 * r['val_accuracy']:.2f}",
                    "val loss": f"{r['val_loss']:.4f}" if r["val_accuracy"] else "diverged",
                    **{k: round(r[k]) for k in keys},
                }
                for r in rows
            ]
        show(rows, self.json)


@dataclass
class Report:
    """Write all that is recorded of a recipe as one HTML page that needs nothing beside it.

    Example: mnistlab report cnn-8k --out cnn-8k.html
    """

    name: tyro.conf.Positional[str]
    """Of a recipe that has records."""
    out: Path | None = None
    """The file to write. Default: NAME.html."""

    def run(self) -> None:
        from .report import report

        path = self.out or Path(f"{self.name}.html")
        write_atomically(path, report(self.name).encode())
        print(path)


@dataclass
class Compress:
    """Write the shipped weights of a recipe as a small file, and say what that costs.

    Batch normalisation is folded into the layers before it, the weights are rounded, and the file
    is read back: what is validated is the model that it holds.

    Examples: mnistlab compress cnn-8k --bits 4 --out cnn-8k.bin / mnistlab compress cnn-68k --json
    """

    name: tyro.conf.Positional[str]
    """Of a recipe whose weights are shipped."""
    bits: int = 8
    """Of a weight, 2 to 8."""
    out: Path | None = None
    """The file to write. Default: NAME-BITSbit.bin."""
    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        from .compress import fold, pack, quantize, unpack
        from .data import load
        from .evaluate import evaluate
        from .models import build, count_parameters
        from .recipes import find

        recipe, model = find(self.name), runs.trained(self.name)
        path = self.out or Path(f"{self.name}-{self.bits}bit.bin")
        small = quantize(fold(model), self.bits)
        write_atomically(path, pack(small, self.bits))
        val = load(recipe.data, resplit=0 if recipe.resplit else None).val
        read = unpack(path.read_bytes(), build(recipe.model, **recipe.arguments))
        before, packed, after = (evaluate(net, val) for net in (model, small, read))
        if not packed.log_probs.equal(after.log_probs):
            raise ValueError(f"{path} does not hold the model that was packed")
        row = {
            "name": self.name,
            "bits": self.bits,
            "bytes": path.stat().st_size,
            "float32": 4 * count_parameters(model),
            "val before": round(100 * before.accuracy, 2),
            "val after": round(100 * after.accuracy, 2),
            "file": str(path),
        }
        show([row], self.json)


@dataclass
class Export:
    """Write shipped models as ONNX files: pixels in, logits out, and models.json, a list of them.

    Examples: mnistlab export --out models / mnistlab export cnn-8k dense-8k --out models
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Of recipes whose weights are shipped. Default: those of the book's playground."""
    out: Path = Path("models")
    """Folder to write to."""
    json: bool = False
    """Print JSON, for a program to read."""

    def run(self) -> None:
        from .export import export

        rows = export(self.names, self.out)
        if not self.json:
            columns = ("file", "bytes", "params", "macs", "extras")
            rows = [
                {k: row[k] for k in columns} | {"extras": " ".join(row["extras"])} for row in rows
            ]
        show(rows, self.json)


@dataclass
class Bench:
    """Measure speed on this machine: the loop's overhead, and seconds to 99%.

    Example: mnistlab bench --only overhead
    """

    only: Literal["overhead", "dataloader", "to99", "mended", "presets"] | None = None
    """Run one part; only that of the presets' times is then recorded. Default: all, recorded."""

    def run(self) -> None:
        from .bench import bench

        print(table(bench(self.only)))


Command = (
    Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Results, tyro.conf.subcommand("results")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[Export, tyro.conf.subcommand("export")]
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
