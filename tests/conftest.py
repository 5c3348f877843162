"""Settings of the test run."""

import os

# NeMo Guardrails reports its use over the network unless told not to, and reads this when it is imported.
os.environ["NEMO_GUARDRAILS_NO_USAGE_STATS"] = "1"

# Beside other workers each has a processor to itself: engines in several processes that share all of them wait for
# each other in circles.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {processors[int(os.environ["PYTEST_XDIST_WORKER"][2:]) % len(processors)]})

# What a developer has set for their own guard must not reach the tests.
for name in [name for name in os.environ if name.startswith("RSAFE_") and name != "RSAFE_CACHE_DIR"]:
    del os.environ[name]
