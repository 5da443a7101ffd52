"""Measures memory, prefill time, decode speed and throughput of models at context lengths.

Tokens are random, since cost does not depend on them. Every length is a run of its own with a
cache of its own size, so that its peak of memory is that of a user who asks for this length.
Batches, whose contexts nobody has to feed for that, decode from its state with a cache of noise.
"""

from __future__ import annotations

import gc
import math
import platform
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from yoco_eval import __version__
from yoco_eval.model import Blueprint, Cache, Model, Rows, Span, Spans, State, open_checkpoint
from yoco_eval.model.families import family_name, with_eight_bits, with_sparse
from yoco_eval.model.interface import take
from yoco_eval.model.shapes import SEED, SHAPES, find_shape, transformer_beside, with_random_weights
from yoco_eval.printable import with_settings
from yoco_eval.reports.profile import (
    BATCHES,
    CONTEXTS,
    MEASURED,
    OUT_OF_MEMORY,
    OUT_OF_PATIENCE,
    Profile,
    ProfileRow,
    Throughput,
)

from .devices import check_cache_dtype, find_device, find_dtype
from .memory import MARGIN, chunk_sizes, free_bytes, out_of_memory
from .pages import rounded

# Fed before the clock starts: kernels are compiled and chosen meanwhile.
WARM_UP_TOKENS = {"cpu": 64, "cuda": 65536}
WARM_UP_STEPS, DECODE_STEPS = 4, 16
# Of batches, before the clock starts and under it. On a CPU they take longer than all else.
BATCH_STEPS = {"cpu": (1, 4), "cuda": (WARM_UP_STEPS, DECODE_STEPS)}
# Larger batches are not tried: by then the products rule, and take as long for each text more.
LARGEST_BATCH = {"cpu": 64, "cuda": 1024}


T = TypeVar("T")


class ProfileError(ValueError):
    """A profile cannot be made as it was asked for; the message is one line."""


class _OutOfPatience(Exception):
    pass


def run_profile(
    lengths: Sequence[int],
    shape: str | None = None,
    pretrained: str | None = None,
    revision: str | None = None,
    sparse: int | None = None,
    cache_dtype: str | None = None,
    against: str | None = None,
    patience: float = 120.0,
    dtype: str = "auto",
    device: str = "auto",
    report: Callable[[Profile], object] = lambda profile: None,
) -> Profile:
    """Profiles a model and, if asked for, a Transformer of the same size after it.

    Args:
        lengths: in tokens, ascending.
        shape: what `find_shape` takes, for random weights; or
        pretrained: a checkpoint's path, or the name of a bundled one or of one on the hub.
        revision: of a name on the hub.
        sparse: how many blocks of the cache each token chooses to read; None: it reads all.
        cache_dtype: one of `devices.CACHE_DTYPES`; None: the model's.
        against: "transformer" or None.
        patience: the seconds that the prefill of one length may take, and a batch after it.
        dtype: a name that `find_dtype` knows.
        device: a name that `find_device` knows.
        report: told what is known after each row.

    Raises:
        ProfileError: there is no such shape, checkpoint, dtype or device, or these do not go
            together.
        CheckpointError: the checkpoint's weights cannot be loaded.
    """
    try:
        where = find_device(device)
        kind = find_dtype(dtype, where)
        if shape is not None:
            model = with_random_weights(find_shape(shape))
        else:
            assert pretrained is not None
            model = open_checkpoint(pretrained, revision)
        if sparse is not None:
            model = with_sparse(model, sparse, f"--sparse {sparse}")
        if cache_dtype is not None:
            option = f"--cache-dtype {cache_dtype}"
            check_cache_dtype(cache_dtype, where, option)
            model = with_eight_bits(model, option)
        blueprints = {family_name(model.config): model}
        if against == "transformer":
            blueprints["Transformer"] = transformer_beside(model.config)
    except ValueError as error:
        raise ProfileError(error) from error
    on_gpu = where.type == "cuda"
    name = str(pretrained)
    if shape is not None:
        sized = f"YOCO-{shape.upper()}" if shape[0].isdigit() else f"YOCO {shape}"
        name = f"{sized if shape in SHAPES else shape}, random weights"
    name = with_settings(name, revision=revision, sparse=sparse, cache_dtype=cache_dtype)

    if on_gpu:
        torch.cuda.set_device(where)  # where kernels are launched and events recorded
    chunk = min(chunk_sizes(blueprint.costs, where)[0] for blueprint in blueprints.values())
    known = partial(
        Profile,
        name=name,
        shapes={name: blueprint.config.to_dict() for name, blueprint in blueprints.items()},
        dtype=str(kind).removeprefix("torch."),
        device=torch.cuda.get_device_name(where) if on_gpu else f"{platform.machine()} CPU",
        device_bytes=torch.cuda.get_device_properties(where).total_memory if on_gpu else None,
        versions=_versions(on_gpu),
        prefill_chunk=chunk,
        decode_steps=DECODE_STEPS,
        patience=patience,
        seed=SEED,
        largest_batch=_of(LARGEST_BATCH, where),
    )
    rows: list[ProfileRow] = []
    for row in profile(blueprints, lengths, where, kind, patience, chunk):
        rows.append(row)
        report(known(rows=tuple(rows)))
    return known(rows=tuple(rows))


