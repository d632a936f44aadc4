"""How the trees of a model are used by held-out tokens: turns, leaves, dead nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fffsweep.kernels.shape import TreeShape
from fffsweep.pipeline.feedforward import FeedForwardLayer
from fffsweep.pipeline.stage import Metrics

SCHEMA = "fffsweep.tree_health/1"


class PathCounter:
    """Counts, for one layer, how often each node is visited; fed by a hook while the model reads."""

    def __init__(self, layer: FeedForwardLayer) -> None:
        self.layer, self.shape = layer, layer.shape
        self.visits = torch.zeros(layer.shape.trees, layer.shape.nodes, dtype=torch.int64)
        self._hook = layer.register_forward_pre_hook(self._count)

    def _count(self, layer: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
        visited = self.layer.paths(*arguments).cpu()
        for level in range(self.shape.levels):
            ones = torch.ones_like(visited[:, :, level])
            self.visits.scatter_add_(1, visited[:, :, level].T, ones.T)

    def close(self) -> None:
        """Take the hook off the layer."""
        self._hook.remove()

    def report(self) -> dict[str, Any]:
        """Figures of this layer; see `tree_health`."""
        levels = [self.visits[:, 2**level - 1 : 2 ** (level + 1) - 1] for level in range(self.shape.levels)]
        # children stand in pairs, the left one first
        left = [float(level[:, 0::2].sum() / level.sum()) for level in levels[1:]]
        leaves = levels[-1]
        return {
            "layer": self.layer.layer,
            "layout": self.shape.layout,
            "left_share": left,
            "leaf_entropy": _normalised_entropy(leaves, self.shape),
            "dead_nodes": int((self.visits == 0).sum()),
            "nodes": self.shape.width,
            "leaf_usage": leaves.tolist(),
        }


def _normalised_entropy(leaves: Tensor, shape: TreeShape) -> float:
    """Entropy of leaf use over that of even use, mean over trees: 1 if all leaves are used alike, 0 if each tree uses one."""
    share = leaves.double() / leaves.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1).mean()
    return float(entropy / torch.log(torch.tensor(2.0**shape.depth, dtype=torch.float64)))


@torch.no_grad()
def publish_tree_health(model: nn.Module, read: Callable[[], None], output: Path) -> Metrics:
    """Count the paths that tokens take through `model` while `read` lets it read them; writes `tree_health.json` into `output`.

    Returns `health_metrics`; nothing, and writes nothing, for a model without trees.
    """
    counted = [PathCounter(each) for each in model.modules() if isinstance(each, FeedForwardLayer) and each.shape.depth > 0]
    if not counted:
        return {}
    model.eval()
    read()
    for each in counted:
        each.close()
    report = tree_health(counted)
    (output / "tree_health.json").write_text(json.dumps(report))
    return health_metrics(report)


def tree_health(counted: list[PathCounter]) -> dict[str, Any]:
    """Report over all layers.

    left_share: by level of decision, share of tokens that turn left. leaf_entropy: of leaf use, over that of even use. dead_nodes:
    nodes that no token visits, of `nodes`. leaf_usage: visits of each leaf, by tree. tokens: how many were read.
    """
    layers = [each.report() for each in counted]
    return {"schema": SCHEMA, "tokens": int(counted[0].visits[0, 0]), "layers": layers}


def health_metrics(report: dict[str, Any]) -> Metrics:
    """Means over layers; `tree/dead_nodes` as a share of all nodes."""
    layers = report["layers"]
    return {
        "tree/leaf_entropy": sum(each["leaf_entropy"] for each in layers) / len(layers),
        "tree/dead_nodes": sum(each["dead_nodes"] for each in layers) / sum(each["nodes"] for each in layers),
        "tree/left_share": sum(sum(each["left_share"]) / len(each["left_share"]) for each in layers) / len(layers),
    }
