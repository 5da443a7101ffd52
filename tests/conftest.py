"""What several tests share: small models, a cache of the hub, and a count of live memory."""

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from yoco_eval.model import GatedRetentionSettings, Yoco, YocoConfig, load

PUBLISHED = Path(__file__).parent / "data" / "published"


@pytest.fixture(params=["gated_retention", "sliding_window"])
def published(request) -> Path:
    """Folder of a reference model in the published layout, with its logits in expected.pt."""
    return PUBLISHED / request.param


@pytest.fixture
def exact(published) -> Yoco:
    """The same model in float64, where two ways to the same number agree almost to the last bit."""
    return load(published, device="cpu", dtype=torch.float64)


@pytest.fixture
def small_model() -> Yoco:
    """A model with random weights for the vocabulary of the demo tokenizer."""
    torch.manual_seed(0)
    config = YocoConfig(
        dim=32,
        n_layers=4,
        hidden_dim=48,
        self_decoder=GatedRetentionSettings(n_self_heads=2),
        n_attn_heads=4,
        n_attn_kv_heads=2,
        vocab_size=2048,
        max_position_embeddings=512,
    )
    return Yoco(config).requires_grad_(False).eval()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Puts a folder's files into a cache of the hub's, which is empty and has no network.

    It takes the repository's name, the folder, the commit and, if there is one, the branch, and
    gives the snapshot's folder.
    """
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(name: str, source: Path, commit: str, branch: str | None = None) -> Path:
        repository = cache / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / commit
        for each in (folder, repository / "blobs", repository / "refs"):
            each.mkdir(parents=True, exist_ok=True)
        for file in filter(Path.is_file, source.iterdir()):
            blob = f"{commit[:1]}-{file.name}"
            (repository / "blobs" / blob).write_bytes(file.read_bytes())
            (folder / file.name).symlink_to(f"../../blobs/{blob}")
        if branch:
            (repository / "refs" / branch).write_text(commit)
        return folder

    return add


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive at a time, but for those in `besides`."""

    def __init__(self, besides: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in besides}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.fixture
def live_bytes() -> type[Live]:
    """A context in which `peak` becomes the most bytes that were alive at a time."""
    return Live
