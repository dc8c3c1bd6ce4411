"""What rank 0 of a run does with its folders, without a model: for tests of whose checkpoints are whose.

A checkpoint's weights are a text: the names of all saves that led to it, so that one look says whose state it is and
from what it descends.
"""

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_jq.checkpoint import folder as folders
from megatron_jq.checkpoint import ownership
from megatron_jq.checkpoint.folder import Manifest
from megatron_jq.config import Config, to_toml
from megatron_jq.errors import UserError
from megatron_jq.train.run_directory import RunFolders, check_settings

WEIGHTS = "weights"
CLOCK = itertools.count()


@dataclass(frozen=True)
class Command:
    """`megatron-jq train` as far as folders go. name: of the run, for its saves' names."""

    name: str
    run_dir: Path
    save: Path | None
    q: float = 0.75
    resume: bool = False
    keep_last: int | None = None

    @property
    def config(self) -> Config:
        c = Config()
        return replace(
            c,
            objective=replace(c.objective, q=self.q),
            training=replace(c.training, run_dir=str(self.run_dir)),
            checkpoint=replace(
                c.checkpoint,
                save=None if self.save is None else str(self.save),
                resume=self.resume,
                keep_last=self.keep_last,
            ),
        )


class Run:
    """What rank 0 does between its first look at the folders and its end. UserError where it is refused."""

    def __init__(self, command: Command):
        self.command, self.step, self.history = command, 0, ""
        self._folders = RunFolders(command.config)
        try:
            self._folders.open()
            parent = self._parent()
            self._branches = self._folders.branches(parent)
            self._folders.claim()
        except UserError:
            self._folders.close()
            raise

    def _parent(self) -> Manifest | None:
        save = self._folders.save
        if not self.command.resume or not folders.candidates(save, "--save"):
            return None
        folder = folders.find(save, "--save", log=lambda _: None)
        parent = folders.read_manifest(folder)
        check_settings(parent, self.command.config)
        self.step, self.history = parent.step, (folder / WEIGHTS).read_text()
        return parent

    def save(self) -> None:
        self.step += 5
        self.history += f" {self.command.name}{self.step}"
        partial = folders.begin(self._folders.save, self.step)
        (partial / WEIGHTS).write_text(self.history)
        manifest = Manifest(
            self.step, {}, 11, False, to_toml(self.command.config),
            run=asdict(self._folders.run), branches=self._branches, written=float(next(CLOCK)),
        )  # fmt: skip
        ownership.finish(partial, manifest, keep_last=self.command.keep_last)

    def end(self) -> None:
        self._folders.close()


def histories(save: Path) -> set[str]:
    return {(path / WEIGHTS).read_text() for path in folders.saved_steps(save).values()} if save.is_dir() else set()


def trained(command: Command, saves: int = 1) -> str:
    run = Run(command)
    for _ in range(saves):
        run.save()
    run.end()
    return run.history
