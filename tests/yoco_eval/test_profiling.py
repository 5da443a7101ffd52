"""Profiles: what is measured, what is left out and why, and that cost is measured of the model."""

import shutil
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from yoco_eval import profiling
from yoco_eval.memory import CHUNKS
from yoco_eval.model import Blueprint, Yoco, save
from yoco_eval.model.shapes import SHAPES
from yoco_eval.model.transformer import Transformer
from yoco_eval.profiling import ProfileError, profile, run_profile
from yoco_eval.reports.profile import load_profile
from yoco_eval.reports.profile_files import save_profile

DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Of real models, whose steps are slow."""
    monkeypatch.setitem(profiling.LARGEST_BATCH, "cpu", 3)


class Model:
    """Records what it is fed. `limit`: the longest cache there is memory for, else `error`."""

    def __init__(self, limit=10**9, delay=0.0, error=torch.OutOfMemoryError):
        self.limit, self.delay, self.error = limit, delay, error
        self.config, self.device = SimpleNamespace(vocab_size=7), CPU
        self.costs, self.dtype, self.block = Costs(), torch.float32, 1
        self.fed, self.capacities = [], []
        self.steps = 0
        self.batches = []

    def new_cache(self, capacity):
        if capacity > self.limit:
            raise self.error
        self.fed.append([])
        self.capacities.append(capacity)
        return Cache(capacity)

    def prefill(self, ids, cache):
        time.sleep(self.delay)
        assert ids.min() >= 0 and ids.max() < 7
        self.fed[-1].append(len(ids))
        assert sum(self.fed[-1]) <= cache.capacity
        cache.state = SimpleNamespace(length=sum(self.fed[-1]))
        return torch.zeros(len(ids), 5)

    def predict(self, x, positions, cache, spans):
        assert x.shape == (1, 5)
        return x

    def logits(self, output):
        return torch.zeros(1, 7)

    def decoder(self, cache, size=1, room=None):
        return Decoder(self, cache, size, room)


class Cache:
    def __init__(self, capacity):
        self.capacity, self.state, self.noisy = capacity, SimpleNamespace(length=0), False

    def fill_with_noise(self):
        self.noisy = True


class Decoder:
    """Counts steps; of batches, records their size, and which slots each text writes and reads."""

    def __init__(self, model, cache, size, room):
        self.model, self.cache, self.size, self.room = model, cache, size, room
        self.writes = []

    def start(self, token):
        pass

    def join(self, rows, state, sources, tokens, slots):
        assert rows == [len(self.writes)] and sources == [0] and 0 <= tokens[0] < 7
        self.writes += [list(own) for own in slots]
        self.length = state.length

    def read(self, order, spans):
        assert list(order) == list(range(self.size)) and not any(span.causal for span in spans)
        assert self.cache.noisy  # what lies in the memory may be NaN
        reads = [[s for s in spans if s.first_query <= row < s.end_query] for row in order]
        self.model.batches.append((self.size, self.cache.capacity, self.writes, reads))
        for own, spans in zip(self.writes, reads, strict=True):
            assert len(own) == self.room and spans[-1].end_key == own[-1] + 1
            # Its context's tokens and its own, in whichever of the spans.
            assert sum(s.end_key - s.first_key for s in spans) == self.length + self.room
            assert own[0] - spans[-1].first_key == self.length - spans[-1].start

    def step(self, count=1):
        assert count == self.size
        self.model.steps += 1


class Costs:
    """Of 10 weights, for each token 12 numbers of the cache, and 100 of the state."""

    def weight_bytes(self, dtype):
        return 10 * dtype.itemsize

    def cache_bytes(self, dtype, length):
        return 12 * dtype.itemsize * length

    def state_bytes(self, dtype):
        return 100 * dtype.itemsize

    def activation_bytes(self, dtype, length, chunk, logits, device):
        assert logits == 7 * chunk
        return 50 * dtype.itemsize * chunk


def made(make):
    return Blueprint(SimpleNamespace(vocab_size=7), Costs(), make)


def run(lengths, patience=60.0, **models):
    blueprints = {name: made(lambda *args, m=model: m) for name, model in models.items()}
    return list(profile(blueprints, lengths, CPU, torch.float32, patience, 100))


def test_rows():
    model = Model()
    rows = run([150, 300], A=model)
    assert [(row.model, row.length, row.outcome) for row in rows] == [
        ("A", 150, "measured"),
        ("A", 300, "measured"),
    ]
    assert all(row.prefill_seconds > 0 and row.decode_tokens_per_second > 0 for row in rows)
    assert [row.peak_bytes for row in rows] == [None, None]
    assert [row.weights_bytes for row in rows] == [40, 40]
    assert [row.cache_bytes for row in rows] == [2 * 2 * 3 * 4 * (n + 20) for n in (150, 300)]
    assert [100, 50] in model.fed and [100, 100, 100] in model.fed
    assert model.steps == 2 * (4 + 1 + 4 + 16) + 2 * 2 * (1 + 4)


def speeds(row):
    """Of what was tried: batch size, whether the context is shared, and whether it went well."""
    for one in row.throughput:
        assert (one.tokens_per_second or 0) > 0 or one.outcome != "measured"
    return [(one.batch, one.shared, one.outcome) for one in row.throughput]


def test_throughput(monkeypatch):
    monkeypatch.setitem(profiling.LARGEST_BATCH, "cpu", 100)
    model = Model()
    (row,) = run([50], A=model)
    assert speeds(row) == [(n, s, "measured") for s in (False, True) for n in (8, 64, 100)]
    assert [batch[:2] for batch in model.batches] == [
        (8, 8 * 55), (64, 64 * 55), (100, 100 * 55),
        (8, 50 + 8 * 5), (64, 50 + 64 * 5), (100, 50 + 100 * 5),
    ]  # fmt: skip
    for batch, _, writes, reads in model.batches:
        assert len({slot for own in writes for slot in own}) == 5 * batch
        own = [{spans[0]} if len(spans) == 1 else set(spans[1:]) for spans in reads]
        assert len(set.union(*own)) == batch  # nobody reads another's
    assert {spans[0][2:4] for spans in model.batches[-1][3]} == {(0, 50)}


def test_the_largest_batch_is_found_by_counting(monkeypatch):
    monkeypatch.setitem(profiling.LARGEST_BATCH, "cpu", 64)
    monkeypatch.setattr(profiling, "free_bytes", lambda device: 40000)
    model = Model()
    rows = run([100, 400, 700], A=model)
    # 48 for each token of the cache, 400 for the state, twice 200 for activations; of the 0.95 *
    # 40000 bytes, 800 are taken by two more states.
    distinct, shared = 48 * 105 + 800, 48 * 5 + 800
    assert speeds(rows[0]) == [
        ((38000 - 800) // distinct, False, "measured"),
        (8, True, "measured"),
        ((38000 - 800 - 4800) // shared, True, "measured"),
    ]
    assert speeds(rows[1]) == [
        (2, False, "out of memory"),
        (8, True, "measured"),
        ((38000 - 800 - 19200) // shared, True, "measured"),
    ]
    assert speeds(rows[2])[0] == (2, False, "out of memory")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError()])
def test_batches_out_of_memory_all_the_same(error, monkeypatch):
    monkeypatch.setitem(profiling.LARGEST_BATCH, "cpu", 100)
    row, longer = run([50, 60], A=Model(limit=60 * 55, error=error))
    assert speeds(row) == [
        (8, False, "measured"),
        (64, False, "out of memory"),
        *((n, True, "measured") for n in (8, 64, 100)),
    ]
    assert longer.outcome == "measured"


def test_batches_out_of_patience(monkeypatch):
    """The clock goes on by a second each time that it is looked at."""
    monkeypatch.setitem(profiling.LARGEST_BATCH, "cpu", 100)
    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=count().__next__))
    (row,) = run([50], patience=4, A=Model())
    assert speeds(row) == [(8, False, "out of patience"), (8, True, "out of patience")]
    (row,) = run([50], patience=10, A=Model())
    assert len(speeds(row)) == 6 and {one[2] for one in speeds(row)} == {"measured"}


def cpu_error():
    """What a CPU's allocation raises when it asks for 8 EiB."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    return caught.value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), cpu_error()])
