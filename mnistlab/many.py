"""Many seeds in one pass: their weights stacked, one call of the model for all of them.

Meant for a GPU, of which one small model uses little. On a CPU, processes side by side are quicker.
"""

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from tqdm.auto import tqdm

from .data import Dataset, batches
from .models import build
from .train import LOSSES, Recipe, Run, make_loss, make_optimizer, make_schedule, pick_device

# What a stack does not do: such a recipe is run seed by seed.
PLAIN = (
    "ema",
    "swa_epochs",
    "clip",
    "compile",
    "precision",
    "target",
    "resplit",
    "teacher",
    "weight_bits",
)


def can_stack(recipe: Recipe) -> bool:
    """Whether `fit_many` can run this recipe."""
    default = Recipe()
    plain = all(getattr(recipe, name) == getattr(default, name) for name in PLAIN)
    stacks = recipe.loss in LOSSES and recipe.loss != "capsules"  # whose output is no tensor
    return plain and stacks and recipe.schedule != "plateau"


def fit_many(
    data: Dataset,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[Run]:
    """Train the recipe's model with each seed, all at once; what `fit` would give, but for rounding
    and for the draws of dropout.

    Args:
        seeds: of the runs; each draws its own weights, order of images and augmentation, as in
            `fit`.
        device: default the best there is.

    Returns:
        A Run for each seed; `seconds` is its share of the pass.

    Raises:
        ValueError: the recipe asks for what a stack does not do.
        FloatingPointError: a loss is no longer finite.
    """
    if not can_stack(recipe):
        raise ValueError(
            f"fit_many takes no plateau, own loss, capsules, {', '.join(PLAIN)}: use fit"
        )
    device = pick_device(device)
    train, val = data.train.to(device), data.val.to(device)
    batch_size = min(recipe.batch_size, len(train))
    steps, k = len(train) // batch_size, len(seeds)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(build(recipe.model, **recipe.arguments).to(device))
        parameters, buffers = stack_module_state(models)  # name -> [k, ...]
        skeleton = models[0]  # its structure alone: functional_call lends it the weights

        def one(parameters: dict, buffers: dict, images: Tensor) -> Tensor:
            return functional_call(skeleton, (parameters, buffers), (images,))

        optimizer = make_optimizer(list(parameters.values()), recipe, matrix=3)
        schedule = make_schedule(optimizer, recipe, steps)
        loss_of = vmap(make_loss(recipe))
        histories: list[list[dict[str, float]]] = [[] for _ in seeds]
        bar = tqdm(total=recipe.epochs, unit="epoch", leave=False, disable=not progress)
        for epoch in range(1, recipe.epochs + 1):
            lr, total, started = optimizer.param_groups[0]["lr"], 0.0, time.perf_counter()
            clean = epoch > recipe.epochs - recipe.clean_epochs
            states = [s * 1_000_003 + epoch for s in seeds]  # as fit() has them
            torch.manual_seed(states[0])
            streams = [
                batches(
                    train,
                    batch_size,
                    shuffle=torch.Generator(device).manual_seed(state),
                    augment=None if clean or not recipe.augment else recipe.augment,
                    drop_last=True,
                )
                for state in states
            ]
            skeleton.train()
            forward = vmap(one, randomness="different")
            for parts in zip(*streams, strict=True):
                images, labels = (torch.stack(part) for part in zip(*parts, strict=True))
                losses = loss_of(forward(parameters, buffers, images), labels)  # [k]
                optimizer.zero_grad()
                losses.sum().backward()  # each seed's loss sees its own weights alone
                optimizer.step()
                schedule.step()
                total = total + losses.detach()
            means = (total / steps).tolist()
            if not all(map(math.isfinite, means)):
                raise FloatingPointError(f"a loss is no longer finite in epoch {epoch}: {means}")
            seconds = time.perf_counter() - started
            skeleton.eval()
            forward = vmap(one, in_dims=(0, 0, None))
            with torch.no_grad():
                chunks = [forward(parameters, buffers, x) for x, _ in batches(val, 1000)]
            logits = torch.cat(chunks, 1).float()  # [k, N, K]
            for history, mean, own in zip(histories, means, logits, strict=True):
                history.append(
                    {
                        "epoch": epoch,
                        "lr": lr,
                        "train_loss": mean,
                        "val_loss": F.cross_entropy(own, val.labels).item(),
                        "val_accuracy": (own.argmax(1) == val.labels).float().mean().item(),
                        "seconds": seconds / k,
                        "images_per_second": k * steps * batch_size / seconds,
                    }
                )
            bar.update()
        bar.close()
    stacked = {**parameters, **buffers}
    runs = []
    for i, (seed, model) in enumerate(zip(seeds, models, strict=True)):
        model.load_state_dict({name: value[i].detach() for name, value in stacked.items()})
        threads = torch.get_num_threads()
        runs.append(Run(model.eval(), recipe, seed, histories[i], device.type, threads))
    return runs
