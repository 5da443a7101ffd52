"""Loads a tokenizer of any kind as a Hugging Face fast tokenizer, and saves it beside a model.

tiktoken's encodings, Mistral's tekken files and SentencePiece models are converted; what equals the
original's ids, and what does not, is told where it is done.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges, import_protobuf

CL100K, O200K = "cl100k_base", "o200k_base"
CL100K_VOCAB_SIZE = 100288  # of a model trained with it: its ids, shifted, padded to whole eights

_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K_UPPER, _O200K_LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_O200K_UPPER}]*[{_O200K_LOWER}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_O200K_UPPER}]+[{_O200K_LOWER}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The published models' tokenizer gives these ids from 100264 on to tokens of its own.
_CODE_TOKENS = (
    "<fim_prefix> <fim_middle> <fim_suffix> <fim_pad> <reponame> <filename> <gh_stars> "
    "<issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> "
    "<jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after>"
)


class _Encoding(NamedTuple):
    """An encoding of tiktoken, known by the number of its ranks.

    Attributes:
        ranks: how many tokens are no special ones.
        pattern: what a text is cut by.
        special: special tokens; of two with one id, that id decodes to the latter.
    """

    ranks: int
    pattern: str
    special: dict[str, int]


_ENCODINGS = {
    CL100K: _Encoding(
        100256,
        _CL100K_PATTERN,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
            **{token: 100264 + i for i, token in enumerate(_CODE_TOKENS.split())},
        },
    ),
    O200K: _Encoding(199998, _O200K_PATTERN, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
ENCODINGS = tuple(_ENCODINGS)  # names of tiktoken's that `load_tokenizer` takes
# The published models' own tokens take ids 0 to 3; tiktoken's ids follow, shifted by their number.
_PUBLISHED_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
SAMPLE = "No. 1"  # of which every tokenizer that is of any use makes tokens
_IDS = 1 << 24  # beyond the token ids of any model
_LARGEST = 1 << 28  # bytes of a file
_NEVER = -1e6  # score of a unigram piece that no text may choose; piece scores are logarithms


class TokenizerError(ValueError):
    """A tokenizer cannot be used; the message names it and the mend, in one line."""


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer; none of its files is executed.

    Args:
        source: a folder that holds `tokenizer.json`, a SentencePiece `tokenizer.model`, a
            `*.tiktoken` or Mistral's `tekken.json` (looked for in this order), one of these files,
            a name of `ENCODINGS`, or a name on the Hugging Face hub. Of these, only a name makes
            use of the network.

    Returns:
        A fast tokenizer of transformers. It may lack an end token, as that of a bare
        `tokenizer.json` does which does not have one by the usual names.

    Raises:
        TokenizerError: there is none, or it is damaged, or a package is missing to read it.
    """
    if not str(source).strip():
        raise TokenizerError("tokenizer: the name is empty; give a path or a name")
    path = Path(source).expanduser()
    if path.is_dir():
        found = _tokenizer_file(path)
        if found is None:
            raise TokenizerError(
                f"{path}: no tokenizer in this folder (tokenizer.json, tokenizer.model, *.tiktoken "
                "or tekken.json); name one, with --tokenizer in `yoco-eval convert` or with "
                "--model_args tokenizer=... in lm_eval"
            )
        path = found
    if path.is_file():
        _check_files(path)
        if path.suffix == ".tiktoken":
            return from_tiktoken(path)
        if path.suffix == ".model":
            return from_sentencepiece(path)
        if _is_tekken(path):
            return from_tekken(path)
        if path.suffix == ".json":
            return _from_tokenizer_json(path)
        raise TokenizerError(
            f"{path}: unknown kind of tokenizer; give a folder, a tokenizer.json, a SentencePiece "
            "*.model, a *.tiktoken file or tekken.json"
        )
    if str(source) in _ENCODINGS:
        return from_tiktoken(str(source))
    if path.is_absolute() or len(path.parts) > 2:
        raise TokenizerError(f"{source}: no such tokenizer; check the path")
    return _from_hub(str(source))


