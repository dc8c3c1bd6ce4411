"""Part a: how long the scalar model P = sigmoid(theta) takes from p0 to delta under gradient flow on l_q.

The flow is integrated in time, its slope taken from the package's loss by autograd, and compared with the paper's exact
integral (15), T_q(p0, delta) = integral of du / (u^(2-q) (1-u)^2). The slope of ln T against ln 1/p0 tends to 1-q.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from megatron_jq.objective.tsallis import jq_loss

QS = (0.0, 0.25, 0.5, 0.75, 1.0)
DELTA = 0.5
#: Powers of ten. Far: where the slopes are asked for; near: what a policy meets at its start.
FAR = tuple(range(-60, -29, 3))
NEAR = tuple(range(-12, -3, 1))


def velocity(theta_N: torch.Tensor, q: float) -> torch.Tensor:
    """d theta / dt = -d l_q / d theta of P = sigmoid(theta), elementwise."""
    theta_N = theta_N.detach().requires_grad_(True)
    (slope_N,) = torch.autograd.grad(jq_loss(torch.nn.functional.logsigmoid(theta_N), q).sum(), theta_N)
    return -slope_N


def flow_times(log_p0: Sequence[float], q: float, *, delta: float = DELTA, step: float = 0.05) -> list[float]:
    """Time of gradient flow until P = delta, for each start ln p0: Runge-Kutta steps of about `step` in theta."""
    log_p0_N = torch.tensor(log_p0, dtype=torch.float64)
    theta_N = log_p0_N - torch.log1p(-log_p0_N.exp())
    time_N, end = torch.zeros_like(theta_N), math.log(delta / (1.0 - delta))
    while not bool((theta_N >= end).all()):
        dt_N = torch.where(theta_N < end, step / velocity(theta_N, q), 0.0)
        theta_N, time_N = _runge_kutta(theta_N, dt_N, q), time_N + dt_N
    for _ in range(3):  # back to where the level was crossed
        dt_N = (end - theta_N) / velocity(theta_N, q)
        theta_N, time_N = _runge_kutta(theta_N, dt_N, q), time_N + dt_N
    return time_N.tolist()


def _runge_kutta(theta_N: torch.Tensor, dt_N: torch.Tensor, q: float) -> torch.Tensor:
    first = velocity(theta_N, q)
    second = velocity(theta_N + 0.5 * dt_N * first, q)
    third = velocity(theta_N + 0.5 * dt_N * second, q)
    fourth = velocity(theta_N + dt_N * third, q)
    return (theta_N + dt_N * (first + 2.0 * second + 2.0 * third + fourth) / 6.0).detach()


def integral_time(log_p0: float, q: float, *, delta: float = DELTA, panels: int = 400) -> float:
    """Eq. (15) by Gauss-Legendre quadrature in s = ln u, where the integrand is e^((q-1) s) / (1 - e^s)^2."""
    nodes, weights = numpy.polynomial.legendre.leggauss(12)
    edges = numpy.linspace(log_p0, math.log(delta), panels + 1)
    half = (edges[1:] - edges[:-1]) / 2.0
    s = (edges[1:] + edges[:-1])[:, None] / 2.0 + half[:, None] * nodes
    return float((half[:, None] * weights * numpy.exp((q - 1.0) * s) / numpy.expm1(s) ** 2).sum())


def fitted_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line."""
    return float(numpy.polyfit(x, y, 1)[0])


def escape_table(
    qs: Sequence[float] = QS, far: Sequence[int] = FAR, near: Sequence[int] = NEAR, *, step: float = 0.05
) -> dict[str, Any]:
    """Per q: times by flow and by integral at each power of ten, and the fitted slopes of both ranges."""
    rows = []
    for q in qs:
        powers = [*far, *near]
        log_p0 = [power * math.log(10.0) for power in powers]
        flow, exact = flow_times(log_p0, q, step=step), [integral_time(start, q) for start in log_p0]

        def slope(exponents: Sequence[int], times: Sequence[float], powers=powers) -> float:
            log_times = [math.log(times[powers.index(power)]) for power in exponents]
            return fitted_slope([-power * math.log(10.0) for power in exponents], log_times)

        rows.append(
            {
                "q": q,
                "powers": powers,
                "flow": flow,
                "integral": exact,
                "slope_far": slope(far, flow),
                "slope_near": slope(near, flow),
                "worst_relative_error": max(abs(a / b - 1.0) for a, b in zip(flow, exact, strict=True)),
            }
        )
    return {"rows": rows, "delta": DELTA}
