"""semi_fast: image classifiers from few, unevenly distributed labels and many unlabeled images."""

__version__ = "0.1.0"