@torch.inference_mode()
def profile(
    blueprints: Mapping[str, Blueprint],
    lengths: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    patience: float,
    chunk: int,
) -> Iterator[ProfileRow]:
    """Yields a row per model and length, each as soon as it is known.

    Args:
        blueprints: of the models, by name. One model exists at a time.
        lengths: in tokens, ascending. Once a model is out of memory or patience, the longer ones
            are not tried.
        device, dtype: of the models.
        patience: the seconds that one prefill may take, and one batch; longer ones are given up.
        chunk: how many tokens are fed at a time.
    """
    for name, blueprint in blueprints.items():
        weights = blueprint.costs.weight_bytes(dtype)
        outcome, model = _tried(partial(_made, blueprint, device, dtype))
        for length in lengths:
            cache = blueprint.costs.cache_bytes(dtype, _capacity(length))
            sizes: dict[str, Any] = {"weights_bytes": weights, "cache_bytes": cache}
            if outcome == MEASURED and cache > free_bytes(device):
                outcome = OUT_OF_MEMORY
            row = None
            if model is not None and outcome == MEASURED:
                outcome, figures = _tried(partial(_measure, model, length, patience, chunk))
                if figures is not None:
                    row = ProfileRow(name, length, outcome, **sizes, **figures)
                _free(device)
            yield row or ProfileRow(name, length, outcome, **sizes)
        del model
        _free(device)


def _made(blueprint: Blueprint, device: torch.device, dtype: torch.dtype) -> Model:
    # To be asked first: memory that a CPU does not have can be allocated there, and using it ends
    # the process.
    if blueprint.costs.weight_bytes(dtype) > free_bytes(device):
        raise MemoryError
    return blueprint.make(device, dtype)


def _tried(run: Callable[[], T]) -> tuple[str, T | None]:
    """The outcome of what may run out of memory or patience, and what it returns if it does not."""
    try:
        return MEASURED, run()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return OUT_OF_MEMORY, None
    except _OutOfPatience:
        return OUT_OF_PATIENCE, None


def _measure(model: Model, length: int, patience: float, chunk: int) -> dict[str, Any]:
    """A row's peak_bytes, prefill_seconds, decode_tokens_per_second and throughput."""
    generator = torch.Generator(model.device).manual_seed(SEED)
    ids = torch.randint(
        model.config.vocab_size, (length,), generator=generator, device=model.device
    )
    # The cache of the warm-up is as large as the one measured, since kernels are chosen by its
    # strides. Its memory goes back to PyTorch, not to the system: taking it costs no time again.
    warm_up = ids[: _of(WARM_UP_TOKENS, model.device)]
    _run(model, warm_up, length, chunk, deadline=math.inf, steps=1)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    start = time.perf_counter()
    prefilled, decode_seconds, state = _run(
        model, ids, length, chunk, start + patience, steps=DECODE_STEPS
    )
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else None
    return {
        "peak_bytes": peak,
        "prefill_seconds": prefilled - start,
        "decode_tokens_per_second": DECODE_STEPS / decode_seconds,
        "throughput": tuple(_throughput(model, state, patience)),
    }


def _run(
    model: Model, ids: Tensor, length: int, chunk: int, deadline: float, steps: int
) -> tuple[float, float, State]:
    """Feeds `ids` to a cache for `length` tokens, then decodes.

    Returns:
        The time at which the first prediction was there, the seconds that `steps` steps took, and
        the state after `ids`.
    """
    cache = model.new_cache(_capacity(length))
    fed: list[torch.cuda.Event] = []
    last: Rows | None = None
    for part in ids.split(chunk):
        last = None  # not two chunks' outputs at a time
        last = take(model.prefill(part, cache), slice(-1, None))
        # The clock is looked at one chunk behind, so that the GPU never waits for the host.
        if model.device.type == "cuda":
            fed.append(torch.cuda.Event())
            fed[-1].record()
            if len(fed) > 1:
                fed[-2].synchronize()
        if time.perf_counter() > deadline:
            raise _OutOfPatience
    assert last is not None
    token = int(_predict(model, last, cache).argmax())  # waits for the device
    prefilled = time.perf_counter()

    decoder = model.decoder(cache)
    decoder.start(token)
    for _ in range(WARM_UP_STEPS):
        decoder.step()
    _synchronize(model.device)
    start = time.perf_counter()
    for _ in range(steps):
        decoder.step()
    _synchronize(model.device)
    return prefilled, time.perf_counter() - start, cache.state


