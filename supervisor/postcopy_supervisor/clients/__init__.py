"""Clients: processes that attach, and client zero, the supervisor itself."""
