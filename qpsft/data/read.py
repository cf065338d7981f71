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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qpsft.data.bad_rows import BadRow, RowError, refuse
from qpsft.errors import DataError, boundary, shown
from qpsft.recipe.arguments import DataArguments

TEXT_KINDS = (".jsonl", ".json", ".csv")
KINDS = (*TEXT_KINDS, ".parquet")
BUILT_IN = {"demo-noisy": "noisy", "demo-clean": "clean"}
STREAMED_AT_ONCE = 256
"""Rows of a Parquet file that are decoded together."""
HUB_TIMEOUT = 10
"""Seconds in which the Hub must answer, or be taken for out of reach."""
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
    return _numbered(name, list(rows), None)


def read_records(name: str, arguments: DataArguments, split: str = "train") -> Records:
    """Read the rows of `name`: a built-in set, a local file, or a Hub dataset (in this order).

    Args:
        name: "demo-noisy", "demo-clean", a path ending in .jsonl, .json, .csv (each also with .gz) or .parquet, or a
            Hub id. Anything that looks like a path is never looked up on the Hub.
        arguments: `dataset_limit` and, for the Hub, `dataset_config` and `dataset_revision` are used.
        split: split of a Hub or built-in set; a local file has only one and ignores it.

    Raises:
        DataError: nothing of that name, it cannot be read, or none of its lines is a row; names the file and line.
    """
    if name in BUILT_IN:
        return _read_built_in(name, arguments.dataset_limit, split)
    path = Path(name).expanduser()
    if path.exists():
        records = _read_file(name, path, arguments.dataset_limit)
    elif HUB_ID.fullmatch(name) and name[0] != "." and _kind(path) is None:
        records = _read_hub(name, arguments, split)
    else:
        raise DataError(f"There is no file {name}.", _near_files(path) or "Check dataset_name.")
    if not records.records:
        refuse(records.bad, name, len(records.bad))
        raise DataError(f"{name} is empty: there is no row in it.", "Write one demonstration per line or row.")
    return records


def stream_records(name: str, arguments: DataArguments) -> Iterator[tuple[int, dict | RowError]]:
    """The rows of `name` one by one, read as they are asked for: line or row number, and the row or why it is none.

    Args:
        name: a .jsonl (also .gz) or .parquet file, or a Hub id.
        arguments: `dataset_limit` and, for the Hub, `dataset_config`, `dataset_revision` and `dataset_train_split`.

    Raises:
        DataError: nothing of that name, another kind of file, or it cannot be read.
    """
    path = Path(name).expanduser()
    if name in BUILT_IN:
        rows = enumerate(_read_built_in(name, None, "train").records, start=1)
    elif path.is_file() and _kind(path) == ".jsonl":
        rows = _stream_jsonl(name, path)
    elif path.is_file() and _kind(path) == ".parquet":
        rows = enumerate(_stream_parquet(name, path), start=1)
    elif path.exists():
        raise DataError(f"{name} cannot be streamed.", "Convert it to .jsonl or .parquet, or leave streaming out.")
    elif HUB_ID.fullmatch(name) and name[0] != "." and _kind(path) is None:
        rows = enumerate(_stream_hub(name, arguments), start=1)
    else:
        raise DataError(f"There is no file {name}.", _near_files(path) or "Check dataset_name.")
    return islice(rows, arguments.dataset_limit)


def stream_unit(name: str) -> str:
    """What the numbers of `stream_records` count: "line" or "row"."""
    return "line" if _kind(Path(name)) == ".jsonl" else "row"


def _stream_jsonl(name: str, path: Path) -> Iterator[tuple[int, dict | RowError]]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):  # split at \n only, as a JSON string may hold U+2028
                where = f"{name}, line {number}"
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    yield number, _json_object(line.decode("utf-8"), where)
                except UnicodeDecodeError:
                    yield number, RowError(f"{where}: not valid UTF-8.", "Save the file as UTF-8.")
                except RowError as error:
                    yield number, error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name} cannot be read: {reason}.", "Check the file and its permissions.") from None


def _stream_parquet(name: str, path: Path) -> Iterator[dict]:
    import pyarrow.parquet

    with boundary(f"{name} is not a readable Parquet file", DataError, "Write it again."):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=STREAMED_AT_ONCE):
            yield from _arrow_rows(name, batch)


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
            f"The Hub dataset {name} can be read no further: {_one_line(error)}",
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


