"""Raw rows from a local file, the Hub or the built-in sets, each with the place it came from."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qpsft.data.bad_rows import BadRow, RowError, refuse
from qpsft.errors import DataError, boundary, one_line, shown
from qpsft.recipe.arguments import DataArguments

TEXT_KINDS = (".jsonl", ".json", ".csv")
KINDS = (*TEXT_KINDS, ".parquet")
BUILT_IN = {"demo-noisy": "noisy", "demo-clean": "clean"}
AT_ONCE = 256
"""Rows of a Parquet file or of the Hub that are decoded together."""
HUB_TIMEOUT = 10
"""Seconds in which the Hub must answer, or be taken for out of reach."""
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
Rows = Iterator[tuple[int, dict | RowError]]
"""Line or row number, and the row or why it is none."""


@dataclass
class Records:
    """Rows as they stand in the source: one dict per row, columns under the source's own names.

    Attributes:
        name: the file or dataset, as the user wrote it.
        unit: what `numbers` count: "line" of a text file, else "row", both from 1.
        numbers: the line or row number of each record.
        records: the rows.
        bad: lines and rows that are no record: broken JSON, a wrong number of cells.
    """

    name: str
    unit: str
    numbers: list[int]
    records: list[dict]
    bad: list[BadRow] = field(default_factory=list)

    def where(self, index: int) -> str:
        """The place of record `index` (from 0), such as "data.jsonl, line 57"."""
        return f"{self.name}, {self.unit} {self.numbers[index]}"

    @property
    def columns(self) -> list[str]:
        """Every column of any record, in the order in which they first appear."""
        return list(dict.fromkeys(column for record in self.records for column in record))


def as_records(rows: Sequence[dict], name: str) -> Records:
    """Rows in memory as if they had been read from a file called `name`."""
    return collected(_in_memory(name, list(rows), None))


class RowSource:
    """The rows of a file, a Hub dataset or a built-in set, read as they are asked for and never all in memory.

    The exception is a .json file, which is one value.

    Args:
        name, unit: as in `Records`.
        size: bytes or rows there are, for a bar.
        make: `f(source)`, an iterator over the rows that keeps `source.done` up to date.
        limit: the first so many rows only.

    Attributes:
        done: of `size`, how much the last iterator has read.
    """

    def __init__(self, name: str, unit: str, size: int, make: Callable[[RowSource], Rows], limit: int | None):
        self.name, self.unit, self.size, self.done = name, unit, size, 0
        self._make, self._limit = make, limit

    def __iter__(self) -> Rows:
        """Line or row number, and the row or why it is none; from the first row on."""
        self.done = 0
        return islice(self._make(self), self._limit)

    def where(self, number: int) -> str:
        """The place of a row, such as "data.jsonl, line 57"."""
        return f"{self.name}, {self.unit} {number}"


def open_rows(name: str, arguments: DataArguments, split: str = "train") -> RowSource:
    """Finds the rows of `name`: a built-in set, a local file, or a Hub dataset (in this order).

    Args:
        name: "demo-noisy", "demo-clean", a path ending in .jsonl, .json, .csv (each also with .gz) or .parquet, or a
            Hub id. Anything that looks like a path is never looked up on the Hub.
        arguments: `dataset_limit` and, for the Hub, `dataset_config` and `dataset_revision` are used.
        split: split of a Hub or built-in set; a local file has only one and ignores it.

    Raises:
        DataError: nothing of that name, or it is no data file; while it is read, that it cannot be, with the line.
    """
    limit = arguments.dataset_limit
    if name in BUILT_IN:
        return _in_memory(name, _built_in(name, split), limit)
    path = Path(name).expanduser()
    if path.exists():
        return _open_file(name, path, limit)
    if HUB_ID.fullmatch(name) and name[0] != "." and _kind(path) is None:
        return _open_hub(name, arguments, split)
    raise DataError(f"There is no file {name}.", _near_files(path) or "Check dataset_name.")


def read_records(name: str, arguments: DataArguments, split: str = "train") -> Records:
    """All rows of `open_rows` at once.

    Raises:
        DataError: as `open_rows`, or none of its lines is a row; names the file and line.
    """
    records = collected(open_rows(name, arguments, split))
    if not records.records:
        raise no_rows(records.name, records.bad)
    return records


def collected(source: RowSource, count: int | None = None) -> Records:
    """The first `count` rows of a source, or all."""
    records = Records(source.name, source.unit, [], [])
    for number, row in islice(source, count):
        if isinstance(row, RowError):
            records.bad.append(BadRow(number, row))
        else:
            records.numbers.append(number)
            records.records.append(row)
    return records


def no_rows(name: str, bad: Sequence[BadRow]) -> DataError:
    """The error for a source of which nothing but `bad` could be read. Raises theirs, if there are any."""
    refuse(bad, name, len(bad))
    return DataError(f"{name} is empty: there is no row in it.", "Write one demonstration per line or row.")


def stream_records(name: str, arguments: DataArguments) -> Rows:
    """The rows of `name` one by one, read as they are asked for, from a Hub dataset too.

    Args:
        name: a .jsonl (also .gz) or .parquet file, or a Hub id.
        arguments: `dataset_limit` and, for the Hub, `dataset_config`, `dataset_revision` and `dataset_train_split`.

    Raises:
        DataError: nothing of that name, another kind of file, or it cannot be read.
    """
    path = Path(name).expanduser()
    is_local = name in BUILT_IN or path.exists()
    if not is_local and HUB_ID.fullmatch(name) and name[0] != "." and _kind(path) is None:
        return islice(enumerate(_stream_hub(name, arguments), start=1), arguments.dataset_limit)
    if path.exists() and name not in BUILT_IN and not (path.is_file() and _kind(path) in (".jsonl", ".parquet")):
        raise DataError(f"{name} cannot be streamed.", "Convert it to .jsonl or .parquet, or leave streaming out.")
    return iter(open_rows(name, arguments))


def stream_unit(name: str) -> str:
    """What the numbers of `stream_records` count: "line" or "row"."""
    return "line" if _kind(Path(name)) == ".jsonl" else "row"


def _arrow_rows(name: str, table: Any) -> list[dict]:
    """The rows of an Arrow table or batch. Raises DataError naming a column that Python has no values for."""
    columns = []
    for column, values in zip(table.schema.names, table.columns, strict=True):
        where = f"{name}, column {shown(column)}: its values cannot be read"
        with boundary(where, DataError, "Write the column as text, or leave it out."):
            try:
                columns.append(values.to_pylist(maps_as_pydicts="strict"))
            except KeyError as error:
                raise DataError(f"{name}: a map names a key twice ({error}).", "Write it again.") from None
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _stream_hub(name: str, arguments: DataArguments) -> Iterator[dict]:
    import datasets

    try:
        yield from _hub_table(name, arguments, arguments.dataset_train_split, streaming=True)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The Hub dataset {name} can be read no further: {one_line(error)}",
            "Check the network; a run goes on from its last checkpoint with --resume.",
        ) from None


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in TEXT_KINDS else None
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def _near_files(path: Path) -> str:
    """What the user may have meant, from the folder of `path` and the built-in sets; "" if there is nothing."""
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and _kind(p))
    near = difflib.get_close_matches(path.name, [*files, *BUILT_IN], n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(n if n in BUILT_IN else str(folder / n) for n in near)}?"
    return f"Data files in that folder: {', '.join(files[:5])}." if files else ""


def _built_in(name: str, split: str) -> list[dict]:
    from qpsft.data import built_in

    return built_in.demonstrations(BUILT_IN[name]) if split == "train" else built_in.in_domain(split, n=200)


def _in_memory(name: str, rows: list, limit: int | None) -> RowSource:
    def make(source: RowSource) -> Rows:
        for number, row in enumerate(rows, start=1):
            source.done = number
            yield number, row if isinstance(row, dict) else _not_an_object(f"{name}, row {number}", row)

    return RowSource(name, "row", len(rows), make, limit)


def _open_file(name: str, path: Path, limit: int | None) -> RowSource:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file() and _kind(p))[:5]
        raise DataError(
            f"{name} is a folder, not a data file.",
            f"Name one file in it: {', '.join(inside)}." if inside else f"Name a file ending in {', '.join(KINDS)}.",
        )
    kind = _kind(path)
    if kind is None:
        raise DataError(
            f"{name}: qpsft does not know files that end in {path.suffix!r}.",
            f"Convert it to one of {', '.join(KINDS)} (the text formats also as .gz).",
        )
    if kind == ".parquet":
        return _open_parquet(name, path, limit)
    if kind == ".json":
        with _opened(name, path) as (_, file):
            return _in_memory(name, _json_rows(name, _decode(name, file.read())), limit)
    make = _jsonl_rows if kind == ".jsonl" else _csv_rows
    return RowSource(name, "line", path.stat().st_size, lambda source: make(source, path), limit)


@contextmanager
def _opened(name: str, path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file, and what it holds once unpacked: the same, but for .gz. Raises DataError."""
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix.lower() == ".gz" else nullcontext(raw) as file:
            yield raw, file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name} cannot be read: {reason}.", "Check the file and its permissions.") from None


