"""yoco_long: what is chosen for a time, what is said of it, and that samples stay the same."""

import itertools
import re

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import yoco_eval.tasks
from yoco_eval import registration
from yoco_eval.lm import YocoLM
from yoco_eval.model import save
from yoco_eval.tasks import budget, speed
from yoco_eval.tasks.budget import DOCUMENTS, MOST, choose, fitted, transformer_work
from yoco_eval.tasks.documents import local
from yoco_eval.tasks.evaluated_model import load_tokenizer

LENGTHS = [4096 << i for i in range(9)]
NEEDLES = ["yoco_needle", "yoco_multi_needle_4", "yoco_passkey"]
MEMBERS = [*NEEDLES, "yoco_mrcr_synthetic_4", "yoco_long_loss_local"]


@pytest.fixture
def library(tmp_path):
    """A file of some thousand tokens, and one that goes before it."""
    (tmp_path / "b.txt").write_text("".join(f"Line {i} of many.\n" for i in range(3000)))
    (tmp_path / "a.md").write_text("Begin here.\n")
    return str(tmp_path)


@pytest.mark.parametrize("fixed", [0, 3.5])
@pytest.mark.parametrize("slope", [0, 0.25])
def test_what_was_measured_is_carried_on(fixed, slope):
    work = transformer_work(64)
    if fixed or slope:
        seconds = {n: fixed + slope * work(n) for n in (1024, 2048, 4096)}
        found = fitted(seconds, lambda n: 1, work)
        assert found(65536) == pytest.approx(fixed + slope * work(65536))


def test_what_cannot_be_is_not_carried_on():
    """Times that fall with the length, or grow faster than the work, are noise."""
    flat = fitted({1024: 3.0, 2048: 2.0}, lambda n: 1, float)
    assert 2 < flat(1024) == flat(1 << 20) < 3
    steep = fitted({1024: 1.0, 2048: 3.0}, lambda n: 1, float)
    assert steep(1 << 20) == pytest.approx(1024 * steep(1024))
    assert fitted({1024: 2.0}, lambda n: 1, float)(4096) == pytest.approx(8)


@pytest.mark.parametrize("seconds", [100, 300, 1800, 1e6])
@pytest.mark.parametrize("power", [1, 2])
def test_what_is_chosen_fits(seconds, power):
    sweeps = {n: 4 * (n / 4096) ** power for n in LENGTHS}
    losses = {n: (n / 4096) ** 2 for n in LENGTHS}
    plan = choose(sweeps, losses, seconds)
    chosen, counts = list(plan.samples), list(plan.samples.values())
    assert plan.total <= seconds
    assert chosen == LENGTHS[: len(chosen)]
    assert counts == sorted(counts, reverse=True)
    assert 2 <= min(counts) <= max(counts) <= MOST
    # Neither a longer length would have fitted, nor one sample more.
    left = seconds - plan.total
    assert max(counts) == MOST or left < sweeps[4096]
    if len(chosen) < len(LENGTHS):
        without_losses = seconds - plan.documents * plan.loss_seconds
        assert 2 * sum(sweeps[n] for n in LENGTHS[: len(chosen) + 1]) > without_losses
    assert 2 <= plan.documents <= DOCUMENTS
    assert plan.documents * losses[plan.loss_lengths[-1]] <= seconds / 4


def test_a_time_that_is_too_short():
    with pytest.raises(ValueError, match="^8 s$"):
        choose({4096: 4.0, 8192: 8.0}, {}, 7)
    plan = choose({4096: 4.0, 8192: 8.0}, {4096: 50.0}, 10)
    assert (plan.samples, plan.documents, plan.loss_lengths) == ({4096: 2}, 0, [])


def load(name, **metadata):
    (folder,) = yoco_eval.tasks.__path__
    named = {"pretrained": "demo-1m", **metadata}
    manager = TaskManager(include_path=folder, include_defaults=False, metadata=named)
    return manager.load([name])["tasks"]


