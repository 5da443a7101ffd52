"""Results folders as lm-eval leaves them, of checkpoints whose accuracies are chosen."""

import json
import re
from hashlib import blake2b
from random import Random

LENGTHS = [2**n for n in range(12, 21)]  # 4K to 1M
DEPTHS = [i / 10 for i in range(11)]


def needle_results(
    accuracy, model="m", seed=0, draws=0, lengths=LENGTHS, depths=DEPTHS, samples=5,
    task="yoco_needle", answers=True, prompts="", date=1.7e9, **metadata,
):  # fmt: skip
    """The contents of a results file.

    accuracy: a function of context length and depth. Whether a sample is right is drawn from
    `draws` and the seed, so that two runs of one model with the same `draws` are the same run.
    answers: whether cells tell which samples were right, as older files do not.
    prompts: what makes them, besides seed and place; None for files that do not tell of them.
    """
    cells = []
    for length in lengths:
        for depth in depths:
            drawn = [
                Random(f"{draws}/{seed}/{length}/{depth}/{sample}").random()
                for sample in range(samples)
            ]
            right = [i for i, value in enumerate(drawn) if value < accuracy(length, depth)]
            cell = {"context_length": length, "depth": depth, "samples": samples}
            cell |= {"correct": len(right)}
            if answers:
                cell |= {"right": right, "wrong": sorted(set(range(samples)) - set(right))}
            if answers and prompts is not None:
                texts = (f"{prompts}/{seed}/{length}/{depth}/{n}" for n in range(samples))
                cell |= {"prompts": [blake2b(t.encode(), digest_size=4).hexdigest() for t in texts]}
            cells.append(cell)
    settings = {
        "version": 1, "context_lengths": lengths, "depths": depths, "samples": samples,
        "seed": seed, "haystack": "synthetic", "by_length": ["acc"], **metadata,
    }  # fmt: skip
    scores = {"alias": task, "acc,none": _accuracy(cells)}
    for length in lengths:
        here = [cell for cell in cells if cell["context_length"] == length]
        scores[f"acc@{length:07d},none"] = _accuracy(here)
    configs = {task: {"metadata": settings | {"cells": cells}}}
    return results({task: scores}, model, date, configs=configs)


def _accuracy(cells):
    return sum(cell["correct"] for cell in cells) / sum(cell["samples"] for cell in cells)


def results(scores, model="m", date=1.7e9, shots=0, **parts):
    """A results file with these metrics by task; `parts` take the place of lm-eval's.

    Tasks with metrics such as acc@0004096 say that these are by length, as this project's do.
    """
    data = {
        "results": scores,
        "group_subtasks": {},
        "configs": {task: {"metadata": _by_length(metrics)} for task, metrics in scores.items()},
        "versions": dict.fromkeys(scores, 1.0),
        "n-shot": dict.fromkeys(scores, shots),
        "n-samples": {task: {"original": 1000, "effective": 1000} for task in scores},
        "config": {
            "model": "yoco", "model_args": {"pretrained": model}, "model_dtype": "float32",
            "limit": None,
        },
        "lm_eval_version": "0.4.13",
        "date": date,
    }  # fmt: skip
    return data | parts


def _by_length(metrics):
    found = [match for metric in metrics if (match := re.match(r"(\w+)@(\d{7}),", metric))]
    if not found:
        return {"version": 1.0}
    lengths = sorted({int(match[2]) for match in found})
    by_length = sorted({match[1] for match in found})
    return {"version": 1.0, "context_lengths": lengths, "by_length": by_length}


def of_cache(data, sparse=None, cache_dtype=None):
    """The results as of a run with these settings."""
    told = {"sparse": sparse, "cache_dtype": cache_dtype}
    told = {name: value for name, value in told.items() if value is not None}
    data["config"] |= told
    data["config"]["model_args"] |= told
    return data


