"""From a config to keys: what is shared, what is measured against what, what a change makes anew."""

from pathlib import Path

import pytest

from fffsweep.sweeps.config import load_config
from fffsweep.sweeps.graph import build
from fffsweep.sweeps.space import expand

TINY = Path(__file__).parents[2] / "sweeps" / "tiny.yaml"


def graph_of(*overrides):
    config = load_config(TINY, overrides)
    return {plan.spec.id: {stage.label: stage for stage in plan.stages} for plan in build(config, expand(config))}


@pytest.fixture(scope="module")
def graph():
    return graph_of()


def keys_of(graph):
    return {stage.run.key for stages in graph.values() for stage in stages.values()}


def test_every_trial_has_the_stages_of_its_seeds_and_collects_last():
    for stages in graph_of("seeds={pretrain: 2, finetune: 3}").values():
        assert [label.split("/")[0] for label in stages].count("finetune") == 2 * 2 * 3
        assert next(iter(stages)) == "prepare"
        assert list(stages)[-1] == "collect"
        assert set(stages["collect"].run.inputs) == set(stages) - {"prepare", "collect"}


def test_all_trials_share_one_prepare_run(graph):
    assert len({stages["prepare"].run.key for stages in graph.values()}) == 1
    assert len(keys_of(graph)) == 1 + len(graph) * 5


def test_inputs_come_before_whoever_reads_them(graph):
    seen = set()
    for stages in graph.values():
        for stage in stages.values():
            assert set(stage.run.inputs.values()) <= seen
            seen.add(stage.run.key)


def test_every_layer_is_timed_against_the_reference_of_the_same_replicate():
    graph = graph_of("seeds={pretrain: 2, finetune: 1}")
    for stages in graph.values():
        for replicate in (0, 1):
            inputs = stages[f"benchmark_cpu/{replicate}"].run.inputs
            assert inputs["reference"] == graph["60x0"][f"pretrain/{replicate}"].run.key
            assert inputs["pretrain"] == stages[f"pretrain/{replicate}"].run.key
        assert stages["pretrain/0"].run.key != stages["pretrain/1"].run.key


def test_seeds_pair_the_trials(graph):
    assert {stages["pretrain/0"].run.seed for stages in graph.values()} == {0}
    assert {stages["finetune/0/stsb/0"].run.seed for stages in graph.values()} == {0}


def test_a_timing_owns_its_node_and_belongs_to_its_machine(graph):
    benchmark = graph["4x3"]["benchmark_cpu/0"]
    assert benchmark.resources.exclusive
    assert "machine" in benchmark.run.fingerprints
    assert "machine" not in graph["4x3"]["pretrain/0"].run.fingerprints


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("stages.finetune.max_rows=65", {"finetune", "collect"}),
        ("stages.benchmark_cpu.min_time_s=0.03", {"benchmark_cpu", "collect"}),
        ("stages.pretrain.tokens=21k", {"pretrain", "finetune", "benchmark_cpu", "collect"}),
        ("stages.prepare.max_corpus_bytes=600k", {"prepare", "pretrain", "finetune", "benchmark_cpu", "collect"}),
        ("layouts=[60x0, 4x3, 2x4]", set()),
        ("seeds={pretrain: 1, finetune: 2}", {"collect"}),
        ("description=other words", set()),
    ],
)
def test_a_change_makes_anew_what_depends_on_it_and_nothing_else(graph, override, stale):
    changed = graph_of(override)
    for trial, stages in graph.items():
        for label, stage in stages.items():
            same = stage.run.key == changed[trial][label].run.key
            assert same == (stage.run.stage not in stale), (trial, label)
