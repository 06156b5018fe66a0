"""Frozen dataclasses of the config, one file per owner; torch-free."""
