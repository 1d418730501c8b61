"""Distillation: the loss against its formulas, and what a student may and may not see."""

import copy
import json
from dataclasses import replace

import mnistlab as ml
import pytest
import torch
import torch.nn.functional as F
from mnistlab import distill, runs
from mnistlab.models import CNN, Dense
from mnistlab.recipes import RECIPES
from torch import nn

RECIPE = ml.Recipe(teacher="t", epochs=2, batch_size=64, lr=0.05, augment=ml.Augment(shift=1))


def made(kind, **arguments) -> nn.Module:
    """A net for `tiny`, the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return kind(num_classes=4, **arguments)


def student() -> nn.Module:
    return made(CNN, widths=(3, 4), dropout=0.2)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same weights and buffers, bit for bit."""
    ours, other = a.state_dict(), b.state_dict()
    return ours.keys() == other.keys() and all(torch.equal(ours[k], other[k]) for k in ours)


@pytest.fixture(scope="module")
def teacher(tiny) -> nn.Module:
    recipe = ml.Recipe(epochs=4, batch_size=32, lr=0.1)
    return ml.fit(made(CNN, widths=(8, 12, 12)), tiny, recipe, progress=False).model


@pytest.fixture
def logits() -> torch.Tensor:
    """Of a student and of a teacher, float64 [2, 5, 3]."""
    return torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double() * 4


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_the_divergence_written_out(logits, temperature):
    expected = 0.0
    for s, t in zip(*logits, strict=True):
        p, q = ((z / temperature).exp() for z in (t, s))
        p, q = p / p.sum(), q / q.sum()
        expected += temperature**2 * (p * (p / q).log()).sum() / 5
    torch.testing.assert_close(
        distill.soft_loss(*logits, temperature), expected, rtol=1e-12, atol=0
    )


def test_at_a_high_temperature_it_matches_logits(logits):
    """Hinton et al. 2015, eq. 4: the gradient nears (student - teacher) / K, means removed."""
    ours = logits[0].clone().requires_grad_()
    distill.soft_loss(ours, logits[1], 1e5).backward()
    s, t = (z - z.mean(1, keepdim=True) for z in logits)
    torch.testing.assert_close(ours.grad, (s - t) / 3 / 5, rtol=1e-3, atol=1e-5)


def test_a_student_that_says_the_same_has_nothing_to_learn(logits):
    ours = logits[1].clone().requires_grad_()
    distill.soft_loss(ours + 3, logits[1], 2.0).backward()
    assert distill.soft_loss(ours, logits[1], 2.0).item() == pytest.approx(0, abs=1e-15)
    assert ours.grad.abs().max() < 1e-15


def test_attention_loss_is_written_out():
    draw = torch.Generator().manual_seed(0)
    nets = [{size: torch.randn(2, c, *size, generator=draw) for size in ((3, 4), (2, 2))}
            for c in (5, 7)]  # fmt: skip
    nets[0][(9, 9)] = torch.randn(2, 5, 9, 9)  # which the other lacks
    expected = 0.0
    for size in ((3, 4), (2, 2)):
        for n in range(2):
            q = [(net[size][n] ** 2).mean(0).flatten() for net in nets]
            expected += (q[0] / q[0].norm() - q[1] / q[1].norm()).norm() / 2 / 2
    torch.testing.assert_close(distill.attention_loss(*nets), expected)
    with pytest.raises(ValueError, match="feature maps of a common size"):
        distill.attention_loss(nets[0], {(1, 2): nets[1][(2, 2)]})


def test_walk_gives_the_output_and_the_last_map_of_each_size(tiny):
    net, images = made(CNN, widths=(3, 5, 6)).eval(), tiny.val.inputs()
    output, maps = distill.walk(net, images)
    assert torch.equal(output, net(images))
    assert {size: m.shape[1] for size, m in maps.items()} == {(4, 4): 5, (2, 2): 6}
    torch.testing.assert_close(maps[(2, 2)].mean((2, 3)), net[:-1](images))
    assert distill.walk(nn.Flatten(), images)[1] == {}


