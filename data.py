"""Corpora, benchmarks, the tokenizer, the token store and batches: everything between files and arrays of token ids.

    record   one line of a corpus: some code, often with a text that describes it
    item     what is tokenised once: a record of a corpus, a distinct text of a benchmark, a window of tagged words
    sample   what a model reads of an item in one epoch, at most ctx ids: <s> code </s>, or <s> text </s> code </s>
    example  one or two items, often with a label; batches are made of examples
    draw     a number in [0, 1) that is a hash of (seed, epoch, item, position). No generator has a state, so a resumed
             run, another rank and another batch size see the same draws.
"""
import array
import ast
import atexit
import bisect
import bz2
import csv
import glob
import gzip
import heapq
import html
import io
import itertools
import json
import lzma
import math
import os
import re
import shutil
import stat
import symtable
import sys
import sysconfig
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from functools import partial
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
MAX_RATIO = 100  # times its size is what a compressed file may hold
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
STARCODER = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")


# ---- errors, progress, files ------------------------------------------------------------------------

class Problem(click.ClickException):
    """What ends a command with one sentence and an exit code; control characters in it are printed escaped.

    2 is wrong usage or input, 1 a failure, 129, 130 and 143 an interruption, of which rank 0 alone speaks.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(printable(message))
        self.exit_code = exit_code

    def show(self, file=None):
        if rank() == 0 or self.exit_code < 128:
            tqdm.write(self.message if self.exit_code > 128 else f"Error: {self.message}", file=sys.stderr)


def printable(message: str) -> str:
    """The message with control characters escaped, as what it quotes from data may hold some."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: repr(control[0])[1:-1], message)


class BadLine(ValueError):
    """What is wrong with one line of a file."""


class QuietStream:
    """Standard error that cannot end a run: once it fails (closed, full, no reader), nothing more is written to it."""

    def __init__(self, stream: io.TextIOBase | None):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, string: str) -> int:
        return self._try(self.stream.write, string)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable, *args) -> int | None:
        try:
            return function(*args)
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w")


