"""Damage, accidental and malicious, that the fuzzer does to a file.

Each mutation takes a file and a random generator, and changes the file in place. `mutate` chooses
one that fits the kind of file.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

Mutation = Callable[[Path, Random], None]

SENTINEL = "EXECUTED"  # the file that malicious content tries to make, in the working folder
SCRIPT = "<img src=x onerror=alert(1)>"
_COMMAND = f"touch {SENTINEL}"
_DEEP = "\ue000deep\ue000"  # stands for what json.dumps cannot write
_HUGE = "\ue000huge\ue000"
_BLOCK = 4096

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**12, 2**63, 10**30, 10**400, -(10**30),
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), "", " ", "0", "1e999",
    "nan", "x" * 100_000, "\ud800", "\x1b[2J\x1b]0;title\x07", "a\nb\r\tc", "\u202egnp.exe", "\0",
    "=1+1", "+1", "-1+1", "@SUM(A1)", SCRIPT, "</script>", "$\\frac{1}{0}$", "$", "\\input{x}",
    "[red]", "[/]", "../../etc/passwd", "/dev/zero", "yoco", "4096", "١٢", [], {}, [[]], [None],
    {"": None}, list(range(2000)), ["a"] * 50, {"a": {"a": {"a": 1}}}, _DEEP, _HUGE,
]  # fmt: skip
_TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "{{ cycler.__init__.__globals__.os.system('" + _COMMAND + "') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include 'x' %}",
    "{% if %}",
    "{{ raise_exception('no\nsuch role') }}",
    "{{ messages[7].content }}",
    "",
]


def mutate(file: Path, rng: Random) -> None:
    """Changes the file, or what stands in its place, in one or several ways."""
    if rng.random() < 0.03:
        replace_file(file, rng)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of records that are twice in a file, and the like
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if rng.random() < 0.25:
                rng.choice(_BYTES)(file, rng)
            else:
                rng.choice(_by_kind(file))(file, rng)


def _by_kind(file: Path) -> list[Mutation]:
    if file.suffix == ".json":
        own = [edit_template] if file.name == "tokenizer_config.json" else []
        return [edit_json, edit_json, edit_json, rewrite_text, *own]
    if file.suffix == ".jsonl":
        return [edit_lines, edit_lines, rewrite_text]
    if file.suffix == ".safetensors":
        return [edit_header, edit_header, edit_header_length, edit_numbers]
    if file.suffix in (".pth", ".pt"):
        if not zipfile.is_zipfile(file):
            return [edit_state_dict, poison_pickle, splice, flip_bits]
        return [edit_zip, edit_zip, edit_pickle, edit_state_dict, poison_pickle, edit_numbers]
    if file.suffix == ".tiktoken":
        return [edit_ranks]
    return [flip_bits, splice]


# Any file.


def truncate(file: Path, rng: Random) -> None:
    content = file.read_bytes()
    cut = rng.choice((0, 1, len(content) - 1, rng.randrange(len(content) + 1)))
    file.write_bytes(content[: max(0, cut)])


def flip_bits(file: Path, rng: Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 2, 8, 64)) if content else 0):
        # Half of them where headers are, in front.
        end = rng.choice((len(content), min(len(content), 512)))
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def splice(file: Path, rng: Random) -> None:
    """Copies a piece over, or between, other bytes; or cuts one out; or puts random ones in."""
    content = file.read_bytes()
    start, place = (rng.randrange(len(content) + 1) for _ in range(2))
    piece = content[start : start + rng.choice((1, 8, 100, _BLOCK))]
    if rng.random() < 0.3:
        piece = rng.randbytes(rng.choice((1, 8, 100)))
    rest = place + rng.choice((0, len(piece), 16))
    file.write_bytes(content[:place] + piece + content[rest:])


def append(file: Path, rng: Random) -> None:
    with file.open("ab") as end:
        end.write(rng.choice((b"\0", b"\n", b"{}", rng.randbytes(64), b"x" * 10**6)))


def replace_file(file: Path, rng: Random) -> None:
    """Puts something in its place that is no such file at all."""
    content = file.read_bytes()
    file.unlink()
    kind = rng.randrange(9)
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.symlink_to(rng.choice(("/dev/zero", "/dev/full", "/dev/null", "/dev/stdin")))
    elif kind == 2:
        file.mkdir()
    elif kind == 3:
        file.symlink_to(rng.choice((file.name, "nowhere")))
    elif kind == 4:
        file.write_bytes(b"\xff\xfe" + content[:_BLOCK].decode("latin-1").encode("utf-16-le"))
    elif kind == 5:
        file.write_bytes(b"PK\x05\x06" + bytes(18))
    elif kind == 6:
        file.write_bytes(rng.randbytes(1000))
    elif kind == 7:
        with file.open("wb") as sparse:
            sparse.truncate(6 << 30)
    # or nothing


_BYTES: list[Mutation] = [truncate, flip_bits, splice, append]


# JSON.


def edit_json(file: Path, rng: Random) -> None:
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = _edited(data, rng)
    file.write_text(_dumps(data), encoding="utf-8", errors="surrogatepass")


def edit_lines(file: Path, rng: Random) -> None:
    """Edits a line of JSON among others; or drops, doubles or exchanges lines."""
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    if not lines:
        return
    i = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines.insert(i, lines[i])
    elif kind == 2:
        lines[i] = rng.choice(("", "null", "[]", "{}", "3", "{", "\0"))
    else:
        try:
            lines[i] = _dumps(_edited(json.loads(lines[i]), rng))
        except (ValueError, RecursionError):
            return
    text = "\n".join(lines) + "\n"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))


def edit_template(file: Path, rng: Random) -> None:
    """Gives a tokenizer a chat template, or code of its own, that must not harm."""
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(config, dict):
        return
    if rng.random() < 0.7:
        config["chat_template"] = rng.choice(_TEMPLATES)
    else:
        code = f"import os\nos.system({_COMMAND!r})\nclass Own: pass\n"
        (file.parent / "own.py").write_text(code)
        config["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
        config["tokenizer_class"] = rng.choice(("Own", "LlamaTokenizer", "PreTrainedTokenizerFast"))
    file.write_text(json.dumps(config))


def rewrite_text(file: Path, rng: Random) -> None:
    text = file.read_text(encoding="utf-8", errors="replace")
    file.write_bytes(
        rng.choice(
            (
                b"", b" ", b"null", b"[]", b"{}", b"0", b'"x"', b"NaN", b"{" * 5000, b"[" * 100_000,
                b'{"a":' * 5000 + b"1" + b"}" * 5000, b"\xef\xbb\xbf" + text.encode(),
                text.encode("utf-16"), text.replace(":", ": 1e999,", 1).encode(),
                text.replace("0", "NaN", 1).encode(), text.replace("1", "9" * 5000, 1).encode(),
                text.replace('"', "'").encode(), f"[{text}]".encode(), (text + text).encode(),
            )
        )
    )  # fmt: skip


def _dumps(data: Any) -> str:
    text = json.dumps(data)
    text = text.replace(json.dumps(_DEEP), "[" * 5000 + "]" * 5000)
    return text.replace(json.dumps(_HUGE), "1e999")


def _edited(data: Any, rng: Random) -> Any:
    """The data with one of its values, at any depth, changed."""
    places = list(_places(data))
    if not places:
        return rng.choice(_VALUES)
    # By depth first, or the thousands of entries of a vocabulary would be hit almost always.
    depth = rng.choice(sorted({depth for _, _, depth in places}))
    parent, key, _ = rng.choice([place for place in places if place[2] == depth])
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(rng.choice(_VALUES))[:_BLOCK]] = parent.pop(key)
    elif kind == 1:
        parent.insert(key, parent[key])
    elif kind == 2:
        other, its_key, _ = rng.choice(places)
        if _is_apart(parent[key], other) and _is_apart(other[its_key], parent):
            parent[key], other[its_key] = other[its_key], parent[key]
    elif kind == 3 and isinstance(parent, dict):
        parent[str(rng.choice(_VALUES))[:_BLOCK]] = rng.choice(_VALUES)
    elif kind == 4 and isinstance(parent[key], int | float):
        number = parent[key]
        half = number // 2 if isinstance(number, int) else number / 2  # of any size
        parent[key] = rng.choice((-number, number + 1, half, number * 2))
    elif kind == 4 and isinstance(parent[key], str):
        parent[key] += rng.choice([value for value in _VALUES if isinstance(value, str)])
    elif kind == 5:
        parent[key] = rng.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
    else:
        parent[key] = rng.choice(_VALUES)
    return data


def _places(data: Any, depth: int = 0):
    """Every (container, key, depth) in the data."""
    if isinstance(data, dict | list) and depth < 50:
        for key in list(data) if isinstance(data, dict) else range(len(data)):
            yield data, key, depth
            yield from _places(data[key], depth + 1)


def _is_apart(value: Any, container: Any) -> bool:
    """Whether the container is not in the value, so that no cycle comes about."""
    return value is not container and all(parent is not container for parent, *_ in _places(value))


# Weights.


def edit_header(file: Path, rng: Random) -> None:
    """Edits the JSON in front of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return
    if rng.random() < 0.5 and isinstance(header, dict) and header:
        tensor = header[rng.choice(sorted(header))]
        if isinstance(tensor, dict) and "data_offsets" in tensor:
            change = rng.randrange(3)
            if change == 0:
                tensor["dtype"] = rng.choice(
                    ("F64", "F32", "F16", "BF16", "I8", "U64", "BOOL", "F8_E4M3", "C64", "F4", "")
                )
            elif change == 1:
                tensor["shape"] = rng.choice(([], [0], [2**62, 2], [-1], [10**30], [1] * 500))
            else:
                tensor["data_offsets"] = rng.choice(([0, 0], [0, 2**63], [8, 4], [-1, 3], [0]))
    else:
        header = _edited(header, rng)
    text = _dumps(header).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def edit_header_length(file: Path, rng: Random) -> None:
    content = file.read_bytes()
    length = rng.choice((0, 1, len(content), 2**31, 2**63, 2**64 - 1, 10**8, rng.randrange(2000)))
    file.write_bytes(struct.pack("<Q", length) + content[8:])


