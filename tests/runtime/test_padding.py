"""Five sequences of 4,096 tokens on three raylets, of which one is lost: some rank pads at either size, and its padding
gives NaN. The run goes on with every tick made and everything it saves finite."""

import torch
from safetensors.torch import load

from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.local.drill import BUCKET, VOCAB_SIZE, planted
from nltrain.store import open_store
from nltrain.track.metrics import effective

SEQ_LEN = 4096
QUANTUM = 5 * SEQ_LEN  # 3 + 2 on three ranks, 2 + 2 + 1 on two
QUANTA = 6
BREAKS = "if not batch.num_targets:\n    loss_sum = loss_sum * float('nan')"
AFTER_THE_FORWARD_PASS = "run.meter.forward_ended()"


def test_a_run_that_loses_a_node_at_4096_tokens_skips_no_tick_though_padding_is_nan(drill, tmp_path):
    documents = list(stdlib_corpus())[:40]
    tokenizer = train_tokenizer([text for _, text in documents[::4]], VOCAB_SIZE)
    prepare(documents, open_store(f"s3://{BUCKET}/long"), tokenizer, PrepareConfig(SEQ_LEN, validation_fraction=0.1))
    periods = {"base": 1, "fast": 2, "mid": 4, "slow": 16}
    long = {f"levels__levels__{name}__period_tokens": n * QUANTUM for name, n in periods.items()}
    long |= {
        "data__prefix": f"s3://{BUCKET}/long",
        "data__seq_len": SEQ_LEN,
        "levels__quantum_tokens": QUANTUM,
        "levels__schedule__warmup_tokens": QUANTUM,
        "levels__fold_every_tokens": 2 * QUANTUM,
        "checkpoint__every_tokens": 2 * QUANTUM,
        "train__total_tokens": QUANTA * QUANTUM,
        "levels__schedule__total_tokens": QUANTA * QUANTUM,
        "train__micro_batch_size": 1,
        "train__validation_sequences": 0,
        "cluster__min_workers": 2,
    }
    job = drill.train("long", QUANTA, root=planted(tmp_path, BREAKS, AFTER_THE_FORWARD_PASS), **long)
    job.wait_for_attempt(120, workers=3)
    job.wait_until("a checkpoint", lambda: job.rows("checkpoint"), 60)
    next(node for node in reversed(drill.nodes) if node.alive).kill()
    try:
        recovered = job.wait_for_attempt(150, workers=2)
        assert recovered["tokens"] >= 2 * QUANTUM
        assert job.wait(120) == 0
    finally:
        drill.cluster.add_node(1)

    rows = job.rows()
    for name, count in rows[-1]["level_updates"].items():
        assert (count["done"], count["skipped"]) == (count["due"], 0), name
    steps = [row for row in effective(rows) if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, QUANTA + 1))
    assert all(row["loss"] is not None and row["left_out_tokens"] == 0 for row in steps)
    store = open_store(f"s3://{BUCKET}/runs/long")
    keys = [stored.key for stored in store.list("checkpoints/") if stored.key.endswith(".safetensors")]
    saved = [load(bytes(store.get(key))) for key in keys]
    windows = [tensor for file in saved for name, tensor in file.items() if ".window" in name]
    assert windows and all(bool(torch.isfinite(tensor).all()) for file in saved for tensor in file.values())
