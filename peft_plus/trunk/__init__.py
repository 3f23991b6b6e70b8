"""The trunk: the lowest blocks of a model, as long as they are frozen. Computed once, and skipped from then on.

Frozen and in eval mode, the lowest k blocks give the same output for the same example for ever.

| file | subject |
|---|---|
| `passes.py` | stop behind the trunk; run what lies above it on an output from outside |
| `rows.py` | a name for each row of a batch, by its content |
| `segment.py` | one file of rows and its index |
| `store.py` | rows on disk, ragged and memory-mapped |
| `folder.py` | where stores lie, and when they go |
| `identity.py` | what the trunk's output depends on: when a store may be used |
| `data.py` | what a loop knows of its data before training |
| `trial.py` | whether a model can be served at all: the first batch, both ways |
| `padding.py` | whether padding is part of a row, and moves it |
| `in_place.py` | what runs in the place of a model's forward |
| `space.py` | how large a store will be, and whether there is room |
| `cache.py` | one model's training passes, served from a store |
| `options.py` | how it is to be stored |
| `asked.py` | which plugin wants it stored |
| `choice.py` | up to which block, and what that saves |
| `service.py` | when the trunk of a run is served |
"""

from __future__ import annotations

from .cache import TrunkCache
from .data import TrainingData
from .options import CacheOptions
from .passes import Trunk, hidden
from .service import TrunkService
from .store import FeatureStore

__all__ = ["CacheOptions", "FeatureStore", "TrainingData", "Trunk", "TrunkCache", "TrunkService", "hidden"]
