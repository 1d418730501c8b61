"""The named experiments. A recipe has the name of the model that it trains, or says what varies.

Learning rate and augmentation of the course's own recipes were chosen on the validation images,
each by six tries (seed 0) of three rates, with augmentation and without, such as `mnistlab sweep
cnn-8k --over lr=0.05,0.1,0.2 augment=none,mild`. The tries are in results/sweeps. Those of the slow
ones, simplecnn-421k and all of chapters 4 to 7, have 5 epochs each instead of 15. Of the nets named
shared and fullcnn the shape was searched too. The others are as their sources state them, or say
so.
"""

import ast
import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .data import Augment
from .models import PRESETS
from .train import Recipe

MILD = Augment(rotate=10, shift=2, scale=0.1)
AUGMENTS = {"none": Augment(), "mild": MILD}  # by name, for `--set augment=mild`

# The grid of mnist_experiments, its blocks A to D. Its text leaves open the momentum of SGD (0.9:
# what torch's one-cycle schedule sets), the steps of StepLR (8 epochs) and the augmentation.
GRID = {
    "sgd-onecycle": {"lr": 0.05},
    "adamw-step": {"optimizer": "adamw", "schedule": "step", "step_epochs": 8, "lr": 0.0025},
    "rmsprop-plateau": {"optimizer": "rmsprop", "schedule": "plateau", "lr": 0.001},
    "adam-onecycle": {"optimizer": "adam", "lr": 0.003},
}
TINY = Recipe(
    model="tinymnistnet-16k", epochs=20, weight_decay=1e-4, augment=MILD, channels_last=True
)
# The playground's stable recipe, for its four models. The first has no normalisation, and from
# torch's own start it does not learn: its first logits hardly differ from one image to the next.
PLAYGROUND = Recipe(
    epochs=15,
    lr=0.028,
    weight_decay=1e-4,
    label_smoothing=0.02,
    augment=Augment(rotate=7),
    clean_epochs=3,
    swa_epochs=3,
    tta=(-3, 0, 3),
    channels_last=True,
)

# What the modern families share, with the rate that most of them were best with.
SGD = Recipe(epochs=15, lr=0.1, channels_last=True)
# The students of chapter 10: the rate is the best without augmentation, at each of the three sizes.
STUDENT = replace(SGD, lr=0.2)
# The best try of its search had a teacher, that of shared-1k had none.
SHARED_2K = replace(SGD, model="shared-2k", lr=0.2)
ADAMW = Recipe(epochs=15, optimizer="adamw", lr=0.008, weight_decay=0.05)
WALK = replace(ADAMW, channels_last=True)  # the nine nets of chapter 6
CAPSULES = Recipe(
    epochs=15, optimizer="adam", lr=0.004, weight_decay=0.0, loss="capsules", channels_last=True
)

