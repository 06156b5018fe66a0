"""The operations of a step: each a folder with its reference in torch and, where one pays, a kernel."""
