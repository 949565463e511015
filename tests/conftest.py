"""Hypothesis draws the same examples in every run: what is green here is green everywhere, and a failure comes back when it is looked for.

`--hypothesis-profile=search` draws new ones.
"""

import signal

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# How fast examples are drawn says something about the machine that draws them, and nothing about what is tested.
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **UNTIMED)
settings.register_profile("search", **UNTIMED)
settings.load_profile("same")

# It draws the constants of our modules, too: of those that are loaded by then, which depends on what was run before, and where.
providers.HypothesisProvider._local_constants = providers._local_constants

# In the background of a script it is ignored, and so it would be by every program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What they assert is shown as in a test.
pytest.register_assert_rewrite(
    "tests.node.daemon", "tests.faults.armed_daemon", "tests.faults.scenarios", "tests.faults.keeping"
)
