"""The load test.

What clients do: ``toucher``, ``patterns``, ``recorder``, ``expected``, ``replay``. How they are started:
``client_group``, ``starter``. What is observed: ``watch``. The output: ``results``, ``plots``, ``report``."""
