"""Loads a tokenizer of any kind as a Hugging Face fast tokenizer, and saves it beside a model.

tiktoken's cl100k_base and SentencePiece models are converted; what equals the original's ids, and
what does not, is told where it is done.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges, import_protobuf

CL100K = "cl100k_base"
CL100K_VOCAB_SIZE = 100288  # of a model trained with it: its ids, shifted, padded to whole eights

_CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CL100K_RANKS = 100256
_CL100K_SPECIAL_TOKENS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}
# The published models' own tokens take ids 0 to 3; tiktoken's ids follow, shifted by their number.
_PUBLISHED_TOKENS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
_NEVER = -1e6  # score of a unigram piece that no text may choose; piece scores are logarithms


class TokenizerError(ValueError):
    """A tokenizer cannot be used; the message names it and the mend, in one line."""


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer; none of its files is executed.

    Args:
        source: a folder that holds `tokenizer.json`, a SentencePiece `tokenizer.model` or a
            `*.tiktoken` file (looked for in this order), one of these files, "cl100k_base", or a
            name on the Hugging Face hub. Of these, only a name makes use of the network.

    Returns:
        A fast tokenizer of transformers.

    Raises:
        TokenizerError: there is none, or it is damaged, or a package is missing to read it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _tokenizer_file(path)
        if found is None:
            raise TokenizerError(
                f"{path}: no tokenizer in this folder (tokenizer.json, tokenizer.model or "
                "*.tiktoken); name one, with --tokenizer in `yoco-eval convert` or with "
                "--model_args tokenizer=... in lm_eval"
            )
        path = found
    if path.is_file():
        if path.suffix == ".tiktoken":
            return from_tiktoken(path)
        if path.suffix == ".model":
            return from_sentencepiece(path)
        if path.suffix == ".json":
            return _from_tokenizer_json(path)
        raise TokenizerError(
            f"{path}: unknown kind of tokenizer; give a folder, a tokenizer.json, a SentencePiece "
            "*.model or a *.tiktoken file"
        )
    if str(source) == CL100K:
        return from_tiktoken(CL100K)
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


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: str | Path, max_length: int | None = None
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, for AutoTokenizer of any transformers.

    Args:
        max_length: the model's context length in tokens, where it is known.
    """
    folder = Path(folder)
    tokenizer.save_pretrained(folder)
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
    """Converts tiktoken's cl100k_base to the tokenizer of the published models.

    The ids of every text are 0 (`<s>`), then tiktoken's ids + 4, with cl100k_base's own special
    tokens recognised in it; `<s>`, `<pad>`, `</s>` and `<unk>` (0 to 3) in it are plain text.

    Args:
        source: "cl100k_base" (which tiktoken downloads once), or the path of a rank file: per
            line, a token in base64 and its rank. Other rank files are split as cl100k_base is.

    Raises:
        TokenizerError: the ranks cannot be had or read.
    """
    ranks = _cl100k_ranks() if str(source) == CL100K else _read_ranks(Path(source))
    shift = len(_PUBLISHED_TOKENS)
    letters = bytes_to_unicode()
    vocab = {"".join(letters[b] for b in token): rank + shift for token, rank in ranks.items()}
    merges = generate_merges(vocab, None)
    own = _CL100K_SPECIAL_TOKENS if len(ranks) == _CL100K_RANKS else {}
    vocab |= {token: i for i, token in enumerate(_PUBLISHED_TOKENS.values())}
    vocab |= {token: i + shift for token, i in own.items()}

    # As tiktoken does, take a piece that is a token as a whole without trying its merges.
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CL100K_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _assemble(tokenizer, _PUBLISHED_TOKENS, plain=own, name=str(source))


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
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    if spec.treat_whitespace_as_suffix or any(
        piece.type in (piece.USER_DEFINED, piece.UNUSED) for piece in proto.pieces
    ):
        raise TokenizerError(
            f"{path}: has user-defined or unused pieces, or whitespace as suffix, which cannot be "
            "converted exactly; give the folder of its Hugging Face tokenizer instead"
        )
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
    return _assemble(tokenizer, roles, plain=(), name=str(path))


def _assemble(
    tokenizer: Tokenizer, roles: dict[str, str], plain: Iterable[str], name: str
) -> PreTrainedTokenizerFast:
    """Gives the tokenizer its special tokens: `roles` by use, `plain` found in texts too."""
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in roles.values()])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    if bos := roles.get("bos_token"):
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # so that "</s>" in a text, say HTML, stays text
        name_or_path=name,
        **roles,
    )


def _sentencepiece_rules(rules) -> Iterable[normalizers.Normalizer]:
    """SentencePiece's treatment of a text before it is cut, in its order."""
    if rules.precompiled_charsmap:
        yield normalizers.Precompiled(rules.precompiled_charsmap)
    if rules.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if rules.add_dummy_prefix:
        yield normalizers.Prepend("▁")
    yield normalizers.Replace(" ", "▁")


def _read_sentencepiece(path: Path):
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


def _cl100k_ranks() -> dict[bytes, int]:
    alternative = "pass the file cl100k_base.tiktoken as tokenizer instead"
    try:
        import tiktoken
    except ImportError as error:
        raise TokenizerError(
            f"{CL100K}: pip install 'yoco-eval[tiktoken]', or {alternative}"
        ) from error
    try:
        encoding = tiktoken.get_encoding(CL100K)
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{CL100K}: tiktoken cannot download it here ({type(error).__name__}); {alternative}"
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


def _tokenizer_file(folder: Path) -> Path | None:
    named = [folder / "tokenizer.json", folder / "tokenizer.model"]
    files = [*named, *sorted(folder.glob("*.tiktoken"))]
    return next((file for file in files if file.is_file()), None)


def _from_tokenizer_json(file: Path) -> PreTrainedTokenizerBase:
    try:
        if file.name == "tokenizer.json" and (file.parent / "tokenizer_config.json").is_file():
            # Not AutoTokenizer: it would look for model classes, and warn that it knows no YOCO.
            return PreTrainedTokenizerFast.from_pretrained(str(file.parent), local_files_only=True)
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the libraries raise whatever their readers do
        raise TokenizerError(f"{file}: damaged ({_first_line(error)}); copy it again") from error
    known = tokenizer.get_vocab()
    roles = {role: token for role, token in _PUBLISHED_TOKENS.items() if token in known}
    if "eos_token" not in roles:
        raise TokenizerError(
            f"{file}: does not say which token ends a text; put its tokenizer_config.json beside it"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=str(file), **roles)


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its readers do
        raise TokenizerError(
            f"{name}: neither a path nor a tokenizer that could be had from the Hugging Face hub "
            f"({_first_line(error)}); give the path of a tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(f"{name}: has no tokenizer.json; name a tokenizer that has one")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
