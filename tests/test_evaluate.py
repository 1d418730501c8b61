"""Evaluation, against scipy, statsmodels and torchmetrics."""

import math
import statistics
from types import SimpleNamespace

import mnistlab as ml
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchmetrics.functional.classification as theirs
from mnistlab import Report, Summary, compare, difference, evaluate, wilson
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW
from torch import nn

K = 5


def some_logits(n: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right about half of the time, of every confidence, and labels."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(K, (n,), generator=draw)
    logits = 2 * torch.randn(n, K, generator=draw)
    logits[torch.arange(n), labels] += 2 * torch.rand(n, generator=draw)
    return logits, labels


@pytest.fixture
def case() -> SimpleNamespace:
    logits, labels = some_logits()
    return SimpleNamespace(
        logits=logits, labels=labels, report=Report(logits.log_softmax(1), labels)
    )


class Table(nn.Module):
    """A model that looks its logits up: the one pixel of an image is the row. It has dropout."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits, self.dropout = nn.Parameter(logits), nn.Dropout(0.9)

    def forward(self, images):
        return self.dropout(self.logits[(images.flatten(1)[:, 0] * 255).round().long()])


def rows(labels: torch.Tensor) -> ml.Split:
    """The split whose i-th image is the pixel i."""
    return ml.Split(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1), labels)


# --- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.95, 0.9])
@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 1), (7, 10), (9_930, 10_000)])
def test_wilson_agrees_with_statsmodels(correct, n, level):
    expected = proportion_confint(correct, n, alpha=1 - level, method="wilson")
    assert wilson(correct, n, level) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_proportion(correct, n):
    with pytest.raises(ValueError):
        wilson(correct, n)


def test_summary_agrees_with_scipy():
    values = (0.991, 0.993, 0.9925, 0.99, 0.994)
    summary = Summary(values)
    assert (summary.n, summary.mean) == (5, pytest.approx(sum(values) / 5))
    assert summary.sd == pytest.approx(statistics.stdev(values))
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert summary.interval == pytest.approx(tuple(expected))
    assert str(summary) == "99.21 ± 0.16% (n = 5)"


def test_summary_of_one_seed_has_no_scatter():
    summary = Summary((0.9,))
    assert summary.mean == 0.9
    assert math.isnan(summary.sd) and all(map(math.isnan, summary.interval))


def test_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to summarise"):
        Summary(())


def test_difference_agrees_with_statsmodels_and_says_where_zero_is():
    a, b = (0.991, 0.993, 0.9925, 0.99, 0.994), (0.985, 0.99, 0.989)
    found = difference(Summary(a), Summary(b))
    low, high = CompareMeans(DescrStatsW(a), DescrStatsW(b)).tconfint_diff(usevar="unequal")
    assert found.mean == pytest.approx(statistics.fmean(a) - statistics.fmean(b))
    assert found.interval == pytest.approx((low, high))
    assert not found.outside and str(found).endswith("), inside the noise")
    ends = f"({100 * low:+.1f} to {100 * high:+.1f})"
    assert f"{found:+.1f}" == f"{100 * found.mean:+.1f} {ends}, inside the noise"
    assert difference(Summary(a), Summary((0.98, 0.981))).outside


def test_the_difference_of_single_seeds_is_refused():
    with pytest.raises(ValueError, match="two seeds or more of each, not 3 and 1"):
        difference(Summary((0.9, 0.8, 0.7)), Summary((0.9,)))


# --- report -------------------------------------------------------------------------------------


def test_accuracy_and_loss_are_torchs(case):
    right = (case.logits.argmax(1) == case.labels).sum().item()
    assert (case.report.correct, case.report.n) == (right, 400)
    assert case.report.accuracy == right / 400
    assert case.report.interval == wilson(right, 400)
    assert case.report.loss == pytest.approx(F.cross_entropy(case.logits, case.labels).item())


def test_confusion_is_torchmetrics(case):
    expected = theirs.multiclass_confusion_matrix(case.logits, case.labels, K)
    assert torch.equal(case.report.confusion, expected)
    assert case.report.confusion.sum() == 400


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        ("precision", theirs.multiclass_precision),
        ("recall", theirs.multiclass_recall),
        ("f1", theirs.multiclass_f1_score),
    ],
)
def test_per_class_figures_are_torchmetrics(case, name, metric):
    expected = metric(case.logits, case.labels, K, average=None)
    torch.testing.assert_close(case.report.per_class[name].float(), expected)
    assert torch.equal(case.report.per_class["support"], case.labels.bincount())


def test_a_class_that_never_occurs_has_zeros_not_nan():
    report = Report(torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]]).log(), torch.tensor([0, 1]))
    assert [report.per_class[k][2].item() for k in report.per_class] == [0, 0, 0, 0]
    assert report.confusion.shape == (3, 3)


@pytest.mark.parametrize("bins", [15, 4])
def test_calibration_error_is_torchmetrics(case, bins):
    expected = theirs.multiclass_calibration_error(case.logits, case.labels, K, bins, norm="l1")
    assert case.report.calibration_error(bins) == pytest.approx(expected.item(), abs=1e-6)


def test_calibration_bins_are_closed_above_as_in_the_paper():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]])
    report = Report(probabilities.log(), torch.tensor([0, 1]))  # the first right, the second wrong
    assert report.calibration_error(bins=2) == pytest.approx((0.5 + 0.6) / 2)


def test_calibration_error_of_the_sure_and_right_is_zero():
    assert (
        Report(torch.tensor([[0.0, -math.inf]] * 3), torch.zeros(3).long()).calibration_error() == 0
    )


def test_mistakes_are_all_the_wrong_ones_the_most_confident_first(case):
    mistakes, report = case.report.mistakes, case.report
    assert not report.right[mistakes].any() and len(mistakes) == report.n - report.correct
    confidence = case.logits.softmax(1).max(1).values[mistakes]
    assert torch.equal(confidence, confidence.sort(descending=True).values)


def test_a_report_prints_accuracy_count_interval_and_loss():
    report = Report(torch.tensor([[0.9, 0.1]] * 4).log(), torch.tensor([0, 0, 0, 1]))
    low, high = proportion_confint(3, 4, method="wilson")
    assert str(report) == (
        f"accuracy 75.00% (3 of 4; 95% interval {100 * low:.2f} to {100 * high:.2f}), loss 0.6547"
    )


# --- evaluate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1000, 7])
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_runs_in_eval_mode_and_leaves_the_mode(batch_size, training, random_state_is_kept):
    logits, labels = some_logits(50)
    model = Table(logits).train(training)
    report = evaluate(model, rows(labels), batch_size=batch_size)
    torch.testing.assert_close(report.log_probs, logits.log_softmax(1))
    assert model.training == model.dropout.training == training
    assert not report.log_probs.requires_grad


def test_evaluate_refuses_an_empty_split():
    logits, labels = some_logits(5)
    with pytest.raises(ValueError, match="empty"):
        evaluate(Table(logits), rows(labels)[:0])


def next_row(pixels):
    return pixels + 1 / 255


def test_tta_averages_the_probabilities_of_the_views():
    logits, labels = some_logits(51)
    split = rows(labels)[:50]
    report = evaluate(Table(logits), split, tta=[lambda pixels: pixels, next_row])
    expected = (logits[:50].softmax(1) + logits[1:].softmax(1)) / 2
    torch.testing.assert_close(report.log_probs.exp(), expected)


def test_tta_with_one_view_is_that_view():
    logits, labels = some_logits(51)
    one = evaluate(Table(logits), rows(labels)[:50], tta=[next_row])
    torch.testing.assert_close(one.log_probs, logits[1:].log_softmax(1))


def test_tta_of_a_model_that_is_sure_and_wrong_has_a_finite_loss():
    logits = torch.tensor([[0.0, 200.0]])
    views = [lambda pixels: pixels] * 2
    report = evaluate(Table(logits), rows(torch.tensor([0])), tta=views)
    assert report.loss == pytest.approx(200)


def test_rotations_are_views_that_evaluate_takes(tiny):
    torch.manual_seed(0)
    model = ml.models.Dense(hidden=(), image_size=8, num_classes=4)
    plain, still = evaluate(model, tiny.val), evaluate(model, tiny.val, tta=ml.rotations(0))
    torch.testing.assert_close(plain.log_probs, still.log_probs, atol=1e-4, rtol=0)
    turned = evaluate(model, tiny.val, tta=ml.rotations(-90, 90))
    assert not torch.allclose(plain.log_probs, turned.log_probs, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_evaluate_runs_where_the_model_lies():
    logits, labels = some_logits(50)
    report = evaluate(Table(logits).cuda(), rows(labels))
    torch.testing.assert_close(report.log_probs, logits.log_softmax(1))


# --- compare ------------------------------------------------------------------------------------


def judged(right: list[int]) -> Report:
    """A report that is right where `right` is 1; every label is 0."""
    wrong = 1 - torch.tensor(right)
    return Report(F.one_hot(wrong, 2).float().log_softmax(1), torch.zeros_like(wrong))


@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither"),
    [(50, 9, 2, 3), (10, 0, 6, 0), (0, 5, 5, 1), (7, 0, 0, 2), (900, 40, 61, 9)],
)
def test_compare_is_statsmodels_exact_mcnemar(both, only_a, only_b, neither):
    a = judged([1] * both + [1] * only_a + [0] * only_b + [0] * neither)
    b = judged([1] * both + [0] * only_a + [1] * only_b + [0] * neither)
    ours, table = compare(a, b), [[both, only_a], [only_b, neither]]
    assert (ours.only_a, ours.only_b) == (only_a, only_b)
    assert ours.p_value == pytest.approx(mcnemar(table, exact=True).pvalue)
    assert compare(b, a).p_value == pytest.approx(ours.p_value)


def test_compare_refuses_reports_on_different_images(case):
    other = Report(case.report.log_probs, (case.labels + 1) % K)
    with pytest.raises(ValueError, match="different images"):
        compare(case.report, other)
    with pytest.raises(ValueError, match="different images"):
        compare(case.report, Report(case.report.log_probs[1:], case.labels[1:]))


def test_a_comparison_prints_both_counts_and_p():
    assert str(compare(judged([1, 1, 0]), judged([1, 0, 0]))) == (
        "only first right 1, only second 0, exact McNemar p = 1"
    )
