"""Learning rate over the budget."""

import pytest

from fffsweep.pipeline.schedules import SCHEDULES, factor
from fffsweep.pipeline.stages.finetune import FinetuneRecipe
from fffsweep.pipeline.stages.pretrain import PretrainRecipe


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("triangle", {0: 0.25, 0.75: 1, 0.875: 0.5, 1: 0}),
        ("one_cycle", {0: 0, 0.25: 0.5, 0.5: 1, 1: 0}),
        ("wsd", {0: 1, 0.8: 1, 0.9: 0.5, 1: 0}),
        ("cosine", {0: 1, 0.5: 0.5, 1: 0}),
        ("constant", {0: 1, 1: 1}),
    ],
)
def test_shape(schedule, points):
    assert [factor(schedule, at) for at in points] == pytest.approx(list(points.values()), abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stays_between_nothing_and_the_peak(schedule):
    values = [factor(schedule, step / 100) for step in range(-5, 120)]
    assert min(values) >= 0
    assert max(values) <= 1 + 1e-9


def test_warm_up_rises_from_zero_and_meets_the_schedule():
    assert factor("cosine", 0.05, warmup=0.1) == pytest.approx(0.5)
    assert factor("cosine", 0.1, warmup=0.1) == pytest.approx(1)
    assert factor("cosine", 0.55, warmup=0.1) == pytest.approx(0.5)
    assert factor("wsd", 0.9, warmup=0.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, r"budget: got none; expected exactly one of tokens, steps and wall_clock_s; add one"),
        ({"tokens": 10, "steps": 2}, r"budget: got tokens and steps; expected exactly one"),
        ({"tokens": 10, "warmup": 0.1}, r"warmup=0.1 with schedule triangle.*expected 0; remove warmup"),
        ({"tokens": 10, "batch_size": 100, "micro_batch_size": 64}, r"expected a multiple of it; try 128"),
        ({"tokens": "1e6", "micro_batch": 3}, r"micro_batch"),
        ({"tokens": 0}, r"greater than or equal to 1"),
    ],
)
def test_bad_recipes_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        PretrainRecipe.model_validate(fields)


def test_a_budget_reads_as_people_write_it():
    assert PretrainRecipe.model_validate({"tokens": "1M"}).tokens == 1_000_000


def test_finetuning_defaults_are_glue_sane():
    recipe = FinetuneRecipe()
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.schedule, recipe.warmup) == (5, 16, 4e-5, "cosine", 0.1)
    with pytest.raises(ValueError, match=r"warmup=0\.1 with schedule one_cycle"):
        FinetuneRecipe(schedule="one_cycle")
