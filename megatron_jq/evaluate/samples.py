"""F4: the file of an evaluation's samples: JSON lines, written as they come, judged again without a model.

The first line says what was evaluated (Header), every other is one sample, prompt by prompt. A killed evaluation leaves
whole prompts and at most one incomplete prompt after them, which is dropped on resuming. Rank 0 alone writes.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_jq.errors import UserError
from megatron_jq.evaluate.judging import Answer, Judge
from megatron_jq.formats.markers import THINK_CLOSE
from megatron_jq.formats.table import format_named

_FORMAT = 2  # 1: without the tokenizer's spelling of the golds, answer_extract, reward


@dataclass(frozen=True)
class Header:
    """Everything the samples follow from, and the judge that `matched` is by. source, data_source: names for people."""

    source: str
    data_source: str
    data_format: str
    weights: str  # digest of the checkpoint's tensors
    data: str  # fingerprint of the prompts and gold answers as token ids
    checkpoint_step: int
    dtype: str
    num_prompts: int
    num_samples: int
    temperature: float
    seed: int
    rationale_budget: int
    answer_budget: int
    match: str
    rule: str
    format: int = _FORMAT
    answer_extract: str = "none"
    reward: str | None = None  # the user's function, MODULE:FUNCTION
    num_available: int | None = None  # good examples of the source; None: not written down
    top_p: float = 1.0  # older files lack it, and think_close
    think_close: str = THINK_CLOSE  # the token that closes a rationale; what opens one is among the prompts' ids

    @property
    def judge(self) -> Judge:
        return Judge(self.match, self.rule, self.answer_extract, format_named(self.data_format).ratios)

    def differences(self, other: "Header") -> list[str]:
        """Names of the fields that make another evaluation of it."""
        compared = (f.name for f in fields(self) if f.name not in ("source", "data_source", "num_available"))
        return [name for name in compared if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Sample:
    """One rationale z and the answer drawn after it. golds: y*, then aliases, then what the tokenizer makes of them
    where that is another text. log_w: ln p(y*|x,z), in nats. reward: by the user's own function, where there is one.

    prompt counts the evaluated prompts, row is the prompt's row in its data set. forced: z was closed by force, so its
    last id was not sampled. Texts are for reading; the ids are what was sampled.
    """

    prompt: int
    row: int
    sample: int
    rationale: str
    rationale_ids: tuple[int, ...]
    forced: bool
    answer: str
    answer_ids: tuple[int, ...]
    ended: bool
    golds: tuple[str, ...]
    log_w: float
    matched: bool
    reward: float | None = None

    @property
    def drawn(self) -> Answer:
        return Answer(self.answer, self.ended, self.reward)

    @property
    def num_sampled(self) -> int:
        """Tokens sampled for the rationale."""
        return len(self.rationale_ids) - self.forced


class SampleFile:
    """A file that is being written. `done`: whole prompts in it. OSError where the disk refuses."""

    def __init__(self, path: Path, header: Header):
        """Create it, or continue where it ends. UserError where it holds another evaluation's samples."""
        self._path = path
        if not path.exists():
            # By renaming: a file with this name has a whole header.
            partial = path.with_name(f".{path.name}")
            partial.write_bytes(_line({"evaluation": asdict(header)}))
            partial.replace(path)
        header_on_disk = read_header(path)
        if differing := header.differences(header_on_disk):
            raise UserError(
                f"--output: {path} holds another evaluation (it differs in {', '.join(differing)}); name another "
                "folder, or judge those samples again with --rescore"
            )
        ends = [len(_first_line(path)), *(end for _, end in _whole_prompts(path, header_on_disk))]
        self.done, end = len(ends) - 1, ends[-1]
        self._file = open(path, "r+b")
        self._file.truncate(end)
        self._file.seek(end)

    def append(self, samples: Iterable[Sample]) -> None:
        """Whole prompts, on disk when this returns."""
        self._file.write(b"".join(_line(asdict(sample)) for sample in samples))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_samples(path: Path) -> tuple[Header, list[list[Sample]]]:
    """Return all samples by prompt. UserError: not such a file, a line that is none of its samples, prompts missing."""
    header = read_header(path)
    prompts = [samples for samples, _ in _whole_prompts(path, header)]
    if len(prompts) < header.num_prompts:
        raise UserError(
            f"{path} holds {len(prompts)} of {header.num_prompts} prompts: its evaluation was stopped; run the same "
            "command again to continue"
        )
    if not prompts:
        raise UserError(f"{path} holds no samples")
    return header, prompts


def read_header(path: Path) -> Header:
    """Return the first line's header. UserError where the file cannot be read, or begins otherwise."""
    try:
        table = json.loads(_first_line(path))["evaluation"]
        if table["format"] > _FORMAT:
            raise UserError(f"{path} was written by a later version of megatron-jq; update the package")
        return Header(**table)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a samples.jsonl that can be read") from error
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no file of samples: its first line does not describe an evaluation") from error


def _first_line(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.readline()


def _whole_prompts(path: Path, header: Header) -> Iterator[tuple[list[Sample], int]]:
    """Yield (samples, offset after them) of every whole prompt in order."""
    expected = ((b, m) for b in range(header.num_prompts) for m in range(header.num_samples))
    with open(path, "rb") as file:
        end, samples = len(file.readline()), []
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):
                return  # cut by a kill
            sample = _sample(line, f"{path}:{number}")
            if (sample.prompt, sample.sample) != next(expected, None):
                raise UserError(f"{path}:{number} is out of place: prompt {sample.prompt}, sample {sample.sample}")
            samples.append(sample)
            end += len(line)
            if len(samples) == header.num_samples:
                yield samples, end
                samples = []


def _sample(line: bytes, location: str) -> Sample:
    try:
        table = json.loads(line)
        for name in ("rationale_ids", "answer_ids", "golds"):
            table[name] = tuple(table[name])
        return Sample(**table)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{location} is not a sample; restore the file, or evaluate again into another folder"
        ) from error


def _line(table: dict[str, Any]) -> bytes:
    return json.dumps(table, allow_nan=False, ensure_ascii=False).encode() + b"\n"
