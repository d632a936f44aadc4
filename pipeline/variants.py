"""From the settings of a feedforward layer to the layer."""

from __future__ import annotations

from fffsweep.pipeline.feedforward import FeedForwardLayer
from fffsweep.pipeline.leaf_trees import LeafTrees
from fffsweep.pipeline.model_settings import FeedForward
from fffsweep.pipeline.node_trees import NodeTrees


def make_feedforward(settings: FeedForward, hidden_size: int, layer: int) -> FeedForwardLayer:
    """The layer in its variant, weights not drawn yet; `layer` is its number in the encoder. Raises ValueError where there is none."""
    if settings.variant == "unchanged":
        raise ValueError("variant unchanged: the layer of an existing encoder is not built but kept; expected another variant")
    kind = LeafTrees if settings.variant == "original_fff" else NodeTrees
    return kind(settings, hidden_size, layer)
