"""F2: the report of a prepared set: counts, lengths, what fits the budgets, what was left out, as Markdown."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_jq.config import Config
from megatron_jq.data.lengths import Budgets, Lengths, quantiles
from megatron_jq.data.prepared import Manifest
from megatron_jq.data.prompts import Placed
from megatron_jq.data.rationale_markers import NO_OPENER
from megatron_jq.data.template import PromptTemplate
from megatron_jq.formats.record_error import RecordError


@dataclass(frozen=True)
class UsableExamples:
    """One source's examples that fit, and what else became of its records."""

    source: str  # the flag and its value
    lengths: Lengths  # of all examples, those that do not fit among them
    placed: tuple[Placed, ...]
    too_long: tuple[Placed, ...]
    dropped: tuple[RecordError, ...]
    notes: tuple[str, ...]
    changed: str  # which golds the tokenizer changes, in a line, or nothing


def report(
    config: Config,
    manifest: Manifest,
    template: PromptTemplate,
    budgets: Budgets,
    sources: Sequence[UsableExamples],
    splits: Sequence[Lengths],
    shared: int,
) -> str:
    """Return the report as Markdown. shared: prompts that stand in more than one split."""
    d, opens = config.data, "" if manifest.think_open == NO_OPENER else f", with `{manifest.think_open}`"
    lines = [
        f"# {manifest.data_format}, prompts {d.prompt_style}",
        "",
        f"content {manifest.content}",
        "",
        f"tokenizer: {manifest.tokenizer_type}, {d.tokenizer_model or 'trained on the training data'}",
        "",
        "## Splits",
        "",
        "Tokens: smallest / median / 95th percentile / largest.",
        "",
        f"| split | examples | prompt tokens{opens} | answer tokens, with the end |",
        "|---|--:|--:|--:|",
    ]
    for split in splits:
        prompts, answers = (" / ".join(map(str, quantiles(lengths))) for lengths in (split.prompts, split.answers))
        lines.append(f"| {split.name} | {len(split.prompts)} | {prompts} | {answers} |")
    lines += ["", f"Prompts in more than one split: {shared}.", "", "![lengths](lengths.png)", ""]
    lines += [*_fits(budgets, sources), *_paper(template), *_changed(sources), *_losses(sources)]
    return "\n".join(lines) + "\n"


def _fits(budgets: Budgets, sources: Sequence[UsableExamples]) -> list[str]:
    def limit(value: int | None) -> str:
        return "of any length" if value is None else f"at most {value} tokens"

    bridge = max(source.lengths.bridge for source in sources)
    lines = [
        "## What fits the budgets",
        "",
        f"Of all good records, before any is left out. Prompts: {limit(budgets.max_prompt_tokens)}; answers: "
        f"{limit(budgets.answer_budget)}; whole rows, with {budgets.rationale_budget} for the rationale, 1 to close "
        f"it, {bridge} for the bridge, and the answer budget: {limit(budgets.context)}.",
        "",
        "| source | records | prompts that fit | answers that fit | rows that fit |",
        "|---|--:|--:|--:|--:|",
    ]
    for source in sources:
        fits = " | ".join(str(number) for number in source.lengths.within(budgets))
        lines.append(f"| {source.source} | {len(source.lengths.prompts)} | {fits} |")
    return [*lines, ""]


def _paper(template: PromptTemplate) -> list[str]:
    paper = template.paper
    if paper is None:
        return []
    return [
        f"The paper's setting: --rationale-budget {paper.rationale_budget} --answer-budget {paper.answer_budget}; "
        f"{paper.train} / {paper.validation} / {paper.test} examples to train, validate and test.",
        "",
    ]


def _changed(sources: Sequence[UsableExamples]) -> list[str]:
    lines = [f"- {source.source}: {source.changed}" for source in sources if source.changed]
    return ["## Gold answers that the tokenizer changes", "", *lines, ""] if lines else []


def _losses(sources: Sequence[UsableExamples]) -> list[str]:
    lines = ["## Left out", ""]
    for source in sources:
        kinds = Counter(error.kind for error in source.dropped)
        counted = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "none"
        lines += [f"- {source.source}: {counted}", *(f"- {source.source}: {note}" for note in source.notes)]
    return [*lines, "", "dropped.jsonl names each by file and line, with its reason."]
