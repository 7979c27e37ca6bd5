"""The distance to a label, or to what the target foresees, through a frozen LM head, fused and in chunks.

Full logits [N, V] never exist. For each chunk of slots the probabilities, the loss and the gradient with respect to the
slots' hidden states are computed at once, in one scratch buffer, so backward only scales what forward kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dflash_dist.batch import PADDING

# Slots whose logits exist at once: enough to keep a GPU busy; on a CPU products are at full speed with fewer, and their
# limit is so many bytes of float32.
GPU_CHUNK, CPU_CHUNK, CPU_CHUNK_BYTES = 2048, 256, 64 * 2**20
# A CPU multiplies with so many rows of the head at once, for with all of them it waits for memory; and its passes over
# the logits go by as many of these as stay in the cache [elements].
CPU_WORDS, CPU_TILE = 1024, 2**19
# A distance to the target's probabilities takes several passes, over as many slots at once, on a GPU too.
TEACHER_TILE = 256
# A CPU finds a maximum at once among so many neighbours, but its index one by one.
GROUP = 256


class Distance(NamedTuple):
    """What a slot's loss is made of, by weight: q are the draft's probabilities, p the target's at the same place."""

    ce: float = 0.0  # -log q of the label
    kl: float = 0.0  # KL(p || q)
    tv: float = 0.0  # total variation, half of sum |q - p|: what rejection sampling rejects
    lk: float = 0.0  # KL where p and q overlap little, total variation where they overlap (arXiv 2602.23881)
    # Of p and q in all but ce; KL counts its square times, so that its gradients keep their size.
    temperature: float = 1.0

    @property
    def needs_target(self) -> bool:
        return any((self.kl, self.tv, self.lk))


CROSS_ENTROPY = Distance(ce=1.0)
LK_DECAY = 3.0  # of lk's share of KL, with the overlap


