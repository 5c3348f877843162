"""Settings of the test run."""

import os

# NeMo Guardrails reports its use over the network unless told not to, and reads this when it is imported.
os.environ["NEMO_GUARDRAILS_NO_USAGE_STATS"] = "1"

# What a developer has set for their own guard must not reach the tests.
for name in [name for name in os.environ if name.startswith("RSAFE_") and name != "RSAFE_CACHE_DIR"]:
    del os.environ[name]
