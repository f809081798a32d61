"""What status, queries, metrics, traces and the audit read; nothing here decides."""
