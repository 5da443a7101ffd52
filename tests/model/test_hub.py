"""Folders of the hub: what is fetched, what the cache serves, and what is said where neither can.

The hub is a server on this machine that answers as the real one does.
"""

import errno
import hashlib
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from yoco_eval.model import CheckpointError
from yoco_eval.model.hub import hub_commit, hub_folder, is_hub_name

FIRST, SECOND = "1" * 40, "2" * 40  # commits
NATIVE = "config.json tokenizer.json model-1-of-2.safetensors model.safetensors.index.json".split()
UNREAD = "modeling_yoco.py README.md optimizer.pt original/model.safetensors".split()
REPOSITORIES = {
    "org/native": {"v1": (FIRST, NATIVE), "main": (SECOND, [*NATIVE, *UNREAD])},
    "org/published": {"main": (FIRST, ["params.json", "checkpoint.pth", "cl.tiktoken", "last.pt"])},
    "org/fairseq": {"main": (FIRST, ["last.pt", "tokenizer.model"])},
    "org/data": {"main": (FIRST, ["config.json", "train.parquet"])},
    "org/gated": {"main": (FIRST, NATIVE)},
}


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        org, name, kind, revision, *file = [*parts[2 * api :], "revision", "main"][:5]
        branches = REPOSITORIES.get(f"{org}/{name}")
        if branches is None:
            return self.answer(401, error="RepoNotFound")
        found = [one for at, one in branches.items() if revision in (at, one[0])]
        if not found:
            return self.answer(404, error="RevisionNotFound")
        commit, files = found[0]
        if api and kind == "revision":
            files = [{"rfilename": file} for file in files]
            return self.answer(200, {"id": name, "sha": commit, "siblings": files})
        if api:
            files = [{"type": "file", "path": f, "oid": f, "size": len(f)} for f in files]
            return self.answer(200, files)
        if name == "gated":
            return self.answer(403, error="GatedRepo")
        return self.answer(200, "/".join(file), commit=commit)

    do_HEAD = do_GET

    def answer(self, status, content=None, error=None, commit=None):
        body = (content if isinstance(content, str) else json.dumps(content or {})).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        if error:
            self.send_header("X-Error-Code", error)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args): ...


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(hub_cache) -> Path:
    """The hub's cache: empty, and without a network."""
    return Path(constants.HF_HUB_CACHE)


@pytest.fixture
def online(server, cache, monkeypatch):
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )


def unreachable(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens


@pytest.fixture
def cached(hub_cache, tmp_path):
    """Puts files of these names in the cache, as the main branch of a repository."""

    def add(name, files) -> Path:
        source = tmp_path / name
        source.mkdir(parents=True)
        for file in files:
            (source / file).write_text(file)
        return hub_cache(name, source, FIRST, branch="main")

    return add


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def fault(*args, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        hub_folder(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, files",
    [
        ("org/native", NATIVE),
        ("org/published", ["params.json", "checkpoint.pth", "cl.tiktoken"]),
        ("org/fairseq", ["last.pt", "tokenizer.model"]),
    ],
)
def test_what_is_fetched(online, name, files):
    folder = hub_folder(name)
    assert names(folder) == sorted(files)
    assert folder.name == hub_commit(folder) == REPOSITORIES[name]["main"][0]
    assert (folder / files[0]).read_text() == files[0]


def test_weights_wait(online):
    folder = hub_folder("org/native", weights=False)
    assert names(folder) == sorted(set(NATIVE) - {"model-1-of-2.safetensors"})
    assert hub_folder("org/native") == folder and names(folder) == sorted(NATIVE)
    # This one's weights hold its configuration.
    assert names(hub_folder("org/fairseq", weights=False)) == ["last.pt", "tokenizer.model"]


def test_revisions(online, monkeypatch, caplog):
    branch, tag, commit = (hub_folder("org/native", at) for at in (None, "v1", FIRST))
    assert [branch.name, tag.name, commit.name] == [SECOND, FIRST, FIRST]
    unreachable(monkeypatch)
    assert hub_folder("org/native", FIRST) == commit  # which stays what it is
    assert not caplog.records


@pytest.mark.parametrize("name, files", [("a/b", NATIVE), ("a/c", ["params.json", "x.pt"])])
def test_from_the_cache(cached, caplog, monkeypatch, name, files):
    folder = cached(name, files)
    with caplog.at_level(logging.INFO, "yoco_eval"):
        assert [hub_folder(name), hub_folder(name, FIRST)] == [folder] * 2
    (record,) = caplog.records  # a commit is the same on the hub
    assert record.message == f"{name}: taken from the hub's cache, {folder} (HF_HUB_OFFLINE is set)"
    caplog.clear()
    unreachable(monkeypatch)
    assert hub_folder(name) == folder
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "refused" in caplog.text


def test_what_the_hub_no_longer_gives(online, cached, caplog):
    folder = cached("org/withdrawn", NATIVE)
    assert hub_folder("org/withdrawn") == folder and "taken from the hub's cache" in caplog.text


def test_what_the_cache_lacks(cache, cached, monkeypatch):
    cached("org/native", ["config.json"])
    assert hub_folder("org/native", weights=False).name == FIRST
    assert "org/native: without its weights in the hub's cache" in fault("org/native")
    message = fault("no/where")
    assert message.startswith(
        f"no/where: no such path, and not in the hub's cache ({cache}), which"
    )
    assert "HF_HUB_OFFLINE" in message
    assert "at revision 'v9'" in fault("org/native", "v9")
    unreachable(monkeypatch)
    message = fault("no/where")
    assert f"no such path, not in the hub's cache ({cache}), and the hub gives no ans" in message
    assert "refused" in message


@pytest.mark.parametrize(
    "name, revision, told",
    [
        ("no/where", None, "no/where: no such path, and no such repository on the hub, or one"),
        ("org/native", "v9", "org/native: has no revision 'v9' on the hub"),
        ("org/gated", None, "org/gated: a gated repository; ask for access on http://127.0.0.1"),
        ("org/data", None, "org/data: has no weights that are read (*.safetensors, checkpoint.pth"),
    ],
)
def test_faults(online, name, revision, told):
    assert fault(name, revision).startswith(told)


def test_full_disk(online, monkeypatch, cache):
    def write(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", write)
    assert fault("org/native").startswith(f"org/native: no room for its files in {cache}; make")


def test_interrupted_download(online, cache):
    cache.mkdir()
    (cache / "models--org--native").write_text("in the way")
    assert fault("org/native").startswith(f"org/native: cannot be downloaded to {cache} (")


@pytest.mark.parametrize("name", ["demo", "a/b/c", "../b", "/a", "a/", "a b/c", "a/b.git"])
def test_what_is_no_name(cache, name):
    assert not is_hub_name(name)
    assert "no name on the Hugging Face hub; one is org/name" in fault(name)


def test_commits():
    assert hub_commit(Path("hub/models--a--b/snapshots", FIRST)) == FIRST
    assert hub_commit(Path("snapshots/demo")) is None and hub_commit(Path("x", FIRST)) is None
