"""What a prepared data set is on the disk."""
