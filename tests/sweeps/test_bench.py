"""The study that the orchestration suite runs is of the size that it says, and its command refuses what it cannot measure."""

import pytest

from fffsweep.sweeps.bench import NUM_STAGES, main, noop_study


def test_trials_have_twelve_stage_runs_of_their_own():
    _, plans = noop_study(20)
    assert len(plans) == 20
    own = [{stage.run.key for stage in plan.stages if stage.label != "prepare"} for plan in plans]
    assert {len(keys) for keys in own} == {NUM_STAGES}
    assert len(set().union(*own)) == 20 * NUM_STAGES
    assert len({plan.stages[0].run.key for plan in plans}) == 1
    for plan in plans:
        known = set()
        for stage in plan.stages:
            assert set(stage.run.inputs.values()) <= known
            known.add(stage.run.key)


def test_a_larger_study_extends_a_smaller_one():
    small, large = noop_study(3)[1], noop_study(4)[1]
    assert [plan.stages for plan in small] == [plan.stages for plan in large[:3]]


def test_a_folder_with_results_is_refused(tmp_path):
    (tmp_path / "store").mkdir()
    with pytest.raises(ValueError, match="not empty"):
        main(["--results", str(tmp_path)])
    with pytest.raises(ValueError, match="at least 1"):
        main(["--trials", "0"])
