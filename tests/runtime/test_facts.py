"""What the readers of `nltrain doctor` find on this machine, in a store, in a log, and where there is nothing."""

import http.server
import threading

from nltrain.runtime import facts, health
from nltrain.store import LocalStore, StoreError


def test_a_store_that_refuses_is_told_by_verb(tmp_path, monkeypatch):
    found = facts.store_facts(str(tmp_path), "a/b", num_bytes=1000)
    assert not found.errors
    assert found.put_bytes_per_s > 0
    assert not list(tmp_path.rglob("*.bin"))
    for verb in ("put", "get", "list", "delete"):
        with monkeypatch.context() as patch:

            def refuse(*_):
                raise StoreError("access refused")

            patch.setattr(LocalStore, verb, refuse)
            assert facts.store_facts(str(tmp_path), "a", num_bytes=1000).errors == {verb: "access refused"}
    monkeypatch.setattr(LocalStore, "get", lambda *_: b"other")
    assert "not what was put" in facts.store_facts(str(tmp_path), "a", num_bytes=1000).errors["get"]


def test_transports_are_read_from_the_log_of_nccl():
    log = """
h:1:9 [0] NCCL INFO Using network AWS Libfabric
h:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
h:1:9 [0] NCCL INFO Channel 01/0 : 8[0] -> 0[0] [receive] via NET/OFI/0/GDRDMA
h:1:9 [0] NCCL INFO Channel 02/0 : 8[0] -> 0[0] [send] via NET/OFI/3/GDRDMA
"""
    assert facts.transports_in(log) == ("NET/OFI", "P2P/CUMEM")
    assert facts.transports_in(log.replace("NET/OFI", "NET/Socket")) == ("NET/Socket", "P2P/CUMEM")


def test_a_server_that_answers_anything_is_reached_and_one_that_does_not_is_named():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    assert facts.wandb_error(f"http://{address}") == ""
    server.shutdown()
    server.server_close()
    thread.join()
    assert facts.wandb_error(f"http://{address}").startswith(address)


def test_shared_memory_that_is_not_there_is_none(tmp_path):
    assert facts.shm_bytes(str(tmp_path / "none")) == 0
    assert facts.shm_bytes(str(tmp_path)) > 0


def test_this_machine_describes_itself():
    found = facts.node_facts("here", 0)
    assert found.packages["ray"]
    assert found.driver == ""
    assert health.check_versions([found]).level == "ok"
