"""The CUDA path without a GPU: tensors that lie on `cuda` by name, and results held against the CPU's.

A tensor left on the host where it meets one of the device, or goes into a collective, fails here.
"""

import json
from collections import Counter

import pytest
import torch

from megatron_jq.cli.main import main
from megatron_jq.model.flash import flash, flash_backward
from megatron_jq.rollout.megatron import MegatronEngine
from megatron_jq.train.passes import BatchOptions
from tests.distributed.ranks import run_apart, run_ranks
from tests.gpu import pretend
from tests.gpu.pretend import DeviceMismatch, pretended_cuda
from tests.gpu.workload import (
    LAYOUTS,
    REQUESTS,
    SAMPLED,
    greedy,
    head,
    one_step,
    policy_on,
    same_rollouts,
    same_step,
    sampled,
    steps,
)

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.05}


def _one_process(runtime):
    """Results by name, and the devices of parameters and gradients."""
    policy, _ = policy_on(runtime)
    return {
        "places": {(str(p.device), str(p.main_grad.device)) for p in policy.parameters()},
        "steps": {dtype: steps(runtime, dtype) for dtype in TOLERANCE},
        "head": {dtype: head(runtime, dtype) for dtype in TOLERANCE},
        "greedy": greedy(runtime),
        "sampled": sampled(runtime),
    }


@pytest.fixture(scope="module")
def on_cpu():
    return run_ranks(_one_process)[0]


@pytest.fixture(scope="module")
def on_cuda():
    return run_ranks(_one_process, device="cuda", around=pretended_cuda)[0]


def test_parameters_and_gradients_lie_on_the_device(on_cuda):
    assert on_cuda["places"] == {("cuda:0", "cuda:0")}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_scores_and_gradients_are_the_cpus(on_cpu, on_cuda, dtype):
    assert len(on_cuda["steps"][dtype]) == 2 * len(LAYOUTS)
    for case, expected in on_cpu["steps"][dtype].items():
        same_step(on_cuda["steps"][dtype][case], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_head_is_the_cpus(on_cpu, on_cuda, dtype):
    for name, expected in on_cpu["head"][dtype].items():
        for got, wanted in zip(on_cuda["head"][dtype][name], expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_rollouts_are_the_cpus(on_cpu, on_cuda, kind):
    same_rollouts(on_cuda[kind], on_cpu[kind], 1e-4)


def _parallel(runtime):
    return steps(runtime, "float32", estimators=("garl",), sequence_parallel=True), greedy(runtime)


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"dp": 2}], ids=["TP2xPP2", "DP2"])
def test_what_ranks_exchange_lies_on_the_device(layout, on_cpu):
    for actual, rollouts in run_ranks(_parallel, device="cuda", around=pretended_cuda, **layout):
        for case, step in actual.items():
            expected = on_cpu["steps"]["float32"][case]
            torch.testing.assert_close(step.log_w_BM, expected.log_w_BM, rtol=1e-5, atol=1e-4)
        same_rollouts(rollouts, on_cpu["greedy"], 1e-4)


def _waits(runtime):
    """What the host waits for: in passes of 3 micro-batches, in passes of 9, in decoding."""
    policy, model = policy_on(runtime)
    waits = []
    for size in (3, 1):
        pretend.WAITS.clear()
        one_step(runtime, policy, model, "garl", BatchOptions(micro_batch_size=size))
        waits.append(Counter(pretend.WAITS))
    pretend.WAITS.clear()
    MegatronEngine([policy], runtime).generate(REQUESTS, SAMPLED)
    return *waits, Counter(pretend.WAITS)


def test_the_host_waits_once_a_token_in_decoding_and_in_no_micro_batch():
    [(few, many, decoding)] = run_ranks(_waits, device="cuda", around=pretended_cuda)
    assert few and many == few, "micro-batches wait"
    draws = SAMPLED.rationale_budget + SAMPLED.answer_budget
    assert 0 < decoding.pop("tolist") <= draws + 3, "and one to three scoring passes"
    assert sum(decoding.values()) <= 6, decoding  # at the beginning of a wave


