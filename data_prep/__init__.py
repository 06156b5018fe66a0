"""From raw data to a prepared directory: readers, writers, and the long-tailed splits over it."""
