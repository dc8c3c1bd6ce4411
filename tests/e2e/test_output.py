"""A run and a command as processes of their own, on a terminal that cannot print all, and with a reader that leaves."""

import json
import os
import subprocess
import sys

from tests.e2e.launch import REPOSITORY, SMALL, finish, start_processes

ASCII = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}


def test_a_run_outlives_its_reader_and_a_command_its_pager(tmp_path):
    """Training prints `ln P̂`-like text (the prompts of its samples); `inspect | head -1` has what it wanted."""
    data = [{"prompt": f"Łódź → {i}", "answer": "ż́ó"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    argv = [*SMALL, "--train-data", str(tmp_path / "data.jsonl"), "--run-dir", str(tmp_path / "run")]
    flags = ["--tokenizer-vocab-size", "290", "--sample-interval", "1", "--no-tensorboard"]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_jq", *argv, *flags], cwd=REPOSITORY, env=ASCII, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    first = process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 0, error
    assert first.isascii() and b"Error" not in error, error
    assert len((tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()) == 3
    assert (tmp_path / "run" / "checkpoints" / "iter_0000003").is_dir()

    inspect = f"{sys.executable} -m megatron_jq convert inspect --load {tmp_path}/run/checkpoints"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {inspect} | head -1"], cwd=REPOSITORY, env=ASCII, capture_output=True
    )
    assert (ended.returncode, ended.stderr) == (0, b"") and b"step 3" in ended.stdout, ended


def test_a_run_writes_nothing_to_standard_error(tmp_path):
    """No library's warning at start or end, on this version of Megatron-core: a user could do nothing about one."""
    argv = [*SMALL, "--run-dir", str(tmp_path / "run"), "--train-iters", "1", "--tensor-model-parallel-size", "2"]
    for ended in [finish(process) for process in start_processes(argv, 2)]:
        assert (ended.code, ended.err) == (0, "")
