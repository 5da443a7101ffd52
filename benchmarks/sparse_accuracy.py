"""What sparse attention loses: right answers to needles by the number of blocks a token chooses.

    python benchmarks/sparse_accuracy.py [--pretrained demo-1m] [--tasks NAME,...] [--lengths 1m]
        [--samples 2] [--sparse 1,4,16,64] [--cache-dtype fp8] [--device auto]
        [--output FILE.json]

Texts and questions are those of lm-eval's tasks yoco_needle and yoco_multi_needle_*. Each text is
fed once, and all its questions are answered with each number of blocks: an answer is right if every
token of it is the likeliest one after the right ones before it, as in greedy decoding. Intervals
(95 %) and p-values, of the same answers with the whole cache, take each text as one cluster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from common import counts, environment, lengths, report
from lm_eval.api.instance import Instance

from yoco_eval.kernels.text_blocks import BLOCK
from yoco_eval.lengths import format_length
from yoco_eval.lm import YocoLM
from yoco_eval.memory import chunk_sizes
from yoco_eval.model import Sequences, Span, Spans
from yoco_eval.pages import rounded
from yoco_eval.reports.statistics import interval, paired_test

WHOLE = 1 << 40  # blocks, more than any text has

Question = tuple[np.ndarray, np.ndarray]  # token ids of a prompt, and of the right answer


class Listener(YocoLM):
    """Notes what it is asked."""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.asked = requests
        return [""] * len(requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", default="demo-1m")
    parser.add_argument("--tasks", default="yoco_needle,yoco_multi_needle_8")
    parser.add_argument("--lengths", type=lengths, default="1m")
    parser.add_argument("--depths", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--sparse", type=counts, default="1,4,16,64")
    parser.add_argument("--cache-dtype", help="fp8: of all rows (default: the model's)")
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, help="also write to this .json file")
    args = parser.parse_args()
    lm = Listener(
        args.pretrained,
        device=args.device,
        max_length=max(args.lengths),
        sparse=1,
        cache_dtype=args.cache_dtype,
    )
    rows = []
    for task in args.tasks.split(","):
        for length in args.lengths:
            metadata = {"context_lengths": [length], "samples": args.samples}
            metadata["depths"] = [(i + 0.5) / args.depths for i in range(args.depths)]
            lm_eval.simple_evaluate(lm, tasks=[task], metadata=metadata, bootstrap_iters=0)
            found = [answers(lm, text, [WHOLE, *args.sparse]) for text in texts(lm)]
            rows += summary(task, length, args.sparse, np.stack(found).astype(int))
    cache = f", {args.cache_dtype} cache" if args.cache_dtype else ""
    report(
        f"Needles with sparse attention, {args.pretrained}{cache}", rows, environment(), args.output
    )


def texts(lm: Listener) -> Iterator[list[Question]]:
    """The questions to each text, of which all have as many."""
    by_text: dict[int, list[Question]] = {}
    for request in lm.asked:
        doc, (prompt, *_) = request.doc, request.args
        numbers = [doc["number"], *(other["number"] for other in doc.get("others", ()))]
        before, whole = (lm._tokens(text) for text in (prompt, f"{prompt} {numbers[request.idx]}"))
        answer = whole[len(before) :]
        by_text.setdefault(request.doc_id, []).append((before.astype(int), answer.astype(int)))
    yield from by_text.values()


@torch.inference_mode()
def answers(lm: Listener, questions: list[Question], mosts: list[int]) -> np.ndarray:
    """Which questions to one text are answered right, by the number of blocks: [K, questions]."""
    model, device = lm.model, lm.model.device
    prompts = [prompt for prompt, _ in questions]
    shortest = min(map(len, prompts))
    alike = np.all([prompt[:shortest] == prompts[0][:shortest] for prompt in prompts], 0)
    same = shortest if alike.all() else int(alike.argmin())
    common = min(same, shortest - 1) // BLOCK * BLOCK
    fed = [np.concatenate(question)[common:-1] for question in questions]
    cache = model.new_cache(common + sum(rounded(len(ids), BLOCK) for ids in fed))
    for part in torch.tensor(prompts[0][:common]).split(chunk_sizes(model.costs, device)[0]):
        model.prefill(part.to(device), cache, asked=False)
    place, query, spans, taken = common, 0, [], []
    positions: list[int] = []
    for ids, (prompt, answer) in zip(fed, questions, strict=True):
        taken.append((place, place + len(ids)))
        spans.append(Span(query, query + len(answer), place, place + len(ids), True, common))
        positions += range(len(prompt) - 1, len(prompt) - 1 + len(answer))
        place, query = place + rounded(len(ids), BLOCK), query + len(answer)
    if common:
        spans.append(Span(0, query, 0, common, False, 0))
    cache.room = tuple(taken)
    sizes = [len(ids) for ids in fed]
    one = (0,) * len(fed)
    sequences = Sequences(tuple(sizes), (common,) * len(fed), device, one)
    every = torch.tensor(np.concatenate(fed)).to(device)
    rows, _ = model.feed(every, sequences, cache.state, cache, keep=False)
    parts = zip(rows.split(sizes), questions, strict=True)
    asked = torch.cat([part[-len(answer) :] for part, (_, answer) in parts])
    right = torch.tensor(np.concatenate([answer for _, answer in questions])).to(device)
    where, told = torch.tensor(positions, device=device), []
    for most in mosts:
        cache.most = most
        output = model.predict(asked.clone(), where, cache, Spans(tuple(spans)))
        hits = (model.logits(output).argmax(-1) == right).split([len(a) for _, a in questions])
        told.append([bool(hit.all()) for hit in hits])
    return np.array(told)


def summary(task: str, length: int, mosts: list[int], right: np.ndarray) -> list[dict[str, Any]]:
    """Rows of the table, of answers [texts, K, questions]."""
    whole, total, rows = right[:, 0], [right.shape[2]] * len(right), []
    for i, most in enumerate(["all", *mosts]):
        own = right[:, i]
        low, high = interval(own.sum(1).tolist(), total)
        lost, won = ((a > b).sum(1).tolist() for a, b in ((whole, own), (own, whole)))
        rows.append(
            {
                "task": task,
                "tokens": format_length(length),
                "blocks": most,
                "answers": own.size,
                "right": own.mean().item(),
                "from": low,
                "to": high,
                "lost": sum(lost),
                "p": paired_test(lost, won) if i else "",
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
