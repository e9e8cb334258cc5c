from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp, weibull_min
from torch import Tensor

from engram.core.learner import fork
from engram.data.table import MISSING, Table
from engram.data.task import Task
from engram.engine.optimizer import Optimizer
from engram.engine.predict import accuracy, evaluating, predict
from engram.engine.run import Run
from engram.errors import EngramError
from engram.keep.open_variational import OpenVariational, misfit, nearest_to_draws
from engram.models import load, save
from engram.models.open_variational import DISTANCES, Tails, divergence
from engram.models.output import Output
from engram.reproduce import open_world_cl as measured
from engram.stats.tails import Tail, fit_tail
from engram.testing import holds

SMALL: dict[str, Any] = {
    "network": {"name": "MLP", "hidden": [32], "norm": "batch"},
    "decoder": (32,),
    "latent": 8,
    "epochs": 10,
    "batch_size": 64,
    "optimizer": Optimizer(lr=1e-2),
    "beta": 1.0,
    "draws": 1000,
    "rounds": 5,
}


def clusters(each: int, seed: int, classes: range = range(4)) -> Table:
    """Rows of Gaussian classes in eight dimensions."""
    means = 3 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor(list(classes)).repeat_interleave(each)
    noise = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(seed))
    return Table({"values": means[labels] + noise}, labels, tuple(f"{seed}-{k}" for k in range(len(labels))))


@pytest.fixture(scope="module")
def trained(digits: Any) -> OpenVariational:
    """A learner of digits 0 to 4."""
    learner = OpenVariational(**SMALL)
    learner.learn(Task(digits.train.of_classes(range(5))), Run())
    return learner


@pytest.fixture(scope="module")
def of_clusters() -> OpenVariational:
    learner = OpenVariational(**SMALL)
    learner.learn(Task(clusters(150, 1)), Run())
    return learner


# --- what must hold


@holds("open-world-cl", 2)
def test_the_threshold_rejects_as_many_fresh_known_rows_as_it_shall(of_clusters: OpenVariational) -> None:
    for seed in (2, 4):
        limit = of_clusters.threshold(clusters(500, seed))
        fresh = predict(of_clusters.model, clusters(500, seed + 1), "novelty")
        assert float((fresh > limit).double().mean()) == pytest.approx(0.05, abs=0.03)
    held = predict(of_clusters.model, clusters(500, 2), "novelty")
    smallest = next(k / 100 for k in range(1, 100) if (held > k / 100).double().mean() <= 0.05)
    assert of_clusters.threshold(clusters(500, 2)) == pytest.approx(smallest)


@holds("open-world-cl", 3)
@pytest.mark.parametrize("seed", range(3))
def test_noise_and_unknown_digits_are_refused(seed: int) -> None:
    omega = measured.open_set(seed)["omega"]
    assert omega.rejected(omega.noise) > 0.9
    assert omega.auroc(omega.noise) > 0.8
    assert measured.gain_over_entropy(seed) > -0.02


@holds("open-world-cl", 4)
@pytest.mark.parametrize("seed", range(3))
def test_accepted_samples_are_what_their_label_says(seed: int) -> None:
    assert measured.agreement(seed, 0.01) >= measured.agreement(seed, 1.0) + 0.03


@holds("open-world-cl", 4)
def test_a_threshold_of_one_is_plain_replay(trained: OpenVariational, digits: Any) -> None:
    """One code after the other: whatever the prior gives, labelled by the classifier, until the class has enough."""
    found = trained.generate(20, digits.train, Run(seed=3), accept=1.0)
    draws = torch.randn(1000, 8, generator=Run(seed=3).generator("codes from the prior"))
    wanted: dict[int, list[Tensor]] = {c: [] for c in range(5)}
    with evaluating(trained.net) as net:
        for code in draws:
            label = int(net.head(code[None]).argmax())  # type: ignore[operator]
            if len(wanted[label]) < 20:
                wanted[label].append(torch.sigmoid(net.decoder(code[None])).reshape(1, 8, 8))  # type: ignore[operator]
    assert found.labels is not None and found.labels.tolist() == [c for c in range(5) for _ in range(20)]
    by_hand = torch.stack([row for rows in wanted.values() for row in rows])
    assert torch.allclose(found.inputs["pixel_values"], by_hand, atol=1e-5)


