"""Counts as people write them, and the canonical text that keys hash."""

from typing import ClassVar

import pytest
from pydantic import ValidationError

from fffsweep.pipeline.model_settings import FeedForward, ModelSettings
from fffsweep.pipeline.settings import Count, Number, Settings, canonical_json


class Block(Settings):
    count: Count
    number: Number = 0.0


@pytest.mark.parametrize(
    ("written", "meant"), [(7, 7), (1e6, 10**6), ("1e6", 10**6), ("1_000_000", 10**6), ("1M", 10**6), ("2.5k", 2500), (" 3G ", 3 * 10**9)]
)
def test_counts_read_as_written(written, meant):
    assert Block(count=written).count == meant


@pytest.mark.parametrize("written", ["1.5", 1.5, "many", "1e-3", None, "1 M M", float("nan")])
def test_what_is_no_whole_number_is_refused(written):
    with pytest.raises(ValidationError):
        Block(count=written)


def test_yaml_leaves_exponents_as_text():
    assert Block(count=1, number="1e-3").number == 1e-3


def test_unknown_keys_are_refused():
    with pytest.raises(ValidationError, match="nodes"):
        Block(count=1, nodes=2)


def test_canonical_json_ignores_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [1, {"d": 2, "c": 3}]}) == canonical_json({"a": [1, {"c": 3, "d": 2}], "b": 1})


def test_a_tree_of_depth_0_is_a_dense_layer():
    assert FeedForward(variant="fff", trees=512, depth=0, execution="masked") == FeedForward(variant="dense", trees=512)


def test_fields_that_a_variant_does_not_read_do_not_split_it():
    assert FeedForward(variant="none", trees=3, activation="relu") == FeedForward(variant="none")
    assert FeedForward(variant="fff", depth=3, routing_seed=5) == FeedForward(variant="fff", depth=3)
    assert FeedForward(variant="random_routing", depth=3, routing_seed=5) != FeedForward(variant="random_routing", depth=3)


def test_heads_must_divide_hidden_size():
    with pytest.raises(ValidationError, match="possible: 1, 2, 4"):
        ModelSettings(hidden_size=128, num_heads=3, feedforward=FeedForward(variant="none"))


class Place(Settings):
    locations: ClassVar[frozenset[str]] = frozenset({"path"})
    path: str
    parts: tuple["Place", ...] = ()
    size: int = 1


def test_an_identity_leaves_out_where_things_lie_at_every_depth():
    place = Place(path="/a", parts=(Place(path="/b", size=2),))
    assert place.identity() == {"parts": [{"parts": [], "size": 2}], "size": 1}
    assert place.resolved()["parts"][0]["path"] == "/b"