@pytest.mark.parametrize(("hard", "smoothing"), [(0.0, 0.0), (0.3, 0.1), (1.0, 0.0)])
def test_the_loop_minimises_the_mixture(tiny, teacher, hard, smoothing):
    recipe = ml.Recipe(teacher="t", hard=hard, temperature=3.0, label_smoothing=smoothing)
    recipe = replace(recipe, epochs=1, batch_size=256)  # a single step
    net = made(Dense, hidden=(), image_size=8)
    run = ml.fit(net, tiny, recipe, teacher=teacher, progress=False)
    images, labels = tiny.train.inputs(), tiny.train.labels
    with torch.no_grad():
        said, taught = made(Dense, hidden=(), image_size=8)(images), teacher(images)
    soft = distill.soft_loss(said, taught, 3.0)
    own = F.cross_entropy(said, labels, label_smoothing=smoothing)
    expected = (1 - hard) * soft + hard * own
    assert run.history[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_attention_is_added_with_its_weight(tiny, teacher):
    recipe = ml.Recipe(teacher="t", epochs=1, batch_size=256)
    net = made(CNN, widths=(3, 4))
    losses = [
        ml.fit(made(CNN, widths=(3, 4)), tiny, replace(recipe, attention=a), teacher=teacher,
               progress=False).history[0]["train_loss"]
        for a in (0.0, 5.0)
    ]  # fmt: skip
    images = tiny.train.inputs()
    maps = [distill.walk(model, images)[1] for model in (net, teacher)]
    expected = 5 * distill.attention_loss(*maps).item()
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-3)


# --- what a student sees ------------------------------------------------------------------------


def test_without_hard_targets_the_labels_are_not_used(tiny, teacher):
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    mixed = replace(tiny, train=replace(tiny.train, labels=tiny.train.labels[order]))
    for hard, equal in ((0.0, True), (0.1, False)):
        recipe = replace(RECIPE, hard=hard)
        models = [
            ml.fit(student(), data, recipe, teacher=teacher, progress=False).model
            for data in (tiny, mixed)
        ]
        assert same(*models) is equal


