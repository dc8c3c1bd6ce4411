"""What the documents name exists: flags, files, functions, tests, links, settings of TOML fragments."""

import ast
import fnmatch
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun

from megatron_jq.config import OLD_NAMES, SETTINGS, settings_of_text
from megatron_jq.data.template import template_of
from megatron_jq.toml_files import tomllib
from tests.e2e.documents import DOCUMENTS, REPOSITORY
from tests.unit.test_floors import FLOORS
from tools.reference_pages import PAGES

SOURCES = ("tools/*.py", "megatron_jq/cli/*.py", "examples/**/*.py", "launch/**/*.py")

#: Flags of other programs that documents name, and whose they are.
FOREIGN = {
    "parsable": "sbatch", "dependency": "sbatch", "array": "sbatch", "signal": "sbatch, scancel",
    "no-requeue": "sbatch", "requeue": "sbatch", "chdir": "sbatch", "gres": "sbatch", "export": "sbatch",
    "jobid": "srun", "overlap": "srun", "pty": "srun", "cpus-per-task": "srun", "cpu-bind": "srun",
    "shm-size": "docker", "ft-rank-heartbeat-timeout": "ft_launcher",
    "calculate-per-token-loss": "Megatron-LM; ours behaves so",
    "reset-position-ids": "Megatron-LM; the page says that it is not there",
}  # fmt: skip
#: Files that runs, tools and readers write.
WRITTEN = ("config.toml", "lengths.png", "comparison.png", "escape.png", "my.toml", "first.png", "run.png", "report.md")


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Of the settings, of every parser in the sources, and of torchrun; without the dashes."""
    known = {"config", "help", "version"}
    known |= {name[2:] for action in torchrun()._actions for name in action.option_strings if name.startswith("--")}
    for name in (*SETTINGS, *OLD_NAMES):
        known |= {name.replace("_", "-"), f"no-{name.replace('_', '-')}"}
    for pattern in SOURCES:
        for path in REPOSITORY.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                    names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                    known |= {name[2:] for name in names if name.startswith("--")}
    return known


def unknown_flags(text: str, flags: set[str]) -> list[str]:
    """`--grpo-…` stands for all that begin so."""
    result = []
    for match in re.finditer(r"(?<![\w-])--([a-z][a-z0-9-]*)(…?)", text):
        begins = match[2] and any(flag.startswith(match[1]) for flag in flags)
        if match[1] not in flags and match[1] not in FOREIGN and not begins:
            result.append(f"line {line_of(text, match.start())}: --{match[1]}")
    return result


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_exists(document, flags):
    """In prose, tables and commands. Another program's stands in FOREIGN."""
    assert unknown_flags(text_of(document), flags) == []


def test_a_flag_that_does_not_exist_is_seen(flags):
    text = "`--q 1`\n| `--no-normalize` | `--grpo-…` |\n`--keep-lost 2`, --metric, `--qrpo-…`"
    assert unknown_flags(text, flags) == ["line 3: --keep-lost", "line 3: --metric", "line 3: --qrpo-"]


@pytest.fixture(scope="module")
def files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    return listed.stdout.split("\n")[:-1]


def in_megatron(name: str) -> list[Path]:
    """Files of the installed Megatron-core whose path ends so."""
    listed = importlib.metadata.files("megatron-core") or []
    return [Path(file.locate()) for file in listed if f"/{file}".endswith(f"/{name}")]


def missing_files(document: str, text: str, files: list[str]) -> list[str]:
    """Paths count from the repository, tests/, megatron_jq/, docs/, launch/ or the document; `x.py` may lie anywhere,
    in Megatron-core too.
    """
    result, folders = [], ("", "tests/", "megatron_jq/", "docs/", "launch/", f"{Path(document).parent}/")
    for match in re.finditer(r"`([\w./*-]+\.(?:py|sh|toml|sbatch|md|png))(?=[`: ])", text):
        name = match[1].removeprefix("../").removeprefix("./")
        anywhere = "/" not in name and any(fnmatch.fnmatch(file.rpartition("/")[2], name) for file in files)
        there = any(fnmatch.fnmatch(file, folder + name) for file in files for folder in folders)
        if not (there or anywhere or name in WRITTEN or in_megatron(name)):
            result.append(f"line {line_of(text, match.start())}: {name}")
    return result


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document, files):
    assert missing_files(document, text_of(document), files) == []


