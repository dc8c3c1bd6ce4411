"""launch/nemo_run: what the specs render is pinned, and they run: here through torchrun, and on the test cluster."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import LAUNCH
from tests.slurm.jobs import TINY, logs, metrics, steps_on_record

REPOSITORY = LAUNCH.parent
PINNED = Path(__file__).resolve().parent / "nemo_run_dryrun"
TINY_ON_CPU = [*TINY, "--device", "cpu"]

needs_nemo_run = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None, reason="nemo-run is not installed: pip install 'megatron-jq[nemo]'"
)

SPECS = {
    "train-slurm": "train.py --executor slurm --account me --partition gpu --nodes 4 --container-image image.sqsh "
    "--container-mounts /data:/data --train-iters 3 --q 0.5 --run-dir /data/run --evaluate --plot",
    "train-ssh": "train.py --executor slurm --account me --ssh me@login --job-dir /jobs --repository /home/me/jq "
    "--venv /home/me/venv --nodes 2 --run-dir /data/run",
    "train-local": "train.py --ranks-per-node 2 --run-dir /data/run --evaluate --evaluate-flags=--eval-samples=2 "
    "--plot",
    "sweep-slurm": "sweep.py --executor slurm --account me --venv /venv --qs 0.5 1 --estimators garl paft "
    "--run-dir /data/sweep --evaluate",
}


BAD = {
    "train.py --executor slurm": "--account NAME must be given",
    "train.py --nodes 2": "--nodes 2: --executor local has one",
    "train.py --executor slurm --account me --run-dir /r --ssh login": "--ssh login: expected USER@HOST",
    "train.py --executor slurm --account me --run-dir /r --ssh me@login": "--ssh: --job-dir DIR must be given",
    "train.py --executor slurm --account me --ssh me@login --job-dir /j": "--run-dir runs/default: give an absol",
    "train.py --qq 1": "unknown flag --qq",
    "sweep.py --grid none.toml": "cannot read none.toml",
}

#: Every spec in a fork of one process: nemo-run takes seconds to import.
FORKED = """
import json, os, runpy, sys
import nemo_run
codes = []
for i, (script, *flags) in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        for number in (1, 2):
            os.dup2(os.open(f"{i}.{number}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv, code = [script, *flags, "--dryrun"], 0
        sys.path.insert(0, os.path.dirname(script))
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def dry_runs(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """{command line: (exit code, standard output, standard error)} of all specs, started with --dryrun."""
    folder = tmp_path_factory.mktemp("dry")
    lines = [*SPECS.values(), *BAD]
    commands = [[str(LAUNCH / "nemo_run" / words[0]), *words[1:]] for words in map(str.split, lines)]
    done = subprocess.run(
        [sys.executable, "-c", FORKED, json.dumps(commands)],
        cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = [[(folder / f"{i}.{number}").read_text() for number in (1, 2)] for i in range(len(lines))]
    found = zip(lines, json.loads(done.stdout), read, strict=True)
    return {line: (code, normalised(out, folder), err) for line, code, (out, err) in found}


def start(words: list[str], home: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A spec, as a user starts it. `home`: nemo-run's folder."""
    script, *flags = words
    return subprocess.run(
        [sys.executable, str(LAUNCH / "nemo_run" / script), *flags],
        cwd=cwd, env=environment(home), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    foreign = ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS")
    ours = {name: value for name, value in os.environ.items() if name not in foreign}
    # Wide, or nemo-run breaks its lines.
    return {**ours, "NEMORUN_HOME": str(home), "COLUMNS": "1200", "OMP_NUM_THREADS": "1"}


def normalised(text: str, home: Path) -> str:
    """A dry run's words without times, ids, places of this machine, and the right-hand column of source lines."""
    text = text.replace(str(home), "HOME").replace(str(REPOSITORY), "REPOSITORY")
    text = text.replace(str(Path(sys.executable).parent), "BIN")
    text = re.sub(r"megatron-jq_\d+", "megatron-jq_ID", text)
    text = re.sub(r"(?m) +\w+\.py:\d+ *$", "", text)
    text = re.sub(r"(?m)^(\[\d\d:\d\d:\d\d\])? *", "", text)
    text = re.sub(r"--rdzv-id \d+", "--rdzv-id ID", text)
    text = re.sub(r"'PATH': '[^']*'", "'PATH': PATH", text)
    text = re.sub(r"\b([a-z-]+)-[a-z0-9]{12,14}\b", r"\1-ID", text)
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("─")) + "\n"


@needs_nemo_run
@pytest.mark.parametrize("name", SPECS)
def test_what_a_spec_would_run_is_as_pinned(name, dry_runs):
    """After a deliberate change: MEGATRON_JQ_PIN=1 pytest tests/slurm/test_nemo_run.py, and read the difference."""
    code, text, err = dry_runs[SPECS[name]]
    assert code == 0, text + err
    pinned = PINNED / f"{name}.txt"
    if os.environ.get("MEGATRON_JQ_PIN"):
        pinned.parent.mkdir(exist_ok=True)
        pinned.write_text(text)
    assert text == pinned.read_text()


@needs_nemo_run
@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_refused_in_one_line(line, dry_runs):
    code, _, err = dry_runs[line]
    assert code == 2 and err.startswith("megatron-jq: error: ") and BAD[line] in err, err
    assert len(err.splitlines()) == 1


@needs_nemo_run
def test_here_a_run_is_trained_through_torchrun_and_drawn(tmp_path):
    words = ["train.py", "--ranks-per-node", "2", *TINY_ON_CPU, "--run-dir", "a run", "--plot"]
    done = start(words, tmp_path / "home", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["step"] for line in metrics(tmp_path / "a run")] == [0, 1, 2]
    assert (tmp_path / "a run" / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_nemo_run_the_specs_say_how_to_get_it(tmp_path):
    code = "import runpy, sys; sys.modules['nemo_run'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    for script in ("train.py", "sweep.py"):
        path = LAUNCH / "nemo_run" / script
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path.parent)!r}); {code}", str(path)],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2 and "pip install 'megatron-jq[nemo]'" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@needs_nemo_run
def test_the_slurm_executor_submits_and_the_tasks_run_one_after_another(cluster, tmp_path):
    words = "--executor slurm --account me --nodes 2 --ranks-per-node 1 --gpus-per-node 1 --plot".split()
    run_dir = tmp_path / "a run"
    done = cluster.run(
        sys.executable, str(LAUNCH / "nemo_run" / "train.py"), *words, "--venv", sys.prefix, *TINY_ON_CPU,
        "--run-dir", str(run_dir), cwd=tmp_path, timeout=120, **environment(tmp_path / "home"),
    )  # fmt: skip
    assert cluster.run("squeue", "--noheader", "--format=%E").stdout.count("afterok:") == 1, done.stdout
    cluster.until(lambda: not cluster.run("squeue", "--noheader").stdout.strip(), 240, "an empty queue", every=0.5)
    assert steps_on_record(run_dir) == 3, done.stdout + done.stderr + logs(tmp_path)
    assert (run_dir / "run.png").exists()


@needs_nemo_run
def test_points_of_a_sweep_do_not_share_a_folder_of_checkpoints():
    """Without --save each run has its own; with one, each has a folder in it, which its evaluation reads."""
    code = (
        "import argparse\nfrom experiment import evaluation\nfrom sweep import configs_of\n"
        "from megatron_jq.grid import Point\n"
        "points = [Point('q0', ('--q=0',)), Point('q1', ('--q=1',))]\n"
        "args = argparse.Namespace(executor='slurm', evaluate_flags='')\n"
        "for save in ([], ['--save', '/c']):\n"
        "    for config in configs_of(points, ['--run-dir', '/s', *save], False):\n"
        "        print(config.training.run_dir, config.checkpoint.save, evaluation(args, config).args[1])\n"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(LAUNCH / "nemo_run"), str(REPOSITORY)])}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "/s/q0 None --load=/s/q0/checkpoints",
        "/s/q1 None --load=/s/q1/checkpoints",
        "/s/q0 /c/q0 --load=/c/q0",
        "/s/q1 /c/q1 --load=/c/q1",
    ]
