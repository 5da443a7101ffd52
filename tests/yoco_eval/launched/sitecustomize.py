"""Python imports this first where it finds it: tests put it before processes that they launch.

lm-eval then reads this project's tasks alone, not its own thousands of files, and does not ask pip
what is installed, which takes it seconds. Where processes are several (`test_ranks.py`), the tokens
that one feeds and the haystacks that it makes are counted, and written where COUNTS says; and
generation is slowed down by SLOW seconds an answer, so that there is time to end it.
"""

import atexit
import json
import os
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path


def be_quick():
    from lm_eval.tasks import _index
    from torch.utils import collect_env

    collect_env.get_pip_packages = lambda *_: ("pip", "")

    built_in = Path(_index.__file__).parent
    ours = Path(find_spec("yoco_eval.tasks").submodule_search_locations[0])
    build = _index.TaskIndex.build

    def build_few(paths, *args, **options):
        return build([ours if path == built_in else path for path in paths], *args, **options)

    _index.TaskIndex.build = staticmethod(build_few)


def count(folder):
    from yoco_eval.engine import Engine
    from yoco_eval.model import Yoco
    from yoco_eval.tasks import prompts

    fed, kind = Counter(), [""]

    def counting(feed):
        def feed_counted(model, ids, *args, **options):
            fed[kind[0]] += len(ids)
            return feed(model, ids, *args, **options)

        return feed_counted

    def naming(method):
        def run(engine, requests, begin, progress):
            kind[0] = method.__name__
            for answer in method(engine, requests, begin, progress):
                yield answer
                time.sleep(float(os.environ.get("SLOW", 0)))

        return run

    class Notes(prompts.Notes):
        def __init__(self, *args, **options):
            fed["haystacks"] += 1
            super().__init__(*args, **options)

    prompts.Notes = Notes
    Yoco.prefill, Yoco.feed = counting(Yoco.prefill), counting(Yoco.feed)
    Engine.generate, Engine.score = naming(Engine.generate), naming(Engine.score)
    rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
    file = Path(folder, f"{rank}.json")
    atexit.register(lambda: file.write_text(json.dumps(fed)))


if {"RANK", "SLURM_PROCID", "ALONE"} & set(os.environ):  # not in a launcher's own process
    be_quick()
    if "COUNTS" in os.environ:
        count(os.environ["COUNTS"])
