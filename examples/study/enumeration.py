"""Part d: bias and variance of GARL and PAFT without sampling, on a model with three kinds of rationale.

z ~ softmax(theta) over three kinds, y ~ softmax(phi[z]) over three answers. A pool of M rationales is known by how many
of each kind it holds, so expectations are sums over counts with their multinomial probabilities, for M up to millions.
Gradients are with respect to (theta, phi), of the reward's side: grad P / P^q is exact, without the factor 1/M^q.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from examples.study.sigmoid import fitted_slope

QS = (0.25, 0.5, 0.75, 1.0)
FAMILIES = ("rare", "hard")
POWERS = (-1.5, -2.0, -2.5, -3.0, -3.5, -4.0, -4.5, -5.0)
VARIANCE_QS = (0.0, *QS)
VARIANCE_SUCCESSES = (0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-6)
NUM_ANSWERS = 3
#: Expected successes in a pool, M·P, at which the exponent of P is read off in family "rare".
SUCCESSES = 400
#: Standard deviations of a count that the sum spans; what lies beyond weighs below 1e-25.
SPAN = 11.0


@dataclass(frozen=True)
class Model:
    """Chances of the kinds, and w = p(y*|z) of each. Both [3]."""

    prior: tuple[float, float, float]
    weight: tuple[float, float, float]

    @property
    def success(self) -> float:
        """P."""
        return sum(p * w for p, w in zip(self.prior, self.weight, strict=True))

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """grad ln p(z) and grad ln p(y*|z) of each kind, [3, 3 + 9] float64; y* is answer 0, the others share."""
        rationale, answer = torch.zeros(3, 12, dtype=torch.float64), torch.zeros(3, 12, dtype=torch.float64)
        rationale[:, :3] = torch.eye(3, dtype=torch.float64) - torch.tensor(self.prior, dtype=torch.float64)
        for z, w in enumerate(self.weight):
            block = answer[z, 3 + NUM_ANSWERS * z : 3 + NUM_ANSWERS * (z + 1)]
            block[:] = -(1.0 - w) / (NUM_ANSWERS - 1)
            block[0] = 1.0 - w
        return rationale, answer

    def exact_gradient(self, q: float) -> torch.Tensor:
        """grad P / P^q = -grad l_q, [12]."""
        rationale, answer = self.scores()
        mass = torch.tensor([p * w for p, w in zip(self.prior, self.weight, strict=True)], dtype=torch.float64)
        return mass @ (rationale + answer) / self.success**q


def model_of(family: str, success: float) -> Model:
    """The family at success probability P.

    "rare": some rationales succeed, with w = 0.9 and 0.4, and are seldom drawn, so that w / P is unbounded as P → 0.
    "hard": every rationale has a small w, so that w / P is bounded. ValueError: no such family.
    """
    if family == "hard":
        return Model((0.3, 0.3, 0.4), (2.0 * success, 0.8 * success, 0.4 * success))
    if family == "rare":
        share = 0.9 * success / (1.3 - 0.2 * success)
        return Model((share, share, 1.0 - 2.0 * share), (0.9, 0.4, success / 10.0))
    raise ValueError(f"family {family!r} is none of {', '.join(FAMILIES)}")


def pools(model: Model, num_rationales: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts of each kind [T, 3], their probabilities [T]) of all pools, or of those that weigh anything."""
    ranges = []
    for p in model.prior[:2]:
        mean, spread = num_rationales * p, SPAN * math.sqrt(num_rationales * p * (1.0 - p)) + 40.0
        ranges.append(torch.arange(max(0, int(mean - spread)), min(num_rationales, int(mean + spread)) + 1))
    count_T2 = torch.cartesian_prod(*ranges).double()
    last_T = num_rationales - count_T2.sum(dim=1)
    count_T3 = torch.cat([count_T2, last_T[:, None]], dim=1)[last_T >= 0]
    log_prior = torch.tensor(model.prior, dtype=torch.float64).log()
    log_ways_T = math.lgamma(num_rationales + 1) - torch.lgamma(count_T3 + 1.0).sum(dim=1)
    return count_T3, torch.exp(log_ways_T + count_T3 @ log_prior)


@dataclass(frozen=True)
class Moments:
    """bias: |E g - exact gradient|, with the exact gradient's own length. Variances are traces of the covariance."""

    bias: float
    exact: float
    variance_garl: float
    variance_paft: float


