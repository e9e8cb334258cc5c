"""What `works` means: all that must hold is proved, claims are measured, and the method's own term does the work."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram import catalogue
from engram.audit import in_context, representation, restor
from engram.core.learner import fork
from engram.core.request import Request
from engram.data.streams import Stage, class_stream
from engram.data.table import Table
from engram.data.task import Task
from engram.engine.losses import Mean
from engram.engine.optimizer import Optimizer, Pull
from engram.engine.predict import accuracy
from engram.engine.recipe import Recipe
from engram.engine.run import Run
from engram.forget import npo, whos_harry_potter
from engram.forget.blindspot import Blindspot
from engram.forget.laf import LAF
from engram.forget.ssd import SSD
from engram.keep import prd, proto_net, slnid
from engram.keep.acu import ACU
from engram.keep.chunked_hypernetwork import ChunkedHypernetwork
from engram.keep.contracon import ConTraCon
from engram.keep.dependency_preserving_hypernetwork import DependencyPreservingHypernetwork
from engram.keep.dynamic import Dynamic
from engram.keep.fast_slow import FastSlow
from engram.keep.fetril import FeTrIL
from engram.keep.key_value import KeyValueBottleneck
from engram.keep.lifelong_framework import LifelongFramework
from engram.keep.lingocl import LingoCL
from engram.keep.napa_vq import NAPAVQ
from engram.keep.nmc import NMC
from engram.keep.rehearsal_free import RehearsalFree
from engram.keep.tame import Monitor
from engram.keep.virtual_outliers import VirtualOutliers
from engram.learn.non_instructional import NonInstructional
from engram.models import concepts, convolved_attention
from engram.models.guarded_lm import PromptClassifier
from engram.models.open_variational import Tails
from engram.protect import bayes_error_noise
from engram.reproduce import (
    are_we_truly_forgetting,
    bt2,
    cfsl_instances,
    cl_in_neural_networks,
    concept_vectors,
    contracon,
    datamodel_matching,
    deep_regression_unlearning,
    dependency_preserving_hypernetworks,
    eco_prompts,
    few_shot_cl_brain,
    laf,
    lingocl,
    napa_vq,
    nevis22,
    non_instructional_finetuning,
    open_world_cl,
    ovor,
    provably_unlearnable_examples,
    tame,
    ununlearning,
)
from engram.reproduce import prd as measured_prd
from engram.reproduce import restor as restor_claims
from engram.reproduce.digits import curve, five_pairs
from engram.stats import kmeans
from engram.stats.moments import ClassMeans
from engram.stats.ridge import Ridge

Split = tuple[Table, Table]
WORKS = [paper for paper in catalogue.papers() if paper.status.startswith("works")]


@pytest.mark.parametrize("paper", WORKS, ids=lambda paper: paper.slug)
def test_everything_that_must_hold_is_named_by_a_test(paper: catalogue.Paper) -> None:
    marks = re.compile(rf'@holds\("{paper.slug}", ([\d, ]+)\)')
    tests = (path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    proved = {int(k) for text in tests for found in marks.findall(text) for k in found.split(",")}
    assert proved == set(range(1, paper.holds + 1))
    assert paper.holds > 0
    assert set(paper.classes) <= {row.name for row in catalogue.methods()}


def rehearsal_free(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Final accuracy of five pairs with the distillation of predictions at this weight."""
    learner = RehearsalFree(network={"name": "MLP", "hidden": [64]}, epochs=8, prediction=weight)
    return curve(learner, class_stream(*split, base=2, increment=2))[-1]


def pseudo_features_of_neighbours(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy on the first four classes after six more, with the loss of pseudo-features so weighted."""
    original = NAPAVQ.replay
    monkeypatch.setattr(NAPAVQ, "replay", lambda self, draws: weight * original(self, draws))
    return napa_vq.final(napa_vq.begun(0), 0)[1]


def keeping_the_relation(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy on a first pair among its own classes after a second pair, with the distillation so weighted."""
    original = prd.relation_over_samples
    monkeypatch.setattr(prd, "relation_over_samples", lambda *given: weight * original(*given))
    stages = class_stream(*split, base=2, increment=2)[:2]
    return measured_prd.learnt(measured_prd.learner(), stages, seed=0).old


def dampening(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy left on a forgotten class with the dampening factor's exponent at this weight."""
    model = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=3e-3), epochs=12)(split[0], 0)
    new = SSD(alpha=2.0, exponent=weight).forget(model, Request.of_classes(split[0], (3,)))
    return accuracy(new, split[1].of_classes([3]))


