"""The papers and the methods, as plain data: the only list of them. Importing it imports nothing heavy.

A paper's row says what it claims and which classes implement it. A method's row says what it cannot do without: `needs`
are alternatives, any ONE of the sets is enough, and `variants` the needs of other settings than the default, each
written as "setting=value". A test compares the rows with the classes. Other packages add rows by entry points of the
group `engram.methods`: each names a `Method` or a tuple of them, best kept in a module that imports this one alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from engram.errors import EngramError, unknown

WINGS = ("learn", "keep", "forget", "protect", "recall", "audit")
STATUSES = ("works", "works (reconstruction)", "planned")

# What a learner, forgetter or protector may need; the names are those of engram.core's `Need`.
NEEDS = (
    "forget-rows",
    "forget-labels",
    "retain-rows",
    "retain-labels",
    "general-rows",
    "statistics",
    "history",
    "recipe",
    "oracles",
    "concept",
    "anchor",
    "class-names",
    "boundaries",
    "backbone",
)
# What a probe may ask of its subject besides.
ASKS = ("model", "before", "request", "forget", "retain", "test", "transfer", "forgetter", "learner")
# For a probe, what is at hand for a request counts under its own names, and a recipe makes oracles.
COUNTS_AS = {"forget-rows": "forget", "retain-rows": "retain", "recipe": "oracles"}

Needs = tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Paper:
    """One paper. `year` is that of its first arXiv version, `claim` what it says, in one line.

    `status` "works": its classes are in the conformance suite, each of the `holds` things is proved by a test, and
    `engram reproduce` measures its claims.
    """

    slug: str
    title: str
    year: int
    arxiv: str
    wing: str
    claim: str
    classes: tuple[str, ...]
    status: str = "planned"
    holds: int = 0  # how many things must hold by the paper; each is named by a test


@dataclass(frozen=True)
class Method:
    """One method, of a paper or a baseline; `name` is "wing.Class", `module` where the class is defined."""

    name: str
    wing: str
    module: str
    summary: str
    needs: Needs
    paper: str | None = None
    variants: tuple[tuple[str, Needs], ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Possible:
    """Whether a method can run with what is at hand.

    `needs` is the first alternative that is satisfied, else the one that lacks least; `missing` is what it
    lacks, `setting` the setting it belongs to ("" for the default).
    """

    method: Method
    setting: str
    needs: frozenset[str]
    missing: frozenset[str]

    @property
    def usable(self) -> bool:
        """True when nothing is missing."""
        return not self.missing


def papers() -> tuple[Paper, ...]:
    """All papers, by wing."""
    return PAPERS


def paper(slug: str) -> Paper:
    """The paper of this slug. Raises EngramError with the nearest slug when there is none."""
    found = {row.slug: row for row in PAPERS}.get(slug)
    if found is None:
        raise unknown("paper", slug, (row.slug for row in PAPERS))
    return found


def methods(wing: str | None = None) -> tuple[Method, ...]:
    """All methods, or those of one wing; those of other packages last. EngramError for an unknown wing."""
    if wing not in (None, *WINGS):
        raise unknown("wing", wing, WINGS)
    return tuple(row for row in (*METHODS, *_others()) if wing in (None, row.wing))


def find(name: str) -> Method:
    """The method of this name: with its wing ("forget.SSD") or, if only one wing has it, without ("SSD").

    Case, hyphens and underscores do not matter. Raises EngramError when there is none, with the nearest name,
    and when several wings have one of that name.
    """
    found = [row for row in methods() if _plain(name) in (_plain(row.name), _plain(_bare(row)))]
    if not found:
        raise unknown("method", name, (row.name if "." in name else _bare(row) for row in methods()))
    if len(found) > 1:
        names = " or ".join(row.name for row in found)
        raise EngramError(f"several wings have a method {name!r}: say which one with its wing, {names}.")
    return found[0]


def possible(have: Iterable[str], wing: str | None = None) -> list[Possible]:
    """For every method (of one wing), whether what is at hand suffices. An unknown need is an EngramError."""
    held = set(have)
    for name in sorted(held - {*NEEDS, *ASKS}):
        raise unknown("need", name, (*NEEDS, *ASKS))
    probes = held | {COUNTS_AS[name] for name in held & COUNTS_AS.keys()}
    return [_nearest(row, probes if row.wing == "audit" else held) for row in methods(wing)]


def _nearest(row: Method, held: set[str]) -> Possible:
    settings = (("", row.needs), *row.variants)
    options = [Possible(row, setting, needs, needs - held) for setting, sets in settings for needs in sets]
    return min(options, key=lambda option: len(option.missing))  # the first one, among equals


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _bare(row: Method) -> str:
    return row.name.rpartition(".")[2]


@cache
def _others() -> tuple[Method, ...]:
    """The methods of other packages. One that cannot be read is left out, with a warning that names it."""
    taken = {row.name for row in METHODS}
    return tuple(row for entry in entry_points(group="engram.methods") for row in _read(entry, taken))


def _read(entry: EntryPoint, taken: set[str]) -> Iterator[Method]:
    try:
        loaded = entry.load()
        rows = (loaded,) if isinstance(loaded, Method) else tuple(loaded)
    except Exception as error:
        warnings.warn(f"the methods of {_source(entry)} are left out: {error}", stacklevel=2)
        return
    for row in rows:
        fault = _fault(row, taken)
        if fault:
            warnings.warn(f"a method of {_source(entry)} is left out: {fault}", stacklevel=2)
        else:
            taken.add(row.name)
            yield row


def _source(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist else "another package"
    return f"{package} (entry point {entry.name!r} = {entry.value})"


def _fault(row: object, taken: set[str]) -> str:
    if not isinstance(row, Method):
        return f"{row!r} is no engram.catalogue.Method."
    if row.wing not in WINGS or not row.name.startswith(f"{row.wing}."):
        return f"the name {row.name!r} must be the wing, one of {', '.join(WINGS)}, then a dot and the class."
    strange = frozenset().union(*row.needs) - {*NEEDS, *ASKS}
    if strange or not row.needs:
        return f"the needs of {row.name} must be one or more sets of known needs, not {sorted(strange)}."
    return f"there is a method {row.name} already." if row.name in taken else ""


def _needs(*alternatives: str) -> Needs:
    """Alternatives, each a string of names with spaces between; "" needs nothing special."""
    return tuple(frozenset(names.split()) for names in alternatives)


PAPERS: tuple[Paper, ...] = (
    Paper(
        "noprop",
        "NoProp: Training Neural Networks without Back-propagation or Forward-propagation",
        2025,
        "2503.24322",
        "learn",
        "layers trained each by itself to denoise a noised label reach the accuracy of backpropagation on small images",
        ("learn.NoProp",),
    ),
    Paper(
        "physical-forward-forward",
        "Backpropagation-free Training of Deep Physical Neural Networks",
        2023,
        "2304.11042",
        "learn",
        "networks with physical layers that nobody can differentiate learn by a "
        "local contrast of right and wrong labels",
        ("learn.PhysicalForwardForward",),
    ),
    Paper(
        "cyclical-curriculum",
        "Cyclical Curriculum Learning",
        2022,
        "2202.05531",
        "learn",
        "letting the share of data in use rise and fall in cycles beats both a plain training and a one-way curriculum",
        ("learn.CyclicalCurriculum",),
    ),
    Paper(
        "early-learning-regularization",
        "Early-Learning Regularization Prevents Memorization of Noisy Labels",
        2020,
        "2007.00151",
        "learn",
        "pulling predictions towards their own running average keeps a network from memorising wrong labels",
        ("learn.ELR", "learn.ELRPlus"),
    ),
    Paper(
        "g-simclr",
        "G-SimCLR: Self-Supervised Contrastive Learning with Guided Projection via Pseudo Labelling",
        2020,
        "2009.12007",
        "learn",
        "batches that hold no pseudo-class twice make contrastive representations at least as good as random batches",
        ("learn.GSimCLR",),
    ),
    Paper(
        "obow",
        "OBoW: Online Bag-of-Visual-Words Generation for Self-Supervised Learning",
        2020,
        "2012.11552",
        "learn",
        "predicting a teacher's bag of visual words, its vocabulary renewed online, learns features that transfer",
        ("learn.OBoW",),
    ),
    Paper(
        "directpred",
        "Understanding self-supervised Learning Dynamics without Contrastive Pairs",
        2021,
        "2102.06810",
        "learn",
        "a predictor computed from the correlation of its inputs does as well as a "
        "trained one, and explains why no collapse",
        ("learn.DirectPred",),
    ),
    Paper(
        "provable-pretraining",
        "On the Provable Advantage of Unsupervised Pretraining",
        2023,
        "2303.01566",
        "learn",
        "maximum likelihood on many unlabelled rows, then risk minimisation on few "
        "labelled ones, provably needs fewer labels",
        ("learn.FactorPretraining", "learn.MixturePretraining", "learn.PairPretraining"),
    ),
    Paper(
        "learned-proximal-networks",
        "What's in a Prior? Learned Proximal Networks for Inverse Problems",
        2023,
        "2310.14344",
        "learn",
        "networks that are proximal operators by construction recover the log-prior of data and make solvers converge",
        ("learn.LearnedProximal",),
    ),
    Paper(
        "s3im",
        "S3IM: Stochastic Structural SIMilarity and Its Unreasonable Effectiveness for Neural Fields",
        2023,
        "2308.07032",
        "learn",
        "structural similarity over random groups of pixels, added to the loss, improves neural fields almost for free",
        ("learn.S3IM", "learn.NeuralField"),
    ),
    Paper(
        "compositional-scenes",
        "Compositional Scene Representation Learning via Reconstruction: A Survey",
        2022,
        "2202.07135",
        "learn",
        "methods that rebuild a scene from parts find its objects without labels; one benchmark compares them",
        ("learn.SlotAttention", "learn.NEM", "learn.OneSlot", "audit.SceneDecomposition"),
    ),
    Paper(
        "discriminative-class-tokens",
        "Discriminative Class Tokens for Text-to-Image Diffusion Models",
        2023,
        "2303.17155",
        "learn",
        "tuning the embedding of one token by a classifier makes a text-to-image model draw the class more faithfully",
        ("learn.ClassToken",),
    ),
    Paper(
        "domain-extrapolation",
        "Beyond Finite Data: Towards Data-free Out-of-distribution Generalization via Extrapolation",
        2024,
        "2403.05523",
        "learn",
        "domains that a language model names and an image model draws improve generalisation to unseen domains",
        ("learn.DomainExtrapolation",),
    ),
    Paper(
        "non-instructional-finetuning",
        "Non-instructional Fine-tuning: Enabling Instruction-Following "
        "Capabilities in Pre-trained Language Models "
        "without Instruction-Following Data",
        2024,
        "2409.00096",
        "learn",
        "fine-tuning on a stronger model's continuations of halved texts teaches a "
        "language model to follow instructions",
        ("learn.NonInstructional",),
        "works (reconstruction)",
        6,
    ),
    Paper(
        "novel-class-discovery",
        "A Practical Approach to Novel Class Discovery in Tabular Data",
        2023,
        "2311.05440",
        "learn",
        "novel classes in tables can be found, and counted, when settings are tuned on known classes that were hidden",
        ("learn.NCDKMeans", "learn.NCDSpectral", "learn.PBN"),
    ),
    Paper(
        "fetril",
        "FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning",
        2022,
        "2211.13131",
        "keep",
        "a linear head on new features and on their translations to old class "
        "means keeps old classes without exemplars",
        ("keep.FeTrIL",),
        status="works",
        holds=6,
    ),
    Paper(
        "rehearsal-free",
        "A Closer Look at Rehearsal-Free Continual Learning",
        2022,
        "2203.17269",
        "keep",
        "distillation and parameter penalties, well combined, keep old classes "
        "without rehearsal; plain L2 can beat EWC",
        ("keep.RehearsalFree",),
        status="works",
        holds=5,
    ),
    Paper(
        "napa-vq",
        "NAPA-VQ: Neighborhood Aware Prototype Augmentation with Vector Quantization for Continual Learning",
        2023,
        "2308.09297",
        "keep",
        "knowing which classes are neighbours in feature space gives better prototypes and less overlap of old and new",
        ("keep.NAPAVQ",),
        status="works",
        holds=7,
    ),
    Paper(
        "prd",
        "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning",
        2023,
        "2303.14771",
        "keep",
        "keeping how new samples relate to old class prototypes holds old knowledge without stored data",
        ("keep.PRD",),
        status="works",
        holds=6,
    ),
    Paper(
        "tame",
        "TAME: Task Agnostic Continual Learning using Multiple Experts",
        2022,
        "2210.03869",
        "keep",
        "a jump of the loss tells that the task changed, and experts with a selector then beat methods that are told",
        ("keep.TAME",),
        status="works",
        holds=6,
    ),
    Paper(
        "ovor",
        "OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning",
        2024,
        "2402.04129",
        "keep",
        "one shared prompt matches pools of prompts, and virtual outliers stop tasks from claiming each other's rows",
        ("keep.OnePrompt", "keep.VirtualOutliers"),
        status="works",
        holds=6,
    ),
    Paper(
        "nmc-baseline",
        "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning",
        2022,
        "2210.04428",
        "keep",
        "the nearest class mean of frozen pretrained features competes with elaborate continual learning methods",
        ("keep.NMC",),
        status="works",
        holds=6,
    ),
    Paper(
        "dependency-preserving-hypernetworks",
        "Continual Learning with Dependency Preserving Hypernetworks",
        2022,
        "2209.07712",
        "keep",
        "a recurrent hypernetwork, which lets layers depend on each other, generates better weights for every task",
        ("keep.DependencyPreservingHypernetwork", "keep.ChunkedHypernetwork"),
        status="works (reconstruction)",
        holds=6,
    ),
    Paper(
        "open-world-cl",
        "A Wholistic View of Continual Learning with Deep Neural Networks: "
        "Forgotten Lessons and the Bridge to Active "
        "and Open World Learning",
        2020,
        "2009.01797",
        "keep",
        "one variational model with bounds on its latent space rehearses, refuses "
        "the unknown and chooses what to learn",
        ("keep.OpenVariational",),
        status="works (reconstruction)",
        holds=6,
    ),
    Paper(
        "lingocl",
        "Enhancing Visual Continual Learning with Language-Guided Supervision",
        2024,
        "2403.16124",
        "keep",
        "frozen embeddings of class names, in place of a random classifier, reduce forgetting in existing methods",
        ("keep.LingoCL",),
        status="works (reconstruction)",
        holds=6,
    ),
    Paper(
        "cl-in-neural-networks",
        "Continual Learning in Neural Networks",
        2019,
        "1910.02718",
        "keep",
        "experts, importances, sparsity and chosen samples each lessen forgetting, up to streams without task borders",
        (
            "keep.ExpertGate",
            "keep.EncoderBasedLwF",
            "keep.MAS",
            "keep.TaskFreeMAS",
            "keep.SLNID",
            "keep.GSS",
            "keep.MIR",
        ),
        status="works",
        holds=6,
    ),
    Paper(
        "contracon",
        "Exemplar-Free Continual Transformer with Convolutions",
        2023,
        "2308.11357",
        "keep",
        "small convolutions that re-weight attention give a transformer every "
        "task; entropy over views tells which it is",
        ("keep.ConTraCon",),
        status="works",
        holds=6,
    ),
    Paper(
        "lifelong-framework",
        "A Deep Learning Framework for Lifelong Machine Learning",
        2021,
        "2105.00157",
        "keep",
        "one mechanism, how stiff each weight is, yields non-forgetting, transfer, "
        "few-shot learning and graceful forgetting",
        ("keep.LifelongFramework",),
        "works (reconstruction)",
        6,
    ),
    Paper(
        "few-shot-cl-brain",
        "Few-shot Continual Learning: a Brain-inspired Approach",
        2021,
        "2104.09034",
        "keep",
        "fast and slow weights, consolidated in two steps, keep old tasks and get better at learning from few examples",
        ("keep.FastSlow",),
        status="works (reconstruction)",
        holds=6,
    ),
    Paper(
        "discrete-key-value-bottleneck",
        "Discrete Key-Value Bottleneck",
        2022,
        "2207.11240",
        "keep",
        "values read through frozen discrete keys change locally, so class after "
        "class is learnt with little forgetting",
        ("keep.KeyValueBottleneck",),
        status="works",
        holds=6,
    ),
    Paper(
        "acu",
        "ACU: Analytic Continual Unlearning for Efficient and Exact Forgetting with Privacy Preservation",
        2025,
        "2505.12239",
        "keep",
        "with a least-squares head, learning and forgetting are closed-form updates, and the forgetting is exact",
        ("keep.ACU",),
        status="works",
        holds=7,
    ),
    Paper(
        "bt2",
        "BT^2: Backward-compatible Training with Basis Transformation",
        2022,
        "2211.03989",
        "keep",
        "a few extra dimensions and learnt rotations make new embeddings "
        "comparable with old ones at no loss of quality",
        ("keep.BT2", "keep.BCT", "audit.Compatibility"),
        status="works",
        holds=5,
    ),
    Paper(
        "nevis22",
        "NEVIS'22: A Stream of 100 Tasks Sampled from 30 Years of Computer Vision Research",
        2022,
        "2211.11747",
        "keep",
        "on a long chronological stream, learners should be judged by accuracy against all the compute they spend",
        ("keep.Independent", "keep.Previous", "keep.Dynamic"),
        status="works",
        holds=6,
    ),
    Paper(
        "laf",
        "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models",
        2024,
        "2404.00506",
        "forget",
        "unlearning in the space of representations needs no labels and comes close to methods that use them",
        ("forget.LAF",),
        status="works",
        holds=6,
    ),
    Paper(
        "datamodel-matching",
        "Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
        2024,
        "2410.23232",
        "forget",
        "predicting a retrained model's outputs by data attribution, then matching them, comes close to retraining",
        ("forget.DatamodelMatching", "forget.OracleMatching", "forget.DatamodelDirect"),
        status="works",
        holds=6,
    ),
    Paper(
        "ssd",
        "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
        2023,
        "2308.07707",
        "forget",
        "shrinking the weights that matter far more to the forget set than to all data forgets without retraining",
        ("forget.SSD",),
        status="works",
        holds=8,
    ),
    Paper(
        "deep-regression-unlearning",
        "Deep Regression Unlearning",
        2022,
        "2210.08196",
        "forget",
        "regressors forget by imitating a network that saw only retained rows, or by fine-tuning on drawn targets",
        ("forget.Blindspot", "forget.GaussianFineTune"),
        "works",
        holds=6,
    ),
    Paper(
        "npo",
        "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        2024,
        "2404.05868",
        "forget",
        "treating forget texts as dispreferred answers unlearns while collapsing far slower than gradient ascent",
        (
            "forget.NPO",
            "forget.GradientAscent",
            "forget.GradientDifference",
            "forget.KLForget",
            "forget.DPO",
            "forget.IDK",
        ),
        status="works",
        holds=6,
    ),
    Paper(
        "whos-harry-potter",
        "Who's Harry Potter? Approximate Unlearning in LLMs",
        2023,
        "2310.02238",
        "forget",
        "fine-tuning on generic alternative labels makes a language model lose a book and keep its general skills",
        ("forget.WhosHarryPotter",),
        status="works",
        holds=6,
    ),
    Paper(
        "eco-prompts",
        "Large Language Model Unlearning via Embedding-Corrupted Prompts",
        2024,
        "2406.07933",
        "forget",
        "corrupting the embeddings of prompts that a classifier flags acts like unlearning, with few side effects",
        ("forget.ECO",),
        status="works",
        holds=6,
    ),
    Paper(
        "advunlearn",
        "Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models",
        2024,
        "2405.15234",
        "forget",
        "adversarial training of the text encoder makes concept erasure withstand attacks and keeps image quality",
        ("forget.AdvUnlearn", "forget.ESD", "audit.UnlearnDiffAttack"),
    ),
    Paper(
        "doco",
        "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient",
        2024,
        "2405.15304",
        "forget",
        "aligning a concept's outputs with an anchor's adversarially, and trimming "
        "conflicting gradients, erases and keeps",
        ("forget.DoCo",),
    ),
    Paper(
        "all-but-one",
        "All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models",
        2023,
        "2312.12807",
        "forget",
        "changing only the guidance term of a concept, the unconditional score held, erases it and keeps the layout",
        ("forget.AllButOne",),
    ),
    Paper(
        "are-we-truly-forgetting",
        "Are We Truly Forgetting? A Critical Re-examination of Machine Unlearning Evaluation Protocols",
        2025,
        "2503.06991",
        "audit",
        "methods that look good by accuracy keep the forgotten classes in their representations, or ruin them",
        ("audit.Representation",),
        status="works",
        holds=6,
    ),
    Paper(
        "concept-vectors",
        "Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces",
        2024,
        "2406.11614",
        "audit",
        "unlearning leaves the parameter vectors that carry a concept nearly untouched; ablating them removes it",
        ("audit.ConceptVectors", "forget.Needle"),
        status="works (reconstruction)",
        holds=6,
    ),
    Paper(
        "restor",
        "RESTOR: Knowledge Recovery in Machine Unlearning",
        2024,
        "2411.00204",
        "audit",
        "many unlearning methods forget planted falsehoods without recovering what the model knew before them",
        ("audit.Restor",),
        status="works",
        holds=6,
    ),
    Paper(
        "ununlearning",
        "UnUnlearning: Unlearning is not sufficient for content regulation in advanced generative AI",
        2024,
        "2407.00106",
        "audit",
        "knowledge that was unlearnt, even exactly, can be put back by the prompt, so filters are needed as well",
        ("audit.InContextReintroduction",),
        status="works (reconstruction)",
        holds=6,
    ),
    Paper(
        "grok-or-not",
        "To grok or not to grok: Disentangling generalization and memorization on corrupted algorithmic datasets",
        2023,
        "2310.13061",
        "audit",
        "neurons that memorise wrong labels can be told from those that know the rule, and pruned",
        ("audit.NeuronIPR", "forget.PruneMemorising"),
    ),
    Paper(
        "cfsl-instances",
        "Expanding continual few-shot learning benchmarks to include recognition of specific instances",
        2022,
        "2209.07863",
        "audit",
        "more classes make continual few-shot learning harder, occlusion breaks "
        "instance recognition, replay helps both",
        ("audit.FewShotProtocol", "keep.ProtoNet", "keep.PretrainTune"),
        status="works",
        holds=6,
    ),
    Paper(
        "provably-unlearnable-examples",
        "Towards Provably Unlearnable Examples via Bayes Error Optimisation",
        2025,
        "2511.08191",
        "protect",
        "bounded noise that raises the Bayes error makes data hard to learn from, also when mixed with clean data",
        ("protect.BayesErrorNoise",),
        status="works",
        holds=6,
    ),
    Paper(
        "nv-embed",
        "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models",
        2024,
        "2405.17428",
        "recall",
        "latent attention, no causal mask and contrastive tuning in two stages turn a language model into an embedder",
        ("recall.NVEmbed",),
    ),
    Paper(
        "raml",
        "Retrieval-Augmented Meta Learning for Low-Resource Text Classification",
        2023,
        "2309.04979",
        "recall",
        "passages retrieved from a corpus, fused by several views, help to classify text from very few examples",
        ("recall.RAML",),
    ),
    Paper(
        "semi-parametric-synthesis",
        "Semi-Parametric Neural Image Synthesis",
        2022,
        "2204.11824",
        "recall",
        "a small generator that paints from retrieved neighbours changes domain when its image memory is exchanged",
        ("recall.RetrievalDiffusion", "recall.RetrievalAutoregressive"),
    ),
    Paper(
        "icl-discrete-functions",
        "Understanding In-Context Learning in Transformers and LLMs by Learning to Learn Discrete Functions",
        2023,
        "2310.03016",
        "recall",
        "transformers learn simple Boolean functions in context almost optimally, and sooner from a teaching sequence",
        ("recall.InContextLearner",),
    ),
)

METHODS: tuple[Method, ...] = (
    Method(
        "learn.NonInstructional",
        "learn",
        "engram.learn.non_instructional",
        "fine-tunes a language model on a stronger one's continuations of halved texts, whole or by LoRA",
        _needs(""),
        paper="non-instructional-finetuning",
    ),
    Method(
        "keep.NMC",
        "keep",
        "engram.keep.nmc",
        "nearest class mean of frozen features; forgets exactly",
        _needs(""),
        paper="nmc-baseline",
        variants=(("backbone=NAME", _needs("backbone")),),
        exact=True,
    ),
    Method(
        "keep.FeTrIL",
        "keep",
        "engram.keep.fetril",
        "linear head on new features and on their translations to old class means",
        _needs("boundaries"),
        paper="fetril",
        variants=(("backbone=NAME", _needs("backbone boundaries")),),
    ),
    Method(
        "keep.ACU",
        "keep",
        "engram.keep.acu",
        "ridge regression on frozen random features; learns and forgets in closed form, exactly",
        _needs(""),
        paper="acu",
        variants=(("backbone=NAME", _needs("backbone")),),
        exact=True,
    ),
    Method(
        "keep.RehearsalFree",
        "keep",
        "engram.keep.rehearsal_free",
        "distillation of predictions and features, L2 and EWC penalties, no stored rows",
        _needs("boundaries"),
        paper="rehearsal-free",
    ),
    Method(
        "keep.PRD",
        "keep",
        "engram.keep.prd",
        "contrastive learning; prototypes of old classes keep their relation to new rows",
        _needs("boundaries"),
        paper="prd",
    ),
    Method(
        "keep.NAPAVQ",
        "keep",
        "engram.keep.napa_vq",
        "coding vectors, a graph of which compete, pseudo-features of old classes towards their neighbours",
        _needs("boundaries"),
        paper="napa-vq",
    ),
    Method(
        "keep.OpenVariational",
        "keep",
        "engram.keep.open_variational",
        "a classifying variational autoencoder: generative replay, unknown rows and queries by extreme-value bounds",
        _needs("boundaries"),
        paper="open-world-cl",
    ),
    Method(
        "keep.ProtoNet",
        "keep",
        "engram.keep.proto_net",
        "trains an encoder on episodes of the first task; then one prototype a class, compared by cosine",
        _needs("boundaries"),
        paper="cfsl-instances",
    ),
    Method(
        "keep.FastSlow",
        "keep",
        "engram.keep.fast_slow",
        "fast weights keep tasks of few rows, slow weights follow and keep learning from few rows; a reconstruction",
        _needs("boundaries"),
        paper="few-shot-cl-brain",
    ),
    Method(
        "keep.PretrainTune",
        "keep",
        "engram.keep.pretrain_tune",
        "pretrains on the first task, then takes a few full-batch steps on every support set, with replay of the last",
        _needs("boundaries"),
        paper="cfsl-instances",
    ),
    Method(
        "audit.FewShotProtocol",
        "audit",
        "engram.audit.few_shot",
        "accuracy of forks of a learner over few-shot episodes of new classes, or of single rows with damage",
        _needs("learner test"),
        paper="cfsl-instances",
    ),
    Method(
        "keep.Finetune",
        "keep",
        "engram.keep.finetune",
        "trains on each task as it comes: the lower bound",
        _needs(""),
    ),
    Method(
        "keep.Replay",
        "keep",
        "engram.keep.replay",
        "trains on each task mixed with a buffer of earlier rows",
        _needs(""),
    ),
    Method(
        "keep.Joint",
        "keep",
        "engram.keep.joint",
        "trains anew on all rows seen so far: the upper bound",
        _needs(""),
        exact=True,
    ),
    Method(
        "keep.JointHead",
        "keep",
        "engram.keep.joint",
        "a linear classifier on the frozen features of all rows seen so far; forgets exactly",
        _needs(""),
        variants=(("backbone=NAME", _needs("backbone")),),
        exact=True,
    ),
    Method(
        "keep.OnlineEWC",
        "keep",
        "engram.keep.online_ewc",
        "a penalty on parameters by one running Fisher diagonal",
        _needs("boundaries"),
    ),
    Method(
        "keep.SI",
        "keep",
        "engram.keep.si",
        "a penalty on parameters by how much of the fall of earlier losses was theirs",
        _needs("boundaries"),
    ),
    Method(
        "keep.MAS",
        "keep",
        "engram.keep.mas",
        "a penalty on parameters by how sensitive the outputs are to them; needs no labels for it",
        _needs("boundaries"),
        paper="cl-in-neural-networks",
    ),
    Method(
        "keep.LwF",
        "keep",
        "engram.keep.lwf",
        "distils the answers for old classes on the rows of the new task; stores nothing",
        _needs("boundaries"),
    ),
    Method(
        "keep.ICaRL",
        "keep",
        "engram.keep.icarl",
        "exemplars chosen by herding, distillation with sigmoids, the nearest mean of exemplars",
        _needs("boundaries"),
    ),
    Method(
        "keep.DERpp",
        "keep",
        "engram.keep.derpp",
        "replays rows of a reservoir with their labels and with the logits that they had",
        _needs(""),
    ),
    Method(
        "keep.MIR",
        "keep",
        "engram.keep.mir",
        "replays the rows of a reservoir that the coming update would harm most",
        _needs(""),
        paper="cl-in-neural-networks",
    ),
    Method(
        "keep.GSS",
        "keep",
        "engram.keep.gss",
        "replays from a buffer whose rows have gradients in different directions",
        _needs(""),
        paper="cl-in-neural-networks",
    ),
    Method(
        "keep.ExpertGate",
        "keep",
        "engram.keep.expert_gate",
        "an expert for each task, and autoencoders that say by their error which expert a row belongs to",
        _needs("boundaries"),
        paper="cl-in-neural-networks",
        variants=(("backbone=NAME", _needs("boundaries backbone")),),
    ),
    Method(
        "keep.LifelongFramework",
        "keep",
        "engram.keep.lifelong_framework",
        "a block of units for each task; a policy says how stiff each group of weights is, and what is rehearsed",
        _needs("boundaries"),
        paper="lifelong-framework",
    ),
    Method(
        "keep.Independent",
        "keep",
        "engram.keep.independent",
        "a fresh network for each task, as if there had been no others",
        _needs("boundaries"),
        paper="nevis22",
    ),
    Method(
        "keep.Previous",
        "keep",
        "engram.keep.previous",
        "a network for each task, which starts from the backbone of the task before",
        _needs("boundaries"),
        paper="nevis22",
    ),
    Method(
        "keep.Dynamic",
        "keep",
        "engram.keep.dynamic",
        "a network for each task, which starts from the earlier backbone in whose features its rows lie best",
        _needs("boundaries"),
        paper="nevis22",
    ),
    Method(
        "keep.ConTraCon",
        "keep",
        "engram.keep.contracon",
        "a frozen compact transformer whose attention weights each task re-weights by small convolutions",
        _needs("boundaries"),
        paper="contracon",
    ),
    Method(
        "keep.ChunkedHypernetwork",
        "keep",
        "engram.keep.chunked_hypernetwork",
        "a vector for each task, from which all weights of its network are generated, chunk by chunk",
        _needs("boundaries"),
        paper="dependency-preserving-hypernetworks",
    ),
    Method(
        "keep.DependencyPreservingHypernetwork",
        "keep",
        "engram.keep.dependency_preserving_hypernetwork",
        "a recurrent network generates all weights of each task's network, layer after layer",
        _needs("boundaries"),
        paper="dependency-preserving-hypernetworks",
    ),
    Method(
        "keep.EncoderBasedLwF",
        "keep",
        "engram.keep.encoder_based_lwf",
        "distils the answers for old classes, and holds the codes of features that earlier tasks need",
        _needs("boundaries"),
        paper="cl-in-neural-networks",
    ),
    Method(
        "keep.TaskFreeMAS",
        "keep",
        "engram.keep.task_free_mas",
        "the penalty of MAS on a stream without borders, renewed where the loss has settled after a peak",
        _needs(""),
        paper="cl-in-neural-networks",
    ),
    Method(
        "keep.SLNID",
        "keep",
        "engram.keep.slnid",
        "neurons inhibit their neighbours, which leaves room for later tasks, beside a penalty on parameters",
        _needs("boundaries"),
        paper="cl-in-neural-networks",
    ),
    Method(
        "keep.SLDA",
        "keep",
        "engram.keep.slda",
        "linear discriminant analysis of frozen features, from sums; forgets exactly",
        _needs(""),
        variants=(("backbone=NAME", _needs("backbone")),),
        exact=True,
    ),
    Method(
        "keep.TAME",
        "keep",
        "engram.keep.tame",
        "experts that notice a new task by their loss, and a selector that routes rows to them",
        _needs(""),
        paper="tame",
    ),
    Method(
        "keep.KeyValueBottleneck",
        "keep",
        "engram.keep.key_value",
        "values behind frozen discrete keys; forgets by masking cells, which can be undone, or by zeroing them",
        _needs(""),
        paper="discrete-key-value-bottleneck",
        variants=(("backbone=NAME", _needs("backbone")), ("key_rows=NAME", _needs("general-rows"))),
    ),
    Method(
        "keep.LingoCL",
        "keep",
        "engram.keep.lingocl",
        "any host with a class head, which becomes frozen embeddings of the class names",
        _needs("boundaries class-names"),
        paper="lingocl",
        variants=(("encoder=random", _needs("boundaries")),),
    ),
    Method(
        "keep.OnePrompt",
        "keep",
        "engram.keep.one_prompt",
        "one prompt in a frozen vision transformer, shared by all tasks, and a linear head",
        _needs("boundaries backbone"),
        paper="ovor",
    ),
    Method(
        "keep.VirtualOutliers",
        "keep",
        "engram.keep.virtual_outliers",
        "any host with a linear head, which after each task learns where the task's rows end",
        _needs("boundaries backbone"),
        paper="ovor",
        variants=(("host=Finetune", _needs("boundaries")),),
    ),
    Method(
        "keep.L2P",
        "keep",
        "engram.keep.l2p",
        "a pool of prompts in a frozen vision transformer; a row takes those whose keys are most like it",
        _needs("boundaries backbone"),
    ),
    Method(
        "keep.BT2",
        "keep",
        "engram.keep.bt2",
        "a new encoder whose vectors search the old one's gallery, by extra numbers and learnt rotations",
        _needs("boundaries"),
        paper="bt2",
    ),
    Method(
        "keep.BCT",
        "keep",
        "engram.keep.bct",
        "a new encoder that is trained to fit the class means of the old one's vectors; without them, independent",
        _needs("boundaries"),
        paper="bt2",
    ),
    Method(
        "forget.SSD",
        "forget",
        "engram.forget.ssd",
        "dampens the weights that matter far more to the forget rows than to all rows",
        _needs("forget-rows forget-labels statistics", "forget-rows forget-labels retain-rows retain-labels"),
        paper="ssd",
    ),
    Method(
        "forget.DatamodelMatching",
        "forget",
        "engram.forget.datamodel_matching",
        "fine-tunes towards what data attribution predicts a retrained model to say",
        _needs("forget-rows retain-rows statistics", "forget-rows forget-labels retain-rows retain-labels recipe"),
        paper="datamodel-matching",
        variants=(("attribution=trak", _needs("forget-rows forget-labels retain-rows retain-labels")),),
    ),
    Method(
        "forget.OracleMatching",
        "forget",
        "engram.forget.oracle_matching",
        "fine-tunes towards what retrained models say: the ceiling of datamodel matching",
        _needs("forget-rows retain-rows oracles", "forget-rows retain-rows retain-labels recipe"),
        paper="datamodel-matching",
        variants=(
            (
                "retain_weight=0",
                _needs("forget-rows oracles", "forget-rows retain-rows retain-labels recipe"),
            ),
        ),
    ),
    Method(
        "forget.DatamodelDirect",
        "forget",
        "engram.forget.datamodel_direct",
        "answers with the logits that data attribution predicts for a retrained model; the weights stay",
        _needs(
            "forget-rows retain-rows statistics",
            "forget-rows forget-labels retain-rows retain-labels recipe",
            "forget-rows retain-rows statistics general-rows",
            "forget-rows forget-labels retain-rows retain-labels recipe general-rows",
        ),
        paper="datamodel-matching",
        variants=(
            (
                "attribution=trak",
                _needs(
                    "forget-rows forget-labels retain-rows retain-labels",
                    "forget-rows forget-labels retain-rows retain-labels general-rows",
                ),
            ),
        ),
    ),
    Method(
        "forget.Retrain",
        "forget",
        "engram.forget.retrain",
        "trains anew without the forget rows: the oracle",
        _needs("retain-rows retain-labels recipe"),
        exact=True,
    ),
    Method(
        "forget.Finetune",
        "forget",
        "engram.forget.finetune",
        "trains on with the retained rows alone",
        _needs("retain-rows retain-labels"),
    ),
    Method(
        "forget.GradientAscent",
        "forget",
        "engram.forget.gradient_ascent",
        "climbs the loss on the forget rows",
        _needs("forget-rows forget-labels"),
    ),
    Method(
        "forget.GradientDifference",
        "forget",
        "engram.forget.gradient_difference",
        "climbs the loss on the forget rows and descends it on the retained rows",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
    ),
    Method(
        "forget.NPO",
        "forget",
        "engram.forget.npo",
        "makes the forget texts less likely than the model before did, with a bounded gradient",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
        paper="npo",
        variants=(
            ("retain_weight=0", _needs("forget-rows forget-labels")),
            ("retain_term=kl", _needs("forget-rows forget-labels retain-rows")),
        ),
    ),
    Method(
        "forget.DPO",
        "forget",
        "engram.forget.dpo",
        "makes a refusal likelier than the forget texts, measured against the model before",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
        paper="npo",
        variants=(
            ("retain_weight=0", _needs("forget-rows forget-labels")),
            ("retain_term=kl", _needs("forget-rows forget-labels retain-rows")),
        ),
    ),
    Method(
        "forget.IDK",
        "forget",
        "engram.forget.idk",
        "trains on the forget questions with refusals for answers, and on the retained rows",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
        paper="npo",
        variants=(("retain_weight=0", _needs("forget-rows forget-labels")),),
    ),
    Method(
        "forget.KLForget",
        "forget",
        "engram.forget.kl",
        "climbs the loss on the forget rows and keeps near the model before on the retained rows",
        _needs("forget-rows forget-labels retain-rows"),
        paper="npo",
        variants=(("retain_weight=0", _needs("forget-rows forget-labels")),),
    ),
    Method(
        "forget.SimNPO",
        "forget",
        "engram.forget.simnpo",
        "makes the forget texts unlikely per token, with a bounded gradient and no reference",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
        variants=(
            ("retain_weight=0", _needs("forget-rows forget-labels")),
            ("retain_term=kl", _needs("forget-rows forget-labels retain-rows")),
        ),
    ),
    Method(
        "forget.WhosHarryPotter",
        "forget",
        "engram.forget.whos_harry_potter",
        "trains on the generic words that a model without the text would say in its place",
        _needs("forget-rows forget-labels"),
        paper="whos-harry-potter",
        variants=(("retain_weight=1.0", _needs("forget-rows forget-labels retain-rows retain-labels")),),
    ),
    Method(
        "forget.ECO",
        "forget",
        "engram.forget.eco",
        "reads prompts that a classifier flags with noise on their embeddings; the weights stay",
        _needs("forget-rows forget-labels retain-rows"),
        paper="eco-prompts",
        variants=(("strength=1.0", _needs("forget-rows retain-rows")),),
    ),
    Method(
        "forget.Needle",
        "forget",
        "engram.forget.needle",
        "destroys the one vector of an MLP that spells out a concept; all other weights keep their bits",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
        paper="concept-vectors",
        variants=(("vectors=[[0, 1]]", _needs("forget-rows forget-labels")),),
    ),
    Method(
        "forget.BadTeacher",
        "forget",
        "engram.forget.bad_teacher",
        "imitates a network that knows nothing on the forget rows, the old model on the retained ones",
        _needs("forget-rows retain-rows"),
    ),
    Method(
        "forget.SCRUB",
        "forget",
        "engram.forget.scrub",
        "leaves its teacher on the forget rows and stays with it on the retained ones, by turns",
        _needs("forget-rows retain-rows retain-labels"),
        variants=(("gamma=0", _needs("forget-rows retain-rows")),),
    ),
    Method(
        "forget.Amnesiac",
        "forget",
        "engram.forget.amnesiac",
        "trains on with random wrong labels on the forget rows, among the retained ones",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
    ),
    Method(
        "forget.SalUn",
        "forget",
        "engram.forget.salun",
        "random labels, learnt by those weights alone that matter most to the forget rows",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
    ),
    Method(
        "forget.SparseFinetune",
        "forget",
        "engram.forget.sparse_finetune",
        "trains on with the retained rows under an L1 penalty that fades",
        _needs("retain-rows retain-labels"),
    ),
    Method(
        "forget.Influence",
        "forget",
        "engram.forget.influence",
        "one Newton step to where the optimum would be without the forget rows",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
    ),
    Method(
        "forget.LAF",
        "forget",
        "engram.forget.laf",
        "drives embeddings of forget rows off their density and keeps those of retain rows; needs no label",
        _needs("forget-rows retain-rows"),
        paper="laf",
        variants=(("repair_epochs=1", _needs("forget-rows retain-rows retain-labels")),),
    ),
    Method(
        "forget.Blindspot",
        "forget",
        "engram.forget.blindspot",
        "answers for the forget rows as a briefly trained network that never saw them; for regressors",
        _needs("forget-rows retain-rows retain-labels recipe"),
        paper="deep-regression-unlearning",
    ),
    Method(
        "forget.GaussianFineTune",
        "forget",
        "engram.forget.gaussian",
        "trains on with targets for the forget rows that are drawn from all targets; for regressors",
        _needs("forget-rows forget-labels retain-rows retain-labels"),
        paper="deep-regression-unlearning",
    ),
    Method(
        "protect.BayesErrorNoise",
        "protect",
        "engram.protect.bayes_error_noise",
        "a bounded change of images that makes their classes overlap in the features of fresh networks",
        _needs(""),
        paper="provably-unlearnable-examples",
    ),
    Method(
        "audit.Accuracy",
        "audit",
        "engram.audit.accuracy",
        "accuracy on forget, retain and test rows, beside the oracles'",
        _needs("model"),
    ),
    Method(
        "audit.Membership",
        "audit",
        "engram.audit.membership",
        "membership inference by loss: ROC, AUC and true positives at 1% false positives",
        _needs("model forget test"),
    ),
    Method(
        "audit.Representation",
        "audit",
        "engram.audit.representation",
        "what the representation still holds: CKA, nearest neighbours and linear probes",
        _needs("model"),
        paper="are-we-truly-forgetting",
    ),
    Method(
        "audit.Compatibility",
        "audit",
        "engram.audit.compatibility",
        "search with a new encoder's vectors among those that the old one has stored",
        _needs("model before test"),
        paper="bt2",
    ),
    Method(
        "audit.RetrainGap",
        "audit",
        "engram.audit.retrain_gap",
        "how far every figure lies from that of models retrained without the forget rows",
        _needs("model forget retain test oracles"),
    ),
    Method(
        "audit.LiRA",
        "audit",
        "engram.audit.lira",
        "each forget row against shadow models with and without it: AUC, true positives at low FPR",
        _needs("model forget retain test recipe"),
    ),
    Method(
        "audit.ULiRA",
        "audit",
        "engram.audit.ulira",
        "can models that unlearned each row be told from models that never saw it?",
        _needs("model request forget retain recipe forgetter"),
    ),
    Method(
        "audit.KLoM",
        "audit",
        "engram.audit.klom",
        "how far margins over many unlearned models lie from those over many retrained ones",
        _needs("model request forget retain test recipe forgetter"),
    ),
    Method(
        "audit.ForgettingScore",
        "audit",
        "engram.audit.forgetting_score",
        "the score of the NeurIPS 2023 competition: privacy of the forget rows times utility",
        _needs("model request forget retain test recipe forgetter"),
    ),
    Method(
        "audit.RelearnTime",
        "audit",
        "engram.audit.relearn",
        "batches of training until the forget rows are known again",
        _needs("model before forget retain"),
    ),
    Method(
        "audit.AIN",
        "audit",
        "engram.audit.relearn",
        "the anamnesis index: relearn time over that of retrained models",
        _needs("model before forget retain oracles"),
    ),
    Method(
        "audit.ActivationDistance",
        "audit",
        "engram.audit.activation_distance",
        "distance of the class probabilities on forget rows from those of retrained models",
        _needs("model forget oracles"),
    ),
    Method(
        "audit.Memorization",
        "audit",
        "engram.audit.memorization",
        "how much of an answer must be given before the rest comes verbatim",
        _needs("model forget"),
    ),
    Method(
        "audit.Quantization",
        "audit",
        "engram.audit.quantization",
        "what coarser weights bring back of the forgotten",
        _needs("model forget retain"),
    ),
    Method(
        "audit.ZRF",
        "audit",
        "engram.audit.zrf",
        "zero-retrain forgetting: likeness to an untrained network on forget rows",
        _needs("model forget"),
    ),
    Method(
        "audit.Predictions",
        "audit",
        "engram.audit.predictions",
        "W1 distance between the predictions on forget rows and retrained models'; for regressors too",
        _needs("model forget oracles"),
    ),
    Method(
        "audit.ConceptVectors",
        "audit",
        "engram.audit.concept_vectors",
        "what is left of the vectors that carry a concept in the weights, and of the answers about it",
        _needs("model before forget retain"),
        paper="concept-vectors",
    ),
    Method(
        "audit.TOFU",
        "audit",
        "engram.audit.tofu",
        "probability, ROUGE-L, truth ratio, model utility and forget quality of answers to questions",
        _needs("model forget retain"),
    ),
    Method(
        "audit.Restor",
        "audit",
        "engram.audit.restor",
        "whether unlearning wrong facts brings the right ones back, and where the probability lies",
        _needs("model before test oracles"),
        paper="restor",
    ),
    Method(
        "audit.InContextReintroduction",
        "audit",
        "engram.audit.in_context",
        "what of the forgotten a prompt brings back, how many tokens that takes, and what a filter changes",
        _needs("model before forget"),
        paper="ununlearning",
    ),
)
