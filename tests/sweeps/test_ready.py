"""The queue of ready runs offers what a look at all runs would offer, in the same order, and looks at few."""

import random

import pytest

from fffsweep.sweeps.ready import ReadyRuns


@pytest.mark.parametrize("seed", range(20))
def test_it_agrees_with_looking_at_everything(seed):
    rng = random.Random(seed)
    inputs = {f"k{n}": rng.sample([f"k{m}" for m in range(n)], min(n, rng.randint(0, 3))) for n in range(40)}
    state = dict.fromkeys(inputs, "waiting")

    def is_ready(key):
        return state[key] == "waiting" and all(state[upstream] == "done" for upstream in inputs[key])

    queue = ReadyRuns(is_ready)
    for key, upstream in inputs.items():
        queue.add(key, upstream)
    running = []
    while "waiting" in state.values() or running:
        expected = [key for key in inputs if is_ready(key)]
        assert bool(queue) == bool(expected)
        room = rng.randint(0, 3)
        unwilling = {key for key in expected if rng.random() < 0.2}
        taken = []

        def accept(key, taken=taken, room=room, unwilling=unwilling):
            if len(taken) == room:
                return None
            if key in unwilling:
                return False
            taken.append(key)
            return True

        for key in queue.take(accept):
            state[key] = "running"
            running.append(key)
        assert taken == [key for key in expected if key not in unwilling][:room]
        if running:
            ended = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.2:
                state[ended] = "waiting"
                queue.touch(ended)
            else:
                state[ended] = "done"
                queue.done(ended)
    assert set(state.values()) == {"done"}


def test_a_long_queue_is_not_walked_when_nothing_is_free():
    asked = []
    queue = ReadyRuns(lambda key: not asked.append(key))
    for number in range(1000):
        queue.add(str(number), ())
    asked.clear()
    assert list(queue.take(lambda key: None)) == []
    assert len(asked) == 1


def test_one_refusal_stands_for_its_kind():
    """Thousands that need a free node wait behind each other, and those that need less pass them in their order."""
    queue = ReadyRuns(lambda key: True, lambda key: key[0])
    for number in range(1000):
        queue.add(f"wide {number}", ())
        queue.add(f"small {number}", ())
    asked = []

    def accept(key):
        asked.append(key)
        return None if key.startswith("wide") or len(asked) > 4 else key != "small 1"

    assert list(queue.take(accept)) == ["small 0", "small 2"]
    assert asked == ["wide 0", "small 0", "small 1", "small 2", "small 3"]
    assert list(queue.take(lambda key: True))[:3] == ["wide 0", "wide 1", "small 1"]
