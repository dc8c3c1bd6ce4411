"""Megatron-core 0.16 to 0.19: what differs between them stands in one room, and its messages are turned into ours."""

import ast
import functools
import logging
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_jq.checkpoint import folder
from megatron_jq.errors import UserError
from megatron_jq.parallel.megatron import versions

PACKAGE = Path(versions.__file__).resolve().parents[2]
ROOM = "parallel/megatron/"
_OF_VERSIONS = ("packaging", "packaging.version", "megatron.core.package_info")


def version_tests(source: str) -> list[str]:
    """What in a module's source asks for the version of Megatron-core, or tries whether a part of it is there."""
    finds = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.Compare | ast.Call | ast.Attribute | ast.ImportFrom) else ""
        if isinstance(node, ast.Compare) and "version(" in text:
            finds.append(text)
        if isinstance(node, ast.Attribute) and text in ("megatron.core.__version__", "core.package_info"):
            finds.append(text)
        if isinstance(node, ast.ImportFrom) and node.module in _OF_VERSIONS:
            finds.append(text)
        if isinstance(node, ast.Call) and "is_mcore_min_version" in text:
            finds.append(text)
        if isinstance(node, ast.Try):
            catches = {name for handler in node.handlers for name in ("ImportError", "ModuleNotFoundError", "TypeError")
                       if handler.type is not None and name in ast.unparse(handler.type)}  # fmt: skip
            body = "\n".join(ast.unparse(statement) for statement in node.body)
            if catches and "megatron.core" in body and "datasets" not in body:
                finds.append(body)
    return finds


def test_no_other_module_asks_for_the_version():
    asking = {
        str(path.relative_to(PACKAGE)): finds
        for path in PACKAGE.rglob("*.py")
        if not str(path.relative_to(PACKAGE)).startswith(ROOM) and (finds := version_tests(path.read_text("utf-8")))
    }
    assert asking == {}, "what depends on Megatron-core's version belongs in parallel/megatron/versions.py"


@pytest.mark.parametrize(
    "source",
    [
        "if version('megatron-core') >= '0.18': pass",
        "import megatron.core\nnew = megatron.core.__version__",
        "from packaging.version import Version",
        "new = is_mcore_min_version('0.17')",
        "try:\n    from megatron.core import hybrid\nexcept ImportError:\n    hybrid = None",
    ],
)
def test_the_check_sees_a_version_test(source):
    assert version_tests(source)


def test_a_checkout_without_metadata_is_read_for_its_version(monkeypatch):
    """Containers have Megatron-core on PYTHONPATH: pip's records know nothing of it, or another version."""

    def unknown(name: str) -> str:
        if name == "megatron-core":
            raise PackageNotFoundError(name)
        return version(name)

    expected = version("megatron-core")
    for module in (versions, folder):
        monkeypatch.setattr(module, "version", unknown)
    monkeypatch.setattr(versions, "_collected", SimpleNamespace(deprecated=True))
    assert versions.find_version() == folder.package_versions()["megatron-core"] == expected
    assert f"megatron-core {expected}, " in ", ".join(versions.versions_of_engine())
    assert f"megatron-core {expected} gives" in versions.deprecation_note()
    asking = [path for path in PACKAGE.rglob("*.py") if "version(\"megatron-core\")" in path.read_text("utf-8")]
    assert asking == [PACKAGE / "parallel/megatron/versions.py"]


@pytest.mark.parametrize("compiled", [lambda wrap: wrap(len), lambda wrap: wrap(dynamic=True)(len)])
def test_what_stands_for_the_compiler_takes_options_too(compiled):
    assert compiled(versions._uncompiled) is len


def test_a_router_is_set_in_both_forms_of_the_spec():
    class Router: ...

    old = SimpleNamespace(submodules=SimpleNamespace(router=None))  # a ModuleSpec, to 0.17
    new = functools.partial(dict, submodules=SimpleNamespace(router=None))  # from 0.18
    assert versions.set_router(old, Router).submodules.router is Router
    assert versions.set_router(new, Router)().get("submodules").router is Router


def test_a_missing_triton_is_named_with_the_command(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(versions.importlib, "import_module", fail)
    with pytest.raises(UserError, match="needs the package triton.*pip install 'triton>=3,<3.8'"):
        versions.check_import()


def test_another_missing_module_is_not_called_triton(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(versions.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="yaml"):
        versions.check_import()


def test_a_warning_at_compilation_is_ignored_in_megatron_core_alone():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        versions.ignore_known_warnings()
        for file in ("/x/megatron/core/inference/contexts/kv_block_allocator.py", "/x/my_reward.py"):
            warnings.warn_explicit(r"invalid escape sequence '\-'", SyntaxWarning, file, 426)
    assert [warning.filename for warning in seen] == ["/x/my_reward.py"]


def test_a_known_line_of_a_logger_is_kept_off_the_log(caplog, monkeypatch):
    logger = logging.getLogger("megatron.core.distributed.distributed_data_parallel")
    monkeypatch.setattr(logger, "filters", [])
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        versions.ignore_known_warnings()
        logger.warning("DistributedDataParallel: full_param_layout not provided with use_distributed_optimizer=True.")
        logger.warning("another warning, which stays")
    assert [record.getMessage() for record in caplog.records] == ["another warning, which stays"]


def test_the_deprecation_is_kept_off_the_log_and_noted(caplog, monkeypatch):
    monkeypatch.setattr(versions, "_collected", versions._Collected())
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    versions.collect_deprecations()
    versions.collect_deprecations()  # each model made: still one filter
    assert versions.deprecation_note() is None
    try:
        with caplog.at_level(logging.WARNING):
            logger.warning("GPTModel IS DEPRECATED and only accepting critical bug fixes.")
            logger.warning("another warning, which stays")
    finally:
        logger.removeFilter(versions._collected)
    assert [record.getMessage() for record in caplog.records] == ["another warning, which stays"]
    assert "critical fixes only" in versions.deprecation_note()


def test_the_room_asks_for_nothing_before_it_is_called():
    """`--help` imports it: it must not bring Megatron-core or torch."""
    code = "import sys, megatron_jq.parallel.megatron.versions; assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_on_a_cpu_build_the_import_leaves_torchs_compiler_out_and_in_place():
    """Every command's start would take seconds more."""
    code = (
        "import sys; from megatron_jq.parallel.megatron import versions; versions.prepare_import(); import torch; "
        "assert torch.version.cuda or torch.version.hip or 'torch._inductor' not in sys.modules; "
        "assert torch.compile.__module__ == 'torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