def checkpoint_tokenizer(checkpoint: str | Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a checkpoint: the one beside it, or else the published models'.

    Args:
        checkpoint: folder of the checkpoint, or a file in it.
        vocab_size: the model's. 100288 is that of the published models, whose checkpoints come
            without their tokenizer, cl100k_base.

    Raises:
        TokenizerError: there is none, it cannot be loaded, or it does not fit the model.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_file():
        folder = folder.parent
    if _tokenizer_file(folder) is None and vocab_size == CL100K_VOCAB_SIZE:
        tokenizer = load_tokenizer(CL100K)
    else:
        tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def check_tokens(tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    """Checks that the tokenizer makes something of `SAMPLE`, with special tokens and without.

    Raises:
        TokenizerError: it does not; the message begins with `name`.
    """
    _check_ids(tokenizer.get_vocab(), name)
    with _damage_told(name):
        found = tokenizer(SAMPLE, add_special_tokens=False, verbose=False).input_ids
        tokenizer(SAMPLE, verbose=False)
    if not found:
        raise TokenizerError(
            f"{name}: finds no token in a plain text: its vocabulary is empty, or has neither "
            "letters nor digits; copy it again"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Checks that the model has an embedding for every token id of the tokenizer.

    Raises:
        TokenizerError: an id is beyond the model's vocabulary.
    """
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        name = tokenizer.name_or_path or "the tokenizer"
        raise TokenizerError(
            f"{name}: its {needed} token ids exceed the model's vocabulary of {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def check_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the tokenizer has a token for a text to begin or to end with, as a model needs.

    Raises:
        TokenizerError: it has neither.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise TokenizerError(
            f"{tokenizer.name_or_path}: does not say which token begins or ends a text; put its "
            "tokenizer_config.json beside it, or name another tokenizer"
        )


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: str | Path, max_length: int | None = None
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, for AutoTokenizer of any transformers.

    Args:
        max_length: the model's context length in tokens, where it is known.

    Raises:
        TokenizerError: it holds what no file can.
    """
    folder = Path(folder)
    try:
        tokenizer.save_pretrained(folder)
    except UnicodeError as error:  # half a character, say in a template
        raise _damaged(tokenizer.name_or_path, error) from error
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # The class whose name both transformers 4 and 5 know; tokenizer.json says all that it needs.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["clean_up_tokenization_spaces"] = False  # or decoding would not give the text back
    if tokenizer.pad_token is None:
        config["pad_token"] = tokenizer.eos_token
    if max_length is not None:
        config["model_max_length"] = max_length
    for key in ("auto_map", "backend", "is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def from_tiktoken(source: str | Path) -> PreTrainedTokenizerFast:
    """Converts an encoding of tiktoken; cl100k_base becomes the published models' tokenizer.

    The ids of every text are 0 (`<s>`), then tiktoken's ids + 4, with the encoding's own special
    tokens recognised in it; `<s>`, `<pad>`, `</s>` and `<unk>` (0 to 3) in it are plain text.

    Args:
        source: a name of `ENCODINGS` (which tiktoken downloads once), or the path of a rank file:
            per line, a token in base64 and its rank. A rank file is known by the number of its
            ranks; others are split as cl100k_base is, and have no special tokens of their own.

    Raises:
        TokenizerError: the ranks cannot be had or read.
    """
    known = str(source) in _ENCODINGS
    ranks = _ranks_by_name(str(source)) if known else _read_ranks(Path(source))
    unknown = _Encoding(len(ranks), _CL100K_PATTERN, {})
    encoding = next((e for e in _ENCODINGS.values() if e.ranks == len(ranks)), unknown)
    shift = len(_PUBLISHED_TOKENS)
    letters = bytes_to_unicode()
    vocab = {"".join(letters[b] for b in token): rank + shift for token, rank in ranks.items()}
    merges = generate_merges(vocab, None)
    own = {i: token for token, i in encoding.special.items()}
    vocab |= {token: i for i, token in enumerate(_PUBLISHED_TOKENS.values())}
    vocab |= {token: i + shift for i, token in own.items()}

    # As tiktoken does, take a piece that is a token as a whole without trying its merges.
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(encoding.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # A vocabulary has one token for an id. Another name of it in a text becomes that token's.
    names = {token: own[i] for token, i in encoding.special.items() if own[i] != token}
    if names:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(token, name) for token, name in names.items()]
        )
    plain = [AddedToken(t, special=False, normalized=t in names.values()) for t in own.values()]
    return _assemble(tokenizer, _PUBLISHED_TOKENS, plain=plain, name=str(source))


def from_tekken(path: str | Path) -> PreTrainedTokenizerBase:
    """Converts Mistral's `tekken.json`, as transformers does, with BOS before every text.

    Raises:
        TokenizerError: no such file, or damaged, or this transformers cannot read it.
    """
    path = Path(path)
    with _damage_told(path):
        try:
            from transformers.integrations.mistral import convert_tekken_tokenizer

            tokenizer = convert_tekken_tokenizer(str(path))
        except OSError as error:
            raise _unreadable(path, error) from error
        except ImportError as error:
            raise TokenizerError(
                f"{path}: to read it, pip install --upgrade transformers, or mistral-common where "
                "it is of the old kind without special_tokens"
            ) from error
    check_tokens(tokenizer, path)
    _put_bos(tokenizer.backend_tokenizer, tokenizer.bos_token)
    tokenizer.name_or_path = str(path)
    return tokenizer


def from_sentencepiece(path: str | Path) -> PreTrainedTokenizerFast:
    """Converts a SentencePiece model (BPE or unigram), with BOS before every text.

    As in SentencePiece, the names of control tokens (`<s>`, ...) in a text are plain text. A
    text's ids equal SentencePiece's for BPE models that do not normalise, such as Llama's.
    Elsewhere they rarely differ, where the library tokenizers does: for joiners next to characters
    that normalisation changes, and, in unigram models, between cuts of equal score and for names
    of control tokens with characters that the model does not know.

    Raises:
        TokenizerError: no such file, not a SentencePiece model, or one that cannot be converted
            exactly; or the package protobuf is missing.
    """
    path = Path(path)
    proto = _read_sentencepiece(path)
    with _damage_told(path):
        return _convert_sentencepiece(proto, path)


def _convert_sentencepiece(proto: Any, path: Path) -> PreTrainedTokenizerFast:
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    if spec.treat_whitespace_as_suffix or any(
        piece.type in (piece.USER_DEFINED, piece.UNUSED) for piece in proto.pieces
    ):
        raise TokenizerError(
            f"{path}: has user-defined or unused pieces, or whitespace as suffix, which cannot be "
            "converted exactly; give the folder of its Hugging Face tokenizer instead"
        )
    model: BPE | Unigram
    # Only these may be found in a text: not <s>, nor <0x41>, which stands for a byte.
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    if spec.model_type == spec.BPE:
        vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        merges = generate_merges({token: vocab[token] for token in scores}, scores)
        options = {"unk_token": spec.unk_piece, "fuse_unk": True}
        model = BPE(vocab, merges, byte_fallback=spec.byte_fallback, **options)
    elif spec.model_type == spec.UNIGRAM:
        ranked = [(piece.piece, scores.get(piece.piece, _NEVER)) for piece in proto.pieces]
        model = Unigram(ranked, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    else:
        raise TokenizerError(
            f"{path}: neither a BPE nor a unigram model; give the folder of its Hugging Face "
            "tokenizer instead"
        )

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(list(_sentencepiece_rules(rules)))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    roles = {
        f"{role}_token": getattr(spec, f"{role}_piece")
        for role in ("bos", "eos", "unk", "pad")
        if getattr(spec, f"{role}_id") >= 0
    }
    return _assemble(tokenizer, roles, plain=[], name=str(path))


def _assemble(
    tokenizer: Tokenizer, roles: dict[str, str], plain: list[AddedToken], name: str
) -> PreTrainedTokenizerFast:
    """Gives the tokenizer its special tokens: `roles` by use, `plain` found in texts too."""
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in roles.values()])
    tokenizer.add_tokens(plain)
    if bos := roles.get("bos_token"):
        _put_bos(tokenizer, bos)
    # So that "</s>" in a text, say HTML, stays text.
    return _wrap(tokenizer, roles, name, split_special_tokens=True)


def _put_bos(tokenizer: Tokenizer, bos: str) -> None:
    """Has the tokenizer put BOS before every text."""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def _wrap(
    tokenizer: Tokenizer, roles: dict[str, str], name: str, **options: bool
) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options, **roles
    )
    # Not as an argument: a large vocabulary by a name makes transformers ask the hub for that name,
    # lest it be one of Mistral's with an old fault, and where it is a file's that is an error.
    wrapped.name_or_path = name
    return wrapped


def _sentencepiece_rules(rules: Any) -> Iterable[normalizers.Normalizer]:
    """SentencePiece's treatment of a text before it is cut, in its order."""
    if rules.precompiled_charsmap:
        yield normalizers.Precompiled(rules.precompiled_charsmap)
    if rules.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if rules.add_dummy_prefix:
        yield normalizers.Prepend("▁")
    yield normalizers.Replace(" ", "▁")


def _read_sentencepiece(path: Path) -> Any:
    """A `ModelProto` of the package that is there."""
    try:
        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise TokenizerError(
            f"{path}: to read a SentencePiece model, pip install 'yoco-eval[sentencepiece]'"
        ) from error
    from google.protobuf.message import DecodeError

    try:
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except DecodeError:
        proto.Clear()
    if not proto.pieces:
        raise TokenizerError(f"{path}: not a SentencePiece model, or damaged; copy it again")
    return proto


def _ranks_by_name(name: str) -> dict[bytes, int]:
    alternative = f"pass the file {name}.tiktoken as tokenizer instead"
    try:
        import tiktoken
    except ImportError as error:
        raise TokenizerError(
            f"{name}: pip install 'yoco-eval[tiktoken]', or {alternative}"
        ) from error
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{name}: tiktoken cannot download it here ({type(error).__name__}); set "
            f"TIKTOKEN_CACHE_DIR to where it has been before, or {alternative}"
        ) from error
    special = encoding.special_tokens_set
    return {
        token: encoding.encode_single_token(token)
        for token in encoding.token_byte_values()
        if token.decode("utf-8", "replace") not in special
    }