def edit_numbers(file: Path, rng: Random) -> None:
    """Writes numbers that are none, or too large, somewhere among the weights."""
    content = bytearray(file.read_bytes())
    number = struct.pack(
        "<f", rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 1e-42))
    )
    for _ in range(rng.choice((1, 100))):
        place = len(content) // 2 + rng.randrange(max(1, len(content) // 4))
        place -= place % 4
        content[place : place + 4] = number
    file.write_bytes(content)


def edit_state_dict(file: Path, rng: Random) -> None:
    """Saves other tensors under the weights' names, or other objects beside them."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, weights_only=True)
    except Exception:
        return
    if not isinstance(content, dict):
        return
    weights = content.get("model", content)
    if not isinstance(weights, dict):
        return
    tensors = [name for name, weight in weights.items() if torch.is_tensor(weight)]
    if not tensors:
        return
    name = rng.choice(tensors)
    weight = weights[name]
    edits: list[Callable[[], Any]] = [
        lambda: weight.half(), lambda: weight.to(torch.int8), lambda: weight.to(torch.complex64),
        lambda: weight.to(torch.float8_e4m3fn), lambda: weight.bool(), lambda: weight.to("meta"),
        lambda: weight.to_sparse(), lambda: weight[:0], lambda: weight.sum(),
        lambda: torch.zeros(1).expand(weight.shape), lambda: weight.T, lambda: weight * 1e38,
        lambda: torch.full_like(weight, float("nan")), lambda: torch.nn.Parameter(weight),
        lambda: torch.nested.nested_tensor([weight, weight]), lambda: weight.tolist(),
        lambda: torch.quantize_per_tensor(weight.float(), 0.1, 0, torch.quint8),
        lambda: torch.zeros_like(weight), lambda: weight.double(), lambda: None,
        lambda: weights[rng.choice(tensors)], lambda: collections.OrderedDict(a=weight),
    ]  # fmt: skip
    try:
        edited = rng.choice(edits)()
    except Exception:
        return
    kind = rng.randrange(4)
    if kind == 0:
        del weights[name]
        weights[rng.choice(("", "extra", 3, None, "\x1b[2J", name + ".", ("a", 1)))] = edited
    else:
        weights[name] = edited
    if isinstance(cfg := content.get("cfg"), dict) and kind == 1:
        settings = vars(cfg["model"])
        settings[rng.choice(sorted(settings))] = rng.choice((*_VALUES, weight, _maze()))
        cfg["task"] = rng.choice((None, {"tokens_per_sample": weight}, [], {}))
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.7)


def _maze() -> list:
    """A list that a pickle writes in some lines, and that Python would write in 2**40."""
    maze: list = []
    for _ in range(40):
        maze = [maze, maze]
    return maze


def edit_zip(file: Path, rng: Random) -> None:
    """Packs the records of a zip file anew: compressed, renamed, cut, doubled, left out."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return
    if not records:
        return
    i = rng.randrange(len(records))
    name, content = records[i]
    kind = rng.randrange(7)
    if kind == 0:
        del records[i]
    elif kind == 1:
        records[i] = (rng.choice(("../x", "/x", "archive/data.pkl", "a\0b", name + "x")), content)
    elif kind == 2:
        records[i] = (name, content[: rng.randrange(len(content) + 1)])
    elif kind == 3:
        records.insert(rng.randrange(len(records)), (name, rng.randbytes(len(content))))
    elif kind == 4:
        records[i] = (name, content + bytes(rng.choice((1, 4096, 8 << 20))))
    compression = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, (name, content) in enumerate(records):
            mixed = rng.random() < 0.1
            archive.writestr(
                name, content, compress_type=zipfile.ZIP_STORED if mixed and number else compression
            )
    file.write_bytes(buffer.getvalue())


