#!/usr/bin/env python3
"""Time and memory of the head, forward and backward, side by side in one process: ours against the common ways.

    python tools/bench_head.py                                        # float32, all rows and one row in eight
    torchrun --standalone --nproc-per-node 2 tools/bench_head.py      # the vocabulary over two ranks

Paths, all from hidden [T, H] and this rank's weight [V/tp, H] to the loss, d hidden and d weight (accumulated):
  gemms            the three matrix products alone, in our chunks: the bound
  megatron         full logits of all T rows, Megatron-core's vocab_parallel_cross_entropy, a mask for rows that count
  log_softmax      full logits, log-softmax (over the ranks) kept for the backward pass, gather
  recompute        linear_log_probs: chunks, logits made again in the backward pass
  weighted         weighted_log_probs: gradient formed in the forward pass (what training uses)
On CUDA also cut-cross-entropy and liger-kernel where they are installed (one rank).

Peak is memory beyond inputs and gradients, from the allocator on CUDA and from resident memory on CPU. Ratios are to
`megatron`: of times the median over turns of the ratio within a turn, in which all paths run one after the other, so
that a machine whose speed drifts blurs them less.
"""

import ctypes
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_jq.cli.parser import run_tool, tool_parser
from megatron_jq.parallel import runtime as runtime_module
from megatron_jq.parallel.logprob import linear_log_probs
from megatron_jq.parallel.runtime import Runtime
from megatron_jq.parallel.vocabulary import default_chunk_tokens
from megatron_jq.parallel.weighted_logprob import weighted_log_probs


@dataclass(frozen=True)
class Case:
    """One size. counting: the share of the T rows that the loss uses, as 1 / counting."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    counting: int


@dataclass(frozen=True)
class Result:
    path: str
    seconds: float  # median over turns
    of_megatron: float  # median over turns of the time's ratio to megatron's in the same turn
    peak_bytes: int


class Inputs:
    """Hidden states, this rank's weight with its gradient buffer, targets and coefficients of the rows that count."""

    def __init__(self, case: Case, runtime: Runtime):
        self.group = runtime.groups.tp
        dtype, device = getattr(torch, case.dtype), runtime.device
        shard = case.vocabulary // self.group.size()
        generator = torch.Generator(device).manual_seed(0)
        self.hidden = torch.randn(case.tokens, case.hidden, generator=generator, device=device).to(dtype)
        self.hidden.requires_grad_()
        generator.manual_seed(1 + self.group.rank())
        self.weight = (torch.randn(shard, case.hidden, generator=generator, device=device) * 0.02).to(dtype)
        self.weight.requires_grad_()
        self.weight.main_grad = torch.zeros(shard, case.hidden, device=device)
        generator.manual_seed(0)
        self.rows = torch.arange(0, case.tokens, case.counting, device=device)
        self.target = torch.randint(0, shard * self.group.size(), (case.tokens,), generator=generator, device=device)
        self.coefficient = torch.randn(len(self.rows), generator=generator, device=device, dtype=torch.float64)
        self.chunk = default_chunk_tokens(shard, device)

    def accumulate(self) -> None:
        """What Megatron-core's DDP hook does with a weight's gradient that autograd returned."""
        if self.weight.grad is not None:
            self.weight.main_grad.add_(self.weight.grad)
        self.weight.grad = self.hidden.grad = None


def gemms(x: Inputs) -> None:
    hidden = x.hidden.detach()[x.rows]
    with torch.no_grad():
        for i in range(0, len(hidden), x.chunk):
            part = hidden[i : i + x.chunk]
            logits = x.weight @ part.t()
            _ = logits.t() @ x.weight
            if logits.dtype == x.weight.main_grad.dtype:
                x.weight.main_grad.addmm_(logits, part)
            else:
                x.weight.main_grad.add_(logits @ part)


def megatron(x: Inputs) -> None:
    logits = (x.hidden @ x.weight.t()).float()
    log_prob = -vocab_parallel_cross_entropy(logits[:, None], x.target[:, None])[:, 0]
    coefficient = torch.zeros(len(log_prob), device=log_prob.device)
    coefficient[x.rows] = x.coefficient.float()
    (coefficient * log_prob).sum().backward()


def log_softmax(x: Inputs) -> None:
    logits = (x.hidden @ x.weight.t()).float()
    largest = logits.detach().amax(dim=-1)
    if x.group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=x.group)
    total = (logits - largest[:, None]).exp().sum(dim=-1)
    if x.group.size() > 1:
        total = dist.nn.functional.all_reduce(total, group=x.group)
    log_probs = logits - (largest + total.log())[:, None]
    column = x.target - x.group.rank() * logits.shape[1]
    on_this_shard = (column >= 0) & (column < logits.shape[1])
    picked = log_probs.gather(-1, column.where(on_this_shard, 0)[:, None])[:, 0] * on_this_shard
    (x.coefficient.float() * picked[x.rows]).sum().backward()


def recompute(x: Inputs) -> None:
    log_prob = linear_log_probs(x.hidden[x.rows], x.weight, x.target[x.rows], x.group)
    (x.coefficient.float() * log_prob).sum().backward()


def weighted(x: Inputs) -> None:
    weighted_log_probs(x.hidden[x.rows], x.weight, x.target[x.rows], x.coefficient, x.group)[0].backward()