@holds("open-world-cl", 5)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_rejection_makes_replay_better_and_all_rows_best(seed: int) -> None:
    """Of half of the rows, for speed; of all of them in the experiment."""
    lower, plain, rejecting = (measured.along(seed, a, r, 2) for a, r in ((0.01, 0), (1.0, None), (0.01, None)))
    assert lower == pytest.approx(0.2, abs=0.06)
    assert rejecting > lower + 0.3
    assert lower < plain <= rejecting <= measured.upper(seed, 2)


@holds("open-world-cl", 6)
@pytest.mark.parametrize("seed", range(3))
def test_queries_leave_noise_out(seed: int) -> None:
    by_omega, by_entropy = measured.queried(seed)
    assert by_omega < 0.05 < by_entropy


# --- the loss


def test_the_loss_by_hand(trained: OpenVariational, digits: Any) -> None:
    batch = digits.train.of_classes(range(5)).batch(torch.arange(16))
    draws = torch.Generator().manual_seed(1)
    mean, deviation = (torch.randn(16, 8, generator=draws) for _ in range(2))
    logits, decoded = torch.randn(16, 5, generator=draws), torch.randn(16, 64, generator=draws)
    pixels = batch.inputs["pixel_values"].flatten(1)
    output = Output(logits=logits, pooler_output=mean, extra={"deviation": deviation})
    output.extra["misfit"] = trained.net.misfit(decoded, batch.inputs)
    p = torch.sigmoid(decoded)
    misfits = -(pixels * p.log() + (1 - pixels) * (1 - p).log()).sum() / (16 * 64)
    kl = -0.5 * (1 + torch.log(deviation**2 + 1e-8) - mean**2 - deviation**2).sum() / (16 * 8)
    classes = -torch.log_softmax(logits, 1)[torch.arange(16), batch.labels].mean()
    assert float(trained.terms(batch, output).value) == pytest.approx(float(misfits + 1.0 * kl + classes), rel=1e-5)
    assert float(divergence(torch.zeros(1, 1), -torch.ones(1, 1))) == pytest.approx(0, abs=1e-6)  # no sign


def test_rows_beyond_the_unit_interval_are_standardised(of_clusters: OpenVariational) -> None:
    rows, net = clusters(150, 1), of_clusters.net
    values = rows.inputs["values"]
    assert net.likelihood == "gaussian"
    assert float(net.shift) == pytest.approx(float(values.mean()), abs=1e-5)
    assert float(net.scale) == pytest.approx(float(values.std()), rel=1e-3)
    found = misfit(net, rows)
    with evaluating(net):
        decoded = net.generate(net.features(values=values))
    by_hand = ((decoded - values) / values.std(correction=0)).square().mean(1) / 2
    assert torch.allclose(found, by_hand, rtol=1e-3)
    unit = OpenVariational(**{**SMALL, "epochs": 1})
    unit.learn(Task(rows.take([0, 1, 150, 151])))
    assert unit.net.likelihood == "gaussian"


# --- tails


def test_tails_are_of_the_rightly_classified_alone(trained: OpenVariational) -> None:
    head, tails = trained.net.head, Tails(8)
    codes = torch.randn(300, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(3))
    trained._fit(tails, codes, labels)
    with torch.no_grad():
        right = head(codes).argmax(1) == labels  # type: ignore[operator]
    own = codes[right & (labels == 2)].double()
    place = int(tails.columns([2])[0])
    assert torch.allclose(tails.means[place], own.mean(0))
    largest = (1 - F.cosine_similarity(own, own.mean(0)[None])).sort(descending=True).values[:10]  # least rows
    shape, _, scale = weibull_min.fit((largest - largest[-1] + 1).numpy(), floc=0)
    assert float(tails.shape[place]) == pytest.approx(shape, rel=1e-2)
    assert float(tails.scale[place]) == pytest.approx(scale, rel=1e-3)
    assert float(tails.start[place]) == pytest.approx(float(largest[-1]) - 1, abs=1e-6)


def test_omega_is_that_of_the_predicted_class_or_the_least() -> None:
    means = torch.eye(3, dtype=torch.float64)[:2]
    laws = [Tail(0.0, 0.5, 2.0), Tail(-0.2, 1.0, 3.0)]
    codes, logits = torch.tensor([[0.6, 0.8, 0.0]]), torch.tensor([[1.0, 0.0, -1.0]])
    found = {}
    for over in ("predicted", "min"):
        tails = Tails(3, over=over)
        tails.set([0, 1], means, laws)
        found[over] = float(tails.outlier(codes, logits))
    assert found["predicted"] == pytest.approx(1 - math.exp(-((0.4 / 0.5) ** 2)), rel=1e-5)
    assert found["min"] == pytest.approx(1 - math.exp(-((0.4 / 1.0) ** 3)), rel=1e-5)
    assert float(tails.outlier(codes, logits.flip(1))) == found["min"]
    tails = Tails(3)
    tails.set([0, 1], means, laws)
    assert float(tails.outlier(codes, logits.flip(1))) == 1.0  # class 2 has no tail