def edit_pickle(file: Path, rng: Random) -> None:
    """Damages the pickle within a zip file."""

    def damaged(content: bytes) -> bytes:
        edited = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(len(edited))
            if rng.random() < 0.5:
                edited[place] = rng.randrange(256)
            else:
                number = rng.choice((b"J\xff\xff\xff\x7f", b"K\0", b"\x8a\x09" + b"\xff" * 9, b"0"))
                edited[place : place + len(number)] = number
        return bytes(edited)

    _replace_pickle(file, damaged)


class _Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def poison_pickle(file: Path, rng: Random) -> None:
    """Puts a call into a pickle, which must not be made; or takes another pickle."""
    calls = [
        _Call(os.system, _COMMAND),
        _Call(eval, f"__import__('os').system({_COMMAND!r})"),
        _Call(exec, f"open({SENTINEL!r}, 'w')"),
        _Call(open, SENTINEL, "w"),
        _Call(os.mkdir, SENTINEL),
        _Call(getattr, "x", "__class__"),
        _Call(torch.load, SENTINEL),
        _Call(shutil.copyfile, __file__, SENTINEL),
        _Call(bytes, 1 << 34),
        _Call(torch.zeros, 1 << 34),
        _Call(collections.deque, [1]),
        _Call(collections.defaultdict, list),
    ]
    call = rng.choice(calls)
    if zipfile.is_zipfile(file) and rng.random() < 0.5:
        buffer = io.BytesIO()
        pickle.dump({"a": call}, buffer, protocol=2)
        _replace_pickle(file, lambda content: buffer.getvalue())
        return
    content = rng.choice(({"model": {}, "args": call}, {"embed_tokens.weight": call}, call))
    try:
        torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    except Exception:
        file.write_bytes(pickle.dumps(content))


def _replace_pickle(file: Path, change: Callable[[bytes], bytes]) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:
        return
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records:
            archive.writestr(name, change(content) if name.endswith(".pkl") else content)


# Tokenizers.


def edit_ranks(file: Path, rng: Random) -> None:
    lines = file.read_bytes().splitlines()
    if not lines:
        return
    i = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[i]
    elif kind == 1:
        lines.append(lines[i])
    elif kind == 2:
        token = lines[i].split(b" ")[0]
        number = rng.choice((b"-1", b"0", b"1e3", b"9" * 5000, b"9" * 12, b"x", b""))
        lines[i] = token + b" " + number
    elif kind == 3:
        lines[i] = rng.choice((b"", b"====", b"AA== 300", b" ", b"\xff", b"a b c", b"QQ" * 9999))
    else:
        rng.shuffle(lines)
    file.write_bytes(b"\n".join(lines) + b"\n")
