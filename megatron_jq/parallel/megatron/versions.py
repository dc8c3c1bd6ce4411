"""F2: what differs between the versions of Megatron-core that this package runs on, 0.16 to 0.19.

Each difference is found by feature, not by number, and names the version that brought it. Nothing else in the package
asks for Megatron-core's version; tests/unit/test_megatron_versions.py holds that.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import platform
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_jq.errors import UserError


def versions_of_engine() -> list[str]:
    """Megatron-core's, torch's and Python's versions, one phrase each; nothing is imported."""
    engines = {"megatron-core": find_version(), "torch": installed_version("torch")}
    phrases = [f"{name} {text or 'not installed'}" for name, text in engines.items()]
    return [*phrases, f"Python {platform.python_version()}"]


def installed_version(name: str) -> str | None:
    """Return the version of a distribution by its metadata; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_version() -> str | None:
    """Return the version of the Megatron-core that an import would take; nothing is imported. None: there is none.

    A checkout on PYTHONPATH, as containers have, comes before the distribution that pip installed, and has no metadata.
    """
    spec = importlib.util.find_spec("megatron")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "core" / "package_info.py"
        if path.is_file():
            parts = dict(re.findall(r"(?m)^(MAJOR|MINOR|PATCH|PRE_RELEASE) = ['\"]?(\w*)", path.read_text("utf-8")))
            if len(parts) == 4:
                return f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}{parts['PRE_RELEASE']}"
    return installed_version("megatron-core")


#: What Megatron-core and torch warn of at import, once a rank, and no user can act on: the run's opening line says in
#: one word which kernels are used, and models of other modalities are not.
_KNOWN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed", UserWarning),
    ("full scope is deprecated", UserWarning),
    ("MimoModelConfig is experimental", UserWarning),  # seen on 0.19.2
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),  # 0.16 uses the names of torch before 2.13
)


#: Log lines of the same kind: logger, and a part of the line.
_KNOWN_LINES = (
    # Where a CUDA toolkit is installed and no GPU is there, torch's builder of extensions says so in every process.
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    # From 0.18 on, at the distributed optimizer: DDP makes the layout that its caller did not.
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided"),
)


def prepare_import() -> None:
    """Keep known warnings off the output, then `check_import`. Call before anything imports Megatron-core."""
    ignore_known_warnings()
    check_import()


def ignore_known_warnings() -> None:
    """Keep what a user cannot act on off the output, from here on."""
    for message, category in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    # A docstring of 0.19.2 has one. Python compiles it at a run's start where the installer did not (uv, --no-compile).
    warnings.filterwarnings("ignore", "invalid escape sequence", SyntaxWarning, module=r".*\bmegatron\Wcore\b")
    # The distributed optimizer's shards are views; zeroing gradients asks each for one.
    not_a_leaf = r"The \.grad attribute of a Tensor that is not a leaf"
    warnings.filterwarnings("ignore", not_a_leaf, UserWarning, module=r"megatron\.core\.optimizer\b")
    for logger, text in _KNOWN_LINES:
        logging.getLogger(logger).addFilter(functools.partial(_lacks, text))


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()


def check_import() -> None:
    """UserError where Megatron-core cannot be imported for want of triton.

    From 0.18 on `import megatron.core` imports triton (its schedules do), which its metadata does not ask for. A CUDA
    build of torch brings triton, a CPU build does not.
    """
    try:
        with _without_compiler():
            importlib.import_module("megatron.core")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise UserError(
            f"megatron-core {find_version()} needs the package triton, which a CPU build of torch does not "
            "bring: pip install 'triton>=3,<3.8'"
        ) from error


def _uncompiled(function: Any = None, **_options: Any) -> Any:
    """As torch.compile is called: on a function, or with options and then on one."""
    return function if function is not None else _uncompiled


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """With a CPU build of torch, have Megatron-core take its fused functions as they are, not by `torch.compile`.

    At import it decorates them, which brings torch's compiler in: 4 of the 11 CPU seconds that a command takes to
    start. A policy on a CPU calls none of them.
    """
    import torch

    if torch.version.cuda or torch.version.hip:
        yield
        return
    compile_, torch.compile = torch.compile, _uncompiled
    try:
        yield
    finally:
        torch.compile = compile_


def bind_optional_names() -> None:
    """Give the router's module the name that 0.16 leaves unbound without Transformer Engine and then compares to None;
    from 0.17 on it is bound.
    """
    from megatron.core.transformer.moe import moe_utils

    vars(moe_utils).setdefault("te_general_gemm", None)


def set_router(mlp: Any, router: type) -> Any:
    """The spec of a layer with experts, with this router in place of Megatron-core's.

    mlp: a ModuleSpec up to 0.17; from 0.18 on `functools.partial(MoELayer, submodules=…)`.
    """
    submodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    submodules.router = router
    return mlp


def gradients_for_norm(optimizer: Any) -> list[Any]:
    """Return the gradients that count in an optimizer's norm, each on one of the ranks that hold it.

    The method has another name from 0.19 on, where the one of before is gone.
    """
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return optimizer.get_grads_for_grad_norm()
    return optimizer.get_main_grads_for_grad_norm()


def check_hybrid_model() -> None:
    """UserError where this Megatron-core has no HybridModel that keeps GPTModel's checkpoints; 0.19 brought both."""
    parts = ("megatron.core.models.hybrid.hybrid_model", "megatron.core.dist_checkpointing.gpt_checkpoint_interop")
    try:
        for part in parts:
            importlib.import_module(part)
    except ModuleNotFoundError as error:
        if error.name is None or not any(part.startswith(error.name) for part in parts):
            raise
        raise UserError(
            f"--model-class hybrid needs Megatron-core 0.19 or later, and {find_version()} is installed: "
            "--model-class gpt trains, reads and writes the same"
        ) from error


class _Collected(logging.Filter):
    """Keep a logger's deprecation of GPTModel off the log, and remember it."""

    def __init__(self):
        super().__init__()
        self.deprecated = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "GPTModel" in text and "DEPRECATED" in text.upper():
            self.deprecated = True
            return False
        return True


_collected = _Collected()


def collect_deprecations() -> None:
    """Keep what 0.19 logs whenever a GPTModel is made off the log; `deprecation_note` says it once, in our words."""
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    if _collected not in logger.filters:
        logger.addFilter(_collected)


def deprecation_note() -> str | None:
    """A line for the user where this Megatron-core has deprecated the model that our policy is built on; else None."""
    if not _collected.deprecated:
        return None
    return (
        f"note: megatron-core {find_version()} gives GPTModel, which the policy is built on, critical fixes "
        "only; nothing has to be done: --model-class hybrid builds it on its successor, with the same results"
    )