def test_a_file_that_does_not_exist_is_seen(files):
    text = "`unit/test_documents.py` and `unit/test_nothing.py`\n`tools/estimate.py --q 1`, `nothing.sh`"
    assert missing_files("docs/x.md", text, files) == ["line 1: unit/test_nothing.py", "line 2: nothing.sh"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    text, troubles = text_of(document), []
    for match in re.finditer(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = match[1].partition("#")
        if path.startswith(("http:", "https:")):
            continue
        target = (REPOSITORY / document).parent / path if path else REPOSITORY / document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            troubles.append(f"line {line_of(text, match.start())}: {match[1]}")
    assert troubles == []


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defined(path: Path) -> set[str]:
    """Functions, classes, methods (Class.method), fields and constants of a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        names |= {t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_function_stands_in_the_file_that_is_named_with_it(document):
    """`objective/garl.py` `garl_coefficients`, `step.py: score`, and pytest's file::test."""
    text, troubles = text_of(document), []
    pairs = [
        (match, match[1], re.findall(r"`([\w.]+)`", match[2]))
        for match in re.finditer(r"`([\w/]+\.py)`((?:,? `[A-Za-z_][\w.]*`)+)", text)
    ]
    pairs += [(match, match[1], [match[2]]) for match in re.finditer(r"`([\w/]+\.py)(?:::|: )([\w.]+)`", text)]
    for match, name, words in pairs:
        paths = [REPOSITORY / folder / name for folder in ("", "megatron_jq", "tests", "tests/unit")]
        paths += in_megatron(name)
        known = set().union(*(defined(path) for path in paths if path.is_file()))
        troubles += [
            f"line {line_of(text, match.start())}: {name} {w}"
            for w in words
            if w not in known and not w.endswith(".py")
        ]
    assert troubles == []


MAPS = {"docs/paper-map.md": "objective", "docs/baselines.md": "objective"}


@pytest.mark.parametrize("document", MAPS)
def test_every_function_of_the_maps_from_equations_exists_and_so_does_its_test(document):
    """Second column (third in baselines): functions. The next one: `garl` is tests/unit/test_objective_garl.py."""
    package = set().union(*(defined(path) for path in (REPOSITORY / "megatron_jq").rglob("*.py")))
    tests = {p.stem.removeprefix("test_objective_") for p in (REPOSITORY / "tests/unit").glob("test_objective_*.py")}
    troubles = []
    for number, line in enumerate(text_of(document).split("\n"), start=1):
        cells = [cell.strip() for cell in line.replace(r"\|", "/").strip("|").split("|")]
        if not line.startswith("|") or len(cells) < 4:
            continue
        functions, proof = (cells[1], cells[2]) if document.endswith("map.md") else (cells[2], cells[3])
        names = re.findall(r"`([A-Za-z_][\w.]*)`", functions)
        troubles += [f"line {number}: {n}" for n in names if n not in package and not n.endswith(".py")]
        proofs = re.findall(r"`([a-z_]+)`(?=[:;,]|$)", proof)
        troubles += [f"line {number}: test_objective_{n}.py" for n in proofs if n not in tests | package]
    assert troubles == []


def fragments(document: str) -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if fragments(document)])
def test_every_toml_fragment_is_read(document, tmp_path):
    """A template of prompts (its tables are cold and warm), or settings."""
    for fragment in fragments(document):
        if tomllib.loads(fragment).keys() & {"cold", "warm"}:
            (tmp_path / "template.toml").write_text(fragment, encoding="utf-8")
            template_of("finqa", str(tmp_path / "template.toml"))
        else:
            settings_of_text(fragment, document)


@pytest.mark.parametrize("page", PAGES)
def test_generated_pages_are_complete_and_current(page):
    """Every setting and every metric has its line, with what the code says today."""
    assert text_of(f"docs/{page}") == PAGES[page](), f"run python tools/reference_pages.py: docs/{page} is not current"


def test_the_table_of_floors_names_every_room():
    """docs/architecture.md explains the floors; tests/unit/test_floors.py holds imports to them."""
    rows = re.findall(r"^\| F(\d) \| ([^|]+) \|", text_of("docs/architecture.md"), re.MULTILINE)
    rooms = {room: int(floor) for floor, names in rows for room in re.findall(r"`(\w+)`", names)}
    assert rooms == {room: floor for room, floor in FLOORS.items() if room != "__init__"}
