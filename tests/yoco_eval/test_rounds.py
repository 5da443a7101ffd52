"""Rounds of processes, played by threads: whoever asks gets all answers, once, in any order."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest

from yoco_eval import rounds
from yoco_eval.rounds import Ask, Generate, Note, Rounds
from yoco_eval.sampling import Sampling


class Table:
    """Where the threads meet; `seat(rank)` is what `ranks.Ranks` is to a process."""

    def __init__(self, size):
        self.size, self.meeting = size, threading.Barrier(size)
        self.things, self.mails = [None] * size, [[] for _ in range(size)]
        self.counts, self.lock = {}, threading.Lock()

    def seat(self, rank):
        return Seat(self, rank)


class Seat:
    working = False

    def __init__(self, table, rank):
        self.table, self.rank, self.size = table, rank, table.size

    def gather(self, own):
        self.table.things[self.rank] = own
        self.table.meeting.wait()
        everyones = list(self.table.things) if self.rank == 0 else None
        self.table.meeting.wait()
        return everyones

    def scatter(self, each):
        if self.rank == 0:
            self.table.things = list(each)
        self.table.meeting.wait()
        own = self.table.things[self.rank]
        self.table.meeting.wait()
        return own

    def post(self, rank, things):
        with self.table.lock:
            self.table.mails[rank] += things

    def mail(self):
        with self.table.lock:
            things, self.table.mails[self.rank] = self.table.mails[self.rank], []
        return things

    def add(self, name, number):
        with self.table.lock:
            self.table.counts[name] = self.table.counts.get(name, 0) + number
            return self.table.counts[name]

    def check(self):
        if self.table.meeting.broken:
            raise rounds.Lost


class Linear:
    def prefill_operations(self, length):
        return 7 * length


class Bar:
    total = n = 0

    def update(self, count):
        self.n += count


def play(*parts, together=1):
    """Runs a part for each process, which gets its `Rounds`.

    Returns what each part returned, requests as they were answered, warnings, and the bar.
    """
    table, answered, warnings, bars = Table(len(parts)), [], [], []
    results = [None] * len(parts)

    def answer(rank):
        def answer(kind, asks, begin, progress):
            begin(sum(len(ask.ids) for ask in asks) + 5)
            for index, ask in enumerate(asks):
                answered.append((rank, kind, ask))
                progress(len(ask.ids), 5 * (index == 0))
                yield index, (kind, ask.key)

        return answer

    @contextmanager
    def bar(kind):
        bars.append(Bar())
        yield bars[-1]

    def run(rank, part):
        seat = table.seat(rank)
        own = Rounds(seat, Linear(), answer(rank), bar, warnings.append, together)
        try:
            results[rank] = part(own)
        except BaseException as error:
            results[rank] = error
            table.meeting.abort()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results, answered, warnings, bars


def asks(*texts, generate=None):
    return [Ask(np.array(text, dtype=np.int32), len(text) - 1, generate) for text in texts]


def ask(own, kind, wanted):
    """Asks, and checks the answers; at the barrier, then."""
    found = {}
    own.ask(kind, wanted, lambda index, answer: found.setdefault(index, []).append(answer))
    assert found == {i: [(kind, one.key)] for i, one in enumerate(wanted)}
    own.barrier()
    return len(found)


def test_each_has_its_own_answers_and_equal_requests_are_answered_once():
    shared = list(range(100))
    results, answered, _, bars = play(
        lambda own: ask(own, "a", asks([*shared, 1], [*shared, 2], [5, 6], [5, 6])),
        lambda own: ask(own, "a", asks([*shared, 3], [5, 6])),
        lambda own: ask(own, "a", asks([*shared, 2], [7, 7, 7])),
    )
    assert results == [4, 2, 2]
    keys = [request.key for _, _, request in answered]
    assert len(keys) == len(set(keys)) == 5
    # The prompts that share a text are with one process.
    assert len({rank for rank, _, request in answered if len(request.ids) > 100}) == 1
    assert max(bar.total for bar in bars) == sum(len(request.ids) for _, _, request in answered)
    assert max(bar.n for bar in bars) == max(bar.total for bar in bars)


def test_processes_that_answer_together():
    """Each request is with all of one group, and answered and counted once."""
    texts = [asks(*([10 * rank + i] * 50 for i in range(3))) for rank in range(4)]
    parts = [lambda own, rank=rank: ask(own, "a", texts[rank]) for rank in range(4)]
    results, answered, _, bars = play(*parts, together=2)
    assert results == [3] * 4
    for first, second in ((0, 1), (2, 3)):
        keys = [[one.key for who, _, one in answered if who == rank] for rank in (first, second)]
        assert keys[0] == keys[1] and len(keys[0]) == 6
    assert max(bar.total for bar in bars) == max(bar.n for bar in bars) == 12 * 50


def test_who_has_nothing_to_ask_takes_part_from_the_barrier():
    texts = asks(*([i] * 50 for i in range(12)))

    def without(own):
        own.barrier()
        return ask(own, "b", asks([1, 2]))

    def both(own):
        return ask(own, "a", texts) + ask(own, "b", [])

    results, answered, _, _ = play(without, both, without)
    assert results == [1, 12, 1]
    assert {rank for rank, kind, _ in answered if kind == "a"} == {0, 1, 2}


def test_kinds_in_another_order():
    one, two = asks([1, 2, 3], [1, 2, 4]), asks([9, 8, 7])

    def first(own):
        return ask(own, "a", one), ask(own, "b", two)

    def second(own):
        return ask(own, "b", two), ask(own, "a", one)

    results, answered, _, _ = play(first, second, lambda own: [own.barrier() for _ in range(2)][:0])
    assert results == [(2, 1), (1, 2), []]


def test_how_an_answer_is_generated_tells_requests_apart():
    how = [Generate(5, ("\n",), Sampling(1.0, seed=seed)) for seed in (1, 2)]
    mine, others = asks([1, 2], generate=how[0]), asks([1, 2], generate=how[1])
    results, answered, _, _ = play(
        lambda own: ask(own, "g", mine + mine), lambda own: ask(own, "g", others + mine)
    )
    assert results == [2, 2]
    assert {request.generate for _, _, request in answered} == set(how) and len(answered) == 2


def test_warnings_are_united():
    def part(cut, total, most):
        def warned(own):
            own.note(Note("{count} of {total} were cut by {most}", cut, total, most))
            own.note(Note("{count} of {total} are empty", 0, total))
            own.barrier()

        return warned

    _, _, warnings, _ = play(part(1, 10, 30), part(0, 9, 0), part(2, 9, 50))
    assert warnings == ["3 of 28 were cut by 50"]


def test_answers_that_are_known_are_handed_over_where_a_process_fails(monkeypatch):
    monkeypatch.setattr(rounds, "_EVERY", 0.0)
    texts = asks(*([i] * 50 for i in range(20)))
    known = {}

    def failing(own):
        seen = []

        def take(index, answer):
            seen.append(index)
            if len(seen) == 3:
                raise ZeroDivisionError

        own.ask("a", texts[:10], take)

    def patient(own):
        own.ask("a", texts[10:], known.__setitem__)

    results, answered, _, _ = play(failing, patient)
    assert isinstance(results[0], ZeroDivisionError)
    assert isinstance(results[1], rounds.Lost | threading.BrokenBarrierError)
    done = {request.key for rank, _, request in answered}
    assert all(answer == ("a", texts[10 + i].key) for i, answer in known.items())
    assert {texts[10 + i].key for i in known} <= done


@pytest.mark.parametrize("count", [0, 1, 3])
def test_requests_are_packed(count):
    how = Generate(5, ("\n",), Sampling())
    some = asks(*([i] * (i + 1) for i in range(count)), generate=how)
    back = rounds._Packed.of(some).asks()
    assert [one.key for one in back] == [one.key for one in some]
    assert all(one.ids.dtype == np.int32 for one in back)


@pytest.mark.parametrize("count", [2, 7])
def test_a_question_is_answered_by_one_process(count, monkeypatch):
    """And divided as one; but not where its answers are so many, or so long, that they are work to
    divide."""
    forest, divided = rounds.forest, []
    monkeypatch.setattr(
        rounds, "forest", lambda asks, costs: divided.extend(asks) or forest(asks, costs)
    )
    random = np.random.default_rng(0)

    def ids(length):
        return random.integers(1000, size=length, dtype=np.int32)

    asks, questions = [], []
    for question in range(64 * count):
        answers, length = (50, 2) if question == 3 else (4, 90) if question == 4 else (4, 3)
        context = ids(30)
        questions.append(range(len(asks), len(asks) + answers))
        asks += [Ask(np.concatenate((context, ids(length))), 30) for _ in range(answers)]
    order = random.permutation(len(asks)).tolist()
    shares = rounds.divided([asks[i] for i in order], Linear(), count)
    owner = {order[i]: rank for rank, share in enumerate(shares) for i in share}
    assert sorted(owner) == list(range(len(asks))) and sum(map(len, shares)) == len(asks)
    assert len(divided) == 64 * count - 2 + -(-50 // 16) + 4
    several = [n for n, own in enumerate(questions) if len({owner[i] for i in own}) > 1]
    assert set(several) <= {3, 4}
    loads = [0.0] * count
    for own in questions:
        for rank in {owner[i] for i in own}:
            loads[rank] += 30
        for i in own:
            loads[owner[i]] += len(asks[i].ids) - 31 + asks[i].cost
    assert max(loads) < 1.03 * sum(loads) / count


def test_few_questions_are_divided_answer_by_answer():
    context = np.arange(20, dtype=np.int32)
    asks = [Ask(np.append(context, [i, i]).astype(np.int32), 20) for i in range(8)]
    assert sorted(map(len, rounds.divided(asks, Linear(), 2))) == [4, 4]
