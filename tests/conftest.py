"""Settings that every test shares."""

import gc
import os
import signal

import hypothesis
import pytest

# Before torch is imported: a fork after it has worked with several threads can hang in its first parallel loop, and the
# ranks of a distributed test would fight for the cores. tests/run.sh says the same.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples every time, and no deadline: the suite must not depend on how busy the machine is.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# In a forked child a collection would walk all that the suite imported, and copy its pages: half a second of CPU each.
os.register_at_fork(after_in_child=gc.freeze)

# A shell that starts the suite in the background ignores SIGINT (nohup: SIGHUP), and every process that a test starts
# would inherit that; runs rightly leave an ignored signal alone.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _default)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run where there is a CUDA device; elsewhere they are reported as skipped, with this reason."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    # Asks the driver without starting CUDA, after which no test could fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch  # seconds: only for suites that hold such tests

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))
