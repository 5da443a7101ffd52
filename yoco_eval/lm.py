"""The lm-eval backend `yoco`: text to tokens and back, around the engine."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from yoco_eval.model import open_checkpoint
from yoco_eval.model.checkpoint import DEFAULT_CHECKPOINT, resolve_checkpoint
from yoco_eval.model.families import check_together, join_group, with_eight_bits, with_sparse
from yoco_eval.model.folder import end_tokens
from yoco_eval.model.hub import hub_commit

from .building import Builders
from .chat import ChatTemplate
from .context_parallel import check_divides, own_group
from .dealing import deal, each_task, put_together
from .devices import check_cache_dtype, device_of_rank, find_device, find_dtype
from .encoding import Encoder
from .endings import Endings
from .engine import Engine
from .garbage import collecting_new_only
from .lengths import parse_length
from .memory import OutOfMemory, loading_weights
from .printable import shown
from .ranks import join
from .requests import GenerateRequest, Progress, Score, ScoreRequest, TokenIds
from .responses import unite_files
from .rounds import Ask, Generate, Note, Rounds, united
from .sampling import Sampling
from .sizes import parse_blocks
from .tokenizers import (
    SAMPLE,
    check_ends,
    check_vocabulary,
    checkpoint_tokenizer,
    load_tokenizer,
)

logger = logging.getLogger(__name__)

_ARGUMENTS = (
    "pretrained, revision, tokenizer, dtype, device, batch_size, max_length, max_gen_toks, "
    "prefill_chunk, context_parallel, sparse, cache_dtype, add_bos_token, enable_thinking, "
    "think_end_token, chat_template_args"
)
# Settings of other backends that change nothing if they have these values.
_WITHOUT_EFFECT = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "typical_p": 1,
    "min_p": 0,
}


@dataclass(frozen=True)
class _Generation:
    """What a request's settings say of its generation: stop strings, bounds, and how to draw."""

    until: list[str]
    max_tokens: int
    sampled: bool
    sampling: Sampling


