"""One process per client: the fault handler, what it places from, its loop, and the custodian that forks them."""