def info(message: str) -> None:
    """One line of rank 0 for people, on standard error, clear of any progress bar."""
    if rank() == 0:
        tqdm.write(printable(message), file=sys.stderr)


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A bar on standard error once the work has taken two seconds; rarely redrawn when that is a file."""
    options = dict(delay=2, mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True,
                   unit_scale=True, file=sys.stderr, disable=rank() > 0) | options
    return tqdm(iterable, **options)


def human_bytes(count: float) -> str:
    """A number of bytes for people: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            break
        count /= 1000
    else:
        unit = "TB"
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def listed(names: Iterable[object], most: int = 3) -> str:
    """At most so many of the names, for a sentence."""
    names = list(map(str, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` as a whole when the block ends, and leaves it alone if the block fails.

    The bytes go to `path`.tmp, which is flushed to the disk and then renamed.
    """
    path = os.path.realpath(path)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def check_writable(path: str | os.PathLike, option: str = "-o") -> None:
    """Raise a `Problem` unless a file could be written at `path`, which an option names, now."""
    folder = os.path.dirname(os.path.realpath(path))
    if not path or os.path.isdir(path):
        raise Problem(f"{path or 'an empty name'} is a folder: give {option} the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise Problem(f"{path} is no plain file: give {option} another name")
    if not os.path.isdir(folder):
        raise Problem(f"cannot write {path}: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from None


def read_text(path: str | os.PathLike) -> str:
    """The text of a file in UTF-8, of at most a gigabyte; raises `Problem`."""
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
    """The number of processes."""
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
METRICS_LOG = b'{"step": '  # how the log begins that a run writes beside its checkpoint


class Source(NamedTuple):
    """A file of lines: plain, compressed by gzip, bzip2 or xz, or one member of a zip archive."""
    name: str  # as the user knows it
    path: str
    mark: str  # changes when the content does
    member: str = ""

    @contextmanager
    def open(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """(the stream of the content, the file itself, whose position tells how much was read); raises `Problem`."""
        try:
            with open(self.path, "rb") as file:
                stream = zipfile.ZipFile(file).open(self.member) if self.member else file
                start = stream.peek(6)[:6]
                if start.startswith(ZSTD):
                    raise Problem(f"{self.name} is compressed by zstd, which is not read here: `zstd -d` unpacks it")
                for magic, library in COMPRESSED.items():
                    if start.startswith(magic):
                        stream = library.open(stream, "rb")
                yield stream, file
        except (OSError, EOFError, KeyError, RuntimeError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise Problem(f"{self.name}: {getattr(error, 'strerror', None) or f'not a whole file ({error})'}") from None

    def lines(self, longest: int = MAX_LINE) -> Iterator[tuple[int, "bytes | BadLine", int]]:
        """(line number from 1, line, position in the file) of each line that is not blank; raises `Problem`.

        For a line of more than `longest` bytes comes a `BadLine`. A compressed file that unpacks to more than
        `MAX_RATIO` times its size, and one that changes while it is read, are refused.
        """
        count = 0

        def read_part() -> bytes:
            """A line, or so much of it that it is known to be too long."""
            nonlocal count
            part = stream.readline(longest + 1)
            count, position = count + len(part), file.tell()
            if count > longest + MAX_RATIO * position:
                raise Problem(f"{self.name}: its first {human_bytes(position)} unpack to {human_bytes(count)}, more "
                              f"than {MAX_RATIO} times as much: unpack it yourself if it is what it should be")
            return part

        with self.open() as (stream, file):
            self.check_unchanged(file)
            for number in itertools.count(1):
                line = rest = read_part()
                while len(rest) > longest and not rest.endswith(b"\n"):
                    rest = read_part()
                if not line:
                    break
                if len(line.rstrip(b"\n")) > longest:
                    line = BadLine(f"a line of more than {human_bytes(longest)} (--max-line takes longer ones)")
                elif line.isspace():
                    continue
                yield number, line, file.tell()
            self.check_unchanged(file)

    def check_unchanged(self, file: BinaryIO) -> None:
        """Raise a `Problem` where the open file is not as it was when it was found."""
        if os.path.dirname(self.path) != temporary_folder() and self.mark != mark_of(file):
            raise Problem(f"{self.name} changed while it was being read", 1)


def mark_of(file: BinaryIO) -> str:
    """What changes when the content of an open file does."""
    status = os.fstat(file.fileno())
    return f"{status.st_size} bytes, {status.st_mtime_ns}"


def temporary_folder() -> str:
    """A folder of this process, removed when it exits."""
    if not hasattr(temporary_folder, "path"):
        temporary_folder.path = tempfile.mkdtemp(prefix="codessm-")
        atexit.register(shutil.rmtree, temporary_folder.path, ignore_errors=True)
    return temporary_folder.path


def spool(name: str, stream: BinaryIO) -> Source:
    """A temporary copy of what can be read only once; raises `Problem`."""
    handle, path = tempfile.mkstemp(dir=temporary_folder())
    try:
        with open(handle, "wb") as out, progress(desc=f"reading {name}", unit="B") as bar:
            while block := stream.read(1 << 20):
                out.write(block)
                bar.update(len(block))
    except OSError as error:
        raise Problem(f"no room to keep {name} in {os.path.dirname(path)}: {error.strerror}; make some, or let TMPDIR "
                      "name another folder", 1) from None
    return Source(name, path, "-")


def open_source(name: str) -> Source:
    """The `Source` of one file, of a pipe or of - for standard input; raises `Problem`."""
    if name == "-":
        return spool("standard input", sys.stdin.buffer)
    try:
        with open(name, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return spool(name, file)
            return Source(name, name, mark_of(file))
    except OSError as error:
        raise Problem(f"{name}: {error.strerror}") from None


def find_sources(paths: Iterable[str]) -> list[Source]:
    """The corpus files behind files, folders, globs and -, in order, each once; raises `Problem`.

    A folder gives its files of JSON lines (by the ending, see `JSON_LINES`), its subfolders' too. Links are followed
    once; hidden files, `__MACOSX`, empty files and metrics logs are passed over. A zip archive gives its members.
    """
    names: dict[str, str] = {}
    for path in map(str, paths):
        if os.path.isdir(path):
            found = [name for name in walk(path) if JSON_LINES.fullmatch(os.path.basename(name)) and not is_log(name)]
            if not found:
                raise Problem(f"{path}: no file of JSON lines (.jsonl, .jsonlines, .json, compressed or in a .zip); "
                              f"`codessm corpus {path} -o corpus.jsonl` makes one of source files")
        elif path == "-" or os.path.exists(path):
            found = [path]
        else:
            found = sorted(p for p in glob.glob(path, recursive=True)
                           if not is_log(p) and "__MACOSX" not in Path(p).parts)
            if not found:
                raise Problem(f"{path}: no such file")
        for name in found:
            names.setdefault(name if name == "-" else os.path.realpath(name), name)
    return [member for name in names.values() for member in members(open_source(name))]


def members(source: Source) -> list[Source]:
    """The source itself, or the files of JSON lines in it if it is a zip archive; raises `Problem`."""
    if not zipfile.is_zipfile(source.path):
        return [source]
    with source.open() as (_, file):
        names = [name for name in zipfile.ZipFile(file).namelist() if JSON_LINES.fullmatch(name) and visible(name)]
    if not names:
        raise Problem(f"{source.name}: no file of JSON lines in this archive")
    return [source._replace(name=f"{source.name}/{name}", member=name) for name in names]


def visible(path: str) -> bool:
    """Whether no part of a path is hidden or __MACOSX, where macOS keeps attributes of the files of an archive."""
    return not any(part.startswith(".") and part not in (".", "..") or part == "__MACOSX" for part in Path(path).parts)


def walk(root: str, skipped: Callable[[str, str], bool] = lambda folder, name: False) -> Iterator[str]:
    """The visible files below a folder, sorted in each folder; links are followed, but no folder is entered twice.

    `skipped(folder, name)` says which folders to leave out.
    """
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        folders[:] = [] if place in seen else sorted(f for f in folders if visible(f) and not skipped(folder, f))
        if place not in seen:
            seen.add(place)
            yield from (os.path.join(folder, file) for file in sorted(files) if visible(file))


def starts_with(path: str, start: bytes) -> bool:
    """Whether a plain file is empty or starts so."""
    with open(path, "rb") as file:
        return file.read(len(start)) in (b"", start)


def is_log(path: str) -> bool:
    """Whether it is no file, empty, or a metrics log: one that lies beside a corpus is no part of it."""
    return not os.path.isfile(path) or starts_with(path, METRICS_LOG)


def standard_library() -> Source:
    """The running interpreter's own standard library as a corpus: the default one."""
    path = os.path.join(temporary_folder(), "standard-library.jsonl")
    with open(path, "wb") as out:
        build_corpus([STANDARD_LIBRARY], out)
    return Source(f"standard library of Python {sys.version.split()[0]}", path,
                  f"{os.path.getsize(path)} bytes, {zlib.crc32(Path(path).read_bytes())}")


class Records:
    """The lines of some files, parsed. Each iteration reads the files again, one line in memory at a time.

    Args:
        sources: from `find_sources`.
        parse: bytes of a line -> anything, None to pass over it; raises `BadLine`.
        limit: only the first so many records of each file.
        skip_bad: count bad lines and pass over them, where otherwise the first raises a `Problem`.
        longest: bytes of a line at most.
    Iterating gives (number of the source, what `parse` made of the line). A caller may `reject` the record that it has
    just been given. `bad` counts the lines passed over.
    """

    def __init__(self, sources: list[Source], parse: Callable[[bytes], object], limit: int | None = None,
                 skip_bad: bool = False, longest: int = MAX_LINE):
        self.sources, self.parse, self.limit, self.skip_bad, self.longest = sources, parse, limit, skip_bad, longest
        self.bad, self.line_number, self.source = 0, 0, None

    def __iter__(self) -> Iterator[tuple[int, object]]:
        self.bad = 0
        total = sum(os.path.getsize(path) for path in {source.path for source in self.sources})
        with progress(total=total, desc="reading records", unit="B") as bar:
            for place, self.source in enumerate(self.sources):
                read, done = 0, bar.n
                for self.line_number, line, position in self.source.lines(self.longest):
                    if read == self.limit:
                        break
                    try:
                        if isinstance(line, BadLine):
                            raise line
                        parsed = self.parse(line)
                    except BadLine as error:
                        self.reject(error)
                        continue
                    bar.update(done + position - bar.n)
                    if parsed is not None:
                        read += 1
                        yield place, parsed

    def reject(self, error: BadLine) -> None:
        """Count the current line as bad, or raise a `Problem` that names it."""
        self.last_bad = f"{self.source.name}:{self.line_number}: {error}"
        if not self.skip_bad:
            raise Problem(self.last_bad)
        self.bad += 1

    def none_found(self) -> Problem:
        """The error of files without any record."""
        return Problem(f"{listed(source.name for source in self.sources)}: no records"
                       + (f"; the last of {self.bad} bad lines is {self.last_bad}" if self.bad else ": it is empty"))


JSON_KIND = {list: "an array", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}


def parse_json(line: bytes) -> dict:
    """The JSON object of one line; raises `BadLine`."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadLine(f"invalid UTF-8 at byte {error.start + 1} of the line") from None
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON: {str(error).split(';')[0]}") from None
    if not isinstance(record, dict):
        raise BadLine(f"{JSON_KIND.get(type(record), 'a number')}, not a JSON object")
    return record


def well_formed(string: str) -> str:
    """The string with lone surrogates replaced, which JSON and Python can spell and UTF-8 cannot."""
    return string if string.isascii() else string.encode("utf-8", "replace").decode()


def as_string(value: object) -> str:
    """a string"""
    if not isinstance(value, str):
        raise TypeError
    return well_formed(value)


def as_words(value: object) -> list[str]:
    """a list of strings"""
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise TypeError
    return list(map(well_formed, value))


def as_list(value: object) -> list:
    """a list"""
    if not isinstance(value, list):
        raise TypeError
    return value


def as_text(value: object) -> str:
    """a string or a list of strings"""
    return " ".join(as_words(value)) if isinstance(value, list) else as_string(value)


def as_label(value: object) -> str:
    """a name or a whole number"""
    if isinstance(value, (bool, float)) and value == value // 1:
        value = int(value)
    if not isinstance(value, (str, int)):
        raise TypeError
    return well_formed(str(value))


def field(record: dict, names: Iterable[str], kind: Callable[[object], object] = as_string, required: bool = True):
    """The first of the named fields that is there and not null, as a `kind`; else None. Raises `BadLine`.

    A `kind` converts a value or raises TypeError; its docstring is what it wants.
    """
    names = list(names)
    for name in names:
        value = record.get(name)
        if value is not None:
            try:
                return kind(value)
            except TypeError:
                raise BadLine(f'the field "{name}" is {JSON_KIND.get(type(value), f"the number {value}")}, not '
                              f"{kind.__doc__}") from None
    if not required:
        return None
    if any(name in record for name in names):
        raise BadLine(f'the field "{next(name for name in names if name in record)}" is null')
    wanted = " or ".join(f'"{name}"' for name in names)
    raise BadLine(f"no field {wanted}; the fields seen are: {listed(record, 12) or 'none'}")


# a docstring: a string alone on its lines, after a line that ends with a colon
DOCSTRING = re.compile(r"(?<=:)([ \t]*(?:#[^\n]{0,200})?\n\s*)([rRuU]?(?:"
                       r"""("{3}|'{3})[^\\"']*(?:(?:\\.|(?!\3)["'])[^\\"']*)*\3|"""
                       r"""(["'])(?!\4)[^\\\n"']*(?:(?:\\.|(?!\4)["'])[^\\\n"']*)*\4))[ \t]*(?:#[^\n]*)?(?=\n|\Z)""",
                       re.DOTALL)


def separate_docstring(text: str, code: str) -> tuple[str, str]:
    """(text, code) without the text in both: CodeSearchNet's Python code, say, still holds its docstring.

    The docstring that holds the text, by its letters and digits, is cut out of the code. A text that is found
    elsewhere in the code stays there alone.
    """
    def letters(string: str) -> str:
        return re.sub(r"\W+", "", string)

    text, key = text.strip(), letters(text)
    if not key or key not in letters(code) and "\\" not in code:
        return text, code
    for found in DOCSTRING.finditer(code):
        literal = found[2]
        if key in letters(literal) or "\\" in literal and key in letters(literal_value(literal)):
            return text, cut_literal(code, *found.span(2))
    return ("", code) if text in code else (text, code)


def literal_value(literal: str) -> str:
    """What a string literal stands for; itself where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return literal


def cut_literal(code: str, begin: int, end: int, alone: bool | None = None) -> str:
    """Code without the docstring code[begin:end]; its lines go too, unless a statement or a comment shares them.

    `alone`, the docstring is the whole body, and becomes `pass`; None, it is if nothing follows.
    """
    if not code[end:].strip() if alone is None else alone:
        return f"{code[:begin]}pass{code[end:]}"
    first = code.rfind("\n", 0, begin) + 1
    last = re.compile(r"[ \t]*").match(code, end).end()
    if code.startswith("\n", last) and not code[first:begin].strip():
        return code[:first] + code[last + 1:]
    return code[:begin] + code[re.compile(r"[ \t]*;?[ \t]*").match(code, end).end():]


class Split(NamedTuple):
    """The examples of one split, made of numbered items.

    examples    (n, k) int64: the k = 1 or 2 items of each example
    labels      (n,) int64, of classification and pairs
    names       what each example calls itself, for a file of predictions
    queries     of retrieval, (Q,): the item of each query; query_names likewise
    candidates  (C,): the items that are ranked, each text once; candidate_names likewise
    right       (m, 2): query and candidate, by their places in these, of each right answer
    """
    examples: np.ndarray
    labels: np.ndarray | None = None
    names: list | None = None
    queries: np.ndarray | None = None
    query_names: list | None = None
    candidates: np.ndarray | None = None
    candidate_names: list | None = None
    right: np.ndarray | None = None

    def items(self) -> np.ndarray:
        """The distinct items, which evaluation encodes each once."""
        parts = [self.examples.ravel()] if self.candidates is None else [self.queries, self.candidates]
        return np.unique(np.concatenate(parts))

    def of_windows(self, files: np.ndarray) -> "Split":
        """The split of files of words as one of their windows, `files` being the file of each."""
        windows = np.flatnonzero(np.isin(files, self.examples))
        return Split(windows[:, None], names=files[windows].tolist())


class Dataset:
    """What is read for a task: `Split`s of numbered items, and the passes over their texts.

    A subclass reads its files once, to check and number what is in them. `sources` are the files, `bad` counts the
    lines passed over, `count` the items, `bytes` is about the size of the texts, `labels` are those of the task.
    """
    splits: dict[str, Split]
    records: Records
    sources: list[Source]
    labels: list[str] = []
    reading: dict = {}  # how the files are read
    count = bad = bytes = 0
    windows = False  # its items become windows, which are numbered when they are tokenised

    def texts(self) -> Iterator[object]:
        """The text of each item, in the order of their numbers; the files are read again."""
        raise NotImplementedError

    def strings(self, text: object) -> list[str]:
        """The strings of one of the `texts`."""
        return [text]

    def training_strings(self, most: int) -> Iterator[str]:
        """About `most` bytes at most of the training split's strings, chosen by a hash: the same in every run."""
        wanted, share = self.splits["train"].items(), min(1.0, most / max(1, self.bytes))
        for text in self.select(wanted):
            strings = self.strings(text)
            if share == 1 or zlib.crc32("\0".join(strings).encode()) < share * 2 ** 32:
                yield from strings

    def select(self, wanted: np.ndarray) -> Iterator[object]:
        """The texts of these items, which are sorted."""
        position = 0
        for number, text in enumerate(self.texts()):
            if position == len(wanted):
                return
            if number == wanted[position]:
                position += 1
                yield text

    def items_read(self, steps: int | None, batch: int, seed: int) -> np.ndarray:
        """The items that a run of so many steps reads, sorted: few where it ends within its first epoch."""
        examples = self.splits["train"].examples
        if steps and not self.windows:
            pools = -(-steps // Batches.POOL)
            examples = examples[shuffled(len(examples), seed, 0)[:pools * Batches.POOL * batch]]
        return np.unique(np.concatenate([examples.ravel(), *(split.items() for name, split in self.splits.items()
                                                             if name != "train")]))

    def sequences(self, tokenizer: "Tokenizer", ctx: int, wanted: np.ndarray, whole: bool) -> Iterator["Sequence"]:
        """The token ids of the wanted items in the order of their numbers, at most ctx - 1 of them.

        `whole`, all ids of code come, for windows at any place of it.
        """
        numbers = map(int, wanted)
        for block in blocks(self.select(wanted)):
            for ids in tokenizer.encode_many(block, ctx - 2):
                yield Sequence(next(numbers), [tokenizer.start, *ids[:ctx - 2]])


class Sequence(NamedTuple):
    """What the token store holds of an item."""
    number: int  # of the item; of a window, of its file
    ids: list[int]  # without the last </s>
    head: int = 1  # so many of the ids begin every sample: <s>, or <s> text </s>
    tags: list[tuple[int, int]] = []  # (place in ids, label number) of a window's labelled words


def blocks(texts: Iterable[object], size: Callable[[object], int] = len, most: int = 2 ** 20) -> Iterator[list]:
    """Lists of successive texts, of about `most` characters and 2^13 texts at most: what the tokenizers library encodes
    in parallel."""
    block, characters = [], 0
    for text in texts:
        block.append(text)
        characters += size(text)
        if characters > most or len(block) == 2 ** 13:
            yield block
            block, characters = [], 0
    if block:
        yield block


class Corpus(Dataset):
    """JSONL files of (text, code) records for masked language modelling; in memory is a byte a record.

    Args:
        sources, limit, skip_bad, longest: as for `Records`.
        code_field, text_field: their names, where they are not among the known ones.
        most_valid: only so many of the records held out are in the validation split.
    An item is a record. Held out is 1 % by a hash of the line; of fewer than 3,200 records a tenth, 32 at most, those
    with the lowest hashes. The test split is the whole corpus. Raises `Problem`.
    """

    def __init__(self, sources: list[Source], code_field: str | None = None, text_field: str | None = None,
                 limit: int | None = None, skip_bad: bool = False, longest: int = MAX_LINE,
                 most_valid: int | None = None):
        self.code_fields = (code_field,) if code_field else CODE_FIELDS
        self.text_fields = (text_field,) if text_field else TEXT_FIELDS
        self.text_is_code = not code_field and not text_field  # of a record with `text` alone
        self.reading = dict(fields=(code_field, text_field), limit=limit, skip_bad=skip_bad, longest=longest)
        self.sources, self.records = sources, Records(sources, self.parse, limit, skip_bad, longest)
        held, texts = bytearray(), 0
        lowest: list[tuple[int, int]] = []  # (-hash, record) of the 32 lowest hashes
        for _, (text, code, checksum) in self.records:
            (heapq.heappush if len(lowest) < 32 else heapq.heappushpop)(lowest, (-checksum, len(held)))
            held.append(checksum % 100 == 0)
            texts += bool(text)
            self.bytes += len(text) + len(code)
        self.bad = self.records.bad
        if not held:
            raise self.records.none_found()
        if text_field and not texts:
            raise Problem(f'{listed(source.name for source in sources)}: no record has the field "{text_field}" '
                          "given with --text-field")
        held = np.frombuffer(held, np.uint8)
        least = min(32, max(1, len(held) // 10), len(held) - 1)
        if held.sum() < least:
            held[[record for _, record in sorted(lowest, reverse=True)[:least]]] = 1
        valid = np.flatnonzero(held)
        some = np.linspace(0, len(valid) - 1, min(most_valid or len(valid), len(valid))).astype(int)
        self.count, self.held_out = len(held), len(valid)
        self.splits = {"train": Split(np.flatnonzero(held == 0)[:, None]), "valid": Split(valid[some, None]),
                       "test": Split(np.arange(len(held))[:, None])}

    def parse(self, line: bytes) -> tuple[str, str, int]:
        """(text, code, hash) of one line, the text "" where there is none; raises `BadLine`."""
        record = parse_json(line)
        code, text = field(record, self.code_fields, required=False), None
        if code is None and self.text_is_code and record.get("text") is not None:
            code, text = field(record, ["text"]), field(record, TEXT_FIELDS[:-1], required=False)
        elif code is not None:
            text = field(record, self.text_fields, required=False)
        else:
            field(record, self.code_fields)
        if code.startswith("<"):
            code = STARCODER.sub("", code)
        if not code.strip():
            raise BadLine("the code is empty")
        return *separate_docstring(text or "", code), zlib.crc32(line.strip())

    def texts(self) -> Iterator[tuple[str, str]]:
        for _, (text, code, _) in self.records:
            yield text, code

    def strings(self, text: tuple[str, str]) -> list[str]:
        return list(text)

    def sequences(self, tokenizer: "Tokenizer", ctx: int, wanted: np.ndarray, whole: bool) -> Iterator[Sequence]:
        """<s> text </s> code: the text with its special tokens takes at most half of ctx."""
        numbers, room = map(int, wanted), ctx // 2 - 2
        for block in blocks(self.select(wanted), lambda record: len(record[0]) + len(record[1])):
            texts, codes = zip(*block)
            for text, code in zip(tokenizer.encode_many(texts, room),
                                  tokenizer.encode_many(codes, None if whole else ctx)):
                head = [tokenizer.start, *text[:room], tokenizer.end] if text else [tokenizer.start]
                yield Sequence(next(numbers), head + (code if whole else code[:ctx - 1 - len(head)]), len(head))

    def description(self) -> str:
        parts = [f"{len(split.examples):,} for {name}" for name, split in self.splits.items()]
        return (f"{listed(source.name for source in self.sources)}: {self.count:,} records, {human_bytes(self.bytes)}; "
                + ", ".join(parts))


# ---- the tokenizer ----------------------------------------------------------------------------------

SPECIALS = {"pad": ("<pad>", "[PAD]"), "start": ("<s>", "[CLS]"), "end": ("</s>", "[SEP]"),
            "mask": ("<mask>", "[MASK]")}
LONGEST_WORD = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\S{256}|\s{256}"), "isolated")


class Tokenizer:
    """A Hugging Face tokenizer with the ids of the special tokens: `pad`, `start`, `end`, `mask`.

    Args:
        text: the content of a `tokenizer.json`.
        name: what to call it in an error. Raises `Problem` if it is none or lacks a special token.
    `special` and `ordinary` are arrays of ids (int32): the special tokens, and all others. A run of characters without
    a break is cut after 256, as the time that BPE takes grows with the square of a word's length.
    """

    def __init__(self, text: str, name: str = "the tokenizer"):
        try:
            self.model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise Problem(f"{name}: not a tokenizer.json ({error})") from None
        self.text = text
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # "<mask>" in a source file is five characters of code
        self.model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [LONGEST_WORD, *filter(None, [self.model.pre_tokenizer])])
        vocabulary = self.model.get_vocab(with_added_tokens=True)
        for role, spellings in SPECIALS.items():
            found = [vocabulary[spelling] for spelling in spellings if spelling in vocabulary]
            if not found:
                raise Problem(f"{name} has no {role} token: its vocabulary needs {' or '.join(spellings)}")
            setattr(self, role, found[0])
        self.vocab = max(vocabulary.values()) + 1
        if self.vocab > 2 * len(vocabulary) + 1000:
            raise Problem(f"{name} has ids up to {self.vocab - 1:,} for {len(vocabulary):,} entries: number them anew")
        marked = {i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        marked |= {getattr(self, role) for role in SPECIALS}
        self.special = np.array(sorted(marked), np.int32)
        self.ordinary = np.array(sorted(set(vocabulary.values()) - marked), np.int32)

    def __reduce__(self):
        return Tokenizer, (self.text,)

    def encode(self, string: str) -> list[int]:
        """The ids of a string, without special tokens; raises `Problem` where the tokenizer has none for it."""
        return self.encode_many([string])[0]

    def encode_many(self, strings: Iterable[str], room: int | None = None) -> list[list[int]]:
        """The ids of each string; with `room`, of enough of its beginning to give so many ids if it has them."""
        strings = list(strings)
        parts = strings if room is None else [string[:8 * room + 1024] for string in strings]  # enough for most
        try:
            found = [encoding.ids for encoding in self.model.encode_batch_fast(parts, add_special_tokens=False)]
        except Exception as error:  # the library raises nothing narrower
            raise Problem(f"the tokenizer cannot encode this: {error}") from None
        for i, (ids, string, part) in enumerate(zip(found, strings, parts)):
            # the cut changes the ids of the last word alone, of at most 256 characters
            if len(part) < len(string) and len(ids) < room + len(part[-256:].encode()):
                found[i] = self.encode(string)
        return found


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a folder with `vocab.json` and `merges.txt`; raises `Problem`."""
    if not os.path.isdir(path):
        return Tokenizer(read_text(path), path)
    if os.path.isfile(os.path.join(path, "tokenizer.json")):
        return load_tokenizer(os.path.join(path, "tokenizer.json"))
    files = (os.path.join(path, name) for name in ("vocab.json", "merges.txt"))
    try:
        model = tokenizers.ByteLevelBPETokenizer.from_file(*files)
    except Exception as error:  # the library raises nothing narrower
        raise Problem(f"{path}: no tokenizer.json there, nor vocab.json and merges.txt of a byte-level BPE ({error})"
                      ) from None
    special = [name for names in (*SPECIALS.values(), ("<unk>",)) for name in names]
    model.add_special_tokens([name for name in special if name in model.get_vocab()])
    return Tokenizer(model.to_str(), path)


def train_tokenizer(dataset: Dataset, vocab: int, most: int = 200_000_000) -> Tokenizer:
    """A byte-level BPE of `vocab` entries trained on about `most` bytes at most of a data set's training split."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([LONGEST_WORD, byte_level])  # as `Tokenizer` has it
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = [spellings[0] for spellings in SPECIALS.values()]
    if vocab < len(alphabet) + len(special):
        raise Problem(f"--vocab {vocab} is too small: a byte-level vocabulary has at least "
                      f"{len(alphabet) + len(special)} entries")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, special_tokens=special,
                                             initial_alphabet=alphabet, show_progress=sys.stderr.isatty())
    model.train_from_iterator(dataset.training_strings(most), trainer)
    model.pre_tokenizer = byte_level
    return Tokenizer(model.to_str())


# ---- the token store and batches --------------------------------------------------------------------

IN_MEMORY = 2 ** 26  # bytes of text; the tokens of more of it go to a file


class TokenStore:
    """The token ids of numbered items in a memory-mapped file.

    ids     all sequences, one after another: uint16 where the vocabulary allows, else int32
    starts  (n + 1,) int64: item i has ids[starts[i]:starts[i + 1]]; an item that is not wanted has none
    heads   (n,) int32: so many of them begin every sample of it
    files   (n,) int64, of windows: the file of each
    tags    (m, 2) int32, of windows: place in the window and label of each labelled word; those of window i are
            tags[tag_starts[i]:tag_starts[i + 1]]

    The file is these arrays, a line of JSON that names them, and its length in 8 bytes.
    """

    def __init__(self, buffer: np.ndarray):
        length = int.from_bytes(buffer[-8:].tobytes(), "little")
        self.key, arrays = json.loads(buffer[-8 - length:-8].tobytes())
        for name, (dtype, begin, end) in arrays.items():
            setattr(self, name, buffer[begin:end].view(dtype))
        self.tags = self.tags.reshape(-1, 2)

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
        """Write a store of `count` items (None, of windows) from the sequences of some, in the order of their numbers.
        """
        dtype = np.dtype(np.uint16 if vocab <= 2 ** 16 else np.int32)
        starts, heads, files = array.array("q", [0]), array.array("i"), array.array("q")
        tags, tag_starts = array.array("i"), array.array("q", [0])

        def pass_over(unwanted: int) -> None:
            starts.extend(itertools.repeat(starts[-1], unwanted))
            heads.extend(itertools.repeat(0, unwanted))

        for sequence in sequences:
            pass_over(0 if count is None else sequence.number - len(heads))
            file.write(np.array(sequence.ids, dtype).tobytes())
            starts.append(starts[-1] + len(sequence.ids))
            heads.append(sequence.head)
            if count is None:
                files.append(sequence.number)
                tags.extend(itertools.chain(*sequence.tags))
                tag_starts.append(len(tags) // 2)
        pass_over(0 if count is None else count - len(heads))
        end = starts[-1] * dtype.itemsize
        arrays = {"ids": (dtype.str, 0, end)}
        for name, values in dict(starts=starts, heads=heads, files=files, tags=tags, tag_starts=tag_starts).items():
            begin = -(-end // 8) * 8
            file.write(bytes(begin - end) + values.tobytes())
            end = begin + len(values) * values.itemsize
            arrays[name] = f"i{values.itemsize}", begin, end
        footer = json.dumps([key, arrays]).encode()
        file.write(footer + len(footer).to_bytes(8, "little"))

    def lengths(self, items: np.ndarray, ctx: int) -> np.ndarray:
        """Tokens of the sample of each item, at most ctx."""
        return np.minimum(self.starts[items + 1] - self.starts[items] + 1, ctx)

    def sample(self, item: int, room: int, place: float = 0.0) -> np.ndarray:
        """The ids of a sample but for the last </s>, at most `room`: the head, and of a longer rest the window that
        begins at `place` in [0, 1)."""
        ids = self.ids[self.starts[item]:self.starts[item + 1]]
        spare, head = len(ids) - room, self.heads[item]
        if spare <= 0:
            return ids
        start = head + int(place * (spare + 1))
        return np.concatenate([ids[:head], ids[start:start + room - head]])


def tokenise(dataset: Dataset, tokenizer: Tokenizer, ctx: int, wanted: np.ndarray, whole: bool = False,
             path: str | None = None) -> TokenStore:
    """The tokens of the wanted items (sorted), kept at `path`, or without one for this run of the program alone.

    Local rank 0 of each host makes them once, in constant memory, while the others wait. Few are kept in memory. A file
    of an earlier run that holds the very same is used again. Raises `Problem`, also where the disk has too little room.
    """
    files = [source.path if source.mark == "-" else source[::2] for source in dataset.sources]  # no two pipes are alike
    parts = [files, dataset.reading, dataset.labels, dataset.count, dataset.bytes, tokenizer.text, ctx, whole,
             len(wanted), zlib.crc32(wanted.tobytes())]
    key = f"{digest(json.dumps(parts)):016x}"

    def write(file: BinaryIO) -> None:
        sequences = progress(dataset.sequences(tokenizer, ctx, wanted, whole), desc="tokenising", unit=" items",
                             total=None if dataset.windows else len(wanted))
        TokenStore.write(file, sequences, key, tokenizer.vocab, None if dataset.windows else dataset.count)

    if world_size() == 1 and dataset.bytes < IN_MEMORY:
        write(file := io.BytesIO())
        return number_windows(dataset, TokenStore(np.frombuffer(file.getbuffer(), np.uint8)))
    given = path
    path = given or os.path.join(tempfile.gettempdir(), f"codessm-{broadcast(os.urandom(8).hex())}.tokens")
    first = world_size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    if first and TokenStore.open(path, key) is None:
        size = 0.8 * dataset.bytes * len(wanted) / dataset.count  # at 2.5 bytes of text a token, which takes 2 bytes
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        if size > free:
            raise Problem(f"no room for {path}: the tokens of this corpus take about {human_bytes(size)}, and "
                          f"{human_bytes(free)} are free", 1)
        try:
            with atomic(path) as file:
                write(file)
        except OSError as error:
            raise Problem(f"could not write {path}: {error.strerror}", 1) from None
    all_gather(None)  # until it is there
    store = TokenStore.open(path, key)
    if store is None:
        raise Problem("the files of this host are not those of rank 0: every host needs the same")
    all_gather(None)
    if first and not given:
        os.remove(path)
    return number_windows(dataset, store)


def number_windows(dataset: Dataset, store: TokenStore) -> TokenStore:
    """Make the splits of files of words splits of the windows in the store; raises `Problem` where one has none."""
    for name, split in dataset.splits.items() if dataset.windows else ():
        dataset.splits[name] = split.of_windows(store.files)
        if not len(dataset.splits[name].examples):
            raise Problem(f"the {name} split has no labelled token")
    return store


WINDOW, CHOSEN, KIND, WHICH = range(4)  # what a draw is for
IGNORE = -100  # a label that is not predicted


def draw(seed: int, epoch: int, item: np.ndarray, position: np.ndarray | int, use: int) -> np.ndarray:
    """Numbers in [0, 1), float64, one for each broadcast element: SplitMix64 (Steele et al. 2014) as a hash.

    `use` keeps draws for different purposes apart.
    """
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
    """Rows padded on the right to one static length a side; rows of length 0 only fill up a batch.

    `places` are positions in the flattened ids of what is to be predicted, `targets` what is right there.
    """
    ids: np.ndarray      # (B, L) int32
    lengths: np.ndarray  # (B,) int32
    items: np.ndarray    # (B, k) int64
    epoch: int = 0
    ids2: np.ndarray | None = None      # of the second side, where there is one
    lengths2: np.ndarray | None = None
    labels: np.ndarray | None = None    # (B,) int64, IGNORE in rows that only fill up
    places: np.ndarray | None = None    # (M,) int64
    targets: np.ndarray | None = None   # (M,) int64
    tokens: int = 0                     # real ones of both sides, over all ranks

    def pieces(self, count: int) -> list["Batch"]:
        """At most `count` batches of equally many rows, the last perhaps of fewer."""
        rows = -(-len(self.ids) // count)
        pieces = []
        for start in range(0, len(self.ids), rows):
            part = {name: value[start:start + rows] for name, value in self._asdict().items()
                    if name not in ("epoch", "places", "targets", "tokens") and value is not None}
            if self.places is not None:
                L = self.ids.shape[1]
                own = (self.places >= start * L) & (self.places < (start + rows) * L)
                part |= dict(places=self.places[own] - start * L, targets=self.targets[own])
            pieces.append(Batch(**part, epoch=self.epoch))
        return pieces


class Batches:
    """`batches[i]` is batch i, counted on from epoch to epoch: index arithmetic on the lengths in a token store.

    Args:
        store, tokenizer, ctx: where the ids are; samples have at most ctx of them.
        examples: (n, k) items. labels: (n,), of those that have them.
        batch: examples a batch, over all ranks.
        seed: of the order; None, as for an evaluation, is by length.
    `len()` is the number of batches an epoch, of which the last is filled up with empty rows. Within a pool of `POOL`
    batches of the shuffled epoch, those with samples of like length are batched together. Of W ranks, rank r gets the
    rows r, r + W, ... of each batch, so all see the same batches.
    """
    POOL = 50

    def __init__(self, store: TokenStore, tokenizer: Tokenizer, ctx: int, examples: np.ndarray, batch: int,
                 seed: int | None = None, labels: np.ndarray | None = None):
        self.store, self.tokenizer, self.ctx, self.batch, self.seed = store, tokenizer, ctx, batch, seed
        if labels is not None and examples.shape[1] > 1:  # a pair has no order, and its longer side first pads less
            examples = np.take_along_axis(examples, (-store.lengths(examples, ctx)).argsort(1), 1)
        self.examples, self.labels = examples, labels
        self.static = static_lengths(ctx)
        self.ordered = None, None  # the epoch whose order this is

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of one epoch."""
        return (self[i] for i in range(len(self)))

    def order(self, epoch: int) -> np.ndarray:
        """(batches, batch): which examples make up each batch of an epoch, -1 filling up the last."""
        if self.ordered[0] == epoch:
            return self.ordered[1]
        n = len(self.examples)
        order = np.arange(n) if self.seed is None else shuffled(n, self.seed, epoch)
        lengths = self.store.lengths(self.examples[order], self.ctx)
        pool = np.arange(n) // (n if self.seed is None else self.POOL * self.batch)
        by_length = np.lexsort((-lengths.max(1), pool))
        if lengths.shape[1] > 1:  # of five batches whose longer sides are alike, those with like shorter ones
            run = np.empty(n, int)
            run[by_length] = np.arange(n) // (5 * self.batch)  # five divide a pool
            by_length = np.lexsort((-lengths.max(1), -lengths.min(1), run))
        order = np.append(order[by_length], np.full(-n % self.batch, -1)).reshape(-1, self.batch)
        if self.seed is not None:
            random = np.random.default_rng((self.seed, epoch, 1)).random(len(order))
            order = order[np.lexsort((random, np.arange(len(order)) // self.POOL))]
        self.ordered = epoch, order
        return order

    def padded_lengths(self, count: int) -> set[int]:
        """The static lengths that occur in the first `count` batches, of one epoch at most."""
        order = self.order(0)[:count]
        lengths = self.store.lengths(self.examples[order], self.ctx) * (order >= 0)[..., None]
        return set(self.static[np.searchsorted(self.static, lengths.max(1))].ravel().tolist())

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
        """ids (B, L) and lengths (B,), both int32, of the samples of the items, of which -1 has none."""
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
        return tuple(np.concatenate([np.empty((0, 2), np.int64), *found]).astype(np.int64).T)


# ---- benchmarks -------------------------------------------------------------------------------------

class Task(NamedTuple):
    """What `pretrain` or `finetune` trains for."""
    kind: str                      # mlm, retrieval, classify, tag or pair
    ctx: int                       # tokens a sample
    epochs: int
    metric: str                    # by which the best evaluation is chosen
    text: tuple[str, ...] = ()     # the names that a field may have, the first that is there wins
    code: tuple[str, ...] = CODE_FIELDS
    label: str = "label"
    labels: tuple[str, ...] = ()   # all there are, where the task fixes them
    files: str = "train.jsonl, valid.jsonl and test.jsonl, or one file, split 80/10/10"
    line: str = ""                 # what a line looks like
    published: str = ""            # where
    docstrings: bool = False       # code may hold its own description, which is cut out
    all_candidates: bool = False   # the candidates are those of all splits
    splits: tuple[str, ...] = SPLITS  # that training reads
    evaluations: int = 0           # of a run; 0, one an epoch


ADVTEST = Task(
    "retrieval", 512, 2, "mrr", ("docstring_tokens", "docstring"),
    ("code_tokens", "function_tokens", "code", "function"), files="train.jsonl, valid.jsonl and test.jsonl",
    line='{"docstring_tokens": [...], "code_tokens": [...], "url": "...", "idx": 0}',
    published="https://github.com/microsoft/CodeXGLUE/tree/main/Text-Code/NL-code-search-Adv", docstrings=True)
TASKS = {
    "advtest": ADVTEST,
    "nlcodesearch": ADVTEST,
    "sqa": Task(
        "retrieval", 1024, 3, "mrr", ("question",), ("answer",), all_candidates=True,
        files="corpus.jsonl, queries.jsonl and qrels/{train,test}.tsv (CoIR), or Questions.csv and Answers.csv "
              "(StackSample), or JSONL", line='{"question": "...", "answer": "..."}',
        published="https://huggingface.co/datasets/CoIR-Retrieval/stackoverflow-qa and "
                  "https://www.kaggle.com/datasets/stackoverflow/stacksample"),
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
                      docstrings=True),
    "classify": Task("classify", 512, 3, "accuracy", line='{"code": "...", "label": "..."}'),
    "tag": Task("tag", 512, 3, "accuracy", line='{"tokens": ["def", "f", ...], "labels": [null, "name", ...]}'),
    "pair": Task("pair", 512, 3, "f1", labels=("0", "1"), line='{"code1": "...", "code2": "...", "label": 0}'),
    "mlm": Task("mlm", 256, 1, "loss", splits=SPLITS[:2], evaluations=10),
}
UNK = "UNK"  # row 0 of a vocabulary of tags; predicted, it is always wrong


class Example(NamedTuple):
    """What a line of JSONL holds: two texts, two codes, one code, or a list of words; and its labels."""
    texts: tuple[str, ...] | list[str]
    label: str | list[str | None] | None
    record: dict


def parse_example(task: Task, line: bytes, labelled: bool = True) -> Example:
    """An example of a task; unless `labelled`, its label is None and each word's UNK. Raises `BadLine`."""
    record = parse_json(line)
    if task.kind == "tag":
        words = field(record, ["tokens"], as_words)
        labels = field(record, ["labels"], as_list) if labelled else [UNK] * len(words)
        if len(labels) != len(words):
            raise BadLine(f"{len(words):,} tokens and {len(labels):,} labels: there must be one for each, or null")
        if not words:
            raise BadLine("the list of tokens is empty")
        labels = [field({"labels": label}, ["labels"], as_label, required=False) for label in labels]
        if labelled and not task.published and UNK in labels:  # one's own tags
            raise BadLine(f'the label "{UNK}" stands for what is not known: give it another name')
        return Example(words, labels, record)
    sides = {"retrieval": [task.text, task.code], "pair": [("code1", "func1"), ("code2", "func2")],
             "classify": [task.code]}[task.kind]
    texts = [field(record, names, as_text) for names in sides]
    if task.docstrings and not any(isinstance(record.get(name), list) for name in task.code):
        # ranked as it is, the query would lie inside the answer
        texts[1] = separate_docstring(*texts)[1]
    check_not_empty(texts)
    label = field(record, [task.label], as_label) if labelled and task.kind != "retrieval" else None
    if label is not None and task.labels and label not in task.labels:
        raise BadLine(f'the label "{label[:80]}" is none of those of the task, which are {listed(task.labels, 12)}')
    return Example(tuple(texts), label, record)


def check_not_empty(texts: Iterable[str]) -> None:
    """Raise `BadLine` where one of an example's texts is blank."""
    if not all(text.strip() for text in texts):
        raise BadLine("the text or code is empty")


def digest(string: str) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(blake2b(string.encode(), digest_size=8).digest(), "big")


def seeded_split(key: str) -> str:
    """train, valid or test, 80/10/10, by a hash of what must stay together: the code, and so its copies too."""
    place = digest(f"split {key}") / 2 ** 64
    return "train" if place < 0.8 else "valid" if place < 0.9 else "test"


class ArraySource(Source):
    """A file that is one JSON array of objects, as its elements: a line each, with its place as `idx`."""

    def lines(self, longest: int = MAX_LINE) -> Iterator[tuple[int, bytes | BadLine, int]]:
        try:
            elements = json.loads(read_text(self.path))
            if not isinstance(elements, list) or not all(isinstance(element, dict) for element in elements):
                raise ValueError("no array of objects")
        except (ValueError, RecursionError) as error:
            raise Problem(f"{self.name}: not JSON as published: {error}") from None
        for number, element in enumerate(elements):
            yield number + 1, json.dumps(element | {"idx": number}).encode(), 0


class CSVSource(Source):
    """A table of StackSample (latin-1, bodies in HTML) as JSON lines: the questions, or the best answer to each.

    An answer goes by the _id of its question. Of equally scored ones the first is taken, blank ones are left out.
    """

    def lines(self, longest: int = MAX_LINE) -> Iterator[tuple[int, bytes | BadLine, int]]:
        if os.path.basename(self.path) == "Questions.csv":
            for number, row in self.rows(longest, "Id", "Title", "Body"):
                yield number, row if isinstance(row, BadLine) else json.dumps(
                    {"_id": row[0], "title": row[1], "text": plain_text(row[2])}).encode(), 0
            return
        best: dict[str, tuple[int, int]] = {}  # question -> (score, line) of its best answer
        for number, row in self.rows(longest, "ParentId", "Score", "Body"):
            if not isinstance(row, BadLine) and not re.fullmatch(r"-?\d{1,9}", row[1]):
                row = BadLine(f'the score "{row[1][:80]}" is no number')
            if isinstance(row, BadLine):
                yield number, row, 0
            elif int(row[1]) > best.get(row[0], (-math.inf, 0))[0] and plain_text(row[2]):
                best[row[0]] = int(row[1]), number
        for number, row in self.rows(longest, "ParentId", "Score", "Body"):
            if not isinstance(row, BadLine) and best.get(row[0], (0, 0))[1] == number:
                yield number, json.dumps({"_id": row[0], "text": plain_text(row[2])}).encode(), 0

    def rows(self, longest: int, *columns: str) -> Iterator[tuple[int, list[str] | BadLine]]:
        """(line number, those columns) of each row, or what is wrong with it; raises `Problem`."""
        csv.field_size_limit(longest)
        with open(self.path, encoding="latin-1", newline="") as file:
            rows = csv.reader(iter(partial(file.readline, longest + 1), ""), strict=True)
            try:
                header = next(rows, [])
                header[:1] = [column.removeprefix("\xef\xbb\xbf") for column in header[:1]]  # a byte order mark
                missing = next((column for column in columns if column not in header), None)
                if missing:
                    raise Problem(f"{self.name}:1: no column {missing}; the columns are {listed(header, 12) or 'none'}")
                for row in filter(None, rows):
                    yield rows.line_num, [row[header.index(column)] for column in columns] \
                        if len(row) == len(header) else \
                        BadLine(f"{len(row)} columns, where the header has {len(header)}")
            except csv.Error as error:
                raise Problem(f"{self.name}:{rows.line_num}: {error}") from None


def plain_text(html_text: str) -> str:
    """The text of StackOverflow's HTML: tags out, a line end where a block ends, entities resolved, code as it was."""
    text = re.sub(r"<br ?/?>|</(?:p|li|td|th|tr|h\d|div|pre|blockquote)>", "\n", html_text)
    return html.unescape(re.sub(r"</?[A-Za-z][^<>]*>|<!--.*?-->", "", text, flags=re.DOTALL)).strip()


class Benchmark(Dataset):
    """The files of a benchmark as published. An item is a distinct text, or of tagging a file of words.

    Args:
        name, path: the task; a folder with its files, or its one file.
        wanted: the splits to read; `required` are those that must be there.
        labels: of the model, where there is one; else they are the task's or those of the training split.
        names: keep what the examples call themselves.
        limit, skip_bad, longest: as for `Records`.
    `sources` are the files read. `notes` says what a reader should know. Raises `Problem`.
    """

    def __init__(self, name: str, path: str, wanted: Iterable[str] = SPLITS, required: Iterable[str] = SPLITS[:2],
                 labels: list[str] | None = None, limit: int | None = None, skip_bad: bool = False,
                 longest: int = MAX_LINE, names: bool = False):
        self.name, self.path, self.task = name, Path(path), TASKS[name]
        self.limit, self.reading = limit, dict(skip_bad=skip_bad, longest=longest)
        self.wanted, self.required, self.keep_names = list(wanted), list(required), names
        self.labels, self.windows, self.notes = list(labels or self.task.labels), self.task.kind == "tag", []
        self.sources: list[Source] = []
        self.splits = {}
        if not self.path.exists():
            raise self.expected(f"{path}: no such file or folder")
        has = {f for f in os.listdir(path) if (self.path / f).is_file()} if self.path.is_dir() else set()
        if name == "clone":
            self.read_tables([self.open("data.jsonl")], ("func",), "idx", self.clone_rows)
        elif name == "devign" and "function.json" in has:
            self.read_tables([ArraySource(*self.open("function.json"))], ("func",), "idx", self.devign_rows)
        elif name == "sqa" and {"corpus.jsonl", "queries.jsonl"} & has:
            self.read_tables([self.open("queries.jsonl"), self.open("corpus.jsonl")], ("title", "text"), "_id",
                             self.beir_rows)
        elif name == "sqa" and {"Questions.csv", "Answers.csv"} & has:
            self.read_tables([CSVSource(*self.open(f"{table}.csv")) for table in ("Questions", "Answers")],
                             ("title", "text"), "_id", self.stacksample_rows)
        else:
            self.read_examples(self.find_files(has))
        for split in self.required:
            if not len(self.splits.get(split, Split(np.empty(0))).examples):
                raise self.no_split(split)

    def expected(self, what: str) -> Problem:
        """The error of a benchmark that is not there, or not whole."""
        where = f". It is published at {self.task.published}" if self.task.published else ""
        return Problem(f"{what}; {self.name} is read from {self.task.files}, a line of JSONL being like "
                       f"{self.task.line}{where}")

    def no_split(self, split: str) -> Problem:
        if self.path.is_file():
            return Problem(f"{self.path}: none of its records falls into the {split} split, a tenth of them: give more")
        other = " (--split valid scores the validation split)" if split == "test" else ""
        return self.expected(f"{self.path}: there is no {split} split{other}")

    def open(self, file: str) -> Source:
        """A file of the benchmark, which is noted among the sources."""
        path = self.path / file if self.path.is_dir() else self.path
        if not path.exists() or file != path.name and self.path.is_file():
            raise self.expected(f"{path}: no such file" if not path.exists() else f"{path} is a file, not a folder")
        if not path.is_file():
            raise Problem(f"{path} is no plain file: a benchmark is read more than once")
        source = open_source(str(path))
        self.sources += [source] if source not in self.sources else []
        return source

    def texts(self) -> Iterator[object]:
        for _, example in self.records:
            if self.windows:
                yield example.texts, example.label
            else:
                yield from example.texts

    def strings(self, text: object) -> list[str]:
        return [" ".join(text[0])] if self.windows else [text]

    def description(self) -> str:
        parts = [f"{len(split.examples):,} {name}" for name, split in self.splits.items()]
        parts += [f"{len(split.candidates):,} candidates for {name}" for name, split in self.splits.items()
                  if split.candidates is not None and name != "train"]
        return "; ".join([", ".join(parts), *self.notes])

    # -- JSONL, an example a line

    def find_files(self, has: set[str]) -> list[tuple[str | None, Source]]:
        """(split, file) of each file that is read; the split is None of one that holds all of them."""
        if not self.path.is_dir():
            return [(None, self.open(self.path.name))]
        has = {file for file in has if visible(file)}
        ending = r"\.jsonl(\.gz|\.bz2|\.xz)?"
        found = {split: sorted(f for f in has if re.fullmatch(split + r"\d*" * (split == "train") + ending, f))
                 for split in SPLITS}
        if not any(found.values()):
            one = sorted(f for f in has if JSON_LINES.fullmatch(f) and not is_log(str(self.path / f)))
            if len(one) != 1:
                raise self.expected(f"{self.path}: no train.jsonl there"
                                    + (f", and more than one other file: {listed(one)}" if one else ""))
            return [(None, self.open(one[0]))]
        for split in self.required:
            if not found[split]:
                raise self.no_split(split)
        return [(split, self.open(file)) for split, files in found.items() for file in files
                if split in self.wanted or self.task.all_candidates]

    def read_examples(self, files: list[tuple[str | None, Source]]) -> None:
        """The splits of files that have an example a line."""
        kind, given = self.task.kind, bool(self.labels)
        self.read_vocabulary()
        self.records = Records([source for _, source in files], partial(parse_example, self.task), self.limit,
                               **self.reading)
        known, tags, labels, records = set(self.labels), Counter(), [], []
        digests, splits = array.array("Q"), bytearray()
        for place, example in self.records:
            split = SPLITS.index(files[place][0] or seeded_split(self.stays_together(example)))
            if kind == "tag" and split == 0 and not self.labels:
                tags.update(label for label in example.label if label is not None)
            if kind in ("classify", "pair"):
                # the training split comes first, and has all the labels there are
                if files[place][0] in SPLITS[1:] and not known:
                    known.update(labels)
                if known and example.label not in known:
                    self.records.reject(BadLine(f'the label "{example.label[:80]}" is none of those trained on, which '
                                                f"are {listed(sorted(known), 12)}"))
                    split = len(SPLITS)
            labels.append(None if kind == "tag" else example.label)
            records.append(example.record if self.keep_names and split < len(SPLITS) else None)
            digests.extend([len(splits)] if kind == "tag" else map(digest, example.texts))
            splits.append(split)
            self.bytes += sum(map(len, example.texts))
        self.bad = self.records.bad
        n = len(splits)
        if not n:
            raise self.records.none_found()
        where = listed(source.name for source in self.records.sources)
        if kind == "tag" and not self.labels:
            self.labels = [UNK] + ["any"] * (self.name == "typeinf")
            self.labels += [label for label, _ in tags.most_common(50_000) if label not in self.labels]
            if len(tags) < 2:
                raise Problem(f"{where}: the training split has the label {listed(tags) or 'null'} alone: there is "
                              "nothing to tell apart")
        elif kind == "classify" and not given:
            self.labels = sorted(set(labels), key=lambda x: (int(x) if x.isdecimal() and len(x) < 20 else math.inf, x))
            if len(self.labels) < 2:
                raise Problem(f"{where}: all examples have the same label, {labels[0]}: there is nothing to tell apart")
        items = self.items_of(digests).reshape(n, -1)
        for split in self.wanted:
            rows = np.flatnonzero(np.frombuffer(splits, np.uint8) == SPLITS.index(split)).tolist()
            if rows and kind == "retrieval":
                ranked = range(n) if self.task.all_candidates else rows
                self.add_retrieval(split, items[rows], [(row, name_of(records[row], i, "url", "idx", "_id"))
                                                        for i, row in enumerate(rows)],
                                   {items[row, 1]: name_of(records[row], i, "idx", "_id")
                                    for i, row in reversed([*enumerate(ranked)])})
            elif rows:
                self.add_split(split, items[rows], [labels[row] for row in rows],
                               [name_of(records[row], i, "idx") for i, row in enumerate(rows)])

    def stays_together(self, example: Example) -> str:
        """The code of an example, whose copies must be in the same split; of a pair both, in no order."""
        return "\0".join(sorted(example.texts) if self.task.kind == "pair" else
                         example.texts[self.task.kind == "retrieval":])

    def items_of(self, digests: array.array) -> np.ndarray:
        """The item of each text by the digests of the texts: the number of the first that is equal."""
        self.count = len(digests)
        _, first, inverse = np.unique(np.frombuffer(digests, np.uint64), return_index=True, return_inverse=True)
        if len(first) < len(inverse):
            self.notes.append(f"{len(inverse) - len(first):,} texts that are equal to another are one with it")
        return first[inverse]

    def add_split(self, split: str, examples: np.ndarray, labels: list[str], names: list) -> None:
        index = {label: number for number, label in enumerate(self.labels)}
        self.splits[split] = Split(examples, None if self.windows else np.array([index[label] for label in labels]),
                                   names)

    def add_retrieval(self, split: str, examples: np.ndarray, queries: list[tuple],
                      candidates: dict[int, object]) -> None:
        """A split of (text, code) items: `queries` are (key, name) of the query of each example, where those with the
        same key are one; `candidates` are the names of the items that are ranked.

        What is right for a text is so for every query with an equal text.
        """
        right: dict[int, set[int]] = {}
        for text, code in examples.tolist():
            right.setdefault(text, set()).add(code)
        texts = {query: text for query, text in zip(queries, examples[:, 0].tolist())}
        ranked = sorted(candidates)
        place = {item: i for i, item in enumerate(ranked)}
        self.splits[split] = Split(
            np.unique(examples, axis=0), queries=np.array([*texts.values()]), query_names=[name for _, name in texts],
            candidates=np.array(ranked), candidate_names=[candidates[item] for item in ranked],
            right=np.array([(i, place[code]) for i, text in enumerate(texts.values()) for code in sorted(right[text])]))

    def read_vocabulary(self) -> None:
        """The tags of vocab_50000.txt, a line each, where it lies beside the files."""
        path = self.path / "vocab_50000.txt"
        if self.name != "typeinf" or self.labels or not path.is_file():
            return
        source = self.open(path.name)
        self.labels = [line.split("\t")[0].strip("\r") for line in read_text(path).rstrip("\n").split("\n")]
        if len(self.labels) < 2 or self.labels[0] != UNK:
            raise Problem(f"{source.name}:1: the first line of a vocabulary of types is {UNK}, the second the type "
                          "that says nothing (any)")
        twice = [label for label, count in Counter(self.labels).items() if count > 1]
        if twice:
            raise Problem(f"{source.name}: {listed(map(repr, twice))} is there more than once")

    # -- tables of named texts, and lines that refer to them by their names

    def read_tables(self, tables: list[Source], fields: tuple[str, ...], key: str,
                    relation: Callable[[str, list[dict[str, int]], list], list[tuple]]) -> None:
        """The splits of tables that have a text in `fields` and its name in the field `key`.

        `relation(split, keys, labels)` gives (texts, label, name) of each example, the texts being numbers: those of
        the names in a table are keys[table][name], the label beside a text is labels[number].
        """
        self.records = Records(tables, partial(parse_named, self.task, fields, key), **self.reading)
        keys: list[dict[str, int]] = [{} for _ in tables]
        digests, labels = array.array("Q"), []
        for place, (texts, label, record) in self.records:
            name = as_label(record[key])
            if name in keys[place]:
                self.records.reject(BadLine(f"the {key} {name[:80]} is there already"))
            keys[place].setdefault(name, len(digests))
            labels.append(label)
            digests.append(digest(texts[0]))
            self.bytes += len(texts[0])
        self.bad = self.records.bad
        if not len(digests):
            raise self.records.none_found()
        items = self.items_of(digests)
        for split in self.wanted:
            rows = relation(split, keys, labels)
            if not rows:
                continue
            numbers, labels_, names = zip(*rows)
            if self.task.kind == "retrieval":
                self.add_retrieval(split, items[np.array(numbers)], [(name, name) for name in names],
                                   {items[number]: name for name, number in reversed(keys[1].items())})
            else:
                self.add_split(split, items[np.array(numbers)], labels_, names)

    def rows(self, file: str, parse: Callable[[str], tuple | None]) -> list[tuple]:
        """What `parse` makes of the lines of a text file, if there is one; it raises `BadLine`."""
        if not (self.path / file).exists():
            return []
        known = len(self.sources)
        records = Records([self.open(file)], lambda line: parse(line.decode("utf-8-sig", "replace").strip()),
                          self.limit, **self.reading)
        found = [row for _, row in records]
        self.bad += records.bad if len(self.sources) > known else 0  # a file may be read for two splits
        return found

    def devign_rows(self, split: str, keys: list[dict[str, int]], labels: list) -> list[tuple]:
        """Devign: a line is a position in the array of functions."""
        def parse(line: str) -> tuple:
            if line not in keys[0]:
                raise BadLine(f'"{line[:80]}" is the position of no function in function.json')
            return [keys[0][line]], labels[keys[0][line]], int(line)

        return self.rows(f"{split}.txt", parse)

    def clone_rows(self, split: str, keys: list[dict[str, int]], _labels: list) -> list[tuple]:
        """BigCloneBench: a line is idx1, idx2, label."""
        def parse(line: str) -> tuple:
            *names, label = line.split()
            if len(names) != 2:
                raise BadLine(f"{len(line.split())} fields, where idx1, idx2 and label are expected")
            for name in names:
                if name not in keys[0]:
                    raise BadLine(f"no function in data.jsonl has the idx {name[:80]}")
            if label not in self.task.labels:
                raise BadLine(f'the label "{label[:80]}" is neither 0 nor 1')
            return [keys[0][name] for name in names], label, tuple(names)

        return self.rows(f"{split}.txt", parse)

    def beir_rows(self, split: str, keys: list[dict[str, int]], _labels: list) -> list[tuple]:
        """BEIR: a line is query-id, corpus-id, score, tabs between them; without a validation split a tenth of the
        training queries is one, by a hash."""
        def parse(line: str) -> tuple | None:
            names = line.split("\t")
            if names[-1] == "score":
                return None  # the header
            try:
                score = float(names[2]) if len(names) == 3 else math.nan
            except ValueError:
                score = math.nan
            if math.isnan(score):
                raise BadLine("not query-id, tab, corpus-id, tab, score")
            for name, table, file in zip(names, keys, ("queries.jsonl", "corpus.jsonl")):
                if name not in table:
                    raise BadLine(f"no text in {file} has the _id {name[:80]}")
            return ([keys[0][names[0]], keys[1][names[1]]], None, names[0]) if score > 0 else None

        published = next((name for name in ("valid", "dev") if (self.path / f"qrels/{name}.tsv").exists()), None)
        if split == "test" or published:
            return self.rows(f"qrels/{published if split == 'valid' else split}.tsv", parse)
        if split == "valid":
            self.notes.append("the validation split is a tenth of the training queries, by a hash")
        return [row for row in self.rows("qrels/train.tsv", parse)
                if (seeded_split(row[2]) == "valid") == (split == "valid")]

    def stacksample_rows(self, split: str, keys: list[dict[str, int]], _labels: list) -> list[tuple]:
        """StackSample: each question with its best-scored answer, split by a hash of the question's Id."""
        return [([number, keys[1][name]], None, name) for name, number in keys[0].items()
                if name in keys[1] and seeded_split(name) == split]

    # -- tagging

    def sequences(self, tokenizer: Tokenizer, ctx: int, wanted: np.ndarray, whole: bool) -> Iterator[Sequence]:
        """Of files of words windows, cut between words; each labelled word is in exactly one.

        A word is encoded with a space before it, and cut if it fills a window. Its label stands at its first sub-token.
        Windows without a labelled word are left out.
        """
        if not self.windows:
            yield from super().sequences(tokenizer, ctx, wanted, whole)
            return
        index, room, cache = {label: number for number, label in enumerate(self.labels)}, ctx - 2, {}
        for number, (words, labels) in zip(map(int, wanted), self.select(wanted)):
            if len(cache) > 200_000:
                cache.clear()
            new = list({word for word in words if word not in cache})
            for word, ids in zip(new, tokenizer.encode_many([f" {word}" for word in new])):
                cache[word] = ids[:room] or [tokenizer.mask]
            ids, tags = [tokenizer.start], []
            for word, label in zip([*words, None], [*labels, None]):
                if word is None or len(ids) - 1 + len(cache[word]) > room:
                    if tags:
                        yield Sequence(number, ids, tags=tags)
                    ids, tags = [tokenizer.start], []
                if word is not None:
                    if label is not None:
                        tags.append((len(ids), index.get(label, 0)))
                    ids += cache[word]


def parse_named(task: Task, fields: tuple[str, ...], key: str, line: bytes) -> Example:
    """What a line holds in `fields`, joined by line ends, if it has a name in the field `key`; raises `BadLine`."""
    record = parse_json(line)
    found = [field(record, [name], required=False) for name in fields]
    if found == [None] * len(fields):
        field(record, fields)
    text = "\n".join(part for part in found if part and part.strip())
    check_not_empty([text])
    field(record, [key], as_label)
    label = field(record, [task.label], as_label) if task.kind == "classify" else None
    if label is not None and label not in task.labels:
        raise BadLine(f'the label "{label[:80]}" is none of those of the task, which are {listed(task.labels, 12)}')
    return Example((text,), label, record)


def name_of(record: dict | None, number: int, *fields: str) -> object:
    """What a record calls itself: the first of the fields, else its number."""
    return next((record[name] for name in fields if name in record), number) if record else number


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
                 names: bool = False, whole: bool = False, **reading) -> Dataset:
    """The data of a task; raises `Problem`.

    Args:
        paths: of mlm a corpus, the standard library where there is none; else the folder or file of the benchmark.
        wanted, required, labels, names: as for `Benchmark`. `whole`, all that is held out of a corpus is evaluated.
        code_field, text_field: as for `Corpus`. reading: limit, skip_bad and longest of `Records`.
    """
    if TASKS[name].kind != "mlm":
        return Benchmark(name, paths[0], wanted, required, labels, names=names, **reading)
    corpus = Corpus(find_sources(paths) if paths else [standard_library()], code_field, text_field,
                    most_valid=None if whole else HELD_OUT, **reading)
    corpus.splits = {split: corpus.splits[split] for split in wanted}
    for split, found in corpus.splits.items():
        if not len(found.examples):
            raise Problem(f"{listed(source.name for source in corpus.sources)}: nothing is left for the {split} split: "
                          "give more")
    return corpus


def examples_to_predict(paths: Iterable[str], name: str,
                        longest: int = MAX_LINE) -> Iterator[tuple[str, Iterator[Example], set[str]]]:
    """(name, examples, fields not to print) of each thing to predict for: JSONL, or source files and folders of them.

    A field with code or text may have any of the known names. Raises `Problem`.
    """
    task = TASKS[name]
    parse = partial(parse_example, task._replace(code=tuple(dict.fromkeys(task.code + CODE_FIELDS)),
                                                 text=tuple(dict.fromkeys(task.text + TEXT_FIELDS))), labelled=False)
    for path in map(str, paths):
        language = language_of(path)
        folder = os.path.isdir(path) and any(source_files([path]))
        if path == "-" or not language and not folder:
            for source in find_sources([path]):
                yield source.name, (example for _, example in Records([source], parse, longest=longest)), set()
        elif task.kind in ("pair", "retrieval") or task.kind == "tag" and language not in ("python", None):
            raise Problem(f"{path}: a model for {name} needs JSONL with lines like {TASKS[task.kind].line}"
                          + ", or Python files" * (task.kind == "tag"))
        else:
            yield path, (parse(json.dumps(row).encode()) for row in file_records(path, task.kind)), {"code"}


# ---- source trees -----------------------------------------------------------------------------------

LANGUAGES = {
    ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".hh": "cpp",
    ".cs": "csharp", ".cu": "cuda", ".dart": "dart", ".ex": "elixir", ".exs": "elixir", ".erl": "erlang",
    ".f90": "fortran", ".go": "go", ".hs": "haskell", ".java": "java", ".jl": "julia", ".js": "javascript",
    ".jsx": "javascript", ".mjs": "javascript", ".kt": "kotlin", ".lua": "lua", ".m": "objective-c",
    ".ml": "ocaml", ".php": "php", ".pl": "perl", ".pm": "perl", ".py": "python", ".pyw": "python", ".r": "r",
    ".rb": "ruby", ".rs": "rust", ".scala": "scala", ".sh": "shell", ".sql": "sql", ".swift": "swift",
    ".ts": "typescript", ".tsx": "typescript", ".zig": "zig",
}
INSTALLED = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
LARGEST_SOURCE = 1 << 20  # bytes; above it a file is generated or minified
# what Python's parser and tokenizer raise at source that is wrong or nested too deeply
UNPARSABLE = SyntaxError, ValueError, RecursionError, MemoryError, IndexError, tokenize.TokenError


def language_of(path: str) -> str | None:
    return LANGUAGES.get(os.path.splitext(path)[1].lower())


def source_files(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path, path in the tree or trees) of each source file, without hidden and installed folders."""
    paths = list(paths)
    for root in paths:
        if os.path.isfile(root):
            yield root, os.path.basename(root)
            continue
        above = os.path.dirname(os.path.realpath(root)) if len(paths) > 1 else root
        for path in walk(root, lambda folder, name: name in INSTALLED
                         or os.path.exists(os.path.join(folder, name, "pyvenv.cfg"))):
            if language_of(path) and os.path.isfile(path):
                yield path, os.path.relpath(path, above)


def read_sources(paths: Iterable[str], languages: Iterable[str] = ()) -> Iterator[tuple[str, str, str]]:
    """(source, language, path in the tree) of each source file under `paths`; says what was left out.

    Only of the given languages, where some are given. Raises `Problem` where there is nothing.
    """
    paths = list(paths)
    for path in paths:
        if not os.path.exists(path):
            raise Problem(f"{path}: no such file or folder")
    files = [(path, relative, language_of(path) or "unknown") for path, relative in source_files(paths)]
    files = [file for file in files if not languages or file[2] in languages]
    if not files:
        known = " ".join(ending for ending, language in LANGUAGES.items() if not languages or language in languages)
        raise Problem(f"{', '.join(paths)}: no source files; known are {known}")
    skipped: Counter[str] = Counter()
    for path, relative, language in progress(files, desc="reading sources", unit=" files"):
        try:
            source = read_source(path, language)
        except (OSError, BadLine) as error:
            skipped[getattr(error, "strerror", None) or str(error)] += 1
            continue
        yield source, language, well_formed(relative)
    info(f"{len(files):,} source files"
         + "".join(f"; {count:,} left out: {reason}" for reason, count in sorted(skipped.items())))


def read_source(path: str, language: str) -> str:
    """The text of a source file, in the encoding that a Python file declares, otherwise UTF-8; raises `BadLine`."""
    if os.path.getsize(path) > LARGEST_SOURCE:
        raise BadLine(f"over {human_bytes(LARGEST_SOURCE)}")
    try:
        with tokenize.open(path) if language == "python" else open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (SyntaxError, UnicodeError, LookupError):
        raise BadLine("not text in UTF-8 or its declared encoding") from None


def build_corpus(paths: Iterable[str], out: BinaryIO) -> None:
    """Write the code under `paths` as JSONL: a record a Python function, a record a file otherwise.

    A record has `code`, `docstring` where there is one (it is then not in the code), `language`, `path`
    and, for a function, `name` and `line`. Code seen before is dropped. What was left out is said.
    """
    seen: set[bytes] = set()
    records = duplicates = 0
    for source, language, path in read_sources(paths):
        for record in cut_source(source, language):
            record = {name: well_formed(v) if isinstance(v, str) else v for name, v in record.items()}
            if not is_new(seen, record["code"]):
                duplicates += 1
                continue
            line = json.dumps(record | {"language": language, "path": path}, ensure_ascii=False)
            out.write(line.encode() + b"\n")
            records += 1
    info(f"{records:,} records; {duplicates:,} exact duplicates dropped")
    if not records:
        raise Problem(f"{', '.join(paths)}: the source files hold no code to take")


def is_new(seen: set[bytes], text: str) -> bool:
    """Whether a text is not among those seen, to which it is added."""
    key = blake2b(text.encode(), digest_size=16).digest()
    return key not in seen and not seen.add(key)


def cut_source(source: str, language: str) -> list[dict]:
    """The records of one file: its functions if it is Python that parses, else the whole of it."""
    if language == "python":
        try:
            return list(python_functions(source, parse_python(source)))
        except UNPARSABLE:
            pass
    return [{"code": source}] if source.strip() else []


def parse_python(source: str) -> ast.Module:
    """The tree of a source, without a word on the escapes that it spells wrongly; raises SyntaxError and others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


class Positions:
    """The places in a source that its tree speaks of."""

    def __init__(self, source: str):
        self.rows = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", source)  # what ends a line for ast
        self.starts = np.cumsum([0, *map(len, self.rows)]).tolist()

    def place(self, line: int, column: int) -> int:
        """The index in the source of a line from 1 and a column in bytes of UTF-8."""
        return self.starts[line - 1] + len(self.rows[line - 1].encode()[:column].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)


def python_functions(source: str, tree: ast.Module) -> Iterator[dict]:
    """Each function and method, decorators included, with its docstring apart and its indent taken off.

    A function inside a function stays part of that one. A body that was only a docstring becomes `pass`.
    """
    positions, waiting = Positions(source), [(node, False) for node in reversed(tree.body)]
    while waiting:
        node, method = waiting.pop()
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts = (getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers", "cases"))
            waiting += [(child, method or isinstance(node, ast.ClassDef))
                        for child in reversed([*itertools.chain(*parts)])]
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        while node.decorator_list and not positions.rows[first - 1].lstrip(" \t\f").startswith("@"):
            first -= 1  # a decorator in parentheses begins after its @
        begin, (_, end) = positions.starts[first - 1], positions.span(node)
        record = {"name": node.name, "line": first} | ({"method": True} if method else {})
        code, docstring = source[begin:end], ast.get_docstring(node)
        if docstring is not None:
            a, b = positions.span(node.body[0])
            code = cut_literal(code, a - begin, b - begin, len(node.body) == 1)
            if docstring.strip():
                record["docstring"] = docstring.strip()
        row = positions.rows[first - 1]
        indent = row[:len(row) - len(row.lstrip(" \t\f"))]
        if indent:
            code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        yield {"code": code} | record


def file_records(path: str, kind: str) -> Iterator[dict]:
    """A record to predict for of each source file under `path`; says how many are empty, and so have none."""
    empty = 0
    for source, _language, relative in read_sources([path], ["python"] if kind == "tag" else ()):
        name = os.path.join(path, relative) if os.path.isdir(path) else path
        try:
            record = {"tokens": typed_tokens(source, always=True)[0]} if kind == "tag" else {"code": source.strip()}
        except UNPARSABLE as error:
            raise Problem(f"{name}: not Python that parses ({error or type(error).__name__})") from None
        if any(record.values()):
            yield {"path": name} | record | ({} if kind == "tag" else {"code": source})
        else:
            empty += 1
    if empty:
        info(f"{path}: {empty:,} empty files have no prediction")


# ---- generated benchmarks ---------------------------------------------------------------------------

FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
NAME_FIELD = {ast.Name: "id", ast.arg: "arg", ast.alias: "asname", ast.FunctionDef: "name",
              ast.AsyncFunctionDef: "name", ast.ClassDef: "name", ast.ExceptHandler: "name", ast.MatchAs: "name",
              ast.MatchStar: "name", ast.MatchMapping: "rest", ast.Nonlocal: "names"}  # what may be a variable


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    """The symbol tables of the scopes inside one."""
    for child in table.get_children():
        yield child
        yield from scopes(child)


def obfuscate(code: str, method: bool = False) -> str | None:
    """A function with the names that it binds replaced by func, arg0, ..., var0, ..., the layout kept.

    These are its own, its parameters', locals' and nested functions', where they stand for variables; attributes,
    callees' keywords, globals, strings, and what an import without `as` binds stay. In a `method` its own name, used
    as a variable, is a global's. None where a name is a variable in one scope and none in another, or where the result
    would not parse to the same tree up to these names.
    """
    tree, positions = parse_python(code), Positions(code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as `parse_python` does
        table = symtable.symtable(code, "code", "exec")
    own, nodes = tree.body[0], [node for node in ast.walk(tree) if hasattr(node, "lineno")]
    itself = own.name
    imported = {node.name.split(".")[0] for node in nodes if isinstance(node, ast.alias) and not node.asname}
    imported.add("__class__")  # which the compiler binds in methods that mention it
    variables, fixed = set(), {symbol.get_name() for symbol in table.get_symbols()} - {itself} | imported
    calls_itself = table.lookup(itself).is_referenced()
    for scope in scopes(table):
        for symbol in scope.get_symbols():
            bound = scope.get_type() != "class" and symbol.is_local() or symbol.is_free()
            if symbol.is_parameter() or bound and symbol.get_name() not in imported:
                variables.add(symbol.get_name())
            elif symbol.get_name() == itself and symbol.is_global() and not symbol.is_declared_global():
                calls_itself = True
            else:
                fixed.add(symbol.get_name())
    clash = variables & fixed or itself in fixed or calls_itself and itself in variables
    if clash or any(getattr(node, "type_params", None) for node in nodes):
        return None

    def spelled(node: ast.AST) -> list[str]:
        name = getattr(node, NAME_FIELD.get(type(node), ""), None) or []
        return [name] if isinstance(name, str) else name

    roles: dict[str, str] = {}  # in the order in which the names come
    for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset)):
        role = "func" if isinstance(node, FUNCTION) else "arg" if isinstance(node, ast.arg) else "var"
        for name in variables.intersection(spelled(node)) if node is not own else ():
            roles[name] = role if roles.get(name, "var") == "var" else roles[name]
    numbers = {role: map(str, itertools.count()) for role in ("func", "arg", "var")}
    numbers["func"] = itertools.chain([""], numbers["func"])

    def fresh(role: str) -> str:
        return next(name for number in numbers[role] if (name := role + number) not in fixed)

    own_name = fresh("func")
    new = {name: fresh(role) for name, role in roles.items()}
    decorators = {id(node) for decorator in own.decorator_list for node in ast.walk(decorator)}
    edits = set()
    for node in nodes:
        for name in spelled(node):
            recursive = name == itself and name not in variables and (not method or id(node) in decorators)
            after = own_name if node is own or recursive else new.get(name)
            if after is None or isinstance(node, FUNCTION + (ast.ClassDef,)) and name in fixed:
                continue
            start = locate_name(node, name, code, positions)
            if not code.startswith(name, start):
                return None
            edits.add((start, name, after))
            value = getattr(node, NAME_FIELD[type(node)])
            setattr(node, NAME_FIELD[type(node)],
                    after if isinstance(value, str) else [after if v == name else v for v in value])
    for start, name, after in sorted(edits, reverse=True):
        code = code[:start] + after + code[start + len(name):]
    try:
        return code if ast.dump(parse_python(code)) == ast.dump(tree) else None
    except (SyntaxError, ValueError):
        return None


def locate_name(node: ast.AST, name: str, code: str, positions: Positions) -> int:
    """Where in the code a node spells a name, -1 where that is not found."""
    begin, end = positions.span(node)
    if isinstance(node, (ast.Name, ast.arg)):
        return begin
    if isinstance(node, (ast.alias, ast.MatchAs, ast.MatchStar)):
        return end - len(name)
    keyword = r"(?:async\s+def|def|class)\s+"
    if isinstance(node, ast.ExceptHandler):
        begin, keyword = positions.span(node.type)[1], r"[\s)]*as\s+"
    elif isinstance(node, ast.Nonlocal):
        keyword = rf"nonlocal\b.*?\b(?={name}\b)"
    elif isinstance(node, ast.MatchMapping):
        keyword = rf".*\*\*\s*(?={name}\b)"
    found = re.compile(keyword, re.DOTALL).match(code, begin)
    return found.end() if found else -1


def typed_tokens(source: str, always: bool = False) -> tuple[list[str], list[str | None], list[tuple[int, int]]]:
    """The tokens of Python source without its annotations, for each the type that it was annotated with, and where in
    them its functions begin and end (those inside another left out).

    The annotation of a parameter or a variable labels its name (of an attribute its last token), a return
    annotation the name of the function. Comments and layout are left out; of a file without annotations everything,
    unless `always`. Raises SyntaxError where it does not parse.
    """
    tree = parse_python(source)
    typed = [node for node in ast.walk(tree) if getattr(node, "annotation", None) or getattr(node, "returns", None)]
    if not typed and not always:
        return [], [], []
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline)
              if token.type not in layout and token.string]
    rows = io.StringIO(source).readlines()
    starts = [token.start for token in tokens]
    labels: list[str | None] = [None] * len(tokens)
    gone = np.zeros(len(tokens), bool)

    def at(line: int, column: int) -> int:
        """The number of the first token at or after an ast position."""
        return bisect.bisect_left(starts, (line, len(rows[line - 1].encode()[:column].decode())))

    def take(annotation: ast.expr, opening: str, labelled: int | None) -> None:
        """Remove the tokens from the `opening` one to the annotation's last; it labels token number `labelled`."""
        first = at(annotation.lineno, annotation.col_offset)
        last = at(annotation.end_lineno, annotation.end_col_offset)
        while tokens[first].string != opening:  # parentheses around it
            first -= 1
        depth = sum((token.string == "(") - (token.string == ")") for token in tokens[first:last])
        gone[first:last + depth] = True
        if labelled is not None:
            labels[labelled] = ast.unparse(annotation)

    for node in typed:
        if isinstance(node, ast.arg):
            take(node.annotation, ":", at(node.lineno, node.col_offset))
        elif isinstance(node, ast.AnnAssign):
            target = node.target
            named = isinstance(target, (ast.Name, ast.Attribute))
            take(node.annotation, ":", at(target.end_lineno, target.end_col_offset) - 1 if named else None)
        else:
            take(node.returns, "->", at(node.lineno, node.col_offset) + 1 + isinstance(node, ast.AsyncFunctionDef))
    kept = np.flatnonzero(~gone)
    outermost: list[tuple[int, int]] = []
    for begin, end in sorted((at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset))
                             for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
        if not outermost or begin >= outermost[-1][1]:
            outermost.append((begin, end))
    functions = [tuple(np.searchsorted(kept, span).tolist()) for span in outermost]
    return ([well_formed(tokens[i].string) for i in kept], [labels[i] and well_formed(labels[i]) for i in kept],
            functions)


MADE = ("advtest", "typeinf")  # the tasks that can be made of source trees


def build_benchmark(task: str, paths: Iterable[str], folder: str) -> None:
    """Make `advtest` or `typeinf` of the Python files under `paths`: {train,valid,test}.jsonl in `folder`.

    advtest: the first paragraph of a docstring, and the function without it, chosen as CodeSearchNet does (at least
    three words and three lines, no test, no special method); in valid and test the function is obfuscated.
    typeinf: the tokens of a file and the types of some, from its annotations; and vocab_50000.txt of the training
    split's types. Files are split 80/10/10 by a hash of their path. Text seen before is dropped, of advtest also what
    differs in the names alone; out of files are cut the functions that another split has. Raises `Problem`.
    """
    if not folder or os.path.exists(folder) and not os.path.isdir(folder):
        raise Problem(f"{folder or 'an empty name'} is no folder: give -o the name of one")
    for file in sorted(os.listdir(folder)) if os.path.exists(folder) else ():
        if re.fullmatch(r"(train\d*|valid|test)\.jsonl(\.gz)?|vocab_50000\.txt", file):
            raise Problem(f"{os.path.join(folder, file)} exists: remove it, or give another -o")
    paths, seen = list(paths), set()
    files: list[tuple[str, list[dict]]] = []
    for source, _language, path in read_sources(paths, ["python"]):
        records = [record for record in benchmark_records(task, source, path)
                   if is_new(seen, record.get("hidden") or record.get("code") or "\0".join(record["tokens"]))]
        if records:
            files.append((path, records))
    if len(files) < 3:
        what = "functions with docstrings" if task == "advtest" else "annotations"
        raise Problem(f"{', '.join(paths)}: only {len(files)} files with {what}: three splits need more")
    files.sort(key=lambda file: digest(file[0]))
    tenth = max(1, len(files) // 10)
    parts = {"test": files[:tenth], "valid": files[tenth:2 * tenth], "train": files[2 * tenth:]}
    os.makedirs(folder, exist_ok=True)
    home: dict[int, str] = {}  # of the text of a function, the split that has it
    for split in SPLITS:
        found = [record for _, records in parts[split] for record in records]
        rows = [row for record in found if (row := finish_record(record, split, home))]
        with atomic(os.path.join(folder, f"{split}.jsonl")) as out:
            for number, row in enumerate(rows):
                row = row | {"idx": number} if task == "advtest" else row
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        reason = "whose names cannot be replaced" if task == "advtest" else "with types in no function of their own"
        info(f"{folder}/{split}.jsonl: {len(rows):,} {'functions' if task == 'advtest' else 'files'} from "
             f"{len(parts[split]):,} source files"
             + (f"; {len(found) - len(rows):,} left out, {reason}" if len(rows) < len(found) else ""))
        if split == "train" and task == "typeinf":
            types = Counter(label for row in rows for label in row["labels"] if label is not None)
            names = [UNK, "Any"] + [name for name, _ in types.most_common() if name not in (UNK, "Any")]
            with atomic(os.path.join(folder, "vocab_50000.txt")) as out:
                out.write("".join(f"{name}\n" for name in names[:50_000]).encode())
            info(f"{len(types):,} types, {types.total():,} labels in train")


def finish_record(record: dict, split: str, home: dict[int, str]) -> dict | None:
    """The record as its split has it: obfuscated, or without the functions that another split has; None if empty."""
    if "hidden" in record:
        hidden = record.pop("hidden")
        return record if split == "train" else record | {"code": hidden} if hidden else None
    tokens, labels = record["tokens"], record["labels"]
    for begin, end in reversed(record.pop("functions")):
        if home.setdefault(digest("\0".join(tokens[begin:end])), split) != split:
            del tokens[begin:end], labels[begin:end]
    return record if any(labels) else None


def benchmark_records(task: str, source: str, path: str) -> Iterator[dict]:
    """What one Python file gives to a benchmark; nothing if it does not parse."""
    try:
        if task == "typeinf":
            tokens, labels, functions = typed_tokens(source)
            if any(labels):
                yield {"tokens": tokens, "labels": labels, "path": path, "functions": functions}
            return
        for function in list(python_functions(source, parse_python(source))):
            name, code = function["name"], function["code"]
            text = " ".join(re.split(r"\n\s*\n", function.get("docstring", ""))[0].split())
            special = name.startswith("__") and name.endswith("__")
            if len(text.split()) < 3 or len(code.strip().splitlines()) < 3 or special or "test" in name.lower():
                continue
            with suppress(*UNPARSABLE):
                parse_python(code)  # a string over several lines may have lost its indent, and more
                yield {"docstring": well_formed(text), "code": well_formed(code), "url": f"{path}#L{function['line']}",
                       "hidden": obfuscate(well_formed(code), function.get("method", False))}
    except UNPARSABLE:
        return
