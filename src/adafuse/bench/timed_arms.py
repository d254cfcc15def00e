"""What one block of an arm is: tokens after a prompt that is already there, or a whole query as the paper times it.

In: a checked decoder, prompts [B, S]. Out: objects that rounds.py enters, times and leaves. Next: rounds.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor

from adafuse.config import Config
from adafuse.engine.decoders import Decoder


def restart_gates(decoder: Decoder) -> None:
    """Every block begins at the first row of its table of gates, where it has one."""
    if decoder.adapter is not None and decoder.adapter.context.gate_table is not None:
        decoder.adapter.context.gate_table.restart()


class DecodeArm:
    """Greedy decode of one block from the end of the prompt."""

    def __init__(self, decoder: Decoder, prompt: Tensor, config: Config) -> None:
        self.decoder, self.prompt = decoder, prompt
        self.tokens, self.settle = config.latency.block_tokens, config.latency.settle_tokens
        self._stack, self._started = ExitStack(), False

    def enter(self, number: int) -> None:
        """Install, go to the end of the prompt, and decode a few untimed tokens: caches and allocator settle."""
        self._stack = ExitStack()
        self._stack.enter_context(self.decoder.installed())
        (self.decoder.again if self._started else self.decoder.start)(self.prompt)
        self._started = True
        self._stack.enter_context(self.decoder.decoding())
        restart_gates(self.decoder)
        self.decoder.run(self.settle)
        # the block's rows are the first ones, whatever settled: bench/routing.py tells of those
        restart_gates(self.decoder)

    def block(self) -> None:
        self.decoder.run(self.tokens)

    def leave(self) -> None:
        self._stack.close()


class QueryArm:
    """One query after the other, each with a prompt of its own: its prefill and all its new tokens are timed, and
    whatever the arm has to put right before the next query.
    """

    def __init__(self, decoder: Decoder, prompts: Callable[[int], Tensor], config: Config) -> None:
        self.decoder, self.prompts = decoder, prompts
        self.tokens, self.settle = config.latency.block_tokens, config.latency.settle_tokens
        self._stack, self._ids = ExitStack(), prompts(0)

    def enter(self, number: int) -> None:
        """Install, settle on a few untimed tokens of the query before, and fetch that of this round."""
        self._stack, self._ids = ExitStack(), self.prompts(number)
        self._stack.enter_context(self.decoder.installed())
        self._answer(self.settle)
        self._ids = self.prompts(number + 1)

    def block(self) -> None:
        self._answer(self.tokens)

    def _answer(self, tokens: int) -> None:
        """The first new token is prefill's."""
        self.decoder.start(self._ids)
        with self.decoder.decoding():
            restart_gates(self.decoder)
            self.decoder.run(tokens - 1)

    def leave(self) -> None:
        self._stack.close()
