"""Take-over from a supervisor that is gone."""
