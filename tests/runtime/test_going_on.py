"""What a run does when something around it gives way or is changed: one process, real training, small.

A folder that cannot be written; an attempt that another one has overtaken; a validation that fails; other data, another
schedule, another period after a resume.
"""

import contextlib
import io
import json
import runpy
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import _forked as forked
from nltrain.checkpoint import fence
from nltrain.checkpoint.catalog import attempts, claim_attempt, list_checkpoints, read_manifest
from nltrain.config import override
from nltrain.data import train_tokenizer
from nltrain.data.prepare import PrepareConfig, prepare, stdlib_corpus
from nltrain.evaluate.validation import Validation
from nltrain.local.drill import QUANTUM, SEQ_LEN, SMALL, VOCAB_SIZE
from nltrain.loop import train
from nltrain.network import free_ports
from nltrain.store import open_store
from nltrain.supervision import SLOW_PHASES, STARTING, TRAINING, WAITING_FOR_SAVE, Unsupervised
from nltrain.track.metrics import effective, read_rows

ROOT = Path(__file__).resolve().parents[2]
QUANTA = 8


class Overtaken(Unsupervised):
    """Another attempt begins at T = `tokens`; from then on a quantum lasts long enough for a look."""

    def __init__(self, store, run, tokens):
        super().__init__(0.0)
        self._store, self._run, self._tokens, self.seen = store, run, tokens, 0

    def beat(self, phase, tokens):
        if tokens >= self._tokens and self.seen < self._tokens:
            claim_attempt(self._store, self._run)
        if tokens > self.seen >= self._tokens:
            time.sleep(0.3)
        self.seen = tokens


class Phases(Unsupervised):
    """Remembers the phase in which each quantum ends, and all phases."""

    def __init__(self):
        super().__init__(0.0)
        self.all, self.at_the_end = [], []

    def beat(self, phase, tokens):
        self.all.append(phase)

    def wish(self):
        self.at_the_end.append(self.all[-1])
        return super().wish()


def config(folder, name, **more):
    job = runpy.run_path(str(ROOT / "jobs" / "hope_tiny.py"))["config"]
    values = (
        SMALL
        | {
            "name": name,
            "output": folder / name,
            "data.prefix": folder / "corpus",
            "data.cache_dir": folder / "cache",
            "checkpoint.url": folder / "runs",
            "checkpoint.every_tokens": 4 * QUANTUM,
            "levels.fold_every_tokens": 4 * QUANTUM,
            "train.total_tokens": QUANTA * QUANTUM,
            "train.validate_every_tokens": 4 * QUANTUM,
            "levels.schedule.total_tokens": QUANTA * QUANTUM,
            "levels.schedule.kind": "cosine",
            "levels.schedule.min_lr_fraction": 0.1,
            "levels.schedule.warmup_tokens": QUANTUM,
            "cluster.max_workers": 1,
        }
        | {key.replace("__", "."): value for key, value in more.items()}
    )
    return override(job, [f"{key}={value}" for key, value in values.items()])


def longer(quanta, **more):
    tokens = quanta * QUANTUM
    allowed = "train.total_tokens,levels.schedule.total_tokens"
    return {
        "train__total_tokens": tokens,
        "levels__schedule__total_tokens": tokens,
        "checkpoint__may_change": allowed,
    } | {f"levels__schedule__{name}": value for name, value in more.items()}