def _throughput(model: Model, state: State, patience: float) -> Iterator[Throughput]:
    """Of batches that all continue a text's state, ascending, up to the largest that fits."""
    for shared in CONTEXTS:
        _free(model.device)
        largest = _largest_that_fits(model, state.length, shared)
        if largest < 2:
            yield Throughput(2, shared, OUT_OF_MEMORY)
            continue
        for batch in (*(batch for batch in BATCHES if 1 < batch < largest), largest):
            deadline = time.perf_counter() + patience
            outcome, speed = _tried(partial(_decode_batch, model, state, batch, shared, deadline))
            _free(model.device)
            yield Throughput(batch, shared, outcome, speed)
            if outcome != MEASURED:
                break


def _decode_batch(model: Model, state: State, batch: int, shared: bool, deadline: float) -> float:
    """Tokens per second of a batch of texts that all continue a text's state.

    shared: whether they read the keys and values of its tokens in one place; else each does so in
        a place of its own.
    """
    warm_up, steps = _of(BATCH_STEPS, model.device)
    room, length = warm_up + steps, state.length
    cache = model.new_cache(_slots(length, batch, shared, model))
    cache.fill_with_noise()
    decoder = model.decoder(cache, batch, room)
    common, own = _common(length, shared, model.block), _own(length, shared, model)
    known = 0 if model.block > 1 else None
    spans = [Span(0, batch, 0, common, causal=False, start=known)] if common else []
    for row in range(batch):
        first = common + row * own
        end = first + length - common + room
        # One by one, since all that join exist twice meanwhile.
        decoder.join([row], state, [0], [0], [np.arange(end - room, end)])
        spans.append(Span(row, row + 1, first, end, causal=False, start=common))
    decoder.read(range(batch), spans)
    start = 0.0
    for step in range(room):
        if step == warm_up:
            _synchronize(model.device)
            start = time.perf_counter()
        decoder.step(batch)
        if time.perf_counter() > deadline:
            raise _OutOfPatience
    _synchronize(model.device)
    return batch * steps / (time.perf_counter() - start)


def _largest_that_fits(model: Model, length: int, shared: bool) -> int:
    """The largest batch that the free memory has room for, as far as they are tried; 0 if none."""
    costs, dtype, device = model.costs, model.dtype, model.device

    def needs(batch: int) -> int:
        logits = batch * model.config.vocab_size
        activations = costs.activation_bytes(dtype, _capacity(length), batch, logits, device)
        cache = costs.cache_bytes(dtype, _slots(length, batch, shared, model))
        # The text's state and a copy; and what a graph that is captured of a step keeps for itself.
        return cache + (batch + 2) * costs.state_bytes(dtype) + 2 * activations

    free = int(MARGIN * free_bytes(device))
    return bisect_right(range(1, _of(LARGEST_BATCH, device) + 1), free, key=needs)


def _slots(length: int, batch: int, shared: bool, model: Model) -> int:
    """Of a cache for texts after contexts of `length` tokens, or after one that they share."""
    return _common(length, shared, model.block) + batch * _own(length, shared, model)


def _common(length: int, shared: bool, block: int) -> int:
    """Tokens of a context that all texts of a batch read in one place."""
    return length // block * block if shared else 0


def _own(length: int, shared: bool, model: Model) -> int:
    """Slots for what each reads in a place of its own."""
    room = sum(_of(BATCH_STEPS, model.device))
    return rounded(length - _common(length, shared, model.block) + room, model.block)


def _predict(model: Model, last: Rows, cache: Cache) -> Tensor:
    """Logits [1, vocab_size] after the text in the cache, of whose last token the rows are."""
    length = cache.state.length
    position = torch.tensor([length - 1], device=model.device)
    spans = Spans((Span(0, 1, 0, length, causal=True, start=0),))
    return model.logits(model.predict(last, position, cache, spans))


def _capacity(length: int) -> int:
    return length + WARM_UP_STEPS + DECODE_STEPS


def _of(table: Mapping[str, T], device: torch.device) -> T:
    """What holds for a kind of device."""
    return table.get(device.type, table["cpu"])


def _versions(on_gpu: bool) -> dict[str, str]:
    versions = {"yoco-eval": __version__, "torch": torch.__version__}
    if on_gpu:
        for name in ("triton", "pytorch-triton"):
            try:
                versions["triton"] = version(name)
            except PackageNotFoundError:
                continue
        versions["cuDNN"] = str(torch.backends.cudnn.version())
    return versions


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
