"""Budgets: the fastest chunk that fits, and refusals with the figures that help."""

import re

import psutil
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from yoco_eval import memory
from yoco_eval.engine import Engine
from yoco_eval.lm import YocoLM
from yoco_eval.memory import (
    CHUNKS,
    OutOfMemory,
    check_weights,
    chunk_sizes,
    fit,
    host_free_bytes,
)
from yoco_eval.model import GatedRetentionSettings, SlidingWindowSettings, Yoco, YocoConfig
from yoco_eval.model.costs import YocoCosts
from yoco_eval.model.shapes import SHAPES
from yoco_eval.requests import GenerateRequest, ScoreRequest

COSTS, GPU, BF16 = YocoCosts(SHAPES["3b"]), torch.device("cuda"), torch.bfloat16
GIB = 2**30


@pytest.fixture
def free(monkeypatch):
    """Sets the free memory, in bytes."""
    return lambda size: monkeypatch.setattr(memory, "free_bytes", lambda device: size)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
MIB = 2**20


@pytest.fixture
def host(tmp_path):
    """Writes what Linux says of control groups: its root, of /proc/self/cgroup and groups.

    A group: [its folder below /sys/fs/cgroup, names of its files, limit, used, pages of files].
    """

    def write(own, *groups):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(own)
        for folder, names, limit, *amounts in groups:
            group = tmp_path / "sys/fs/cgroup" / folder
            group.mkdir(parents=True, exist_ok=True)
            limit_name, used_name, cached_name = names
            used, cached = amounts or (0, 0)
            (group / limit_name).write_text(f"{limit}\n")
            (group / used_name).write_text(f"{used}\n")
            (group / "memory.stat").write_text(f"anon 5\n{cached_name} {cached}\nslab 7\n")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        # What the process's own group leaves, its pages of files included.
        ("0::/job/run\n", [("job/run", V2, 90 * MIB, 50 * MIB, 9 * MIB)], 49 * MIB),
        # A group above it leaves less.
        (
            "0::/job/run\n",
            [("job/run", V2, "max"), ("job", V2, 80 * MIB, 60 * MIB, 0), ("", V2, "max")],
            20 * MIB,
        ),
        # More is used than the limit.
        ("0::/\n", [("", V2, 10 * MIB, 11 * MIB, 0)], 0),
        # The first version, whose controllers stand apart.
        (
            "9:name=systemd:/\n8:cpu,memory:/job/a:b\n0::/\n",
            [
                ("memory/job/a:b", V1, 2**63 - 4096, 70 * MIB, 0),
                ("memory/job", V1, 90 * MIB, 70 * MIB, 30 * MIB),
            ],
            50 * MIB,
        ),
        # In a container, the group is the top; or it lies beside the one that can be seen.
        ("4:memory:/docker/12ab\n", [("memory", V1, 90 * MIB, 70 * MIB, 0)], 20 * MIB),
        ("0::/../job\n", [("", V2, 90 * MIB, 70 * MIB, 0)], 20 * MIB),
    ],
)
def test_a_control_group_leaves_less_than_the_machine(own, groups, expected, host):
    assert host_free_bytes(host(own, *groups)) == expected


@pytest.mark.parametrize("own", ["0::/job\n", "", "nothing\n:\n"])
def test_without_a_limit_the_machine_counts(own, host):
    everything = psutil.virtual_memory().available
    found = host_free_bytes(host(own, ("job", V2, "max"), ("", V2, "")))
    assert found == pytest.approx(everything, rel=0.1, abs=GIB)


def test_what_a_limit_on_addresses_leaves_is_what_can_be_allocated():
    process = psutil.Process()
    before = process.rlimit(psutil.RLIMIT_AS)
    process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + 300 * MIB, before[1]))
    try:
        free = host_free_bytes()
        torch.empty(free - 50 * MIB, dtype=torch.uint8)
        with pytest.raises(RuntimeError) as refused:
            torch.empty(free + 50 * MIB, dtype=torch.uint8)
    finally:
        process.rlimit(psutil.RLIMIT_AS, before)
    assert 200 * MIB < free <= 300 * MIB
    assert memory.out_of_memory(refused.value)


