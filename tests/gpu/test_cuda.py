"""On a GPU: the head, a step and decoding against the CPU's results; NCCL where there are two."""

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.gpu.workload import greedy, head, same_rollouts, same_step, steps

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}


def _one_process(runtime):
    return {dtype: (head(runtime, dtype), steps(runtime, dtype)) for dtype in TOLERANCE}, greedy(runtime)


def _parallel(runtime):
    return steps(runtime, "float32", sequence_parallel=True), greedy(runtime)


@pytest.fixture(scope="module")
def on_cpu():
    return run_ranks(_one_process)[0]


@pytest.fixture(scope="module")
def on_cuda():
    return run_ranks(_one_process, device="cuda")[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_heads_values_and_gradients_are_the_cpus(on_cpu, on_cuda, dtype):
    for name, expected in on_cpu[0][dtype][0].items():
        for mine, theirs in zip(on_cuda[0][dtype][0][name], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_garl_and_a_paft_step_are_the_cpus(on_cpu, on_cuda, dtype):
    for case, expected in on_cpu[0][dtype][1].items():
        same_step(on_cuda[0][dtype][1][case], expected, TOLERANCE[dtype])


def test_greedy_decoding_is_the_cpus(on_cpu, on_cuda):
    same_rollouts(on_cuda[1], on_cpu[1], 1e-3)


def test_two_gpus_under_tensor_parallelism_find_the_same(on_cpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for found, rollouts in run_ranks(_parallel, device="cuda", tp=2):
        for case, step in found.items():
            expected = on_cpu[0]["float32"][1][case]
            torch.testing.assert_close(step.log_w_BM, expected.log_w_BM, rtol=1e-4, atol=1e-3)
        same_rollouts(rollouts, on_cpu[1], 1e-3)