def cut_cross_entropy(x: Inputs) -> None:
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(x.hidden[x.rows], x.weight, x.target[x.rows], reduction="none")
    (-x.coefficient.float() * loss).sum().backward()


def liger(x: Inputs) -> None:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # The kernel takes no coefficient a token: the unweighted sum, which is the same work.
    options = (None, None, -100, 0.0, 0.0, "sum")
    LigerFusedLinearCrossEntropyFunction.apply(x.hidden[x.rows], x.weight, x.target[x.rows], *options)[0].backward()


def paths(x: Inputs) -> dict[str, Callable[[Inputs], None]]:
    every = {f.__name__: f for f in (gemms, megatron, log_softmax, recompute, weighted)}
    if x.hidden.is_cuda and x.group.size() == 1:
        for package, function in (("cut_cross_entropy", cut_cross_entropy), ("liger_kernel", liger)):
            try:
                __import__(package)
            except ImportError:
                continue
            every[package] = function
    return every


class ResidentPeak:
    """Largest resident memory of this process above its start while entered, sampled every 2 ms (allocator on CUDA)."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return self
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the last path left would hide this one's
        self._process, self._ended = psutil.Process(), threading.Event()
        self._start = self._largest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self._largest = max(self._largest, self._process.memory_info().rss)

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._start
        else:
            self._ended.set()
            self._thread.join()
            self.bytes = self._largest - self._start


def measure(case: Case, runtime: Runtime, repeats: int, chosen: list[str] | None) -> list[Result]:
    """Paths in turn, `repeats` rounds after one warm-up round; median seconds of the slowest rank, largest peak."""
    x = Inputs(case, runtime)
    gradients = x.hidden.numel() * x.hidden.element_size()  # d hidden, which every path leaves
    every = {name: path for name, path in paths(x).items() if name in (chosen or [name]) or name == "megatron"}
    seconds: dict[str, list[float]] = {name: [] for name in every}
    peak = dict.fromkeys(every, 0)
    for turn in range(repeats + 1):
        for name, path in every.items():
            dist.barrier()
            with ResidentPeak(runtime.device) as memory:
                began = time.perf_counter()
                with runtime.megatron():
                    path(x)
                x.accumulate()
                if runtime.device.type == "cuda":
                    torch.cuda.synchronize()
                took = time.perf_counter() - began
            slowest = torch.tensor([took, memory.bytes - gradients], dtype=torch.float64, device=runtime.device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if turn:
                seconds[name].append(slowest[0].item())
            peak[name] = max(peak[name], int(slowest[1].item()))
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["megatron"], strict=True)] for name in every}
    return [
        Result(name, statistics.median(seconds[name]), statistics.median(ratios[name]), max(peak[name], 0))
        for name in every
    ]


def table(case: Case, ranks: int, results: list[Result]) -> str:
    plain = next(r for r in results if r.path == "megatron")
    counting = "all rows count" if case.counting == 1 else f"one row in {case.counting} counts"
    lines = [
        f"T={case.tokens} H={case.hidden} V={case.vocabulary} {case.dtype} TP={ranks}, {counting}",
        f"{'path':<18}{'seconds':>10}{'of megatron':>13}{'peak MB':>10}{'of megatron':>13}",
    ]
    for r in results:
        memory = r.peak_bytes / plain.peak_bytes if plain.peak_bytes else float("nan")
        times = f"{r.seconds:>10.3f}{r.of_megatron:>13.3f}"
        lines.append(f"{r.path:<18}{times}{r.peak_bytes / 2**20:>10.0f}{memory:>13.3f}")
    return "\n".join(lines)


def main() -> int:
    """Returns the exit code."""
    return run_tool(__file__, _run)


def _run() -> int:
    parser = tool_parser(__file__, __doc__)
    parser.add_argument("--tokens", type=int, help="rows T (default: 2048 on CPU, 16384 on CUDA)")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--counting", nargs="+", type=int, default=[1, 8], help="one row in N counts")
    parser.add_argument("--paths", nargs="+", help="these alone, and megatron; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", help="write the same figures here")
    args = parser.parse_args()
    ranks = runtime_module.world_size_from_environment()
    if args.vocab_size % ranks:
        parser.error(f"--vocab-size {args.vocab_size} must be a multiple of the {ranks} processes")
    runtime = runtime_module.start(
        tensor_model_parallel_size=ranks,
        pipeline_model_parallel_size=1,
        timeout=timedelta(minutes=10),
        seed=0,
        device=args.device,
    )
    tokens = args.tokens or (16_384 if runtime.device.type == "cuda" else 2048)
    written = []
    for dtype in args.dtype:
        for counting in args.counting:
            case = Case(tokens, args.hidden_size, args.vocab_size, dtype, counting)
            results = measure(case, runtime, args.repeats, args.paths)
            figures = [asdict(result) for result in results]
            written.append({"case": asdict(case), "tensor_model_parallel_size": ranks, "results": figures})
            if runtime.is_main:
                print(table(case, ranks, results) + "\n", flush=True)
    if runtime.is_main:
        print(f"threads {torch.get_num_threads()}, cores {os.cpu_count()}, torch {torch.__version__}, {runtime.device}")
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(written, file, indent=1)
    runtime_module.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
