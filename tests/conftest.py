"""What all tests share: no network, no telemetry, the same invented inputs each time, and one thread for each process:
`make test` runs one a core.
"""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Without limits of time, which a busy machine exceeds.
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# A shell ignores Ctrl-C for what it starts in the background, and so would every process that a test starts.
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tests.support.hub_here import server  # noqa: E402, F401
from tests.support.loopback_hub import hub_server  # noqa: E402, F401


@pytest.fixture
def own_accelerator() -> Iterator[None]:
    """Let a test start an accelerator of its own, and leave none to the next test of the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
