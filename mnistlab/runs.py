"""Run a recipe over seeds, remember each run in a line of JSON, and read the lines back."""

import csv
import datetime
import hashlib
import io
import json
import multiprocessing
import os
import platform
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors.torch import load as load_weights
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import recipes
from .data import Dataset, Split, data_root, load, rotations
from .evaluate import Report, Summary, evaluate
from .many import can_stack, fit_many
from .models import build, count_macs, count_parameters
from .train import Recipe, Run, fit, pick_device, predict, write_atomically

RESULTS = Path(__file__).parent / "results"
SPEEDS = RESULTS / "speeds.csv"  # written by `mnistlab bench --only presets`
REFERENCE = "cnn-8k"  # the preset whose time is 1
# Keep freed memory instead of giving it back and faulting it in again, as glibc does with large
# tensors: a small net's step spends much of its time on that. Only a new process reads it.
MALLOC = (
    "GLIBC_TUNABLES",
    "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592",
)

Record = dict[str, Any]


@dataclass(frozen=True)
class Results(Summary):
    """The recorded seeds of one recipe; `values` are their test accuracies.

    Attributes:
        name: of the recipe.
        records: one dict a seed, in the order of the seeds, as the file holds them.
        diverged: seeds whose loss was no longer finite; they have no accuracy, and are told apart.
    """

    name: str = ""
    records: tuple[Record, ...] = field(default=(), repr=False)
    diverged: tuple[int, ...] = ()

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text[:-1]}, {len(self.diverged)} more diverged)" if self.diverged else text

    @property
    def seeds(self) -> list[int]:
        return [record["seed"] for record in self.records]

    @property
    def validated(self) -> float:
        """Mean accuracy on the validation images, 0..1: by this recipes are chosen."""
        counts = [record["val"] for record in self.records]
        return sum(count["correct"] / count["n"] for count in counts) / self.n

    @property
    def tried(self) -> int:
        """Number of seeds, with those that diverged."""
        return self.n + len(self.diverged)

    @property
    def command(self) -> str:
        """What makes it again."""
        return f"mnistlab train {self.name} --seeds {self.tried}"

    @property
    def model(self) -> str:
        """The preset."""
        return self.records[0]["recipe"]["model"]

    @property
    def params(self) -> int:
        return self.records[0]["params"]

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.records[0]["macs"]

    @property
    def seconds(self) -> float:
        """Mean seconds of training of a run, on the machine that recorded it."""
        return sum(record["seconds"] for record in self.records) / self.n


def results(name: str, folder: Path = RESULTS) -> Results:
    """The records of a recipe, all made by the recipe as it is now.

    Raises:
        ValueError: unknown name; or there are none, they are stale, or every run diverged. The
            message says what to do.
    """
    if not (records := _current(name, folder)):
        raise ValueError(f"no records of {name!r}; make them: mnistlab train {name} --seeds 5")
    ended = tuple(record for record in records if "diverged" not in record)
    if not ended:
        raise ValueError(f"every recorded run of {name!r} diverged: {records[0]['diverged']}")
    values = tuple(record["test"]["correct"] / record["test"]["n"] for record in ended)
    diverged = tuple(record["seed"] for record in records if "diverged" in record)
    return Results(values, name, ended, diverged)


def _current(name: str, folder: Path) -> list[Record]:
    """What `read` gives; ValueError if another recipe, or another teacher, made it."""
    recipe, records = recipes.find(name), read(name, folder)
    if changes := stale(records, recipe):
        raise ValueError(
            f"the records of {name!r} are stale: the recipe has another {', '.join(changes)} now; "
            f"remove {folder / name}.jsonl and train again, or give the new recipe a new name"
        )
    if recipe.teacher and records:
        now = _sha256(recipe.teacher)
        if any(record.get("teacher", now) != now for record in records):
            raise ValueError(
                f"the records of {name!r} are stale: {recipe.teacher!r} has other weights now; "
                f"remove {folder / name}.jsonl and train again"
            )
    return records


def _sha256(name: str) -> str | None:
    """Of the weights that a recipe's records have kept."""
    return next((r["weights"] for r in read(name) if "weights" in r), None)