def test_distances() -> None:
    z, means = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0], [0.0, -2.0]])
    assert DISTANCES["cosine"](z, means)[0].tolist() == pytest.approx([0.4, 1.8])
    assert DISTANCES["euclidean"](z, means)[0].tolist() == pytest.approx([4.0, math.sqrt(45)])
    assert DISTANCES["mixed"](z, means)[0].tolist() == pytest.approx([2.2, (1.8 + math.sqrt(45)) / 2])


@pytest.mark.parametrize("changed", [{"distance": "euclidean"}, {"distance": "mixed"}, {"over": "min"}])
def test_other_distances_and_the_least_omega_tell_unknown_rows(changed: dict[str, str]) -> None:
    learner = OpenVariational(**SMALL, **changed)
    learner.learn(Task(clusters(100, 1)), Run())
    known = predict(learner.model, clusters(50, 2), "novelty")
    strange = predict(learner.model, clusters(50, 2, range(4, 6)), "novelty")
    assert float(strange.median()) > float(known.quantile(0.75))


def test_a_class_that_goes_takes_its_tails_along(trained: OpenVariational, digits: Any) -> None:
    twin = fork(trained)
    assert isinstance(twin, OpenVariational)
    twin.net.head.retire([3])  # type: ignore[operator]
    twin.refresh()
    for tails in (twin.net.tails, twin.net.drawn):
        assert tails.live.nonzero()[:, 0].tolist() == [0, 1, 2, 4]  # type: ignore[union-attr,operator]
    assert 3 not in twin.generate(5, digits.train, Run()).classes


# --- replay


def test_every_accepted_code_lies_within_the_bound(trained: OpenVariational) -> None:
    codes, labels = trained._codes(15, 0.3, Run())
    with evaluating(trained.net) as net:
        logits = net.head(codes)  # type: ignore[operator]
        omega = net.drawn.outlier(codes, logits)  # type: ignore[operator,union-attr]
    assert Counter(labels.tolist()) == dict.fromkeys(range(5), 15)
    assert torch.equal(logits.argmax(1), labels) and float(omega.max()) <= 0.3


def test_what_the_bound_leaves_lacking_comes_without_rejection(trained: OpenVariational) -> None:
    codes, labels = trained._codes(15, -1.0, Run())  # nothing is accepted
    assert Counter(labels.tolist()) == dict.fromkeys(range(5), 15)
    draws = Run().generator("codes from the prior")
    torch.randn(2 * 5 * 1000, 8, generator=draws)  # two priors, five rounds each
    assert torch.isin(codes, torch.randn(1000, 8, generator=draws)).all()


def test_a_task_is_learnt_with_as_many_generated_rows_as_the_last_training_had() -> None:
    learner, run = OpenVariational(**SMALL), Run()
    sizes = []
    for k, pair in enumerate((range(2), range(2, 4), range(4, 6))):
        task = Task(clusters(30, 1, pair), None, k, tuple(pair))
        learner.learn(task, run)
        sizes.append(learner.size)
    assert sizes == [60, 120, 180]
    assert all(id.startswith("1-") for id in learner.seen.ids)  # generated rows are nobody's
    few = OpenVariational(**SMALL, replay=8)
    for pair in (range(2), range(2, 4)):
        few.learn(Task(clusters(30, 1, pair)))
    assert few.size == 68
    none = OpenVariational(**SMALL, replay=0)
    for pair in (range(2), range(2, 4)):
        none.learn(Task(clusters(30, 1, pair)))
    assert none.size == 60


def test_generated_rows_are_of_the_type_of_the_others(trained: OpenVariational, digits: Any) -> None:
    image = Table({"pixel_values": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})
    found, floats = (trained.generate(4, like, Run()).inputs["pixel_values"] for like in (image, digits.train))
    assert found.dtype == torch.uint8 and found.shape == (20, 1, 8, 8)
    assert torch.equal(found, (floats * 255).round().to(torch.uint8))


# --- choosing