RECIPES = {
    "dense-8k": Recipe(model="dense-8k", epochs=15, lr=0.2),
    "dense-68k": Recipe(model="dense-68k", epochs=15, lr=0.05, augment=MILD),
    "simplecnn-8k": Recipe(model="simplecnn-8k", epochs=15, lr=0.05),
    "cnn-8k": Recipe(model="cnn-8k", epochs=15, lr=0.2, channels_last=True),
    **{f"cnn-{size}": replace(STUDENT, model=f"cnn-{size}") for size in ("1k", "4k")},
    **{  # with a teacher and without, on images that are changed and that are not
        f"cnn-{size}-{arm}": replace(STUDENT, model=f"cnn-{size}", **fields)
        for size in ("1k", "4k", "8k")
        for arm, fields in (
            ("taught", {"teacher": "cnn-68k"}),
            ("mild", {"augment": MILD}),
            ("mild-taught", {"augment": MILD, "teacher": "cnn-68k"}),
        )
    },
    # As cnn-8k-taught, with rounded weights: its rate, and no tries of their own, but for two other
    # shapes of cnn-10k, without a stride in the stem.
    **{
        f"cnn-{size}-{bits}bit": replace(
            STUDENT, model=f"cnn-{size}", teacher="cnn-68k", weight_bits=bits
        )
        for size, bits in (("8k", 4), ("8k", 3), ("8k", 2), ("10k", 3), ("16k", 2))
    },
    "cnn-10k-3bit-long": replace(
        STUDENT, model="cnn-10k", teacher="cnn-68k", weight_bits=3, epochs=30
    ),
    "shared-1k": replace(SGD, model="shared-1k", epochs=24, lr=0.4, weight_decay=0.0),
    "shared-2k": SHARED_2K,
    "shared-2k-taught": replace(SHARED_2K, teacher="cnn-68k"),
    "shared-8k": replace(STUDENT, model="shared-8k"),
    "shared-8k-taught": replace(STUDENT, model="shared-8k", teacher="cnn-68k"),
    "fullcnn-4k": replace(STUDENT, model="fullcnn-4k"),
    "fullcnn-4k-taught": replace(STUDENT, model="fullcnn-4k", teacher="cnn-68k", batch_size=64),
    "cnn-68k": Recipe(model="cnn-68k", epochs=15, lr=0.2, augment=MILD, channels_last=True),
    "fullcnn-99k": Recipe(model="fullcnn-99k", epochs=30, lr=0.2, augment=MILD, channels_last=True),
    "simplecnn-421k": Recipe(
        model="simplecnn-421k", epochs=15, lr=0.1, augment=MILD, channels_last=True
    ),
    "efficientnet-8k": replace(SGD, model="efficientnet-8k"),
    "efficientnet-68k": replace(SGD, model="efficientnet-68k", lr=0.2),
    "mobilenet-8k": replace(SGD, model="mobilenet-8k"),
    "shufflenet-8k": replace(SGD, model="shufflenet-8k"),
    "ghostnet-8k": replace(SGD, model="ghostnet-8k", lr=0.2),
    "senet-8k": replace(SGD, model="senet-8k", lr=0.2),
    # The large ones take over what was chosen for 68k.
    **{name: replace(ADAMW, model=name) for name in ("vit-8k", "vit-68k", "vit-210k")},
    # Tries of all 15 epochs, in which augmentation pays; and the 100 epochs of the net's source.
    "vit-68k-mild": replace(ADAMW, model="vit-68k", augment=MILD),
    "vit-210k-long": replace(ADAMW, model="vit-210k", augment=MILD, epochs=100, batch_size=512),
    "convnext-8k": replace(ADAMW, model="convnext-8k"),
    **{
        name: replace(ADAMW, model=name, augment=MILD) for name in ("convnext-68k", "convnext-288k")
    },
    **{
        name: replace(CAPSULES, model=name, augment=MILD)
        for name in ("capsules-8k", "capsules-68k", "capsules-162k", "capsules-8m")
    },
    "capscontrol-173k": replace(
        CAPSULES, model="capscontrol-173k", loss="cross-entropy", augment=MILD
    ),
    "hvc-68k": replace(CAPSULES, model="hvc-68k", loss="cross-entropy", lr=0.008),
    **{
        f"step-{step}-8k": replace(WALK, model=f"step-{step}-8k", **fields)
        for step, fields in (
            ("cnn", {"augment": MILD}),
            ("patches", {}),
            ("residual", {}),
            ("depthwise", {"augment": MILD}),
            ("kernel", {}),
            ("inverted", {}),
            ("few", {"augment": MILD}),
            ("layernorm", {"augment": MILD}),
            ("grn", {"augment": MILD}),
        )
    },
    **{  # those of the walk that chose plain images, with the images of the others: a control
        f"step-{step}-8k-mild": replace(WALK, model=f"step-{step}-8k", augment=MILD)
        for step in ("patches", "residual", "kernel", "inverted")
    },
    "cnn-8k-resplit": Recipe(model="cnn-8k", epochs=15, lr=0.2, channels_last=True, resplit=True),
    "tinymnistnet-sgd": replace(  # block A
        TINY,
        model="tinymnistnet-15k",
        lr=0.1,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
        schedule="constant",
    ),
    **{  # blocks B and C
        f"tinymnistnet-{name}-{size}": replace(TINY, batch_size=size, **fields)
        for name, fields in GRID.items()
        for size in (32, 64, 128)
    },
    **{  # block D
        f"tinymnistnet-{name}": replace(TINY, arguments={"activation": name}, **GRID["adamw-step"])
        for name in ("silu", "gelu")
    },
    **{
        name: replace(PLAYGROUND, model=name)
        for name in ("bottleneck-5k", "bottleneck-6k", "bottleneck-7k", "separable-4k")
    },
    # As its text says: Adam, a tenth of the rate after 10 epochs, clipped, no augmentation.
    "separable-9k": Recipe(
        model="separable-9k",
        epochs=20,
        optimizer="adam",
        lr=0.001,
        schedule="step",
        step_epochs=10,
        weight_decay=0.0,
        clip=1.0,
        channels_last=True,
    ),
}


def find(name: str) -> Recipe:
    """The recipe of this name; a preset that has none of its own gets the default recipe.

    Raises:
        ValueError: unknown name; the message lists the near ones.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name in PRESETS:
        return Recipe(model=name)
    known = sorted({*RECIPES, *PRESETS})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise ValueError(f"unknown recipe {name!r}; near it: {', '.join(near)}")


def literal(text: str) -> Any:
    """The number, tuple or truth value that a text spells; a bare word stays a word."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Change fields of a recipe by `field=value`, typed and checked as the fields are.

    `augment=mild` and `augment=none` name a whole augmentation, `augment.rotate=10` reaches into
    it, and `arguments.dropout=0.1` into the arguments of the model.

    Raises:
        ValueError: a setting is not of this form.
        SystemExit: no such field, or not its type; the near fields are printed.
    """
    import tyro

    fields, arguments = [], dict(recipe.arguments)
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: write it as field=value, such as lr=0.1")
        if name == "augment":
            if value not in AUGMENTS:
                raise ValueError(f"--set {setting}: one of {', '.join(AUGMENTS)}")
            recipe = replace(recipe, augment=AUGMENTS[value])
        elif name == "loss":  # a name, or a function: tyro does not parse such a pair
            recipe = replace(recipe, loss=value)
        elif name.startswith("arguments."):
            arguments[name.removeprefix("arguments.")] = literal(value)
        else:
            fields += [f"--{name.replace('_', '-')}", *value.split(",")]
    typed = tyro.conf.FlagConversionOff[Recipe]
    recipe = replace(recipe, arguments=arguments)
    return tyro.cli(typed, prog="mnistlab train", default=recipe, args=fields)