def power_law(known: Sequence[Results]) -> Callable[[float], float]:
    """Test error as a power of the number of parameters: a straight line on logarithmic axes,
    fitted by least squares to recorded results.

    Returns:
        A function: parameters -> error, a fraction. Between the sizes recorded it interpolates;
        beyond them it is a guess.

    Raises:
        ValueError: they are not of two sizes at least.
    """
    params = [found.params for found in known]
    if len(set(params)) < 2:
        raise ValueError("a line needs recorded results of two sizes or more")
    slope, height = np.polyfit(np.log(params), np.log([1 - found.mean for found in known]), 1)
    return lambda size: float(np.exp(height) * size**slope)


def recorded(folder: Path = RESULTS) -> list[str]:
    """Names of the recipes that have results: records, of a run at least that did not diverge."""
    return [name for name, ended in _ended(folder).items() if ended]


def lost(folder: Path = RESULTS) -> list[str]:
    """Names of the recipes of which every recorded run diverged: they have no results."""
    return [name for name, ended in _ended(folder).items() if not ended]


def _ended(folder: Path) -> dict[str, bool]:
    names = sorted(path.stem for path in folder.glob("*.jsonl"))
    return {name: any("diverged" not in r for r in read(name, folder)) for name in names}


def read(name: str, folder: Path = RESULTS) -> list[Record]:
    """The records of a recipe, by seed; [] where there are none.

    Raises:
        ValueError: a line is not a record, or a seed is there twice; the message names it.
    """
    path = folder / f"{name}.jsonl"
    records = sorted(read_lines(path), key=lambda record: record["seed"])
    for one, other in pairwise(records):
        if one["seed"] == other["seed"]:
            raise ValueError(f"{path}: seed {one['seed']} is there twice; remove a line")
    return records


def read_lines(path: Path) -> list[Record]:
    """The JSON objects of a file, each a run with its seed; none if there is no file.

    Raises:
        ValueError: a line is something else; the message names it.
    """
    records = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else [], start=1):
        try:
            records.append(json.loads(line))
            records[-1]["seed"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}, is damaged: remove the line") from None
    return records


def stale(records: list[Record], recipe: Recipe) -> list[str]:
    """Fields in which any record disagrees with the recipe. A field that is younger than a record
    had its default then."""
    now, default = recipe.describe(), Recipe().describe()
    then = [default | record["recipe"] for record in records]
    return [key for key in now if any(other[key] != now[key] for other in then)]


def speeds(what: str = "inference") -> dict[str, float]:
    """Measured time of each preset for one image on one thread, over that of `REFERENCE`.

    Args:
        what: "inference", or "training" (forward, backward and the optimiser's step).
    """
    with SPEEDS.open(newline="") as file:
        return {row["name"]: float(row[what]) for row in csv.DictReader(file)}


def train_seeds(
    name: str,
    seeds: int = 5,
    *,
    workers: int | None = None,
    on: str = "here",
    watch: bool = False,
    folder: Path = RESULTS,
) -> Results:
    """Run a recipe with seeds 0 to seeds - 1, and record each as it ends.

    On the CPU the runs are processes of one thread each, side by side. Seeds that are recorded
    already are left alone, and a run that was cut off goes on from its last epoch: after a kill,
    call it again. The weights of seed 0 are kept, for `trained`.

    Args:
        name: of a recipe.
        seeds: how many.
        workers: processes; default one a core, or one where there is a GPU.
        on: "here", or "ray": on the cluster at $RAY_ADDRESS, or on a local Ray without it.
        watch: keep the predictions on the test images after every epoch, for `watched`. A cut-off
            run then starts again.

    Raises:
        ValueError: unknown recipe, its records are stale, or another process is training it.
        ChildProcessError: a worker was killed.
    """
    recipe = recipes.find(name)
    with alone("training", name):
        have = _current(name, folder)
        kept = {path.stem for path in (folder / "watched").glob(f"{name}-*.npz")}
        if watch and (blind := [r["seed"] for r in have if f"{name}-{r['seed']}" not in kept]):
            raise ValueError(
                f"{name!r} is recorded without the predictions of seeds {blind}: to keep them, "
                f"move {folder / name}.jsonl away and train again"
            )
        teacher_of(recipe)  # fails here if it must
        todo = [s for s in range(seeds) if s not in {record["seed"] for record in have}]
        load(recipe.data)  # downloads once, and fails here if it must
        jobs = [
            (name, recipe, seed, watch, None if watch else _checkpoint(name, seed)) for seed in todo
        ]
        with tqdm(total=len(todo), desc=name, unit="run") as bar:
            stack = (
                on == "here" and pick_device().type == "cuda" and can_stack(recipe) and not watch
            )
            found = _together(name, recipe, todo) if stack else SPREAD[on](run_seed, jobs, workers)
            for record, files in found:
                for path, content in files.items():
                    write_atomically(folder.parent / path, content)
                records = sorted([*read(name, folder), record], key=lambda r: r["seed"])
                lines = "".join(json.dumps(r) + "\n" for r in records)
                write_atomically(folder / f"{name}.jsonl", lines.encode())
                _checkpoint(name, record["seed"]).unlink(missing_ok=True)
                said = "diverged" if "diverged" in record else f"{_percent(record['test']):.2f}%"
                bar.set_postfix_str(f"seed {record['seed']}: {said}")
                bar.update()
    return results(name, folder)


