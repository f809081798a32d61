"""Worker processes: their state machine, the pool that carries it out, and the custodian that forks them."""