def test_the_largest_chunk_that_fits(free):
    free(70 * GIB)
    whole = fit(COSTS, BF16, GPU, 2**20, loaded=True)
    assert whole.fits and whole.chunk == 12672
    free(round(4.8 * GIB))
    less = fit(COSTS, BF16, GPU, 2**20, loaded=True)
    assert less.fits and less.chunk in CHUNKS["cuda"] and less.chunk < whole.chunk
    assert fit(COSTS, BF16, GPU, 1000, chunk=300).chunk == 300


def test_processes_share_the_free_memory(free):
    free(70 * GIB)
    alone = fit(COSTS, BF16, GPU, 2**20, loaded=True)
    assert fit(COSTS, BF16, GPU, 2**20, loaded=True, sharing=7).free == alone.free // 7


def test_small_models_are_fed_more_tokens_at_a_time():
    """Half as large, twice as many; however large, 12672 where they fit."""
    chunks = {name: chunk_sizes(Yoco.costs_of(SHAPES[name]), GPU)[0] for name in SHAPES}
    assert chunks["1.6b"] == 25344 and chunks["3b"] == chunks["13b"] == 12672
    assert chunk_sizes(COSTS, torch.device("cpu")) == CHUNKS["cpu"]


def test_no_more_is_set_aside_than_there_are_tokens(free):
    free(70 * GIB)
    small = fit(COSTS, BF16, GPU, 4096, chunk=2**20, loaded=True, tokens=9000)
    assert small.chunk == 9000 and small.need < GIB


def test_a_refusal_names_what_fits(free):
    free(3 * GIB)
    refused = fit(COSTS, BF16, GPU, 2**20, loaded=True)
    with pytest.raises(ValueError, match=r"need 4\.\d\d GiB beside the weights on cuda") as error:
        refused.check()
    longest = int(re.search(r"max_length=(\d+)", str(error.value))[1])
    assert 2**19 < longest < 2**20
    fit(COSTS, BF16, GPU, longest, loaded=True).check()
    assert not fit(COSTS, BF16, GPU, longest + 1000, loaded=True).fits
    greedy = fit(COSTS, BF16, GPU, 10000, chunk=2**17, loaded=True, tokens=10**7)
    with pytest.raises(ValueError, match="free; lower prefill_chunk=131072, or take"):
        greedy.check()
    free(100)
    with pytest.raises(ValueError, match=r"0\.00 GiB are free; take a device with more memory$"):
        fit(COSTS, BF16, GPU, 2**20, loaded=True).check()


def test_contexts_fed_one_at_a_time_take_as_much_as_the_longest(exact, free):
    one = fit(exact.costs, torch.float64, exact.device, 70, chunk=10**6, loaded=True, logits=0)
    assert one.chunk == 70
    assert one.memory.cache == exact.costs.cache_bytes(torch.float64, 70)
    spare = exact.costs.cache_bytes(torch.float64, 1)  # a slot that nobody has
    free(round((one.need + spare) / 0.95) + 1)
    requests = [GenerateRequest([i] * 65, 5) for i in range(1, 4)]
    engine = Engine(exact, prefill_chunk=10**6)
    assert len(list(engine.generate(requests, lambda n: None, lambda *n: None))) == 3


def binary_tree(depth, path=()):
    """Contexts that branch in two after every 30 tokens."""
    if depth == 0:
        yield [*path, 1]
    else:
        for token in (2, 3):
            yield from binary_tree(depth - 1, (*path, *[10 * token + depth] * 30))


