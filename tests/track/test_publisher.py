"""Copies of the records in the store: they cost the run nothing, whatever the store does."""

import json
import threading
import time

from nltrain.store import LocalStore, open_store
from nltrain.track.publisher import Publisher
from nltrain.track.status import StatusBoard


def test_a_store_that_fails_costs_the_view_and_not_the_run(tmp_path, capsys):
    class Broken(LocalStore):
        def put(self, key, data):
            raise OSError("cut")

    publisher = Publisher(Broken(str(tmp_path / "store")))
    board = StatusBoard(tmp_path, publisher, "r")
    for tokens in (1, 2):
        board.update(True, tokens=tokens, state="training")
        time.sleep(0.05)
    publisher.close()
    assert json.loads((tmp_path / "status.json").read_text())["tokens"] == 2
    assert capsys.readouterr().out.count("r/status.json was not published (cut): training goes on") == 1


def test_a_slow_store_holds_nobody_up_and_gets_the_newest_of_each_key(tmp_path, capsys):
    under_way, go_on, puts = threading.Event(), threading.Event(), []

    class Slow(LocalStore):
        def put(self, key, data):
            under_way.set()
            assert go_on.wait(10)
            puts.append((key, data))

    publisher = Publisher(Slow(str(tmp_path / "store")))
    publisher.offer("a", lambda: b"1")
    assert under_way.wait(10)
    for value in (b"2", b"3"):
        publisher.offer("a", lambda value=value: value)
        publisher.offer("b", lambda value=value: value)
    publisher.close(timeout_s=0.05)
    assert puts == []
    assert "did not take the run's last rows within 0.05 s" in capsys.readouterr().out
    go_on.set()
    publisher.close()
    assert puts == [("a", b"1"), ("a", b"3"), ("b", b"3")]


def test_an_attempt_that_was_overtaken_publishes_nothing_more(tmp_path):
    store, newest = open_store(str(tmp_path / "store")), [True]
    publisher = Publisher(store, lambda: newest[0])
    publisher.offer("r/status.json", lambda: b"mine")
    while not store.exists("r/status.json"):
        time.sleep(0.01)
    newest[0] = False
    publisher.offer("r/status.json", lambda: b"too late")
    publisher.close()
    assert store.get("r/status.json") == b"mine"
