"""What a model predicts of a text that it was fed."""

import torch

from yoco_eval.model import Span, Spans


def predictions(model, x, cache):
    """Logits [T, vocab_size] of the last T tokens of the cache's only text, whose rows x are."""
    end = cache.state.length
    positions = torch.arange(end - len(x), end, device=x.device)
    spans = Spans((Span(0, len(x), 0, end, causal=True),))
    return model.logits(model.predict(x, positions, cache, spans))
