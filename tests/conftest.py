"""What all tests share: no network, no telemetry, and one thread for each process: `make test` runs one a core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.support.hub_here import server  # noqa: E402, F401
from tests.support.loopback_hub import hub_server  # noqa: E402, F401
