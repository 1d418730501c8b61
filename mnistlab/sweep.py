"""Search for a recipe's settings by Ray Tune, on the validation images alone."""

import datetime
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from . import recipes
from .data import load
from .many import can_stack, fit_many
from .models import PRESETS, build
from .runs import RESULTS, alone, read_lines, stale, start_ray, teacher_of
from .train import Recipe, Run, fit, pick_device, write_atomically

SWEEPS = RESULTS / "sweeps"


def sweep(
    name: str,
    over: Mapping[str, str],
    trials: int | None = None,
    *,
    seed: int = 0,
    folder: Path = SWEEPS,
) -> list[dict[str, Any]]:
    """Try settings of a recipe, each trial one run, on one core, and record them all.

    Trials run on the cluster at $RAY_ADDRESS, or on a local Ray without it; where there is a GPU,
    combinations run there, all in one pass. A killed worker's trial is started again, three times
    at most. Each is recorded as it ends, with its whole recipe; of combinations, those that are
    recorded already are left alone.

    Args:
        name: of a recipe.
        over: field of the recipe -> values "0.05,0.1,0.2" or "(8,8),(6,6,6)", or a range
            "0.01..0.3", searched on a logarithmic scale.
        trials: how many, proposed by Optuna's TPE sampler (Bergstra et al. 2011). Default: every
            combination of the values.
        seed: of the sampler and of every run.
        folder: of the records: a line of JSON a trial is added to NAME.jsonl.

    Returns:
        The trials of this sweep, the best validation accuracy first, the lower loss on a tie.

    Raises:
        ValueError: unknown recipe or value, a range without `trials`, a damaged record, another
            sweep of this recipe is running, or Ray is not installed.
        SystemExit: unknown field; the near ones are printed.
    """
    recipe = recipes.find(name)
    space = {field: _values(field, text) for field, text in over.items()}
    if not space:
        raise ValueError("nothing to search: --over lr=0.05,0.1,0.2")
    ranges = [field for field, values in space.items() if isinstance(values, tuple)]
    if ranges and trials is None:
        raise ValueError(f"{ranges[0]} is a range: say how many trials")
    for values in itertools.product(*space.values()):  # what cannot run fails here; ends of ranges
        tried = recipes.override(recipe, _settings(dict(zip(space, values, strict=True))))
        build(tried.model, **tried.arguments)
        teacher_of(tried)
    with alone("sweeping", name):
        return _ranked(_search(name, recipe, space, trials, seed, folder / f"{name}.jsonl"))