def prompts(tasks):
    """What is asked, by task, context length, depth and sample."""
    asked = {}
    for name, task in tasks.items():
        task.build_all_requests()
        for request in task.instances:
            doc = request.doc
            place = doc.get("context_length", request.idx), doc.get("depth")
            sample = doc.get("sample", doc.get("document"))
            text = request.args[:2] if "document" in doc else request.args[0]
            asked[(name, *place, sample)] = text
    return asked


def test_samples_are_the_same_whatever_there_is_beside_them(library):
    one = prompts(load("yoco_long", context_lengths=[1024, 2048], samples=1, data=library))
    more = prompts(load("yoco_long", context_lengths=[1024, 2048, 4096], samples=2, data=library))
    assert {key[0] for key in one} == set(MEMBERS)
    assert len(one) == 2 * 16 + 2
    assert len(more) == 3 * 2 * 16 + 3 * 2
    assert one == {key: more[key] for key in one}
    assert len(set(more.values())) == len(more)


@pytest.mark.parametrize("name", [*NEEDLES[:1], "yoco_mrcr_synthetic_4"])
def test_samples_by_context_length(name):
    settings = {"context_lengths": ["1k", "2k"], "needles": 4}
    if name == "yoco_needle":
        settings = {"context_lengths": ["1k", "2k"], "depths": 2}
    few = prompts(load(name, **settings, samples={"1k": 2, "2048": 1}))
    all_ = prompts(load(name, **settings, samples=2))
    assert few == {k: v for k, v in all_.items() if k[1] == 1024 or k[3] == 0}
    with pytest.raises(ValueError, match="no number for the context length 2048"):
        load(name, **settings, samples={"1k": 2})
    with pytest.raises(ValueError, match="samples: 'x' is not a length"):
        load(name, **settings, samples={"x": 2})
    with pytest.raises(ValueError, match="samples: 0 is below 1"):
        load(name, **settings, samples={"1k": 0})
    with pytest.raises(ValueError, match="samples: 1024 has two numbers; give one"):
        load(name, **settings, samples={"1k": 2, "1024": 2, "2k": 1})


def test_local_texts(library, tmp_path):
    first, second, third = itertools.islice(local("", library, 0), 3)
    assert first[1].startswith("Begin here.\n\nLine 0 of many.\nLine 1 ")
    starts = [int(re.match(r"Line (\d+) of", text)[1]) for _, text in (second, third)]
    assert starts == [pytest.approx(1500, abs=60), pytest.approx(750, abs=60)]
    assert {len(text) for _, text in (first, second, third)} == {len(first[1])}
    assert len(next(local("", None, 0))[1]) > 1_000_000  # Python's library
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="data: .*none holds no texts"):
        next(local("", str(tmp_path / "none"), 0))


class Watch:
    """Takes the place of the module `time`: tells what the model has spent."""

    seconds = 0.0

    def monotonic(self):
        return self.seconds