def _read_ranks(path: Path) -> dict[bytes, int]:
    # Not tiktoken's own reader: it would cache the file by its path, and miss later changes.
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise _unreadable(path, error) from error
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise TokenizerError(
                f"{path}: line {number} is not a token in base64 and its rank; copy the file again"
            ) from error
    bytes_missing = any(bytes([b]) not in ranks for b in range(256))
    if bytes_missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: ranks or single bytes are missing; copy the file again")
    return ranks


def _unreadable(path: Path, error: OSError) -> TokenizerError:
    return TokenizerError(f"{path}: cannot be read ({error.strerror}); check the path")


def _damaged(path: str | Path, error: BaseException) -> TokenizerError:
    return TokenizerError(f"{path}: damaged ({first_line(error)}); copy it again")


def _check_files(file: Path) -> None:
    """Refuses files whose readers would wait, or read without end: this one, and those that the
    libraries read beside a `tokenizer.json`."""
    beside = file.parent.glob("*.json"), file.parent.glob("*.jinja")
    for each in [file, *sorted(chain(*beside))] if file.suffix == ".json" else [file]:
        if not each.is_file() and each.exists() and not each.is_dir():
            raise TokenizerError(f"{each}: not an ordinary file; put a copy of the file there")
        if each.is_file() and each.stat().st_size > _LARGEST:
            raise TokenizerError(f"{each}: far larger than any such file; copy it again")


