"""A variational autoencoder that classifies, and says how unlike what it learnt a row is.

Mundt, Pliushch, Majumder, Hong, Ramesh: Unified Probabilistic Deep Continual Learning through Generative Replay and
Open Set Recognition. J. Imaging 2022, arXiv 1905.12019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.errors import EngramError, unknown
from engram.models.config import Configured
from engram.models.encoders import MLP, Encoder
from engram.models.head import class_ids
from engram.models.heads import LinearHead, SolvedHead
from engram.models.output import Output
from engram.models.predictor import Predictor, supervised_loss
from engram.stats.tails import Tail, outlier

COLUMNS = ("values", "pixel_values")
LIKELIHOODS = ("bernoulli", "gaussian")
OVER = ("predicted", "min")


def cosine_distance(z: Tensor, means: Tensor) -> Tensor:
    """1 - cosine of codes [B, d] with means [K, d]: [B, K], in [0, 2]."""
    return 1 - F.normalize(z, dim=1, eps=1e-12) @ F.normalize(means, dim=1, eps=1e-12).T


def euclidean_distance(z: Tensor, means: Tensor) -> Tensor:
    """Euclidean distances of codes [B, d] from means [K, d]: [B, K]."""
    return torch.cdist(z, means, compute_mode="donot_use_mm_for_euclid_dist")


def mixed_distance(z: Tensor, means: Tensor) -> Tensor:
    """The mean of both."""
    return (cosine_distance(z, means) + euclidean_distance(z, means)) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": cosine_distance,
    "euclidean": euclidean_distance,
    "mixed": mixed_distance,
}


class VariationalEncoder(Encoder):
    """`trunk`: any encoder; after it two linear maps without bias to the mean and the deviation of a code of `latent`
    numbers. The deviation is the map's raw output: its sign means nothing.

    Answers with the mean as `.pooler_output` and the deviation as `.extra["deviation"]`, both [B, latent]. The two maps
    start as Kaiming's, from torch's global generator.
    """

    def __init__(self, trunk: nn.Module, latent: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.width = latent
        width = int(trunk.width)  # type: ignore[arg-type]
        self.mean, self.deviation = (nn.Linear(width, latent, bias=False) for _ in range(2))
        for part in (self.mean, self.deviation):
            nn.init.kaiming_normal_(part.weight)

    def forward(self, **inputs: Any) -> Output:
        hidden = self.trunk(**inputs).pooler_output.flatten(1)
        return Output(pooler_output=self.mean(hidden), extra={"deviation": self.deviation(hidden)})


class Decoder(Configured, nn.Module):
    """Codes [B, latent] in, [B, outputs] out, through hidden layers with batch statistics and ReLU."""

    def __init__(self, latent: int, outputs: int, hidden: Sequence[int] = (400, 400)) -> None:
        super().__init__()
        self.trunk = MLP(latent, hidden, norm="batch")
        self.out = nn.Linear(self.trunk.width, outputs)
        nn.init.kaiming_normal_(self.out.weight)

    def forward(self, code: Tensor) -> Tensor:
        return self.out(self.trunk(values=code).pooler_output)


class Tails(SolvedHead):
    """Per class: the mean of its codes, and the law of the largest distances from it.

    Called with codes [B, d] it gives the outlier probability omega_c of every class, [B, W] in [0, 1]; -inf for classes
    without a tail. `distance`: "cosine", "euclidean", or "mixed", half of each. `over`: a code's own omega is that of
    the "predicted" class, or the "min" over classes. All in float64. EngramError for an unknown choice.
    """

    rows: ClassVar[tuple[str, ...]] = ("means", "start", "scale", "shape")
    means: Tensor
    start: Tensor
    scale: Tensor
    shape: Tensor

    def __init__(self, width: int, distance: str = "cosine", over: str = "predicted", classes_total: int = 0) -> None:
        super().__init__(width, classes_total)
        if distance not in DISTANCES:
            raise unknown("distance of codes", distance, DISTANCES)
        if over not in OVER:
            raise unknown("way to sum up the classes' outlier probabilities (over)", over, OVER)
        self.distance, self.over = distance, over
        self.register_buffer("means", torch.empty(0, width, dtype=torch.float64))
        for name in self.rows[1:]:
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def scores(self, features: Tensor) -> Tensor:
        distances = DISTANCES[self.distance](features.to(self.means), self.means)
        return outlier(distances, self.start, self.scale.clamp(min=1e-12), self.shape)

    def set(self, classes: Sequence[int], means: Tensor, tails: Sequence[Tail]) -> None:
        """The mean codes [k, d] and tails of these classes; all others have none from now on."""
        self.retire(self.live.nonzero().flatten())
        laws = torch.tensor([[t.start, t.scale, t.shape] for t in tails], dtype=torch.float64).reshape(-1, 3)
        self._put(classes, means=means, **dict(zip(self.rows[1:], laws.T, strict=True)))

    def keep(self, classes: Tensor) -> None:
        """Let go of the tails of all classes but these."""
        kept = set(class_ids(classes))
        self.retire([c for c in self.live.nonzero().flatten().tolist() if c not in kept])

    def outlier(self, code: Tensor, logits: Tensor) -> Tensor:
        """omega [B] of codes [B, d] whose classes have these logits [B, W]; 1 where there is no tail."""
        omega = self(code)
        omega = F.pad(omega, (0, max(0, logits.shape[1] - omega.shape[1])), value=-torch.inf)
        omega = torch.where(torch.isneginf(omega), 1.0, omega)
        return omega.amin(1) if self.over == "min" else omega.gather(1, logits.argmax(1, keepdim=True))[:, 0]


class OpenClassifier(Predictor):
    """Logits by a linear map of a row's mean code, and `.novelty` [B] in [0, 1]: its outlier probability omega.

    encoder  a `VariationalEncoder`; reads rows less `shift` over `scale`, two numbers in buffers
    head     linear, without bias
    decoder  codes [B, d] -> logits of pixels, or means of standardised numbers
    tails    of the classes' mean codes; drawn: of codes that were drawn, mean + deviation · noise

    Drawn codes spread wider than mean codes, so like is compared with like: a row's omega is that of its mean code by
    `tails`, a generated row's that of its code by `drawn`. `likelihood`: "bernoulli" wants rows in [0, 1].
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        decoder: nn.Module,
        tails: nn.Module,
        drawn: nn.Module,
        likelihood: str = "bernoulli",
    ) -> None:
        super().__init__(encoder, head)
        if likelihood not in LIKELIHOODS:
            raise unknown("likelihood", likelihood, LIKELIHOODS)
        self.decoder, self.tails, self.drawn, self.likelihood = decoder, tails, drawn, likelihood
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def standardised(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Inputs as the encoder reads them and the decoder tells them."""
        return {name: (value - self.shift) / self.scale for name, value in inputs.items()}

    def features(self, **inputs: Any) -> Tensor:
        return self.encoder(**self.standardised(**inputs)).pooler_output

    def forward(self, *, labels: Tensor | None = None, task: Tensor | None = None, **inputs: Any) -> Output:
        found = self.encoder(**self.standardised(**inputs))
        logits = self.head(found.pooler_output)
        found.loss = None if labels is None else supervised_loss(logits, labels)
        found.logits, found.novelty = logits, self.tails.outlier(found.pooler_output, logits)  # type: ignore[operator]
        return found

    def misfit(self, decoded: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Minus the log likelihood, in nats up to a constant, of every number of standardised inputs: [B, D].

        Bernoulli: cross-entropy of the sigmoid; Gaussian of variance 1: half of the squared error.
        """
        wanted = the_column(target)[1].flatten(1)
        if self.likelihood == "gaussian":
            return (decoded - wanted).square() / 2
        return F.binary_cross_entropy_with_logits(decoded, wanted, reduction="none")

    def generate(self, code: Tensor) -> Tensor:
        """Rows [B, D] of codes, in the units of the inputs."""
        decoded = self.decoder(code)
        return torch.sigmoid(decoded) if self.likelihood == "bernoulli" else decoded * self.scale + self.shift


def the_column(inputs: Mapping[str, Any]) -> tuple[str, Any]:
    """The one input that is read, by name. EngramError for others or several."""
    if len(inputs) != 1 or next(iter(inputs)) not in COLUMNS:
        raise EngramError(f"this model reads values or pixel_values alone; there is {', '.join(inputs) or 'nothing'}")
    return next(iter(inputs.items()))


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL of N(mean, deviation²) from N(0, 1), in nats, for every number of a code: [B, d]."""
    variance = deviation.square()
    return (mean.square() + variance - torch.log(variance + 1e-8) - 1) / 2


def open_classifier(
    trunk: nn.Module, classes: Sequence[int], outputs: int, latent: int, hidden: Sequence[int], likelihood: str,
    distance: str, over: str,
) -> OpenClassifier:  # fmt: skip
    """An untrained model, whose initial weights come from torch's global generator: for use under `seeded`."""
    head = LinearHead(latent, classes, bias=False)
    tails, drawn = (Tails(latent, distance, over) for _ in range(2))
    encoder, decoder = VariationalEncoder(trunk, latent), Decoder(latent, outputs, hidden)
    return OpenClassifier(encoder, head, decoder, tails, drawn, likelihood)