def one_rank(rank, environment, folder, port):
    forked.begin(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    fence.EVERY_S = 0.1
    found = {}

    def case(label, *arguments):
        """Trains; keeps what was said, and the error where there is one."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                train(*arguments)
                error = ""
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
        found[label] = {"said": said.getvalue(), "error": error}

    phases = Phases()
    case("straight", config(folder, "straight"), phases)
    found["phases"] = {"all": phases.all, "at_the_end": phases.at_the_end}
    (folder / "readonly").write_text("a file where a folder should be")
    case("no_folder", config(folder, "readonly"))
    store = open_store(str(folder / "runs"))
    case("overtaken", config(folder, "overtaken", train__total_tokens=400 * QUANTUM,
         levels__schedule__total_tokens=400 * QUANTUM, checkpoint__every_tokens=200 * QUANTUM,
         levels__fold_every_tokens=200 * QUANTUM), Overtaken(store, "overtaken", 3 * QUANTUM))  # fmt: skip
    _validation(case, folder)
    _changed(case, folder)
    (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _validation(case, folder):
    honest = Validation.run

    def fails(self, model):
        raise MemoryError("planted: no memory for validation")

    Validation.run = fails
    case("validation_fails", config(folder, "validated"))
    Validation.run = honest
    case("validation_again", config(folder, "validated"))


def _changed(case, folder):
    other = {"data__prefix": folder / "other"}
    half = config(folder, "stage")
    case("stage_one", half)
    case("stage_refused", config(folder, "stage", **other, **longer(12)))
    case("stage_seed_refused", config(folder, "stage", data__seed=5, **longer(12)))
    allowed = {"checkpoint__other_data": "true", "data__seed": 5}
    case("stage_two", config(folder, "stage", **other, **allowed, **longer(12)))
    case("stage_two_again", config(folder, "stage", **other, **allowed, **longer(12)))
    for name in ("refuse", "follow", "rewarm", "flat"):
        case(f"{name}_before", config(folder, name))
        since = {"extends_tokens": QUANTA * QUANTUM} if name in ("rewarm", "flat") else {}
        case(name, config(folder, name, **longer(16, extension=name, **since)))
    case("period_before", config(folder, "period"))
    slower = {"levels__levels__mid__period_tokens": 8 * QUANTUM}
    change = longer(16)
    change["checkpoint__may_change"] += ",levels.levels.mid.period_tokens"
    case("period", config(folder, "period", **change, **slower))
    case("saves_before", config(folder, "saves"))
    # As docs/cluster.md says: saves come more often, and with them the fold.
    often = {"checkpoint__every_tokens": 2 * QUANTUM, "levels__fold_every_tokens": 2 * QUANTUM}
    case("saves", config(folder, "saves", **often, checkpoint__may_change="train.total_tokens",
         train__total_tokens=14 * QUANTUM, levels__schedule__total_tokens="none"))  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("going_on")
    documents = list(stdlib_corpus())[:12]
    tokenizer = train_tokenizer([text for _, text in documents[::3]], VOCAB_SIZE)
    for name, part in (("corpus", documents), ("other", documents[6:])):
        prepare(part, open_store(str(folder / name)), tokenizer, PrepareConfig(SEQ_LEN, validation_fraction=0.3))
    arguments = (forked.environment(), folder, free_ports(1)[0])
    torch.multiprocessing.start_processes(one_rank, arguments, nprocs=1, start_method=forked.METHOD)
    return folder, json.loads((folder / "found.json").read_text())


def checkpoints(folder, name):
    return [info for info in list_checkpoints(open_store(str(folder / "runs")), name) if info.complete]


def lr_factors(folder, name):
    """{T in quanta: lr of the base level over its lr}."""
    ticks = [row for row in effective(read_rows(folder / name)) if row["kind"] == "tick" and row["level"] == "base"]
    lr = config(folder, name).levels.levels[0].lr
    return {row["tokens"] // QUANTUM: row["lr"] / lr for row in ticks}


def test_a_quantum_ends_in_a_phase_whose_limit_is_short(found):
    """After a save or a validation ranks meet, and there a hang must not be taken for a slow phase."""
    phases = found[1]["phases"]
    first, *others = phases["at_the_end"]
    assert first == STARTING
    assert others == [TRAINING] * (QUANTA - 1)
    assert WAITING_FOR_SAVE in phases["all"] and WAITING_FOR_SAVE in SLOW_PHASES
    assert TRAINING not in SLOW_PHASES and "saving" in phases["all"] and "saving" not in SLOW_PHASES


def test_an_output_that_can_never_be_written_is_refused(found):
    _, each = found
    assert each["no_folder"]["error"].startswith("ConfigError: output=")
    assert "cannot be written" in each["no_folder"]["error"]


def test_an_overtaken_attempt_stops_long_before_its_next_save(found):
    folder, each = found
    assert each["overtaken"]["error"].startswith("StaleAttemptError: attempt 1 of run overtaken is stale: attempt 2")
    steps = [row["tokens"] for row in read_rows(folder / "overtaken") if row["kind"] == "step"]
    assert max(steps) <= 10 * QUANTUM
    assert attempts(open_store(str(folder / "runs")), "overtaken") == [1, 2]


def test_a_validation_that_fails_costs_no_training_and_is_made_up_for(found):
    folder, each = found
    assert "planted: no memory" in each["validation_fails"]["error"]
    again = each["validation_again"]
    assert again["error"] == ""
    assert f"resumed from checkpoint tokens_{4 * QUANTUM:012d}-attempt_0001" in again["said"]
    rows = [row["tokens"] // QUANTUM for row in read_rows(folder / "validated") if row["kind"] == "validation"]
    assert rows == [4, 8]


def test_other_data_are_refused_by_a_message_that_names_the_field(found):
    _, each = found
    assert "DataError" in each["stage_refused"]["error"]
    assert "or set checkpoint.other_data=true" in each["stage_refused"]["error"]
    assert "data.seed: stored 0, now 5" in each["stage_seed_refused"]["error"]


def test_a_second_stage_goes_on_with_other_data_and_says_so_in_its_lineage(found):
    folder, each = found
    assert each["stage_two"]["error"] == each["stage_two_again"]["error"] == ""
    line = f"other data from {QUANTA * QUANTUM:,} tokens on: dataset {folder}/corpus"
    assert line in each["stage_two"]["said"] and "data.seed 0 -> 5" in each["stage_two"]["said"]
    assert "other data from" not in each["stage_two_again"]["said"]
    last = checkpoints(folder, "stage")[-1]
    lineage = read_manifest(open_store(str(folder / "runs")), "stage", last.name).lineage
    changes = [change for step in lineage for change in step["changes"]]
    assert sum(change.startswith(line) for change in changes) == 1


def test_an_extended_run_says_what_its_schedule_will_do(found):
    _, each = found
    line = f"levels.schedule at {QUANTA * QUANTUM:,} tokens: the lr factor was 0.1 and now is "
    for name in ("follow", "rewarm", "flat"):
        assert each[name]["error"] == "", name
    assert line + "0.5" in each["follow"]["said"]
    assert "(extension=follow)" in each["follow"]["said"]
    assert line + "0.1, then cosine to 0.1" in each["rewarm"]["said"]
    assert "the lr factor, 0.1 here, goes on as before (extension=flat)" in each["flat"]["said"]
    assert "levels.schedule at" not in each["follow_before"]["said"]


def test_an_extension_may_be_refused(found):
    folder, each = found
    assert each["refuse"]["error"].startswith("ConfigError: levels.schedule at ")
    assert f"levels.schedule.extends_tokens={QUANTA * QUANTUM}" in each["refuse"]["error"]
    assert checkpoints(folder, "refuse")[-1].tokens == QUANTA * QUANTUM


def test_the_learning_rates_of_an_extension_are_the_chosen_ones(found):
    folder, _ = found
    flat, rewarm, follow = (lr_factors(folder, name) for name in ("flat", "rewarm", "follow"))
    assert all(flat[n] == pytest.approx(0.1) for n in range(QUANTA, 17))
    assert rewarm[QUANTA] == pytest.approx(0.1)
    assert rewarm[QUANTA + 1] == pytest.approx(1.0)
    assert rewarm[16] == pytest.approx(0.1)
    assert follow[QUANTA + 1] > 0.4
    before = [lr_factors(folder, name)[n] for name in ("flat", "rewarm", "follow") for n in (1, 4, 7)]
    assert before == pytest.approx([lr_factors(folder, "straight")[n] for n in (1, 4, 7)] * 3)


def test_a_run_goes_on_with_more_saves_and_a_finer_fold_and_its_lineage_says_so(found):
    folder, each = found
    assert each["saves_before"]["error"] == each["saves"]["error"] == ""
    saved = checkpoints(folder, "saves")
    assert [info.tokens // QUANTUM for info in saved] == [10, 12, 14]
    lineage = read_manifest(open_store(str(folder / "runs")), "saves", saved[-1].name).lineage
    changes = [change for step in lineage for change in step["changes"]]
    assert f"levels.fold_every_tokens: stored {4 * QUANTUM}, now {2 * QUANTUM}" in changes
    assert f"levels.schedule.total_tokens: stored {8 * QUANTUM}, now {14 * QUANTUM}" in changes


def test_due_updates_are_counted_by_the_clocks_that_were_in_force(found):
    folder, each = found
    assert each["period"]["error"] == ""
    ends = [row for row in read_rows(folder / "period") if row["kind"] == "end"]
    assert ends[0]["level_updates"]["mid"] == {"done": 2, "skipped": 0, "due": 2}
    assert ends[1]["level_updates"]["mid"] == {"done": 3, "skipped": 0, "due": 3}
    assert ends[1]["level_updates"]["base"]["due"] == 16
