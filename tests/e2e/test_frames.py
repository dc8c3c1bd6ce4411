"""How deep a reader has to follow: frames of the package from the command to the loss."""

import subprocess
import sys

MOST = 11


def test_the_loss_is_few_frames_from_the_command():
    """Each frame is a file or function that somebody who looks for the loss has to read. Deeper than this, a layer only
    hands on: let its caller call what it calls.
    """
    ended = subprocess.run([sys.executable, "-m", "tests.frames"], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    frames = [line for line in ended.stdout.splitlines() if "megatron_jq/" in line]
    assert frames[0].endswith("cli/main.py/main") and frames[-1].endswith("weighted_logprob.py/forward")
    assert len(frames) <= MOST, "\n".join(frames)
