"""Settings for every test."""

from hypothesis import HealthCheck, settings

# Compiled kernels make the first example slow, so no deadline; CI must not be flaky, so no fresh seeds there.
settings.register_profile("nmsparse", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nmsparse")
