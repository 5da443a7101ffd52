"""Decoding token by token, on a GPU as replays of one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UPS = 2  # steps before the capture, in which kernels are compiled and tables made


class Decoder:
    """Feeds one token after the other to a model whose memory stays where it is.

    Make it, start it and step it under one setting of `torch.inference_mode` or `torch.no_grad`:
    what was made under the former cannot be written to outside of it. A graph reads the weights
    where they lie when it is captured; after replacing or moving them, make another decoder.

    Args:
        begin: sets the model's memory to where decoding starts and returns the position there,
            which is the number of tokens that it remembers.
        step: feeds a token [1] at a position [1], both int64 on the device, and returns the logits
            [vocab_size] of the next one.
        capacity: how many tokens the memory has room for.
        device: of the model.
        graph: whether to replay steps as a CUDA graph, captured at the first `start`. For a `step`
            that launches the same work every time and reads nothing back to the host.

    Attributes:
        token: int64 [1] on the device, the token that the next `step` feeds. A step leaves the
            likeliest next token there; write another one to decode otherwise.
        logits: [vocab_size], of the last step; the next one overwrites them.
    """

    def __init__(
        self,
        begin: Callable[[], int],
        step: Callable[[Tensor, Tensor], Tensor],
        capacity: int,
        device: torch.device,
        graph: bool,
    ) -> None:
        self._begin, self._step, self._capacity = begin, step, capacity
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self.length = 0
        self.logits: Tensor
        self._capturing = graph
        self._graph: torch.cuda.CUDAGraph | None = None

    def start(self, token: int) -> None:
        """Goes to where the model's memory is; `token` is fed first.

        Raises:
            ValueError: the model's memory is full.
        """
        self.length = self._begin()
        self._check_room()
        if self._capturing and self._graph is None:
            self._capture()
        self._position.fill_(self.length)
        self.token.fill_(token)

    def step(self) -> None:
        """Feeds `token`.

        Raises:
            ValueError: the model's memory is full.
        """
        self._check_room()
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        self.length += 1

    def _check_room(self) -> None:
        if self.length >= self._capacity:
            raise ValueError(f"the cache has room for {self._capacity} tokens, not for one more")

    def _advance(self) -> None:
        self.logits = self._step(self.token, self._position)
        self.token.copy_(self.logits.argmax(-1, keepdim=True))
        self._position += 1

    def _capture(self) -> None:
        """Records one step. The steps that warm up write behind the remembered tokens only."""
        stream = torch.cuda.Stream(self.token.device)
        stream.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._position.fill_(self._begin())
                self._advance()
            self._position.fill_(self._begin())
        torch.cuda.current_stream(self.token.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._advance()
        self._graph = graph
        self._begin()  # the steps above have changed the states
