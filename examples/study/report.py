"""The report: head, parts, and our reading of each, which was written by hand for the run that docs/study/ shows."""

import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from examples.study import sections
from examples.study.plan import PARTS, jobs_of_part
from examples.study.pool import Result, read_result

READING = Path(__file__).with_name("reading.md")
SECTIONS: dict[str, Callable[[sections.Values, Path], list[str]]] = {
    "a": sections.escape,
    "b": sections.cold_start,
    "c": sections.label_noise,
    "d": sections.estimators,
    "e": sections.warm_start,
    "f": sections.optimizers,
    "g": sections.loss_scale,
}


def write_report(out: Path, folder: Path, *, command: str) -> Path:
    """report.md and its pictures from all results in `out`. A part that is not finished is said to be so."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {part: _results(out, part) for part in PARTS}
    reading = read_sections(READING)
    lines = ["# The study", "", *reading.get("study", []), "", *_head(results, command)]
    for part, title in PARTS.items():
        lines += ["", f"## {part}. {title[0].upper()}{title[1:]}", ""]
        values = _values(results, part)
        if values is None:
            done = sum(result is not None for result in results[part].values())
            lines.append(f"Not finished: {done} of {len(results[part])} jobs.")
            continue
        lines += SECTIONS[part](values, folder)
        if part in reading:
            lines += ["", *reading[part]]
    path = folder / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _results(out: Path, part: str) -> dict[str, Result | None]:
    return {job.name: read_result(out, job) for job in jobs_of_part(part, out)}


def _values(results: dict[str, dict[str, Result | None]], part: str) -> sections.Values | None:
    """What the part's jobs returned, by name; f's first column is b. None where something is missing."""
    needed = {**results[part], **(results["b"] if part == "f" else {})}
    if any(result is None for result in needed.values()):
        return None
    return {name: result.value for name, result in needed.items()}


def read_sections(path: Path) -> dict[str, list[str]]:
    """ "# name" headings of a Markdown file → the lines below each, blank ones at the ends aside."""
    if not path.is_file():
        return {}
    parts = re.split(r"^# (\w+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip().splitlines() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _head(results: dict[str, dict[str, Result | None]], command: str) -> list[str]:
    done = [result for part in results.values() for result in part.values() if result is not None]
    commits = ", ".join(sorted({result.commit for result in done}))
    per_part = ", ".join(
        f"{part} {sum(r.cpu_seconds for r in jobs.values() if r is not None) / 60:.1f}"
        for part, jobs in results.items()
    )
    cpu, wall = sum(r.cpu_seconds for r in done) / 60, sum(r.wall_seconds for r in done) / 60
    return [
        f"- Command: `{command}`",
        f"- Commit: {commits}",
        f"- Machine: {_processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, torch "
        f"{version('torch')}, megatron-core {version('megatron-core')}; one thread a job",
        f"- Time: {cpu:.0f} CPU minutes ({per_part}). The wall times of the {len(done)} jobs add up to "
        f"{wall:.0f} minutes, to be divided by the number of jobs run at once",
    ]


def _processor() -> str:
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()
