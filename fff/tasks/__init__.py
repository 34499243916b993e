"""Training tasks: loss, optimiser, and the protocol by which a run is measured. Needs lightning (`fff[train]`)."""

from fff.tasks.callbacks import LayerSchedule, RandomState
from fff.tasks.classification import Classification
from fff.tasks.language_modeling import LanguageModeling
from fff.tasks.normalized_gd import NormalizedGD
from fff.tasks.protocol import Protocol, evaluate

__all__ = [
    "Classification",
    "LanguageModeling",
    "LayerSchedule",
    "NormalizedGD",
    "Protocol",
    "RandomState",
    "evaluate",
]
