"""From raw data to a prepared directory: readers, writers, and the long-tailed splits over it."""

DATASETS = ("cifar10", "cifar100", "stl10", "imagenet127", "folder", "digits")
"""What can be prepared."""
