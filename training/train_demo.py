"""Trains the demo checkpoints: a small YOCO that finds needles in its own haystack, stage by stage.

    python training/train_demo.py --out demo            # one GPU, some minutes

Everything is made here: the haystack and the questions are those of the tasks `yoco_needle` and
`yoco_multi_needle` (other seeds, so no evaluation text is trained on) with some of `yoco_passkey`,
the tokenizer is a byte-level BPE of that text, and the model learns on a curriculum of growing
contexts, because at long contexts alone it learns nothing. Only the questions at the end of a text
enter the cross-decoder: early exit pays in training, too. Each stage is saved, so that checkpoints
of different context lengths can be compared. A killed run goes on when it is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast

from yoco_eval.model import GatedRetentionSettings, Yoco, YocoConfig, save_checkpoint
from yoco_eval.tasks.haystack import SyntheticHaystack, sentence_starts
from yoco_eval.tasks.wording import (
    CITIES,
    INTRODUCTION,
    NEEDLE,
    NUMBER_DIGITS,
    PASSKEY_FILLER,
    PASSKEY_INTRODUCTION,
    PASSKEY_NEEDLE,
    PASSKEY_QUESTION,
    QUESTION,
)
from yoco_eval.tokenizers import save_tokenizer

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in the published vocabulary
SAVE_EVERY = 100  # steps


@dataclass(frozen=True)
class Stage:
    """Steps on contexts of up to `context` tokens: every second one as long, the others shorter.

    It ends after `steps`, or once the mean loss of the last 50 steps is below `until`.
    """

    name: str
    context: int
    rope_theta: float
    steps: int
    learning_rate: float
    until: float = 0.0


@dataclass(frozen=True)
class Recipe:
    seed: int = 1
    vocab_size: int = 2048
    dim: int = 256
    n_layers: int = 8
    hidden_dim: int = 128
    haystack_characters: int = 24_000_000
    tokens_per_step: int = 1 << 17
    needles: int = 8
    passkeys: float = 0.15  # share of the texts that are passkey prompts
    shortest: int = 512
    stages: tuple[Stage, ...] = field(
        default=(
            Stage("demo-512", 512, 1e4, 1500, 1e-3, until=0.003),
            Stage("demo-4k", 4096, 1e4, 600, 7e-4, until=0.003),
            Stage("demo-64k", 65536, 6.4e5, 300, 4e-4),
            Stage("demo-256k", 1 << 18, 5e6, 120, 3e-4),
            Stage("demo-1m", 1 << 20, 8e7, 80, 2e-4),
        )
    )

    def config(self) -> YocoConfig:
        return YocoConfig(
            dim=self.dim,
            n_layers=self.n_layers,
            hidden_dim=self.hidden_dim,
            self_decoder=GatedRetentionSettings(n_self_heads=self.dim // 64),
            n_attn_heads=self.dim // 64,
            n_attn_kv_heads=self.dim // 128,
            vocab_size=self.vocab_size,
        )


def train_tokenizer(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `text` and of the needle sentences: single digits, <s> before a text."""
    sentences = [
        INTRODUCTION + NEEDLE.format(city=city, number=7) + QUESTION.format(city=city)
        for city in CITIES
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text, *sentences * 50], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


