"""F1: what is wrong with a parallel layout: how it divides the model, and the processes."""

import math
import re

from megatron_jq.architecture import Architecture
from megatron_jq.config import Config, ParallelConfig


def layout_problems(config: Config, architecture: Architecture, world_size: int | None) -> list[str]:
    """A line for each reason why the model and the processes cannot be divided so. world_size None: not known yet."""
    p, a, problems = config.parallel, architecture, []
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    if tp < 1 or pp < 1:
        return []  # said by config_validate.py; nothing can be divided
    split = ["num_attention_heads", "num_query_groups"] + ["ffn_hidden_size"] * (a.num_experts is None)
    for name in split:
        if getattr(a, name) % tp:
            problems.append(f"--tensor-model-parallel-size {tp} does not divide {name} ({getattr(a, name)})")
    problems.extend(_pipeline_problems(config, architecture))
    if p.use_distributed_optimizer and config.optimizer.optimizer != "adam":
        problems.append("--use-distributed-optimizer is Megatron-core's for --optimizer adam alone; choose one of them")
    if p.sequence_parallel and tp == 1:
        problems.append("--sequence-parallel needs --tensor-model-parallel-size above 1")
    problems.extend(_expert_layout_problems(p, a, world_size))
    if world_size is None:
        return problems
    if world_size % (tp * pp):
        problems.append(
            f"{world_size} process(es) cannot be cut into tensor x pipeline groups of {tp} x {pp} = {tp * pp}: start a "
            "multiple of that (torchrun --nproc-per-node), or change --tensor-model-parallel-size or "
            "--pipeline-model-parallel-size"
        )
    return problems


def _expert_layout_problems(p: ParallelConfig, a: Architecture, world_size: int | None) -> list[str]:
    tp, ep = p.tensor_model_parallel_size, p.expert_model_parallel_size
    etp = tp if p.expert_tensor_parallel_size is None else p.expert_tensor_parallel_size
    if a.num_experts is None:
        if ep > 1 or p.expert_tensor_parallel_size is not None:
            return ["--expert-model-parallel-size and --expert-tensor-parallel-size need a model with experts"]
        return []
    if min(ep, etp, a.num_experts, a.moe_ffn_hidden_size or 0) < 1:
        return []  # said elsewhere; nothing can be divided
    problems = []
    if a.num_experts % ep:
        problems.append(f"--expert-model-parallel-size {ep} does not divide num_experts ({a.num_experts})")
    if a.moe_ffn_hidden_size % etp:
        flag = "tensor" if p.expert_tensor_parallel_size is None else "expert-tensor"
        problems.append(f"--{flag}-parallel-size {etp} does not divide moe_ffn_hidden_size ({a.moe_ffn_hidden_size})")
    if tp > 1 and not p.sequence_parallel:
        problems.append(
            f"--tensor-model-parallel-size {tp} with experts needs --sequence-parallel: Megatron-core refuses to train "
            "them without, since every tensor-parallel rank would send all tokens to the experts"
        )
    if etp != tp and (ep == 1 or etp * ep % tp):
        problems.append(
            f"--expert-tensor-parallel-size {etp}, other than --tensor-model-parallel-size {tp}, needs "
            f"--expert-model-parallel-size above 1, and their product to be a multiple of {tp}: give that size "
            f"{tp // math.gcd(tp, etp)} or leave the first flag out"
        )
    elif world_size is not None and world_size % (etp * ep * p.pipeline_model_parallel_size):
        replicas = f"(tensor {tp} x data {world_size // (tp * p.pipeline_model_parallel_size)} processes)"
        problems.append(
            f"--expert-model-parallel-size {ep} x {etp} processes an expert do not divide a pipeline stage {replicas}"
        )
    return problems


def _pipeline_problems(config: Config, architecture: Architecture) -> list[str]:
    p, layers, problems = config.parallel, architecture.num_layers, []
    pp, virtual = p.pipeline_model_parallel_size, p.num_virtual_stages_per_pipeline_rank
    if virtual > 1 and pp == 1:
        problems.append("--num-virtual-stages-per-pipeline-rank needs --pipeline-model-parallel-size above 1")
    layout = p.pipeline_model_parallel_layout
    if layout is not None:
        parts = layout.split("|")
        if re.fullmatch(r"Et*(\|t*)*L", layout) is None:
            problems.append(
                f"--pipeline-model-parallel-layout {layout}: write E, a t a layer, L, with | between stages: Et|ttL"
            )
        elif len(parts) != pp * virtual or layout.count("t") != layers:
            problems.append(
                f"--pipeline-model-parallel-layout {layout} has {len(parts)} stage(s), {layout.count('t')} layer(s); "
                f"{pp} x {virtual} stages and {layers} layers are asked for"
            )
    elif virtual > 0 and layers % (pp * virtual):
        times = f" x --num-virtual-stages-per-pipeline-rank {virtual}" if virtual > 1 else ""
        problems.append(
            f"--pipeline-model-parallel-size {pp}{times} does not divide num_layers ({layers}); "
            "--pipeline-model-parallel-layout takes uneven stages"
        )
    if p.context_parallel_size > 1:
        problems.append(
            f"--context-parallel-size {p.context_parallel_size}: attention over a sequence that is split needs "
            "Transformer Engine's attention, and this build attends through torch's; use --context-parallel-size 1"
        )
    if p.recompute_granularity == "full" and (p.recompute_method is None or p.recompute_num_layers is None):
        problems.append(
            "--recompute-granularity full needs --recompute-method uniform|block and --recompute-num-layers; "
            "uniform and 1 keep one activation a layer"
        )
    if p.recompute_granularity != "full" and (p.recompute_method is not None or p.recompute_num_layers is not None):
        problems.append("--recompute-method and --recompute-num-layers need --recompute-granularity full")
    return problems