@pytest.mark.slow
def test_snapshots_where_contexts_branch_are_part_of_the_memory(exact, free):
    dtype = torch.float64
    contexts = list(binary_tree(4))
    runs = {
        "generate": [GenerateRequest(context, 1) for context in contexts],
        "score": [ScoreRequest(context, [1]) for context in contexts],
    }
    for kind, requests in runs.items():
        if kind == "score":
            length, beside = 121, {"tokens": sum(map(len, contexts))}
        else:  # a slot that nobody has
            length, beside = 122, {"spare": 1, "logits": 0}
        need = fit(exact.costs, dtype, exact.device, length, 16, True, **beside).need

        def run(snapshots, kind=kind, requests=requests, need=need):
            # Of what is left when scoring, packed batches may have half.
            left = (2 if kind == "score" else 1) * snapshots * exact.costs.state_bytes(dtype)
            free(round((need + left) / 0.95) + 1)
            results = getattr(Engine(exact, prefill_chunk=16), kind)
            return list(results(requests, lambda n: None, lambda *n: None))

        with pytest.raises(ValueError, match="where prompts branch, .* of states have to be kept"):
            run(2)
        assert len(run(3)) == 16


@pytest.mark.slow
def test_scoring_behind_a_long_text_does_not_copy_its_cache(live_bytes):
    config = YocoConfig(
        dim=128,
        n_layers=2,
        hidden_dim=32,
        self_decoder=GatedRetentionSettings(2),
        n_attn_heads=2,
        n_attn_kv_heads=2,
        vocab_size=100,
    )
    model = Yoco(config).requires_grad_(False)
    stem = [5] * 50_000
    requests = [ScoreRequest(stem, [a, 7]) for a in (1, 2)]
    with live_bytes() as live:
        list(Engine(model).score(requests, lambda n: None, lambda *n: None))
    cache = model.costs.cache_bytes(torch.float32, len(stem))
    assert cache < live.peak < 1.5 * cache


def test_the_engine_refuses_before_it_computes(exact, free):
    free(1000)
    begun = []
    with pytest.raises(ValueError, match="free"):
        list(Engine(exact).generate([GenerateRequest([1, 2, 3], 5)], begun.append, begun.append))
    assert not begun


def with_random_weights(sliding_window):
    """Whose self-decoder is gated retention where there is no window."""
    config = YocoConfig(
        dim=128,
        n_layers=4,
        hidden_dim=128,
        self_decoder=SlidingWindowSettings(2, sliding_window)
        if sliding_window
        else GatedRetentionSettings(2),
        n_attn_heads=2,
        n_attn_kv_heads=1,
        vocab_size=100,
    )
    torch.manual_seed(0)
    return Yoco(config).requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", [None, 1, 256])