class Examples:
    """Batches of token ids: notes with needles among them, then a question about every needle."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, text: str) -> None:
        self.recipe, self.random = recipe, np.random.default_rng(recipe.seed)
        self._encode = lambda text: np.array(
            tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64
        )
        self.bos = tokenizer.bos_token_id
        starts = [*sentence_starts(text), len(text)]
        # Sentences are cut before the blank that a byte-level token carries at its front.
        starts = [s - 1 if s and text[s - 1 : s] == " " else s for s in starts]
        pieces = [text[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        encoded = tokenizer(pieces, add_special_tokens=False).input_ids
        self.tokens = np.concatenate([np.array(ids, dtype=np.int64) for ids in encoded])
        self.sentences = np.cumsum([0] + [len(ids) for ids in encoded])
        # First sentences of a line, as they are when a needle has taken their place.
        self.moved = {
            i: self._encode(" " + piece) for i, piece in enumerate(pieces) if piece[0] != " "
        }
        self.lines = np.array(sorted(self.moved))
        # As it is before a line; a byte-level BPE cuts line breaks at a text's end otherwise.
        self.introduction = self._encode(INTRODUCTION + "A")[:-1]
        self.blank = self._encode(" ")[0]
        self.digits = np.array([self._encode(str(d))[0] for d in range(10)])
        self.full_stop, self.newline = self._encode(".")[0], self._encode("\n")[0]
        mark = "\x00"
        before, after = NEEDLE.format(city="@", number=mark).split(mark)
        self.needles, self.questions = [], []
        for city in CITIES:
            stem = before.replace("@", city).rstrip()
            self.needles.append((self._encode(" " + stem), self._encode(stem)))
            self.questions.append(self._encode(QUESTION.format(city=city)))
        assert after == "."
        sentences = PASSKEY_FILLER.replace(". ", ".|").split("|")
        # The filler's sentences in the middle of a line, and at the beginning of one.
        self.filler = [self._encode(" " + sentence) for sentence in sentences]
        self.first_filler = [self._encode(sentence) for sentence in sentences]
        self.passkey = [part.rstrip() for part in PASSKEY_NEEDLE.format(number=mark).split(mark)]
        self.passkey_introduction = self._encode(PASSKEY_INTRODUCTION + "A")[:-1]
        self.passkey_question = self._encode(PASSKEY_QUESTION)
        longest = max(len(question) for question in self.questions)
        #: tokens at the end of a text that enter the cross-decoder
        self.tail = recipe.needles * (longest + NUMBER_DIGITS + 2) + 1

    def _number(self) -> np.ndarray:
        number = self.random.integers(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS)
        digits = self.digits[[int(d) for d in str(number)]]
        return np.concatenate([[self.blank], digits, [self.full_stop]])

    def example(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [length] and, for each, whether it belongs to an answer: bool [length]."""
        count = self.random.integers(1, self.recipe.needles + 1)
        cities = self.random.permutation(len(CITIES))[:count]
        numbers = [self._number() for _ in cities]
        tail, answers = [], []
        for i in self.random.permutation(count):
            tail += [self.questions[cities[i]], numbers[i]]
            answers += [np.zeros(len(tail[-2]), bool), np.ones(len(tail[-1]), bool)]
        tail, answers = [*tail, [self.newline]], [*answers, [True]]

        tail, answers = np.concatenate(tail), np.concatenate(answers)
        used = 1 + len(self.introduction) + len(tail)
        used += sum(len(self.needles[c][0]) + len(n) for c, n in zip(cities, numbers, strict=True))
        room = length - used
        latest = np.searchsorted(self.sentences[self.lines], len(self.tokens) - length)
        first = self.lines[self.random.integers(latest)]
        start = self.sentences[first]
        last = np.searchsorted(self.sentences, start + room, side="right") - 1
        places = np.sort(self.random.integers(first, last, size=count))
        parts, position = [[self.bos], self.introduction], first
        for city, number, place in zip(cities, numbers, places, strict=True):
            if place > position:
                parts.append(self.tokens[self.sentences[position] : self.sentences[place]])
                position = place
            starts_line = place in self.moved and parts[-1][-1] == self.newline
            parts += [self.needles[city][int(starts_line)], number]
            if starts_line:
                parts.append(self.moved[place])
                position = place + 1
        filler = length - sum(len(part) for part in parts) - len(tail)
        rest = self.sentences[position]
        ids = np.concatenate([*parts, self.tokens[rest : rest + filler], tail])
        return ids, np.concatenate([np.zeros(length - len(tail), bool), answers])

    def passkey_example(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `example`, of the passkey's filler; the needle on a line of its own or not."""
        number = self._number()[:-1]
        answer = np.concatenate([number, [self.full_stop, self.newline]])
        starts = np.cumsum([0] + [len(sentence) for sentence in self.filler])
        cycle = np.tile(np.concatenate(self.filler), length // starts[-1] + 2)
        room = length - len(self.passkey_introduction) - len(self.passkey_question) - 64
        place = self.random.integers(max(1, room * len(self.filler) // starts[-1]))
        own_line = bool(self.random.integers(2))

        def start(sentence: int) -> int:
            return sentence // len(self.filler) * starts[-1] + starts[sentence % len(self.filler)]

        before, middle, after = self.passkey
        newline = [[self.newline]] if own_line else []
        parts = [[self.bos], self.passkey_introduction]
        if place:
            parts += [self.first_filler[0], cycle[start(1) : start(place)], *newline]
        blank = " " if place and not own_line else ""
        parts += [self._encode(blank + before), number, self._encode(middle), number]
        parts += [self._encode(after), *newline]
        if own_line:
            parts.append(self.first_filler[place % len(self.filler)])
        rest = start(place + own_line)
        filler = length - sum(map(len, [*parts, self.passkey_question, answer]))
        ids = np.concatenate([*parts, cycle[rest : rest + filler], self.passkey_question, answer])
        return ids, np.arange(length) >= length - len(answer)

    def batch(self, length: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        kinds = self.random.random(count) < self.recipe.passkeys
        made = [self.passkey_example(length) if k else self.example(length) for k in kinds]
        ids, answers = zip(*made, strict=True)
        return torch.from_numpy(np.stack(ids)), torch.from_numpy(np.stack(answers))


def initialise(model: Yoco) -> None:
    """Unit variance after the embedding and every projection; residual branches start small."""
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = config.dim**-0.5 if "embed_tokens" in name else parameter.shape[1] ** -0.5
        if name.endswith(("out_proj.weight", "fc2.weight")):
            std /= math.sqrt(2 * config.n_layers)
        torch.nn.init.normal_(parameter, std=std)


def answer_loss(
    model: Yoco, ids: torch.Tensor, answers: torch.Tensor, tail: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answers' tokens, and the share of answer tokens predicted right."""
    first = max(0, ids.shape[1] - tail)
    logits = model(ids[:, :-1], first=first)
    targets, asked = ids[:, first + 1 :], answers[:, first + 1 :]
    logits, targets = logits[asked], targets[asked]
    return F.cross_entropy(logits.float(), targets), (logits.argmax(-1) == targets).float().mean()


def batch_sizes(recipe: Recipe, context: int) -> list[tuple[int, int]]:
    """(length, sequences) of the steps of a stage, longest first."""
    lengths = [context]
    while lengths[-1] > recipe.shortest:
        lengths.append(lengths[-1] // 2)
    return [(length, max(1, recipe.tokens_per_step // length)) for length in lengths]


def train(recipe: Recipe, out: Path, device: str) -> dict[str, list[float]]:
    """Trains all stages; saves each to `out`/<stage name>. Returns each stage's loss per step.

    What a run of the same recipe has left in `out` is gone on with.
    """
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    text = SyntheticHaystack(f"training {recipe.seed}").text(0, recipe.haystack_characters)
    tokenizer = train_tokenizer(text[:3_000_000], recipe.vocab_size)
    examples = Examples(recipe, tokenizer, text)
    model = Yoco(recipe.config()).to(device)
    initialise(model)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, "
        f"{len(examples.tokens):,} tokens of haystack",
        flush=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    progress = Progress(out / "training.pt", recipe, model, optimizer, examples)
    progress.resume()
    for stage in recipe.stages:
        if stage.name in progress.done:
            continue
        _extend(model, stage)
        if stage.context > recipe.tokens_per_step:
            _recompute_activations(model)
        sizes = batch_sizes(recipe, stage.context)
        began, history = time.perf_counter(), progress.losses.setdefault(stage.name, [])
        for step in range(len(history), stage.steps):
            warm = min(1.0, (step + 1) / 50)
            decay = 1 - 0.9 * step / stage.steps
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * warm * decay
            # Every second step is of the stage's own length; the shorter ones take turns between.
            length, count = sizes[0 if step % 2 == 0 else (step // 2) % len(sizes)]
            ids, answers = (x.to(device) for x in examples.batch(length, count))
            loss, accuracy = answer_loss(model, ids, answers, examples.tail)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            history.append(loss.item())
            right = len(history) >= 50 and np.mean(history[-50:]) < stage.until
            done = right or step + 1 == stage.steps
            if step % 50 == 0 or done:
                print(
                    f"{stage.name} step {step:4} length {length:6} loss {loss.item():.4f} "
                    f"tokens right {accuracy.item():.3f} "
                    f"{time.perf_counter() - began:6.1f} s",
                    flush=True,
                )
            if done:
                break
            if len(history) % SAVE_EVERY == 0:
                progress.save()
        save(model, tokenizer, out / stage.name, recipe)
        progress.done.append(stage.name)
        progress.save()
    return progress.losses


class Progress:
    """All that training goes on from after a kill.

    Attributes:
        done: names of the stages that are done.
        losses: of each stage, the loss of each step so far.
    """

    def __init__(
        self,
        file: Path,
        recipe: Recipe,
        model: Yoco,
        optimizer: torch.optim.Optimizer,
        examples: Examples,
    ) -> None:
        self.done: list[str] = []
        self.losses: dict[str, list[float]] = {}
        self._file, self._recipe = file, json.dumps(asdict(recipe))
        self._model, self._optimizer, self._examples = model, optimizer, examples

    def resume(self) -> None:
        """Goes back to what was saved last, if anything was.

        Raises:
            ValueError: it was saved by another recipe.
        """
        if not self._file.exists():
            return
        saved = torch.load(self._file, map_location="cpu", weights_only=True)
        if saved["recipe"] != self._recipe:
            raise ValueError(f"{self._file} is of another recipe; remove it, or give another --out")
        self.done, self.losses = saved["done"], saved["losses"]
        self._model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._examples.random.bit_generator.state = json.loads(saved["random"])
        print(f"going on after {sum(map(len, self.losses.values()))} steps", flush=True)

    def save(self) -> None:
        """Atomically: a kill while it writes leaves what was there."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".tmp")
        torch.save(
            {
                "recipe": self._recipe,
                "done": self.done,
                "losses": self.losses,
                "model": self._model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "random": json.dumps(self._examples.random.bit_generator.state),
            },
            unfinished,
        )
        os.replace(unfinished, self._file)


def _recompute_activations(model: Yoco) -> None:
    """Has the backward pass compute each half of a layer again, instead of keeping all of it."""
    for layer in [*model.self_decoder.layers, *model.cross_decoder.layers]:
        for name in ("mix", "feed_forward"):
            half = getattr(type(layer), name).__get__(layer)
            setattr(layer, name, partial(checkpoint, half, use_reentrant=False))


def _extend(model: Yoco, stage: Stage) -> None:
    """Gives the model the stage's context length and rotary base; its parameters stay."""
    model.set_rope_theta(stage.rope_theta)
    model.config = replace(model.config, max_position_embeddings=stage.context)


def save(model: Yoco, tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: Recipe) -> None:
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    save_checkpoint(folder, model.config, weights)
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(Recipe(seed=args.seed), args.out, args.device)


if __name__ == "__main__":
    main()
