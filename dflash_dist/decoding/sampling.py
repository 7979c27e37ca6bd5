"""How a token is chosen from logits, such that drafting never changes what is written.

Noise depends on the seed and the position alone. So speculative decoding, which chooses at every slot as plain decoding
would there, writes the same tokens; and the draft, which proposes with the same noise, agrees with the target with at
least the probability (1 - d) / (1 + d), where d is the total variation distance of what the two would write (Gumbel
coupling, arXiv 2408.07978). Rejection sampling (arXiv 2211.17192) accepts with probability 1 - d: more, but its answers
have the target's distribution only, and differ from draft to draft.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Independent noise for each use of a position.
CHOICE, PROPOSAL, ACCEPTANCE, REPLACEMENT = range(4)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the temperature comes first, then the likeliest `top_k`, and of these the `top_p`.

    Raises:
        ValueError: a number is out of its range.
    """

    temperature: float = 0.0  # 0: greedy, and all below does nothing
    top_p: float = 1.0  # the likeliest tokens that reach this probability together
    top_k: int = 0  # the likeliest so many; 0: all
    seed: int = 0  # of an answer: prompts that share it share noise
    rejection: bool = False  # accept proposals by rejection sampling instead of by agreement

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for all tokens, found {self.top_k}")

    @property
    def rejects(self) -> bool:
        return self.rejection and self.temperature > 0

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What tokens are drawn from, [N, V] in float32; not for greedy decoding."""
        scaled = logits.float() / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            least = scaled.topk(self.top_k).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        probabilities = scaled.softmax(dim=-1)
        if self.top_p < 1:
            ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
            likelier = ordered.cumsum(dim=-1) - ordered
            nucleus = ordered.masked_fill(likelier >= self.top_p, 0.0)
            probabilities = torch.zeros_like(ordered).scatter(-1, tokens, nucleus)
            probabilities /= probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def scores(self, logits: torch.Tensor, position: int) -> torch.Tensor:
        """[N, V]: the token chosen for `position`, and for those after it, has the largest score in its row."""
        if self.temperature == 0:
            return logits
        return self._race(self.probabilities(logits), position, CHOICE).log()

    def draw(self, probabilities: torch.Tensor, position: int, use: int) -> list[int]:
        """A token for each row of `probabilities` [N, V], the first at `position`."""
        return self._race(probabilities, position, use).argmax(dim=-1).tolist()

    def accept(
        self, proposals: list[int], foreseen: torch.Tensor, probabilities: torch.Tensor, position: int
    ) -> list[int]:
        """Rejection sampling: the accepted proposals, and the token after them.

        Args:
            proposals: drawn from `foreseen`, the first at `position`.
            foreseen: [K - 1, V] the draft's distributions.
            probabilities: [K, V] the target's.
        """
        index = torch.tensor(proposals, device=foreseen.device)[:, None]
        ours, theirs = (each[: len(proposals)].gather(1, index)[:, 0] for each in (foreseen, probabilities))
        uniform = torch.exp(-self._noise(foreseen[:, :1], position, ACCEPTANCE)[:, 0])
        accepted = int((uniform * ours <= theirs).long().cumprod(0).sum())
        rest = probabilities[accepted]
        if accepted < len(proposals):
            residual = (rest - foreseen[accepted]).clamp(min=0)
            rest = residual if residual.any() else rest  # none is left where rounding alone rejected
        return proposals[:accepted] + self.draw(rest[None], position + accepted, REPLACEMENT)

    def _race(self, probabilities: torch.Tensor, position: int, use: int) -> torch.Tensor:
        """Of exponential times with these rates the shortest comes from token x with the probability of x; here
        inverse times, [N, V]."""
        return probabilities / self._noise(probabilities, position, use)

    def _noise(self, like: torch.Tensor, position: int, use: int) -> torch.Tensor:
        """Exponential, in the shape of `like` [N, W]; the row of a position does not depend on where the rows begin."""
        noise = torch.empty_like(like)
        generator = torch.Generator(like.device)
        for at, row in enumerate(noise, position):
            generator.manual_seed(_mix(self.seed, at, use))
            row.exponential_(generator=generator)
        return noise


def _mix(*numbers: int) -> int:
    """One seed of 32 bits, all that the generator on the CPU takes: the steps are those of splitmix64."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 32


GREEDY = Sampling()
