"""docs/extending.md, "An estimator", done to the letter in a copy of the package.

Why: the page is all that a newcomer has. What it leaves out would be found by a run that trains on something else.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = (REPOSITORY / "tests/e2e/small.toml").as_posix()
CONFORMANCE = "tests/unit/test_estimator_conformance.py"
LINE = "| `jensen` | of ln p(z\\|x): ln w_m - mean of the others', of ln p(y\\*\\|x,z): 1 | `jensen` | by hand |\n"


def blocks() -> list[str]:
    """The page's code for an estimator: the function's file, the row."""
    page = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
    section = page.partition("## An estimator\n")[2].partition("\n## ")[0]
    assert "megatron_jq/objective/jensen.py" in section and "--estimator jensen" in section
    return re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


class Copy:
    """The package, its documents and the conformance test in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        ignore = shutil.ignore_patterns("__pycache__")
        for name in ("megatron_jq", "tools"):
            shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
        for name in ("docs/baselines.md", "docs/settings.md", "docs/metrics.md", CONFORMANCE):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, folder / name)

    def replace(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new), encoding="utf-8")

    def add(self, function: str, row: str) -> None:
        (self.folder / "megatron_jq/objective/jensen.py").write_text(function, encoding="utf-8")
        last = "    # A new estimator's row"
        self.replace("megatron_jq/estimators.py", last, row + last)

    def document(self) -> None:
        self.replace("docs/baselines.md", "| `grpo` | A_m", LINE + "| `grpo` | A_m")
        assert self.python("tools/reference_pages.py").returncode == 0

    def python(self, *words: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600
        )

    def train(self, *flags: str) -> subprocess.CompletedProcess:
        words = ("--config", SMALL, "--device", "cpu", "--no-tensorboard", "--run-dir", "run", "--train-iters", "2")
        return self.python("-m", "megatron_jq", "train", "--estimator", "jensen", *words, *flags)

    def conforms(self, *words: str) -> subprocess.CompletedProcess:
        return self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *words)


def test_an_estimator_by_the_page_alone_trains_and_conforms(tmp_path):
    copy = Copy(tmp_path)
    copy.add(*blocks())
    copy.document()
    trained = copy.train()
    assert trained.returncode == 0, trained.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and all(line["grad_norm"] > 0 for line in lines)
    assert lines[0]["q"] is None and "jensen | " in trained.stdout
    tested = copy.conforms(CONFORMANCE, "-k", "jensen or documents")
    assert tested.returncode == 0 and " passed" in tested.stdout, tested.stdout