def _is_tekken(file: Path) -> bool:
    return "tekken" in file.name and file.suffix == ".json"  # Mistral's own rule


def _tokenizer_file(folder: Path) -> Path | None:
    named = [folder / "tokenizer.json", folder / "tokenizer.model"]
    tekken = filter(_is_tekken, sorted(folder.glob("*.json")))
    files = [*named, *sorted(folder.glob("*.tiktoken")), *tekken]
    return next((file for file in files if file.is_file()), None)


def _from_tokenizer_json(file: Path) -> PreTrainedTokenizerBase:
    with _damage_told(file):
        if file.name == "tokenizer.json" and (file.parent / "tokenizer_config.json").is_file():
            # Not AutoTokenizer: it would look for model classes, and warn that it knows no YOCO.
            loaded = PreTrainedTokenizerFast.from_pretrained(
                str(file.parent), local_files_only=True
            )
        else:
            tokenizer = Tokenizer.from_file(str(file))
            known = tokenizer.get_vocab()
            _check_ids(known, file)
            roles = {role: token for role, token in _PUBLISHED_TOKENS.items() if token in known}
            loaded = _wrap(tokenizer, roles, str(file))
    check_tokens(loaded, file)
    return loaded


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its readers do
        raise TokenizerError(
            f"{name}: neither a path nor a tokenizer that could be had from the Hugging Face hub "
            f"({first_line(error)}); give the path of a tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{name}: has no tokenizer.json; name a tokenizer that has one")
    check_tokens(tokenizer, name)
    return tokenizer


def _check_ids(vocab: dict[str, int], name: str | Path) -> None:
    largest = max(vocab.values(), default=0)
    if largest >= _IDS:  # the library would count up to it whenever it writes the vocabulary
        raise TokenizerError(f"{name}: {largest} is no id of a token; copy the file again")


@contextmanager
def _damage_told(name: str | Path) -> Iterator[None]:
    """Turns whatever the libraries raise of a file into an error of one line."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        # A panic of the library tokenizers, which is no Exception, is as good as one.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise _damaged(name, error) from error
        raise


def first_line(error: BaseException) -> str:
    """What an error of a library's says, in at most 200 characters of one line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:200]} ..."