class Timed(LM):
    """Takes a time for each prompt that goes by its length, the first time a while longer."""

    tokenizer_name = "timed"

    def __init__(self, watch, speed):
        super().__init__()
        self.watch, self.speed, self.asked = watch, speed, []
        watch.seconds += 20

    def _spend(self, requests, power):
        for request in requests:
            tokens = len("".join(request.args[:2] if power > 1 else request.args[:1])) / 3.5
            self.watch.seconds += (0.02 + tokens / self.speed) * (tokens / 4096) ** (power - 1)
        self.watch.seconds += 0 if self.asked else 3
        self.asked.append(len(requests))

    def generate_until(self, requests):
        self._spend(requests, 1)
        return ["It is 12345."] * len(requests)

    def loglikelihood(self, requests):
        self._spend(requests, 2)
        return [(-1.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "".join(f"<{turn['role']}>{turn['content']}\n" for turn in chat_history) + "<a>"

    def chat_template(self, chat_template=False):
        return "timed's"


@pytest.fixture
def watch(monkeypatch):
    found = Watch()
    monkeypatch.setattr(speed, "time", found)
    monkeypatch.setattr(registration, "time", found)
    return found


def evaluate(model, tasks=("yoco_long",), **options):
    metadata = {"pretrained": "demo-1m", **options.pop("metadata")}
    (folder,) = yoco_eval.tasks.__path__
    manager = TaskManager(include_path=folder, include_defaults=False, metadata=metadata)
    return simple_evaluate(model, tasks=[*tasks], task_manager=manager, **options)


@pytest.mark.parametrize("chat", [False, True])
def test_a_run_takes_the_time_that_it_is_given(watch, library, capsys, chat):
    """Measured as it goes, of a model whose speed nobody knows."""
    minutes = 2
    model = Timed(watch, speed=5000)
    results = evaluate(
        model,
        metadata={"minutes": minutes, "data": library, "context_lengths": ["1k", "2k", "4k", "8k"]},
        apply_chat_template=chat,
    )
    # `began` is when the evaluation began: loading the model comes before it, from Python.
    assert 0.75 * 60 * minutes < watch.seconds - 20 < 60 * minutes
    configs = results["configs"]
    assert sorted(configs) == sorted(MEMBERS)
    samples = configs["yoco_needle"]["metadata"]["samples"]
    assert [*samples.values()] == sorted(samples.values(), reverse=True)
    assert all(configs[name]["metadata"]["samples"] == samples for name in MEMBERS[:4])
    assert all(one["metadata"]["minutes"] == minutes for one in configs.values())
    said = capsys.readouterr().err
    for length, count in samples.items():
        assert re.search(rf"^ +{length // 1024}K +{count} +{16 * count} +\d+\.\d\d$", said, re.M)
    assert re.search(r"^Of 2 minutes 0\.\d have passed; this should take 1\.\d more\.$", said, re.M)
    assert max(len(line) for line in said.split("yoco_long asks")[1].splitlines()[:12]) <= 80


def test_lengths_that_take_too_long_are_left_out(watch, library, capsys):
    metadata = {"data": library, "context_lengths": ["1k", "2k", "4k"]}
    with pytest.raises(ValueError, match=r"minutes: 0\.5 are too few: 1\.\d have passed.*1K take"):
        evaluate(Timed(watch, speed=500), metadata={**metadata, "minutes": 0.5})
    results = evaluate(Timed(watch, speed=500), metadata={**metadata, "minutes": 4})
    assert results["configs"]["yoco_needle"]["metadata"]["context_lengths"] == [1024]
    assert "Left out, as they take too long: 2K, 4K." in capsys.readouterr().err


def test_what_cannot_be_timed_is_refused(watch, library, monkeypatch):
    with pytest.raises(ValueError, match="not known where tasks are loaded before"):
        load("yoco_long")
    with pytest.raises(ValueError, match="minutes: 0 is no time"):
        load("yoco_long", minutes=0)
    model = Timed(watch, speed=5000)
    model._world_size = 2
    with pytest.raises(ValueError, match="several processes of this backend"):
        evaluate(model, metadata={"data": library})


@pytest.mark.parametrize("backend", ["yoco", "hf"])
def test_both_backends(backend, watch, library, small_model, hf_model, tmp_path, monkeypatch):
    """The clock goes on whenever it is read: as much is chosen as there may be."""
    monkeypatch.setattr(budget, "MOST", 3)
    watch.monotonic = itertools.count().__next__
    named = hf_model
    if backend == "yoco":
        save(small_model, named := str(tmp_path / "model"))
        load_tokenizer({"pretrained": "demo-1m"}).save_pretrained(named)
        model = YocoLM(pretrained=named, device="cpu", max_length=2048, batch_size=16)
    else:
        model = HFLM(pretrained=named, device="cpu", max_length=2048, batch_size=16)
    metadata = {"pretrained": named, "data": library, "minutes": 10}
    results = evaluate(model, metadata=metadata, gen_kwargs="max_gen_toks=4")
    for name in MEMBERS[:4]:
        assert results["configs"][name]["metadata"]["samples"] == {1024: 3, 2048: 3}
        assert results["n-samples"][name]["effective"] == 3 * 2 * (1 if "mrcr" in name else 5)
    losses = results["results"]["yoco_long_loss_local"]
    assert 0 < losses["loss@0002048,none"] < 20
