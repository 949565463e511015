"""Hypothesis draws the same examples in every run: what is green here is green everywhere, and a failure comes back when it is looked for.

`--hypothesis-profile=search` draws new ones.
"""

import pytest
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("same")

# What they assert is shown as in a test.
pytest.register_assert_rewrite(
    "tests.node.daemon", "tests.faults.armed_daemon", "tests.faults.scenarios", "tests.faults.keeping"
)
