"""What a model predicts of texts that it was fed, or that it decodes."""

import torch

from yoco_eval.model import Span, Spans


def predictions(model, x, cache):
    """Logits [T, vocab_size] of the last T tokens of the cache's only text, whose rows x are."""
    end, length = cache.state.length, len(x if isinstance(x, torch.Tensor) else x[0])
    positions = torch.arange(end - length, end, device=model.device)
    spans = Spans((Span(0, length, 0, end, causal=True, start=0),))
    return model.logits(model.predict(x, positions, cache, spans))


def decoded_side_by_side(model, texts):
    """Logits of texts [n] while they are decoded side by side, as they come, move and go.

    A prefix that the first two share is fed to slots of its own, what follows of each is decoded,
    the last text from its first token on. Slots are scattered, and the rows of those that have left
    go on with nothing.

    Yields:
        For each step, of each text that is in flight: its number, the position and the logits.
    """
    device, shared, steps = model.device, 30, 12
    cache = model.new_cache(400)
    slots = torch.randperm(300, generator=torch.Generator().manual_seed(2)).numpy() + 50
    cache.room = ((10, 25), (30, 45))
    model.prefill(texts[0][:shared].to(device), cache)
    prefix, empty = cache.state, model.new_cache(1).state
    decoder = model.decoder(cache, size=5, room=70)
    # Rows, texts, their first position, and when they come and go.
    plan = {0: (0, 0, shared, 0, 9), 1: (3, 1, shared, 0, steps), 2: (1, 2, 0, 4, steps)}
    row = {number: row for number, (row, *_) in plan.items()}
    for step in range(steps):
        for number, (_, _, first, come, go) in plan.items():
            if step == come:
                own = slots[70 * number : 70 * number + 70]
                decoder.join([row[number]], prefix if first else empty, [0], [0], [own])
            if step == go:
                decoder.leave([row[number]])
        if step == 6:
            decoder.move([3], [2])
            row[1] = 2
        flying = [n for n, (_, _, _, come, go) in plan.items() if come <= step < go]
        behind = sum(plan[number][2] > 0 for number in flying)
        spans = [Span(0, behind, 10, 25, False), Span(0, behind, 30, 45, False)]
        for query, number in enumerate(flying):
            for i, slot in enumerate(slots[70 * number : 70 * number + 70].tolist()):
                start = plan[number][2] + i
                spans.append(Span(query, query + 1, slot, slot + 1, False, start))
        decoder.read([row[number] for number in flying], spans)
        for number in flying:
            position = plan[number][2] + step - plan[number][3]
            decoder.tokens[row[number]] = texts[number][position]
        decoder.step(1 + max(row[number] for number in flying))
        for number in flying:
            position = plan[number][2] + step - plan[number][3]
            logits = decoder.logits[row[number]].clone()
            assert decoder.tokens[row[number]] == logits.argmax()
            assert decoder.highest[row[number]] == logits.max()
            yield number, position, logits
