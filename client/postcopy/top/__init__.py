"""``postcopy top``: ``view`` makes what is shown from two statuses (pure), ``app`` shows it (textual)."""
