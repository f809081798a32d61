"""One process per client: its fault handler, page sources and loop; and the custodian that forks them."""
