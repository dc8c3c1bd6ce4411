"""A run crosses versions of Megatron-core: begun on this one, continued on another, and back, as if on one alone.

`MEGATRON_JQ_OTHER_PYTHON` names the interpreter of an environment with another version; tests/matrix.sh sets it to the
repository's own environment where there is one. This package's sources are the same in both.
"""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_jq.records import MEASURED
from tests.e2e.launch import REPOSITORY, SMALL, _environment, run

OTHER = os.environ.get("MEGATRON_JQ_OTHER_PYTHON")
HERE = version("megatron-core")
DEADLINE_SECONDS = 180
EXPERTS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-query-groups 2 "
    "--kv-channels 16 --num-experts 4 --moe-ffn-hidden-size 24 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 "
    "--expert-model-parallel-size 2"
).split()
SHARDED = ["--use-distributed-optimizer"]
LAYOUTS = {
    "TP2": ["--tensor-model-parallel-size", "2"],
    "PP2, bf16, distributed optimizer": ["--pipeline-model-parallel-size", "2", "--bf16", *SHARDED],
    "DP2 x EP2, distributed optimizer": [*EXPERTS, *SHARDED],
}


def _of(python: str) -> str:
    code = "from importlib.metadata import version; print(version('megatron-core'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.fixture(scope="module")
def other() -> str:
    if not OTHER:
        pytest.skip("MEGATRON_JQ_OTHER_PYTHON names no interpreter with another Megatron-core (tests/matrix.sh does)")
    assert _of(OTHER) != HERE, f"{OTHER} has Megatron-core {HERE} too"
    return OTHER


def train(python: str, run_dir: Path, steps: int, flags: list[str], *more: str) -> None:
    """Two ranks of `python`, to `steps` steps; those of this one are forked."""
    argv = [*SMALL, "--run-dir", str(run_dir), *flags, "--train-iters", str(steps), "--no-tensorboard", *more]
    if python == sys.executable:
        ended = run(argv, run_dir.parent, size=2)
        assert [rank.code for rank in ended] == [0, 0], ended
        return
    environment = {**os.environ, **_environment(2), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [python, "-m", "megatron_jq", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=DEADLINE_SECONDS)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs


def metrics(run_dir: Path) -> list[dict]:
    """Without times and memory, and without evaluations: each part of a crossing run evaluates at its own end."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open(encoding="utf-8")]
    left_out = lambda key: key in MEASURED or key.startswith("eval_")  # noqa: E731
    return [{key: value for key, value in line.items() if not left_out(key)} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("flags", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_run_continues_on_the_other_version_and_back(other, flags, tmp_path):
    train(sys.executable, tmp_path / "alone", 6, flags)
    for steps, python in ((2, sys.executable), (4, other), (6, sys.executable)):
        train(python, tmp_path / "both", steps, flags, "--resume")
    manifests = {}
    for path in (tmp_path / "both" / "checkpoints").glob("iter_*/checkpoint.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifests[manifest["step"]] = manifest["versions"]["megatron-core"]
    assert manifests == {2: HERE, 4: _of(other), 6: HERE}
    expected, crossed = metrics(tmp_path / "alone"), metrics(tmp_path / "both")
    assert [line["step"] for line in crossed] == [line["step"] for line in expected] == list(range(6))
    differing = [line["step"] for line, twin in zip(expected, crossed, strict=True) if line != twin]
    for step in differing:
        absent = {name for name, value in expected[step].items() if value is None}
        assert absent == {name for name, value in crossed[step].items() if value is None}
        numbers = {name: value for name, value in expected[step].items() if name not in absent}
        assert {name: crossed[step][name] for name in numbers} == pytest.approx(numbers, rel=1e-5), step
    print(f"{HERE} and {_of(other)}: {'bit-equal' if not differing else f'steps {differing} differ within 1e-5'}")


def test_the_versions_that_a_user_has_are_said(tmp_path):
    """`megatron-jq --version` names the engine too: what to write into a report."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_jq", "--version"], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert re.fullmatch(rf"megatron-jq \S+ \(megatron-core {re.escape(HERE)}, torch \S+, Python \S+\)\n", done.stdout)
