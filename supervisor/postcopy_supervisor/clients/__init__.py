"""Clients: the attach server, what it keeps of each client, and the supervisor as its own client (client zero)."""