def _read_built_in(name: str, limit: int | None, split: str) -> Records:
    from qpsft.data import built_in

    records = built_in.demonstrations(BUILT_IN[name]) if split == "train" else built_in.in_domain(split, n=200)
    records = records[:limit]
    return Records(name, "row", list(range(1, len(records) + 1)), records)


def _read_file(name: str, path: Path, limit: int | None) -> Records:
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
    try:
        if kind == ".parquet":
            return _numbered(name, _parquet_rows(name, path), limit)
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name} cannot be read: {reason}.", "Check the file and its permissions.") from None
    text = _decode(name, data)
    if kind == ".jsonl":
        return _jsonl_rows(name, text, limit)
    if kind == ".csv":
        return _csv_rows(name, text, limit)
    return _numbered(name, _json_rows(name, text), limit)


def _numbered(name: str, rows: list, limit: int | None) -> Records:
    records = Records(name, "row", [], [])
    for number, row in enumerate(rows[:limit], start=1):
        if isinstance(row, dict):
            records.numbers.append(number)
            records.records.append(row)
        else:
            records.bad.append(BadRow(number, _not_an_object(f"{name}, row {number}", row)))
    return records


def _not_an_object(where: str, value: object) -> RowError:
    text = json.dumps(value, default=str)
    shown = text if len(text) <= 40 else text[:40] + "…"
    return RowError(f"{where}: expected an object with named columns, found {shown}", 'Write rows as {"prompt": …, …}.')


def _decode(name: str, data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name} is UTF-16 text; qpsft reads UTF-8.", "Save it as UTF-8 (CSV UTF-8 in a spreadsheet).")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = error.start - data.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{name}, line {line}: byte {byte} of the line (0x{data[error.start]:02x}) is not valid UTF-8.",
            "Save the file as UTF-8; `iconv -f WINDOWS-1252 -t UTF-8` converts the usual other encoding.",
        ) from None


def _jsonl_rows(name: str, text: str, limit: int | None) -> Records:
    records = Records(name, "line", [], [])
    # Not splitlines(): JSON strings may hold U+2028, form feeds and other characters it would split at.
    lines = ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
    for number, line in islice(lines, limit):
        try:
            record = _json_object(line, f"{name}, line {number}")
        except RowError as error:
            if number == 1 and line.strip() == "[":
                raise DataError(
                    f"{name}, line 1: a JSON list begins here, not a row.", "The file is one JSON list: name it .json."
                ) from None
            records.bad.append(BadRow(number, error))
        else:
            records.numbers.append(number)
            records.records.append(record)
    return records


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


def _csv_rows(name: str, text: str, limit: int | None) -> Records:
    # Python's default limit of 128 KiB a cell is global; 2**31 - 1 is the most every platform takes.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    records = Records(name, "line", [], [])
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not "".join(cells).strip() and len(cells) < 2:
                continue
            if header is None:
                header = _csv_header(cells, f"{name}, line {start}")
                continue
            if limit is not None and len(records.records) + len(records.bad) == limit:
                break
            if len(cells) != len(header):
                error = RowError(
                    f"{name}, line {start}: {len(cells)} cells, but the header has {len(header)} columns.",
                    "Put cells that contain commas or line breaks in double quotes.",
                )
                records.bad.append(BadRow(start, error))
                continue
            records.numbers.append(start)
            records.records.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{name}, line {line}: not valid CSV ({error}).", "Check the quotes in that row.") from None
    return records


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


def _parquet_rows(name: str, path: Path) -> list[dict]:
    import pyarrow.parquet

    with boundary(f"{name} is not a readable Parquet file", DataError, "Write it again."):
        return _arrow_rows(name, pyarrow.parquet.read_table(path))


def _read_hub(name: str, arguments: DataArguments, split: str) -> Records:
    table = _hub_table(name, arguments, split)
    if arguments.dataset_limit is not None:
        table = table.select(range(min(arguments.dataset_limit, len(table))))
    label = ", ".join(filter(None, (name, arguments.dataset_config, split)))
    return _numbered(label, table.to_list(), None)


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
        why = _one_line(unreachable or error)
        raise DataError(
            f"There is no file {name}, and no Hub dataset of that name could be reached ({why}).",
            f"{near} Check the name, the network and HF_HUB_OFFLINE; a private dataset needs `hf auth login`.".strip(),
        ) from None
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The Hub dataset {name}, split {split}, cannot be loaded: {_one_line(error)}",
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


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + "…"
