"""What a model gets right, how sure that figure is, and whether two models differ."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .data import Split
from .train import predict


def wilson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927), as fractions.

    Unlike the textbook p +- 1.96 sqrt(p(1-p)/n) it stays inside 0..1 and holds near 1.

    Raises:
        ValueError: not 0 <= correct <= n, or n is 0.
    """
    from scipy.stats import binomtest

    interval = binomtest(int(correct), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True, eq=False)
class Report:
    """Predictions on a split, and what follows from them. Accuracies are fractions, 0..1.

    Attributes:
        log_probs: float32 [N, K], on the CPU.
        labels: int64 [N], on the CPU.
    """

    log_probs: Tensor
    labels: Tensor

    @property
    def n(self) -> int:
        return len(self.labels)

    @cached_property
    def predictions(self) -> Tensor:
        """The most probable class, int64 [N]."""
        return self.log_probs.argmax(1)

    @cached_property
    def confidence(self) -> Tensor:
        """The probability given to the prediction, float32 [N]."""
        return self.log_probs.max(1).values.exp()

    @cached_property
    def right(self) -> Tensor:
        """Whether each prediction is the label, bool [N]."""
        return self.predictions == self.labels

    @property
    def correct(self) -> int:
        return int(self.right.sum())

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95% interval of the accuracy."""
        return wilson(self.correct, self.n)

    @cached_property
    def loss(self) -> float:
        """Cross-entropy, nats an image."""
        return nn.functional.nll_loss(self.log_probs, self.labels).item()

    @cached_property
    def confusion(self) -> Tensor:
        """Counts, int64 [K, K]: row is the label, column the prediction."""
        k = self.log_probs.shape[1]
        return torch.bincount(self.labels * k + self.predictions, minlength=k * k).view(k, k)

    @cached_property
    def per_class(self) -> dict[str, Tensor]:
        """Precision, recall and F1, float64 [K] each (0 where there is nothing to divide by),
        and support, the number of images of each class."""
        hits = self.confusion.diag().double()
        support, guesses = self.confusion.sum(1), self.confusion.sum(0)
        return {
            "precision": hits / guesses.clamp(min=1),
            "recall": hits / support.clamp(min=1),
            "f1": 2 * hits / (support + guesses).clamp(min=1),
            "support": support,
        }

    def calibration_error(self, bins: int = 15) -> float:
        """Expected calibration error (Guo et al. 2017, eq. 5): over equal bins of confidence,
        the mean distance between accuracy and confidence, weighted by images."""
        index = (self.confidence * bins).ceil().long().clamp(1, bins) - 1
        gap = (self.right.double() - self.confidence.double()) / self.n
        return torch.zeros(bins, dtype=torch.float64).index_add(0, index, gap).abs().sum().item()

    @cached_property
    def mistakes(self) -> Tensor:
        """Indices of the wrongly classified images, the most confident first, int64."""
        wrong = (~self.right).nonzero().flatten()
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)]

    def __str__(self) -> str:
        low, high = (100 * v for v in self.interval)
        return (
            f"accuracy {100 * self.accuracy:.2f}% ({self.correct:,} of {self.n:,}; "
            f"95% interval {low:.2f} to {high:.2f}), loss {self.loss:.4f}"
        )


def evaluate(
    model: nn.Module,
    split: Split,
    *,
    tta: Sequence[Callable[[Tensor], Tensor]] | None = None,
    batch_size: int | None = None,
) -> Report:
    """Classify a split with a model in eval mode.

    Args:
        model: maps [B, C, H, W] to logits; runs where its parameters lie.
        tta: test-time augmentation: views, each pixels in 0..1 [B, C, H, W] to the same, such as
            `rotations(-3, 0, 3)`. The probabilities of all views are averaged.
        batch_size: as in `predict`.

    Raises:
        ValueError: the split, or tta, is empty.
    """
    if len(split) == 0:
        raise ValueError("the split to evaluate is empty")
    if tta is not None and len(tta) == 0:
        raise ValueError("tta is empty: leave it out, or give at least one view")
    if tta is None:
        log_probs = predict(model, split, batch_size=batch_size).log_softmax(1)
    else:
        logits = torch.stack([predict(model, split, view=v, batch_size=batch_size) for v in tta])
        log_probs = logits.log_softmax(2).logsumexp(0) - math.log(len(logits))
    return Report(log_probs.cpu(), split.labels.cpu())


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        only_a, only_b: images that only the first, or only the second, got right.
        p_value: of the exact McNemar test.
    """

    only_a: int
    only_b: int
    p_value: float

    def __str__(self) -> str:
        return (
            f"only first right {self.only_a}, only second {self.only_b}, "
            f"exact McNemar p = {self.p_value:.2g}"
        )


def compare(a: Report, b: Report) -> Comparison:
    """Exact McNemar test (McNemar 1947): if the two models were equally good, each image that
    only one of them gets right would be a fair coin's toss.

    Raises:
        ValueError: the reports are not on the same images.
    """
    from scipy.stats import binomtest

    if a.n != b.n or not torch.equal(a.labels, b.labels):
        raise ValueError(f"the reports are on different images ({a.n} and {b.n})")
    only_a, only_b = int((a.right & ~b.right).sum()), int((~a.right & b.right).sum())
    p_value = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return Comparison(only_a, only_b, float(p_value))


@dataclass(frozen=True)
class Summary:
    """Accuracies of the same recipe under several seeds, as fractions.

    Raises:
        ValueError: there are none.
    """

    values: tuple[float, ...]

    def __post_init__(self):
        if not self.values:
            raise ValueError("nothing to summarise")

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Standard deviation over the seeds (n - 1 below the line); nan for one seed."""
        return statistics.stdev(self.values) if self.n > 1 else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean over seeds (Student's t): the seeds' scatter alone, on these
        test images; nan for one seed."""
        from scipy.stats import t

        half = t.ppf(0.975, self.n - 1) * self.sd / math.sqrt(self.n) if self.n > 1 else math.nan
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.sd:.2f}% (n = {self.n})"


@dataclass(frozen=True)
class Difference:
    """Of two mean accuracies, as fractions.

    As a text it is in points: f"{d:+.1f}" has one decimal, str(d) has two.

    Attributes:
        mean, interval: the difference, and its 95% interval.
    """

    mean: float
    interval: tuple[float, float]

    @property
    def outside(self) -> bool:
        """Whether it is outside the noise: zero is not in the interval."""
        low, high = self.interval
        return not low <= 0 <= high

    def __format__(self, spec: str) -> str:
        mean, low, high = (format(100 * v, spec or "+.2f") for v in (self.mean, *self.interval))
        return f"{mean} ({low} to {high}), {'outside' if self.outside else 'inside'} the noise"

    def __str__(self) -> str:
        return format(self, "")


def difference(a: Summary, b: Summary) -> Difference:
    """The mean of a less that of b, with Welch's interval (Welch 1947): the seeds of the two are
    not paired, and may scatter differently.

    Raises:
        ValueError: a single seed, which has no scatter.
    """
    from scipy.stats import ttest_ind

    if min(a.n, b.n) < 2:
        raise ValueError(f"two seeds or more of each, not {a.n} and {b.n}")
    ends = ttest_ind(a.values, b.values, equal_var=False).confidence_interval()
    return Difference(a.mean - b.mean, (float(ends.low), float(ends.high)))
