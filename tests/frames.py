"""Frames of the package between `main` and the loss of a real run: `python -m tests.frames`."""

import sys
import tempfile
import traceback
from pathlib import Path

PACKAGE = "megatron_jq"
RUN = (
    "--model tiny --device cpu --prompts-per-step 2 --num-rationales 2 --rationale-budget 4 --train-iters 1 "
    "--train-examples 8 --eval-examples 2 --no-tensorboard"
)


def frames_to_the_loss(folder: Path) -> list[str]:
    """File and function of the package's frames, from cli/main.py `main` to the training head's forward pass, which
    computes the loss. Patches the head: for a process of its own.
    """
    from megatron_jq.cli.main import main
    from megatron_jq.parallel.weighted_logprob import _WeightedLogProbs

    forward, stacks = _WeightedLogProbs.forward, []

    def observed(*arguments):
        stacks.append(traceback.extract_stack()[:-1])
        return forward(*arguments)

    _WeightedLogProbs.forward = staticmethod(observed)
    assert main(["train", *RUN.split(), "--run-dir", str(folder / "run")]) == 0
    files = [(Path(frame.filename).parts, frame.name) for frame in stacks[0]]
    inside = ["/".join([*parts[parts.index(PACKAGE) :], name]) for parts, name in files if PACKAGE in parts]
    return [*inside, f"{PACKAGE}/parallel/weighted_logprob.py/forward"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as top:
        frames = frames_to_the_loss(Path(top))
    sys.stdout.write("".join(f"{number:2} {frame}\n" for number, frame in enumerate(frames, 1)))
