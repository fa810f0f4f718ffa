"""A receiver seen: what its control segment says, as QEMU would say it.  Nothing here writes."""