def suitable_chunk(vocab: int, on_gpu: bool) -> int:
    """Slots whose logits exist at once."""
    if on_gpu:
        return GPU_CHUNK
    return max(min(CPU_CHUNK, CPU_CHUNK_BYTES // (4 * vocab)) // PADDING, 1) * PADDING


def suitable_tile(size: int, vocab: int, on_gpu: bool) -> int:
    """Slots of a chunk of `size` whose logits are gone through at once."""
    return size if on_gpu else min(max(CPU_TILE // vocab, 1), size)


def even_chunk(count: int, chunk: int) -> int:
    """Slots of each chunk where `count` of them come in as few chunks of at most `chunk` as can be, all of one size."""
    return math.ceil(count / max(math.ceil(count / chunk), 1))


class Seen(NamedTuple):
    """What a pass over the logits of slots showed of each of them, in float32 where nothing else is said."""

    nll: torch.Tensor  # [N], of the label, with gradient where candidates are asked for
    correct: torch.Tensor  # [N], 1 where the likeliest token is the label
    accepted: torch.Tensor  # [N], the overlap of the draft's probabilities with the target's, or `correct` without
    of_target: torch.Tensor  # [N, candidates + 1], the target's logits of `ids`; 0 where it is not looked at
    ids: torch.Tensor  # [N, candidates + 1] int64, the likeliest tokens, the first one likeliest; behind them the label
    logits: torch.Tensor  # [N, candidates + 1], theirs, with gradient

    @staticmethod
    def room_for(labels: torch.Tensor, candidates: int) -> Seen:
        """To be filled in."""
        nll, correct, accepted = (torch.empty(len(labels), device=labels.device) for _ in range(3))
        ids = torch.cat([labels.new_empty(len(labels), candidates), labels[:, None]], dim=1)
        return Seen(nll, correct, accepted, nll.new_zeros(ids.shape), ids, nll.new_empty(ids.shape))


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        head,
        labels,
        chunk,
        candidates=0,
        distance=CROSS_ENTROPY,
        theirs=None,
        rows=None,
        table=None,
        weights=None,
    ):
        """
        Args:
            hidden: [N, H].
            head: [V, H], frozen; its dtype is that of the products.
            labels: [N].
            chunk: slots whose logits exist at once.
            candidates: how many of the likeliest tokens are returned.
            theirs: [N, H], what the target's LM head reads where it foresees the labels, if the distance needs that.
            rows: [N, r] with gradient, and
            table: [V, r] with gradient: their product is added to the logits.
            weights: [N], only with a table: what each slot's loss counts. The gradient of the table is a sum over slots
                which is added up while their logits exist.

        Returns:
            The distance [N] float32 with gradient, or with a table its weighted sum; and the parts of `Seen`.
        """
        assert table is None or not candidates, "the logits of candidates have no gradient to the table"
        count, vocab = len(hidden), len(head)
        loss, seen = torch.empty(count, device=hidden.device), Seen.room_for(labels, candidates)
        learns = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if learns else None
        of_rows, of_table = (torch.zeros_like(of) if learns and of is not None else None for of in (rows, table))
        of_nll = gradient if theirs is None else torch.empty_like(hidden) if learns and candidates else None
        size = even_chunk(count, chunk)
        tile, width = suitable_tile(size, vocab, head.is_cuda), vocab if head.is_cuda else CPU_WORDS
        tile = tile if theirs is None else min(tile, TEACHER_TILE)
        with torch.autocast(hidden.device.type, enabled=False):
            factors = [(hidden.to(head.dtype), head)]
            if table is not None:
                factors.append((rows.to(head.dtype), table.to(head.dtype)))
            logits = head.new_empty(size, vocab)
            wide = None if head.dtype == torch.float32 else head.new_empty(tile, vocab, dtype=torch.float32)
            teacher = None
            if theirs is not None:
                teacher = _Teacher(theirs.to(head.dtype), head, distance, size, tile, of_nll is not None)
            for part in (slice(start, min(start + size, count)) for start in range(0, count, max(size, 1))):
                some = logits[: part.stop - part.start]
                _multiply([(left[part], right) for left, right in factors], width, out=some)
                if teacher:
                    teacher.look_at(part, width)
                parts = (of[part].split(tile) for of in (labels[:, None], loss, *seen))
                for number, (few, label, *filled) in enumerate(zip(some.split(tile), *parts)):
                    _to_gradient(few, label, *filled, wide, teacher, number)  # type: ignore[call-arg]
                if gradient is not None:
                    gradient[part] = some @ head
                if teacher and of_nll is not None:
                    of_nll[part] = teacher.of_nll[: len(some)] @ head
                if of_rows is not None and of_table is not None:
                    left, right = factors[1]
                    of_rows[part] = some @ right
                    of_table += some.T @ (weights[part, None] * left[part]).to(some.dtype)
        ctx.save_for_backward(gradient, of_nll, of_rows, of_table, weights, seen.ids, head)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*seen[1 if candidates else 0 : -1])
        return loss if weights is None else (weights * loss).sum(), *seen

    @staticmethod
    def backward(ctx, d_loss, *d_seen):
        gradient, of_nll, of_rows, of_table, weights, ids, head = ctx.saved_tensors
        of_each = (d_loss if weights is None else weights * d_loss)[:, None]
        result = gradient * of_each.to(gradient.dtype)
        d_nll, *_, d_logits = d_seen
        if d_nll is not None:
            result += of_nll * d_nll[:, None].to(of_nll.dtype)
        if d_logits is not None:
            of_chosen = F.embedding_bag(ids, head, per_sample_weights=d_logits.to(head.dtype), mode="sum")
            result += of_chosen.to(result.dtype)
        if of_table is None:
            return result, *[None] * 9
        return result, *[None] * 6, of_rows * of_each, of_table * d_loss, None


def _multiply(factors: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int, out: torch.Tensor) -> None:
    """The sum of products of rows [N, *] and tables [V, *], by as many words at once."""
    (rows, head), *more = factors
    for place, (columns, words) in enumerate(zip(out.split(width, dim=1), head.split(width))):
        torch.mm(rows, words.T, out=columns)
        for also, table in more:
            torch.addmm(columns, also, table[place * width : (place + 1) * width].T, out=columns)


class _Teacher:
    """What the target foresees at the slots of a chunk, and how far the draft is from it, tile by tile."""

    def __init__(
        self, states: torch.Tensor, head: torch.Tensor, distance: Distance, size: int, tile: int, keep_nll: bool
    ):
        self.states, self.head, self.distance, self.size = states, head, distance, tile
        self._logits = head.new_empty(size, len(head))
        self._wide = None if head.dtype == torch.float32 else head.new_empty(tile, len(head), dtype=torch.float32)
        self._apart = head.new_empty(tile, len(head), dtype=torch.float32)
        self._warm = torch.empty_like(self._apart) if distance.temperature != 1 else None
        self.of_nll = head.new_empty(size if keep_nll else 0, len(head))  # its gradient, of a chunk

    def look_at(self, part: slice, width: int) -> None:
        """Foresees a chunk."""
        self._some = self._logits[: part.stop - part.start]
        _multiply([(self.states[part], self.head)], width, out=self._some)

    def compare(self, number: int, logits: torch.Tensor, ids: torch.Tensor, of_target: torch.Tensor) -> None:
        """Takes tile `number` of the chunk, whose logits of the draft, in float32, these are; fills in what the target
        says of `ids`."""
        few = self._some.split(self.size)[number]
        self.p = few if self._wide is None else self._wide[: len(few)].copy_(few)
        torch.gather(self.p, 1, ids, out=of_target)
        self.kept = self.of_nll[number * self.size :][: len(few)]
        if self._warm is not None:
            self.p.div_(self.distance.temperature)
            logits = torch.div(logits, self.distance.temperature, out=self._warm[: len(few)])
        self.divergence = None
        if self.distance.kl or self.distance.lk:
            theirs = self.p.clone()
            torch.softmax(theirs, -1, out=self.p)
            of_both = logits.logsumexp(-1) - theirs.logsumexp(-1)
            self.divergence = torch.linalg.vecdot(self.p, theirs.sub_(logits)) + of_both
        else:
            torch.softmax(self.p, -1, out=self.p)
        if self._warm is not None:
            torch.softmax(logits, -1, out=logits)

    def to_gradient(
        self,
        q: torch.Tensor,
        label: torch.Tensor,
        loss: torch.Tensor,
        nll: torch.Tensor,
        accepted: torch.Tensor,
    ) -> None:
        """Turns the draft's probabilities into the gradient of the distance, in place; fills in loss and accepted.

        With s the signs of q - p, the gradient of the total variation is q (s - sum q s) / 2.
        """
        ce, kl, tv, lk, temperature = self.distance
        if len(self.kept):
            self.kept.copy_(q).scatter_(1, label, (q.gather(1, label) - 1).to(self.kept.dtype))
        warm = q if self._warm is None else self._warm[: len(q)]
        apart = torch.sub(warm, self.p, out=self._apart[: len(q)])
        variation = torch.linalg.vector_norm(apart, ord=1, dim=-1) / 2
        accepted.copy_(1 - variation)
        share = torch.exp(-LK_DECAY * accepted)
        of_kl, of_tv = temperature**2 * (kl + lk * share), tv + lk * (1 - share)
        loss.copy_(ce * nll + of_tv * variation)
        signs = apart.sign_()
        level = of_kl - of_tv / 2 * torch.linalg.vecdot(warm, signs)
        level += ce if warm is q else 0
        warm.mul_(signs.mul_(of_tv[:, None] / 2).add_(level[:, None]))
        if self.divergence is not None:
            loss.add_(of_kl * self.divergence)
            warm.addcmul_(self.p, of_kl[:, None], value=-1)
        if warm is not q:
            q.mul_(ce).add_(warm, alpha=1 / temperature)
        q.scatter_add_(1, label, torch.full_like(label, -ce, dtype=q.dtype))


def _to_gradient(
    logits: torch.Tensor,
    label: torch.Tensor,
    loss: torch.Tensor,
    nll: torch.Tensor,
    correct: torch.Tensor,
    accepted: torch.Tensor,
    of_target: torch.Tensor,
    ids: torch.Tensor,
    chosen: torch.Tensor,
    wide: torch.Tensor | None,
    teacher: _Teacher | None,
    number: int,
) -> None:
    """Turns logits [N, V] into their gradient, softmax - one-hot or, with a `teacher`, that of the distance to tile
    `number` of its chunk, in place; fills in the rest, as `Seen` has it.

    In float32: `wide` is room for that where the logits are not. The difference too, since a bfloat16 knows nothing
    between 0.996 and 1, where the probability of a label that has been learned lies.
    """
    exact = logits if wide is None else wide[: len(logits)].copy_(logits)
    peak, best = _first_max(exact)
    label_logit = exact.gather(1, label)
    if candidates := ids.shape[1] - 1:
        chosen[:, :-1], ids[:, :-1] = _largest(exact, candidates)
    chosen[:, -1:] = label_logit
    correct[:] = (best == label)[:, 0]
    if teacher:
        teacher.compare(number, exact, ids, of_target)
    torch.softmax(exact, -1, out=exact)
    # The most likely token's probability is 1 / Σ exp(logit - peak): exact, where the label's own may be 0.
    torch.sub(peak - label_logit, exact.gather(1, best).log(), out=nll[:, None])
    if teacher:
        teacher.to_gradient(exact, label, loss, nll, accepted)
    else:
        loss.copy_(nll)
        accepted.copy_(correct)
        exact.scatter_add_(1, label, torch.full_like(peak, -1))
    if wide is not None:
        logits.copy_(exact)


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest along the last dimension, and where they are, both [N, count], in descending order."""
    if logits.is_cuda or logits.shape[-1] % GROUP or logits.shape[-1] // GROUP <= count:
        return logits.topk(count)
    groups = logits.unflatten(-1, (-1, GROUP))
    among = groups.amax(-1).topk(count).indices  # the others' largest are smaller
    values, place = groups.gather(1, among[..., None].expand(-1, -1, GROUP)).flatten(1).topk(count)
    return values, among.gather(1, place // GROUP) * GROUP + place % GROUP


def _first_max(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and its first index along the last dimension, both [N, 1]."""
    if logits.is_cuda or logits.shape[-1] % GROUP:
        return logits.max(dim=-1, keepdim=True)
    groups = logits.unflatten(-1, (-1, GROUP))
    peak, group = groups.amax(-1).max(dim=-1, keepdim=True)
    inside = groups.gather(1, group[..., None].expand(-1, 1, GROUP)).argmax(-1)
    return peak, group * GROUP + inside
