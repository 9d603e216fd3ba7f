"""Settings of all tests."""

from hypothesis import settings

# the same examples on every machine, and no time limit on each: machines are shared
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")