def test_a_query_takes_turns_among_predicted_classes_from_the_most_unusual(
    trained: OpenVariational, digits: Any
) -> None:
    pool = digits.test.of_classes(range(5)).unlabelled()
    omega, told = predict(trained.model, pool, "novelty"), predict(trained.model, pool).argmax(1)
    found = trained.query(pool, 10)
    rows = pool.rows_of(found.ids)
    assert Counter(told[rows].tolist()) == dict.fromkeys(range(5), 2)
    for c in range(5):
        allowed = omega[(told == c) & (omega <= trained.reject)].sort(descending=True).values[:2]
        assert torch.equal(omega[rows][told[rows] == c].sort(descending=True).values, allowed)
    assert len(trained.query(pool, 10_000)) == int((omega <= trained.reject).sum())
    assert len(trained.query(pool, 0)) == len(trained.query(pool.take([]), 3)) == 0
    with pytest.raises(EngramError, match="-1 rows"):
        trained.query(pool, -1)


def test_familiar_tasks_come_first(of_clusters: OpenVariational) -> None:
    strange, familiar = Task(clusters(20, 2, range(4, 6))), Task(clusters(20, 2, range(2)))
    assert of_clusters.order([strange, familiar]) == [familiar, strange]
    assert of_clusters.order([familiar, strange], contrast=True) == [strange, familiar]
    with pytest.raises(EngramError, match="task 3 has no rows"):
        of_clusters.order([familiar, Task(clusters(20, 2).take([]), index=3)])


def test_a_core_set_covers_the_distances_of_its_class(of_clusters: OpenVariational) -> None:
    table = clusters(150, 1)
    found = of_clusters.core_set(table, 82)
    assert Counter(torch.as_tensor(found.labels).tolist()) == {0: 21, 1: 21, 2: 20, 3: 20}
    assert len(set(found.ids)) == 82
    assert bool((predict(of_clusters.model, found, "novelty") <= of_clusters.reject).all())
    distances = torch.rand(400, generator=torch.Generator().manual_seed(0)).square()
    chosen = nearest_to_draws(distances, 60, torch.Generator().manual_seed(1))
    near = distances.sort().values[:60]
    assert len(set(chosen.tolist())) == 60
    assert ks_2samp(distances[chosen], distances).statistic < 0.2 < ks_2samp(near, distances).statistic


def test_drawn_distances_by_hand() -> None:
    distances = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    law = fit_tail(distances, 5, start=None)
    wanted = law.inverse(torch.rand(2, generator=torch.Generator().manual_seed(4)))
    first = int((distances - wanted[0]).abs().argmin())
    second = min((k for k in range(5) if k != first), key=lambda k: abs(float(distances[k]) - float(wanted[1])))
    assert nearest_to_draws(distances, 2, torch.Generator().manual_seed(4)).tolist() == [first, second]


# --- files and bad input


def test_novelty_is_saved_with_the_model(trained: OpenVariational, tiny: Table, tmp_path: Any) -> None:
    save(trained.model, tmp_path / "model")
    again = load(tmp_path / "model")
    for what in ("logits", "novelty"):
        assert torch.equal(predict(again, tiny, what), predict(trained.model, tiny, what))
    assert accuracy(trained.model, tiny.of_classes(range(5))) > 0.9


def test_what_it_cannot_learn_is_said(of_clusters: OpenVariational, trained: OpenVariational) -> None:
    rows = clusters(3, 1)
    with pytest.raises(EngramError, match="rows' target is numbers"):
        OpenVariational(**SMALL).learn(Task(Table(rows.inputs, torch.zeros(12, 1))))
    with pytest.raises(EngramError, match="reads values or pixel_values"):
        OpenVariational(**SMALL).learn(Task(Table({"input_ids": torch.zeros(4, 3)}, torch.tensor([0, 0, 1, 1]))))
    with pytest.raises(EngramError, match="likelihood='gaussian'"):
        OpenVariational(**SMALL, likelihood="bernoulli").learn(Task(rows))
    with pytest.raises(EngramError, match="two rows"):
        OpenVariational(**SMALL).learn(Task(rows.take([0])))
    with pytest.raises(EngramError, match="distance"):
        OpenVariational(**SMALL, distance="cosin").learn(Task(rows))
    with pytest.raises(EngramError, match="no row with a label"):
        OpenVariational(**SMALL).learn(Task(rows.with_labels(torch.full((12,), MISSING))))
    with pytest.raises(EngramError, match="class 5 has no tail"):
        of_clusters.core_set(clusters(3, 1, range(4, 6)).of_classes([5]), 2)
    far = Table({"pixel_values": 9 * torch.ones(2, 1, 8, 8)}, torch.tensor([0, 1]))
    with pytest.raises(EngramError, match="Bernoulli"):
        trained.learn(Task(far))