def moments(model: Model, q: float, num_rationales: int) -> Moments:
    """Of GARL (eq. 12, leave-one-out baseline) and PAFT (eq. 14, K = M); both have the same mean (Prop. D.3)."""
    count_T3, chance_T = pools(model, num_rationales)
    weight_3 = torch.tensor(model.weight, dtype=torch.float64)
    rationale, answer = model.scores()
    joint = rationale + answer
    mean_T = count_T3 @ weight_3 / num_rationales
    plug_T3 = count_T3 * weight_3 / (num_rationales * mean_T[:, None] ** q)
    plug_in = plug_T3 @ joint
    expected = chance_T @ plug_in
    garl_variance = float("nan")
    if num_rationales >= 2:
        # Of the others of a rationale of kind z there is one fewer of its kind.
        others_T3 = torch.stack(
            [(count_T3 - torch.eye(3, dtype=torch.float64)[z]).clamp(min=0.0) @ weight_3 for z in range(3)], dim=1
        ) / (num_rationales - 1)
        baseline_T3 = count_T3 / num_rationales * others_T3 ** (1.0 - q)
        garl = (plug_T3 - baseline_T3) @ rationale + plug_T3 @ answer
        garl_variance = _trace(garl, chance_T)
    share_T3 = plug_T3 / plug_T3.sum(dim=1, keepdim=True)
    drawn = share_T3 @ joint.square().sum(dim=1) - (share_T3 @ joint).square().sum(dim=1)
    resampling = float(chance_T @ (mean_T ** (2.0 * (1.0 - q)) * drawn)) / num_rationales
    exact = model.exact_gradient(q)
    return Moments(
        bias=float((expected - exact).norm()),
        exact=float(exact.norm()),
        variance_garl=garl_variance,
        variance_paft=_trace(plug_in, chance_T) + resampling,
    )


def _trace(gradient_TD: torch.Tensor, chance_T: torch.Tensor) -> float:
    """Of the covariance, around the mean for the digits' sake."""
    centred = gradient_TD - chance_T @ gradient_TD
    return float(chance_T @ centred.square().sum(dim=1))


def bias_table(qs: Sequence[float] = QS, powers: Sequence[float] = POWERS) -> dict[str, Any]:
    """M · bias against P in both families with its fitted exponent, and bias against M with its exponent.

    "rare" is taken at M = SUCCESSES / P, where the expansion in 1/(M P) holds; "hard" at M = 128.
    """
    exponents, scaling = [], []
    for family, q in itertools.product(FAMILIES, qs):
        sizes = [round(SUCCESSES / 10**power) if family == "rare" else 128 for power in powers]
        scaled = [m * moments(model_of(family, 10**power), q, m).bias for power, m in zip(powers, sizes, strict=True)]
        last = [i for i, power in enumerate(powers) if power <= -3]
        slope = fitted_slope([powers[i] for i in last], [math.log10(scaled[i]) for i in last])
        exponents.append({"family": family, "q": q, "powers": list(powers), "scaled": scaled, "exponent": slope})
        num = [2, 4, 8, 16, 32, 64, 128] if family == "hard" else [2**n for n in range(1, 18)]
        results = [moments(model_of(family, 1e-3), q, m) for m in num]
        slope = fitted_slope([math.log(m) for m in num[-3:]], [math.log(result.bias) for result in results[-3:]])
        relative = [result.bias / result.exact for result in results]
        scaling.append({"family": family, "q": q, "num_rationales": num, "relative_bias": relative, "exponent": slope})
    return {"exponents": exponents, "scaling": scaling}


def variance_table(
    qs: Sequence[float] = VARIANCE_QS, successes: Sequence[float] = VARIANCE_SUCCESSES, num: int = 32
) -> dict[str, Any]:
    """Variance of PAFT over GARL's at M = K = num, for P of both families."""
    rows = []
    for family, q in itertools.product(FAMILIES, qs):
        results = [moments(model_of(family, success), q, num) for success in successes]
        rows.append(
            {
                "family": family,
                "q": q,
                "successes": list(successes),
                "ratio": [result.variance_paft / result.variance_garl for result in results],
                "garl_noise": [math.sqrt(result.variance_garl) / result.exact for result in results],
            }
        )
    return {"rows": rows, "num_rationales": num}
