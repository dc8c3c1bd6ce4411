"""In-memory export of a policy that is many times its largest tensor: memory beyond the weights stays near one tensor.

That the tensors are right, from every layout, is in test_hf_families.py.
"""

import sys
from pathlib import Path

import pytest

from megatron_jq.architecture import Architecture
from megatron_jq.checkpoint.export import export_hf_tensors
from megatron_jq.model.build import BuildOptions, build_policies
from tests.distributed.ranks import run_ranks

MANY = Architecture(
    num_layers=12, hidden_size=512, ffn_hidden_size=2048, num_attention_heads=8, num_query_groups=4, kv_channels=64,
    max_position_embeddings=64, vocab_size=16_384,
)  # fmt: skip


def _resident(name: str) -> int:
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return 1024 * int(line.split()[1])


def _peak(runtime) -> tuple[int, int, int]:
    """(bytes of all tensors, of the largest, peak of resident memory above what the process had before)."""
    policies = build_policies(MANY, BuildOptions(MANY.vocab_size), runtime)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, sizes = _resident("VmRSS"), [0]
    for _, tensor in export_hf_tensors(policies, runtime, MANY):
        sizes.append(tensor.nbytes)
    return sum(sizes), max(sizes), _resident("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_memory_is_that_of_a_tensor_and_a_message():
    (total, largest, main), (_, _, other) = run_ranks(_peak, tp=2)
    print(
        f"{total / 1e6:.0f} MB in all, largest {largest / 1e6:.0f} MB; peak {main / 1e6:.0f} and {other / 1e6:.0f} MB"
    )
    assert total > 6 * largest > 0
    assert max(main, other) < 3 * largest < total / 2
