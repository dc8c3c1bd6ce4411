"""A policy of Qwen3-0.6B's size through both conversions: memory, time, and every byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_jq.architecture import PRESETS
from megatron_jq.checkpoint.huggingface import HuggingFaceReader, num_bytes, write_weights
from megatron_jq.model.hf import hugging_face_tensors
from megatron_jq.model.hf_config import hugging_face_config

ARCHITECTURE = PRESETS["qwen3-0.6b"]

#: Peak of resident memory above what the process has once everything is imported, in bytes; and seconds.
MEASURED = """
import json, sys, time
from pathlib import Path
import torch
from megatron_jq.checkpoint.convert import hf_to_megatron, megatron_to_hf
from megatron_jq.checkpoint.slabs import ShardLayout

def memory(name):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])

source, target = map(Path, sys.argv[2:])
idle, start = memory("VmRSS"), time.perf_counter()
if sys.argv[1] == "hf-to-megatron":
    hf_to_megatron(source, target, ShardLayout())
else:
    megatron_to_hf(source, target, dtype=None, max_shard_bytes=5 * 10**9)
print(json.dumps([memory("VmHWM") - idle, time.perf_counter() - start]))
"""


def random_folder(folder: Path) -> int:
    """A Hugging Face folder of random bfloat16 weights; returns their bytes. No tensor is like another."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    signature = {t.name: (t.shape, torch.bfloat16) for t in hugging_face_tensors(ARCHITECTURE)}

    def draw(name: str) -> torch.Tensor:
        return torch.empty(signature[name][0], dtype=torch.bfloat16).normal_(generator=generator)

    write_weights(folder, signature, draw, 10**12)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(ARCHITECTURE, "bfloat16")))
    return sum(map(num_bytes, signature.values()))


def convert(*arguments) -> tuple[float, float]:
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return tuple(json.loads(ran.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_qwen3_06b_converts_both_ways_in_less_memory_than_it_is_large(tmp_path):
    source, checkpoint, back = tmp_path / "hf", tmp_path / "megatron", tmp_path / "back"
    size = random_folder(source)
    assert size == pytest.approx(1.19e9, rel=0.01)
    for name, peak, seconds in (
        ("hf-to-megatron", *convert("hf-to-megatron", source, checkpoint)),
        ("megatron-to-hf", *convert("megatron-to-hf", checkpoint, back)),
    ):
        print(f"{name}: {seconds:.1f} s, peak {peak / 1e6:.0f} MB above idle, {peak / size:.2f} of {size / 1e6:.0f} MB")
        assert peak < 1.5 * size
    before, after = HuggingFaceReader(source), HuggingFaceReader(back)
    assert before.signature == after.signature
    for name, (shape, _) in before.signature.items():
        assert torch.equal(*(r.read(name, (0, shape[0])).view(torch.int16) for r in (before, after))), name
