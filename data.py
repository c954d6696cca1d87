"""Corpora, benchmarks, the tokenizer, the token store and batches: everything between files and arrays of token ids.

    record   a line of a corpus: code, often with a text that describes it
    item     the unit of tokenisation: a record of a corpus, a distinct text of a benchmark, a window of tagged words
    sample   what a model reads of an item in one epoch, at most ctx ids: <s> code </s>, or <s> text </s> code </s>
    example  one or two items, often with a label; a batch consists of examples
    draw     a number in [0, 1), a hash of (seed, epoch, item, position). No generator has a state, so a resumed run,
             another rank and another batch size see the same draws.
"""
import array
import ast
import base64
import bisect
import bz2
import codecs
import csv
import glob
import gzip
import html
import io
import itertools
import json
import lzma
import math
import os
import re
import subprocess
import symtable
import sys
import sysconfig
import tempfile
import threading
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator, NamedTuple

import click
import numpy as np
import tokenizers
import torch.distributed as dist
from tqdm import tqdm

CODE_FIELDS = ("code", "content", "func_code_string", "whole_func_string", "func", "function", "src",
               "original_string")
TEXT_FIELDS = ("docstring", "func_documentation_string", "nl", "doc", "query", "text")
SPLITS = ("train", "valid", "test")
HELD_OUT = 1024  # records of a corpus that an evaluation during pretraining reads at most
MAX_LINE = 16_000_000  # bytes, unless --max-line says otherwise
MAX_FILE = 1_000_000_000  # bytes of a file that is read as a whole
MAX_RATIO = 100  # a compressed file may unpack to this many times its size
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
STARCODER = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")


# ---- errors, progress, files ------------------------------------------------------------------------

class Problem(click.ClickException):
    """An error that ends a command with one sentence and an exit code; control characters are printed escaped.

    2 is wrong usage or input, 1 a failure; 129, 130 and 143 are interruptions, which rank 0 alone reports.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(printable(message))
        self.exit_code = exit_code

    def show(self, file=None):
        if rank() == 0 or self.exit_code < 128:
            tqdm.write(self.message if self.exit_code > 128 else f"Error: {self.message}", file=sys.stderr)


def printable(message: str) -> str:
    """The message with control characters escaped: what it quotes from data may hold some."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], message)


class BadLine(ValueError):
    """What is wrong with one line of a file."""


class QuietStream:
    """Standard error that cannot end a run: after a write fails (closed, full, no reader), it discards everything."""

    def __init__(self, stream: io.TextIOBase | None):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name: str):
        def quietly(*args):
            try:
                return getattr(self.stream, name)(*args)
            except (OSError, ValueError):
                self.stream = open(os.devnull, "w")

        return quietly if name in ("write", "flush") else getattr(self.stream, name)


def info(message: str) -> None:
    """Print one line for people on standard error, clear of any progress bar. Only rank 0 prints."""
    if rank() == 0:
        tqdm.write(printable(message), file=sys.stderr)


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A progress bar on standard error. It appears after two seconds and is rarely redrawn if that is a file."""
    return tqdm(iterable, **dict(delay=2, mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True,
                                 unit_scale=True, file=sys.stderr, disable=rank() > 0) | options)


def human_bytes(count: float) -> str:
    """A number of bytes for people: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.{0 if unit == 'bytes' else 1}f} {unit}"
        count /= 1000


def counted(count: int, noun: str) -> str:
    """A number of things for people: 1 file, 2 files."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def listed(names: Iterable[object], most: int = 3) -> str:
    """The names for a sentence, at most `most` of them."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends; if anything fails, `path` stays. Raises `Problem`."""
    name, path = path, os.path.realpath(path)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        cause = error.__context__ if type(error) is RuntimeError else error  # torch turns a failed write into one
        if isinstance(cause, OSError) and cause.filename in (None, temporary):
            left = "the file of that name is as it was" if os.path.exists(path) else "nothing was left there"
            raise Problem(f"could not write {name}: {cause.strerror}; {left}", 1) from None
        raise
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def check_writable(path: str | os.PathLike, option: str = "-o") -> None:
    """Raise a `Problem` unless a file can be written at `path`, the value of `option`."""
    if not path or os.path.exists(path) and not os.path.isfile(path):
        what = "a folder" if os.path.isdir(path) else "no plain file"
        raise Problem(f"{path or 'an empty name'} is {what}: give {option} the name of a file")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise Problem(f"cannot write {path}: there is no folder {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
        with suppress(FileNotFoundError):
            os.lstat(f"{os.path.realpath(path)}.state.tmp")  # the longest name that is written beside it
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from None


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file of at most a gigabyte; raises `Problem`."""
    try:
        if os.path.getsize(path) > MAX_FILE:
            raise Problem(f"{path}: over {human_bytes(MAX_FILE)}")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{path}: {getattr(error, 'strerror', None) or 'not text in UTF-8'}") from None


def rank() -> int:
    """The number of this process, over all hosts, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes over all hosts."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(value) -> list:
    """The values of all ranks, on every rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """The value of rank 0, on every rank."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


# ---- corpora ----------------------------------------------------------------------------------------

COMPRESSED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}  # by their first bytes
ZSTD = b"\x28\xb5\x2f\xfd"
JSON_LINES = re.compile(r".+\.(jsonl|jsonlines|json)(\.gz|\.bz2|\.xz|\.zst)?|.+\.zip", re.IGNORECASE)
METRICS_LOG = b'{"step": '  # the first bytes of the log that a run writes beside its checkpoint