def write(folder, data, name="results_2025-01-02T03-04-05.678901.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / name


def log_samples(results_file, **texts):
    """Writes beside a results file the samples that its cells tell of, as --log_samples does.

    texts: in place of made ones: question, number, needle, excerpt, generated, acc_all; the last
        one is a function of context length, depth and sample.
    """
    data = json.loads(results_file.read_text())
    date = results_file.stem.rpartition("_")[2]
    for task, config in data["configs"].items():
        lines = []
        for cell in config.get("metadata", {}).get("cells", []):
            answered_right = cell.get("right", range(cell["correct"]))
            for sample in range(cell["samples"]):
                number = str(10_000 + cell["context_length"] % 9973 + sample)
                needle = f"The special number of Oslo is {number}."
                doc = {
                    "context_length": cell["context_length"], "depth": cell["depth"],
                    "sample": sample, "question": "What is the number of Oslo?", "number": number,
                    "needle": needle, "excerpt": f"{'Hay. ' * 40}{needle}{' Straw.' * 30}",
                    "prompt_tokens": cell["context_length"] - 16,
                }  # fmt: skip
                right = sample in answered_right
                hay = f"{cell['context_length']}/{cell['depth']}/{sample}: {'Hay. ' * 1000}"
                answer = texts.get("generated", f" {number}." if right else " 7, I guess.")
                lines.append(
                    {
                        "doc": doc | {k: v for k, v in texts.items() if k in doc},
                        "arguments": {"gen_args_0": {"arg_0": hay}},
                        "filtered_resps": [answer], "acc": float(right),
                    }
                )  # fmt: skip
                if every := texts.get("acc_all"):
                    share = every(cell["context_length"], cell["depth"], sample)
                    lines[-1]["acc_all"] = share
        log = results_file.parent / f"samples_{task}_{date}.jsonl"
        log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def trained_to(limit):
    """A checkpoint that is right up to a context length, and beyond it only near the end."""

    def accuracy(length, depth):
        if length <= limit:
            return 1.0
        return 1.0 if (1 - depth) * length <= limit else 0.02

    return accuracy


def write_family(folder):
    """Folders of four stages of context extension, which were given the same prompts."""
    folders = []
    for name, limit in {"4k": 2**12, "64k": 2**16, "256k": 2**18, "1m": 2**20}.items():
        data = needle_results(trained_to(limit), f"demo-{name}", draws=name)
        folders.append(write(folder / f"demo-{name}" / "abc", data).parent.parent)
    return folders


def write_training_run(folder, needles=4, curves=12, benchmarks=24, checkpoints=12, log=False):
    """Folders of the checkpoints of one training run, evaluated on tasks of three kinds.

    What a needle task and RULER find grows with the steps, of each task at another pace, but for
    the sixth checkpoint, which is worse at the first of them; benchmarks rise and then stay, but
    for one that falls. log: samples of the first needle task.
    """
    folders = []
    for k in range(checkpoints):
        name, draws = f"step-{1000 * (k + 1)}", Random(k)
        path = folder / name
        for task in range(needles):
            worse = 2 * (k == 5 and not task)
            limit = 2 ** (12 + min(8, k * (8 - task) // 8) - worse)
            data = needle_results(
                trained_to(limit), name, draws=k, date=1.7e9 + task,
                task="yoco_needle" if not task else f"yoco_multi_needle_{2**task}",
            )  # fmt: skip
            file = write(path, data, f"results_2025-01-02T03-04-{task:02}.json")
            if log and not task:
                log_samples(file)
        scores = {}
        for task in range(curves):
            reached = k * (12 - task) / 12 - 2
            values = [1 - 0.9 / (1 + 2 ** (reached - i)) for i in range(len(LENGTHS))]
            scores[f"niah_{task}"] = {
                f"acc@{n:07},none": value for n, value in zip(LENGTHS, values, strict=True)
            } | {f"acc@{n:07}_stderr,none": 0.02 for n in LENGTHS}
        for task in range(benchmarks):
            gain = 0.02 * min(k, 8) * (-1 if task == 3 else 1) + draws.gauss(0, 0.01)
            scores[f"benchmark_{task}"] = {
                "acc,none": 0.3 + 0.015 * task + gain, "acc_stderr,none": 0.01,
            }  # fmt: skip
        write(path, results(scores, name, date=1.8e9), "results_2025-02-02T03-04-05.json")
        folders.append(path)
    return folders