RUNS = {
    "grpo, distributed optimizer": (
        "--estimator grpo --grpo-iterations 2 --grpo-kl-beta 0.1 --bf16 --use-distributed-optimizer --async-save"
    ),
    "experts": "--model tiny-moe --score-with rollout",
}


def _run(folder, flags) -> int:
    run = f"--run-dir {folder}/run --prompts-per-step 2 --num-rationales 2 --rationale-budget 3"
    run += f" --train-examples 8 --eval-examples 1 --device cuda --save-interval 1 --no-tensorboard {flags}"
    with pretended_cuda():
        assert main(["train", *run.split(), "--train-iters", "1"]) == 0
        return main(["train", *run.split(), "--train-iters", "2", "--resume"])


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_run_trains_saves_and_resumes(flags, tmp_path):
    assert run_apart(_run, tmp_path, flags) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and None not in losses


# What the flash kernels refuse


def _without_kernels(channels: int):
    """Output and gradients of bfloat16 heads that the emulated kernels do not take, and the same in float32."""
    g = torch.Generator().manual_seed(1)
    q, grad = (torch.randn(2, 5, 4, channels, generator=g).bfloat16() for _ in range(2))
    k, v = (torch.randn(2, 5, 2, channels, generator=g).bfloat16() for _ in range(2))

    def attend(*tensors):
        out, lse, extra = flash(*tensors[:3], causal=True, scale=0.3)
        return (
            lse.cpu(),
            out.cpu(),
            *(x.cpu() for x in flash_backward(tensors[3], *tensors[:3], out, lse, extra, causal=True, scale=0.3)),
        )

    with pretended_cuda():
        actual = attend(*(x.to("cuda") for x in (q, k, v, grad)))
    return actual, attend(*(x.float() for x in (q, k, v, grad)))


@pytest.mark.parametrize("channels", [12, 264])
def test_heads_that_no_flash_kernel_takes_are_computed_plainly(channels):
    actual, expected = run_apart(_without_kernels, channels)
    assert actual[0].dtype == torch.float32 and {x.dtype for x in actual[1:]} == {torch.bfloat16}
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


# The instrument itself


def _refused(work) -> bool:
    try:
        work()
    except DeviceMismatch:
        return True
    return False


def _mixtures() -> dict[str, bool]:
    with pretended_cuda():
        on_host, there, index = torch.ones(3, 4), torch.ones(3, 4, device="cuda"), torch.tensor([0, 2])
        parameter = torch.ones(4, device="cuda", requires_grad=True)
        (there * parameter).sum().backward()
        pretend.WAITS.clear()
        there[there > 0].sum().item()
        return {
            "places": str(parameter.grad.device) == str((there @ there.t())[0].device) == "cuda:0" and there.is_cuda,
            "moves": there.cpu().device == there.to(on_host).device == on_host.device == torch.device("cpu"),
            "waits": pretend.WAITS["boolean index"] == pretend.WAITS["_local_scalar_dense"] == 1,
            "sum": _refused(lambda: on_host + there),
            "gradient": _refused(lambda: (there * parameter).backward(on_host)),
            "out": _refused(lambda: torch.mm(there, there.t(), out=torch.empty(3, 3))),
            "the host's tensor by the device's index": _refused(lambda: on_host[index.to("cuda")]),
            "put": _refused(lambda: there.index_put_((index,), torch.ones(2, 4))),
            "cat": _refused(lambda: torch.cat([on_host, there])),
            "where": _refused(lambda: torch.where(on_host > 0, there, 0.0)),
            "a number of the host": not _refused(lambda: there * torch.tensor(2.0)),
            "the device's tensor by the host's index": not _refused(lambda: there[index]),
            "copy": not _refused(lambda: there.copy_(on_host)),
        }


def test_the_instrument_refuses_what_torch_refuses_where_there_is_a_gpu():
    actual = run_apart(_mixtures)
    assert all(actual.values()), actual


def _all_reduce_of_the_host(runtime) -> bool:
    torch.distributed.all_reduce(torch.ones(2, device="cuda"))
    return _refused(lambda: torch.distributed.all_reduce(torch.ones(2)))


def test_the_instruments_collectives_refuse_the_hosts_tensors():
    assert run_ranks(_all_reduce_of_the_host, device="cuda", around=pretended_cuda) == [True]
