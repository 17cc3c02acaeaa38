"""The status object of a run, as it is written."""

from nltrain.store import open_store
from nltrain.track.publisher import Publisher
from nltrain.track.status import StatusBoard, read_history


def test_the_status_of_a_run_outlives_the_machine_that_wrote_it(tmp_path):
    store = open_store(str(tmp_path / "store"))
    publisher = Publisher(store)
    board = StatusBoard(tmp_path, publisher, "r")
    board.begin(attempt=1, time_s=1.0)
    board.update(True, tokens=100, state="training")
    publisher.close()
    history = read_history(store, "r")
    assert (history["max_tokens"], history["attempts"]) == (100, [{"attempt": 1, "time_s": 1.0}])
    publisher = Publisher(store)
    other = StatusBoard(tmp_path / ".", publisher, "r")
    other.restore(history)
    other.begin(attempt=2, time_s=2.0)
    other.update(True, tokens=50, state="training")
    publisher.close()
    history = read_history(store, "r")
    assert history["max_tokens"] == 100
    assert len(history["attempts"]) == 2
    assert read_history(store, "another") == {}