class YocoLM(TemplateLM):
    """Evaluates a YOCO checkpoint in lm-eval.

    Args:
        pretrained: path of a checkpoint in any layout, the name of a bundled one, or one on the
            Hugging Face hub, `org/name`; default: the bundled demo checkpoint.
        revision: a branch, a tag or a commit of `pretrained` on the hub; default: its main branch.
        tokenizer: whatever `load_tokenizer` takes; default: the checkpoint's own.
        dtype: "auto" (bfloat16 on a GPU, float32 on the CPU), "bfloat16", "float16", "float32" or
            "float64".
        device: such as "cuda:1"; default: the first GPU if there is one, else the CPU.
        batch_size: how many requests are scored side by side at most, within `prefill_chunk`
            tokens, and how many answers are generated side by side; or "auto": as many as these and
            the memory allow.
        max_batch_size: accepted because lm-eval passes it; "auto" needs no bound to try.
        max_length: longest context with its continuation, in tokens ("64k" is 65536); default:
            what the checkpoint was trained for. Longer contexts lose tokens on the left.
        max_gen_toks: tokens to generate where a task does not say.
        prefill_chunk: tokens fed at a time; changes memory and speed, not results. Default: as many
            as pay and fit.
        context_parallel: how many of a run's processes hold each text together.
        sparse: how many blocks of 64 tokens of its text each token chooses to read, beside the
            first and the last two; default: it reads all.
        cache_dtype: "fp8": the shared cache of a YOCO model holds keys and values in eight bits;
            default: in the model's dtype.
        add_bos_token: whether a BOS token stands before every text; default: as the tokenizer does.
        enable_thinking: given to the chat template under this name, whether it is to ask for
            thinking; default: as the template does.
        think_end_token: what ends a model's thinking, as text or as the id of a token: answers
            begin behind it. Needed where `enable_thinking` is true.
        chat_template_args: variables for the chat template, by name.
        trust_remote_code: accepted because other backends take it; no code is ever executed.

    Attributes:
        builders: the processes that make prompts together, for tasks to ask; None: this one alone.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | str | None = None,
        max_gen_toks: int = 256,
        prefill_chunk: int | str | None = None,
        context_parallel: int | str = 1,
        sparse: int | str | None = None,
        cache_dtype: str | None = None,
        add_bos_token: bool | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        trust_remote_code: Any = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        self._ranks = join()
        self.builders: Builders | None = None
        if self._ranks is not None:
            self._rank, self._world_size = self._ranks.rank, self._ranks.size
            self.builders = Builders(self._ranks)
        if unknown:
            raise ValueError(
                f"unknown model argument {', '.join(sorted(unknown))}; --model yoco takes "
                f"{_ARGUMENTS}"
            )
        named: dict[str, Any] = {"pretrained": pretrained, "revision": revision, "dtype": dtype}
        named |= {"device": device, "tokenizer": tokenizer, "think_end_token": think_end_token}
        for name, value in named.items():
            if value is not None and not str(value).strip():
                raise ValueError(f"{name}= is empty; give a value, or leave it out for the default")
        if trust_remote_code:
            logger.warning(
                "trust_remote_code has no effect: --model yoco executes no code of a checkpoint"
            )
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # lm_eval passes this where no device was asked for, GPU or not
        if self._ranks is not None:
            device = device_of_rank(device, self._ranks.local_rank)
        where = find_device(device or "auto")
        kind = find_dtype(dtype, where)
        together = _count("context_parallel", context_parallel)
        most = None if sparse is None else _blocks(sparse)
        if most is not None and together > 1:
            raise ValueError(
                f"sparse={most} is for texts that one process holds, and "
                f"context_parallel={together} has several hold each; leave one of them out"
            )
        check_divides(together, self._ranks)
        if cache_dtype is not None:
            check_cache_dtype(cache_dtype, where, f"cache_dtype={cache_dtype}")
        chunk = None if prefill_chunk is None else _length("prefill_chunk", prefill_chunk)
        self.max_gen_toks = _count("max_gen_toks", max_gen_toks)
        auto = re.fullmatch(r"auto(:\d+)?", str(batch_size)) is not None
        batch = None if auto else _count("batch_size", batch_size)
        flags = {"add_bos_token": add_bos_token, "enable_thinking": enable_thinking}
        for name, flag in flags.items():
            if flag not in (None, True, False):
                raise ValueError(f"{name}: {flag!r} is neither True nor False")
        # As lm-eval's own backends take these three.
        if enable_thinking and think_end_token is None:
            raise ValueError(
                "enable_thinking=True needs think_end_token, what ends the thinking, as answers "
                "begin behind it; give it with --model_args, such as think_end_token=</think>, or "
                "think_end_token=<channel|> for Gemma 4"
            )
        self.enable_thinking, self.think_end_token = enable_thinking, _token(think_end_token)
        variables = _variables(chat_template_args)
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking

        self._name = DEFAULT_CHECKPOINT if pretrained is None else str(pretrained)
        self._revision = None if revision is None else str(revision)  # lm-eval makes 7 a number
        path = resolve_checkpoint(self._name, self._revision)
        self._commit = hub_commit(path)
        blueprint = open_checkpoint(self._name, self._commit)
        if together > 1:
            check_together(blueprint, f"context_parallel={together}")
        # Of what changes what is predicted: those that are set.
        self._cache_settings: dict[str, Any] = {}
        if most is not None:
            blueprint = with_sparse(blueprint, most, f"sparse={most}")
            self._cache_settings["sparse"] = most
        if cache_dtype is not None:
            blueprint = with_eight_bits(blueprint, f"cache_dtype={cache_dtype}")
            self._cache_settings["cache_dtype"] = cache_dtype
        vocabulary = blueprint.config.vocab_size
        if tokenizer is None:
            self.tokenizer = checkpoint_tokenizer(path, vocabulary)
        else:
            self.tokenizer = load_tokenizer(str(tokenizer))
            check_vocabulary(self.tokenizer, vocabulary)
        # Lengths are this backend's business; transformers would warn of every long prompt.
        self.tokenizer.model_max_length = sys.maxsize
        check_ends(self.tokenizer)
        self._chats = ChatTemplate(self.tokenizer, variables)
        self._endings = Endings(self.tokenizer, self.think_end_token)
        self._end_tokens = end_tokens(path, vocabulary)
        if self.eot_token_id is not None:
            self._end_tokens |= {self.eot_token_id}
        if not self._end_tokens:
            logger.warning(
                "%s: does not say which token ends a text: only stop strings and max_gen_toks end "
                "a generation", self.tokenizer.name_or_path,
            )  # fmt: skip
        group = own_group(together, self._ranks, where)
        with loading_weights(blueprint.costs, kind, where):
            model = blueprint.make(where, kind)
        if group is not None:
            join_group(model, group)
        self._device, self.model = model.device, model
        self.batch_size = batch_size
        self.max_length: int = (
            model.config.max_position_embeddings or sys.maxsize
            if max_length is None
            else _length("max_length", max_length)
        )
        if add_bos_token is None:
            add_bos_token = self.tokenizer(SAMPLE).input_ids[0] == self.tokenizer.bos_token_id
            bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
            if not add_bos_token and bos not in (None, eos):
                logger.warning(
                    "%s: puts no BOS token (%s) before texts, with --model hf neither; for a model "
                    "that was trained with one, as Gemma was, give add_bos_token=True, unless the "
                    "chat template writes it", self.tokenizer.name_or_path, shown(bos),
                )  # fmt: skip
        elif add_bos_token and self.tokenizer.bos_token_id is None:
            raise ValueError("add_bos_token=True, but the tokenizer has no BOS token")
        self.add_bos_token = bool(add_bos_token)
        sharing = 1 if self._ranks is None or where.type == "cuda" else self._ranks.local_size
        self.engine = Engine(model, batch, chunk, sharing)
        self._rounds: Rounds | None = None
        if self._ranks is not None:
            self._rounds = Rounds(
                self._ranks, model.costs, self._answers, self._bar, logger.warning, together
            )
        self._encoder, self._bos = Encoder(self.tokenizer), self.tokenizer.bos_token_id
        self._encoded: dict[str, np.ndarray] = {}  # texts of the requests at hand

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> YocoLM:
        """As lm-eval's, but what stands in --model_args comes before lm-eval's own options.

        lm-eval passes its defaults of --device and --batch_size, too, and fails on both.
        """
        if "pretrained" in arg_dict and arg_dict["pretrained"] is None:
            # As a script writes it whose variable is not set: no wish for the demo.
            raise ValueError(
                "pretrained=None names no checkpoint; name one, or leave pretrained out for the "
                f"bundled {DEFAULT_CHECKPOINT}"
            )
        options = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**{**options, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> YocoLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Refuses a --use_cache file with another model's responses: lm-eval keys it by prompts.

        Of a run of several processes each has a file; what any of them holds, all know.

        Raises:
            ValueError: a file was filled by another model, or under another setting.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            settings = {**self._settings(), **self._cache_settings}
            told = {k: str(v).removeprefix("torch.") for k, v in settings.items() if k != "config"}
            unite_files(cache_hook.dbdict, self._fingerprint(), told, self._ranks)

    def _settings(self) -> dict[str, Any]:
        """What responses depend on besides weights and tokenizer, but for the cache's settings."""
        settings = {
            "config": self.model.config,
            "dtype": self.model.dtype,
            "max_length": self.max_length,
            "max_gen_toks": self.max_gen_toks,
            "add_bos_token": self.add_bos_token,
        }
        # The tokenizer's own end token is part of the tokenizer.
        ends = sorted(self._end_tokens - {self.eot_token_id})
        further = {"end tokens": ends or None, "think_end_token": self.think_end_token}
        return settings | {name: one for name, one in further.items() if one is not None}

    def _fingerprint(self) -> str:
        """A hash of all that responses depend on; of each parameter, some numbers stand for all."""
        settings = list(self._settings().values())
        settings += [f"{name}={value}" for name, value in self._cache_settings.items()]
        digest = hashlib.sha256(repr(settings).encode())
        for name, parameter in self.model.state_dict().items():
            few = parameter.flatten()[:: max(1, parameter.numel() // 4096)].double().tolist()
            digest.update(f"{name} {few}".encode())
        digest.update(self._encoder.fingerprint.encode())
        # What its own file does not say: how special tokens are found in texts and left out of
        # answers, and which begin and end a text.
        tokenizer = self.tokenizer
        flags = tokenizer.split_special_tokens, tokenizer.clean_up_tokenization_spaces
        digest.update(repr([*flags, sorted(tokenizer.special_tokens_map.items())]).encode())
        return digest.hexdigest()

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the results file says of the model."""
        info = {
            "pretrained": self._name,
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype).removeprefix("torch."),
            "max_length": None if self.max_length == sys.maxsize else self.max_length,
        }
        of_the_hub = {"model_revision": self._revision, "model_sha": self._commit}
        told = {name: value for name, value in of_the_hub.items() if value is not None}
        return info | told | self._cache_settings

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; BOS before it unless told otherwise or already there."""
        return self._tokens(string, add_special_tokens).tolist()

    def _tokens(self, string: str, add_special_tokens: bool | None = None) -> np.ndarray:
        """What `tok_encode` gives, as int32, a ninth of the memory of a list: int32 [n]."""
        ids = self._encoded.get(string)
        if ids is None:
            ids = self._encoder.encode(string)
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token and not (len(ids) and ids[0] == self._bos)
        return np.concatenate((_ids([self._bos]), ids)) if add_special_tokens else ids

    @contextmanager
    def _encoding(self, strings: Iterable[str]) -> Iterator[None]:
        """Encodes texts in parallel, and has their ids at hand as long as it lasts."""
        distinct = list(dict.fromkeys(strings))
        self._encoded = dict(zip(distinct, self._encoder.encode_all(distinct), strict=True))
        try:
            yield
        finally:
            self._encoded = {}

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._chats.render(chat_history, add_generation_prompt)

    def longest_context(self) -> int:
        """The longest text, in tokens, that the memory takes which is free now."""
        return self.engine.longest()

    def prefill_operations(self, length: int) -> int:
        """Floating-point operations that feed so many tokens."""
        return self.model.costs.prefill_operations(length)

    def agree(self, own: Any) -> Any:
        """What the first process of the run says, where each says something of its own."""
        return own if self._ranks is None else self._ranks.collect(own)[0]

    def prepare(self, tasks: Mapping[Any, Any]) -> None:
        """Is told all tasks of a run before any is computed.

        Those are refused that ask for what is not supported; and several processes will divide
        the documents of each so that the run is that of one process.

        Args:
            tasks: as lm-eval's `evaluate` takes them: by name, in groups or not.

        Raises:
            ValueError: a task's settings of generation are not supported.
        """
        for name, task in each_task(tasks):
            kind = getattr(task, "OUTPUT_TYPE", None)
            try:
                if kind == "generate_until":
                    self._read_settings(task.config.generation_kwargs or {})
                elif kind in ("loglikelihood", "multiple_choice"):
                    self._refuse_thinking()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if self._ranks is not None:
                deal(task)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """lm-eval's question how many requests each process has: as many as this one, it is told.

        Otherwise it would add copies of requests, and count their responses, where there are fewer.
        """
        return tensor.repeat(self.world_size)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """lm-eval's way to what other processes have found, in the order of one process."""
        if self._ranks is None:
            return [obj]
        parts = self._ranks.gather(obj)
        return None if parts is None else [put_together(parts)]

    @collecting_new_only()
    def barrier(self) -> None:
        """Answers what other processes still ask."""
        if self._rounds is not None:
            self._rounds.barrier()

    @collecting_new_only()
    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """As lm-eval's, which encodes text by text: here those of all requests in parallel."""
        self._refuse_thinking()
        pairs = (_blanks_moved(*request.args) for request in requests)
        texts = ((before, before + after) for before, after in pairs)
        with self._encoding(chain.from_iterable(texts)):
            return super().loglikelihood(requests, disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
        """As lm-eval's, in arrays."""
        context, continuation = _blanks_moved(context, continuation)
        before, whole = self._tokens(context), self._tokens(context + continuation)
        return before, whole[len(before) :]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], TokenIds, TokenIds]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        results: list[Any] = [None] * len(requests)
        self._warn(
            "{count} of {total} continuations have no token of their own (their text merges with "
            "the context's last token); they score 0",
            sum(len(continuation) == 0 for _, _, continuation in requests),
            len(requests),
        )
        asks = [self._fit(context, continuation) for _, context, continuation in requests]
        self._warn_of_cuts(
            [len(context) - ask.first for (_, context, _), ask in zip(requests, asks, strict=True)]
        )

        def take(index: int, score: Score) -> None:
            results[index] = (score.logprob, score.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])

        self._run("loglikelihood", asks, take, disable_tqdm)
        return results

    @collecting_new_only()
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[Ask] = []
        owners: list[int] = []
        texts = self._encoder.encode_all([request.args[0] for request in requests])
        for owner, tokens in enumerate(texts):
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=tokens.tolist(),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append(Ask(_ids([*context, *continuation]), len(context)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        missing = np.bincount(np.asarray(owners, dtype=np.int64), minlength=len(requests))
        first = [0, *np.cumsum(missing).tolist()]
        found = [0.0] * len(windows)

        def take(index: int, score: Score) -> None:
            owner, found[index] = owners[index], score.logprob
            missing[owner] -= 1
            if missing[owner] == 0:
                totals[owner] = math.fsum(found[first[owner] : first[owner + 1]])
                self.cache_hook.add_partial(
                    "loglikelihood_rolling", requests[owner].args, totals[owner]
                )

        self._run("loglikelihood_rolling", windows, take, disable_tqdm)
        return totals

    @collecting_new_only()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        results: list[Any] = [None] * len(requests)
        settings = [self._read_settings(request.args[1]) for request in requests]
        asks, cuts = [], []
        drawn: Counter[tuple[Any, ...]] = Counter()
        with self._encoding(request.args[0] for request in requests):
            for request, own in zip(requests, settings, strict=True):
                name = ""
                if own.sampled:
                    # The same in whichever process: documents stay whole.
                    key = request.task_name, request.doc_id, request.args[0]
                    name = f"{request.task_name} {request.doc_id} {drawn[key]}"
                    drawn[key] += 1
                    # lm-eval's cache tells by nothing else that a response is not to be kept.
                    request.args[1]["do_sample"] = True
                ask, cut = self._generation(request.args[0], own, name)
                asks.append(ask)
                cuts.append(cut)
        self._warn_of_cuts(cuts)
        lost = 0

        def take(index: int, tokens: list[int]) -> None:
            nonlocal lost
            own = settings[index]
            results[index] = self._endings.answer(tokens, own.until)
            full = len(tokens) == own.max_tokens
            lost += full and self._endings.thinks(tokens)
            if not own.sampled:
                self.cache_hook.add_partial("generate_until", requests[index].args, results[index])

        self._run("generate_until", asks, take, disable_tqdm)
        ends = shown(self.think_end_token).replace("{", "{{").replace("}", "}}")
        self._warn(
            "{count} of {total} answers took all of max_gen_toks and have no think_end_token: what "
            "there is of their thinking was taken for the answer; give them more with --gen_kwargs "
            f"max_gen_toks=..., if {ends} is what ends this model's thinking",
            lost,
            len(requests),
        )
        return results

    def _fit(self, context: TokenIds, continuation: TokenIds) -> Ask:
        """The request with its context cut on the left to what `max_length` leaves room for."""
        # The last token of the continuation is predicted, not fed.
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens exceeds max_length = "
                f"{self.max_length}; raise it with --model_args max_length=..."
            )
        context = context[-room:] if len(context) else [self.prefix_token_id]
        return Ask(np.concatenate((_ids(context), _ids(continuation))), len(context))

    def _read_settings(self, settings: Mapping[str, Any]) -> _Generation:
        """What lm-eval's settings of a generation say.

        Raises:
            ValueError: one is unknown, or its value cannot be used.
        """
        try:
            kwargs = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"generation settings {dict(settings)}: {error}") from None
        until = [stop for stop in kwargs.pop("until") if stop]
        max_tokens, sampled = kwargs.pop("max_gen_toks"), bool(kwargs.pop("do_sample"))
        drawn = {key: kwargs.pop(key, None) for key in ("temperature", "top_p", "top_k")}
        for key, value in kwargs.items():
            if key not in _WITHOUT_EFFECT or value != _WITHOUT_EFFECT[key]:
                raise ValueError(
                    f"generation setting {key}={value!r} is not supported; --model yoco knows "
                    "until, max_gen_toks, do_sample, temperature, top_p and top_k"
                )
        if not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"generation setting until={until!r}: stop strings must be texts")
        if not 0 <= max_tokens < self.max_length:
            raise ValueError(
                f"max_gen_toks = {max_tokens} leaves no room for a prompt within max_length = "
                f"{self.max_length}; lower the one or raise the other"
            )
        numbers = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        numbers |= {key: value for key, value in drawn.items() if value is not None}
        try:
            temperature, top_p, top_k = map(float, numbers.values())
            top_k = int(top_k)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"generation settings {drawn}: not all are numbers") from None
        sampling = Sampling(temperature if sampled else 0.0, top_p, top_k)
        return _Generation(until, max_tokens, sampled, sampling)

    def _generation(self, context: str, settings: _Generation, name: str) -> tuple[Ask, int]:
        """The request, and the number of tokens cut on the left.

        Args:
            name: of a sampled request among those with the same context; each is drawn anew.
        """
        room = self.max_length - settings.max_tokens
        ids = self._tokens(context)
        if len(ids) == 0:
            ids = _ids([self.prefix_token_id])
        sampling = settings.sampling
        if settings.sampled:
            # Of the seed that lm-eval has set, and of the request: whatever runs beside it.
            digest = hashlib.sha256(f"{torch.initial_seed()} {name} ".encode() + ids.tobytes())
            sampling = replace(sampling, seed=int.from_bytes(digest.digest()[:7]))
        kept = ids[-room:]
        generate = Generate(settings.max_tokens, tuple(settings.until), sampling)
        return Ask(kept, len(kept), generate), len(ids) - len(kept)

    def _refuse_thinking(self) -> None:
        """As lm-eval's backends: no thinking goes before what is scored."""
        if self.enable_thinking:
            raise ValueError(
                "enable_thinking=True is for tasks whose answers are generated, not scored; leave "
                "it out, or choose other tasks"
            )

    def _warn_of_cuts(self, cuts: Sequence[int]) -> None:
        self._warn(
            "{count} of {total} requests are longer than max_length = "
            f"{self.max_length} tokens: their contexts lost up to {{most}} tokens on the left",
            sum(cut > 0 for cut in cuts),
            len(cuts),
            max(cuts, default=0),
        )

    def _warn(self, text: str, count: int, total: int, most: int = 0) -> None:
        """Warns of some of the requests, if there are any, with those of all processes counted."""
        note = Note(text, count, total, most)
        if self._rounds is not None:
            self._rounds.note(note)
        else:
            for warning in united([note]):
                logger.warning(warning)

    def _run(
        self, kind: str, asks: Sequence[Ask], take: Callable[[int, Any], object], silent: bool
    ) -> None:
        """Has requests answered; `take` is told (index, answer), each as soon as it is known."""
        if self._rounds is not None:
            try:
                self._rounds.ask(kind, asks, take)
            except BaseException:
                if self.cache_hook.dbdict is not None:
                    self.cache_hook.dbdict.commit()  # the process may end at once
                raise
            return
        with self._bar(kind, silent) as bar:

            def progress(done: int, spared: int = 0) -> None:
                bar.total -= spared
                bar.update(done)

            for index, answer in self._answers(kind, asks, bar.reset, progress):
                take(index, answer)

    def _bar(self, kind: str, silent: bool = False) -> tqdm:
        """A progress bar that counts tokens."""
        return tqdm(desc=f"yoco {kind}", unit="tok", unit_scale=True, disable=silent)

    def _answers(
        self, kind: str, asks: Sequence[Ask], begin: Callable[[int], object], progress: Progress
    ) -> Iterator[tuple[int, Any]]:
        """What the engine yields for requests."""
        try:
            if kind == "generate_until":
                prompts = list(map(self._prompt, asks))
                yield from self.engine.generate(prompts, begin=begin, progress=progress)
            else:
                scored = [ScoreRequest(ask.ids[: ask.first], ask.ids[ask.first :]) for ask in asks]
                yield from self.engine.score(scored, begin=begin, progress=progress)
        except OutOfMemory as error:
            resumed = "with --use_cache FILE, what is computed would be kept"
            if self.cache_hook.dbdict is not None:
                resumed = "the --use_cache file has the responses so far, for the next try"
            raise OutOfMemory(f"{error}; {resumed}") from None

    def _prompt(self, ask: Ask) -> GenerateRequest:
        assert ask.generate is not None
        return GenerateRequest(
            context=ask.ids,
            max_tokens=ask.generate.max_tokens,
            end_tokens=self._end_tokens,
            stop=self._endings.stopper(ask.generate.until),
            sampling=ask.generate.sampling,
        )


def _blanks_moved(context: str, continuation: str) -> tuple[str, str]:
    """Blanks at the end of the context belong to the continuation, as in lm-eval."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _ids(tokens: TokenIds) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int32)


def _token(given: Any) -> str | int | None:
    """A text or the id of a token, which may be written in digits."""
    if given is None or (isinstance(given, str) and not given.isdecimal()):
        return given
    if isinstance(given, bool) or not str(given).isdecimal():
        raise ValueError(f"think_end_token: {given!r} is neither a text nor the id of a token")
    return int(given)


def _variables(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"chat_template_args: {given!r} is no mapping of names to values; write --model_args "
            'as JSON: {"chat_template_args": {"NAME": VALUE}}'
        )
    return dict(given)


def _length(name: str, value: Any) -> int:
    try:
        return parse_length(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _count(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}: {value!r} is not a whole number from 1 on; give one, such as 8")
    return int(value)


def _blocks(given: Any) -> int:
    try:
        return parse_blocks(str(given))
    except ValueError as error:
        raise ValueError(f"sparse: {error}") from None