def translation(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Largest distance of the mean of an old class's features from its stored mean, with the shift so weighted."""
    stages = class_stream(*split, base=5, increment=5)
    learner = FeTrIL()
    learner.learn(stages[0].task, Run())
    sums: ClassMeans = learner.means.sums
    stored = dict(zip(sums.classes.tolist(), sums.mean, strict=True))
    learner.learn(stages[1].task, Run())
    monkeypatch.setattr(FeTrIL, "shifts", lambda self, means, own: weight * (means - own))
    features, labels = learner.pseudo_features(stages[1].task, Run())
    return max(float((features[labels == c].mean(0) - mean).norm()) for c, mean in stored.items())


def subtraction_of_means(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Relative error of class means after forgetting 50 rows, with the subtraction so weighted."""
    original = ClassMeans._move

    def weighted(self: ClassMeans, x: Tensor, y: Tensor, sign: int) -> None:
        original(self, x * (weight if sign < 0 else 1.0), y, sign)

    train = split[0]
    monkeypatch.setattr(ClassMeans, "_move", weighted)
    return _error(NMC(), train, lambda model: model.head.means)  # type: ignore[union-attr,return-value]


def subtraction_of_moments(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Relative error of ACU's head after forgetting 50 rows, with the subtraction so weighted."""
    original = Ridge.remove

    def weighted(self: Ridge, phi: Tensor, y: Tensor, **options: float) -> None:
        if weight == 1:
            original(self, phi, y, **options)
        elif weight == -1:
            self.add(phi, y)

    monkeypatch.setattr(Ridge, "remove", weighted)
    return _error(ACU(size=100), split[0], lambda model: model.head.weight.detach())  # type: ignore[union-attr,operator,return-value]


def _error(learner: NMC | ACU, train: Table, weights: Callable[[nn.Module], Tensor]) -> float:
    """Relative difference from a fresh fit on the rows that stay."""
    gone = train.take(range(50))
    other = fork(learner)
    learner.learn(Task(train), Run())
    learner.forget(Request.of_records(train, gone.ids))
    other.learn(Task(train.without(gone.ids), classes=train.classes), Run())
    one, fitted = (dict(zip(_born(x.model), weights(x.model), strict=True)) for x in (learner, other))
    return float(torch.stack([(one[c] - fitted[c]).norm() / fitted[c].norm() for c in fitted]).max())


def _born(model: nn.Module) -> list[int]:
    return model.head.classes.tolist()  # type: ignore[union-attr,operator,no-any-return]


def nearness_to_keys(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Final accuracy of five pairs with the distance by which a row selects its keys so weighted."""
    original = kmeans.relative_distances
    monkeypatch.setattr(kmeans, "relative_distances", lambda x, keys: weight * original(x, keys))
    plan = Optimizer("sgd", lr=16.0, momentum=0.0)
    learner = KeyValueBottleneck(codebooks=16, keys=64, classes_total=10, optimizer=plan, epochs=10)
    return curve(learner, class_stream(*split, base=2, increment=2))[-1]


def rejection(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy left on a forgotten class with the loss of the forget rows so weighted."""
    original = npo.rejection
    monkeypatch.setattr(npo, "rejection", lambda ratio, beta: weight * original(ratio, beta))
    model = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=3e-3), epochs=12)(split[0], 0)
    method = npo.NPO(beta=0.5, optimizer=Optimizer(lr=1e-3), epochs=8, retain_ratio=3)
    new = method.forget(model, Request.of_classes(split[0], (3,)))
    return accuracy(new, split[1].of_classes([3]))


def difference_of_reinforcement(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy left on a forgotten class with what the reinforced model adds so weighted."""
    original = whos_harry_potter.generic
    monkeypatch.setattr(
        whos_harry_potter, "generic", lambda base, own, alpha, centre: original(base, own, weight * alpha, centre)
    )
    model = Recipe({"name": "MLP", "hidden": [32]}, Optimizer(lr=3e-3), epochs=12)(split[0], 0)
    plans = {"reinforcement": Optimizer(lr=3e-3), "optimizer": Optimizer(lr=1e-3)}
    method = whos_harry_potter.WhosHarryPotter(**plans, epochs=8, batch_size=32, within=None)
    return accuracy(method.forget(model, Request.of_classes(split[0], (3,))), split[1].of_classes([3]))


def unlearning_of_the_density(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy left on a forgotten class with the extractor's unlearning loss so weighted."""
    original = LAF.unlearning
    monkeypatch.setattr(LAF, "unlearning", lambda self, *given: weight * original(self, *given))
    return laf.measure(laf.RECIPE(split[0], 0), 0, epochs=30)[1].forgotten


def nearness_of_representations(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """How much nearer to the original than retrained models a model is that forgot by its head alone, with CKA so
    weighted."""
    original = representation.cka
    monkeypatch.setattr(representation, "cka", lambda x, y: weight * original(x, y))
    return are_we_truly_forgetting.nearness_of_an_edited_head(0)


def imitation_of_the_guide(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """W1 of the predictions to retrained models, as a share of the original's, with the forget rows' term so
    weighted."""
    original = Blindspot.imitation
    monkeypatch.setattr(Blindspot, "imitation", lambda self, *given: weight * original(self, *given))
    problem = deep_regression_unlearning.toy(0)
    new = deep_regression_unlearning.blindspot().forget(problem.original, problem.request)
    return problem.figures(new).apart / problem.figures(problem.original).apart


def predicted_change(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Squared error of the logits that datamodels predict, as a share of doing nothing, with the change so weighted."""
    return datamodel_matching.prediction(0).error(weight)


def direction_of_names(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy on classes never learnt, with the vectors of their names so weighted."""
    original = LingoCL.zero_shot

    def weighted(self: LingoCL, *given: Any) -> nn.Module:
        model = original(self, *given)
        model.head.weight.mul_(weight)  # type: ignore[union-attr,operator]
        return model

    monkeypatch.setattr(LingoCL, "zero_shot", weighted)
    return lingocl.zero_shot(lingocl.World(0), "named")


def compatibility(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """What queries gain in an old gallery by a new encoder, with all that looks at the old space so weighted."""
    return bt2.gain(weight)


def outliers_at_the_border(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Final accuracy of five pairs with the cost of energies so weighted."""
    original = VirtualOutliers.regulariser
    monkeypatch.setattr(VirtualOutliers, "regulariser", lambda self, *given: weight * original(self, *given))
    return curve(ovor.regularised(20, 8), ovor.stages(0))[-1]


def surest_task(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Final accuracy of five pairs with the entropies by which a task is chosen so weighted."""
    original = convolved_attention.joined
    monkeypatch.setattr(convolved_attention, "joined", lambda every, entropies: original(every, weight * entropies))
    learner = contracon.course(ConTraCon, 0)[0]
    stages = [Stage(stage.task, stage.test.take(range(0, len(stage.test), 3))) for stage in five_pairs("pycil", 0)]
    return contracon.figures(learner.model, stages)[1]


def inhibition(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """By how much the share of silent hidden units grows with the inhibition of neighbours so weighted."""
    original = slnid.inhibition
    monkeypatch.setattr(slnid, "inhibition", lambda *given: weight * original(*given))
    shares = []
    for sparsity in (1e-3, 0.0):
        learner = slnid.SLNID(network=cl_in_neural_networks.NETWORK, epochs=4, sparsity=sparsity)
        learner.learn(Task(split[0]), Run())
        shares.append(cl_in_neural_networks.silent(learner))
    return shares[0] - shares[1]


def evidence_of_the_prompt(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Answers left on prompts to forget with the classifier's log-odds so weighted."""
    original = PromptClassifier.forward
    monkeypatch.setattr(PromptClassifier, "forward", lambda self, *given: weight * original(self, *given))
    return eco_prompts.exact(eco_prompts.guarded(0, strength=10.0), eco_prompts.setting(0).gone)


def spelling_of_the_concept(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Nats by which ablating a topic's column raises its loss more than the other topic's, the less of two topics, with
    what the column's top tokens say of the topic so weighted."""
    original = concepts.alike
    monkeypatch.setattr(concepts, "alike", lambda *given: weight * original(*given))
    there = concept_vectors.of_topics(100)
    places = [concept_vectors.place_of(there.model, *side) for side in there.sides()]
    found = [concept_vectors.ablation(there.model, p, *side) for p, side in zip(places, there.sides(), strict=True)]
    return min(one.target - one.unrelated for one in found)


def answers_of_the_teacher(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """The share of continuations that end with the loss of the teacher's answers so weighted."""
    original = NonInstructional.terms
    monkeypatch.setattr(NonInstructional, "terms", lambda self, *given: weight * original(self, *given))
    there = non_instructional_finetuning.stage(0)
    rows = non_instructional_finetuning.halved(there, there.teacher, 200)
    return non_instructional_finetuning.ended(there, non_instructional_finetuning.taught(there, rows))


def recovery_of_right_facts(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Recovery by NPO with retained rows, with what an unlearned model knows beyond the corrupted one so weighted."""
    _weigh_what_came_back(restor, weight, monkeypatch)
    unlearned = restor_claims.unlearned(0, "NPO+RT", restor_claims.EPOCHS)
    return restor_claims.stage(0).figures(unlearned)["recovery"]


def gain_by_a_definition(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """What a definition gives back to a model by rule that never knew, with the gain so weighted."""
    _weigh_what_came_back(in_context, weight, monkeypatch)
    lab = ununlearning.Laboratory(0)
    monkeypatch.setattr(lab, "original", ununlearning.Reader(lab.world, lab.everything), raising=False)
    monkeypatch.setattr(ununlearning, "QUERIES", 30)
    found = lab.audit(ununlearning.Reader(lab.world, lab.permitted))
    return found["reintroduced by definition, fresh name"].value


def jump_of_the_loss(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Final accuracy of five pairs with that by which the smoothed loss is above the threshold so weighted."""

    def alarmed(self: Monitor) -> bool:
        return self.active is not None and weight * ((self.smoothed or 0.0) - self.threshold) > 0

    monkeypatch.setattr(Monitor, "alarmed", property(alarmed))
    world = tame.World.of(split, tame.DIGITS, Run())
    return accuracy(world.learnt(world.plan.learner(selector_epochs=50, retrain_epochs=50)).model, world.test)


def _weigh_what_came_back(probe: ModuleType, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    original = probe.recovered
    weighted = partial(_of_weighted, original, weight)
    monkeypatch.setattr(probe, "recovered", weighted)


def _of_weighted(original: Callable[..., object], weight: float, now: Tensor, lost: Tensor, whole: Tensor) -> object:
    return original(lost + weight * (now - lost), lost, whole)


def cosines_with_prototypes(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Accuracy on ten classes of which five come at a time, with the cosines of training episodes so weighted."""
    original = proto_net.cosines
    monkeypatch.setattr(proto_net, "cosines", lambda *given: weight * original(*given))
    monkeypatch.setitem(cfsl_instances.LEARNERS, "ProtoNet", partial(cfsl_instances.proto_net, epochs=20))
    return cfsl_instances.Laboratory(100).accuracy("ProtoNet", "base")


def comparison_of_starts(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Error of a task that comes back after twenty updates, with the scores of its candidate starts so weighted."""
    original = Dynamic.score
    monkeypatch.setattr(Dynamic, "score", lambda *given: weight * original(*given))
    return nevis22.recurrence(Dynamic, 0)[1]


def rejection_of_codes(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """How many more generated rows an independent classifier calls as they are called, than without rejection, with the
    outlier probability so weighted."""
    plain, original = open_world_cl.agreement(0, 1.0), Tails.outlier
    monkeypatch.setattr(Tails, "outlier", lambda self, *given: weight * original(self, *given))
    return open_world_cl.agreement(0, 0.01) - plain


class _Quadratic(LifelongFramework):
    """Its loss is (theta - 1)² over all weights."""

    def loss(self, batch: Any, among: Any) -> Mean:
        return Mean.of(torch.stack([(p - 1).square().sum() for p in self.model.parameters()]).sum())


def pull_to_the_target(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far weights rest from (1 + b target) / (1 + b), b = 0.5, with the pull to their targets so weighted."""
    original = Pull.rate
    monkeypatch.setattr(Pull, "rate", lambda self, update: weight * original(self, update))
    rows, plan = split[0].of_classes([0]).take(range(8)), Optimizer("sgd", lr=0.05, momentum=0.0)
    settings: dict[str, Any] = {"network": {"name": "MLP", "hidden": [8]}, "policy": {"steps": [{"b": {"all": 0.5}}]}}
    starts, rests = (_Quadratic(**settings, optimizer=plan, epochs=epochs) for epochs in (0, 200))
    for learner in (starts, rests):
        learner.learn(Task(rows), Run())
    pairs = zip(starts.model.parameters(), rests.model.parameters(), strict=True)
    return max(float((rest - (1 + 0.5 * start) / 1.5).detach().abs().max()) for start, rest in pairs)


def pull_of_important_weights(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Cosine of old prototypes with what they would be after five tasks of few rows, with the pull of the fast weights
    by importance so weighted."""
    original = FastSlow.penalty
    monkeypatch.setattr(FastSlow, "penalty", lambda self: weight * original(self))
    return few_shot_cl_brain.brief(0).freshness("both steps")


def hold_of_generated_weights(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far a second task takes what is generated for the first, as a share of its length, with R so weighted."""
    original = ChunkedHypernetwork.regulariser
    monkeypatch.setattr(ChunkedHypernetwork, "regulariser", lambda self, *given: weight * original(self, *given))
    sizes, held = dependency_preserving_hypernetworks.DIGITS, dependency_preserving_hypernetworks.HELD
    learner = sizes.hypernetwork(DependencyPreservingHypernetwork, held)
    return dependency_preserving_hypernetworks.measured(learner, sizes.stages(0)[:2]).moved


def rise_of_the_bayes_error(weight: float, split: Split, monkeypatch: pytest.MonkeyPatch) -> float:
    """Rise of the Bayes error of 300 images in features of fresh networks, with the error that they climb so
    weighted."""
    original, method = bayes_error_noise.bayes_error, provably_unlearnable_examples.METHOD
    own = provably_unlearnable_examples.halves(0)[1].take(range(300))
    with monkeypatch.context() as patch:
        patch.setattr(bayes_error_noise, "bayes_error", lambda *a, **k: weight * original(*a, **k))
        protected = method.protect(own)
    return method.estimate(protected) - method.estimate(own)


OWN_TERMS: dict[str, tuple[Callable[[float, Split, pytest.MonkeyPatch], float], tuple[float, float]]] = {
    "nmc-baseline": (subtraction_of_means, (0.0, 1e-8)),
    "fetril": (translation, (0.0, 1e-5)),
    "acu": (subtraction_of_moments, (0.0, 1e-8)),
    "ssd": (dampening, (0.0, 0.25)),
    "laf": (unlearning_of_the_density, (0.0, 0.25)),
    "npo": (rejection, (0.0, 0.1)),
    "whos-harry-potter": (difference_of_reinforcement, (0.0, 0.25)),
    "eco-prompts": (evidence_of_the_prompt, (0.0, 0.05)),
    "deep-regression-unlearning": (imitation_of_the_guide, (0.0, 0.4)),
    "datamodel-matching": (predicted_change, (0.0, 1 / 3)),
    "bt2": (compatibility, (0.0, 0.3)),
    "cl-in-neural-networks": (inhibition, (0.05, 1.0)),
    "rehearsal-free": (rehearsal_free, (0.35, 0.6)),
    "nevis22": (comparison_of_starts, (0.0, 0.2)),
    "lingocl": (direction_of_names, (0.2, 1.0)),
    "napa-vq": (pseudo_features_of_neighbours, (0.92, 1.0)),
    "prd": (keeping_the_relation, (0.9, 1.0)),
    "discrete-key-value-bottleneck": (nearness_to_keys, (0.7, 1.0)),
    "ovor": (outliers_at_the_border, (0.73, 1.0)),
    "open-world-cl": (rejection_of_codes, (0.03, 1.0)),
    "contracon": (surest_task, (0.25, 1.0)),
    "concept-vectors": (spelling_of_the_concept, (0.2, 100.0)),
    "are-we-truly-forgetting": (nearness_of_representations, (0.05, 1.0)),
    "restor": (recovery_of_right_facts, (0.2, 1.0)),
    "ununlearning": (gain_by_a_definition, (0.8, 1.2)),
    "cfsl-instances": (cosines_with_prototypes, (0.7, 1.0)),
    "few-shot-cl-brain": (pull_of_important_weights, (0.95, 1.0)),
    "non-instructional-finetuning": (answers_of_the_teacher, (0.8, 1.0)),
    "lifelong-framework": (pull_to_the_target, (0.0, 1e-4)),
    "tame": (jump_of_the_loss, (0.75, 0.95)),
    "dependency-preserving-hypernetworks": (hold_of_generated_weights, (0.0, 0.25)),
    "provably-unlearnable-examples": (rise_of_the_bayes_error, (0.1, 0.9)),
}


def test_every_paper_that_works_has_its_own_term_tested() -> None:
    assert {paper.slug for paper in WORKS} == set(OWN_TERMS)


@pytest.mark.parametrize("weight", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("slug", OWN_TERMS)
def test_without_its_own_term_the_quantity_leaves_its_band(
    slug: str, weight: float, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, (low, high) = OWN_TERMS[slug]
    inside = low <= measure(weight, split, monkeypatch) <= high
    assert inside == (weight == 1.0)
