"""Config of the encoder and of its feedforward layer; torch-free, so that planning a sweep stays quick."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator

from fffsweep.kernels.shape import TreeShape
from fffsweep.pipeline.settings import Count, Number, Settings, parse_count

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "leaky_relu", "identity"]


class FeedForward(Settings):
    """The feedforward layer, one field for every variant and control.

    variant: `dense` (`trees` neurons, depth 0), `fff` (2311.10770: every node emits), `original_fff` (2308.14711: routers that only
    decide, a small dense layer of `leaf_width` neurons at each leaf, mixed softly in training and one alone at inference), `none`
    (no feedforward layer), `random_routing` (an fff whose path is a hash of token id, layer, tree and `routing_seed`, in training
    and at inference), `unchanged` (an existing encoder's own dense layer of `trees` neurons). A tree of depth 0 is a dense layer and
    becomes one, and what a variant does not read is left out of it, so that equal models are equal configs.
    init: `normal`, N(0, 0.02) with zero biases at every layout; `fan`, uniform within 1 / sqrt(inputs used for one token).
    execution: how a tree is computed, in training and evaluation (original_fff: in evaluation); `masked` costs as much as a dense
    layer of its width.
    routing_gradient: `none` as in the paper, or `straight_through` to let decisions learn from what hangs below them.
    load_balancing: weight of a penalty on nodes that send all their tokens one way.
    master_leaf: neurons that every token uses beside its paths. output_bias: one at the layer's output (original_fff: at each leaf's).
    hardening: weight of the decisions' mean entropy in the loss. transposition: chance that a decision is turned round in training.
    """

    variant: Literal["dense", "fff", "original_fff", "none", "random_routing", "unchanged"]
    trees: Count = Field(default=1, ge=1)
    depth: Count = Field(default=0, ge=0)
    leaf_width: Count = Field(default=1, ge=1, description="original_fff: neurons of a leaf")
    master_leaf: Count = Field(default=0, ge=0, description="neurons that every token uses beside its paths")
    activation: Activation = "gelu"
    input_bias: bool = True
    output_bias: bool = False
    init: Literal["normal", "fan"] = "normal"
    execution: Literal["masked", "cmm"] = "cmm"
    routing_gradient: Literal["none", "straight_through"] = "none"
    load_balancing: Number = Field(default=0.0, ge=0)
    hardening: Number = Field(default=1.0, ge=0, description="original_fff: weight of the decisions' entropy, nats, in the loss")
    transposition: Number = Field(default=0.0, ge=0, le=0.5, description="original_fff: chance that a decision is turned round in training")
    routing_seed: Count = 0

    @model_validator(mode="before")
    @classmethod
    def _canonical(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("variant") in _TREES and int(values.get("depth", 0)) == 0:
            neurons = int(parse_count(values.get("trees", 1)))
            if values["variant"] == "original_fff":
                neurons *= int(parse_count(values.get("leaf_width", 1)))
            values |= {"variant": "dense", "trees": neurons + int(parse_count(values.pop("master_leaf", 0)))}
        for name in _UNREAD.get(values.get("variant", ""), ()):
            values.pop(name, None)
        return {"variant": "none"} if values.get("variant") == "none" else values

    @model_validator(mode="after")
    def _shape_exists(self) -> FeedForward:
        if self.variant in ("dense", "unchanged") and self.depth:
            raise ValueError(f"variant dense with depth={self.depth}: a dense layer has depth 0; use variant fff for a tree")
        if self.variant == "dense" and self.master_leaf:
            raise ValueError(f"variant dense with master_leaf={self.master_leaf}: every neuron is used anyway; add them to trees")
        TreeShape(self.trees, self.depth)
        return self

    @cached_property
    def shape(self) -> TreeShape | None:
        """Trees and depth; a dense layer is depth 0; None without a feedforward layer."""
        return None if self.variant == "none" else TreeShape(self.trees, self.depth)

    @property
    def width(self) -> int:
        """Neurons stored, master leaf and routers among them."""
        shape = self.shape
        if shape is None:
            return 0
        return int(shape.width + self.trees * 2**self.depth * (self.leaf_width - 1) + self.master_leaf)

    @property
    def active_width(self) -> int:
        """Neurons used for one token at inference, master leaf and routers among them."""
        shape = self.shape
        return 0 if shape is None else shape.active_width + self.trees * (self.leaf_width - 1) + self.master_leaf


_TREES = ("fff", "original_fff", "random_routing")
_OF_ORIGINAL = ("leaf_width", "hardening", "transposition")
_OF_DECISIONS = ("routing_gradient", "load_balancing")
_UNREAD = {
    "dense": (*_OF_ORIGINAL, *_OF_DECISIONS, "execution", "routing_seed"),
    "fff": (*_OF_ORIGINAL, "routing_seed"),
    "original_fff": (*_OF_DECISIONS, "routing_seed"),
    "random_routing": (*_OF_ORIGINAL, *_OF_DECISIONS),
    "unchanged": tuple(name for name in FeedForward.model_fields if name not in ("variant", "trees")),
}


class ModelSettings(Settings):
    """The crammed-BERT encoder: pre-norm, no biases in attention, scaled sinusoidal positions, tied decoder.

    Source: Geiping & Goldstein 2022, arXiv 2212.14034. The vocabulary comes from the prepared data.
    """

    hidden_size: Count = Field(default=768, ge=1)
    num_layers: Count = Field(default=16, ge=1)
    num_heads: Count = Field(default=12, ge=1)
    sequence_length: Count = Field(default=128, ge=8)
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    feedforward: FeedForward

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelSettings:
        if self.hidden_size % self.num_heads:
            divisors = [n for n in range(1, min(self.hidden_size, 64) + 1) if self.hidden_size % n == 0]
            raise ValueError(
                f"hidden_size={self.hidden_size} with num_heads={self.num_heads}: heads must divide hidden_size; "
                f"possible: {', '.join(map(str, divisors))}"
            )
        return self
