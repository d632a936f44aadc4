"""Whatever is put into a backlog arrives in order, however often the receiver is gone meanwhile; what never arrives is counted."""

import threading
import time

import pytest

from fffsweep.sweeps import backlog
from fffsweep.sweeps.backlog import Backlog


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(backlog, "_GATHER_S", 0.01)
    monkeypatch.setattr(backlog, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(backlog, "_LONGEST_WAIT_S", 0.01)


class Server:
    """Fails the next `failures` writes after half of the items were taken."""

    batch = 400

    def __init__(self, failures=0, refused=()):
        self.failures, self.refused, self.taken, self.closed = failures, refused, [], False
        self.calls = 0

    def write(self, items):
        self.calls += 1
        if refused := [item for item in items if item in self.refused]:
            raise ValueError(f"{refused[0]} is bad")
        if self.failures:
            self.failures -= 1
            self.taken += [item for item in items[: len(items) // 2] if item not in self.taken]
            raise ConnectionError("gone")
        self.taken += [item for item in items if item not in self.taken]

    def close(self):
        self.closed = True


def run(server, items, make=None, patience_s=20.0):
    said = []
    waiting = Backlog("MLflow", make or (lambda: server), lambda error: isinstance(error, ValueError), said.append)
    for item in items:
        waiting.put(lambda item=item: item)
    return waiting.close(patience_s), said


def test_everything_arrives_in_order():
    server = Server()
    assert run(server, range(1000)) == (0, [])
    assert server.taken == list(range(1000))
    assert server.closed
    assert server.calls < 20  # gathered, not told one by one


def test_a_server_that_is_gone_is_told_later():
    server = Server(failures=3)
    lost, said = run(server, range(50))
    assert (lost, sorted(server.taken)) == (0, list(range(50)))
    assert len(said) == 2
    assert "cannot be reached (ConnectionError: gone)" in said[0]
    assert "again" in said[1]


def test_a_server_may_not_be_there_yet():
    server, tries = Server(), iter([ConnectionError("not yet"), ConnectionError("not yet"), None])

    def make():
        if (error := next(tries)) is not None:
            raise error
        return server

    assert run(server, range(5), make)[0] == 0
    assert server.taken == list(range(5))


def test_what_is_refused_is_left_out_alone():
    server = Server(refused=(3,))
    lost, said = run(server, range(6))
    assert lost == 1
    assert server.taken == [0, 1, 2, 4, 5]
    assert said == ["MLflow refuses an entry: ValueError: 3 is bad"]


def test_an_item_that_cannot_be_read_is_left_out_alone():
    server, said = Server(), []
    waiting = Backlog("MLflow", lambda: server, lambda _: False, said.append)
    waiting.put(lambda: 1)
    waiting.put(lambda: 1 // 0)
    waiting.put(lambda: 2)
    assert waiting.close() == 1
    assert server.taken == [1, 2]
    assert "ZeroDivisionError" in said[0]


def test_patience_ends_and_what_is_untold_is_counted():
    server = Server(failures=10**9)
    lost, _ = run(server, range(7), patience_s=0.2)
    assert lost == 7


def test_patience_is_with_a_lost_server_and_not_with_a_slow_one(monkeypatch):
    monkeypatch.setattr(backlog, "_LONG_CLOSE_S", 0.05)
    monkeypatch.setattr(backlog, "_STUCK_S", 0.1)

    class Slow(Server):
        batch = 2

        def write(self, items):
            time.sleep(0.05)
            super().write(items)

    server = Slow()
    lost, said = run(server, range(40), patience_s=0.3)  # takes a second altogether
    assert (lost, sorted(server.taken)) == (0, list(range(40)))
    assert any("telling MLflow of" in line for line in said)


def test_a_call_that_never_returns_is_given_up(monkeypatch):
    monkeypatch.setattr(backlog, "_STUCK_S", 0.1)
    monkeypatch.setattr(backlog, "_LONG_CLOSE_S", 0.05)
    release = threading.Event()

    class Stuck(Server):
        def write(self, items):
            release.wait(20)

    begun = time.monotonic()
    lost, _ = run(Stuck(), range(3), patience_s=0.1)
    release.set()
    assert lost == 3
    assert time.monotonic() - begun < 10


def test_the_driver_never_waits():
    entered, release = threading.Event(), threading.Event()

    class Slow(Server):
        def write(self, items):
            entered.set()
            release.wait(20)
            super().write(items)

    server = Slow()
    waiting = Backlog("MLflow", lambda: server, lambda _: False, print)
    waiting.put(lambda: 0)
    assert entered.wait(20)
    for item in range(1, 100):
        waiting.put(lambda item=item: item)  # returns although the server has not
    release.set()
    assert waiting.close() == 0
    assert server.taken == list(range(100))
