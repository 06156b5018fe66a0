"""What ours is compared with: the released code's step and loop, written from their description."""
