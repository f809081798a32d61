"""The load test: what clients do (patterns, recorder, truth), what is seen meanwhile (watch), what is told (findings,
plots, pages). The processes themselves are ``postcopy.toucher``, led by ``postcopy.crowd``."""
