"""What must never be lost or silently wrong, by many faults: `make test-reliability`, and `-full` for the figures."""