def test_out_of_memory(error):
    model = Model(limit=250, error=error)
    rows = run([100, 300, 600], A=model, B=Model())
    assert [row.outcome for row in rows[:3]] == ["measured", "out of memory", "out of memory"]
    assert rows[1].cache_bytes == 48 * 320 and rows[1].weights_bytes == 40
    assert rows[1].prefill_seconds is None and rows[1].decode_tokens_per_second is None
    assert [row.outcome for row in rows[3:]] == ["measured"] * 3  # another model may fit


def test_other_errors_are_told():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run([300], A=Model(limit=250, error=RuntimeError("shapes cannot be multiplied")))


def test_a_cache_larger_than_the_free_memory_is_not_tried(monkeypatch):
    """A CPU would allocate it, and end the process where it is written."""
    monkeypatch.setattr(profiling, "free_bytes", lambda device: 48 * 200)
    model = Model()
    rows = run([100, 300], A=model)
    assert [row.outcome for row in rows] == ["measured", "out of memory"]
    assert rows[1].cache_bytes == 48 * 320
    assert max(map(sum, model.fed)) == 100


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), MemoryError(), cpu_error()])
def test_weights_that_do_not_fit(error):
    def build(*args):
        raise error

    rows = list(profile({"A": made(build)}, [100, 200], CPU, torch.float32, 60.0, 100))
    assert [row.outcome for row in rows] == ["out of memory"] * 2
    assert [row.weights_bytes for row in rows] == [40, 40]
    assert [row.cache_bytes for row in rows] == [48 * 120, 48 * 220]


