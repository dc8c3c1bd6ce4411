"""Part c: label noise. The two-label model (theory and gradient flow), and the policy's runs on flipped labels.

Two labels, the wrong one with frequency eps. J = (1-eps) l_q(1-p) + eps l_q(p) for p = P(wrong label).
"""

import math
from typing import Any

import torch

from examples.study.policy_runs import QS, PolicyRun, method_flags
from megatron_jq.objective.tsallis import jq_loss

NOISE = (0.0, 0.1, 0.3)
SEEDS = (1, 2)
WARM_ITERS, NOISY_ITERS, SCRATCH_ITERS = 120, 300, 300
#: Of the two-label model.
EPSILONS = (0.3, 0.1, 0.03, 0.01)


def escort(eps: float, q: float) -> float:
    """P(wrong label) of the minimiser, exactly: theta_j ∝ a_j^(1/q) for label frequencies a (Thm 3.1); q = 0: 0."""
    if q == 0.0 or eps == 0.0:
        return 0.0
    odds = (eps / (1.0 - eps)) ** (1.0 / q)
    return odds / (1.0 + odds)


def small_noise_limit(eps: float, q: float) -> float:
    """Eq. (17): (eps/(1-eps))^(1/q), the escort's odds, which its probability tends to as eps → 0."""
    return (eps / (1.0 - eps)) ** (1.0 / q)


def equilibrium(eps: float, q: float, *, steps: int = 4000) -> float:
    """P(wrong label) where the package's own loss has its minimum, from the middle, by Newton's steps on the logit.

    RuntimeError where they do not settle.
    """
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        loss = two_label_loss(theta, eps, q)
        (slope,) = torch.autograd.grad(loss, theta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, theta)
        # Away from the minimum the loss may be concave: then a plain step downhill.
        move = slope / curvature if curvature > 0 and abs(slope / curvature) < 1 else slope.sign() * 0.5
        with torch.no_grad():
            theta -= move.detach()
        if abs(move.item()) < 1e-13:
            return torch.sigmoid(theta).item()
    raise RuntimeError(f"no equilibrium within {steps} steps at eps = {eps}, q = {q}")


def two_label_loss(theta: torch.Tensor, eps: float, q: float) -> torch.Tensor:
    """J_Q of P(wrong label) = sigmoid(theta)."""
    right, wrong = torch.nn.functional.logsigmoid(-theta), torch.nn.functional.logsigmoid(theta)
    return (1.0 - eps) * jq_loss(right, q) + eps * jq_loss(wrong, q)


def two_label_table(_work: Any = None) -> dict[str, Any]:
    """Per q above 0 and eps: the loss's minimum, the escort distribution and eq. (17)."""
    rows = [
        {
            "q": q,
            "eps": eps,
            "minimum": equilibrium(eps, q),
            "escort": escort(eps, q),
            "limit": small_noise_limit(eps, q),
        }
        for q in QS
        if q > 0
        for eps in EPSILONS
    ]
    worst = max(abs(math.log(row["minimum"] / row["escort"])) for row in rows)
    return {"rows": rows, "worst_log_error": worst}


def noise_runs() -> list[PolicyRun]:
    """The task `colour`. First without noise, to P near 1; from there on noisy labels, at every q. And from random
    weights at the largest noise: which label does a policy commit to that has not seen clean ones?
    """
    runs = [
        PolicyRun(f"clean-seed{seed}", "colour", seed, _flags(1.0, WARM_ITERS), keep_weights=True, evaluated=False)
        for seed in SEEDS
    ]
    for seed in SEEDS:
        for noise in NOISE:
            for q in QS:
                # A third of the rate: P moves around its equilibrium, and less so with smaller steps.
                flags = (*_flags(q, NOISY_ITERS), "--lr", "2e-3", "--eval-interval", "25")
                name, warm = f"noise{noise:g}-q{q:g}-seed{seed}", f"clean-seed{seed}"
                runs.append(PolicyRun(name, "colour", seed, flags, noise=noise, warm=warm, flipped=noise > 0))
        for q in QS:
            name = f"scratch-noise{NOISE[-1]:g}-q{q:g}-seed{seed}"
            runs.append(PolicyRun(name, "colour", seed, _flags(q, SCRATCH_ITERS), noise=NOISE[-1], flipped=True))
    return runs


def _flags(q: float, train_iters: int) -> tuple[str, ...]:
    return (*method_flags(f"garl-{q:g}"), "--train-iters", str(train_iters))