def test_packed_batches_stay_within_the_memory(sliding_window, live_bytes, monkeypatch):
    """Many short questions after one long text; each brings a state or a window with it."""
    model = with_random_weights(sliding_window)
    stem = torch.randint(100, (300,)).tolist()
    requests = [
        ScoreRequest([*stem, q, p] + [q] * 15, [a])
        for q in range(99)
        for p in (1, 2)
        for a in (3, 4)
    ]
    need = fit(model.costs, torch.float32, model.device, 350, loaded=True, tokens=10**6).need
    left = 16 * 2**20
    monkeypatch.setattr(memory, "free_bytes", lambda device: round((need + left) / 0.95))
    results, peaks = [], []
    for batch_size in (1, None):
        with live_bytes() as live:
            scored = Engine(model, batch_size).score(requests, lambda n: None, lambda *n: None)
            results.append(dict(scored))
        peaks.append(live.peak)
    assert peaks[1] < peaks[0] + left
    for index, score in results[0].items():
        assert results[1][index].logprob == pytest.approx(score.logprob, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", [None, 64])
def test_generation_side_by_side_stays_within_the_memory(sliding_window, live_bytes, monkeypatch):
    """As many as fit, whatever else there would be to do; and nothing is kept."""
    model = with_random_weights(sliding_window)
    stems = torch.randint(100, (2, 200)).tolist()
    requests = [
        GenerateRequest([*stems[i % 2], i] + [i] * (i * 37 % 120), 1 + i % 3) for i in range(24)
    ]
    tokens = sum(len(request.context) + request.max_tokens for request in requests)
    need = fit(model.costs, torch.float32, model.device, 330, 64, True, tokens, logits=0).need
    answers, sizes = [], []
    for left in (2**20, 2**40):
        monkeypatch.setattr(memory, "free_bytes", lambda device, n=left: round((need + n) / 0.95))
        engine = Engine(model, batch_size=None, prefill_chunk=64)
        batch = engine._generation(requests, lambda *counts: None).batch
        with live_bytes() as live:
            run = engine._generation(requests, lambda *counts: None)
            free = run._pages.free
            with torch.inference_mode():
                answers.append(dict(run.answers()))
        assert run._pages.free == free  # all slots are given back
        assert batch.need <= need + left and live.peak < batch.need
        sizes.append(batch.size)
    assert 1 < sizes[0] < sizes[1] == 24
    assert answers[0] == answers[1]


def test_short_prompts_are_fed_together_before_they_are_decoded_together(exact, monkeypatch):
    """Many times as many tokens as the longest has, and as many texts as are asked for."""
    requests = [GenerateRequest([i] * (20 + i % 5), 3) for i in range(40)]
    packed, rows = [], []
    feed, decoder = exact.feed, exact.decoder

    def counted(ids, *rest):
        packed.append(len(ids))
        return feed(ids, *rest)

    def sized(cache, size, room):
        rows.append(size)
        return decoder(cache, size, room)

    monkeypatch.setattr(exact, "feed", counted)
    monkeypatch.setattr(exact, "decoder", sized)
    for batch_size in (1, 8, None):
        list(Engine(exact, batch_size).generate(requests, lambda n: None, lambda *n: None))
    assert rows == [1, 8, 40]
    assert sum(packed) == 3 * sum(len(request.context) - 1 for request in requests)
    assert len(packed) == 40 + 20 + 5


def test_weights_are_refused_before_they_are_loaded(free):
    free(8 * GIB)
    check_weights(COSTS, BF16, GPU)
    with pytest.raises(ValueError, match=r"take 12\.83 GiB in float32, and 8\.00 GiB are free"):
        check_weights(COSTS, torch.float32, GPU)
    free(1000)
    with pytest.raises(ValueError, match="the weights take"):
        YocoLM(device="cpu")


def test_an_allocation_that_fails_is_told_in_one_line(exact, free):
    """The cache is asked for, and PyTorch does not get it."""
    free(2**62)
    request = GenerateRequest([1, 2, 3], 2**50)
    with pytest.raises(OutOfMemory) as error:
        list(Engine(exact).generate([request], lambda n: None, lambda *n: None))
    assert re.fullmatch(
        r"memory ran out on cpu: \d+\.\d\d GiB were planned beside the weights, of \d+\.\d\d GiB "
        r"that were free, and \d+\.\d\d GiB are free now; shorten contexts, or .*",
        str(error.value),
    )


def test_responses_before_a_failed_allocation_are_kept(tmp_path):
    lm = YocoLM(device="cpu")
    texts = [("One city.", " Two"), ("Another city.", " Three")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)]
    feed, fed = lm.model.feed, []

    def failing(*args, **kwargs):
        fed.append(args)
        if len(fed) == 2:
            torch.empty(2**60)
        return feed(*args, **kwargs)

    lm.model.feed = failing
    with pytest.raises(OutOfMemory, match=r"^memory ran out on cpu: .*; with --use_cache FILE, "):
        lm.loglikelihood(requests, disable_tqdm=True)
    fed.clear()
    cached = CachingLM(lm, str(tmp_path / "responses.db"))
    with pytest.raises(OutOfMemory, match=r"; the --use_cache file has the responses so far, .*$"):
        cached.loglikelihood(requests)
    # One response, and whose it is, made with which settings.
    assert len(cached.dbdict) == 3
    assert len(cached.loglikelihood(requests)) == 2 and len(fed) == 3


def test_weights_that_cannot_be_allocated_are_told_in_one_line(monkeypatch):
    monkeypatch.setattr(Yoco, "of_weights", lambda *args: torch.empty(2**60))
    with pytest.raises(OutOfMemory, match=r"^memory ran out on cpu: the weights take 0\.01 GiB, "):
        YocoLM(device="cpu")
