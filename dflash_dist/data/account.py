"""What became of rows: how many were read, which were of no use and why, and what was read otherwise than it stands
there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SAID = 10  # bad rows, and notes of one kind, that are said
COUNTS = ("dropped", "unread", "noted", "bad")


class BadRow(ValueError):
    """A row that cannot be used; the text up to the first colon is the cause under which it is counted."""

    @property
    def cause(self) -> str:
        return str(self).split(":")[0]


@dataclass
class Account:
    """Of the rows of a source, or of some of them."""

    source: str = ""
    rows: int = 0
    shapes: dict[str, int] = field(default_factory=dict)  # of rows -> the first row that has it
    dropped: Counter[str] = field(default_factory=Counter)  # rows that taught nothing, by cause
    unread: Counter[str] = field(default_factory=Counter)  # rows by a key that nothing reads
    noted: Counter[str] = field(default_factory=Counter)  # what was read otherwise than it stands there, in words
    bad: Counter[str] = field(default_factory=Counter)  # rows by cause
    bad_listed: list[str] = field(default_factory=list)  # the first bad rows, in words
    digest: str = ""  # of all documents

    def __post_init__(self) -> None:
        for name in COUNTS:
            setattr(self, name, Counter(getattr(self, name)))  # JSON has them as plain objects

    @property
    def shape(self) -> str:
        """Of all rows; empty as long as none had one."""
        return next(iter(self.shapes), "")

    @staticmethod
    def total(accounts: Iterable[Account]) -> Account:
        """Of all of them together."""
        total = Account()
        for account in accounts:
            total.add(account)
        return total

    def add(self, other: Account) -> None:
        """Takes in what became of further rows."""
        self.rows += other.rows
        self.shapes = self.shapes | {shape: row for shape, row in other.shapes.items() if shape not in self.shapes}
        for name in COUNTS:
            getattr(self, name).update(getattr(other, name))
        self.bad_listed = [*self.bad_listed, *other.bad_listed][:SAID]

    def add_bad(self, row: int, error: BadRow) -> None:
        self.bad[error.cause] += 1
        self.bad_listed = [*self.bad_listed, f"{self.source}, row {row}: {error}"][:SAID]

    def refuse_above(self, limit: float, rows: int | None = None) -> None:
        """Raises a ValueError that lists the first bad rows if there are more than `limit`: a count, or below 1 a
        share of all `rows`. Without `rows`, only a count can be judged."""
        share, count = 0 < limit < 1, self.bad.total()
        if share and rows is None:
            return
        if count > (limit * (rows or 0) if share else limit):
            of = f" of {rows:,}" if rows else ""
            listed = "".join(f"\n  {row}" for row in self.bad_listed)
            raise ValueError(f"{count} bad rows{of}, where max_bad_rows allows {limit:g}:{listed}")

    def describe_unread(self) -> Iterator[str]:
        """The keys that nothing reads with the numbers of rows that have them, in one line if there are any."""
        if self.unread:
            counts = ", ".join(f"{key} ({count:,} rows)" for key, count in self.unread.most_common())
            yield f"keys that nothing reads: {counts}"

    def describe_noted(self) -> Iterator[str]:
        """What was read otherwise than it stands there, a line a fact, the most frequent ones."""
        for note, count in self.noted.most_common(SAID):
            yield f"{count:,} x {note}"
        if len(self.noted) > SAID:
            yield f"and {len(self.noted) - SAID:,} further notes like these"
