"""Worker processes: their lifecycle, and the custodian that forks them."""
