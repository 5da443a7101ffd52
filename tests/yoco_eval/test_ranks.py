"""Runs of several processes, launched as users do: what one process finds, each token fed once, and
an end for all where one of them ends."""

import fcntl
import json
import math
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from yoco_eval.devices import device_of_rank
from yoco_eval.ranks import Place, find_place

LAUNCHED = Path(__file__).parent / "launched"
TORCHRUN = ("torch.distributed.run", "--nproc_per_node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes")
WORDS = "the special number of a city is found in old notes about Lima and Oslo 4 8 .".split()
GRID = {"context_lengths": [256], "depths": 2, "samples": 12}
INTRODUCTION = 80  # tokens, at most, that all prompts of needles begin with


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "3"}, None),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7",
             "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            Place(1, 4, "a", 7),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "MASTER_ADDR": "n1",
             "MASTER_PORT": "29500"},
            Place(5, 8, "n1", 29500),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # within sbatch's own script
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "export both before srun, such as"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "start with torchrun or accelerate"),
    ],
)  # fmt: skip
def test_places(environment, place):
    if not isinstance(place, str):
        assert find_place(environment) == place
        return
    with pytest.raises(ValueError, match=place) as error:
        find_place(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "rank", "gpus", "device"),
    [
        (None, 3, 0, "cpu"),
        ("cuda:0", 3, 0, "cpu"),  # lm-eval's way to say that none was asked for
        ("cpu", 3, 8, "cpu"),
        (None, 3, 8, "cuda:3"),
        ("cuda:0", 3, 8, "cuda:3"),
        ("cuda", 1, 2, "cuda:1"),
        (None, 5, 1, "cuda:0"),  # each task sees its own GPU alone
        (None, 2, 2, "there are 2 GPUs, and more processes on this machine; start as many"),
        ("cuda:1", 0, 2, "device=cuda:1 is one for several processes; leave it out"),
    ],
)
def test_each_process_has_its_gpu(name, rank, gpus, device, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if " " in device:
        with pytest.raises(ValueError, match=device):
            device_of_rank(name, rank)
        return
    assert device_of_rank(name, rank) == device
    assert [f"cuda:{index}" for index in chosen] == [device] * (device != "cpu")


# -- runs of lm_eval -------------------------------------------------------------------------------


@contextmanager
def once(folder):
    """Whether a folder is to be filled, which one of several processes that run tests does."""
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not folder.exists()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks of all kinds, with examples that are drawn and answers that are."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "tasks"
    with once(folder) as new:
        if new:
            folder.mkdir()
            make_tasks(folder)
    return folder


def make_tasks(folder):
    rng = random.Random(0)

    def text(words):
        return " ".join(rng.choice(WORDS) for _ in range(words))

    stem = text(40)
    rows = [
        {
            "question": f"{stem} {text(rng.randrange(3, 20))}",
            "choices": [text(2), text(3), text(1)],
            "gold": rng.randrange(3),
            "text": text(rng.choice([5, 50, 300])),
        }
        for _ in range(7)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
    }
    made = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "fewshot_split": "test",
            "num_fewshot": 1,
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "sampled": {
            "output_type": "generate_until",
            "repeats": 2,
            "generation_kwargs": {
                "do_sample": True, "temperature": 1.0, "until": ["\n"], "max_gen_toks": 6,
            },
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, own in made.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **own}))


def command(launcher, tasks, output, *arguments):
    return [
        sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "lm_eval",
        "--model", "yoco", "--model_args", "dtype=float64,max_length=512", "--device", "cpu",
        "--include_path", str(tasks), "--tasks", "yoco_needle,choice,rolling,sampled",
        "--metadata", json.dumps(GRID),
        "--output_path", str(output), "--log_samples", *map(str, arguments),
    ]  # fmt: skip


def environment(counts, **more):
    counts.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [str(LAUNCHED), os.environ.get("PYTHONPATH")]))
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {**os.environ, **own, "COUNTS": str(counts), **more}


