"""The one training loop: a frozen Recipe goes in, a Run comes out."""

import contextlib
import copy
import dataclasses
import difflib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from tqdm.auto import tqdm

from . import compress, distill
from .data import Augment, Dataset, Split, batches, load
from .models import build, capsules

CHOICES = {
    "optimizer": ("sgd", "adam", "adamw", "rmsprop"),
    "schedule": ("onecycle", "cosine", "step", "plateau", "constant"),
    "precision": ("fp32", "bf16"),
}
LOSSES = {
    "cross-entropy": F.cross_entropy,
    "mse": lambda logits, labels: F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).float()),
    "margin": F.multi_margin_loss,  # Crammer & Singer 2001
    "capsules": capsules.margin_loss,  # Sabour et al. 2017; of the output of capsule nets
}
LOOK_EVERY = 20  # batches between two looks at the loss: each look makes a GPU wait
CHUNK = {"cuda": 32}  # batches that are shuffled and augmented at once: fewer calls of a GPU
PREDICTED = {"cpu": 250}  # images that `predict` takes at once: maps that stay in a CPU's cache


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run, except the seed.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    model: str = "cnn-68k"  # a preset; used where fit() is given no module
    arguments: dict[str, Any] = field(default_factory=dict)  # of the preset, changed: dropout=0.1
    data: str = "mnist"  # a data set; used where fit() is given no Dataset
    resplit: bool = False  # share all images out anew, by the seed, instead of the owners' split
    epochs: int = 5
    batch_size: int = 128  # a last batch that is not full is left out of an epoch
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    lr: float = 0.1  # learning rate: the highest that the schedule reaches
    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # of SGD
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam and AdamW
    weight_decay: float = 5e-4  # on weights of two dimensions or more, not on biases and norms
    # onecycle: Smith & Topin 2017; cosine: Loshchilov & Hutter 2016, after a linear warm-up;
    # plateau: lowered when the validation loss no longer falls
    schedule: Literal["onecycle", "cosine", "step", "plateau", "constant"] = "onecycle"
    warmup: float = 0.25  # fraction of the training in which lr rises (onecycle, cosine)
    step_epochs: int = 5  # epochs between two steps (step)
    gamma: float = 0.1  # what lr is multiplied by (step, plateau)
    patience: int = 2  # epochs without a lower validation loss (plateau)
    # a name, or a function (output, labels) -> scalar
    loss: (
        Literal["cross-entropy", "mse", "margin", "capsules"] | Callable[[Any, Tensor], Tensor]
    ) = "cross-entropy"
    label_smoothing: float = 0.0  # of cross-entropy (Szegedy et al. 2016)
    augment: Augment = Augment()  # random changes to the training images
    clean_epochs: int = 0  # so many epochs at the end train without augmentation
    ema: float = 0.0  # decay of an average of the weights, which is then the model; 0 is off
    # The model is then the mean of the weights after each of so many epochs at the end, its batch
    # normalisation refreshed (Izmailov et al. 2018); 0 is off.
    swa_epochs: int = 0
    tta: tuple[float, ...] = ()  # test-time augmentation: the mean over these rotations, degrees
    clip: float = 0.0  # largest norm of the gradient; 0 is off
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, where the processor has it
    compile: bool = False  # run the model through torch.compile
    channels_last: bool = False  # memory layout on a CPU: faster for most convolutions, not for all
    target: float | None = None  # stop once validation accuracy, 0..1, reaches this
    teacher: str = ""  # distillation (Hinton et al. 2015): a recipe whose weights are shipped
    temperature: float = 4.0  # softens what teacher and student say
    hard: float = 0.1  # weight of `loss`, the teacher's is 1 - hard; at 0 no label is used
    attention: float = 0.0  # weight of attention transfer (Zagoruyko & Komodakis 2017)
    weight_bits: int = 0  # quantisation-aware training for weights of 2 to 8 bits; 0 is off

    def __post_init__(self):
        choices = CHOICES if callable(self.loss) else CHOICES | {"loss": tuple(LOSSES)}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                near = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0)[0]
                raise ValueError(f"{name}={value!r}: did you mean {near!r}? ({', '.join(known)})")
        ranges = {
            "at least 1": ("epochs", "batch_size", "step_epochs"),
            "at least 0": (
                "weight_decay",
                "patience",
                "clean_epochs",
                "swa_epochs",
                "clip",
                "attention",
            ),
            "above 0": ("lr", "gamma", "temperature"),
            "in 0..1, below 1": ("momentum", "ema", "label_smoothing", "warmup"),
            "in 0..1": ("hard",),
            "0 for off, or 2 to 8": ("weight_bits",),
        }
        tests = (
            lambda v: v >= 1,
            lambda v: v >= 0,
            lambda v: v > 0,
            lambda v: 0 <= v < 1,
            lambda v: 0 <= v <= 1,
            lambda v: v in (0, *compress.BITS),
        )
        for (words, names), holds in zip(ranges.items(), tests, strict=True):
            for name in names:
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name}={getattr(self, name)}: must be {words}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: must be in 0..1, below 1")
        if self.loss != "cross-entropy" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to cross-entropy: leave it 0 with a loss")
        if self.swa_epochs and (self.ema or self.target):
            raise ValueError("swa_epochs goes with no ema, a second average, and with no target")
        if self.swa_epochs > self.epochs:
            raise ValueError(f"swa_epochs={self.swa_epochs}: more than epochs={self.epochs}")
        if self.nesterov and not self.momentum and self.optimizer == "sgd":
            raise ValueError("nesterov=True needs momentum above 0; plain SGD has nesterov=False")
        if self.target is not None and not 0 < self.target <= 1:
            raise ValueError(f"target={self.target}: an accuracy in 0..1, such as 0.99")
        if self.attention and (not self.teacher or self.compile):
            raise ValueError("attention is transferred from a teacher, and goes with no compile")
        if self.teacher and self.loss == "capsules":
            raise ValueError("a student gives logits: loss='capsules' goes with no teacher")

    def describe(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold; a loss by its name."""
        described = dataclasses.asdict(self)
        if callable(self.loss):
            described["loss"] = getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
        return json.loads(json.dumps(described))  # tuples are lists in JSON


@dataclass(frozen=True, eq=False)
class Run:
    """What a training run gave.

    Attributes:
        model: the trained model (the weight average where the recipe has one), in eval mode.
        recipe, seed: what made it.
        history: a dict an epoch: epoch, lr, train_loss, val_loss, val_accuracy, seconds,
            images_per_second (of training alone).
        device, threads: where it ran.
    """

    model: nn.Module
    recipe: Recipe
    seed: int
    history: list[dict[str, float]] = field(repr=False)
    device: str
    threads: int

    @property
    def seconds(self) -> float:
        """Seconds of training, without validation."""
        return sum(row["seconds"] for row in self.history)

    @property
    def images_per_second(self) -> float:
        """Training images a second, over the whole run."""
        return sum(row["seconds"] * row["images_per_second"] for row in self.history) / self.seconds

    def __str__(self) -> str:
        last = self.history[-1]
        epochs = "1 epoch" if last["epoch"] == 1 else f"{last['epoch']} epochs"
        return (
            f"{epochs}, {self.seconds:.1f} s on {self.device}, seed {self.seed}: "
            f"loss {last['train_loss']:.4f}, validation {100 * last['val_accuracy']:.2f}%"
        )


def pick_device(device: torch.device | str | None = None) -> torch.device:
    """The device asked for, or else the best there is: CUDA, then MPS, then the CPU.

    Raises:
        ValueError: the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device is None:
        return torch.device(next((name for name, has in there.items() if has()), "cpu"))
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    if not there.get(device.type, lambda: True)():
        raise ValueError(f"device={device.type!r} is not available here; leave device out")
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 itself, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older torch
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("bf16"))  # x86, ARM


