"""A checkpoint's folder on the Hugging Face hub: fetched, or found in the hub's local cache.

Only data is fetched: configuration, weights, tokenizer; no code, which nothing here would execute.
What huggingface_hub reads from the environment holds: HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, ...
"""

from __future__ import annotations

import errno
import logging
import re
from pathlib import Path

import huggingface_hub  # which imports the rest of itself, in time that shows, when it is used
from huggingface_hub import constants, utils

from yoco_eval.printable import VALUE, shortened, shown

from .errors import CheckpointError

logger = logging.getLogger(__name__)

_CONFIGS = ("config.json", "params.json")
_SMALL = [
    *_CONFIGS, "generation_config.json", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "*tekken*.json", "chat_template.jinja",
    "chat_template.json",
]  # fmt: skip
_WEIGHTS = ("*.safetensors", "checkpoint.pth", "*.pt")  # the first kind that there is, counts
_SUBFOLDERS = "*/*"  # nothing in them is read
_COMMIT = re.compile("[0-9a-f]{40}")


def is_hub_name(name: str) -> bool:
    """Whether it could be a repository's on the hub, `org/name`, wherever no path is meant."""
    try:
        utils.validate_repo_id(name)
    except utils.HFValidationError:
        return False
    return "/" in name


def hub_folder(name: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder, in the hub's local cache, of those of a repository's files that are read.

    What the cache lacks is downloaded. The cache alone counts where HF_HUB_OFFLINE is set, and
    where the hub gives no access but the cache has the repository; unless it is asked for a commit,
    which stays what it is, a line of the log says so.

    Args:
        name: `org/name`.
        revision: a branch, a tag or a commit; None for the repository's main branch.
        weights: False for all but the weights, if there is a configuration without them.

    Returns:
        A folder whose name is the commit: see `hub_commit`.

    Raises:
        CheckpointError: no such name, repository or revision, no access to it, no weights in it;
            the hub cannot be reached, or must not, and the cache lacks it; or no room on the disk.
    """
    if not is_hub_name(name):
        raise CheckpointError(
            f"{shown(name)}: no name on the Hugging Face hub; one is org/name, in letters, digits, "
            "'-', '_' and '.'"
        )
    if constants.HF_HUB_OFFLINE:
        return _from_cache(name, revision, weights, "HF_HUB_OFFLINE is set")
    if not (revision and _COMMIT.fullmatch(revision) and _cached(name, revision)):
        try:  # first, since a download that fails to begin falls back to the cache in silence
            huggingface_hub.HfApi().model_info(
                name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        except utils.RevisionNotFoundError as error:
            raise CheckpointError(
                f"{name}: has no revision {shown(revision)} on the hub; name a branch, a tag or a "
                "commit of it"
            ) from error
        except Exception as error:  # the library raises whatever its transports do
            return _from_cache(name, revision, weights, error)
    try:
        return _download(name, revision, weights)
    except CheckpointError:
        raise
    except utils.GatedRepoError as error:
        raise _no_access(name, error) from error
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise CheckpointError(
                f"{name}: no room for its files in {constants.HF_HUB_CACHE}; make room, or set "
                "HF_HUB_CACHE to a folder that has it"
            ) from error
        raise CheckpointError(
            f"{name}: cannot be downloaded to {constants.HF_HUB_CACHE} ({_first_line(error)}); try "
            "again, what has arrived is kept"
        ) from error


def hub_commit(folder: Path) -> str | None:
    """The commit that a folder in the hub's cache is a snapshot of; None of any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def _download(name: str, revision: str | None, weights: bool) -> Path:
    def fetch(revision: str | None, *patterns: str) -> Path:
        patterns = (*_SMALL, *patterns)
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), ignore_patterns=_SUBFOLDERS
            )
        )

    folder = fetch(revision)
    if not weights and any((folder / file).exists() for file in _CONFIGS):
        return folder
    for kind in _WEIGHTS:
        fetch(folder.name, kind)  # of the same commit, whatever is pushed meanwhile
        if any(folder.glob(kind)):
            return folder
    raise CheckpointError(f"{name}: has no weights that are read ({', '.join(_WEIGHTS)})")


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder in the cache, however much of it is there; None if there is none."""
    try:  # of no pattern at all no file is missing: the readers tell what they lack
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, local_files_only=True, allow_patterns=[]
            )
        )
    except (OSError, ValueError):
        return None


def _from_cache(name: str, revision: str | None, weights: bool, reason: str | Exception) -> Path:
    """The folder in the cache, taken for a reason: a word, or why the hub gave no access.

    Raises:
        CheckpointError: the cache lacks it.
    """
    folder = _cached(name, revision)
    told = reason if isinstance(reason, str) else _first_line(reason)
    if folder is None:
        at = f" at revision {shown(revision)}" if revision else ""
        where = f"not in the hub's cache ({constants.HF_HUB_CACHE}){at}"
        if isinstance(reason, utils.RepositoryNotFoundError):
            raise _no_access(name, reason) from reason
        if isinstance(reason, str):
            raise CheckpointError(
                f"{name}: no such path, and {where}, which alone counts where {reason}; check the "
                "path, or download it once without that"
            )
        raise CheckpointError(
            f"{name}: no such path, {where}, and the hub gives no answer ({told}); check the path, "
            "or the network"
        ) from reason
    if weights and not any(file for kind in _WEIGHTS for file in folder.glob(kind)):
        raise CheckpointError(
            f"{name}: without its weights in the hub's cache ({folder}), and the hub cannot be "
            f"asked ({told}); download it once"
        )
    if revision != folder.name:  # or it is the same as on the hub
        level = logging.INFO if isinstance(reason, str) else logging.WARNING
        logger.log(level, "%s: taken from the hub's cache, %s (%s)", name, folder, told)
    return folder


def _no_access(name: str, error: Exception) -> CheckpointError:
    mend = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, utils.GatedRepoError):
        return CheckpointError(
            f"{name}: a gated repository; ask for access on {constants.ENDPOINT}/{name}, and {mend}"
        )
    return CheckpointError(
        f"{name}: no such path, and no such repository on the hub, or one without access; check "
        f"the name, or {mend}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shortened(lines[0], VALUE)