@pytest.mark.parametrize("source", ["shape", "pretrained"])
def test_weights_that_do_not_fit_are_not_loaded(source, checkpoint, small_model, monkeypatch):
    def fail(*args):
        pytest.fail("loaded")

    for model_class in (Yoco, Transformer):
        monkeypatch.setattr(model_class, "empty", fail)
    count = sum(weight.numel() for weight in small_model.parameters())
    monkeypatch.setattr(profiling, "free_bytes", lambda device: count)  # half of what they take
    monkeypatch.setitem(SHAPES, "tiny", small_model.config)
    name = {"shape": "tiny", "pretrained": str(checkpoint)}[source]
    settings = {source: name, "against": "transformer", "device": "cpu", "dtype": "bfloat16"}
    assert {row.outcome for row in run_profile([50], **settings).rows} == {"out of memory"}


def test_out_of_patience_while_it_runs():
    model = Model(delay=0.02)
    rows = run([200, 10000], patience=0.5, A=model)
    assert [row.outcome for row in rows] == ["measured", "out of patience"]
    assert rows[1].cache_bytes == 48 * 10020 and rows[1].prefill_seconds is None
    assert not any(len(fed) > 60 for fed in model.fed)


def test_longer_lengths_are_not_tried_after_that():
    model = Model(delay=0.02)
    rows = run([200, 5000, 10000], patience=0.2, A=model)
    assert [row.outcome for row in rows] == ["measured", "out of patience", "out of patience"]
    assert 5020 in model.capacities and 10020 not in model.capacities


def test_a_short_text_s_time_is_not_taken_for_a_long_one_s():
    """Of one token, nearly all is overhead."""
    rows = run([1, 3000], patience=2.0, A=Model(delay=0.01))
    assert [row.outcome for row in rows] == ["measured"] * 2


@pytest.fixture
def checkpoint(small_model, tmp_path):
    save(small_model, tmp_path)
    return tmp_path


def test_a_checkpoint_against_a_transformer(checkpoint, monkeypatch):
    monkeypatch.setitem(CHUNKS, "cpu", (64, 32))
    seen = []
    result = run_profile(
        [100, 200],
        pretrained=str(checkpoint),
        against="transformer",
        device="cpu",
        dtype="bfloat16",
        patience=60,
        report=seen.append,
    )
    assert [told.rows for told in seen] == [result.rows[: n + 1] for n in range(4)]
    assert [(row.model, row.length, row.outcome) for row in result.rows] == [
        (model, length, "measured") for model in ("YOCO", "Transformer") for length in (100, 200)
    ]
    yoco, transformer = result.row("YOCO", 200), result.row("Transformer", 200)
    # Two numbers per key-value head, channel and token, of 2 bytes; the Transformer's in 4 layers.
    assert yoco.cache_bytes == 2 * 16 * 220 * 2 and transformer.cache_bytes == 4 * yoco.cache_bytes
    shape = result.shapes["Transformer"]
    assert (shape["dim"], shape["n_layers"], shape["hidden_dim"]) == (32, 4, 48)
    assert (shape["n_heads"], shape["n_kv_heads"], shape["vocab_size"]) == (4, 2, 2048)
    assert result.dtype == "bfloat16" and result.versions["torch"] == torch.__version__
    assert (result.prefill_chunk, result.decode_steps, result.patience) == (64, 16, 60)
    assert result.device_bytes is None and result.largest_batch == 3
    assert speeds(yoco) == speeds(transformer) == [(3, False, "measured"), (3, True, "measured")]


def test_a_shape(small_model, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", small_model.config)
    result = run_profile([50], shape="tiny", device="cpu")
    (row,) = result.rows
    assert row.model == "YOCO" and row.outcome == "measured"
    assert row.weights_bytes >= 4 * sum(p.numel() for p in small_model.parameters())
    assert result.name == "YOCO tiny, random weights" and result.dtype == "float32"


def test_a_shape_of_a_file(tmp_path):
    """Of another kind of self-decoder; its weights are not there, nor asked for."""
    path = str(shutil.copy(DATA / "fla" / "gated_deltanet" / "config.json", tmp_path))
    result = run_profile([50], shape=path, against="transformer", device="cpu")
    assert [row.outcome for row in result.rows] == ["measured"] * 2
    assert result.name == f"{path}, random weights"
    save_profile(result, tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == result


def test_refusals(tmp_path):
    with pytest.raises(ProfileError, match=r"shape '4b' is unknown; choose from 1\.6b, 3b"):
        run_profile([10], shape="4b")
    with pytest.raises(ProfileError, match="device 'gpu' cannot be used: "):
        run_profile([10], shape="3b", device="gpu")
    with pytest.raises(ProfileError, match="dtype 'int8' is unknown"):
        run_profile([10], shape="3b", dtype="int8")
    with pytest.raises(ProfileError, match="no such checkpoint"):
        run_profile([10], pretrained=str(tmp_path / "none"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(checkpoint, monkeypatch):
    monkeypatch.setitem(profiling.LARGEST_BATCH, "cuda", 70)
    result = run_profile([3000], pretrained=str(checkpoint), against="transformer", device="cuda")
    for row in result.rows:
        weights, cache, rest = row.parts
        assert rest > 0 and weights + cache + rest == row.peak_bytes
        assert speeds(row) == [(n, s, "measured") for s in (False, True) for n in (8, 64, 70)]
    assert result.device_bytes > 2**30