class Source(NamedTuple):
    """A file of lines: plain, compressed by gzip, bzip2 or xz, or one member of a zip archive."""
    name: str  # as the user knows it
    path: str
    mark: str  # `mark_of` the file; "-" if the content cannot be read again, as of a pipe
    member: str = ""

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """(the unpacked stream, the file itself, whose position tells how much was read); raises `Problem`."""
        try:
            with open(self.path, "rb") as file:
                stream = zipfile.ZipFile(file).open(self.member) if self.member else file
                start = stream.peek(6)[:6]
                if start.startswith(ZSTD):
                    raise Problem(f"{self.name} is compressed by zstd, which is not read here: `zstd -d` unpacks it")
                if start.startswith(b"PAR1"):
                    raise parquet(self.name)
                for magic, library in COMPRESSED.items():
                    if start.startswith(magic):
                        stream = library.open(stream, "rb")
                yield stream, file
        except (OSError, EOFError, KeyError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise Problem(f"{self.name}: {getattr(error, 'strerror', None) or f'not a whole file ({error})'}") from None

    def lines(self, longest: int, bar: tqdm) -> Iterator[tuple[int, "bytes | BadLine"]]:
        """(line number from 1, line) of each line that is not blank; raises `Problem`.

        A line of more than `longest` bytes comes as a `BadLine`. A bomb (see `MAX_RATIO`) or a changed file is refused.
        `bar` shows how much of the file is read.
        """
        start, number, unpacked, line = bar.n, 0, 0, b""
        with self.open() as (stream, file):
            self.check_unchanged(file)
            while (part := stream.readline(longest + 1)) or line:
                unpacked, position = unpacked + len(part), file.tell()
                bar.update(start + position - bar.n)
                if unpacked > longest + MAX_RATIO * position:
                    raise Problem(f"{self.name}: unpacks to more than {MAX_RATIO} times its size: unpack it yourself")
                line = line or part
                if len(part) > longest and not part.endswith(b"\n"):
                    continue  # a line that is too long goes on
                number += 1
                if len(line.rstrip(b"\n")) > longest:
                    yield number, BadLine(f"a line of more than {human_bytes(longest)} (--max-line takes longer ones)")
                elif not line.isspace():
                    yield number, line
                line = b""
            self.check_unchanged(file)

    def check_unchanged(self, file: BinaryIO) -> None:
        """Raise a `Problem` if the open file has changed since it was found."""
        if self.mark not in ("-", mark_of(file)):
            raise changed(self.name)


def mark_of(file: BinaryIO) -> str:
    """The size of an open file and a CRC of 64 blocks of 64 kB: what is cheap to compare, and outlives a copy."""
    size, crc = os.fstat(file.fileno()).st_size, 0
    for place in np.linspace(0, max(0, size - 2 ** 16), 64 if size > 2 ** 22 else -(-size // 2 ** 16)).astype(int):
        crc = zlib.crc32(os.pread(file.fileno(), 2 ** 16, place), crc)
    return f"{size} bytes, CRC {crc:08x}"


def changed(names: str) -> Problem:
    """The error of files that are no longer what they were when the run began."""
    return Problem(f"{names} changed while it was being read" + ", or is not that of rank 0" * (rank() > 0), 1)


@cache
def temporary_folder() -> tempfile.TemporaryDirectory:
    """A folder of this process, removed when it exits."""
    return tempfile.TemporaryDirectory(prefix="codessm-", ignore_cleanup_errors=True)


def spool(name: str, stream: BinaryIO) -> Source:
    """A temporary copy of a stream that can be read only once; raises `Problem`."""
    handle, path = tempfile.mkstemp(dir=temporary_folder().name)
    try:
        with open(handle, "wb") as out, progress(desc=f"reading {name}", unit="B") as bar:
            while block := stream.read(1 << 20):
                out.write(block)
                bar.update(len(block))
    except OSError as error:
        raise Problem(f"no room to keep {name} in {path} (TMPDIR chooses the folder): {error.strerror}", 1) from None
    return Source(name, path, "-")


def open_source(name: str) -> Source:
    """The `Source` of one file, of a pipe, or of - for standard input; raises `Problem`."""
    if name == "-":
        return spool("standard input", sys.stdin.buffer)
    try:
        with open(name, "rb") as file:
            return Source(name, name, mark_of(file)) if os.path.isfile(name) else spool(name, file)
    except OSError as error:
        raise Problem(f"{name}: {error.strerror}") from None


def find_sources(paths: Iterable[str]) -> list[Source]:
    """The corpus files behind files, folders, globs and -, in order, each once; raises `Problem`.

    A folder gives the files below it whose names match `JSON_LINES`. Links are followed once; hidden files, `__MACOSX`,
    empty files, source files and metrics logs are passed over. A zip archive gives its members.
    """
    names: dict[str, str] = {}  # real path -> name
    for path in map(str, paths):
        exists = path == "-" or os.path.exists(path)
        matches = [path] if exists else [name for name in sorted(glob.glob(path, recursive=True))
                                         if "__MACOSX" not in Path(name).parts]
        found = []
        for match in matches:
            folder = os.path.isdir(match)
            files = filter(JSON_LINES.fullmatch, walk(match)) if folder else [match] * (not language_of(match))
            found += [file for file in files if exists and not folder or not is_log(file)]
        if not found:
            if file := next(filter(None, map(find_parquet, matches)), None):
                raise parquet(file)
            if not matches:
                raise Problem(f"{path}: no such file")
            raise Problem(f"{path}: no file of JSON lines (.jsonl, .jsonlines, .json, compressed or in a .zip); "
                          f"`codessm corpus {path} -o corpus.jsonl` makes one of source files")
        for name in found:
            names.setdefault(os.path.realpath(name), name)
    return [member for name in names.values() for member in members(open_source(name))]


def members(source: Source) -> list[Source]:
    """The source itself, or if it is a zip archive the files of JSON lines in it; raises `Problem`."""
    if not zipfile.is_zipfile(source.path):
        return [source]
    with source.open() as (_, file):
        names = [name for name in zipfile.ZipFile(file).namelist() if JSON_LINES.fullmatch(name) and visible(name)]
    if not names:
        raise Problem(f"{source.name}: no file of JSON lines in this archive")
    return [source._replace(name=f"{source.name}/{name}", member=name) for name in names]


def parquet(path: str | os.PathLike) -> Problem:
    """The error of a Parquet file, with the line that exports it: CoIR's qrels become a table, others JSONL."""
    name = re.split(r"-\d{5}-of-|\.parquet$", os.path.basename(path))[0]  # corpus-00000-of-00001-1a2b.parquet
    out = f"to_csv('qrels/{name}.tsv', sep='\\t', index=False)" if "qrels" in os.path.abspath(path) else \
        f"to_json('{name}.jsonl', orient='records', lines=True)"
    return Problem(f"{path} is Parquet, which is not read here: "
                   f"`python -c \"import pandas; pandas.read_parquet('{path}').{out}\"` exports it")


def find_parquet(folder: str | os.PathLike) -> str | None:
    """The first Parquet file below a folder."""
    return next((path for path in walk(folder) if path.lower().endswith(".parquet")), None)


def visible(path: str) -> bool:
    """True unless a part of the path is hidden or is __MACOSX, where archives made by macOS keep file attributes."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in Path(path).parts)


def walk(root: str, skipped: Callable[[str, str], bool] = lambda folder, name: False) -> Iterator[str]:
    """The visible files below a folder but those in `skipped(folder, name)` folders; no linked folder comes twice."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if visible(name) and not skipped(folder, name))
        yield from (os.path.join(folder, file) for file in sorted(files) if visible(file))


def is_log(path: str) -> bool:
    """True for what is no plain file, for an empty file and for a metrics log, which may lie beside a corpus."""
    if not os.path.isfile(path):
        return True
    with open(path, "rb") as file:
        return file.read(len(METRICS_LOG)) in (b"", METRICS_LOG)


def standard_library() -> Source:
    """The standard library of the running interpreter, which is the default corpus."""
    path = os.path.join(temporary_folder().name, "standard-library.jsonl")
    with open(path, "wb") as out:
        build_corpus([STANDARD_LIBRARY], out)
    return open_source(path)._replace(name=f"standard library of Python {sys.version.split()[0]}")


@dataclass
class Records:
    """The parsed lines of some files. Each iteration reads the files again, with one line in memory at a time.

    Iteration gives (number of the source, parsed line). The caller may `reject` the record that it has just got.
    """
    sources: list[Source]  # from `find_sources`
    parse: Callable[[bytes], object]  # of a line; None passes over it; raises `BadLine`
    limit: int | None = None  # records of each file
    skip_bad: bool = False  # count bad lines, where otherwise the first raises a `Problem`
    longest: int = MAX_LINE  # bytes of a line
    bad = 0  # lines passed over in the latest iteration
    checksum = None  # a CRC of all lines, from the first whole iteration on; a `Problem` in a later one that differs

    def __iter__(self) -> Iterator[tuple[int, object]]:
        self.bad = checksum = 0
        total = sum(os.path.getsize(path) for path in {source.path for source in self.sources})
        with progress(total=total, desc="reading records", unit="B") as bar:
            for place, self.source in enumerate(self.sources):
                read = 0
                for self.line_number, line in self.source.lines(self.longest, bar):
                    if read == self.limit:
                        break
                    try:
                        if isinstance(line, BadLine):
                            raise line
                        checksum = zlib.crc32(line, checksum)
                        parsed = self.parse(line)
                    except BadLine as error:
                        self.reject(error)
                        continue
                    if parsed is not None:
                        read += 1
                        yield place, parsed
        if self.checksum not in (None, checksum):
            raise changed(listed(source.name for source in self.sources))
        self.checksum = checksum

    def reject(self, error: BadLine) -> None:
        """Count the current line as bad, or raise a `Problem` that names it."""
        self.last_bad = f"{self.source.name}:{self.line_number}: {error}"
        if not self.skip_bad:
            raise Problem(self.last_bad)
        self.bad += 1

    def none_found(self) -> Problem:
        """The error of files without any record."""
        return Problem(f"{listed(source.name for source in self.sources)}: no records"
                       + (f"; {self.passed_over()}" if self.bad else ": it is empty"))

    def passed_over(self) -> str:
        """What is said of the bad lines."""
        return f"{counted(self.bad, 'bad line')} passed over; the last is {self.last_bad}"


def read_records(path: str, parse: Callable[[bytes], object], quiet: bool = False, **reading
                 ) -> Iterator[tuple[str, int, object]]:
    """(source, line number, parsed line) of the files of `find_sources`, as `Records` reads them.

    Unless `quiet`, prints how many lines were passed over.
    """
    records = Records(find_sources([path]), parse, **reading)
    for _, parsed in records:
        yield records.source.name, records.line_number, parsed
    if records.bad and not quiet:
        info(records.passed_over())


JSON_KIND = {list: "an array", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}


def parse_json(line: bytes) -> dict:
    """The JSON object of one line; raises `BadLine`."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        raise BadLine(f"not JSON: {str(error).split(';')[0]}") from None
    if not isinstance(record, dict):
        raise BadLine(f"{JSON_KIND.get(type(record), 'a number')}, not a JSON object")
    return record


def well_formed(string: str) -> str:
    """The string with lone surrogates replaced. JSON and Python can spell them, UTF-8 cannot."""
    return string if string.isascii() else string.encode("utf-8", "replace").decode()


def as_string(value: object) -> str:
    """a string"""
    if not isinstance(value, str):
        raise TypeError
    return well_formed(value)


def as_list(value: object) -> list:
    """a list"""
    if not isinstance(value, list):
        raise TypeError
    return value


def as_words(value: object) -> list[str]:
    """a list of strings"""
    return [as_string(word) for word in as_list(value)]


def as_text(value: object) -> str:
    """a string or a list of strings"""
    text = " ".join(as_words(value)) if isinstance(value, list) else as_string(value)
    if not text.strip():
        raise BadLine("the text or code is empty")
    return text


def as_label(value: object) -> str:
    """a name or a whole number"""
    if isinstance(value, bool) or isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        raise TypeError
    return well_formed(str(value))


def field(record: dict, names: Iterable[str], kind: Callable[[object], object] = as_string, required: bool = True):
    """The first of the named fields that is there and not null, as a `kind`; None if none is `required`.

    A `kind` converts a value or raises TypeError; its docstring says what it wants. Raises `BadLine`.
    """
    names = [name for name in names if name in record] or list(dict.fromkeys(names))
    for name in names:
        if record.get(name) is not None:
            try:
                return kind(record[name])
            except TypeError:
                value = JSON_KIND.get(type(record[name]), f"the number {record[name]}")
                raise BadLine(f'the field "{name}" is {value}, not {kind.__doc__}') from None
    if required:
        wanted = " or ".join(f'"{name}"' for name in names)
        raise BadLine(f"the field {wanted} is null" if names[0] in record else
                      f"no field {wanted}; the fields seen are: {listed(record, 12) or 'none'}")


# a docstring: a string alone on its lines, after a line that ends with a colon
DOCSTRING = re.compile(r"(?<=:)([ \t]*(?:#[^\n]{0,200})?\n\s*)([rRuU]?(?:"
                       r"""("{3}|'{3})[^\\"']*(?:(?:\\.|(?!\3)["'])[^\\"']*)*\3|"""
                       r"""(["'])(?!\4)[^\\\n"']*(?:(?:\\.|(?!\4)["'])[^\\\n"']*)*\4))[ \t]*(?:#[^\n]*)?(?=\n|\Z)""",
                       re.DOTALL)


def separate_docstring(text: str, code: str) -> tuple[str, str]:
    """(text, code) in which the text occurs once: CodeSearchNet's Python code, say, holds its docstring too.

    A docstring with the text's letters and digits is cut out of the code; a text elsewhere in the code is dropped.
    """
    def letters(string: str) -> str:
        return re.sub(r"\W+", "", string)

    text, key = text.strip(), letters(text)
    if not key or key not in letters(code) and "\\" not in code:
        return text, code
    for found in DOCSTRING.finditer(code):
        literals = [found[2]]
        if "\\" in found[2]:
            with suppress(SyntaxError, ValueError):
                literals.append(str(ast.literal_eval(parse_python(found[2]).body[0].value)))
        if any(key in letters(literal) for literal in literals):
            return text, cut_literal(code, *found.span(2))
    return ("", code) if text in code else (text, code)


def cut_literal(code: str, begin: int, end: int) -> str:
    """Code without the docstring code[begin:end]. Its lines go too, unless a statement or a comment shares them.

    A docstring that nothing follows but comments is the whole body, and becomes `pass`.
    """
    if not re.sub("#.*", "", code[end:]).strip():
        return f"{code[:begin]}pass{code[end:]}"
    first = code.rfind("\n", 0, begin) + 1
    last = re.compile(r"[ \t]*").match(code, end).end()
    if code.startswith("\n", last) and not code[first:begin].strip():
        return code[:first] + code[last + 1:]
    return code[:begin] + code[re.compile(r"[ \t]*;?[ \t]*").match(code, end).end():]


class Split(NamedTuple):
    """The examples of one split, made of numbered items."""
    examples: np.ndarray                  # (n, k) int64: the items of each example, k = 1 or 2
    labels: np.ndarray | None = None      # (n,) int64, of classification and pairs
    names: list | None = None             # what each example calls itself, for a file of predictions
    queries: np.ndarray | None = None     # of retrieval, (Q,): the item of each query
    query_names: list | None = None
    candidates: np.ndarray | None = None  # (C,): the items that are ranked, each text once
    candidate_names: list | None = None
    right: np.ndarray | None = None       # (m, 2): the places in queries and in candidates of each right answer

    def items(self) -> np.ndarray:
        """The distinct items. An evaluation encodes each of them once."""
        parts = [self.examples.ravel()] if self.candidates is None else [self.queries, self.candidates]
        return np.unique(np.concatenate(parts))


class Sequence(NamedTuple):
    """What the token store holds of an item."""
    number: int  # of the item; of a window, of its file
    ids: list[int]  # without the last </s>
    head: int = 1  # so many of the ids begin every sample: <s>, or <s> text </s>
    tags: list[tuple[int, int]] = []  # (place in ids, label number) of a window's labelled words


class Dataset:
    """What is read for a task: `Split`s of numbered items, whose texts are read again in each pass."""
    splits: dict[str, Split]
    records: Records
    sources: list[Source]
    labels: list[str] = []  # of the task
    reading: dict = {}  # how the files are read
    count = 0  # items
    bad = 0  # lines passed over
    checksum = 0  # of all lines
    bytes = 0  # about the size of all texts
    windows = False  # whether items are files of words, whose windows are numbered when they are tokenised

    def texts(self) -> Iterator[object]:
        """The text of each item, in the order of their numbers."""
        raise NotImplementedError

    def strings(self, text: object) -> tuple[str, str]:
        """(text, code) of one of the `texts`, the text being "" where there is none."""
        return "", text

    def bad_lines(self) -> str:
        """How many bad lines were passed over, for the end of a description; "" if none."""
        return f"; {counted(self.bad, 'bad line')} passed over" * (self.bad > 0)

    def select(self, wanted: np.ndarray) -> Iterator[object]:
        """The texts of the wanted items, which are sorted."""
        return itertools.compress(self.texts(), np.isin(np.arange(wanted.max(initial=-1) + 1), wanted))

    def items_read(self, steps: int | None, batch: int, seed: int) -> np.ndarray:
        """The sorted items that a run of so many steps reads: few of them if it ends within its first epoch."""
        examples = self.splits["train"].examples
        if steps and not self.windows:
            pools = -(-steps // Batches.POOL)
            examples = examples[shuffled(len(examples), seed, 0)[:pools * Batches.POOL * batch]]
        evaluated = [split.items() for name, split in self.splits.items() if name != "train"]
        return np.unique(np.concatenate([examples.ravel(), *evaluated]))

    def sequences(self, tokenizer: "Tokenizer", ctx: int, wanted: np.ndarray, whole: bool) -> Iterator[Sequence]:
        """The ids of the wanted items, in order: <s> code or <s> text </s> code, at most ctx - 1 of them.

        Text and its special tokens take at most half of ctx. With `whole` all code comes, for windows anywhere in it.
        """
        numbers, room = map(int, wanted), ctx // 2 - 2
        for block in blocks(map(self.strings, self.select(wanted))):
            texts, codes = zip(*block)
            for text, code, number in zip(tokenizer.encode_many(texts, room),
                                          tokenizer.encode_many(codes, None if whole else ctx), numbers):
                head = [tokenizer.start, *text[:room], tokenizer.end] if text else [tokenizer.start]
                yield Sequence(number, head + (code if whole else code[:ctx - 1 - len(head)]), len(head))


def blocks(pairs: Iterable[tuple[str, str]]) -> Iterator[list]:
    """Lists of successive pairs, about a million characters each: what the tokenizers library encodes in parallel."""
    block, characters = [], 0
    for pair in pairs:
        block.append(pair)
        characters += sum(map(len, pair))
        if characters > 2 ** 20 or len(block) == 2 ** 13:
            yield block
            block, characters = [], 0
    if block:
        yield block


class Corpus(Dataset):
    """JSONL files of (text, code) records for masked language modelling. An item is a record. Raises `Problem`.

    Held out is 1 % of the records, by a hash of the line; of fewer than 3,200 a tenth, 32 at most. The validation split
    has at most `most_valid` of them, the test split is the whole corpus. `code_field` and `text_field` replace the
    known names of fields; `reading` are `limit`, `skip_bad` and `longest` of `Records`.
    """

    def __init__(self, sources: list[Source], code_field: str | None = None, text_field: str | None = None,
                 most_valid: int | None = None, **reading):
        self.code_fields = (code_field,) if code_field else (*CODE_FIELDS, "text")  # a text alone is code
        self.text_fields = (text_field,) if text_field else TEXT_FIELDS
        self.reading = dict(fields=(code_field, text_field), **reading)
        self.sources, self.records = sources, Records(sources, self.parse, **reading)
        checksums, texts = array.array("I"), 0
        for _, (text, code, checksum) in self.records:
            checksums.append(checksum)
            texts += bool(text)
            self.bytes += len(text) + len(code)
        self.bad, self.count, self.checksum = self.records.bad, len(checksums), self.records.checksum
        if not self.count:
            raise self.records.none_found()
        if text_field and not texts:
            raise Problem(f'{listed(source.name for source in sources)}: no record has the field "{text_field}" '
                          "given with --text-field")
        held = np.array(checksums) % 100 == 0
        least = min(32, max(1, self.count // 10), self.count - 1)
        if held.sum() < least:
            held = np.isin(np.arange(self.count), np.argsort(checksums, kind="stable")[:least])
        valid = np.flatnonzero(held)
        some = np.linspace(0, len(valid) - 1, min(most_valid or len(valid), len(valid))).astype(int)
        self.splits = {"train": Split(np.flatnonzero(~held)[:, None]), "valid": Split(valid[some, None]),
                       "test": Split(np.arange(self.count)[:, None])}

    def parse(self, line: bytes) -> tuple[str, str, int]:
        """(text, code, hash) of one line, the text being "" where there is none; raises `BadLine`."""
        record = parse_json(line)
        code = field(record, self.code_fields)
        text = field(record, self.text_fields, required=False)
        if text == code:  # the field `text` alone
            text = None
        code = STARCODER.sub("", code)
        if not code.strip():
            raise BadLine("the code is empty")
        return *separate_docstring(text or "", code), zlib.crc32(line.strip())

    def texts(self) -> Iterator[tuple[str, str]]:
        for _, (text, code, _) in self.records:
            yield text, code

    def strings(self, text: tuple[str, str]) -> tuple[str, str]:
        return text

    def description(self) -> str:
        parts = [f"{len(split.examples):,} for {name}" for name, split in self.splits.items()]
        return (f"{listed(source.name for source in self.sources)}: {counted(self.count, 'record')}, "
                f"{human_bytes(self.bytes)}; " + ", ".join(parts) + self.bad_lines())


# ---- the tokenizer ----------------------------------------------------------------------------------

SPECIALS = {"pad": ("<pad>", "[PAD]"), "start": ("<s>", "[CLS]"), "end": ("</s>", "[SEP]"),
            "mask": ("<mask>", "[MASK]")}
LONGEST_WORD = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\S{256}|\s{256}"), "isolated")


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Make a `Problem` of whatever the tokenizers library raises, and drop what its panics write to descriptor 2."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic is no Exception
        raise Problem(f"{what} ({error})") from None
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def growth(normalizer: dict) -> int:
    """How many times as long a normalizer of a `tokenizer.json` may make a text, as far as the file decides that."""
    if normalizer["type"] == "Sequence":
        return math.prod(map(growth, normalizer["normalizers"]))
    if normalizer["type"] == "Precompiled":  # the size of a trie, the trie, and the replacements
        content = base64.b64decode(normalizer["precompiled_charsmap"] or "")
        return max(1, *map(len, content[4 + int.from_bytes(content[:4], "little"):].split(b"\0")), 1)
    # a pattern may match nothing, between all characters
    return 1 + len(normalizer.get("content", "")) // max(1, len(normalizer.get("pattern", {}).get("String", "")))


class Tokenizer:
    """A Hugging Face tokenizer, from the text of a `tokenizer.json`; raises `Problem`.

    `pad`, `start`, `end` and `mask` are ids of special tokens; `special` (int32) are the ids of all special tokens, and
    `ordinary` all others. Words are cut at 256 characters: BPE's time grows with the square of a word's length.
    """

    def __init__(self, text: str, name: str = "the tokenizer"):
        with library_errors(f"{name}: not a tokenizer.json"):
            self.model = tokenizers.Tokenizer.from_str(text)
            most = growth(json.loads(text).get("normalizer") or {"type": "none"})
        if most > MAX_RATIO:
            raise Problem(f"{name}: its normalizer may make a text {most:,} times as long, over {MAX_RATIO}")
        self.text, self.name = text, name
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # "<mask>" in a source file is six characters of code
        self.model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [LONGEST_WORD, *filter(None, [self.model.pre_tokenizer])])
        vocabulary = self.model.get_vocab(with_added_tokens=True)
        for role, spellings in SPECIALS.items():
            found = [vocabulary[spelling] for spelling in spellings if spelling in vocabulary]
            if not found:
                raise Problem(f"{name} has no {role} token: its vocabulary needs {' or '.join(spellings)}")
            setattr(self, role, found[0])
        self.vocab = max(vocabulary.values()) + 1
        marked = {i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        marked |= {getattr(self, role) for role in SPECIALS}
        self.special = np.array(sorted(marked), np.int32)
        self.ordinary = np.array(sorted(set(vocabulary.values()) - marked), np.int32)

    def __reduce__(self):
        return Tokenizer, (self.text, self.name)

    def encode(self, string: str) -> list[int]:
        """The ids of a string, without special tokens; raises `Problem` if the tokenizer cannot encode it."""
        return self.encode_many([string])[0]

    def encode_many(self, strings: Iterable[str], room: int | None = None) -> list[list[int]]:
        """The ids of each string. With `room`, at least the first `room` ids of each, so that long strings are cut."""
        strings = list(strings)
        parts = strings if room is None else [string[:8 * room + 1024] for string in strings]  # enough for most
        try:
            with library_errors(""):
                found = [encoding.ids for encoding in self.model.encode_batch_fast(parts, add_special_tokens=False)]
        except Problem:
            for part in parts:
                with library_errors(f"{self.name} cannot encode a text that begins with {part[:60]!r}"):
                    self.model.encode(part, add_special_tokens=False)
            raise
        for i, (ids, string, part) in enumerate(zip(found, strings, parts)):
            # the cut changes the ids of the last word alone, of at most 256 characters
            if len(part) < len(string) and len(ids) < room + len(part[-256:].encode()):
                found[i] = self.encode(string)
        return found


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a folder with `vocab.json` and `merges.txt`; raises `Problem`."""
    whole, *parts = (os.path.join(path, name) for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    path = whole if os.path.isfile(whole) else path
    if not os.path.isdir(path):
        return Tokenizer(read_text(path), path)
    with library_errors(f"{path}: no tokenizer.json there, nor vocab.json and merges.txt of a byte-level BPE"):
        model = tokenizers.ByteLevelBPETokenizer.from_file(*parts)
    special = [name for names in (*SPECIALS.values(), ("<unk>",)) for name in names]
    model.add_special_tokens([name for name in special if name in model.get_vocab()])
    return Tokenizer(model.to_str(), path)


def train_tokenizer(dataset: Dataset, vocab: int, most: int = 200_000_000) -> Tokenizer:
    """A byte-level BPE of `vocab` entries, trained on a data set's training split.

    Of more than `most` bytes a hash chooses about so many, the same in every run.
    """
    least = 256 + len(SPECIALS)
    if vocab < least:
        raise Problem(f"--vocab {vocab} is too small: a byte-level vocabulary has at least {least} entries")
    model = tokenizers.ByteLevelBPETokenizer()
    byte_level = model.pre_tokenizer
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([LONGEST_WORD, byte_level])  # as `Tokenizer` has it
    stopped, share = threading.Event(), most / max(1, dataset.bytes)
    pairs = map(dataset.strings, dataset.select(dataset.splits["train"].items()))
    strings = itertools.chain.from_iterable(
        pair for pair in itertools.takewhile(lambda _: not stopped.is_set(), pairs)
        if zlib.crc32("\0".join(pair).encode()) < share * 2 ** 32)
    with ThreadPoolExecutor(1) as thread:  # in the main thread signals would wait for the library
        training = thread.submit(model.train_from_iterator, strings, vocab, 0, sys.stderr.isatty(),
                                 [spellings[0] for spellings in SPECIALS.values()])
        try:
            training.result()
        finally:
            stopped.set()
    model.pre_tokenizer = byte_level
    return Tokenizer(model.to_str())


# ---- the token store and batches --------------------------------------------------------------------

IN_MEMORY = 2 ** 26  # bytes of text; the tokens of more text go to a file


class TokenStore:
    """The token ids of numbered items in a memory-mapped file.

    ids     all sequences, one after another: uint16 where the vocabulary allows, else int32
    starts  (n + 1,): item i has ids[starts[i]:starts[i + 1]], none if it is not wanted
    heads   (n,): how many of its ids begin every sample of it
    files   (n,), of windows: the file of each
    tags    (m, 2), of windows: place in the window and label of each labelled word; window i has
            tags[tag_starts[i]:tag_starts[i + 1]]

    The file is these arrays, all but ids int64, a line of JSON that describes them, and its length in 8 bytes.
    """

    def __init__(self, buffer: np.ndarray):
        length = int.from_bytes(buffer[-8:].tobytes(), "little")
        self.key, dtype, end, sizes = json.loads(buffer[-8 - length:-8].tobytes())
        self.ids = buffer[:end].view(dtype)
        numbers = buffer[end + -end % 8:-8 - length].view(np.int64)
        self.starts, self.heads, self.files, tags, self.tag_starts = np.split(numbers, np.cumsum(sizes)[:-1])
        self.tags = tags.reshape(-1, 2)

    @staticmethod
    def open(path: str, key: str) -> "TokenStore | None":
        """The store at `path`, if it was made for this key."""
        try:
            store = TokenStore(np.memmap(path, np.uint8, "r"))
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        return store if store.key == key else None

    @staticmethod
    def write(file: BinaryIO, sequences: Iterable[Sequence], key: str, vocab: int, count: int | None) -> None:
        """Write a store of `count` items, or with None of windows, from sequences in the order of their numbers."""
        dtype = np.dtype(np.uint16 if vocab <= 2 ** 16 else np.int32)
        numbers, lengths, heads, tag_counts, tags = (array.array("q") for _ in range(5))
        for sequence in sequences:
            file.write(np.array(sequence.ids, dtype).tobytes())
            numbers.append(sequence.number)
            lengths.append(len(sequence.ids))
            heads.append(sequence.head)
            tag_counts.append(len(sequence.tags))
            tags.extend(itertools.chain(*sequence.tags))
        end = sum(lengths) * dtype.itemsize
        if count is not None:  # each item has its place, whether it is wanted or not
            per_item = np.zeros((2, count), np.int64)
            per_item[:, numbers] = lengths, heads
            (lengths, heads), numbers, tag_counts = per_item, [], []
        arrays = [np.append(0, np.cumsum(lengths)), heads, numbers, tags, np.append(0, np.cumsum(tag_counts))]
        file.write(bytes(-end % 8))
        for values in arrays:
            file.write(np.asarray(values, np.int64).tobytes())
        footer = json.dumps([key, dtype.str, end, [len(values) for values in arrays]]).encode()
        file.write(footer + len(footer).to_bytes(8, "little"))

    def lengths(self, items: np.ndarray, ctx: int) -> np.ndarray:
        """Tokens of the sample of each item, at most ctx."""
        return np.minimum(self.starts[items + 1] - self.starts[items] + 1, ctx)

    def sample(self, item: int, room: int, place: float = 0.0) -> np.ndarray:
        """At most `room` ids of a sample, without the last </s>: the head and the window from `place` in [0, 1) on."""
        ids = self.ids[self.starts[item]:self.starts[item + 1]]
        spare, head = len(ids) - room, self.heads[item]
        if spare <= 0:
            return ids
        start = head + int(place * (spare + 1))
        return np.concatenate([ids[:head], ids[start:start + room - head]])


def tokenise(dataset: Dataset, tokenizer: Tokenizer, ctx: int, wanted: np.ndarray, whole: bool = False,
             path: str | None = None) -> TokenStore:
    """The tokens of the wanted items (sorted), kept at `path`, or without one for this run of the program alone.

    Local rank 0 of each host tokenises once, in constant memory, while the others wait. A small data set stays in
    memory. A file that an earlier run made of the very same is used again. The splits of a data set of files of words
    become splits of windows. Raises `Problem`, also if the disk is full or a split has no window.
    """
    parts = [dataset.checksum, dataset.reading, dataset.labels, dataset.count, dataset.bytes, tokenizer.text, ctx,
             whole, len(wanted), zlib.crc32(wanted.tobytes())]
    key = f"{digest(json.dumps(parts)):016x}"

    def write(file: BinaryIO) -> None:
        sequences = progress(dataset.sequences(tokenizer, ctx, wanted, whole), desc="tokenising", unit=" items",
                             total=None if dataset.windows else len(wanted))
        TokenStore.write(file, sequences, key, tokenizer.vocab, None if dataset.windows else dataset.count)

    if world_size() == 1 and dataset.bytes < IN_MEMORY:
        write(file := io.BytesIO())
        store = TokenStore(np.frombuffer(file.getbuffer(), np.uint8))
    else:
        name = path or os.path.join(tempfile.gettempdir(), f"codessm-{broadcast(os.urandom(8).hex())}.tokens")
        first = world_size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
        if first and TokenStore.open(name, key) is None:
            with atomic(name) as file:
                write(file)
        all_gather(None)  # wait until it is there
        store = TokenStore.open(name, key)
        if store is None:
            raise Problem("the files of this host are not those of rank 0: every host needs the same")
        all_gather(None)  # wait until every rank has opened it
        if first and path is None:
            os.remove(name)
    for name, split in dataset.splits.items() if dataset.windows else ():  # of files of words
        windows = np.flatnonzero(np.isin(store.files, split.examples))
        if not len(windows):
            raise Problem(f"the {name} split has no labelled token")
        dataset.splits[name] = Split(windows[:, None], names=store.files[windows].tolist())
    return store


WINDOW, CHOSEN, KIND, WHICH, OBFUSCATED = range(5)  # the purposes of draws
IGNORE = -100  # a label that is not predicted


def draw(seed: int, epoch: int, item: np.ndarray, position: np.ndarray | int, use: int) -> np.ndarray:
    """float64 in [0, 1), one for each broadcast element, by SplitMix64 (Steele et al. 2014); `use` is the purpose."""
    state = np.full(1, seed, np.uint64)
    for key in (use, epoch, item, position):
        state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0 ** -53


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n examples in an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def static_lengths(ctx: int) -> np.ndarray:
    """The lengths to which batches are padded: four in each octave from ctx down to about 20, multiples of 8."""
    octaves = 2.0 ** -np.arange(max(1, math.ceil(math.log2(ctx / 20))))
    steps = np.outer(octaves, [1, 7 / 8, 6 / 8, 5 / 8]) * ctx
    return np.unique(np.ceil(steps / 8).astype(int) * 8).clip(max=ctx)


class Batch(NamedTuple):
    """Rows padded on the right to one static length a side. Rows of length 0 only fill up a batch.

    `places` are positions in the flattened ids of what is to be predicted, `targets` the right answers.
    """
    ids: np.ndarray      # (B, L) int32
    lengths: np.ndarray  # (B,) int32
    items: np.ndarray    # (B, k) int64
    epoch: int = 0
    ids2: np.ndarray | None = None      # the second side, where there is one
    lengths2: np.ndarray | None = None
    labels: np.ndarray | None = None    # (B,) int64, IGNORE in rows that only fill up
    places: np.ndarray | None = None    # (M,) int64
    targets: np.ndarray | None = None   # (M,) int64
    tokens: int = 0                     # real ones of both sides, over all ranks

    def pieces(self, count: int, trim: bool = False) -> list["Batch"]:
        """At most `count` batches of equally many rows, the last perhaps of fewer.

        With `trim`, each of several is padded no further than its own longest row.
        """
        rows = -(-len(self.ids) // count)
        pieces = []
        for start in range(0, len(self.ids), rows):
            part = {name: value[start:start + rows] for name, value in self._asdict().items()
                    if name not in ("epoch", "places", "targets", "tokens") and value is not None}
            if self.places is not None:
                L = self.ids.shape[1]
                own = (self.places >= start * L) & (self.places < (start + rows) * L)
                part |= dict(places=self.places[own] - start * L, targets=self.targets[own])
            if trim and count > 1:
                part["ids"] = part["ids"][:, :max(1, part["lengths"].max())]
            pieces.append(Batch(**part, epoch=self.epoch))
        return pieces


class Batches:
    """`batches[i]` is batch i, counted on from epoch to epoch: index arithmetic on the lengths in a token store.

    Args:
        store, tokenizer, ctx: where the ids are; samples have at most ctx of them.
        examples: (n, k) items. labels: (n,), of those that have them.
        batch: examples a batch, over all ranks.
        seed: of the order; with None, as in an evaluation, batches are ordered by length.
        obfuscate: the share of examples of three items that are read with the third in place of the second, drawn anew
            each epoch.
    `len()` is the number of batches an epoch; the last one is filled up with empty rows. Within a pool of `POOL`
    batches of the shuffled epoch, samples of like length are batched together. Of W ranks, rank r gets the rows
    r, r + W, ... of each batch, so any number of ranks sees the same batches.
    """
    POOL = 50

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, ctx: int, examples: np.ndarray, batch: int,
                 seed: int | None = None, labels: np.ndarray | None = None, obfuscate: float = 0):
        self.store, self.tokenizer, self.ctx, self.batch, self.seed = store, tokenizer, ctx, batch, seed
        self.obfuscate = obfuscate
        if labels is not None and examples.shape[1] > 1:  # a pair has no order; its longer side first pads less
            examples = np.take_along_axis(examples, (-store.lengths(examples, ctx)).argsort(1), 1)
        self.examples, self.labels = examples, labels
        self.variants = examples  # if they have three items, `order` picks the two that are read in its epoch
        self.static = static_lengths(ctx)
        self.ordered = None, None  # (epoch, its order)

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch."""
        return (self[i] for i in range(len(self)))

    def order(self, epoch: int) -> np.ndarray:
        """(batches, batch): the examples of each batch of an epoch; -1 fills up the last batch."""
        if self.ordered[0] == epoch:
            return self.ordered[1]
        n = len(self.examples)
        if self.variants.shape[1] == 3:
            replaced = draw(self.seed, epoch, self.variants[:, 1], 0, OBFUSCATED) < self.obfuscate
            self.examples = np.stack([self.variants[:, 0], self.variants[np.arange(n), 1 + replaced]], 1)
        order = np.arange(n) if self.seed is None else shuffled(n, self.seed, epoch)
        lengths = self.store.lengths(self.examples[order], self.ctx)
        pool = np.arange(n) // (n if self.seed is None else self.POOL * self.batch)
        by_length = np.lexsort((-lengths.max(1), pool))
        if lengths.shape[1] > 1:  # sort each run of five batches (five divide a pool) by the shorter side
            run = np.empty(n, int)
            run[by_length] = np.arange(n) // (5 * self.batch)
            by_length = np.lexsort((-lengths.max(1), -lengths.min(1), run))
        order = np.append(order[by_length], np.full(-n % self.batch, -1)).reshape(-1, self.batch)
        if self.seed is not None:
            random = np.random.default_rng((self.seed, epoch, 1)).random(len(order))
            order = order[np.lexsort((random, np.arange(len(order)) // self.POOL))]
        self.ordered = epoch, order
        return order

    def padded_lengths(self, count: int) -> np.ndarray:
        """The static lengths of each of the first `count` batches, of one epoch at most: (n, 1), of pairs (n, 2)."""
        order = self.order(0)[:count]
        lengths = self.store.lengths(self.examples[order], self.ctx) * (order >= 0)[..., None]
        return self.static[np.searchsorted(self.static, lengths.max(1))]

    def __getitem__(self, number: int) -> Batch:
        """This rank's share of a batch."""
        epoch, number = divmod(number, len(self))
        order = self.order(epoch)[number]
        lengths = self.store.lengths(self.examples[order], self.ctx) * (order >= 0)[:, None]
        own = np.append(order, np.full(-self.batch % world_size(), -1))[rank()::world_size()]
        items = np.where(own[:, None] >= 0, self.examples[own], -1)
        ids, counts = self.pad(items[:, 0], lengths[:, 0].max(), epoch)
        ids2, counts2 = self.pad(items[:, 1], lengths[:, 1].max(), epoch) if items.shape[1] > 1 else (None, None)
        labels = None if self.labels is None else np.where(own >= 0, self.labels[own], IGNORE)
        return Batch(ids, counts, items, epoch, ids2, counts2, labels, *self.tagged(items[:, 0], ids.shape[1]),
                     int(lengths.sum()))

    def pad(self, items: np.ndarray, longest: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (B, L) and lengths (B,), both int32, of the samples of the items; item -1 is an empty row."""
        L = self.static[np.searchsorted(self.static, longest)]
        ids, lengths = np.full((len(items), L), self.tokenizer.pad, np.int32), np.zeros(len(items), np.int32)
        places = draw(self.seed, epoch, items, 0, WINDOW) if epoch else np.zeros(len(items))
        for row, (item, place) in enumerate(zip(items.tolist(), places.tolist())):
            if item >= 0:
                sample = self.store.sample(item, self.ctx - 1, place)
                ids[row, :len(sample)], ids[row, len(sample)] = sample, self.tokenizer.end
                lengths[row] = len(sample) + 1
        return ids, lengths

    def tagged(self, windows: np.ndarray, L: int) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Places in the flattened rows of length L, and labels, of the tagged words of windows; None without tags."""
        if not len(self.store.files):
            return None, None
        found = [self.store.tags[self.store.tag_starts[w]:self.store.tag_starts[w + 1]] + [row * L, 0]
                 for row, w in enumerate(windows.tolist()) if w >= 0]
        return tuple(np.concatenate([np.empty((0, 2), np.int64), *found]).T)


# ---- benchmarks -------------------------------------------------------------------------------------

class Task(NamedTuple):
    """What `pretrain` or `finetune` trains for."""
    kind: str                      # mlm, retrieval, classify, tag or pair
    ctx: int                       # tokens a sample
    epochs: int
    metric: str                    # chooses the best evaluation
    text: tuple[str, ...] = ()     # the names that a field may have; the first that is there wins
    code: tuple[str, ...] = CODE_FIELDS
    label: str = "label"
    labels: tuple[str, ...] = ()   # all of them, where the task fixes them
    files: str = "train.jsonl, valid.jsonl and test.jsonl, or one file, split 80/10/10"
    line: str = ""                 # what a line looks like
    published: str = ""            # where
    docstrings: bool = False       # code may hold its own description, which is cut out
    all_candidates: bool = False   # the candidates are those of all splits
    splits: tuple[str, ...] = SPLITS  # that training reads
    evaluations: int = 0           # of a run; 0 means one an epoch
    obfuscate: float = 0           # the share of training functions whose names are replaced
    batch: int = 32                # examples a step


TASKS = {
    "advtest": Task(
        "retrieval", 512, 3, "mrr", ("docstring_tokens", "docstring"),
        ("code_tokens", "function_tokens", "code", "function"),
        line='{"docstring_tokens": [...], "code_tokens": [...], "url": "...", "idx": 0}',
        published="https://github.com/microsoft/CodeXGLUE/tree/main/Text-Code/NL-code-search-Adv", docstrings=True,
        obfuscate=0.5, batch=128),
    "sqa": Task(
        "retrieval", 1024, 3, "mrr", ("question",), ("answer",), all_candidates=True,
        files="corpus.jsonl, queries.jsonl and qrels/{train,test}.tsv (CoIR), or Questions.csv and Answers.csv "
              "(StackSample), or JSONL", line='{"question": "...", "answer": "..."}',
        published="https://huggingface.co/datasets/CoIR-Retrieval/stackoverflow-qa and "
                  "https://www.kaggle.com/datasets/stackoverflow/stacksample", batch=128),
    "devign": Task(
        "classify", 400, 5, "accuracy", code=("func",), label="target", labels=("0", "1"),
        files="function.json with train.txt, valid.txt and test.txt, or train.jsonl, valid.jsonl and test.jsonl",
        line='{"func": "int f() {...}", "target": 0, "idx": 0}',
        published="https://github.com/microsoft/CodeXGLUE/tree/main/Code-Code/Defect-detection"),
    "diversevul": Task(
        "classify", 512, 3, "macro_f1", code=("func",), label="target", labels=("0", "1"),
        line='{"func": "int f() {...}", "target": 0}', published="https://github.com/wagner-group/diversevul"),
    "complexity": Task(
        "classify", 1024, 10, "macro_f1", code=("src", "code"), label="complexity",
        labels=("constant", "logn", "linear", "nlogn", "quadratic", "cubic", "np"),
        line='{"src": "int f() {...}", "complexity": "linear"}',
        published="https://huggingface.co/datasets/codeparrot/codecomplex"),
    "typeinf": Task(
        "tag", 512, 3, "accuracy",
        files="train*.jsonl, valid.jsonl and test.jsonl, and vocab_50000.txt if there is one",
        line='{"tokens": ["function", "f", ...], "labels": [null, "string", ...]}',
        published="https://zenodo.org/record/6387001"),
    "clone": Task(
        "pair", 512, 3, "f1", code=("func",), labels=("0", "1"),
        files="data.jsonl, with train.txt, valid.txt and test.txt of lines idx1, tab, idx2, tab, label",
        line='{"func": "int f() {...}", "idx": "10"}',
        published="https://github.com/microsoft/CodeXGLUE/tree/main/Code-Code/Clone-detection-BigCloneBench"),
    "retrieval": Task("retrieval", 512, 3, "mrr", TEXT_FIELDS[::-1], line='{"text": "...", "code": "..."}',
                      docstrings=True, batch=128),
    "classify": Task("classify", 512, 3, "accuracy", line='{"code": "...", "label": "..."}'),
    "tag": Task("tag", 512, 3, "accuracy", line='{"tokens": ["def", "f", ...], "labels": [null, "name", ...]}'),
    "pair": Task("pair", 512, 3, "f1", labels=("0", "1"), line='{"code1": "...", "code2": "...", "label": 0}'),
    "mlm": Task("mlm", 256, 1, "loss", splits=SPLITS[:2], evaluations=10),
}
TASKS["nlcodesearch"] = TASKS["advtest"]
UNK = "UNK"  # row 0 of a vocabulary of tags; a prediction of it is always wrong


class Example(NamedTuple):
    """A line of a benchmark: two texts, two codes, one code, or a list of words; and its label or labels."""
    texts: tuple[str, ...] | list[str]
    label: str | list[str | None] | None
    record: dict


TO_OBFUSCATE = "\0obfuscate\0"  # before a code whose names are replaced when it is tokenised, as that takes a while


def parse_example(task: Task, line: bytes, labelled: bool = True, obfuscated: bool = False) -> Example:
    """An example of a task; unless `labelled`, its label is None and each word's is UNK. Raises `BadLine`.

    With `obfuscated` a third text follows the text and code of a retrieval task: the code, marked with `TO_OBFUSCATE`.
    """
    record = parse_json(line)
    if task.kind == "tag":
        words = field(record, ["tokens"], as_words)
        labels = field(record, ["labels"], as_list) if labelled else [UNK] * len(words)
        if len(labels) != len(words):
            raise BadLine(f"{len(words):,} tokens and {len(labels):,} labels: there must be one for each, or null")
        if not words:
            raise BadLine("the list of tokens is empty")
        labels = [field({"labels": label}, ["labels"], as_label, required=False) for label in labels]
        if labelled and not task.published and UNK in labels:  # a user's own tags
            raise BadLine(f'the label "{UNK}" stands for what is not known: give it another name')
        return Example(words, labels, record)
    sides = {"retrieval": [task.text, task.code], "pair": [("code1", "func1"), ("code2", "func2")],
             "classify": [task.code]}[task.kind]
    texts = [field(record, names, as_text) for names in sides]
    if task.docstrings and not any(isinstance(record.get(name), list) for name in task.code):
        texts[1] = separate_docstring(*texts)[1]  # otherwise the query would be part of the answer
    label = read_label(task, record) if labelled and task.kind != "retrieval" else None
    if obfuscated:
        texts.append(TO_OBFUSCATE + texts[1])
    return Example(tuple(texts), label, record)


def parse_named(task: Task, form: "Tables", line: bytes) -> Example:
    """The named text of a line of a table; raises `BadLine`."""
    record = parse_json(line)
    field(record, form.fields)  # one of them at least
    parts = [field(record, [name], required=False) or "" for name in form.fields]
    text = as_text("\n".join(filter(str.strip, parts)))
    field(record, [form.key], as_label)
    return Example((text,), read_label(task, record) if task.kind == "classify" else record.get("score"), record)


def read_label(task: Task, record: dict) -> str:
    """The label of a record, which must be one of those that the task fixes; raises `BadLine`."""
    label = field(record, [task.label], as_label)
    if task.labels and label not in task.labels:
        raise BadLine(f'the label "{label[:80]}" is none of those of the task, which are {listed(task.labels, 12)}')
    return label


def digest(string: str) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(blake2b(string.encode(), digest_size=8).digest(), "big")


def seeded_split(key: str) -> str:
    """train, valid or test, 80/10/10, by a hash of what must stay together: the code, and so its copies too."""
    place = digest(f"split {key}") / 2 ** 64
    return "train" if place < 0.8 else "valid" if place < 0.9 else "test"


class ArraySource(Source):
    """A file that is one JSON array of objects, read as one line an object, with its position as `idx`."""

    def lines(self, _longest: int, _bar: tqdm) -> Iterator[tuple[int, bytes | BadLine]]:
        try:
            elements = json.loads(read_text(self.path))
            if not isinstance(elements, list) or not all(isinstance(element, dict) for element in elements):
                raise ValueError("no array of objects")
        except (ValueError, RecursionError) as error:
            raise Problem(f"{self.name}: not JSON as published: {error}") from None
        for number, element in enumerate(elements):
            yield number + 1, json.dumps(element | {"idx": number}).encode()


class CSVSource(Source):
    """A table of StackSample (latin-1, HTML) as JSON lines without blank answers; an answer's _id is its question's."""

    def lines(self, longest: int, _bar: tqdm) -> Iterator[tuple[int, bytes | BadLine]]:
        answers = os.path.basename(self.path) == "Answers.csv"
        columns = ("ParentId", "Score", "Body") if answers else ("Id", "Title", "Body")
        csv.field_size_limit(longest)
        with open(self.path, encoding="latin-1", newline="") as file:
            rows = csv.reader(iter(partial(file.readline, longest + 1), ""), strict=True)
            try:
                header = [column.removeprefix("\xef\xbb\xbf") for column in next(rows, [])]  # a byte order mark
                missing = [column for column in columns if column not in header]
                if missing:
                    raise Problem(f"{self.name}:1: no column {missing[0]}; there are {listed(header, 12) or 'none'}")
                for values in filter(None, rows):
                    row = dict(zip(header, values))
                    text = plain_text(row.get("Body", ""))
                    if len(values) != len(header):
                        yield rows.line_num, BadLine(f"{len(values)} columns, the header has {len(header)}")
                    elif answers and not re.fullmatch(r"-?\d{1,9}", row["Score"]):
                        yield rows.line_num, BadLine(f'the score "{row["Score"][:80]}" is no number')
                    elif text or not answers:
                        record = {"_id": row[columns[0]], "title": row.get("Title"), "text": text,
                                  "score": int(row["Score"]) if answers else None}
                        yield rows.line_num, json.dumps(record).encode()
            except csv.Error as error:
                raise Problem(f"{self.name}:{rows.line_num}: {error}") from None


def plain_text(html_text: str) -> str:
    """The text of StackOverflow's HTML: tags out, a line end where a block ends, entities resolved, code as it was."""
    text = re.sub(r"<br ?/?>|</(?:p|li|td|th|tr|h\d|div|pre|blockquote)>", "\n", html_text)
    return html.unescape(re.sub(r"</?[A-Za-z][^<>]*>|<!--.*?-->", "", text, flags=re.DOTALL)).strip()


class Tables(NamedTuple):
    """A published format: tables of named texts, and a file a split whose lines refer to the texts by their names."""
    files: tuple[str, ...]
    fields: tuple[str, ...]  # of a table: their strings, joined by line ends, are a text
    key: str             # the field with the name of a text
    split: str = ""      # the file of a split
    line: str = ""       # the pattern of its lines: a name for each table (or two for one), then a label or a score
    malformed: str = ""  # the error of another line, which has {} words
    unknown: str = ""    # the error of a line with a name ({1}) that is not in a table ({0})


TABLES = {
    "clone": [Tables(("data.jsonl",), ("func",), "idx", "{}.txt", r"(\S+)\s+(\S+)\s+(\S+)",
                     "{} fields, where idx1, idx2 and label are expected", "no function in {} has the idx {}")],
    "devign": [Tables(("function.json",), ("func",), "idx", "{}.txt", r"(.*)()", "",
                      '"{1}" is the position of no function in {0}')],
    "sqa": [Tables(("queries.jsonl", "corpus.jsonl"), ("title", "text"), "_id", "qrels/{}.tsv",
                   r"([^\t]+)\t([^\t]+)\t(-?\d+(?:\.\d+)?|score)", "not query-id, tab, corpus-id, tab, score",
                   "no text in {} has the _id {}"),
            Tables(("Questions.csv", "Answers.csv"), ("title", "text"), "_id")]}


class Row(NamedTuple):
    """An example of a benchmark."""
    split: str | None
    texts: tuple[int, ...] | list[int] | range  # their numbers
    label: str | None
    name: object  # what it calls itself, for a file of predictions


class Benchmark(Dataset):
    """The files of a benchmark as published. An item is a distinct text, or of tagging a file of words.

    Args:
        name, path: the task; a folder with its files, or its one file.
        wanted: the splits to read; `required` are those that must be there.
        labels: of the model, where there is one; else they are the task's or those of the training split.
        obfuscated: whether the training examples of retrieval have a third item, the code with its names replaced.
        reading: `limit`, `skip_bad` and `longest` of `Records`.
    `sources` are the files read. `notes` says what a reader should know. Raises `Problem`.

    Texts are numbered in the order in which they are read. The item of a text is the number of the first equal one.
    """

    def __init__(self, name: str, path: str, wanted: Iterable[str] = SPLITS, required: Iterable[str] = SPLITS[:2],
                 labels: list[str] | None = None, obfuscated: bool = False, **reading):
        self.name, self.path, self.task, self.reading = name, Path(path), TASKS[name], reading
        self.obfuscated = obfuscated
        self.wanted, self.required = list(wanted), list(required)
        self.labels, self.windows = list(labels or self.task.labels), self.task.kind == "tag"
        self.notes, self.sources, self.splits = [], [], {}
        if not self.path.exists():
            raise self.expected(f"{path}: no such file or folder")
        forms = TABLES.get(name, [])
        if any(self.path.name in form.files for form in forms) and self.path.is_file():
            self.path = self.path.parent
        form = next((form for form in forms if any((self.path / file).is_file() for file in form.files)), None)
        rows, candidates = self.read_tables(form) if form else self.read_examples()
        for split in self.wanted:
            if own := [row for row in rows if row.split == split]:
                self.add_split(split, own, candidates)
        for split in self.required:
            if split not in self.splits:
                raise self.no_split(split)

    def expected(self, what: str) -> Problem:
        """The error of a benchmark that is not there, or not whole."""
        if file := find_parquet(self.path):
            return parquet(file)
        where = f". It is published at {self.task.published}" if self.task.published else ""
        return Problem(f"{what}; {self.name} is read from {self.task.files}, a line of JSONL being like "
                       f"{self.task.line}{where}")

    def no_split(self, split: str) -> Problem:
        if self.path.is_file():
            return Problem(f"{self.path}: none of its records falls into the {split} split, a tenth of them: give more")
        other = " (--split valid scores the validation split)" if split == "test" else ""
        return self.expected(f"{self.path}: there is no {split} split{other}")

    def open(self, file: str) -> Source:
        """A file of the benchmark's folder, which joins the sources."""
        if not (self.path / file).is_file():
            raise self.expected(f"{self.path / file}: no such file")
        self.sources.append(open_source(str(self.path / file)))
        return self.sources[-1]

    def texts(self) -> Iterator[object]:
        for _, example in self.records:
            if self.windows:
                yield example.texts, example.label
            else:
                yield from example.texts

    def strings(self, text: object) -> tuple[str, str]:
        if self.windows:
            return "", " ".join(text[0])
        code = text.removeprefix(TO_OBFUSCATE)
        if code != text:
            with suppress(*UNPARSABLE):  # what does not parse stays as it is
                code = obfuscate(code) or code
        return "", code

    def description(self) -> str:
        parts = [f"{len(split.examples):,} {name}" for name, split in self.splits.items()]
        parts += [f"{len(split.candidates):,} candidates for {name}" for name, split in self.splits.items()
                  if split.candidates is not None and name != "train"]
        return "; ".join([", ".join(parts), *self.notes]) + self.bad_lines()

    def number_items(self, digests: array.array) -> None:
        """Find the item of each text by the texts' digests."""
        self.bad, self.count, self.checksum = self.records.bad, len(digests), self.records.checksum
        if not self.count:
            raise self.records.none_found()
        texts = np.frombuffer(digests, np.uint64)
        _, first, inverse = np.unique(texts, return_index=True, return_inverse=True)
        self.item_of = first[inverse]
        read = texts.reshape(-1, 3)[:, :2] if self.obfuscated else texts
        if equal := read.size - len(np.unique(read)):
            self.notes.append(f"{counted(equal, 'duplicate text')} merged")

    def add_split(self, split: str, rows: list[Row], candidates: dict[int, object]) -> None:
        """A split of these rows. `candidates` are the names of the texts that may be ranked.

        What is right for a query is right for every query with an equal text.
        """
        texts, names = np.array([row.texts for row in rows]), [row.name for row in rows]
        if self.task.kind != "retrieval":
            index = {label: number for number, label in enumerate(self.labels)}
            labels = None if self.windows else np.array([index[row.label] for row in rows])
            self.splits[split] = Split(self.item_of[texts], labels, names)
            return
        if not self.task.all_candidates:
            candidates = {text: candidates[text] for text in texts[:, 1].tolist()}
        examples = self.item_of[texts if split == "train" else texts[:, :2]]
        query_names = dict(zip(texts[:, 0].tolist(), names))
        queries, examples = self.item_of[list(query_names)], np.unique(examples, axis=0)
        ranked, first = np.unique(self.item_of[list(candidates)], return_index=True)
        answers: dict[int, list[int]] = {}
        for query, place in zip(examples[:, 0].tolist(), np.searchsorted(ranked, examples[:, 1]).tolist()):
            answers.setdefault(query, []).append(place)
        right = [(i, place) for i, query in enumerate(queries.tolist()) for place in answers[query]]
        candidate_names = list(candidates.values())
        self.splits[split] = Split(examples, queries=queries, query_names=list(query_names.values()), candidates=ranked,
                                   candidate_names=[candidate_names[i] for i in first], right=np.array(right))

    # -- JSONL, an example a line

    def find_files(self) -> list[tuple[str | None, Source]]:
        """(split, file) of each file to read; the split is None if the file is to be split."""
        paths = [self.path]
        if self.path.is_dir():
            paths = sorted(path for path in self.path.iterdir()
                           if JSON_LINES.fullmatch(path.name) and visible(path.name) and not is_log(path))
        sources = [source for path in paths for source in find_sources([path])]
        found = [(split, source) for split in SPLITS for source in sources
                 if re.match(rf"{split}\d*\.", os.path.basename(source.name))]
        if len(sources) == 1 and (not found or self.path.is_file()):
            found = [(None, sources[0])]
        elif not found:
            raise self.expected(f"{self.path}: no train.jsonl there" + (", and more than one other file: " + listed(
                path.name for path in paths) if paths else ""))
        for split in self.required if found[0][0] else ():  # before anything is read
            if split not in dict(found):
                raise self.no_split(split)
        return [(split, source) for split, source in found
                if split in (None, *self.wanted) or self.task.all_candidates]

    def read_examples(self) -> tuple[list[Row], dict[int, object]]:
        """The examples of files with one a line, and of retrieval the names of all codes."""
        kind, files = self.task.kind, self.find_files()
        self.records = Records([source for _, source in files], partial(
            parse_example, self.task, obfuscated=self.obfuscated), **self.reading)
        self.sources += self.records.sources
        digests, rows, candidates = array.array("Q"), [], {}
        counts: Counter[str] = Counter()  # of the labels in the training split, where the task does not fix them
        for file, example in self.records:
            together = {"pair": sorted(example.texts), "retrieval": example.texts[1:2]}.get(kind, example.texts)
            split = files[file][0] or seeded_split("\0".join(together))
            if kind == "tag":
                counts.update(label for label in example.label if label is not None and split == "train")
            elif kind == "classify" and not self.labels and files[file][0] in (None, "train"):
                counts[example.label] += 1
            elif kind == "classify" and example.label not in (self.labels or counts):
                self.records.reject(BadLine(f'the label "{example.label[:80]}" is none of those trained on, which are '
                                            f"{listed(sorted(self.labels or counts), 12)}"))
                split = None
            first, name = len(digests), example.record.get("idx", example.record.get("_id", len(rows)))
            digests.extend(map(digest, example.texts) if kind != "tag" else [first])
            if kind == "retrieval":
                candidates[first + 1], name = name, example.record.get("url", name)
            rows.append(Row(split, range(first, len(digests)), example.label if kind != "tag" else None, name))
            self.bytes += sum(map(len, example.texts))
        self.number_items(digests)
        if kind in ("tag", "classify") and not self.labels:
            self.labels = self.find_labels(counts)
        return rows, candidates

    def find_labels(self, counts: Counter[str]) -> list[str]:
        """The labels of tags and classes that the training split has so many times, or those of vocab_50000.txt."""
        path = self.path / "vocab_50000.txt"
        if self.name == "typeinf" and path.is_file():
            self.open(path.name)
            labels = [line.split("\t")[0].strip("\r") for line in read_text(path).rstrip("\n").split("\n")]
            twice = [label for label, count in Counter(labels).items() if count > 1]
            if labels[0] != UNK:
                raise Problem(f"{path}:1: the first line of a vocabulary of types is {UNK}, the second any")
            if twice:
                raise Problem(f"{path}: {listed(map(repr, twice))} is there more than once")
            return labels
        if len(counts) < 2:
            where, label = listed(source.name for source in self.records.sources), listed(counts) or "null"
            what = f"the training split has the label {label} alone" if self.windows else \
                f"all examples have the same label, {label}"
            raise Problem(f"{where}: {what}: there is nothing to tell apart")
        if not self.windows:  # numbers come in their order, before names
            return sorted(counts, key=lambda x: (int(x) if x.isdecimal() and len(x) < 20 else math.inf, x))
        first = [UNK] + ["any"] * (self.name == "typeinf")
        return list(dict.fromkeys(first + [label for label, _ in counts.most_common(50_000)]))

    # -- tables of named texts, and lines that refer to them by their names

    def read_tables(self, form: Tables) -> tuple[list[Row], dict[int, object]]:
        """The examples of tables and of files whose lines refer to their texts, and the names of the last table's."""
        kinds = {".json": ArraySource, ".csv": CSVSource}
        sources = [kinds.get(Path(file).suffix, Source)(*self.open(file)) for file in form.files]
        self.records = Records(sources, partial(parse_named, self.task, form), **self.reading | {"limit": None})
        tables: list[dict[str, int]] = [{} for _ in sources]  # of each, name -> number of the text
        digests, labels, names = array.array("Q"), [], []
        for table, (texts, label, record) in self.records:
            name = as_label(record[form.key])
            if name not in tables[table] or not form.split and table == 1 and label > labels[tables[table][name]]:
                tables[table][name] = len(digests)  # of StackSample's answers the best
            elif form.split or table == 0:
                self.records.reject(BadLine(f"the {form.key} {name[:80]} is there already"))
            labels.append(label)
            names.append(record[form.key])
            digests.append(digest(texts[0]))
            self.bytes += len(texts[0])
        self.number_items(digests)
        rows = self.find_rows(form, tables, labels, names)
        return rows, {number: names[number] for number in tables[-1].values()}

    def find_rows(self, form: Tables, tables: list[dict[str, int]], labels: list, names: list) -> list[Row]:
        """The examples. `tables` are names -> texts, the others belong to the texts."""
        def hashed(text: int) -> str:
            return seeded_split(str(names[text]))

        if not form.split:  # StackSample: each question with its best answer, split by a hash of the question's Id
            pairs = [(text, tables[1][name]) for name, text in tables[0].items() if name in tables[1]]
            return [Row(hashed(text), (text, answer), None, names[text])
                    for text, answer in pairs[:self.reading.get("limit")]]

        def parse(line: bytes) -> tuple[list[int], str | None] | None:
            string = line.decode("utf-8-sig", "replace").strip()
            match = re.fullmatch(form.line, string)
            if not match:
                raise BadLine(form.malformed.format(len(string.split())))
            *own, last = match.groups()
            if self.task.kind == "retrieval" and (last == "score" or float(last) <= 0):  # the header, or not right
                return None
            for name, table, file in zip(own, tables * 2, form.files * 2):
                if name not in table:
                    raise BadLine(form.unknown.format(file, name[:80]))
            texts = [table[name] for name, table in zip(own, tables * 2)]
            return texts, read_label(self.task, {"label": last}) if self.task.kind == "pair" else labels[texts[0]]

        files = {split: form.split.format(split) for split in SPLITS}
        if (self.path / form.split.format("dev")).is_file():
            files["valid"] = form.split.format("dev")
        tenth = self.name == "sqa" and not (self.path / files["valid"]).is_file()  # CoIR has no validation split
        if tenth and "valid" in self.wanted:
            files["valid"] = files["train"]
            self.notes.append("the validation split is a tenth of the training queries, by a hash")
        split_of = {files[split]: split for split in self.wanted if (self.path / files[split]).is_file()}
        records, splits, rows = Records([*map(self.open, split_of)], parse, **self.reading), [*split_of.values()], []
        for file, (texts, label) in records:
            split = splits[file]
            if tenth and split != "test":
                split = "valid" if hashed(texts[0]) == "valid" else "train"
            name = tuple(names[text] for text in texts) if self.task.kind == "pair" else names[texts[0]]
            rows.append(Row(split, texts, label, name))
        self.bad += records.bad
        self.checksum = zlib.crc32(str(records.checksum).encode(), self.checksum)
        return rows

    # -- tagging

    def sequences(self, tokenizer: Tokenizer, ctx: int, wanted: np.ndarray, whole: bool) -> Iterator[Sequence]:
        """Functions from their beginning; of files of words windows, cut between words.

        A word is encoded with a space before it, and cut if it fills a window. Its label stands at its first sub-token.
        Windows without a labelled word are left out.
        """
        if not self.windows:
            yield from super().sequences(tokenizer, ctx, wanted, whole=False)
            return
        index = {label: number for number, label in enumerate(self.labels)}
        for number, (words, labels) in zip(map(int, wanted), self.select(wanted)):
            distinct = dict.fromkeys(words)
            ids_of = dict(zip(distinct, tokenizer.encode_many(f" {word}" for word in distinct)))
            windows = [([tokenizer.start], [])]  # (ids, tags)
            for word, label in zip(words, labels):
                new = ids_of[word][:ctx - 2] or [tokenizer.mask]
                if len(windows[-1][0]) + len(new) >= ctx:
                    windows.append(([tokenizer.start], []))
                ids, tags = windows[-1]
                if label is not None:
                    tags.append((len(ids), index.get(label, 0)))
                ids += new
            yield from (Sequence(number, ids, tags=tags) for ids, tags in windows if tags)


class Unlabelled(Benchmark):
    """Examples in memory, to predict for."""

    def __init__(self, examples: list[Example], kind: str):
        self.records, self.sources = [(0, example) for example in examples], []
        self.windows, self.labels = kind == "tag", [UNK]
        width = 1 if self.windows else len(examples[0].texts)
        self.count = len(examples) * width
        self.splits = {"test": Split(np.arange(self.count).reshape(-1, width))}


def read_dataset(name: str, paths: list[str], wanted: Iterable[str], required: Iterable[str] = SPLITS[:2],
                 labels: list[str] | None = None, code_field: str | None = None, text_field: str | None = None,
                 whole: bool = False, obfuscated: bool = False, **reading) -> Dataset:
    """The data of a task, from the folder or file of a benchmark or, of mlm, the files of a corpus; raises `Problem`.

    Without `paths` the corpus is the standard library. With `whole` all that is held out of a corpus is evaluated. The
    other arguments are those of `Benchmark` and `Corpus`.
    """
    if TASKS[name].kind != "mlm":
        return Benchmark(name, paths[0], wanted, required, labels, obfuscated, **reading)
    corpus = Corpus(find_sources(paths) if paths else [standard_library()], code_field, text_field,
                    most_valid=None if whole else HELD_OUT, **reading)
    corpus.splits = {split: corpus.splits[split] for split in wanted}
    for split, found in corpus.splits.items():
        if not len(found.examples):
            raise Problem(f"{listed(source.name for source in corpus.sources)}: nothing is left for the {split} split: "
                          "give more")
    return corpus


def examples_to_predict(paths: Iterable[str], name: str, **reading) -> Iterator[Example]:
    """The examples of JSONL, with fields of any known name, and of source files and folders; raises `Problem`."""
    task, tags = TASKS[name], TASKS[name].kind == "tag"
    parse = partial(parse_example, task._replace(code=task.code + CODE_FIELDS, text=task.text + TEXT_FIELDS),
                    labelled=False)
    for path in map(str, paths):
        if not is_source(path):
            yield from (parsed for _, _, parsed in read_records(path, parse, **reading))
            continue
        if task.kind in ("pair", "retrieval") or tags and language_of(path) not in ("python", None):
            raise Problem(f"{path}: a model for {name} needs JSONL with lines like {TASKS[task.kind].line}"
                          + ", or Python files" * tags)
        for source, _language, relative in read_sources([path], ["python"] if tags else ()):
            texts, record = [source], {"path": os.path.join(path, relative) if os.path.isdir(path) else path}
            if tags:
                try:
                    texts = record["tokens"] = typed_tokens(source)[0]
                except UNPARSABLE as error:
                    raise Problem(f"{record['path']}: not Python that parses "
                                  f"({error or type(error).__name__})") from None
            if texts:  # of Python that is comments alone there is no token
                yield Example(texts, [UNK] * len(texts), record)


# ---- source trees -----------------------------------------------------------------------------------

LANGUAGES = {f".{ending}": language for language, endings in {
    "c": "c h", "cpp": "cc cpp cxx hpp hh hxx inl ipp tpp ixx", "csharp": "cs", "cuda": "cu cuh", "cython": "pyx",
    "dart": "dart", "elixir": "ex exs", "erlang": "erl", "fortran": "f90", "go": "go", "haskell": "hs", "java": "java",
    "javascript": "js jsx mjs cjs", "julia": "jl", "kotlin": "kt kts", "lua": "lua", "objective-c": "m", "ocaml": "ml",
    "perl": "pl pm", "php": "php", "python": "py pyw pyi", "r": "r", "ruby": "rb", "rust": "rs", "scala": "scala",
    "shell": "sh", "sql": "sql", "swift": "swift", "typescript": "ts tsx mts cts",
    "zig": "zig"}.items() for ending in endings.split()}
# folders of other people's code, and so are those of virtual environments
VENDORED = {"__pycache__", "node_modules", "site-packages", "dist-packages", "vendor", "_vendor", "third_party",
            "bower_components", "Pods", "Carthage"}
VENV_FILES = "pyvenv.cfg", "bin/activate", "Scripts/activate"
LARGEST_SOURCE = 1 << 20  # characters; larger files are generated or minified
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
# what Python's parser and tokenizer raise at source that is wrong or nested too deeply
UNPARSABLE = SyntaxError, ValueError, RecursionError, MemoryError, IndexError, tokenize.TokenError


def language_of(path: str) -> str | None:
    return LANGUAGES.get(os.path.splitext(path)[1].lower())


def is_source(path: str) -> bool:
    """True for a source file, by its ending, and for a folder with one: what is not read as JSON lines."""
    return bool(language_of(path)) or os.path.isdir(path) and any(source_files([path]))


def source_files(paths: list[str], others: Counter | None = None, git: bool = False) -> Iterator[tuple[str, str]]:
    """(path, path in the tree or trees) of each source file, without hidden and vendored folders; raises `Problem`.

    `others` counts the files of unknown languages, by their endings. With `git`, a folder in a checkout gives the files
    that git tracks or would add.
    """
    for root in paths:
        if not os.path.exists(root):
            raise Problem(f"{root}: no such file or folder")
        if os.path.isfile(root):
            yield root, os.path.basename(root)
            continue
        above = os.path.dirname(os.path.realpath(root)) if len(paths) > 1 else root
        for path in git and git_files(root) or walk(root, lambda folder, name: name in VENDORED or any(
                os.path.exists(os.path.join(folder, name, file)) for file in VENV_FILES)):
            if language_of(path) and os.path.isfile(path):
                yield path, os.path.relpath(path, above)
            elif others is not None:
                others[os.path.splitext(path)[1].lower() or os.path.basename(path)] += 1


def git_files(folder: str) -> list[str]:
    """The files below a folder that git tracks or would add, but vendored ones; none where git has nothing to say."""
    try:
        output = subprocess.run(["git", "-C", folder, "ls-files", "-co", "--exclude-standard", "--deduplicate", "-z"],
                                capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # there is no git, or no checkout
        return []
    names = sorted(map(os.fsdecode, output.split(b"\0")[:-1]))
    return [os.path.join(folder, name) for name in names if not VENDORED.intersection(name.split("/")[:-1])]


class BadSource(ValueError):
    """Why a file is left out."""


def read_code(path: str, language: str, latin: bool = False) -> str:
    """The text of a source file: UTF-8, UTF-16 with a byte order mark or, for Python, its declared encoding.

    With `latin`, any other is read as latin-1. Raises `BadSource`.
    """
    try:
        with open(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
            file.seek(0)
            if language == "python" and encoding != "utf-16":
                encoding = tokenize.detect_encoding(file.readline)[0]
            file.seek(0)
            source = io.TextIOWrapper(file, encoding).read(LARGEST_SOURCE + 1)
    except OSError as error:
        raise BadSource(error.strerror) from None
    except (SyntaxError, UnicodeError, LookupError):
        if not latin:
            raise BadSource("not text in UTF-8 or its declared encoding") from None
        with open(path, encoding="latin-1") as file:
            source = file.read(LARGEST_SOURCE + 1)
    if len(source) > LARGEST_SOURCE:
        raise BadSource(f"over {human_bytes(LARGEST_SOURCE)}")
    if not source.strip():
        raise BadSource("empty")
    if "\0" in source:
        raise BadSource("NUL characters")
    if language == "typescript" and source.startswith("<?xml"):
        raise BadSource("XML")
    return well_formed(source)  # an encoding such as UTF-7 can spell lone surrogates


def describe_skipped(skipped: dict[str, list[str]]) -> str:
    """What was left out, for the end of a sentence, from the paths by the reason."""
    return "".join(f"; {len(names):,} left out: {why} ({listed(names)})" for why, names in sorted(skipped.items()))


def read_sources(paths: list[str], languages: Iterable[str] = (), mixed: bool = False
                 ) -> Iterator[tuple[str, str, str]]:
    """(source, language, path in the tree) of each source file under `paths`; prints what was left out.

    With `languages`, only files of these; `mixed`, in the order of a hash. Raises `Problem` if there are none.
    """
    others: Counter[str] = Counter()
    files = [(path, relative, language) for path, relative in source_files(paths, others)
             if (language := language_of(path) or "unknown") in languages or not languages]
    if not files:
        known = " ".join(ending for ending, language in LANGUAGES.items() if not languages or language in languages)
        raise Problem(f"{', '.join(paths)}: no source files; known are {known}")
    if mixed:
        files.sort(key=lambda file: digest(well_formed(file[1])))
    skipped: dict[str, list[str]] = {}  # paths by the reason
    for path, relative, language in progress(files, desc="reading sources", unit=" files"):
        try:
            yield read_code(path, language), language, well_formed(relative)
        except BadSource as reason:
            skipped.setdefault(str(reason), []).append(relative)
    unknown = listed(f"{count:,} {ending}" for ending, count in others.most_common())
    info(f"{counted(len(files), 'source file')}{describe_skipped(skipped)}"
         + (f"; not known as source: {unknown}" if unknown and not languages else ""))


def build_corpus(paths: list[str], out: BinaryIO) -> None:
    """Write the code under `paths` as JSONL: a record a function of Python that parses, a record a file otherwise.

    A record has `code`, `docstring` if there is one (it is then not in the code), `language`, `path` and, for a
    function, `name` and `line`. Exact duplicates are dropped. Prints what was left out.
    """
    codes: Counter[int] = Counter()  # by their digests
    for source, language, path in read_sources(paths):
        records = [{"code": source}]
        if language == "python":
            with suppress(*UNPARSABLE):
                records = list(python_functions(source))
        for record in records:
            codes[code := digest(record["code"])] += 1
            if codes[code] == 1:
                line = json.dumps(record | {"language": language, "path": path}, ensure_ascii=False)
                out.write(line.encode() + b"\n")
    info(f"{counted(len(codes), 'record')}; {counted(codes.total() - len(codes), 'exact duplicate')} dropped")
    if not codes:
        raise Problem(f"{', '.join(paths)}: the source files hold no code to take")


def parse_python(source: str) -> ast.Module:
    """The tree of a source, without warnings about its escapes; raises SyntaxError and others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


class Positions:
    """Converts the positions of tree nodes and tokens to indices in the source."""

    def __init__(self, source: str):
        self.rows = io.StringIO(source, newline="").readlines()  # ends lines where ast does
        self.starts = np.cumsum([0, *map(len, self.rows)]).tolist()

    def span(self, node: ast.AST) -> tuple[int, int]:
        """(begin, end) of a node; ast counts columns in bytes of UTF-8."""
        return tuple(self.starts[line - 1] + len(self.rows[line - 1].encode()[:column].decode()) for line, column in (
            (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)))

    def tokens(self) -> tuple[list[tokenize.TokenInfo], list[int]]:
        """The tokens of Python source without comments and layout, which is white space, and where each starts."""
        tokens = [token for token in tokenize.generate_tokens(iter(self.rows).__next__)
                  if token.type != tokenize.COMMENT and token.string.strip()]
        return tokens, [self.starts[token.start[0] - 1] + token.start[1] for token in tokens]


def first_line(node: ast.AST, rows: list[str]) -> int:
    """The line, from 1, on which a function or class and its decorators begin."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    while node.decorator_list and not rows[first - 1].lstrip(" \t\f").startswith("@"):
        first -= 1  # a decorator in parentheses begins after its @
    return first


def definitions(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """(node, name qualified by its classes) of each class and function that is inside no function, in their order."""
    waiting = [(tree, "")]
    while waiting:
        node, scope = waiting.pop()
        if isinstance(node, (ast.ClassDef, *FUNCTION)):
            yield node, scope + node.name
            scope += f"{node.name}."
        if not isinstance(node, FUNCTION):
            waiting += [(child, scope) for child in reversed([*ast.iter_child_nodes(node)])]


def python_functions(source: str) -> Iterator[dict]:
    """Each function and method, decorators included, its docstring apart, its indent off; raises `UNPARSABLE`."""
    positions = Positions(source)
    for node, qualified in definitions(parse_python(source)):
        if isinstance(node, ast.ClassDef):
            continue
        first = first_line(node, positions.rows)
        begin, (_, end) = positions.starts[first - 1], positions.span(node)
        record = {"name": node.name, "line": first} | ({"method": True} if "." in qualified else {})
        code, docstring = source[begin:end], ast.get_docstring(node)
        if docstring is not None:
            a, b = positions.span(node.body[0])
            code = cut_literal(code, a - begin, b - begin)
            if docstring.strip():
                record["docstring"] = well_formed(docstring.strip())
        indent = re.match(r"[ \t\f]*", code)[0]
        yield {"code": re.sub(f"^{indent}", "", code, flags=re.MULTILINE)} | record


def search_words(text: str) -> list[str]:
    """The words of a text or of code, in lower case; identifiers are cut at _ and in camelCase."""
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return re.findall(r"[^\W\d_]+|\d+", text.lower())


class Unit(NamedTuple):
    """A part of a source file that a search can find."""
    path: str
    first: int  # its first line, from 1
    last: int
    name: str  # of the definition, qualified by its classes; "" of what belongs to none
    code: str


LONGEST_UNIT, PIECE = 120, 60  # lines; a unit that is longer than the one is cut into pieces of the other
# what holds definitions
CONTAINER = re.compile(r"\b(?:class|interface|namespace|trait|module|defmodule|object|extension|record|impl(?:\s+[\w:]+"
                       r"\s+for)?|(?:type|mod|union|struct|enum(?:\s+class)?)(?=[^({]*(?:\{|$)))\s+([\w.:]+)")
FUNCTION_WORD = re.compile(
    r"\b(?:def|defp|fn|func|function|fun|sub|proc|subroutine)\b[*\s]*(?:\([^)]*\)\s*)?(?:self\.)?([\w.:$]+[?!]?)|"
    r"([\w$]+)\s*[=:]\s*(?:async\s+)?(?:function\b|\([^()]*\)\s*=>|\w+\s*=>)")
CALL = re.compile(r"([\w$~:]+)\s*\(")  # outside functions, what is called before a block is what the block defines
CONTROL = {"if", "for", "while", "switch", "catch", "return", "foreach", "match", "with", "function", "fn", "func",
           "unless", "until", "using", "lock", "synchronized"}
BY_INDENTATION = {"python", "cython", "ruby", "elixir", "erlang", "lua", "julia", "haskell", "ocaml", "fortran", "sql",
                  "shell"}
BRACES = re.compile(r"""/\*.*?(?:\*/|\Z)|//[^\n]*|`[^`]*`|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|[{}\n]""", re.DOTALL)
# what goes on with the block above it
CLOSER = re.compile(r"\s*(?:[{})\]]|(?:end|else|elif|elsif|rescue|ensure|catch|finally|when|then|do|done|fi|esac)\b)")
COMMENT = re.compile(r"\s*(?://|/?\*|#|--|@|\[)")  # and decorators, attributes and directives


def cut_units(source: str, language: str, path: str = "") -> list[Unit]:
    """The units of a source file, in order. Each line is in one of them, but for blank lines between two.

    Units of Python are functions and methods, with their decorators and the comments directly above them, and the
    lines between these, cut where a class begins or ends. Other languages, and Python that does not parse, are cut
    likewise, at definitions found by braces or indentation.
    """
    rows = io.StringIO(source, newline="").readlines()
    found = None
    if language == "python":
        with suppress(*UNPARSABLE):
            found = [(first_line(node, rows) - 1, node.end_lineno, name)
                     for node, name in definitions(parse_python(source))]
    if found is None:
        by_indent = language in BY_INDENTATION
        depths = [len(row) - len(row.lstrip()) if row.strip() else 0 for row in map(str.expandtabs, rows)] \
            if by_indent else brace_depths(source, len(rows))
        found = block_definitions(rows, depths, by_indent, 0, len(rows))
    owners = [(0, "")] * len(rows)  # (number, name) of the innermost definition around each row
    for number, (begin, end, name) in enumerate(found, 1):  # inner ones come after outer ones
        while begin and rows[begin - 1].lstrip().startswith("#"):  # the comment directly above
            begin -= 1
        owners[begin:end] = [(number, name)] * (end - begin)
    runs: list[tuple[str, list[int]]] = []  # (name, rows) of each unit
    for (_, name), numbers in itertools.groupby(range(len(rows)), key=owners.__getitem__):
        run = list(numbers)
        if runs and all(rows[i].isspace() or CLOSER.match(rows[i]) for i in run):  # the end of a class
            runs[-1][1].extend(run)
        else:
            runs.append((name, run))
    units = []
    for name, run in runs:
        step = PIECE if len(run) > LONGEST_UNIT else LONGEST_UNIT
        for start in range(0, len(run), step):
            filled = [i for i in run[start:start + step] if not rows[i].isspace()]
            if filled:
                units.append(Unit(path, filled[0] + 1, filled[-1] + 1, name, "".join(rows[filled[0]:filled[-1] + 1])))
    return units


def read_units(path: str, skipped: dict[str, list[str]]) -> list[Unit]:
    """The units of a file; of one that is left out there are none, and its path joins `skipped`, by the reason."""
    language = language_of(path) or "unknown"
    try:
        return cut_units(read_code(path, language, latin=True), language, well_formed(path))
    except BadSource as reason:
        skipped.setdefault(str(reason), []).append(path)
        return []


def brace_depths(source: str, count: int) -> list[int]:
    """The least number of braces that are open somewhere on each of `count` rows.

    A rough pattern tells strings and comments apart: where it errs, a cut is worse, and no line is lost.
    """
    depths, depth, least = [], 0, 0
    for match in BRACES.finditer(source):
        if match[0] in ("{", "}"):
            depth = max(0, depth + (1 if match[0] == "{" else -1))
            least = min(least, depth)
        for _ in range(match[0].count("\n")):
            depths.append(least)
            least = depth
    return (depths + [least] * count)[:count]


def block_definitions(rows: list[str], depths: list[int], by_indent: bool, begin: int, end: int, scope: str = "",
                      calls: bool = True, levels: int = 16) -> Iterator[tuple[int, int, str]]:
    """(begin, end, qualified name) of the definitions in rows[begin:end], found by how deep each row lies.

    A definition is a row that a name can be read from and the deeper rows below it. With `calls`, what looks like a
    call is such a name. At most so many `levels` of blocks are looked into.
    """
    filled = [i for i in range(begin, end) if not rows[i].isspace()]
    base = min((depths[i] for i in filled), default=0)
    starts = [i for i in filled if depths[i] == base and not CLOSER.match(rows[i])]
    for start, stop in zip(starts, [*starts[1:], end]):
        inside = [i for i in range(start, stop) if depths[i] > base]
        if not inside:
            continue
        lead = start  # of comments, attributes and a signature of several rows
        while lead > begin and depths[lead - 1] == base and not rows[lead - 1].isspace() and (
                COMMENT.match(rows[lead - 1]) or not by_indent and not re.search(r"[;{}:]\s*$", rows[lead - 1])):
            lead -= 1
        header = "".join(row for row in rows[lead:inside[0]] if not COMMENT.match(row))[:2000]
        for _ in range(2):
            header = re.sub(r"<[^<>]*>", "", header)  # of generic types
        container = CONTAINER.search(header)
        found = container or FUNCTION_WORD.search(header) or calls and CALL.search(header)
        name = next(filter(None, found.groups())) if found else ""
        if name in CONTROL:
            name = ""
        if name:
            yield lead, stop, scope + name
        if levels and (container or "(" not in header or stop - start > LONGEST_UNIT):
            yield from block_definitions(rows, depths, by_indent, inside[0], inside[-1] + 1,
                                         f"{scope}{name}." if container else scope, "(" not in header, levels - 1)


def texts_to_embed(paths: Iterable[str], skipped: dict[str, list[str]] | None, **reading
                   ) -> Iterator[tuple[str, dict]]:
    """(text, what it is) of each unit of source files or record of JSONL; raises `Problem`.

    `skipped` gets the files that are left out, by the reason. None is for a second reading, which prints nothing.
    """
    def parse(line: bytes) -> tuple[str, dict]:
        record = parse_json(line)
        code = field(record, (*CODE_FIELDS, *TEXT_FIELDS), as_text)
        return code, {name: value for name, value in record.items() if name not in CODE_FIELDS}

    for path in map(str, paths):
        if is_source(path):
            for file, _ in source_files([path], git=True):
                for row in map(Unit._asdict, read_units(file, {} if skipped is None else skipped)):
                    yield row.pop("code"), row
        else:
            for source, line, (text, fields) in read_records(path, parse, quiet=skipped is None, **reading):
                yield text, dict(source=source, line=line) | fields


# ---- relations between tokens, for probes -----------------------------------------------------------

RELATIONS = {"distance": 5, "siblings": 2, "data flow": 2}  # the number of labels of each
EVALUATED_FIRST = "generators", "iter", "annotation", "value"  # of a node's fields, whatever their order in ast


class Relations(NamedTuple):
    """A function for probes, the (begin, end) of its tokens in it, and labelled pairs (i, j, label) of tokens."""
    code: str
    spans: list[tuple[int, int]]
    pairs: dict[str, list[tuple[int, int, int]]]  # by the name of the relation


def token_paths(tree: ast.AST, positions: Positions, starts: list[int]) -> list[tuple[int, ...]]:
    """For each token, the nodes from the root of the syntax tree down to it, by their numbers; its own is the last.

    A token that is all of its innermost node is that node, as x in `x + 1`; any other is a leaf below its innermost
    node, as +. What is inside an f-string belongs to the whole of it.
    """
    paths: list[tuple[int, ...]] = [(0,)] * len(starts)
    whole, count = [False] * len(starts), itertools.count(1)
    waiting = [(tree, (0,))]
    while waiting:
        node, path = waiting.pop()
        if hasattr(node, "lineno"):
            first, last = (bisect.bisect_left(starts, place) for place in positions.span(node))
            path = (*path, next(count))
            paths[first:last] = [path] * (last - first)
            whole[first:last] = [last - first == 1] * (last - first)
        if not isinstance(node, ast.JoinedStr):
            waiting += [(child, path) for child in reversed([*ast.iter_child_nodes(node)])]
    return [path if own_node else (*path, next(count)) for path, own_node in zip(paths, whole)]


class DataFlow(ast.NodeVisitor):
    """Collects `edges`, (definition, use) nodes: a variable to the uses that it reaches on a way through the code.

    Any branch may be taken, and loops any number of times. An exception leaves a `try` before or after all of its body.
    A function inside sees what is defined where it stands. A comprehension belongs to the scope around it. `uses` are
    all nodes that read a variable.
    """

    def __init__(self):
        self.definitions: dict[str, frozenset[ast.AST]] = {}  # what reaches the current place
        self.jumps = {ast.Break: [], ast.Continue: []}  # what reaches each of those of the current loop
        self.loops = 0  # around the current place
        self.edges: set[tuple[ast.AST, ast.AST]] = set()
        self.uses: set[ast.Name] = set()

    def generic_visit(self, node: ast.AST) -> None:
        for name in sorted(node._fields, key=lambda name: (*EVALUATED_FIRST, name).index(name)):
            value = getattr(node, name, None)
            if isinstance(value, str) and name in ("name", "rest"):
                self.definitions.pop(value, None)  # defined anew, by what is no variable's token
            self.visit_all(value)

    def visit_all(self, value: object) -> None:
        """Visit a node or a list of nodes; anything else is passed over."""
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST):
                self.visit(node)

    def visit_alias(self, node: ast.alias) -> None:
        self.definitions.pop(node.asname or node.name.split(".")[0], None)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.uses.add(node)
            self.edges |= {(definition, node) for definition in self.definitions.get(node.id, ())}
        elif isinstance(node.ctx, ast.Store):
            self.definitions[node.id] = frozenset([node])
        else:
            self.definitions.pop(node.id, None)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.visit(node.value)
        if isinstance(node.target, ast.Name):
            self.visit_Name(ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target))
        self.visit(node.target)

    def branch(self, *ways: ast.AST | list[ast.AST]) -> None:
        """Visit each of these ways from here; what reaches the end of any of them is defined then."""
        start, ends = self.definitions, []
        for way in ways:
            self.definitions = dict(start)
            self.visit_all(way)
            ends.append(self.definitions)
        self.join(ends)

    def join(self, ends: list[dict]) -> None:
        self.definitions = {name: frozenset().union(*(end.get(name, ()) for end in ends))
                            for name in dict.fromkeys(itertools.chain(*ends))}

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        self.visit(node.test)
        self.branch(node.body, node.orelse)

    def visit_For(self, node: ast.For | ast.AsyncFor | ast.While) -> None:
        around, self.jumps = self.jumps, {ast.Break: [], ast.Continue: []}
        test, target = getattr(node, "test", None), getattr(node, "target", None)
        self.visit_all(test or node.iter)
        self.loops += 1
        for _ in range(2 if self.loops <= 6 else 1):  # the second time with what the first has defined
            before = dict(self.definitions)
            self.visit_all([target, *node.body])
            self.join([before, self.definitions, *self.jumps[ast.Continue]])
            self.visit_all(test)
        breaks, self.jumps, self.loops = self.jumps[ast.Break], around, self.loops - 1
        self.visit_all(node.orelse)
        self.join([self.definitions, *breaks])

    def visit_Break(self, node: ast.Break | ast.Continue) -> None:
        self.jumps[type(node)].append(self.definitions)
        self.definitions = {}

    def visit_Return(self, node: ast.Return | ast.Raise) -> None:
        self.generic_visit(node)
        self.definitions = {}

    def visit_Try(self, node: ast.Try) -> None:
        before = dict(self.definitions)
        self.visit_all(node.body)
        after = dict(self.definitions)
        self.visit_all(node.orelse)
        end = self.definitions
        self.join([before, after])
        raised = dict(self.definitions)
        self.branch(*node.handlers)
        self.join([end, self.definitions])
        end, self.definitions = self.definitions, raised
        self.visit_all(node.finalbody)  # after an exception that nothing catches
        self.definitions = end
        self.visit_all(node.finalbody)

    def visit_Match(self, node: ast.Match) -> None:
        self.visit(node.subject)
        last = node.cases[-1]
        every = isinstance(last.pattern, ast.MatchAs) and not last.pattern.pattern and not last.guard
        self.branch(*node.cases, *([] if every else [[]]))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef) -> None:
        body = node.body if isinstance(node.body, list) else [node.body]
        self.visit_all([child for child in ast.iter_child_nodes(node) if child not in body])  # evaluated outside
        self.definitions.pop(getattr(node, "name", None), None)
        around, args = self.definitions, ast.iter_child_nodes(getattr(node, "args", node))
        self.definitions = around | {arg.arg: frozenset([arg]) for arg in args if isinstance(arg, ast.arg)}
        self.visit_all(body)
        self.definitions = around

    visit_AsyncFor = visit_While = visit_For
    visit_IfExp, visit_Continue, visit_Raise, visit_TryStar = visit_If, visit_Break, visit_Return, visit_Try
    visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = visit_FunctionDef


def relations(code: str, wanted: Iterable[str] = tuple(RELATIONS)) -> Relations:
    """The wanted relations of all pairs of tokens of Python code.

        distance   2, 3, 4, 5 or 6 edges between two tokens in the syntax tree, labels 0 to 4
        siblings   1 for tokens with the same parent node; 0 for others
        data flow  1 for a definition and a use that it reaches (`DataFlow`); 0 for a definition and a later use that
                   it does not reach, of any name

    Raises `UNPARSABLE`.
    """
    tree, positions = parse_python(code), Positions(code)
    tokens, starts = positions.tokens()
    paths = token_paths(tree, positions, starts)
    pairs: dict[str, list[tuple[int, int, int]]] = {name: [] for name in RELATIONS}
    in_tree = {"distance", "siblings"}.intersection(wanted)
    for i, j in itertools.combinations(range(len(tokens)), 2) if in_tree else ():
        a, b = paths[i], paths[j]
        common = next((depth for depth, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        distance = len(a) + len(b) - 2 * common
        if 2 <= distance <= 6:
            pairs["distance"].append((i, j, distance - 2))
        pairs["siblings"].append((i, j, int(a[:-1] == b[:-1])))
    flow = DataFlow()
    flow.visit(tree)
    number = {start: i for i, start in enumerate(starts)}
    token = {node: number.get(positions.span(node)[0]) for node in {*flow.uses, *itertools.chain(*flow.edges)}}
    edges = {(token[definition], token[use]) for definition, use in flow.edges}
    edges = {(i, j) for i, j in edges if None not in (i, j) and i != j}  # f-strings are one token before 3.12
    uses = sorted({token[use] for use in flow.uses} - {None})
    pairs["data flow"] = [(i, j, int((i, j) in edges)) for i in sorted({i for i, _ in edges}) for j in uses
                          if j > i or (i, j) in edges]
    return Relations(code, [(start, start + len(t.string)) for start, t in zip(starts, tokens)], pairs)


def choose_pairs(function: Relations, rng: np.random.Generator, missing: Counter[tuple[str, int]], most: int = 4
                 ) -> dict[str, list[tuple[int, int, int]]]:
    """Random pairs by relation, of each label at most `most` and as many as are missing of (relation, label).

    Place and spelling should tell little: pairs that are no siblings are as far apart in the text as the chosen
    siblings, and pairs without a data flow are of one name.
    """
    words, chosen = [function.code[begin:end] for begin, end in function.spans], {}
    for name, pairs in function.pairs.items():
        order = [pairs[i] for i in rng.permutation(len(pairs))]
        by_label = [[pair for pair in order if pair[2] == label] for label in range(RELATIONS[name])]
        if name == "siblings":
            apart = Counter(j - i for i, j, _ in by_label[1][:most])
            by_label[0] = [pair for gap, n in apart.items()
                           for pair in [(i, j, label) for i, j, label in by_label[0] if j - i == gap][:n]]
        if name == "data flow":
            by_label[0] = [(i, j, label) for i, j, label in by_label[0] if words[i] == words[j]]
        chosen[name] = [pair for label, some in enumerate(by_label) for pair in some[:min(most, missing[name, label])]]
    return chosen


def probe_functions(paths: list[str], count: int, fits: Callable[[str], bool], seed: int = 0
                    ) -> dict[str, list[Relations]]:
    """{train, test} functions of the Python files below `paths`, with `count` and count / 4 pairs of each label.

    The test gets a fifth of the files. Functions that are long or do not pass `fits` are left out. Raises `Problem`.
    """
    rng, found = np.random.default_rng(seed), {"train": [], "test": []}
    missing = {split: Counter({(name, label): most for name, labels in RELATIONS.items() for label in range(labels)})
               for split, most in (("train", count), ("test", max(1, count // 4)))}
    with progress(total=sum(some.total() for some in missing.values()), desc="finding pairs", unit=" pairs") as bar:
        for source, _language, path in read_sources(paths, ["python"], mixed=True):
            split = "test" if digest("split " + path) % 5 == 0 else "train"
            if not missing[split].total():
                continue
            with suppress(*UNPARSABLE):
                for code in (function["code"] for function in python_functions(source)):
                    if len(code) <= 2000 and fits(code):
                        function = relations(code, {name for (name, _), most in missing[split].items() if most})
                        pairs = choose_pairs(function, rng, missing[split])
                        labels = [(name, label) for name, some in pairs.items() for _, _, label in some]
                        missing[split].subtract(labels)
                        bar.update(len(labels))
                        if labels:
                            found[split].append(function._replace(pairs=pairs))
            if not any(some.total() for some in missing.values()):
                return found
    name, label = next(key for some in missing.values() for key, most in some.items() if most)
    raise Problem(f'{listed(paths)}: too few pairs of tokens for "{name}", label {label}: give --probe more Python '
                  "files, or fewer --pairs")


# ---- generated benchmarks ---------------------------------------------------------------------------

NAME_FIELD = {ast.Name: "id", ast.arg: "arg", ast.alias: "asname", ast.FunctionDef: "name",
              ast.AsyncFunctionDef: "name", ast.ClassDef: "name", ast.ExceptHandler: "name", ast.MatchAs: "name",
              ast.MatchStar: "name", ast.MatchMapping: "rest", ast.Nonlocal: "names"}  # what may be a variable


def obfuscate(code: str, method: bool = False) -> str | None:
    """A function with the names that it binds replaced by func, arg0, ..., var0, ..., its layout unchanged.

    Attributes, keywords of calls, globals, strings and the names that an import without `as` binds stay. In a `method`
    its own name, used as a variable, is a global and stays. The result is None if a name is a variable in one scope and
    something else in another, or if the new code would not parse to the same tree up to these names.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree, table = ast.parse(code), symtable.symtable(code, "code", "exec")
    own, nodes = tree.body[0], [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    imported = {node.name.split(".")[0] for node in nodes if isinstance(node, ast.alias) and not node.asname}
    imported.add("__class__")  # which the compiler binds in methods that mention it
    roles: dict[str, str] = {}  # of the variables
    fixed = {symbol.get_name() for symbol in table.get_symbols()} - {own.name} | imported
    calls_itself = table.lookup(own.name).is_referenced()
    scopes = table.get_children()
    for scope in scopes:
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            name, bound = symbol.get_name(), scope.get_type() != "class" and symbol.is_local() or symbol.is_free()
            if symbol.is_parameter():
                roles[name] = "arg"
            elif bound and name not in imported:
                function = any(inner.get_type() == "function" for inner in symbol.get_namespaces())
                roles.setdefault(name, "func" if function else "var")
            elif name == own.name and symbol.is_global() and not symbol.is_declared_global():
                calls_itself = True
            else:
                fixed.add(name)
    clash = roles.keys() & fixed or own.name in fixed or calls_itself and own.name in roles
    if clash or any(getattr(node, "type_params", None) for node in nodes):
        return None
    fresh = {role: itertools.filterfalse(fixed.__contains__, map((role + "{}").format, itertools.count()))
             for role in ("func", "arg", "var")}  # arg0, arg1, ... without the names of globals and attributes
    itself, own_name = own.name, next(fresh["func"]) if "func" in fixed else "func"
    new = {name: next(fresh[role]) for name, role in roles.items()}
    decorators = {id(node) for decorator in own.decorator_list for node in ast.walk(decorator)}

    def new_name(node: ast.AST, name: str) -> str:
        recursive = name == itself and name not in roles and (not method or id(node) in decorators)
        return own_name if node is own or recursive else new.get(name, name)

    positions, edits = Positions(code), set()
    for node in nodes:
        field_name = NAME_FIELD.get(type(node))
        if value := field_name and getattr(node, field_name):
            names = [value] if isinstance(value, str) else value
            after = [new_name(node, name) for name in names]
            edits |= {(locate_name(node, old, code, positions), old, name) for old, name in zip(names, after)
                      if old != name}
            setattr(node, field_name, after[0] if isinstance(value, str) else after)
    for start, name, after in sorted(edits, reverse=True):
        code = code[:start] + after + code[start + len(name):]
    with suppress(SyntaxError, ValueError):
        if ast.dump(parse_python(code)) == ast.dump(tree):
            return code
    return None


def locate_name(node: ast.AST, name: str, code: str, positions: Positions) -> int:
    """The index at which the code spells the name of a node, -1 if it is spelled otherwise (Python normalises it)."""
    begin, end = positions.span(node)
    if isinstance(node, (ast.Name, ast.alias, ast.MatchAs, ast.MatchStar, ast.MatchMapping)):
        return code.rfind(name, begin, end)  # name; import x as name; case x as name, *name, {**name}
    if isinstance(node, ast.ExceptHandler):
        begin = positions.span(node.type)[1]
    found = re.compile(rf"\b{name}\b").search(code, begin, end)  # name: int; def, class or nonlocal name; x as name
    return found.start() if found else -1


def typed_tokens(source: str) -> tuple[list[str], list[str | None], list[tuple[int, int]]]:
    """The tokens of Python source without annotations, the annotated type of each, and where functions begin and end.

    An annotation labels the name of the parameter, variable or function (of an attribute its last token). Left out are
    comments, layout and, from the spans, functions inside functions. Raises `UNPARSABLE`.
    """
    tree, positions = parse_python(source), Positions(source)
    tokens, starts = positions.tokens()
    labels: list[str | None] = [None] * len(tokens)
    annotation_tokens: set[int] = set()

    def token_span(node: ast.AST) -> tuple[int, int]:
        """The numbers of a node's first token and of the token after its last."""
        return tuple(bisect.bisect_left(starts, place) for place in positions.span(node))

    for node in ast.walk(tree):
        annotation = getattr(node, "returns" if isinstance(node, FUNCTION) else "annotation", None)
        if annotation is None:
            continue
        first, last = token_span(annotation)
        while tokens[first].string not in (":", "->"):  # parentheses around it
            first -= 1
        depth = sum((token.string == "(") - (token.string == ")") for token in tokens[first:last])
        annotation_tokens.update(range(first, last + depth))
        labelled = token_span(node)[0]
        if isinstance(node, FUNCTION):
            labelled += 1 + isinstance(node, ast.AsyncFunctionDef)
        elif isinstance(node, ast.AnnAssign):
            if not isinstance(node.target, (ast.Name, ast.Attribute)):
                continue
            labelled = token_span(node.target)[1] - 1
        labels[labelled] = well_formed(ast.unparse(annotation))
    left = [i for i in range(len(tokens)) if i not in annotation_tokens]
    functions = [tuple(bisect.bisect_left(left, number) for number in token_span(node)) for node, _ in definitions(tree)
                 if isinstance(node, FUNCTION)]
    return [tokens[i].string for i in left], [labels[i] for i in left], functions


MADE = ("advtest", "search", "typeinf")  # the tasks that can be made of source trees


def build_benchmark(task: str, paths: list[str], folder: str) -> None:
    """Make one of `MADE` of the source files under `paths`: {train,valid,test}.jsonl in `folder`.

    advtest: the first paragraph of a docstring, and the function without it, chosen as CodeSearchNet does (at least
    three words and three lines, no test, no special method). In valid and test the function is obfuscated.
    search: the same with all names kept; of other languages the comment directly above a function, and the function.
    typeinf: the tokens of a file and the types of some, from its annotations; and vocab_50000.txt, the types of the
    training split. Files are split 80/10/10 by a hash of their path. Duplicates are dropped, in advtest also those that
    differ in names alone; functions that another split has are cut out of files. Raises `Problem`.
    """
    if not folder or os.path.exists(folder) and not os.path.isdir(folder):
        raise Problem(f"{folder or 'an empty name'} is no folder: give -o the name of one")
    for file in sorted(os.listdir(folder)) if os.path.exists(folder) else ():
        if re.fullmatch(r"(train\d*|valid|test)\.jsonl(\.gz)?|vocab_50000\.txt", file):
            raise Problem(f"{os.path.join(folder, file)} exists: remove it, or give another -o")
    records: dict[str, list[tuple[dict, str | list | None]]] = {}  # by the path of their file
    seen: set[int] = set()  # digests of what duplicates share
    for source, language, path in read_sources(paths, () if task == "search" else ["python"]):
        for shared, *record in benchmark_records(task, source, path, language):
            if (shared := digest(shared)) not in seen:
                seen.add(shared)
                records.setdefault(path, []).append(record)
    files = sorted(records, key=digest)
    what, reason = ("annotations", "with types in no function of their own") if task == "typeinf" else \
        ("documented functions", "whose names cannot be replaced")
    if len(files) < 3:
        raise Problem(f"{', '.join(paths)}: only {counted(len(files), 'file')} with {what}: three splits need more")
    tenth = max(1, len(files) // 10)
    parts = {"train": files[2 * tenth:], "valid": files[tenth:2 * tenth], "test": files[:tenth]}
    os.makedirs(folder, exist_ok=True)
    split_of: dict[int, str] = {}  # the text of a function -> the first split that has it
    for split, part in parts.items():
        own = [record for path in part for record in records[path]]
        rows = [row for record in own if (row := finish_record(split, split_of, *record))]
        with atomic(os.path.join(folder, f"{split}.jsonl")) as out:
            for number, row in enumerate(rows):
                row = row | {"idx": number} if task == "advtest" else row
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        info(f"{folder}/{split}.jsonl: {counted(len(rows), 'line')} from {counted(len(part), 'source file')} with "
             + what + f"; {len(own) - len(rows):,} left out, {reason}" * (len(rows) < len(own)))
        if split == "train" and task == "typeinf":
            types = Counter(label for row in rows for label in row["labels"] if label is not None)
            names = dict.fromkeys([UNK, "Any", *(name for name, _ in types.most_common())])
            with atomic(os.path.join(folder, "vocab_50000.txt")) as out:
                out.writelines(f"{name}\n".encode() for name in itertools.islice(names, 50_000))
            info(f"{len(types):,} types, {types.total():,} labels in train")


def finish_record(split: str, split_of: dict[int, str], record: dict, extra: str | list | None) -> dict | None:
    """The record as its split has it: obfuscated, or without the functions that another split has; None if empty."""
    if "code" in record:
        code = record["code"] if split == "train" else extra
        return record | {"code": code} if code else None
    tokens, labels = record["tokens"], record["labels"]
    for begin, end in reversed(extra):
        if split_of.setdefault(digest("\0".join(tokens[begin:end])), split) != split:
            del tokens[begin:end], labels[begin:end]
    return record if any(labels) else None


def benchmark_records(task: str, source: str, path: str, language: str
                      ) -> Iterator[tuple[str, dict, str | list | None]]:
    """(what duplicates share, record, code outside train or `typed_tokens` spans) of what a file that parses holds."""
    with suppress(*UNPARSABLE):
        if task == "typeinf":
            tokens, labels, functions = typed_tokens(source)
            if any(labels):
                yield "\0".join(tokens), {"tokens": tokens, "labels": labels, "path": path}, functions
            return
        functions = python_functions(source) if language == "python" else commented_functions(source, language)
        for function in list(functions):
            name, code = function["name"], function["code"]
            text = " ".join(re.split(r"\n\s*\n", function.get("docstring", ""))[0].split())
            special = name.startswith("__") and name.endswith("__")
            if len(text.split()) < 3 or len(code.strip().splitlines()) < 3 or special or "test" in name.lower():
                continue
            url = f"{path}#L{function['line']}"
            if task == "search":
                yield code, {"text": text, "code": code, "url": url}, code
                continue
            with suppress(*UNPARSABLE):  # a string over several lines may have lost its indent, and more
                hidden = obfuscate(code, function.get("method", False))
                yield hidden or code, {"docstring": text, "code": code, "url": url}, hidden


COMMENT_ABOVE = re.compile(
    r"(?:\s*(?:/\*.*?\*/|(?://|--|#(?![\[!]|\s*(?:include|define|if|pragma|end|else)))[^\n]*\n))+\n?", re.DOTALL)
COMMENT_MARK = re.compile(r"^\s*(?:/\*+!?|\*+/?|//+!?|#+|--+)?[ \t]?|\*+/\s*$", re.MULTILINE)


def commented_functions(source: str, language: str) -> Iterator[dict]:
    """The named units that begin with a comment, as `python_functions` gives functions; the tags of doc comments go."""
    for unit in cut_units(source, language):
        comment = COMMENT_ABOVE.match(unit.code)
        if unit.name and comment:
            text = re.split(r"^\s*[@\\]\w", COMMENT_MARK.sub("", comment[0].strip()), flags=re.MULTILINE)[0]
            yield {"name": unit.name, "line": unit.first, "docstring": text.strip(), "code": unit.code[comment.end():]}