def _not_an_object(where: str, value: object) -> RowError:
    text = json.dumps(value, default=str)
    shown = text if len(text) <= 40 else text[:40] + "…"
    return RowError(f"{where}: expected an object with named columns, found {shown}", 'Write rows as {"prompt": …, …}.')


def _decode(name: str, data: bytes, line: int | None = None) -> str:
    """Bytes of a file as text: all of them, or one line. Raises RowError with the line and byte that is no UTF-8."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and line in (None, 1):
        raise DataError(f"{name} is UTF-16 text; qpsft reads UTF-8.", "Save it as UTF-8 (CSV UTF-8 in a spreadsheet).")
    data = data.removeprefix(codecs.BOM_UTF8) if line in (None, 1) else data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = data.count(b"\n", 0, error.start) + (line or 1)
        byte = error.start - data.rfind(b"\n", 0, error.start)
        raise RowError(
            f"{name}, line {at}: byte {byte} of the line (0x{data[error.start]:02x}) is not valid UTF-8.",
            "Save the file as UTF-8; `iconv -f WINDOWS-1252 -t UTF-8` converts the usual other encoding.",
        ) from None


def _jsonl_rows(source: RowSource, path: Path) -> Rows:
    name = source.name
    with _opened(name, path) as (raw, file):
        # Lines of bytes end at \n only: JSON strings may hold U+2028 and others that text would be split at.
        for number, line in enumerate(file, start=1):
            source.done = raw.tell()
            try:
                text = _decode(name, line, number).removesuffix("\n")
                if text.strip():
                    yield number, _json_object(text, f"{name}, line {number}")
            except RowError as error:
                if number == 1 and line.strip() == b"[":
                    raise DataError(
                        f"{name}, line 1: a JSON list begins here, not a row.",
                        "The file is one JSON list: name it .json.",
                    ) from None
                yield number, error


def _json_object(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{where}: not valid JSON ({error.msg}, column {error.colno})."
        raise RowError(problem, "Mend or delete the line.") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: not usable JSON ({error}).", "Mend or delete the line.") from None
    if not isinstance(record, dict):
        raise _not_an_object(where, record)
    return record


def _json_rows(name: str, text: str) -> list:
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        todo = "Mend the file."
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            todo = "If it holds one object per line, name it .jsonl."
        raise DataError(
            f"{name}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}).", todo
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not usable JSON ({error}).", "Mend the file.") from None
    if isinstance(value, dict):
        value = value.get("data")
    if not isinstance(value, list):
        raise DataError(
            f"{name}: expected a list of objects or an object with a list under `data`.",
            "Write [{…}, {…}], or one object per line in a .jsonl file.",
        )
    return value


def _csv_rows(source: RowSource, path: Path) -> Rows:
    # Python's default limit of 128 KiB a cell is global; 2**31 - 1 is the most every platform takes.
    csv.field_size_limit(2**31 - 1)
    name, line, header = source.name, 1, None
    with _opened(name, path) as (raw, file):
        reader = csv.reader(_text_lines(name, path, file), strict=True)
        try:
            for cells in reader:
                source.done = raw.tell()
                start, line = line, reader.line_num + 1
                if not "".join(cells).strip() and len(cells) < 2:
                    continue
                if header is None:
                    header = _csv_header(cells, f"{name}, line {start}")
                elif len(cells) != len(header):
                    yield (
                        start,
                        RowError(
                            f"{name}, line {start}: {len(cells)} cells, but the header has {len(header)} columns.",
                            "Put cells that contain commas or line breaks in double quotes.",
                        ),
                    )
                else:
                    yield start, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{name}, line {line}: not valid CSV ({error}).", "Check the quotes in that row.") from None


def _text_lines(name: str, path: Path, file: IO[bytes]) -> Iterator[str]:
    """Lines of a text as they are, their ends included. Raises DataError, or RowError naming what is no UTF-8."""
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield from lines
    except UnicodeDecodeError:
        with _opened(name, path) as (_, again):
            _decode(name, again.read())
        raise
    finally:
        with suppress(ValueError):  # left in the middle, and the file is closed already
            lines.detach()


def _csv_header(cells: list[str], where: str) -> list[str]:
    """The column names, without the spaces that people write behind commas."""
    _check_commas(cells, where)
    header = [cell.strip() for cell in cells]
    if len(set(header)) < len(header):
        raise DataError(f"{where}: a column name appears twice.", "Rename one of them.")
    return header


def _check_commas(header: list[str], where: str) -> None:
    """Refuses what spreadsheets write as CSV where the comma is the decimal sign: guessing would go wrong silently."""
    used = next((named for sign, named in SEPARATORS.items() if sign in header[0]), None)
    if len(header) == 1 and used:
        raise DataError(
            f"{where}: the header is separated by {used}, not by commas.",
            "Save the file with commas (cells that contain some in double quotes), or as .jsonl.",
        )


def _open_parquet(name: str, path: Path, limit: int | None) -> RowSource:
    import pyarrow.parquet

    def make(source: RowSource) -> Rows:
        with boundary(f"{name} is not a readable Parquet file", DataError, "Write it again."):
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=AT_ONCE):
                for row in _arrow_rows(name, batch):
                    source.done += 1
                    yield source.done, row

    with boundary(f"{name} is not a readable Parquet file", DataError, "Write it again."):
        return RowSource(name, "row", pyarrow.parquet.ParquetFile(path).metadata.num_rows, make, limit)


def _open_hub(name: str, arguments: DataArguments, split: str) -> RowSource:
    table = _hub_table(name, arguments, split)
    label = ", ".join(filter(None, (name, arguments.dataset_config, split)))

    def make(source: RowSource) -> Rows:
        for start in range(0, len(table), AT_ONCE):
            for row in table.select(range(start, min(start + AT_ONCE, len(table)))).to_list():
                source.done += 1
                yield source.done, row

    return RowSource(label, "row", len(table), make, arguments.dataset_limit)


def _hub_table(name: str, arguments: DataArguments, split: str, *, streaming: bool = False) -> Any:
    """A split of a Hub dataset: `datasets.Dataset`, or with `streaming` `datasets.IterableDataset`."""
    import datasets

    lazily = {"streaming": True} if streaming else {}
    unreachable = _why_unreachable(name, arguments.dataset_revision)
    try:
        with _offline() if unreachable else nullcontext():
            return datasets.load_dataset(
                name, arguments.dataset_config, split=split, revision=arguments.dataset_revision, **lazily
            )
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        path = Path(name).expanduser()
        near = _near_files(path) if path.parent.is_dir() else ""
        why = one_line(unreachable or error)
        raise DataError(
            f"There is no file {name}, and no Hub dataset of that name could be reached ({why}).",
            f"{near} Check the name, the network and HF_HUB_OFFLINE; a private dataset needs `hf auth login`.".strip(),
        ) from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The Hub dataset {name}, split {split}, cannot be loaded: {one_line(error)}",
            "Check dataset_config, dataset_train_split and dataset_revision.",
        ) from None


def _why_unreachable(name: str, revision: str | None) -> Exception | None:
    """What stands between here and the Hub; None if it answers, be it with a refusal, which `load_dataset` words best.

    `load_dataset` by itself tries again and again, for 20 seconds and more, before it looks into its cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        HfApi().dataset_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except (HfHubHTTPError, HFValidationError):
        return None
    except (HTTPError, OSError) as error:
        return error
    return None


@contextmanager
def _offline() -> Iterator[None]:
    """`datasets` looks into its cache only."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
