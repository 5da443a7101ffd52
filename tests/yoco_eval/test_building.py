"""Prompts that the processes of a machine make together, played by threads: each is made once, and
tasks are those of one process. `test_ranks.py` has processes."""

import threading
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

import yoco_eval.tasks
from yoco_eval import building, registration
from yoco_eval.building import Builders


class Seat:
    """What `ranks.Ranks` is to a process. Its methods meet those of the others."""

    working = False

    def __init__(self, rank, machines, meeting, things):
        self.rank, self.size, self.meeting, self.things = rank, len(machines), meeting, things
        self.neighbours = [other for other, on in enumerate(machines) if on == machines[rank]]

    def collect(self, own):
        self.things[self.rank] = own
        self.meeting.wait()
        everyones = list(self.things)
        self.meeting.wait()
        return everyones


def play(machines, part):
    """Runs a part with the `Builders` of each process, and gives what it returned or raised.

    Args:
        machines: of each process, the one that it is on.
    """
    meeting, things = threading.Barrier(len(machines)), [None] * len(machines)
    results = [None] * len(machines)

    def run(rank):
        try:
            results[rank] = part(Builders(Seat(rank, machines, meeting, things)))
        except Exception as error:
            results[rank] = error
            meeting.abort()

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(len(machines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where the files of all processes are for a moment."""
    monkeypatch.setattr(building.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("machines", "times"), [("aaa", 1), ("aabab", 2), ("a", 1), ("ab", 2), ("aaaaaaaaa", 1)]
)
def test_each_unit_is_made_once_on_each_machine(machines, times, temporary):
    made = []

    def part(own):
        def make(unit):
            assert own.busy and own._ranks.working
            made.append(unit)
            return {"unit": unit}, {(unit, n): unit * 100_000 + "\ud800" for n in range(2)}

        found = [own.build(list(units), make) for units in ("abcdefg", "hi", "")]
        assert not own.busy and not own._ranks.working
        # The same everywhere: tasks that build as many at a time do so as often on all machines.
        assert own.count == max(map(machines.count, machines))
        return [(documents, dict(texts)) for documents, texts in found]

    for found in play(machines, part):
        for units, (documents, texts) in zip(("abcdefg", "hi", ""), found, strict=True):
            assert documents == [{"unit": unit} for unit in units]
            assert texts == {
                (unit, n): unit * 100_000 + "\ud800" for unit in units for n in range(2)
            }
    assert sorted(made) == sorted("abcdefghi" * times)
    assert not list(temporary.iterdir())


def test_all_learn_of_the_first_that_cannot_be_made(temporary):
    """And the next ones can be."""

    def part(own):
        def make(unit):
            if unit in (5, 3):
                raise ValueError(f"{unit} is too short")
            return unit, {unit: "text"}

        with pytest.raises(ValueError, match="^3 is too short$"):
            own.build(range(8), make)
        documents, texts = own.build([7, 9, 8], make)
        return documents, dict(texts)

    assert play("aaa", part) == [([7, 9, 8], dict.fromkeys([7, 8, 9], "text"))] * 3


def test_each_makes_all_where_not_all_see_the_folder(temporary, monkeypatch):
    def open_unless_second(path, *args):
        if Path(path).name == "1":
            raise FileNotFoundError
        return open(path, *args)

    monkeypatch.setattr(building, "open", open_unless_second, raising=False)
    made = []

    def part(own):
        documents, texts = own.build("abc", lambda unit: (made.append(unit), {unit: unit}))
        return len(documents), dict(texts), own.count

    assert play("aab", part) == [(3, {unit: unit for unit in "abc"}, 1)] * 3
    assert sorted(made) == sorted("abc" * 3) and not list(temporary.iterdir())


def test_no_room_is_told_in_one_line(monkeypatch):
    def part(own):
        def make(unit):
            monkeypatch.setattr(own._files[0], "write", fail, raising=False)
            return unit, {unit: "text"}

        own.build("a", make)

    def fail(data):
        raise OSError(28, "No space left on device")

    class File:
        def __init__(self):
            self.tell = self.flush = lambda: 0

    monkeypatch.setattr(building.tempfile, "TemporaryFile", File)
    [error] = play("a", part)
    assert isinstance(error, ValueError) and "\n" not in str(error)
    assert "(No space left on device); set TMPDIR to a folder with more room" in str(error)


class Model:
    """The evaluated one, as a thread sees it."""

    local = threading.local()

    @property
    def builders(self):
        return self.local.builders


SETTINGS = {"context_lengths": [600, 1024], "samples": 3, "depths": 2, "pretrained": "demo-1m"}


@pytest.mark.parametrize("name", ["yoco_needle", "yoco_mrcr_synthetic_2"])
def test_tasks_are_those_of_one_process(name, monkeypatch):
    """Documents, prompts and their digests, also where prompts are made again for a chat."""
    folder = Path(yoco_eval.tasks.__file__).parent
    manager = TaskManager(include_path=folder, include_defaults=False, metadata=SETTINGS)

    def requests(rank, size):
        task = manager.load([name])["tasks"][name]
        before = [task.doc_to_text(doc) for doc in task.eval_docs]
        task.build_all_requests(rank=rank, world_size=size, system_instruction="Be brief.")
        prompts = {instance.doc_id: instance.args for instance in task.instances}
        texts = [task.doc_to_text(doc) for doc in task.eval_docs]
        return prompts, list(task.eval_docs), before, texts, task.config.metadata.get("prompts")

    expected, *everywhere = requests(0, 1)
    monkeypatch.setattr(registration, "evaluated", [Model()])

    def part(own):
        Model.local.builders = own
        return requests(own._ranks.rank, own._ranks.size)

    found = play("aa", part)
    together = {}
    for prompts, *same in found:
        assert same == everywhere and len(prompts) == len(expected) // 2
        together |= prompts
    assert together == expected and (everywhere[-1] is None) == (name == "yoco_needle")
