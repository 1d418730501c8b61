"""What the families share."""

from torch import nn


class Layers(nn.Sequential):
    """nn.Sequential whose slices are plain nn.Sequential, so that `model[:3]` works.

    nn.Sequential would call the subclass's own constructor, which takes widths, not layers.
    """

    def __getitem__(self, index):
        """One layer, or a slice of them (the same modules, not copies)."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)
