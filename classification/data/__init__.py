"""Data sets and loaders: `load_datasets(DataConfig(...))`, then `make_loader` for each split."""

from classification.data.datasets import DataConfig, DataSets, load_datasets
from classification.data.loaders import InMemoryLoader, StreamLoader, make_loader
from classification.data.sources import Arrays, Augmentation, Split, Streamed

__all__ = [
    "Arrays",
    "Augmentation",
    "DataConfig",
    "DataSets",
    "InMemoryLoader",
    "Split",
    "StreamLoader",
    "Streamed",
    "load_datasets",
    "make_loader",
]