def alone(doing: str, name: str) -> AcquireReturnProxy:
    """Hold the lock of "training" or "sweeping" a recipe, as a context.

    Raises:
        ValueError: another process holds it.
    """
    folder = data_root() / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / f"{doing}-{name}.lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"another process is {doing} {name!r}: wait for it, or stop it") from None


def _here(task: Callable, jobs: list[tuple], workers: int | None) -> Iterator:
    """task(*job) of each job, as each ends, from processes of one thread each."""
    workers = min(workers or (os.cpu_count() if pick_device().type == "cpu" else 1), len(jobs)) or 1
    os.environ.setdefault(*MALLOC)
    spawn = multiprocessing.get_context("spawn")  # forking a process that has threads can hang
    todo, running = iter(jobs), set()
    with ProcessPoolExecutor(workers, spawn, _one_thread) as pool:
        try:  # none waits in the pool: after an error, or Ctrl-C, the pool would run it
            while running := running | {
                pool.submit(task, *job) for job in islice(todo, workers - len(running))
            }:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a worker was killed, perhaps for want of memory; run the same command again, "
                "and each run goes on from its last epoch"
            ) from None


def start_ray() -> tuple[Any, bool]:
    """The module ray, connected to $RAY_ADDRESS, or to a Ray that it starts on this machine; and
    whether it was not connected before, so that the caller may `shutdown` it.

    Raises:
        ValueError: Ray is not installed.
        ConnectionError: it does not start, or does not answer at $RAY_ADDRESS.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("this needs Ray: pip install 'mnistlab[cluster]'") from None
    os.environ.setdefault(*MALLOC)
    if new := not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, include_dashboard=False)
        except Exception as error:  # a busy machine's timeout has no class of its own
            raise ConnectionError(f"Ray did not start: {error}") from error
    return ray, new


def _on_ray(task: Callable, jobs: list[tuple], workers: int | None) -> Iterator:
    """task(*job) of each job, as each ends, from Ray's workers; a killed one's job is retried."""
    ray, _ = start_ray()
    remote = ray.remote(num_cpus=1, max_retries=3)(task)
    waiting = [remote.remote(*job) for job in jobs]
    while waiting:
        done, waiting = ray.wait(waiting)
        yield ray.get(done[0])


SPREAD = {"here": _here, "ray": _on_ray}


def run_seed(
    name: str,
    recipe: Recipe,
    seed: int,
    watch: bool = False,
    checkpoint: Path | None = None,
) -> tuple[Record, dict[str, bytes]]:
    """One run, tested once, after its last epoch.

    Args:
        watch: test after each epoch too, and keep the predictions.
        checkpoint: file from which a run that was cut off goes on.

    Returns:
        The record, and files to keep, by path: the weights of seed 0, the predictions. A run whose
        loss is no longer finite has a record too.
    """
    commit = _commit()  # of the code that runs, which may be another by the end
    data = load(recipe.data, resplit=seed if recipe.resplit else None)
    seen: list[Tensor] = []

    def look(row: dict[str, Any], model: nn.Module) -> None:
        seen.append(predict(model, data.test).argmax(1).to(torch.uint8))

    try:
        run = fit(
            recipe.model,
            data,
            recipe,
            seed=seed,
            teacher=teacher_of(recipe),
            checkpoint=checkpoint,
            on_epoch=look if watch else None,
            progress=False,
        )
    except FloatingPointError as error:
        return _diverged(name, recipe, seed, error, commit), {}
    return _record(name, run, data, commit, seen)


def _together(
    name: str, recipe: Recipe, seeds: list[int], device: str | None = None
) -> Iterator[tuple[Record, dict[str, bytes]]]:
    """What run_seed gives, of all seeds in one pass."""
    commit, data = _commit(), load(recipe.data)
    jobs = [(recipe, seed) for seed in seeds]
    runs = fit_many(data, jobs, teacher=teacher_of(recipe), device=device)
    for seed, run in zip(seeds, runs, strict=True):
        if isinstance(run, FloatingPointError):
            yield _diverged(name, recipe, seed, run, commit), {}
        else:
            yield _record(name, run, data, commit)


def _diverged(
    name: str, recipe: Recipe, seed: int, error: FloatingPointError, commit: str | None
) -> Record:
    """The record of a run whose loss is no longer finite: no seed is dropped."""
    device = pick_device().type
    record = {"name": name, "seed": seed, "recipe": recipe.describe(), "diverged": str(error)}
    conditions = {"device": device, "threads": torch.get_num_threads()}
    return record | conditions | _made(device, commit)


def _record(
    name: str, run: Run, data: Dataset, commit: str | None, seen: Sequence[Tensor] = ()
) -> tuple[Record, dict[str, bytes]]:
    """Test a run, and put down what the protocol asks.

    Args:
        seen: predictions on the test images after each epoch, where they are to be kept.
    """
    recipe, seed = run.recipe, run.seed
    views = {"val": data.val, "test": data.test}
    reports = {split: evaluate(run.model, images) for split, images in views.items()}
    record = {
        "name": name,
        "seed": seed,
        "recipe": recipe.describe(),
        "params": count_parameters(run.model),
        "macs": count_macs(run.model.cpu(), tuple(data.train.images.shape[1:])),
        "epochs": len(run.history),
        **{split: _counts(report) for split, report in reports.items()},
        "seconds": run.seconds,
        "images_per_second": run.images_per_second,
        "device": run.device,
        "threads": run.threads,
        **_made(run.device, commit),
        "history": run.history,
    }
    if recipe.teacher:  # its weights, by their SHA-256
        record["teacher"] = _sha256(recipe.teacher)
    if recipe.tta:  # the views count; what a single view gives stands beside them
        record["single"] = {split: record[split] for split in views}
        for split, images in views.items():
            record[split] = _counts(tested(run.model, images, recipe))
    files = {}
    if seen:
        probabilities = (reports["test"].log_probs.exp() * 255).round().to(torch.uint8)
        arrays = {"predictions": torch.stack(list(seen)), "probabilities": probabilities}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{k: v.cpu().numpy() for k, v in arrays.items()})
        files[f"results/watched/{name}-{seed}.npz"] = buffer.getvalue()
    if seed == 0:
        weights = save({k: v.cpu().contiguous() for k, v in run.model.state_dict().items()})
        files[f"weights/{name}.safetensors"] = weights
        record["weights"] = hashlib.sha256(weights).hexdigest()
    return record, files


def tested(model: nn.Module, split: Split, recipe: Recipe) -> Report:
    """`evaluate` as the recipe says: over its rotated views, where it has some."""
    return evaluate(model, split, tta=rotations(*recipe.tta) if recipe.tta else None)


def _made(device: str, commit: str | None) -> dict[str, Any]:
    """On what, of what and when a record was made."""
    packages = {package: version(package) for package in ("torch", "mnistlab")}
    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "versions": {"python": platform.python_version()} | packages,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _counts(report: Report) -> dict[str, float]:
    return {"correct": report.correct, "n": report.n, "loss": report.loss}


def watched(name: str, folder: Path = RESULTS) -> dict[str, np.ndarray]:
    """What `train_seeds(..., watch=True)` kept of a recipe, over its seeds.

    Returns:
        predictions: class of each test image after each epoch, uint8 [seeds, epochs, N];
        probabilities: after the last epoch, 255 for certain, uint8 [seeds, N, K].

    Raises:
        ValueError: nothing was kept.
    """
    paths = [folder / "watched" / f"{name}-{r['seed']}.npz" for r in read(name, folder)]
    kept = [np.load(path) for path in paths if path.exists()]
    if not kept:
        raise ValueError(f"no predictions of {name!r}; mnistlab train {name} --seeds 10 --watch")
    return {key: np.stack([part[key] for part in kept]) for key in kept[0]}


def trained(name: str, *, retrain: bool = False, folder: Path = RESULTS) -> nn.Module:
    """The model of a recipe, as seed 0 left it: shipped, or trained now.

    Args:
        name: of a recipe.
        retrain: train it here instead of loading it, minutes; nothing is written.

    Returns:
        The model, on the CPU, in eval mode.

    Raises:
        ValueError: no weights are shipped, or they are not those of the record.
    """
    recipe = recipes.find(name)
    if retrain:
        return fit(
            recipe.model, recipe.data, recipe, seed=0, teacher=teacher_of(recipe)
        ).model.cpu()
    record = next((r for r in read(name, folder) if "weights" in r), None)
    path = folder.parent / "weights" / f"{name}.safetensors"
    if record is None or not path.exists():
        raise ValueError(f"no weights of {name!r} are shipped: ml.trained({name!r}, retrain=True)")
    if stale([record], recipe):
        raise ValueError(f"the weights of {name!r} are of another recipe; give retrain=True")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != record["weights"]:
        raise ValueError(
            f"{path} is damaged: its SHA-256 is {found}, not {record['weights']}; "
            f"restore the file, or give retrain=True"
        )
    model = build(recipe.model, **recipe.arguments)
    model.load_state_dict(load_weights(content))
    return model.eval()


def teacher_of(recipe: Recipe) -> nn.Module | None:
    """The model that teaches a recipe's student, where it names one.

    Raises:
        ValueError: its weights are not shipped.
    """
    return trained(recipe.teacher) if recipe.teacher else None


def check(name: str, folder: Path = RESULTS) -> Iterator[str]:
    """Train the first recorded seed again, and say how it compares.

    Yields:
        Lines of text. On the machine, versions and number of threads of the record the counts are
        equal; elsewhere rounding differs, and some images with it.

    Raises:
        ValueError: no records, or the counts differ by more than seeds do.
    """
    known = results(name, folder)
    old = known.records[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(old["threads"])
    try:
        new, _ = run_seed(name, recipes.find(name), old["seed"])
    finally:
        torch.set_num_threads(threads)
    if "diverged" in new:
        raise ValueError(f"{name}, seed {old['seed']}, diverges now: {new['diverged']}")
    then, now = _percent(old["test"]), _percent(new["test"])
    yield f"{name}, seed {old['seed']}: recorded {then:.2f}%, now {now:.2f}%"
    if new["test"] == old["test"]:
        yield "the same, to the last image"
        return
    spread = max(3 * known.sd, 0.002) if known.n > 1 else 0.005
    if abs(now - then) > 100 * spread:
        raise ValueError(f"{name}: further from the record than seeds differ")
    yield "not the same images, but as near as seeds are: another machine, version or thread count?"


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _percent(counts: dict[str, float]) -> float:
    return 100 * counts["correct"] / counts["n"]


def _checkpoint(name: str, seed: int) -> Path:
    return data_root() / "runs" / f"{name}-{seed}.pt"


def _one_thread() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker, not its present job alone
    torch.set_num_threads(1)


def _commit() -> str | None:
    """The commit of the package's checkout, "-dirty" if its code is not the commit's; None where
    it is installed without one."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(package), *arguments]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is another's repository
        changed = git("status", "--porcelain", "--", "*.py")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