def _search(
    name: str,
    recipe: Recipe,
    space: dict[str, Any],
    trials: int | None,
    seed: int,
    path: Path,
) -> list[dict[str, Any]]:
    """The trials, each recorded as it ends; those that are recorded already are not made again."""
    before = read_lines(path)
    rows = []  # of this sweep
    if trials is None:
        grid = [dict(zip(space, v, strict=True)) for v in itertools.product(*space.values())]
        rows = [row for row in before if row["seed"] == seed and row["settings"] in grid]
        rows = [row for row in rows if not _changed(row, recipe)]
        grid = [settings for settings in grid if settings not in [r["settings"] for r in rows]]
        if not grid:
            return rows
    data = load(recipe.data)

    def keep(found: dict[str, Any]) -> None:
        made = _whole(recipes.override(recipe, _settings(found["settings"])).describe())
        row = {key: found[key] for key in ("settings", "val_accuracy", "val_loss", "epochs")}
        row |= {"seconds": found["took"], "seed": seed, "date": found["date"], "recipe": made}
        rows.append(row)
        before.append(row)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in before).encode())

    if trials is None and pick_device().type == "cuda":
        tried = [recipes.override(recipe, _settings(settings)) for settings in grid]
        if can_stack(*tried):  # all at once
            jobs = [(one, seed) for one in tried]
            runs = fit_many(data, jobs, teacher=teacher_of(tried[0]))
            for settings, run in zip(grid, runs, strict=True):
                date = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")  # as Tune has it
                keep({"settings": settings, "date": date, **_outcome(run)})
            return rows
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # one bar instead of tables
    ray, new = start_ray()
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def trial(config: dict[str, Any]) -> None:
        """Runs on a worker."""
        settings = config.get("grid", config)
        tried = recipes.override(recipe, _settings(settings))
        teacher = teacher_of(tried)
        try:
            run = fit(tried.model, tried.data, tried, seed=seed, teacher=teacher, progress=False)
        except FloatingPointError as error:
            run = error
        tune.report({"settings": settings} | _outcome(run))

    class Recorder(tune.Callback):
        def __init__(self, bar: tqdm):
            self.bar = bar

        def __getstate__(self) -> dict:  # Tune stores its callbacks; a bar cannot be stored
            return {}

        def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
            keep(trial.last_result)
            self.bar.update()

    if trials is None:
        search, samples, total = None, 1, len(grid)
        space = {"grid": tune.grid_search(grid)}
    else:
        search, samples, total = OptunaSearch(seed=seed), trials, trials
        space = {
            field: tune.loguniform(*values) if isinstance(values, tuple) else tune.choice(values)
            for field, values in space.items()
        }
    wanted = len(rows) + total
    with (
        tempfile.TemporaryDirectory() as scratch,  # Tune's own logs
        tqdm(total=total, desc=f"sweep {name}", unit="trial") as bar,
    ):
        found = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="val_accuracy",
                mode="max",
                search_alg=search,
                num_samples=samples,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=3),
                callbacks=[Recorder(bar)],
                verbose=0,
            ),
        ).fit()
    if new:
        ray.shutdown()
    if failed := [result.error for result in found if result.error]:
        raise ValueError(f"{len(failed)} of {len(found)} trials failed: {failed[0]}")
    if len(rows) < wanted:  # Ctrl-C, which Tune keeps to itself
        raise KeyboardInterrupt
    return rows


def _outcome(run: Run | FloatingPointError) -> dict[str, Any]:
    """What is kept of a trial; one that diverged is a try too, and the worst."""
    if isinstance(run, FloatingPointError):  # JSON has no infinity
        return {"val_accuracy": 0.0, "val_loss": sys.float_info.max, "epochs": 0, "took": 0.0}
    last = run.history[-1]
    scores = {key: last[key] for key in ("val_accuracy", "val_loss")}
    return scores | {"epochs": last["epoch"], "took": run.seconds}


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (-row["val_accuracy"], row["val_loss"]))


def _changed(row: dict[str, Any], recipe: Recipe) -> list[str]:
    """Fields in which a trial differs from what its settings make of the recipe now."""
    if "recipe" not in row:  # the first trials were kept without
        return []
    tried = recipes.override(recipe, _settings(row["settings"]))
    whole = replace(tried, arguments=_whole(tried.describe())["arguments"])
    return stale([{"recipe": _whole(row["recipe"])}], whole)


def _whole(described: dict[str, Any]) -> dict[str, Any]:
    """With every argument of the model: a search changes what its preset says."""
    arguments = PRESETS[described["model"]].arguments | described["arguments"]
    return described | {"arguments": json.loads(json.dumps(arguments))}


def _values(field: str, text: str) -> list[str] | tuple[float, float]:
    """ "0.05,0.1" or "(8,8),(6,6,6)" -> its values; "0.01..0.3" -> the ends of a range.

    A tuple stays a text: Optuna and JSON have none.
    """
    if ".." not in text:
        values = re.split(r",(?![^(]*\))", text)  # at commas outside brackets
        return [value if "(" in value else recipes.literal(value) for value in values]
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        raise ValueError(f"{field}={text}: write a range as low..high, such as 0.01..0.3") from None
    if not 0 < low < high:
        raise ValueError(f"{field}={text}: a range runs from above 0 upwards")
    return low, high


def _settings(config: Mapping[str, Any]) -> list[str]:
    return [f"{field}={value}" for field, value in config.items()]
