"""Reading a column of numbers from npy, csv or parquet, for `offramp threshold`."""

from __future__ import annotations

import csv
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.errors import InputError, StorageError

SUFFIXES = (".npy", ".csv", ".parquet")
_TRUTH = {"true": 1, "false": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


def read_column(path: Path, column: str | None, fallbacks: tuple[str, ...]) -> NDArray[Any]:
    """Read one array from a file.

    Parameters
    ----------
    path : Path
        An array in .npy, or a table in .csv or .parquet.
    column : str or None
        The table's column; None takes the only one, or the first of `fallbacks` the table has.

    Returns
    -------
    numpy.ndarray
        (N,), or (K, N) from .npy.  A csv column of true/false comes back as 0 and 1.

    Raises
    ------
    StorageError
        The file is missing or is not what its name says.
    InputError
        The table has no such column, or the name ends in none of .npy, .csv, .parquet.
    """
    if not path.is_file():
        raise StorageError(f"{path}: there is no such file")
    if path.suffix == ".npy":
        return _read_npy(path)
    if path.suffix == ".csv":
        return _read_csv(path, column, fallbacks)
    if path.suffix == ".parquet":
        return _read_parquet(path, column, fallbacks)
    raise InputError(f"{path}: give a file that ends in {', '.join(SUFFIXES)}")


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise StorageError(
            f"{path}: this is not a complete npy array of numbers; save it again with numpy.save"
        ) from error
    return np.asarray(array)


def _read_csv(path: Path, column: str | None, fallbacks: tuple[str, ...]) -> NDArray[Any]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            first, second = next(reader, []), next(filter(None, reader), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise StorageError(f"{path}: this is not a csv table in UTF-8") from error
    if not first:
        raise StorageError(f"{path}: the file is empty")
    headed = not all(_is_value(cell) or cell.strip().lower() in _TRUTH for cell in first)
    if headed and not second:
        raise StorageError(f"{path}: there are no rows under its header")
    names = [cell.strip() for cell in first] if headed else [str(place) for place in range(len(first))]
    place = names.index(_choose(path, names, column, fallbacks))
    layout: dict[str, Any] = {
        "delimiter": ",",
        "quotechar": '"',
        "skiprows": int(headed),
        "usecols": place,
        "ndmin": 1,
        "encoding": "utf-8-sig",
    }
    try:
        return np.loadtxt(path, dtype=np.float64, **layout)
    except ValueError:
        pass
    try:
        return _parse(path, np.loadtxt(path, dtype=str, **layout).tolist(), first_line=1 + int(headed))
    except ValueError as error:
        raise StorageError(
            f"{path}: a row lacks column {names[place]!r}; give every row as many cells as the first"
        ) from error


def _parse(path: Path, cells: list[str], first_line: int) -> NDArray[np.int8]:
    known = [_TRUTH.get(cell.strip().lower()) for cell in cells]
    if None in known:
        words = [row for row, cell in enumerate(cells) if not _is_value(cell) and known[row] is None]
        row = words[0] if words else known.index(None)
        raise StorageError(
            f"{path}: line {first_line + row} holds {cells[row]!r}; give numbers only, or true and false only"
        )
    return np.array(known, np.int8)


def _is_value(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, column: str | None, fallbacks: tuple[str, ...]) -> NDArray[Any]:
    for module, read in (("pyarrow", _with_pyarrow), ("polars", _with_polars)):
        if find_spec(module) is not None:
            return read(path, column, fallbacks)
    raise InputError(
        f"{path}: reading parquet needs pyarrow or polars: run `pip install pyarrow`, or save it as .npy"
    )


def _with_pyarrow(path: Path, column: str | None, fallbacks: tuple[str, ...]) -> NDArray[Any]:
    pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")

    try:
        file = parquet.ParquetFile(path)
        name = _choose(path, file.schema_arrow.names, column, fallbacks)
        return np.asarray(file.read(columns=[name])[name].to_numpy())
    except pyarrow.ArrowInvalid as error:
        raise StorageError(f"{path}: this is not a complete parquet file") from error


def _with_polars(path: Path, column: str | None, fallbacks: tuple[str, ...]) -> NDArray[Any]:
    polars = import_module("polars")

    try:
        name = _choose(path, list(polars.read_parquet_schema(path)), column, fallbacks)
        return np.asarray(polars.read_parquet(path, columns=[name])[name].to_numpy())
    except polars.exceptions.ComputeError as error:
        raise StorageError(f"{path}: this is not a complete parquet file") from error


def _choose(path: Path, names: list[str], column: str | None, fallbacks: tuple[str, ...]) -> str:
    if column is not None:
        if column not in names:
            raise InputError(f"{path}: there is no column {column!r}; its columns are {', '.join(names)}")
        return column
    if len(names) == 1:
        return names[0]
    for name in fallbacks:
        if name in names:
            return name
    raise InputError(f"{path}: name the column to read; its columns are {', '.join(names)}")