def test_the_teacher_is_left_as_it_was(tiny, teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.train()  # fit's copy is in eval mode all the same
    first = ml.fit(student(), tiny, RECIPE, teacher=teacher, progress=False).model
    assert teacher.training
    teacher.eval()
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert same(first, ml.fit(student(), tiny, RECIPE, teacher=teacher, progress=False).model)
    assert first.state_dict().keys() == student().state_dict().keys()


def test_teacher_and_student_see_the_same_augmented_images(tiny):
    seen = {"teacher": [], "student": []}

    class Spy(Dense):
        def forward(self, images):
            if len(images) == 64 and self.training is (self.who == "student"):
                seen[self.who].append(images)
            return super().forward(images)

    nets = {who: made(Spy, hidden=(), image_size=8) for who in seen}
    for who, net in nets.items():
        net.who = who
    recipe = replace(RECIPE, hard=0.0, epochs=1, weight_decay=0.0)
    ml.fit(nets["student"], tiny, recipe, teacher=nets["teacher"], progress=False)
    pairs = list(zip(seen["student"], seen["teacher"], strict=True))
    assert len(pairs) == 4 and all(torch.equal(a, b) for a, b in pairs)
    plain = tiny.train.inputs()
    assert not any((image == plain).flatten(1).all(1).any() for image in pairs[0][0])


@pytest.mark.parametrize(("shift", "passes"), [(0.0, 1), (1e-6, 2)])  # of the teacher, in 2 epochs
def test_of_images_that_never_change_a_teacher_is_asked_once(tiny, teacher, shift, passes):
    asked, seen = copy.deepcopy(teacher), []
    asked.register_forward_hook(lambda model, inputs, output: seen.append(len(output)))
    recipe = replace(RECIPE, augment=ml.Augment(shift=shift))
    run = ml.fit(student(), tiny, recipe, teacher=asked, progress=False)
    assert sum(seen) == passes * len(tiny.train) + 2  # two, to see that the nets fit together
    plain = ml.fit(student(), tiny, replace(RECIPE, augment=ml.Augment()), teacher=teacher,
                   progress=False)  # fmt: skip
    losses = [[row["train_loss"] for row in r.history] for r in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_students_run_resumes_bit_for_bit(tiny, teacher, tmp_path, cut_off):
    recipe, path = replace(RECIPE, epochs=3, attention=2.0, ema=0.8), tmp_path / "c"
    whole = ml.fit(student(), tiny, recipe, teacher=teacher, progress=False)
    with cut_off(3):
        ml.fit(student(), tiny, recipe, teacher=teacher, checkpoint=path, progress=False)
    resumed = ml.fit(student(), tiny, recipe, teacher=teacher, checkpoint=path, progress=False)
    assert same(resumed.model, whole.model)
    saved = torch.load(path, weights_only=True)  # without the teacher
    assert saved.keys() == {*("model", "optimizer", "schedule", "average", "identity", "history")}


def test_a_taught_student_agrees_with_its_teacher_more(mnist):
    teacher = ml.trained("cnn-8k")
    few = ml.Dataset("few", mnist.train[:1000], mnist.val[:1000], test=None)
    recipe = ml.Recipe(epochs=2, batch_size=50, lr=0.02, weight_decay=0.0)
    taught = replace(recipe, teacher="cnn-8k", hard=0.0)
    said = ml.predict(teacher, few.val)
    agreement, divergence = [], []
    for own, given in ((recipe, None), (taught, teacher)):
        run = ml.fit("dense-8k", few, own, teacher=given, progress=False)
        logits = ml.predict(run.model, few.val)
        agreement.append((logits.argmax(1) == said.argmax(1)).float().mean().item())
        divergence.append(distill.soft_loss(logits, said, 4.0).item())
    assert agreement[1] > agreement[0] and divergence[1] < 0.7 * divergence[0]


# --- recipes, records ---------------------------------------------------------------------------


def test_a_teacher_that_is_missing_or_unnamed_is_refused(tiny, teacher):
    with pytest.raises(ValueError, match=r"give teacher=ml.trained\('t'\)"):
        ml.fit(student(), tiny, RECIPE)
    with pytest.raises(ValueError, match="the recipe names no teacher"):
        ml.fit(student(), tiny, replace(RECIPE, teacher=""), teacher=teacher)


@pytest.mark.parametrize(
    "other",
    [Dense(hidden=(), image_size=8), Dense(hidden=(), num_classes=4), CNN(in_channels=3)],
    ids=["classes", "size", "channels"],
)
def test_a_teacher_of_another_shape_is_refused(tiny, other):
    with pytest.raises(ValueError, match="does not give logits of the model's shape"):
        ml.fit(student(), tiny, RECIPE, teacher=other)


def test_attention_between_nets_without_common_maps_is_refused(tiny, teacher):
    dense, recipe = made(Dense, hidden=(), image_size=8), replace(RECIPE, attention=1.0)
    with pytest.raises(ValueError, match="feature maps of a common size"):
        ml.fit(dense, tiny, recipe, teacher=teacher, progress=False)
    assert same(dense, made(Dense, hidden=(), image_size=8))


def test_fields_that_need_a_teacher_or_forbid_one_are_refused():
    for fields in ({"attention": 1.0}, {"attention": 1.0, "teacher": "t", "compile": True}):
        with pytest.raises(ValueError, match="attention is transferred from a teacher"):
            ml.Recipe(**fields)
    with pytest.raises(ValueError, match="loss='capsules' goes with no teacher"):
        ml.Recipe(teacher="t", loss="capsules")


def test_a_record_names_the_weights_that_taught(mnist, monkeypatch, tmp_path):
    few = ml.Dataset("mnist", mnist.train[:128], mnist.val[:50], mnist.test[:50])
    monkeypatch.setattr(runs, "load", lambda *_, **__: few)
    recipe = ml.Recipe(model="linear-8k", epochs=1, batch_size=64, teacher="dense-8k", hard=0.0)
    record, files = runs.run_seed("s", recipe, 0)
    assert record["recipe"]["teacher"] == "dense-8k"
    assert record["teacher"] == ml.results("dense-8k").records[0]["weights"]
    teacher = ml.trained("dense-8k")
    again = ml.fit("linear-8k", few, recipe, teacher=teacher, progress=False)
    assert record["val"]["loss"] == ml.evaluate(again.model, few.val).loss
    assert list(files) == ["weights/s.safetensors"]

    monkeypatch.setitem(RECIPES, "s", recipe)
    (tmp_path / "s.jsonl").write_text(json.dumps(record))
    assert ml.results("s", tmp_path).n == 1
    (tmp_path / "s.jsonl").write_text(json.dumps(record | {"teacher": "other"}))
    with pytest.raises(ValueError, match="'dense-8k' has other weights now"):
        ml.results("s", tmp_path)


def test_a_student_whose_teacher_is_not_shipped_is_refused_before_it_trains(monkeypatch, tmp_path):
    monkeypatch.setenv("MNISTLAB_DATA", str(tmp_path))
    recipe = ml.Recipe(model="linear-8k", teacher="fastcnn-106k")
    monkeypatch.setitem(RECIPES, "linear-8k", recipe)
    monkeypatch.setattr(runs, "run_seed", None)  # would fail if called
    with pytest.raises(ValueError, match="no weights of 'fastcnn-106k' are shipped"):
        runs.train_seeds("linear-8k", 1, folder=tmp_path / "results")
    monkeypatch.setitem(RECIPES, "linear-8k", replace(recipe, teacher="cnn8k"))
    with pytest.raises(ValueError, match="unknown recipe 'cnn8k'; near it: cnn-8k"):
        runs.train_seeds("linear-8k", 1, folder=tmp_path / "results")


# --- what the teacher knows, and the digit never seen -------------------------------------------


def test_dark_knowledge_is_the_mean_over_the_images_of_a_class():
    logits = torch.tensor([[4.0, 2.0, 0.0], [0.0, 6.0, 2.0], [8.0, 0.0, 2.0]])
    found = distill.dark_knowledge(logits, torch.tensor([0, 1, 0]), temperature=2.0)
    softened = (logits / 2).exp() / (logits / 2).exp().sum(1, keepdim=True)
    torch.testing.assert_close(found[0], (softened[0] + softened[2]) / 2)
    torch.testing.assert_close(found[1], softened[1])
    assert torch.equal(found[2], torch.zeros(3))


def test_a_data_set_without_a_digit_lacks_it_in_training_alone(tiny):
    less = distill.without(tiny, 2)
    assert set(less.train.labels.tolist()) == {0, 1, 3} and len(less.train) == 192
    assert less.val is tiny.val and less.name == "squares-without-2"
    with pytest.raises(ValueError, match="'squares-without-2' has no training image of class 2"):
        distill.without(less, 2)


@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_the_best_bias_is_that_of_a_search(shift):
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 4, generator=draw)
    labels = torch.randint(0, 4, (200,), generator=draw)
    logits[torch.arange(200), labels] += 1
    logits[:, 3] -= shift
    logits[:5] = logits[5]  # equal images

    def right(bias: float) -> int:
        raised = logits.double() + torch.tensor([0, 0, 0, bias])
        return int((raised.argmax(1) == labels).sum())

    found = distill.best_bias(logits, labels, 3)
    assert right(found) == max(right(b) for b in torch.linspace(-10, 10, 801).tolist())
    assert abs(found - shift) < 1.5


@pytest.mark.parametrize(("digit", "best"), [(0, "above"), (1, "below")])
def test_a_bias_may_have_to_rise_above_all_or_fall_below_all(digit, best):
    logits, labels = torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0])
    found = distill.best_bias(logits, labels, digit)
    assert found > 2 if best == "above" else found < -2


def test_a_raised_bias_raises_one_logit(tiny, teacher):
    raised = distill.raise_bias(teacher, 2, 1.5)
    difference = ml.predict(raised, tiny.val) - ml.predict(teacher, tiny.val)
    expected = torch.tensor([0, 0, 1.5, 0]).expand_as(difference)
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no bias to raise"):
        distill.raise_bias(ml.build("bottleneck-5k"), 3, 1.0)
