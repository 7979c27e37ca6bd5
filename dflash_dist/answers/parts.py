"""The files of an output that many ranks write, each row whole, and which an interruption leaves usable."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dflash_dist.data.regenerated import RESULT, settings_file
from dflash_dist.data.template import check_day
from dflash_dist.files import differences, locked, refuse_changed, whole, writing
from dflash_dist.reading import check_fields, parse, read_object, reading, shown

Row = dict[str, Any]


# Settings that are digests: what changed where they did.
DIGESTS = {
    "prompts": "what is asked: other files, other rows in them, or another number of these",
    "rendering": "the chat template or its arguments",
    "draft": "the draft's weights",
}


class Place(NamedTuple):
    """Where a finished row lies."""

    part: Path
    offset: int  # [bytes]
    length: int
    error: str | None  # why there is no answer
    cut: bool  # by the length limit


def stored_settings(out: Path) -> dict[str, Any]:
    """Those that an output was begun under; none where nothing was begun."""
    file = settings_file(out)
    settings = read_object(file, _anew(out)) if file.is_file() else {}
    settings.pop(RESULT, None)
    check_day(settings, "date", str(file), _anew(out))
    return settings


def _anew(out: Path) -> str:
    return f"delete it with {out.name} and {out.name}.parts beside it, and begin anew"


class Parts:
    """The part files of an output: one a rank, whole lines only. A line is a row; or {"row", "turn", "message"}, a turn
    of a row that is not finished, counted from 0.

    The settings lie beside the output and stay there: they tell how it was written, and that it is finished. They are
    written with the first row, so that a start which gave none keeps no other from its place.
    """

    def __init__(self, out: Path, settings: dict[str, Any]):
        self.out, self.folder, self.advice = out, out.with_name(out.name + ".parts"), _anew(out)
        self.settings, described = settings, settings_file(out)
        if out.is_file() and not described.is_file():
            raise ValueError(f"{out} exists and was not written by this command: choose another output, or delete it")
        if described.is_file():
            changed = differences(stored_settings(out), settings, undivided=["template_args"])
            whys = ((text, DIGESTS.get(text.partition(":")[0])) for text in changed)
            refuse_changed(
                f"{described} belongs to a run with other prompts or settings",
                (f"{text} ({why})" if why else text for text, why in whys),
                f"choose another output, or delete it with {out} and {self.folder}",
            )
        with writing(out):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _describe(self, result: dict[str, int] | None = None) -> None:
        if result or not settings_file(self.out).is_file():
            with whole(settings_file(self.out)) as file:
                file.write_text(json.dumps(self.settings | ({RESULT: result} if result else {}), indent=2))

    def index(self) -> dict[int, Place]:
        """The finished rows, by number."""
        return {line["row"]: place for line, place in self._written() if "turn" not in line}

    def turns(self, rows: Collection[int]) -> dict[int, list[Row]]:
        """The messages that those of the unfinished `rows` that are begun were answered so far, in order."""
        found: dict[int, dict[int, Row]] = {}
        for line, _ in self._written():
            if "turn" in line and line["row"] in rows:
                found.setdefault(line["row"], {})[line["turn"]] = line["message"]
        return {
            row: [of[k] for k in itertools.takewhile(of.__contains__, itertools.count())] for row, of in found.items()
        }

    def _written(self) -> Iterator[tuple[Row, Place]]:
        """All lines. One that an interruption cut short counts as unwritten."""
        for path in sorted(self.folder.glob("rank-*.jsonl")):
            offset = 0
            with contextlib.suppress(FileNotFoundError), path.open("rb") as part:  # another rank may just have merged
                for line in part:
                    if (row := _parsed(line, path)) is not None:
                        yield (
                            row,
                            Place(path, offset, len(line), row.get("error"), row.get("finish_reason") == "length"),
                        )
                    offset += len(line)

    @contextlib.contextmanager
    def append(self, rank: int) -> Iterator[Callable[[Row], None]]:
        """Gives what writes a line: at once for a process that dies, within about a second for a machine that does."""
        path = self.folder / f"rank-{rank:05d}.jsonl"
        with writing(path):
            part = path.open("a+b", buffering=0)  # a buffer would try again to write where the disk is full
        with part:
            if part.tell():
                part.seek(-1, os.SEEK_END)
                if part.read() != b"\n":
                    part.write(b"\n")  # closes a line that an interruption cut short
            synced = time.monotonic()

            def write(row: Row) -> None:
                nonlocal synced
                left = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                with writing(path):
                    self._describe()
                    while left:
                        left = left[part.write(left) :]
                    if time.monotonic() - synced > 1:
                        os.fsync(part.fileno())
                        synced = time.monotonic()

            try:
                yield write
            finally:
                with writing(path):
                    os.fsync(part.fileno())

    def read(self) -> list[Row]:
        """The rows of the finished output.

        Raises:
            ValueError: it is damaged.
        """
        with reading(str(self.out), self.advice):
            return [parse(line) for line in self.out.read_bytes().splitlines()]

    def merge(self, rows: list[int]) -> dict[int, Place] | None:
        """Writes the output in row order and removes the parts, if all rows are there and nobody else did; returns
        what became of the rows, else None.

        No rank waits for another: whichever finishes last finds everything.
        """
        merged, lock = None, self.folder.with_name(f"{self.folder.name}.lock")
        with locked(lock):
            if not self.out.is_file():
                places = self.index()
                if set(rows) <= places.keys():
                    merged = {row: places[row] for row in rows}
                    written = [place for place in merged.values() if place.error is None]
                    with writing(self.out):
                        self._describe({"rows": len(written), "cut": sum(place.cut for place in written)})
                        with whole(self.out) as partial, partial.open("wb") as file:
                            file.writelines(_lines(written))
            if self.out.is_file():
                shutil.rmtree(self.folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
        return merged


def _parsed(line: bytes, path: Path) -> Row | None:
    """A line of a part file; None where an interruption cut it short, maybe inside a character.

    Raises:
        ValueError: it is whole, and no row.
    """
    try:
        row = parse(line)
    except ValueError:
        return None
    advice = "delete this file and run the same command again, which writes its rows anew"
    if not isinstance(row, dict):
        raise ValueError(f"{path} holds {shown(row)}, which is no row: {advice}")
    kinds: dict[str, Any] = {"row": int, "error": str | None}
    if "turn" in row:
        kinds |= {"turn": int, "message": dict[str, Any]}
    check_fields(row, kinds, f"a line of {path}", advice)
    return row


def _lines(places: list[Place]) -> Iterator[bytes]:
    with contextlib.ExitStack() as stack:
        parts = {path: stack.enter_context(path.open("rb")) for path in {place.part for place in places}}
        for place in places:
            parts[place.part].seek(place.offset)
            yield parts[place.part].read(place.length).rstrip(b"\n") + b"\n"
