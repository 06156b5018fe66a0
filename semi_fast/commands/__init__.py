"""The commands of `semi-fast`, a module each."""
