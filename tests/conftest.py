"""Hypothesis draws the same examples in every run: what is green here is green everywhere, and a failure comes back when it is looked for.

`--hypothesis-profile=search` draws new ones.
"""

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("same")
