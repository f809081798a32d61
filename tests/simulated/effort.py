"""How many examples hypothesis tries: POSTCOPY_EFFORT is ``normal``, ``fast``, ``ci``, ``long`` or a factor."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

FACTORS = {"": 0.4, "normal": 0.4, "fast": 0.15, "ci": 1.0, "long": 30.0}


def effort(examples: int, steps: int = 40) -> settings:
    """``examples`` histories of at most ``steps`` steps; the effort multiplies the number of histories."""
    asked = os.environ.get("POSTCOPY_EFFORT", "")
    factor = FACTORS[asked] if asked in FACTORS else float(asked)
    return settings(
        max_examples=max(1, int(examples * factor)),
        stateful_step_count=steps,
        deadline=None,
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],  # explaining takes longer than finding
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