@torch.no_grad()
def predict(
    model: nn.Module,
    split: Split,
    *,
    view: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Logits of a model in eval mode, float32 [N, num_classes], on the model's device.

    The model is left in the mode it was in.

    Args:
        view: changes the pixels first, float [B, C, H, W] in 0..1 to the same.
        batch_size: default 250 on a CPU, 1000 elsewhere; at most so many images at once.
    """
    augment = None if view is None else lambda pixels, _: view(pixels)
    device = _device(model)
    split, batch_size = split.to(device), batch_size or PREDICTED.get(device.type, 1000)
    was_training = model.training
    model.eval()
    logits = [model(images).float() for images, _ in batches(split, batch_size, augment=augment)]
    model.train(was_training)
    return torch.cat(logits)


def fit(
    model: nn.Module | str,
    data: Dataset | str,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    teacher: nn.Module | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | Path | None = None,
    on_epoch: Callable[[dict[str, Any], nn.Module], None] | None = None,
    progress: bool = True,
) -> Run:
    """Train a model, in place, and return the Run.

    Same seed, machine and number of threads: same weights, bit for bit. The caller's random
    state is left as it was. The test split is never looked at.

    Args:
        model: a module that maps [B, C, H, W] to logits, or the name of a preset, which is then
            built under the seed.
        data: a Dataset, or its name.
        recipe: default `Recipe()`.
        seed: of the order of images, augmentation and dropout.
        teacher: where the recipe names one, its model, such as `trained(recipe.teacher)`; a copy of
            it is used, in eval mode.
        device: default the best there is.
        checkpoint: file written after each epoch. If it is there, training goes on from it and
            ends with the same weights as if it had never stopped.
        on_epoch: called after each epoch with its row of the history, and the model as validated:
            where a tracker looks on.
        progress: show a bar with loss, validation accuracy and images a second.

    Raises:
        ValueError: data, recipe, device or checkpoint do not fit together; nothing was trained.
        FloatingPointError: the loss is no longer finite.
    """
    recipe = recipe or Recipe()
    if isinstance(data, str):
        data = load(data, resplit=seed if recipe.resplit else None)
    device = pick_device(device)
    if recipe.precision == "bf16" and not has_bf16(device):
        raise ValueError(f"precision='bf16': this {device.type} has no such arithmetic; use 'fp32'")

    with conditions(device), prepared(model, data, recipe, seed, device, teacher) as loop:
        history = loop.resume(checkpoint)
        with tqdm(
            total=recipe.epochs * loop.steps,
            initial=len(history) * loop.steps,
            unit="batch",
            leave=False,
            disable=not progress or bool(os.environ.get("TQDM_DISABLE")),  # notebooks ignore it
        ) as bar:
            while len(history) < recipe.epochs and not loop.reached_target(history):
                history.append(loop.epoch(len(history) + 1, bar))
                loop.save(checkpoint, history)
                if on_epoch is not None:
                    on_epoch(history[-1], loop.reported(len(history)))
    return loop.run(history)


@contextlib.contextmanager
def conditions(device: torch.device) -> Iterator[None]:
    """In which runs are made: the caller's random state is kept aside, and cuDNN takes kernels that
    repeat themselves, in float32 and not in the shorter form of a GPU's matrix units."""
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        yield


@contextlib.contextmanager
def prepared(
    model: nn.Module | str,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    teacher: nn.Module | None = None,
    capturable: bool = False,
) -> Iterator["Loop"]:
    """A run before its first step, held to what `fit` demands.

    Raises:
        ValueError: data, model and recipe do not fit together.
    """
    if recipe.teacher and teacher is None:
        raise ValueError(f"the recipe has a teacher: give teacher=ml.trained({recipe.teacher!r})")
    if teacher is not None and not recipe.teacher:
        raise ValueError("the recipe names no teacher: give it one, such as Recipe(teacher='mine')")
    torch.manual_seed(seed)
    model = build(model, **recipe.arguments) if isinstance(model, str) else model
    model = model.to(device)
    _check(model, data)
    if isinstance(model, capsules.CapsuleNet) and recipe.loss in {*LOSSES} - {"capsules"}:
        raise ValueError(f"loss={recipe.loss!r}: a capsule net trains with loss='capsules'")
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(device).eval()
        _check_teacher(teacher, model, data.train[:2])
    with compress.quantised(model, recipe.weight_bits):
        yield Loop(model, data, recipe, seed, device, teacher, capturable)


class Loop:
    """The moving parts of one run."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        recipe: Recipe,
        seed: int,
        device: torch.device,
        teacher: nn.Module | None = None,
        capturable: bool = False,
    ):
        self.model, self.recipe, self.seed, self.device = model, recipe, seed, device
        self.teacher = teacher  # no part of the run: not in its checkpoints
        self.train, self.val = data.train.to(device), data.val.to(device)
        self.batch_size = min(recipe.batch_size, len(self.train))
        self.steps = len(self.train) // self.batch_size
        if recipe.channels_last and device.type == "cpu":  # half as fast on an H100, in float32
            for net in filter(None, (model, teacher)):
                net.to(memory_format=torch.channels_last)
        # Of images that never change a teacher is asked once, and not in each epoch.
        self.answers = None
        if teacher is not None and not recipe.augment and not recipe.attention:
            with self.autocast():
                self.answers = predict(teacher, self.train)
        self.total = torch.zeros((), device=device)  # of the losses in an epoch
        self.optimizer = make_optimizer(model.parameters(), recipe, capturable)
        self.schedule = make_schedule(self.optimizer, recipe, self.steps)
        self.loss = make_loss(recipe)
        self.parts = {"model": model, "optimizer": self.optimizer, "schedule": self.schedule}
        if recipe.ema:
            ema = get_ema_multi_avg_fn(recipe.ema)
            self.average = AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
        elif recipe.swa_epochs:
            self.average = AveragedModel(model)
        if recipe.ema or recipe.swa_epochs:
            self.parts["average"] = self.average
        self.net = torch.compile(model) if recipe.compile else model
        # What must agree for a checkpoint to be of the same run.
        self.identity = recipe.describe() | {
            "model": [list(value.shape) for value in model.state_dict().values()],
            "data": data.name,
            "images": len(self.train),
            "seed": seed,
        }

    def autocast(self):
        if self.recipe.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch of `begin`: the recipe's, or a student's."""
        recipe, teacher = self.recipe, self.teacher
        if teacher is None:
            return self.loss(self.net(images), labels)
        if self.answers is not None:
            labels, teacher = self.train.labels[labels], self.answers[labels]
        return distill.objective(
            self.net,
            teacher,
            images,
            labels,
            self.loss,
            temperature=recipe.temperature,
            hard=recipe.hard,
            attention=recipe.attention,
        )

    def reported(self, epoch: int) -> nn.Module:
        """What is validated after an epoch; after the last, the model that the run gives."""
        swa = self.recipe.swa_epochs and epoch == self.recipe.epochs
        return self.average.module if self.recipe.ema or swa else self.model

    def epoch(self, epoch: int, bar: tqdm) -> dict[str, float]:
        """Train for one epoch, then validate; returns the row of the history."""
        started = time.perf_counter()
        for step, batch in enumerate(self.begin(epoch), start=1):
            self.step(*batch)
            self.after_step()
            if step % LOOK_EVERY == 0 or step == self.steps:
                self.look(self.total.item() / step, epoch, step, started, bar)
            bar.update()
        train_loss = self.end(epoch)
        return self.validate(epoch, train_loss, time.perf_counter() - started)

    def begin(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch. Where the teacher's answers are known, the place of each image
        in the split stands for its label: it says which answers are wanted."""
        recipe, train = self.recipe, self.train
        if self.answers is not None:
            train = replace(train, labels=torch.arange(len(train), device=self.device))
        # Each epoch draws from states of its own, so that a resumed run needs none stored.
        # On the CPU, so that the order of images is the same on every device.
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        torch.manual_seed(self.seed * 1_000_003 + epoch)
        clean = epoch > recipe.epochs - recipe.clean_epochs
        at_once = CHUNK.get(self.device.type, 1)
        stream = batches(
            train,
            at_once * self.batch_size,
            shuffle=draws,
            augment=None if clean or not recipe.augment else recipe.augment,
            drop_last=at_once == 1,
        )
        self.lr = float(self.optimizer.param_groups[0]["lr"])
        self.total.zero_()
        self.model.train()
        for chunk in stream:
            parts = zip(*(part.split(self.batch_size) for part in chunk), strict=True)
            yield from (part for part in parts if len(part[1]) == self.batch_size)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of the optimiser. Nothing here waits for a GPU: it can be captured."""
        with self.autocast():
            loss = self.loss_of(images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.total += loss.detach()

    def after_step(self) -> None:
        """What no graph holds: the schedule, and the average of weights."""
        if self.recipe.schedule != "plateau":
            self.schedule.step()
        if self.recipe.ema:
            self.average.update_parameters(self.model)

    def end(self, epoch: int) -> float:
        """End the training of an epoch, and wait for it; returns the mean loss."""
        if epoch > self.recipe.epochs - self.recipe.swa_epochs:
            self.average.update_parameters(self.model)
            if epoch == self.recipe.epochs:  # the statistics of the average are not the average's
                update_bn(batches(self.train, self.batch_size), self.average, self.device)
        return self.total.item() / self.steps

    def validate(self, epoch: int, train_loss: float, seconds: float) -> dict[str, float]:
        """The row of the history after an epoch whose training took so long."""
        with self.autocast():
            logits = predict(self.reported(epoch), self.val)
        val_loss = F.cross_entropy(logits, self.val.labels).item()
        if self.recipe.schedule == "plateau":
            self.schedule.step(val_loss)
        self.val_accuracy = (logits.argmax(1) == self.val.labels).sum().item() / len(self.val)
        return {
            "epoch": epoch,
            "lr": self.lr,
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_accuracy": self.val_accuracy,
            "seconds": seconds,
            "images_per_second": self.steps * self.batch_size / seconds,
        }

    def run(self, history: list[dict[str, float]]) -> Run:
        """What was trained; the weights that a run computed with become plain ones."""
        model = compress.release(self.reported(len(history)))  # an average is another module
        threads = torch.get_num_threads()
        return Run(model.eval(), self.recipe, self.seed, history, self.device.type, threads)

    def look(self, loss: float, epoch: int, step: int, started: float, bar: tqdm) -> None:
        """Stop if the loss is no longer finite; show how it goes."""
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} in epoch {epoch}, by batch {step}: try a lower learning "
                f"rate than {self.recipe.lr}, or gradient clipping (clip=1.0)"
            )
        rate = step * self.batch_size / (time.perf_counter() - started)
        val = f"{100 * self.val_accuracy:.2f}%" if epoch > 1 else "after the epoch"
        bar.set_postfix_str(
            f"epoch {epoch}, loss {loss:.4f}, val {val}, {rate:,.0f} images/s", refresh=False
        )

    def reached_target(self, history: list[dict[str, float]]) -> bool:
        target = self.recipe.target
        return bool(history) and target is not None and history[-1]["val_accuracy"] >= target

    def resume(self, path: str | Path | None) -> list[dict[str, float]]:
        """Load a checkpoint, if there is one, and return its history, else []."""
        if path is None or not Path(path).exists():
            return []
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            # A field that is younger than the checkpoint had its default then.
            identity, history = Recipe().describe() | saved["identity"], saved["history"]
        except Exception as error:  # torch.load raises many kinds for a file that is not its own
            raise ValueError(f"{path} is not a checkpoint of fit(); remove it") from error
        differs = [key for key, value in self.identity.items() if identity.get(key) != value]
        if differs:
            raise ValueError(
                f"{path} belongs to a run with another {', '.join(differs)}; "
                "remove it, or give another checkpoint"
            )
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.val_accuracy = history[-1]["val_accuracy"]
        return history

    def save(self, path: str | Path | None, history: list[dict[str, float]]) -> None:
        if path is None:
            return
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        buffer = io.BytesIO()
        torch.save(saved | {"identity": self.identity, "history": history}, buffer)
        write_atomically(Path(path), buffer.getvalue())


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _check(model: nn.Module, data: Dataset) -> None:
    """Try two images through the model and hold labels to its outputs, before any training."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameters")
    for name in ("train", "val"):
        split = getattr(data, name)
        if len(split) == 0:
            raise ValueError(f"the {name} split of {data.name!r} is empty")
        few, shape = split[:2], list(split.images.shape[1:])
        try:
            logits = predict(model, few)
        except (AttributeError, RuntimeError, ValueError) as error:  # Attribute: not a tensor
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the model does not take images of shape {shape}: {reason}"
            ) from error
        if logits.ndim != 2 or len(logits) != len(few):
            raise ValueError(
                f"the model must give [N, num_classes], not {list(logits.shape)} for N={len(few)}"
            )
        labels = split.labels
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(
                f"the {name} labels run from {labels.min()} to {labels.max()}, but the model "
                f"has {logits.shape[1]} outputs, for labels 0 to {logits.shape[1] - 1}"
            )


def _check_teacher(teacher: nn.Module, model: nn.Module, few: Split) -> None:
    """Hold the teacher's output to the model's, before any training."""
    try:
        fits = predict(teacher, few).shape == predict(model, few).shape
    except (AttributeError, RuntimeError, ValueError):
        fits = False
    if not fits:
        raise ValueError("the teacher does not give logits of the model's shape for these images")


def make_loss(recipe: Recipe) -> Callable[[Any, Tensor], Tensor]:
    """The recipe's loss: (output, labels) -> scalar."""
    if recipe.label_smoothing:
        return nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    return LOSSES.get(recipe.loss, recipe.loss)


def make_optimizer(
    parameters: Iterable[nn.Parameter], recipe: Recipe, capturable: bool = False
) -> torch.optim.Optimizer:
    """The recipe's optimiser of those parameters that are trained.

    Args:
        capturable: its step can be captured in a CUDA graph, and its rate changed afterwards.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [  # biases and norms have one dimension, and do not decay
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    lr, more = recipe.lr, {}
    if capturable:
        lr, more = torch.tensor(lr, device=trained[0].device), {"capturable": True}
    match recipe.optimizer:
        case "sgd":
            nesterov = recipe.nesterov
            return torch.optim.SGD(groups, lr, recipe.momentum, nesterov=nesterov, fused=True)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr, **more)
        case "adam":
            return torch.optim.Adam(groups, lr, recipe.betas, fused=True, **more)
        case "adamw":
            return torch.optim.AdamW(groups, lr, recipe.betas, fused=True, **more)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int):
    """A scheduler that is stepped after every batch; "plateau" alone after every epoch."""
    total = recipe.epochs * steps
    match recipe.schedule:
        case "onecycle":
            # Momentum stays as the recipe says. Torch divides by zero if warm-up is one step.
            return lr_scheduler.OneCycleLR(
                optimizer,
                recipe.lr,
                total_steps=max(total, 2),  # of a single step, the rate would be 0
                pct_start=recipe.warmup if recipe.warmup * total > 1 else 0.0,
                cycle_momentum=False,
            )
        case "cosine":
            warmup = int(recipe.warmup * total)

            def factor(step: int) -> float:
                if step < warmup:
                    return (step + 1) / warmup
                return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2

            return lr_scheduler.LambdaLR(optimizer, factor)
        case "step":
            return lr_scheduler.StepLR(optimizer, recipe.step_epochs * steps, recipe.gamma)
        case "plateau":
            return lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=recipe.gamma, patience=recipe.patience
            )
        case "constant":
            return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader, or a kill, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
