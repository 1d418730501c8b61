"""The named experiments. A recipe has the name of the model that it trains, or says what varies.

Learning rate and augmentation of each were chosen on the validation images, by the same six tries
(seed 0): a rate of 0.05, 0.1 or 0.2, with and without augmentation. The
tries are in results/tuning.csv.
"""

import difflib

from .data import Augment
from .models import PRESETS
from .train import Recipe

MILD = Augment(rotate=10, shift=2, scale=0.1)

RECIPES = {
    "dense-8k": Recipe(model="dense-8k", epochs=15, lr=0.2),
    "dense-68k": Recipe(model="dense-68k", epochs=15, lr=0.05, augment=MILD),
    "simplecnn-8k": Recipe(model="simplecnn-8k", epochs=15, lr=0.05),
    "cnn-8k": Recipe(model="cnn-8k", epochs=15, lr=0.2, channels_last=True),
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
