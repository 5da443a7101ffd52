"""Documents dealt to several processes: prompts, responses and order are those of one."""

import pytest
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from yoco_eval.dealing import deal, each_task, put_together

DOCUMENTS = [{"text": f"question {i}", "answer": f"answer {i}"} for i in range(7)]


def task(**config):
    data = {"test": Dataset.from_list(DOCUMENTS)}
    made = ConfigurableTask(
        config={
            "task": "made",
            "custom_dataset": lambda **_: data,
            "test_split": "test",
            "fewshot_split": "test",
            "num_fewshot": 2,
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "output_type": "loglikelihood",
            **config,
        }
    )
    made.set_fewshot_seed(5)
    return made


def requests(made, rank, size, **options):
    made.build_all_requests(rank=rank, world_size=size, **options)
    return [(instance.doc_id, instance.args) for instance in made.instances]


@pytest.mark.parametrize("options", [{}, {"limit": 5}, {"samples": [6, 1, 3, 4]}])
@pytest.mark.parametrize("size", [2, 3])
def test_examples_are_those_of_one_process(size, options):
    expected = requests(task(), 0, 1, **options)
    assert len({args[0].count("question") for _, args in expected}) == 1
    dealt = []
    for rank in range(size):
        made = task()
        sampler = made.sampler
        for _ in range(2):
            deal(made)
        dealt += requests(made, rank, size, **options)
        assert made.sampler is sampler
    assert sorted(dealt) == sorted(expected)
    undealt = [one for rank in range(size) for one in requests(task(), rank, size, **options)]
    assert sorted(undealt) != sorted(expected)  # what there is to mend


def test_a_process_without_a_document_asks_what_another_one_asks():
    expected = requests(task(), 0, 1, limit=2)
    for rank in range(5):
        made = task()
        deal(made)
        assert requests(made, rank, 5, limit=2) == [expected[rank % 2]]
        assert len(list(made.doc_iterator(rank=rank, world_size=5, limit=2))) == (rank < 2)


def test_tasks_in_groups_are_found():
    tasks = {"tasks": {"a": 1}, "groups": {"g": {"b": 2}, "c": 3}}
    assert list(each_task(tasks)) == [("a", 1), ("b", 2), ("c", 3)]
    deal(type("Group", (), {})())


def sample(document, kind="none"):
    return {"doc_id": document, "filter": kind}


def test_samples_and_metrics_are_in_the_order_of_documents():
    kinds = ("strict", "flexible")
    parts = [
        {"a": [sample(i, kind) for kind in kinds for i in range(rank, 7, 3)], "b": [sample(rank)]}
        for rank in range(3)
    ]
    parts[2]["b"] = []
    assert put_together(parts) == {
        "a": [sample(i, kind) for kind in kinds for i in range(7)],
        "b": [sample(0), sample(1)],
    }
    metrics = [
        {
            "a": {
                ("acc", "strict"): list(range(rank, 7, 3)),
                ("acc", "flexible"): list(range(10 + rank, 17, 3)),
            }
        }
        for rank in range(3)
    ]
    metrics[1]["b"], metrics[0]["b"], metrics[2]["b"] = {}, {("acc", "none"): [1]}, {}
    assert put_together(metrics) == {
        "a": {("acc", "strict"): list(range(7)), ("acc", "flexible"): list(range(10, 17))},
        "b": {("acc", "none"): [1]},
    }
    assert put_together([1, 2]) == [1, 2]
