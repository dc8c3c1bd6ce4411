"""How deep a reader has to follow: frames of the package from the command to the loss."""

from tests.distributed.ranks import run_apart
from tests.frames import frames_to_the_loss

MOST = 11


def test_the_loss_is_few_frames_from_the_command(tmp_path):
    """Each frame is a file or function that somebody who looks for the loss has to read. Deeper than this, a layer only
    hands on: let its caller call what it calls.
    """
    frames = run_apart(frames_to_the_loss, tmp_path)
    assert frames[0].endswith("cli/main.py/main") and frames[-1].endswith("weighted_logprob.py/forward")
    assert len(frames) <= MOST, "\n".join(frames)
