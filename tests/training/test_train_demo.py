"""The demo's training script, on a tiny recipe on the CPU."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from yoco_eval.model import Yoco, load
from yoco_eval.tasks.haystack import SyntheticHaystack
from yoco_eval.tasks.wording import (
    PASSKEY_FILLER,
    PASSKEY_INTRODUCTION,
    PASSKEY_NEEDLE,
    PASSKEY_QUESTION,
)

pytestmark = pytest.mark.slow  # models are trained


@pytest.fixture(scope="module")
def script():
    import train_demo  # pytest's path holds its folder, see pyproject.toml

    return train_demo


@pytest.fixture(scope="module")
def recipe(script):
    return script.Recipe(
        vocab_size=1024,
        dim=128,
        n_layers=4,
        hidden_dim=128,
        haystack_characters=200_000,
        tokens_per_step=1024,
        needles=2,
        shortest=256,
        stages=(script.Stage("short", 256, 1e4, 25, 3e-3), script.Stage("long", 512, 2e4, 2, 1e-3)),
    )


@pytest.fixture(scope="module")
def trained(script, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return script.train(recipe, out, "cpu"), out


def test_the_loss_falls(trained):
    losses, _ = trained
    assert [len(losses["short"]), len(losses["long"])] == [25, 2]
    # From guessing among 1024 tokens to guessing among ten digits.
    assert losses["short"][0] > 6 and np.mean(losses["short"][-5:]) < 4.5


def test_every_stage_is_a_checkpoint(trained):
    _, out = trained
    for name, context, theta in (("short", 256, 1e4), ("long", 512, 2e4)):
        config = load(out / name, device="cpu").config
        assert (config.max_position_embeddings, config.rope_theta) == (context, theta)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        assert tokenizer.model_max_length == context and len(tokenizer) <= config.vocab_size


def test_the_same_seed_trains_the_same(script, recipe, trained, tmp_path):
    losses, _ = trained
    short = script.Recipe(**{**vars(recipe), "stages": recipe.stages[:1]})
    again = script.train(short, tmp_path, "cpu")
    assert again["short"] == pytest.approx(losses["short"], rel=1e-3)


def test_examples_are_what_the_tokenizer_makes_of_their_text(script, recipe):
    text = SyntheticHaystack("test").text(0, recipe.haystack_characters)
    tokenizer = script.train_tokenizer(text, recipe.vocab_size)
    examples = script.Examples(recipe, tokenizer, text)
    for _ in range(20):
        ids, answers = examples.example(400)
        assert len(ids) == len(answers) == 400
        written = tokenizer.decode(ids).removeprefix("<s>")
        assert tokenizer(written).input_ids == list(ids)
        asked = written.split("\n\nQuestion: ")[1:]
        wanted = tokenizer.decode(ids[answers])
        for question, answer in zip(asked, wanted.split("."), strict=False):
            city = question.split("?")[0].rsplit(" ", 1)[1]
            number = answer.strip()
            needle = f"The special number of {city} is {number}."
            before, _, after = written.split("\n\nQuestion: ")[0].partition(needle)
            assert before[-1] in " \n" and after[0] in " \n"
            assert question.strip().endswith(f"is {number}.")
        assert not answers[: -examples.tail].any()


def test_passkey_examples_are_what_the_tokenizer_makes_of_their_text(script, recipe):
    text = SyntheticHaystack("test").text(0, recipe.haystack_characters)
    tokenizer = script.train_tokenizer(text, recipe.vocab_size)
    examples = script.Examples(recipe, tokenizer, text)
    places = set()
    for _ in range(40):
        ids, answers = examples.passkey_example(400)
        assert len(ids) == len(answers) == 400
        written = tokenizer.decode(ids).removeprefix("<s>")
        encoded = tokenizer(written).input_ids
        # Where the filler is cut within a word, its pieces may be other ones.
        assert encoded[: 400 - 60] == list(ids[: 400 - 60])
        number = tokenizer.decode(ids[answers]).strip(" .\n")
        needle = PASSKEY_NEEDLE.format(number=number)
        assert written.count(needle) == 1
        assert written.startswith(PASSKEY_INTRODUCTION)
        assert written.endswith(f"{PASSKEY_QUESTION} {number}.\n")
        body = written.removeprefix(PASSKEY_INTRODUCTION).partition(PASSKEY_QUESTION)[0]
        filler = " ".join(body.replace(needle, "").split())
        assert f"{PASSKEY_FILLER} {PASSKEY_FILLER} {PASSKEY_FILLER}".startswith(filler[:200])
        places.add(body.index(needle))
    assert len(places) > 8


def test_a_killed_run_goes_on(script, recipe, trained, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(model, *arguments):
        killing.pop() if killing else None
        if not killing:
            raise Killed
        return answer_loss(model, *arguments)

    answer_loss, killing = script.answer_loss, [None] * 15
    monkeypatch.setattr(script, "SAVE_EVERY", 10)
    monkeypatch.setattr(script, "answer_loss", kill)
    with pytest.raises(Killed):
        script.train(recipe, tmp_path, "cpu")
    monkeypatch.setattr(script, "answer_loss", answer_loss)
    losses = script.train(recipe, tmp_path, "cpu")
    assert losses["short"] == pytest.approx(trained[0]["short"], rel=1e-3)
    assert losses["long"] == pytest.approx(trained[0]["long"], rel=1e-2)
    with pytest.raises(ValueError, match="another recipe"):
        script.train(script.Recipe(**{**vars(recipe), "seed": 2}), tmp_path, "cpu")


def test_recomputed_activations_give_the_same_gradients(script, recipe):
    torch.manual_seed(0)
    model = Yoco(recipe.config())
    ids = torch.randint(recipe.vocab_size, (2, 300))
    answers = torch.zeros(2, 300, dtype=torch.bool)
    answers[:, -5:] = True

    def gradients():
        model.zero_grad()
        script.answer_loss(model, ids, answers, 20)[0].backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    kept = gradients()
    script._recompute_activations(model)
    for a, b in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(a, b)
