"""A running QEMU as page source: its RAM blocks are offered while the migration stream brings them."""
