"""Distillation: a small student learns what a large teacher says of each image.

A recipe that names a teacher is trained by the same `fit`; what it adds to the loss is here.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Dataset


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 KL(teacher || student), both softened by the temperature, mean over images
    (Hinton et al. 2015, section 2). The square keeps the gradient's size as temperature grows.

    Args:
        student, teacher: logits, [N, K] each.
    """
    ours, theirs = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def attention_loss(student: dict[Any, Tensor], teacher: dict[Any, Tensor]) -> Tensor:
    """Half the distance between attention maps, which are the mean square over channels, of length
    1; summed over the sizes that both nets have, mean over images (Zagoruyko & Komodakis 2017,
    eq. 2).

    Args:
        student, teacher: feature maps [N, C, H, W] by their size, as `walk` gives them.

    Raises:
        ValueError: the nets have no size in common.
    """
    if not (sizes := student.keys() & teacher.keys()):
        raise ValueError("attention: needs two nn.Sequential with feature maps of a common size")
    pairs = [(student[size], teacher[size]) for size in sorted(sizes)]
    maps = [[F.normalize(m.square().mean(1).flatten(1)) for m in pair] for pair in pairs]
    return sum((a - b).norm(dim=1).mean() for a, b in maps) / 2


def walk(model: nn.Module, images: Tensor) -> tuple[Any, dict[Any, Tensor]]:
    """The output of a model and, of a plain nn.Sequential, its last feature map of each size,
    {(H, W): [N, C, H, W]}; single pixels are no map."""
    if type(model).forward is not nn.Sequential.forward:
        return model(images), {}
    x, maps = images, {}
    for layer in model:
        x = layer(x)
        if x.ndim == 4 and x[0, 0].numel() > 1:
            maps[tuple(x.shape[2:])] = x
    return x, maps


def objective(
    student: nn.Module,
    teacher: nn.Module | Tensor,
    images: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    temperature: float,
    hard: float,
    attention: float,
) -> Tensor:
    """What a student minimises: (1 - hard) soft_loss + hard loss(logits, labels), plus attention
    times attention_loss. With hard=0 the labels are not used.

    Args:
        teacher: in eval mode; sees the images as the student does, augmentation and all. Or what it
            says of them, logits [N, K], where attention is 0.
    """
    look = walk if attention else lambda model, images: (model(images), {})
    with torch.no_grad():
        target, theirs = (teacher, {}) if isinstance(teacher, Tensor) else look(teacher, images)
    output, ours = look(student, images)
    total = (1 - hard) * soft_loss(output.float(), target.float(), temperature)
    if hard:
        total = total + hard * loss(output, labels)
    if attention:
        total = total + attention * attention_loss(ours, theirs)
    return total


def dark_knowledge(logits: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean softened probability of each class, given the true one, [K, K]: row is the label, the
    diagonal holds the right class's. A class without images has a row of zeros.

    Args:
        logits: [N, K], such as `predict(teacher, data.val)`.
        labels: int64 [N].
    """
    probabilities = (logits / temperature).softmax(1)
    sums = logits.new_zeros(logits.shape[1], logits.shape[1]).index_add(0, labels, probabilities)
    return sums / labels.bincount(minlength=len(sums)).clamp(min=1).unsqueeze(1)


# --- the digit that the student never saw: Hinton et al. 2015, section 3 ------------------------


def without(data: Dataset, digit: int) -> Dataset:
    """The data set whose training images lack a digit; validation and test keep it.

    Raises:
        ValueError: there is no image of the digit.
    """
    keep = data.train.labels != digit
    if keep.all():
        raise ValueError(f"{data.name!r} has no training image of class {digit}")
    return replace(data, name=f"{data.name}-without-{digit}", train=data.train[keep])


def best_bias(logits: Tensor, labels: Tensor, digit: int) -> float:
    """What to add to a digit's logit for the most right answers; the least such, on a tie.

    Args:
        logits: [N, K], of validation images: this is a choice.
        labels: int64 [N].
    """
    others = logits.double().clone()
    others[:, digit] = -torch.inf
    top, guess = others.max(1)
    gap, order = (top - logits[:, digit].double()).sort()  # above its gap an image is the digit
    gain = (labels == digit).long() - (labels == guess).long()
    right = F.pad(gain[order].cumsum(0), (1, 0))  # where the first 0, 1, ... N images are the digit
    right[1:-1][gap.diff() == 0] = right.min() - 1  # equal gaps cannot be parted
    i = int(right.argmax())
    below = gap[i - 1] if i > 0 else gap[0] - 1
    above = gap[i] if i < len(gap) else gap[-1] + 1
    return float((below + above) / 2)


def raise_bias(model: nn.Module, digit: int, amount: float) -> nn.Module:
    """A copy of the model with `amount` added to the bias of a digit in its last layer.

    Raises:
        ValueError: the last layer with weights has no bias.
    """
    model = copy.deepcopy(model)
    last = [module for module in model.modules() if getattr(module, "weight", None) is not None][-1]
    if getattr(last, "bias", None) is None:
        raise ValueError("the last layer has no bias to raise")
    with torch.no_grad():
        last.bias[digit] += amount
    return model
