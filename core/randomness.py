"""Random numbers as a function of (seed, purpose, images_seen, global sample index), without state.

The words are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011), written in integer tensor arithmetic: the same bits on every device, for any batch size and
any number of ranks. Normals are Box-Muller in float64: rounding to float32 hides the differences
between the devices' logarithms. `torch.manual_seed` has no effect here.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@dataclass(frozen=True)
class Draws:
    """Random numbers of `count` consecutive samples: equal calls return equal numbers."""

    seed: int
    images_seen: int
    """Number of student images before this update."""
    first: int
    """Global index of the first sample, counted over all ranks and micro-batches of this update."""
    count: int
    device: torch.device
    scope: str = ""
    """Namespace of the purposes, such as a phase; other scopes have other numbers."""

    def __post_init__(self) -> None:
        assert self.count >= 0 and 0 <= self.first <= _WORD + 1 - self.count, (
            self.first,
            self.count,
        )

    def normal(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return unit normals [count, *shape] float32, all within 6.7 of zero."""
        words = self._words(purpose, math.prod(shape)).to(torch.float64)  # [count, 4, blocks]
        radius = words[:, :2].add_(1).mul_(2**-32).log_().mul_(-2).sqrt_()
        angle = words[:, 2:].mul_(2 * math.pi * 2**-32)
        pairs = torch.empty_like(words, dtype=torch.float32)
        torch.mul(radius, angle.cos(), out=pairs[:, :2])
        torch.mul(radius, angle.sin_(), out=pairs[:, 2:])
        return self._reshape(pairs, shape)

    def uniform(self, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Return uniforms in [0, 1), multiples of 2^-24, [count, *shape] float32."""
        words = self._words(purpose, math.prod(shape))
        return self._reshape((words >> 8).to(torch.float32).mul_(2**-24), shape)

    def integers(self, purpose: str, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return integers in [0, high), [count, *shape] int64; high <= 2^31, bias < high / 2^32."""
        assert 1 <= high <= 2**31, high
        words = self._words(purpose, math.prod(shape))
        return self._reshape(words.mul_(high) >> 32, shape)

    def generator_seed(self, purpose: str) -> int:
        """Return a seed in [0, 2^63) for a torch.Generator; a function of the first sample."""
        name = f"{self.seed}/{self.images_seen}/{self.scope}/{purpose}/{self.first}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 1

    def with_scope(self, scope: str) -> Draws:
        """Return the draws of the same samples in another scope."""
        return replace(self, scope=scope)

    def part(self, start: int, stop: int) -> Draws:
        """Return the draws of samples start..stop-1: rows [start:stop] of all drawn here."""
        assert 0 <= start <= stop <= self.count, (start, stop, self.count)
        return replace(self, first=self.first + start, count=stop - start)

    def _words(self, purpose: str, numbers: int) -> Tensor:
        """Return 32-bit words for `numbers` numbers of each sample, [count, 4, blocks] int64."""
        # key and high words of the counter from the purpose
        name = f"{self.seed}/{self.images_seen}/{self.scope}/{purpose}".encode()
        digest = hashlib.blake2b(name, digest_size=16).digest()
        key0, key1, high0, high1 = (
            int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12)
        )

        # low words of the counter: block and sample
        blocks = torch.arange(-(-numbers // 4), device=self.device)  # [blocks]
        samples = torch.arange(self.first, self.first + self.count, device=self.device)[
            :, None
        ]  # [count, 1]
        constants = (torch.full_like(samples[:1], word) for word in (high0, high1))
        return torch.stack(philox(blocks, samples, *constants, key=(key0, key1)), dim=1)

    def _reshape(self, numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the first numbers of each sample as [count, *shape], contiguous."""
        return numbers.flatten(1)[:, : math.prod(shape)].reshape(self.count, *shape)


def philox(
    word0: Tensor, word1: Tensor, word2: Tensor, word3: Tensor, *, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Philox4x32-10 of a counter: four int64 tensors of 32-bit words, of one shape.

    Words are int64 tensors in [0, 2^32) that broadcast; a product wraps modulo 2^64, losing no bit.
    The odd words are masked only at the end: bits above the 32nd enter no product.
    """
    key0, key1 = key
    for _ in range(_ROUNDS):
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0 = ((product1 >> 32) ^ word1).bitwise_xor_(key0).bitwise_and_(_WORD)
        word2 = ((product0 >> 32) ^ word3).bitwise_xor_(key1).bitwise_and_(_WORD)
        word1, word3 = product1, product0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    word0, word1, word2, word3 = torch.broadcast_tensors(word0, word1 & _WORD, word2, word3 & _WORD)
    return word0, word1, word2, word3