def run(launcher, tasks, folder, *arguments):
    """What a run wrote, how many tokens each process fed by the engine's methods, and all said."""
    folder.mkdir(exist_ok=True)
    alone = {} if launcher else {"RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        command(launcher, tasks, folder / "results", *arguments),
        env=environment(folder / "counts", **alone), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return found(folder / "results"), counted(folder), done


def counted(folder):
    return [json.loads(file.read_text()) for file in sorted((folder / "counts").iterdir())]


def found(folder):
    """The results file and the samples, but for what tells of the run itself."""
    (file,) = folder.rglob("results_*.json")
    results = json.loads(file.read_text())
    kept = ("results", "group_subtasks", "configs", "versions", "n-shot", "n-samples",
            "higher_is_better", "config")  # fmt: skip
    samples = {
        file.name.split("_2")[0]: [json.loads(line) for line in file.read_text().splitlines()]
        for file in sorted(folder.rglob("samples_*.jsonl"))
    }
    return {name: results[name] for name in kept} | samples


def same(a, b):
    """Equal but for the rounding of numbers, in texts, too, as samples have log-probabilities."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        return a == b or math.isclose(float(a), float(b), rel_tol=1e-9, abs_tol=1e-9)
    except (TypeError, ValueError):
        return False


@pytest.fixture(scope="module")
def alone(tasks):
    """What one process wrote, and the tokens that it fed."""
    folder = tasks.with_name("alone")
    with once(folder) as new:
        if new:
            run((), tasks, folder)
    return found(folder / "results"), counted(folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [(*TORCHRUN, "2"), (*ACCELERATE, "3"), (*TORCHRUN, "4")], ids=["2", "3", "4"]
)
def test_all_is_as_of_one_process(launcher, tasks, alone, tmp_path):
    expected, fed = alone
    results, counts, done = run(launcher, tasks, tmp_path)
    assert results.keys() == expected.keys()
    for name in expected:
        assert same(results[name], expected[name]), name
    assert len(results["samples_yoco_needle"]) == 24 and len(results["samples_choice"]) == 7
    assert len(counts) == int(launcher[-1])
    loads = [count.get("generate", 0) for count in counts]
    assert 0 <= sum(loads) - fed["generate"] <= INTRODUCTION * (len(loads) - 1)
    assert max(loads) <= 1.15 * sum(loads) / len(loads)
    haystacks = [count["haystacks"] for count in counts]  # all processes are on one machine
    assert haystacks == [fed["haystacks"] // len(counts)] * len(counts) and sum(haystacks) == 12
    for line in ("Running loglikelihood requests", "Selected Tasks", "Setting random seed"):
        assert done.stderr.count(line) == 1
    assert done.stderr.count("yoco loglikelihood_rolling: 0") == 1
    assert done.stdout.count("|yoco_needle|") == 1


@pytest.mark.slow
def test_more_processes_than_documents(tasks, alone, tmp_path):
    expected, _ = alone
    results, _, done = run((*TORCHRUN, "3"), tasks, tmp_path, "--limit", "2")
    names = [name for name in expected if name.startswith("samples_")]
    assert len(names) == 4
    for name in names:
        assert same(results[name], expected[name][:2])
        assert results["n-samples"][name.removeprefix("samples_")]["effective"] == 2
    assert done.stderr.count("SHOULD ONLY BE USED FOR TESTING") == 1


def stored(folder):
    """Responses in the files of --use_cache, each once."""
    keys = set()
    for file in folder.glob("cache_rank*.db"):
        connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
        try:
            responses = "SELECT key FROM unnamed WHERE key NOT LIKE 'yoco_eval%'"
            keys |= set(connection.execute(responses))
        except sqlite3.OperationalError:  # not a table yet
            pass
        finally:
            connection.close()
    return len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 8 + int(os.environ.get("KILLS", "1"))))
def test_a_killed_process_ends_all_and_others_go_on(seed, tasks, alone, tmp_path):
    """Any process, at any moment, and any number of others; KILLS=20 tries so often."""
    rng, (expected, _) = random.Random(seed), alone
    cache = ("--use_cache", tmp_path / "cache")
    count, by_torchrun = rng.randrange(2, 5), rng.random() < 0.5
    # Without torchrun, the others would wait for one that has not come yet.
    wanted = rng.randrange(0 if by_torchrun else 1, 30)
    given = command((*TORCHRUN, str(count)) if by_torchrun else (), tasks, tmp_path / "x", *cache)
    own = environment(tmp_path / "killed", SLOW="0.1")
    meetings = [{}] if by_torchrun else meeting(count)
    with open(tmp_path / "said", "w") as said:
        launched = [
            subprocess.Popen(given, env=own | place, stderr=said, text=True) for place in meetings
        ]
    deadline = time.monotonic() + 120
    while stored(tmp_path) < wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(rng.random() * 0.5)
    workers = children(launched[0].pid) if by_torchrun else [one.pid for one in launched]
    assert len(workers) == count
    os.kill(rng.choice(workers), signal.SIGKILL)
    since = time.monotonic()
    codes = [one.wait(timeout=60) for one in launched]
    text = (tmp_path / "said").read_text()
    assert all(codes) and not any(map(alive, workers)) and time.monotonic() - since < 60, text
    assert text.count("is gone") <= 1 and (by_torchrun or text.count("the run ends") == 1), text
    kept = stored(tmp_path)
    assert kept >= wanted
    again = rng.randrange(1, 5)
    results, _, _ = run((*TORCHRUN, str(again)) if again > 1 else (), tasks, tmp_path, *cache)
    assert all(same(results[name], expected[name]) for name in expected if name != "config")
    print(f"seed {seed}: {'torchrun' if by_torchrun else 'srun'} {count}, {kept} kept, {again}")


def children(process):
    every = (path for path in Path("/proc").iterdir() if path.name.isdecimal())
    parents = {int(path.name): parent(path) for path in every}
    return sorted(child for child, of in parents.items() if of == process)


def parent(path):
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return -1


def alive(process):
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[
            0
        ] != "Z"
    except OSError:
        return False


# -- processes without a model: how they end -------------------------------------------------------

MEMBER = """
import os, signal, sys, time
from yoco_eval import ranks
from yoco_eval.building import Builders
ranks._BEAT, ranks._PATIENCE, ranks._HURRY, ranks._GRACE = 0.1, 1.5, 0.7, 2.0
own = ranks.join()
fault, _, rank = sys.argv[1].partition(":")
assert own.collect(own.rank) == [0, 1, 2] and own.local_rank == own.rank and own.local_size == 3
own.working = True
own.post((own.rank + 1) % 3, [(own.rank, "x" * (5 << 20)), own.rank])
mail = []
while len(mail) < 2:  # they are too large to come together
    mail += own.mail()
assert mail == [((own.rank - 1) % 3, "x" * (5 << 20)), (own.rank - 1) % 3]
assert own.gather("abc"[own.rank]) == (None if own.rank else ["a", "b", "c"])
assert own.scatter(None if own.rank else "xyz") == "xyz"[own.rank]
own.add("done", 1)
def make(unit):
    if fault == "unmade" and unit == int(rank):
        raise ZeroDivisionError("by a process")
    return own.rank, {unit: "abcde"[unit]}
made, texts = Builders(own).build(range(5), make)
assert made == [0, 1, 2, 0, 1] and texts == dict(enumerate("abcde")) and not own.working
own.working = True
if fault and own.rank == int(rank):
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "left":
        sys.exit(0)
    raise ZeroDivisionError("by a process")
while fault and own.rank < 2:  # busy; the last one waits in a collective
    time.sleep(0.1)
    own.check()
own.wait()
own.working = False
"""


def meeting(count):
    """What srun, and who calls it, tell each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_STEP_NUM_TASKS": str(count)}
    return [{**where, "SLURM_PROCID": str(rank)} for rank in range(count)]


def members(fault=""):
    """Three processes, launched as by srun, which end as the fault says: what they said."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    launched = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, fault],
            env=own | place,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in meeting(3)
    ]
    said = [process.communicate(timeout=60)[1] for process in launched]
    return [process.returncode for process in launched], [text for text in said if text.strip()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("", None),
        ("raised:1", "ZeroDivisionError: by a process"),
        ("killed:0", "rank 0 of 3 (process "),
        ("killed:1", "rank 1 of 3 (process "),
        ("left:2", "before the others were done: the run ends"),
        ("unmade:1", "ZeroDivisionError: by a process"),
    ],
)
def test_all_end_where_one_does(fault, message):
    codes, said = members(fault)
    if message is None:
        assert codes == [0, 0, 0] and said == []
        return
    rank = int(fault[-1])
    assert all(code != 0 for other, code in enumerate(codes) if other != rank)
    (text,) = said
    assert message in text
    if "ZeroDivisionError" in message:
        assert text.splitlines()[0] == "yoco-eval: rank 1 of 3 fails, and the run ends:"
    else:
        assert len(text.splitlines()) == 1


@pytest.mark.slow
def test_texts_that_processes_hold_together(tasks, alone, tmp_path):
    """All of them are with both processes; answers, samples and the bar are those of one."""
    expected, _ = alone
    arguments = "dtype=float64,max_length=512,context_parallel=2"
    results, counts, done = run((*TORCHRUN, "2"), tasks, tmp_path, "--model_args", arguments)
    for name in expected.keys() - {"config", "configs"}:  # which have the argument
        assert same(results[name], expected[name]), name
    assert len(counts) == 2 and counts[0] == counts[1]
    assert done.stderr.count("yoco loglikelihood_rolling: 0") == 1
