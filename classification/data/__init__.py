"""Data sets and loaders: `load_datasets(DataConfig(...))`, then `make_loader` for each split."""

from classification.data.config import Augmentation, DataConfig
from classification.data.datasets import Arrays, DataSets, Split, Streamed, load_datasets
from classification.data.loaders import Batch, InMemoryLoader, StreamLoader, make_loader

__all__ = [
    "Arrays",
    "Augmentation",
    "Batch",
    "DataConfig",
    "DataSets",
    "InMemoryLoader",
    "Split",
    "StreamLoader",
    "Streamed",
    "load_datasets",
    "make_loader",
]
