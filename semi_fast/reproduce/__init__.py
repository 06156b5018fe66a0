"""The cells of the paper's tables: their values, their configurations, and a command that runs one and compares."""
