"""How fast is it, against what, and how sure are we: ``python -m benchmarks``, or ``scripts/bench``.

Every ratio compares two processes that differ in one thing only, in pairs that alternate, so that a noisy machine
disturbs both sides alike. ``docs/benchmarks.md`` holds the figures and the command that repeats them.
"""
