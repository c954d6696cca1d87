"""Corpora, the tokenizer and batches: everything between files on disk and arrays of token ids.

    record   one JSON object, a line of a corpus: some code, often with a text that describes it
    sample   what the model sees of a record in one epoch: <s> text </s> code </s>, at most ctx ids
    pool     50 batches of consecutive samples of a shuffled epoch, sorted by length and cut into batches
    draw     a number in [0, 1) that is a hash of (seed, epoch, record, position): no generator has a
             state, so a resumed run, another rank and another batch size all see the same draws
"""
import array
import ast
import atexit
import bisect
import csv
import ctypes
import glob
import gzip
import heapq
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import sysconfig
import tempfile
import textwrap
import tokenize
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import click
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CODE_FIELDS = ("code", "content", "func_code_string", "whole_func_string", "func", "function", "src",
               "original_string")
TEXT_FIELDS = ("docstring", "func_documentation_string", "nl", "doc", "query", "text")
MAX_LINE = 16_000_000  # bytes, unless --max-line says otherwise
MAX_TEXT = 1_000_000_000  # bytes of a file that is read as a whole
UNPACKED = 100  # times its size is what a gzip file may hold
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
STARCODER = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")


# ---- errors, progress, files ------------------------------------------------------------------------

class Problem(click.ClickException):
    """What ends a command with one sentence and an exit code.

    2 is wrong usage or input, 1 a failure, 130 and 143 an interruption. It is said once; of an interruption every
    rank knows, and rank 0 alone says it.
    """
    said = False

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file=None):
        if not self.said and (rank() == 0 or self.exit_code < 128):
            tqdm.write(self.message if self.exit_code > 128 else f"Error: {self.message}", file=sys.stderr)
        self.said = True


def say(message: str) -> None:
    """One line for the person at the terminal, on standard error, clear of any progress bar."""
    if rank() == 0:
        tqdm.write(message, file=sys.stderr)


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A bar on standard error, once the work has taken two seconds; rarely redrawn when that is a file."""
    options = dict(delay=2, mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True,
                   unit_scale=True, file=sys.stderr, disable=rank() > 0) | options
    return tqdm(iterable, **options)


def size(count: float) -> str:
    """A number of bytes for people: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            break
        count /= 1000
    else:
        unit = "TB"
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """At most so many of the names, for a sentence."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[io.BufferedWriter]:
    """A binary file that replaces `path` as a whole when the block ends, and leaves it alone if it fails.

    The bytes go to `path`.tmp, are flushed to the disk, and the file is renamed.
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


# ---- many processes ---------------------------------------------------------------------------------

def rank() -> int:
    """The number of this process, over all hosts, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value) -> list:
    """The values that the ranks bring, on every rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def share_problem(problem: Problem | None) -> None:
    """Raise, on every rank, the first `Problem` that a rank brings, when rank 0 has said it."""
    for found in gather(problem):
        if found is not None:
            if world() > 1:
                if rank() == 0:
                    found.show()
                found.said = True
                gather(None)  # or torchrun might end rank 0 first, as another has failed
            raise found from None


@contextmanager
def together() -> Iterator[None]:
    """What ends this block with a `Problem` on one rank ends it so on all of them, which wait for each other."""
    problem = None
    try:
        yield
    except Problem as error:
        problem = error
    share_problem(problem)


def lead(function: Callable):
    """What `function` returns, or the `Problem` that it raises, on rank 0: on every rank."""
    value = None
    with together():
        if rank() == 0:
            value = function()
    return broadcast(value)


def broadcast(value):
    """Rank 0's value on every rank; the tensors in its dicts and lists go one by one, to each rank's CPU."""
    if world() == 1:
        return value
    tensors: list[torch.Tensor] = []

    def each(change: Callable, value):
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, dict):
            return {key: each(change, part) for key, part in value.items()}
        return type(value)(each(change, part) for part in value) if type(value) in (list, tuple) else value

    def send(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor.cpu().contiguous())
        return torch.empty_like(tensors[-1], device="meta")

    def receive(shape: torch.Tensor) -> torch.Tensor:
        tensor = tensors.pop(0) if rank() == 0 else torch.empty_like(shape, device="cpu")
        dist.broadcast(tensor, 0)
        return tensor

    box = [each(send, value)]
    dist.broadcast_object_list(box)
    return each(receive, box[0])


def on_host(function: Callable):
    """What `function` returns, or the `Problem` that it raises, on one rank of each host: on every rank of that host.

    For what goes into temporary files, which a host's ranks share.
    """
    value, host = None, os.environ.get("GROUP_RANK")
    first = world() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
    with together():
        if first:
            value = function()
    return next(value for first, at, value in gather((first, host, value)) if first and at == host)


# ---- corpora ----------------------------------------------------------------------------------------

class Source(NamedTuple):
    name: str    # as the user knows it
    path: str    # of a plain, seekable JSONL file
    mark: str    # changes when the content does
    longest: int = MAX_LINE  # bytes of a line


class BadLine(ValueError):
    """What is wrong with one line of a corpus."""


def spool_folder() -> str:
    """A folder of this process for decompressed and piped corpora, removed when it exits."""
    if not hasattr(spool_folder, "path"):
        spool_folder.path = tempfile.mkdtemp(prefix="codessm-")
        atexit.register(shutil.rmtree, spool_folder.path, ignore_errors=True)
    return spool_folder.path


def spool_path() -> str:
    """A new empty file in it."""
    path = os.path.join(spool_folder(), f"{len(os.listdir(spool_folder()))}.jsonl")
    Path(path).touch()
    return path


class Counted:
    """A binary stream that knows how much was read of it."""

    def __init__(self, stream: io.BufferedIOBase):
        self.stream, self.count = stream, 0

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(size)
        self.count += len(block)
        return block


def spool(name: str, stream: io.IOBase, longest: int = MAX_LINE) -> str:
    """Copy a binary stream, decompressed if it is gzip, to a temporary file; returns its path.

    Raises `Problem`, also at what unpacks to more than a line and 100 times its own size.
    """
    path, written = spool_path(), 0
    raw = io.BufferedReader(stream) if not hasattr(stream, "peek") else stream
    compressed, raw = raw.peek(2)[:2] == b"\x1f\x8b", Counted(raw)
    plain = gzip.GzipFile(fileobj=raw) if compressed else raw
    with progress(desc=f"reading {name}", unit="B") as bar:
        while True:
            try:
                block = plain.read(1 << 20)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise Problem(f"{name}: not a whole gzip file ({error})") from None
            if not block:
                break
            written += len(block)
            if written > max(longest, UNPACKED * raw.count) and compressed:
                raise Problem(f"{name}: its first {size(raw.count)} unpack to {size(written)}, more than {UNPACKED} "
                              "times as much, which no code does: unpack it yourself if it is what it should be")
            try:
                with open(path, "ab") as out:
                    out.write(block)
            except OSError as error:
                raise Problem(f"no room to unpack {name} in {os.path.dirname(path)}: {error.strerror}; make some, or "
                              "let TMPDIR name another folder", 1) from None
            bar.update(len(block))
    say(f"{name}: {size(os.path.getsize(path))} {'decompressed' if compressed else 'read'} into "
        f"{os.path.dirname(path)}, removed at exit")
    return path


LOG_START = b'{"step": '  # of the metrics log that a run writes beside its checkpoint


def starts_with(path: str, start: bytes) -> bool:
    """Whether a file is empty or starts so."""
    with open(path, "rb") as file:
        return file.read(len(start)) in (b"", start)


def is_log(path: str) -> bool:
    """Whether a file is empty or a metrics log: one that lies beside a corpus is no part of it."""
    return starts_with(path, LOG_START)


def find_sources(paths: Iterable[str], longest: int = MAX_LINE) -> list[Source]:
    """The corpus files behind files, folders, globs, `.gz` files and `-`, in order, each once.

    A folder gives its `*.jsonl` and `*.jsonl.gz`, its subfolders' too, sorted; empty files and metrics logs
    in it are passed over. What is no plain file (gzip, a pipe) is spooled to a temporary one. Raises `Problem`.
    """
    names: dict[str, str] = {}
    for path in map(str, paths):
        if os.path.isdir(path):
            found = sorted(str(p) for ending in ("*.jsonl", "*.jsonl.gz") for p in Path(path).rglob(ending)
                           if p.is_file() and not is_log(p))
            if not found:
                raise Problem(f"{path}: no .jsonl or .jsonl.gz file in this folder; "
                              f"`codessm corpus {path} -o corpus.jsonl` makes one of source files")
        elif path == "-" or os.path.exists(path):
            found = [path]
        else:
            found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p) and not is_log(p))
            if not found:
                raise Problem(f"{path}: no such file")
        for name in found:
            names.setdefault(name if name == "-" else os.path.realpath(name), name)
    return [open_source(name, longest) for name in names.values()]


def open_source(name: str, longest: int = MAX_LINE) -> Source:
    """The `Source` of one file or of standard input."""
    if name == "-":
        return Source("standard input", spool("standard input", sys.stdin.buffer, longest), "-", longest)
    try:
        with open(name, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return Source(name, spool(name, file, longest), "-", longest)
            mark = f"{status.st_size} bytes, {status.st_mtime_ns}"
            if file.peek(2)[:2] == b"\x1f\x8b":
                return Source(name, spool(name, file, longest), mark, longest)
            return Source(name, name, mark, longest)
    except OSError as error:
        raise Problem(f"{name}: {error.strerror}") from None


def standard_library() -> Source:
    """The running interpreter's own standard library as a corpus: the default one."""
    path = os.path.join(spool_folder(), "standard-library.jsonl")
    with open(path, "wb") as out:
        build_corpus([STANDARD_LIBRARY], out)
    mark = f"{os.path.getsize(path)} bytes, {zlib.crc32(Path(path).read_bytes())}"
    return Source(f"standard library of Python {sys.version.split()[0]}", path, mark)


def first_field(record: dict, names: Iterable[str]) -> str | None:
    """The first of the named fields that the record has and that is not null."""
    for name in names:
        value = record.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise BadLine(f'the field "{name}" is {JSON_KIND.get(type(value), "a number")}, not a string')
            return well_formed(value)
    return None


def missing(record: dict, names: Iterable[str], advice: str = "") -> BadLine:
    """The error of a record without the field that it needs, one of `names`."""
    names = list(names)
    for name in names:
        if name in record:
            return BadLine(f'the field "{name}" is null')
    wanted = "no code field" if names == list(CODE_FIELDS) else "no field " + " or ".join(f'"{n}"' for n in names)
    seen = ", ".join(map(str, list(record)[:12])) or "none"
    return BadLine(f"{wanted}; the fields seen are: {seen}" + (f" ({advice})" if advice else ""))


def well_formed(string: str) -> str:
    """The string with lone surrogates replaced, which JSON and Python can spell and UTF-8 cannot."""
    return string if string.isascii() else string.encode("utf-8", "replace").decode()


JSON_KIND = {list: "an array", dict: "an object", str: "a string", bool: "a truth value", type(None): "null"}


def once(text: str, code: str) -> tuple[str, str]:
    """(text, code) without the text in both: CodeSearchNet's Python code still holds its docstring.

    A docstring on lines of its own is cut out of the code; a text found elsewhere in it stays there alone.
    """
    text = text.strip()
    at = code.find(text)
    if not text or at < 0:
        return text, code
    before, after = code[:at].rstrip(), code[at + len(text):].lstrip()
    for quote in ('"""', "'''", '"', "'"):
        if before.endswith(quote) and after.startswith(quote):
            before, after = before[:-len(quote)], after[len(quote):]
            start, end = before.rfind("\n") + 1, (after + "\n").find("\n")
            # a string that is a statement: nothing else is on its lines
            if before[start:].strip().lower() in ("", "r", "u") and not after[:end].strip():
                return text, before[:start] + after[end + 1:]
            break
    return "", code


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


class Records:
    """JSONL files as a sequence of what `parse` makes of a line; in memory are 8 bytes a line, never the lines.

    Args:
        sources: from `find_sources`.
        parse: bytes of a line -> anything; raises `BadLine`.
        limit: only the first so many records of each file.
        skip_bad: count bad lines and pass over them, where otherwise the first is a `Problem`.
        note: called with the number of the source, each line and what was made of it; may raise `BadLine` too.
    After the one pass over the files, `records[i]` reads record i; `bytes` is the size of all, `bad` the number of
    lines passed over. Raises `Problem`.
    """

    def __init__(self, sources: list[Source], parse: Callable, limit: int | None = None, skip_bad: bool = False,
                 note: Callable = lambda source, line, parsed: None):
        self.sources, self.parse, self.bad, self.bytes = sources, parse, 0, 0
        self.stamps = [self.stamp(os.stat(source.path)) for source in sources]
        offsets, first = array.array("Q"), []
        with progress(total=sum(os.path.getsize(source.path) for source in sources), desc="reading records",
                      unit="B") as bar:
            for place, source in enumerate(sources):
                first.append(len(offsets))
                for number, offset, line in lines(source.path, source.longest):
                    if limit is not None and len(offsets) - first[-1] == limit:
                        break
                    bar.update(len(line))
                    try:
                        check_length(line, source.longest)
                        note(place, line, parse(line))
                    except BadLine as error:
                        if not skip_bad:
                            raise Problem(f"{source.name}:{number}: {error}") from None
                        self.bad += 1
                        worst = f"{source.name}:{number}: {error}"
                        continue
                    offsets.append(offset)
                    self.bytes += len(line)
        if not offsets:
            raise Problem(f"{listed(source.name for source in sources)}: no records"
                          + (f"; the last of {self.bad} bad lines is {worst}" if self.bad else ": it is empty"))
        self.offsets, self.first = np.frombuffer(offsets, np.uint64), np.array(first)

    def __len__(self) -> int:
        return len(self.offsets)

    @staticmethod
    def stamp(status: os.stat_result) -> tuple[int, int]:
        """What changes when a file does."""
        return status.st_size, status.st_mtime_ns

    def line(self, record: int) -> bytes:
        """The raw line of a record; raises `Problem` if its file has changed."""
        place = np.searchsorted(self.first, record, side="right") - 1
        source = self.sources[place]
        try:
            with open(source.path, "rb") as file:
                now = self.stamp(os.fstat(file.fileno()))
                if now == self.stamps[place]:
                    file.seek(int(self.offsets[record]))
                    return file.readline(source.longest + 1)
            what = "its time is another" if now[0] == self.stamps[place][0] else \
                f"it had {self.stamps[place][0]:,} bytes and has {now[0]:,}"
        except OSError as error:
            what = error.strerror
        raise Problem(f"{source.name} changed while it was being read: {what}", 1)

    def __getitem__(self, record: int):
        """What `parse` makes of a record, read from its file; raises `Problem` if that has changed."""
        return self.parse(self.line(record))


class Corpus(Records):
    """JSONL files as a sequence of (text, code); in memory are 17 to 21 bytes a line.

    Args:
        sources, limit, skip_bad: as for `Records`; the sources may be `standard_library` too.
        code_field, text_field: their names, where they are not among the known ones.
    `train` and `held_out` are arrays of record numbers (uint32). Held out is 1 % by a hash of the line; of fewer
    than 3,200 records a tenth, 32 at most, with the lowest hashes. Raises `Problem`.
    """

    def __init__(self, sources: list[Source], code_field: str | None = None, text_field: str | None = None,
                 limit: int | None = None, skip_bad: bool = False):
        self.code_fields = (code_field,) if code_field else CODE_FIELDS
        self.text_fields = (text_field,) if text_field else TEXT_FIELDS
        self.plain_text = not code_field and not text_field  # a record with `text` alone is code
        self.texts, held = 0, bytearray()
        lowest: list[tuple[int, int]] = []  # (-hash, record) of the 32 lowest hashes

        def note(_source: int, line: bytes, _parsed: tuple) -> None:
            checksum = zlib.crc32(line.strip())
            (heapq.heappush if len(lowest) < 32 else heapq.heappushpop)(lowest, (-checksum, len(held)))
            held.append(checksum % 100 == 0)

        super().__init__(sources, self.parse, limit, skip_bad, note)
        if text_field and not self.texts:
            raise Problem(f'{listed(source.name for source in sources)}: no record has the field "{text_field}" '
                          "given with --text-field")
        flags = np.frombuffer(held, bool)
        least = min(32, max(1, len(flags) // 10), len(flags) - 1)
        if flags.sum() < least:
            for _, record in sorted(lowest, reverse=True)[:least]:
                held[record] = 1
        self.train = np.flatnonzero(~flags).astype(np.uint32)
        self.held_out = np.flatnonzero(flags).astype(np.uint32)

    def parse(self, line: bytes) -> tuple[str, str]:
        """(text, code) of one line, the text "" where there is none; raises `BadLine`."""
        record = parse_json(line)
        code, text = first_field(record, self.code_fields), None
        if code is None and self.plain_text and record.get("text") is not None:
            code, text = first_field(record, ["text"]), first_field(record, TEXT_FIELDS[:-1])
        elif code is not None:
            text = first_field(record, self.text_fields)
        if code is None:
            raise missing(record, self.code_fields, "--code-field names the one to read")
        if code.startswith("<"):
            code = STARCODER.sub("", code)
        if not code.strip():
            raise BadLine("the code is empty")
        self.texts += text is not None
        return once(text or "", code)

    def strings(self, share: float) -> Iterator[str]:
        """The texts and codes of a share of the training records, chosen by a hash of the line."""
        # at a terminal the tokenizers library draws bars of its own
        for record in progress(self.train, desc="reading for the tokenizer", unit=" records",
                               disable=sys.stderr.isatty()):
            if share == 1 or zlib.crc32(b"tokenizer" + self.line(record)) < share * 2 ** 32:
                yield from self[record]


def lines(path: str, longest: int = MAX_LINE) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line) of each line that is not blank; of a longer one its beginning."""
    offset = 0
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = rest = file.readline(longest + 1)
            if not line:
                return
            if not line.isspace():
                yield number, offset, line
            offset += len(line)
            while len(rest) > longest and not rest.endswith(b"\n"):
                rest = file.readline(longest + 1)
                offset += len(rest)


def check_length(line: bytes, longest: int) -> None:
    """Raise `BadLine` at one of `lines` that is too long."""
    if len(line.rstrip(b"\n")) > longest:
        raise BadLine(f"a line of more than {size(longest)} (--max-line takes longer ones)")


# ---- the tokenizer ----------------------------------------------------------------------------------

SPECIALS = {"pad": ("<pad>", "[PAD]"), "start": ("<s>", "[CLS]"), "end": ("</s>", "[SEP]"),
            "mask": ("<mask>", "[MASK]")}


class Tokenizer:
    """A Hugging Face tokenizer with the ids of the special tokens: `pad`, `start`, `end`, `mask`.

    Args:
        text: the content of a `tokenizer.json`.
        name: what to call it in an error. Raises `Problem` if it is none or lacks a special token.
    `special` and `ordinary` are arrays of ids (int32): the special tokens, and all others.
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

    def encode_many(self, strings: list[str]) -> list[list[int]]:
        """The ids of each string."""
        try:
            return [encoding.ids for encoding in self.model.encode_batch_fast(strings, add_special_tokens=False)]
        except Exception as error:  # the library raises nothing narrower
            raise Problem(f"the tokenizer cannot encode this: {error}") from None


def read_text(path: str | os.PathLike, name: str | None = None) -> str:
    """The text of a file in UTF-8, of at most a gigabyte; raises `Problem`."""
    try:
        if os.path.getsize(path) > MAX_TEXT:
            raise Problem(f"{name or path}: over {size(MAX_TEXT)}")
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{name or path}: {getattr(error, 'strerror', None) or 'not text in UTF-8'}") from None


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; raises `Problem`."""
    return Tokenizer(read_text(path), path)


def train_tokenizer(corpus, vocab: int, most: int = 200_000_000) -> Tokenizer:
    """A byte-level BPE of `vocab` entries trained on `corpus.strings`, about `most` bytes at most.

    Which ones is decided by a hash, so it is the same in every run.
    """
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = [spellings[0] for spellings in SPECIALS.values()]
    if vocab < len(alphabet) + len(special):
        raise Problem(f"--vocab {vocab} is too small: a byte-level vocabulary has at least "
                      f"{len(alphabet) + len(special)} entries")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab, special_tokens=special,
                                             initial_alphabet=alphabet, show_progress=sys.stderr.isatty())
    model.train_from_iterator(corpus.strings(min(1.0, most / corpus.bytes)), trainer)
    return Tokenizer(model.to_str())


# ---- samples and batches ----------------------------------------------------------------------------

WINDOW, CHOSEN, KIND, WHICH = range(4)  # what a draw is for


def draw(seed: int, epoch: int, record: np.ndarray, position: np.ndarray, use: int) -> np.ndarray:
    """Numbers in [0, 1), float64, one for each broadcast element: SplitMix64 (Steele et al. 2014) as a hash.

    `use` keeps draws for different purposes apart.
    """
    state = np.full(1, seed, np.uint64)
    for key in (use, epoch, record, position):
        state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0 ** -53


class Samples:
    """The samples of a corpus: `samples(record, epoch)` is a list of token ids, at most `ctx` of them.

    Text with its two special tokens takes at most half of ctx. Of longer code there is one window an
    epoch: its start in epoch 0, then one from a place drawn from (seed, epoch, record).
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, ctx: int, seed: int = 0):
        self.corpus, self.tokenizer, self.ctx, self.seed = corpus, tokenizer, ctx, seed

    def __call__(self, record: int, epoch: int = 0) -> list[int]:
        tokenizer = self.tokenizer
        text, code = self.corpus[record]
        ids = [tokenizer.start]
        if text:
            ids += window(tokenizer, text, self.ctx // 2 - 2) + [tokenizer.end]
        place = draw(self.seed, epoch, record, 0, WINDOW).item() if epoch else 0.0
        return ids + window(tokenizer, code, self.ctx - len(ids) - 1, place) + [tokenizer.end]


def window(tokenizer: Tokenizer, string: str, room: int, place: float = 0.0) -> list[int]:
    """At most `room` ids from `place` in [0, 1) of a string; no more of it is tokenised than that needs."""
    length = 8 * room  # characters: about twice what fills the room
    while True:
        spare = max(0, len(string) - length)
        start = int(place * (spare + 1))
        ids = tokenizer.encode(string[start:start + length])
        if len(ids) >= room or not spare:
            start = int(place * (max(0, len(ids) - room) + 1))
            return ids[start:start + room]
        length *= 2


IGNORE = -100  # a target that is not predicted


class Batch(NamedTuple):
    """Rows padded on the right to one static length L; `lengths` is 0 in rows that only fill up a batch."""
    ids: np.ndarray      # (B, L) int32
    lengths: np.ndarray  # (B,) int32
    records: np.ndarray  # (B,) int64
    epoch: int
    second: tuple[np.ndarray, np.ndarray] | None = None  # ids and lengths of the second side, where there is one
    labels: np.ndarray | None = None  # (B,) int64, IGNORE in rows that only fill up
    tokens: tuple[int, ...] = ()  # real ones of each side, over all ranks

    def pieces(self, count: int) -> list["Batch"]:
        """At most `count` batches of equally many rows, the last perhaps of fewer."""
        rows = -(-len(self.ids) // count)
        return [Batch(self.ids[part], self.lengths[part], self.records[part], self.epoch,
                      self.second and tuple(side[part] for side in self.second),
                      None if self.labels is None else self.labels[part])
                for part in (slice(start, start + rows) for start in range(0, len(self.ids), rows))]


def sides(sample) -> tuple[list[int], ...]:
    """The one or two rows of ids of a sample."""
    return sample if isinstance(sample, tuple) else (sample,)


def static_lengths(samples: Callable, records: np.ndarray, ctx: int, most: int = 4096) -> list[int]:
    """The lengths to which batches of these samples are padded, chosen by at most `most` of them."""
    return choose_lengths(sample_lengths(samples, records, most), ctx)


def sample_lengths(samples: Callable, records: np.ndarray, most: int) -> np.ndarray:
    """Token counts, int64, of the epoch-0 samples of at most `most` of the records, evenly spaced."""
    chosen = records[np.linspace(0, len(records) - 1, min(most, len(records))).astype(int)]
    return np.array([max(map(len, sides(samples(int(record)))))
                     for record in progress(chosen, desc="measuring samples")])


def choose_lengths(counts: np.ndarray, ctx: int, most: int | None = None) -> list[int]:
    """The static lengths (at most 12 up to ctx 256, else 16) that pad samples of `counts` tokens least.

    Exact, by dynamic programming over multiples of 8 (of ctx / 512 for a long ctx); the last is ctx.
    """
    most = most or (12 if ctx <= 256 else 16)
    grain = max(8, -(-ctx // 512 // 8) * 8)
    lengths = np.unique(np.append(np.arange(grain, ctx, grain), ctx))
    below = np.searchsorted(np.sort(counts), lengths, side="right")  # samples that fit each length
    # cost[j] of the best k lengths that end with lengths[j]; a sample pays for the length it is given
    cost, back = below * lengths.astype(float), []
    # between[i, j]: what the samples longer than lengths[i] pay for lengths[j]
    between = np.where(lengths[:, None] < lengths, (below - below[:, None]) * lengths.astype(float), np.inf)
    for _ in range(min(most, len(lengths)) - 1):
        step = cost[:, None] + between
        best = step.argmin(0)
        better = step[best, np.arange(len(lengths))]
        back.append(np.where(better < cost, best, -1))
        cost = np.minimum(better, cost)
    chosen, j = [], len(lengths) - 1
    for best in reversed(back):
        if best[j] >= 0:
            chosen.append(j)
            j = best[j]
    return [int(lengths[j]) for j in sorted({*chosen, j, len(lengths) - 1})]


def start_worker(parent: int, _worker: int) -> None:
    """Tie a worker process to its parent.

    Ctrl-C reaches every process of a terminal: the main one saves, and then ends its workers itself. If it is
    killed, they must not live on with what they inherited, the lock on the run's output among it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def as_it_is(pool):
    return pool


class Read(NamedTuple):
    """What one of several ranks has read of a pool: its samples' lengths (n, k) and, one after the other, their ids."""
    key: tuple[int, int]  # (epoch, pool)
    lengths: np.ndarray
    ids: np.ndarray


class Batches(Dataset):
    """Batches of samples in a reproducible order, the same for any number of ranks.

    Args:
        samples: any function (record, epoch) -> ids, as `Samples`, or -> two rows of ids.
        records: the record numbers to go through, once an epoch.
        batch: samples a batch, over all ranks.
        lengths: the static lengths, from `choose_lengths`.
        seed: of the order; None keeps that of `records`, as evaluation wants it.
        labels: of all records, int64.
    `len()` is the number of batches an epoch; the last is filled up with empty rows. Of W ranks, rank r gets the rows
    r, r + W, ... of each batch, filled up to equally many. It reads and tokenises the samples r, r + W, ... of a pool,
    since where a sample belongs is known only when all lengths are; then each sample goes to its rank.
    """
    POOL = 50

    def __init__(self, samples: Callable, records: np.ndarray, batch: int, lengths: list[int], pad: int,
                 seed: int | None = None, labels: np.ndarray | None = None):
        self.samples, self.records, self.batch, self.pad, self.labels = samples, records, batch, pad, labels
        self.lengths, self.seed, self.rank, self.world = np.array(lengths), seed, rank(), world()
        self.order = None, None

    def __len__(self) -> int:
        return -(-len(self.records) // self.batch)

    def records_of(self, epoch: int, pool: int) -> np.ndarray:
        """The records of one pool, in the shuffled order of the epoch."""
        if self.order[0] != epoch:
            order = self.records
            if self.seed is not None:
                order = order.copy()
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            self.order = epoch, order
        width = self.POOL * self.batch
        return self.order[1][pool * width:(pool + 1) * width].astype(np.int64)

    def __getitem__(self, key: tuple[int, int]) -> "list[Batch] | Read | Problem":
        """The batches of pool `key` = (epoch, pool); of several ranks what this one reads, for `exchange`.

        A `Problem` is returned: raised, it would lose its form between processes.
        """
        epoch, pool = key
        try:
            samples = [sides(self.samples(int(record), epoch))
                       for record in self.records_of(epoch, pool)[self.rank::self.world]]
        except Problem as problem:
            return problem
        lengths = np.array([list(map(len, rows)) for rows in samples] or np.empty((0, 1)), int)
        if self.world > 1:
            return Read(key, lengths, np.array([*itertools.chain(*itertools.chain(*samples))], np.int32))
        return self.collate(key, samples, lengths, self.groups(key, lengths))

    def groups(self, key: tuple[int, int], lengths: np.ndarray) -> list[np.ndarray]:
        """Which samples of a pool, that have so many tokens a side (n, k), make up each of its batches."""
        order = self.by_length(lengths)
        groups = [order[i:i + self.batch] for i in range(0, len(order), self.batch)]
        if self.seed is not None:
            np.random.default_rng((self.seed, *key)).shuffle(groups)
        return groups

    def by_length(self, lengths: np.ndarray) -> np.ndarray:
        """The order in which samples with so many tokens a side, (n, k), are cut into batches with little padding."""
        order = np.argsort(-lengths.max(1), kind="stable")
        if lengths.shape[1] == 1:
            return order
        # the seven batches whose longer sides are alike share the shorter ones by length
        run = np.empty(len(order), int)
        run[order] = np.arange(len(order)) // (7 * self.batch)
        return np.lexsort((-lengths.max(1), -lengths.min(1), run))

    def exchange(self, read: "Read | Problem") -> list[Batch]:
        """Give the samples that this rank has read to the ranks whose rows they are; this rank's batches of the pool.

        Raises, on every rank, the `Problem` that one of them met.
        """
        parts = gather(read if isinstance(read, Problem) else read.lengths)
        share_problem(next((part for part in parts if isinstance(part, Problem)), None))
        n = sum(map(len, parts))
        lengths = np.empty((n, max(part.shape[1] for part in parts)), int)
        for reader, part in enumerate(parts):
            lengths[reader::self.world] = part
        groups, tokens = self.groups(read.key, lengths), lengths.sum(1)
        reader, owner = np.arange(n) % self.world, np.empty(n, int)
        for group in groups:
            owner[group] = np.arange(len(group)) % self.world
        # what goes from one rank to another goes in the order of the pool
        given, taken = np.flatnonzero(reader == self.rank), np.flatnonzero(owner == self.rank)
        rows = np.split(read.ids, np.cumsum(tokens[given])[:-1])
        sent = [rows[i] for i in np.argsort(owner[given], kind="stable")]
        taken = taken[np.argsort(reader[taken], kind="stable")]
        received = torch.empty(tokens[taken].sum(), dtype=torch.int32)
        dist.all_to_all_single(
            received, torch.from_numpy(np.concatenate([*sent, np.empty(0, np.int32)])),
            np.bincount(reader[taken], tokens[taken], self.world).astype(int).tolist(),
            np.bincount(owner[given], tokens[given], self.world).astype(int).tolist())
        samples = {i: np.split(row, np.cumsum(lengths[i])[:-1])
                   for i, row in zip(taken, np.split(received.numpy(), np.cumsum(tokens[taken])[:-1]))}
        return self.collate(read.key, samples, lengths, groups)

    def collate(self, key: tuple[int, int], samples, lengths: np.ndarray, groups: list[np.ndarray]) -> list[Batch]:
        """This rank's share of a pool's batches; all of its samples have so many tokens a side, (n, k)."""
        epoch, records, size = key[0], self.records_of(*key), -(-self.batch // self.world)
        batches = []
        for group in groups:
            own = group[self.rank::self.world]
            fill = size - len(own)
            (ids, counts), *second = [self.pad_rows([samples[i][side] for i in own], size, lengths[group, side].max())
                                      for side in range(lengths.shape[1])]
            labels = None
            if self.labels is not None:
                labels = np.pad(self.labels[records[own]], (0, fill), constant_values=IGNORE)
            batches.append(Batch(ids, counts, np.pad(records[own], (0, fill)), epoch, second[0] if second else None,
                                 labels, tuple(lengths[group].sum(0).tolist())))
        return batches

    def pad_rows(self, rows: list, size: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """ids (size, L) and lengths (size,), both int32, L being the static length that the longest row needs."""
        L = self.lengths[np.searchsorted(self.lengths, longest)]
        ids, lengths = np.full((size, L), self.pad, np.int32), np.zeros(size, np.int32)
        for i, row in enumerate(rows):
            ids[i, :len(row)], lengths[i] = row, len(row)
        return ids, lengths

    def stream(self, start: int = 0, stop: int | None = None, workers: int = 0) -> Iterator[Batch]:
        """Batches number `start` to `stop` (None: without end), epoch after epoch.

        With `workers`, that many processes read and tokenise pools ahead. Close the generator to end them.
        """
        pools = -(-len(self) // self.POOL)

        def keys() -> Iterator[tuple[int, int]]:
            epoch, pool = start // len(self), start % len(self) // self.POOL
            while stop is None or epoch * len(self) + pool * self.POOL < stop:
                yield epoch, pool
                epoch, pool = (epoch, pool + 1) if pool + 1 < pools else (epoch + 1, 0)

        # after this fork no thread pool of the tokenizers library may be used
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        loader = DataLoader(self, batch_size=None, sampler=keys(), num_workers=workers, collate_fn=as_it_is,
                            worker_init_fn=partial(start_worker, os.getpid()),
                            generator=torch.Generator(),  # without one it draws from the global random state
                            multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
        number = start - start % len(self) % self.POOL
        pending = iter(loader)
        try:
            for pool in pending:
                if self.world > 1:
                    pool = self.exchange(pool)
                if isinstance(pool, Problem):
                    raise pool
                for batch in pool:
                    if start <= number and (stop is None or number < stop):
                        yield batch
                    number += 1
        finally:
            del pending  # ends the workers


# ---- benchmarks -------------------------------------------------------------------------------------

class Benchmark(NamedTuple):
    """What a task is made of."""
    kind: str                      # retrieval, classify, tag or pair
    ctx: int                       # tokens a side
    epochs: int
    metric: str                    # the one by which the best epoch is chosen
    text: tuple[str, ...] = ()     # the names that a field may have, the first that is there wins
    code: tuple[str, ...] = CODE_FIELDS
    label: str = "label"
    labels: tuple[str, ...] = ()   # all there are, where the task fixes them
    files: str = "train.jsonl, valid.jsonl and test.jsonl, or one file, split 80/10/10"
    line: str = ""                 # what a line looks like
    published: str = ""            # where
    docstrings: bool = False       # code may hold its own description, which is cut out
    whole: bool = False            # candidates are those of all splits


ADVTEST = Benchmark(
    "retrieval", 512, 2, "mrr", ("docstring_tokens", "docstring"),
    ("code_tokens", "function_tokens", "code", "function"), files="train.jsonl, valid.jsonl and test.jsonl",
    line='{"docstring_tokens": [...], "code_tokens": [...], "url": "...", "idx": 0}',
    published="https://github.com/microsoft/CodeXGLUE/tree/main/Text-Code/NL-code-search-Adv", docstrings=True)
TASKS = {
    "advtest": ADVTEST,
    "nlcodesearch": ADVTEST,
    "sqa": Benchmark(
        "retrieval", 1024, 3, "mrr", ("question",), ("answer",), whole=True,
        files="corpus.jsonl, queries.jsonl and qrels/{train,test}.tsv (CoIR), or Questions.csv and Answers.csv "
              "(StackSample), or JSONL", line='{"question": "...", "answer": "..."}',
        published="https://huggingface.co/datasets/CoIR-Retrieval/stackoverflow-qa and "
                  "https://www.kaggle.com/datasets/stackoverflow/stacksample"),
    "devign": Benchmark(
        "classify", 400, 5, "accuracy", code=("func",), label="target", labels=("0", "1"),
        files="function.json with train.txt, valid.txt and test.txt, or train.jsonl, valid.jsonl and test.jsonl",
        line='{"func": "int f() {...}", "target": 0, "idx": 0}',
        published="https://github.com/microsoft/CodeXGLUE/tree/main/Code-Code/Defect-detection"),
    "diversevul": Benchmark(
        "classify", 512, 3, "macro_f1", code=("func",), label="target", labels=("0", "1"),
        line='{"func": "int f() {...}", "target": 0}', published="https://github.com/wagner-group/diversevul"),
    "complexity": Benchmark(
        "classify", 1024, 10, "macro_f1", code=("src", "code"), label="complexity",
        labels=("constant", "logn", "linear", "nlogn", "quadratic", "cubic", "np"),
        line='{"src": "int f() {...}", "complexity": "linear"}',
        published="https://huggingface.co/datasets/codeparrot/codecomplex"),
    "typeinf": Benchmark(
        "tag", 512, 3, "accuracy",
        files="train*.jsonl, valid.jsonl and test.jsonl, and vocab_50000.txt if there is one",
        line='{"tokens": ["function", "f", ...], "labels": [null, "string", ...]}',
        published="https://zenodo.org/record/6387001"),
    "clone": Benchmark(
        "pair", 512, 3, "f1", code=("func",), labels=("0", "1"),
        files="data.jsonl, with train.txt, valid.txt and test.txt of lines idx1, tab, idx2, tab, label",
        line='{"func": "int f() {...}", "idx": "10"}',
        published="https://github.com/microsoft/CodeXGLUE/tree/main/Code-Code/Clone-detection-BigCloneBench"),
    "retrieval": Benchmark("retrieval", 512, 3, "mrr", TEXT_FIELDS[::-1], line='{"text": "...", "code": "..."}',
                           docstrings=True),
    "classify": Benchmark("classify", 512, 3, "accuracy", line='{"code": "...", "label": "..."}'),
    "tag": Benchmark("tag", 512, 3, "accuracy", line='{"tokens": ["def", "f", ...], "labels": [null, "name", ...]}'),
    "pair": Benchmark("pair", 512, 3, "f1", labels=("0", "1"), line='{"code1": "...", "code2": "...", "label": 0}'),
}
SPLITS = ("train", "valid", "test")
UNK = "UNK"  # row 0 of a vocabulary of tags; predicted, it is always wrong


def string_field(record: dict, names: Iterable[str], what: str) -> str:
    """The first of the named fields, a list of tokens being joined by spaces; raises `BadLine`."""
    names = list(names)
    for name in names:
        if isinstance(record.get(name), list):
            string = " ".join(token_field(record, name))
            break
        if record.get(name) is not None:
            string = first_field(record, [name])
            break
    else:
        raise missing(record, names)
    if not string.strip():
        raise BadLine(f"the {what} is empty")
    return string


def token_field(record: dict, name: str) -> list[str]:
    tokens = record.get(name)
    if tokens is None:
        raise missing(record, [name])
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise BadLine(f'the field "{name}" is no list of strings')
    return list(map(well_formed, tokens))


def label_field(record: dict, name: str, allowed: Iterable[str] = ()) -> str:
    """A label as a string, a truth value as 0 or 1; raises `BadLine` where there is none or it is not `allowed`."""
    label = record.get(name)
    if label is None:
        raise missing(record, [name])
    if isinstance(label, (bool, float)) and label == label // 1:
        label = int(label)
    if not isinstance(label, (str, int)):
        raise BadLine(f'the label "{name}" is {JSON_KIND.get(type(label), label)}, not a name or a whole number')
    label = well_formed(str(label))
    if allowed and label not in allowed:
        raise BadLine(f'the label "{label[:80]}" is none of those of the task, which are {listed(allowed, 12)}')
    return label


# a docstring, where the code does not parse: a string alone on its lines, after one that ends with a colon
DOCSTRING = re.compile(r"(?<=:)([ \t]*(?:#[^\n]*)?\n\s*?)[ \t]*[rRuU]?"
                       r"""(?:("{3}|'{3})(.*?)\2|(["'])(?!\4)([^\n]*?)\4)[ \t]*(?:#[^\n]*)?(?=\n|\Z)""", re.DOTALL)


def without_docstring(text: str, code: str) -> str:
    """Code without the docstring that the text is from: ranked as it is, the query would lie inside the answer."""
    key = re.sub(r"\W+", "", text)

    def holds(string: str) -> bool:
        return key in re.sub(r"\W+", "", string)

    if not key or '"' not in code and "'" not in code or not holds(code) and "\\" not in code:
        return code
    try:
        source = textwrap.dedent(code)
        for node in ast.walk(parse_python(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node) and (
                    holds(ast.get_docstring(node)) or holds(ast.get_source_segment(source, node.body[0]))):
                begin, end, instead = docstring_place(source, node, *positions(source)[1:])
                return source[:begin] + instead + source[end:]
        return code
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        for string in DOCSTRING.finditer(code):  # Python 2, say
            if holds(string[3] or string[5] or ""):
                return code[:string.end(1)].rstrip() + code[string.end():]
        return once(text, code)[1]


def parse_example(task: Benchmark, line: bytes, labelled: bool = True) -> tuple:
    """What a line of JSONL holds; raises `BadLine`.

    (code, label), (text, code), (code, code, label) or (words, labels); unless `labelled`, the label is None and each
    word's UNK, whatever the line has.
    """
    record = parse_json(line)
    if task.kind == "retrieval":
        text, code = string_field(record, task.text, "text"), string_field(record, task.code, "code")
        tokens = any(isinstance(record.get(name), list) for name in task.code)
        return text, without_docstring(text, code) if task.docstrings and not tokens else code
    if task.kind == "tag":
        words = token_field(record, "tokens")
        labels = record.get("labels") if labelled else [UNK] * len(words)
        if not isinstance(labels, list):
            raise missing(record, ["labels"]) if labels is None else BadLine('the field "labels" is no list')
        if len(labels) != len(words):
            raise BadLine(f"{len(words):,} tokens and {len(labels):,} labels: there must be one for each, or null")
        if not words:
            raise BadLine("the list of tokens is empty")
        labels = [None if label is None else label_field({"labels": label}, "labels") for label in labels]
        if labelled and not task.published and UNK in labels:  # one's own tags
            raise BadLine(f'the label "{UNK}" stands for what is not known: give it another name')
        return words, labels
    names = [("code1", "func1"), ("code2", "func2")] if task.kind == "pair" else [task.code]
    codes = [string_field(record, fields, "code") for fields in names]
    return *codes, label_field(record, task.label, task.labels) if labelled else None


def parse_named(fields: tuple[str, ...], what: str, name: str, line: bytes) -> tuple[str, str]:
    """What a line holds in `fields`, joined by line ends, and its name; raises `BadLine`."""
    record = parse_json(line)
    found = [first_field(record, [field]) for field in fields]
    if found == [None] * len(fields):
        raise missing(record, fields)
    string = "\n".join(part for part in found if part and part.strip())
    if not string:
        raise BadLine(f"the {what} is empty")
    return string, label_field(record, name)


class Texts:
    """The strings of a benchmark by item number; a part is (records, which of a record's strings)."""

    def __init__(self, *parts: tuple[Records, int]):
        self.parts, self.starts = parts, np.cumsum([0, *(len(records) for records, _ in parts)])

    def __call__(self, item: int) -> str:
        part = np.searchsorted(self.starts, item, side="right") - 1
        records, side = self.parts[part]
        return records[item - self.starts[part]][side]


class Items:
    """`items(i)` is the sample of item i, <s> text </s>, cut after ctx tokens."""

    def __init__(self, texts: Callable[[int], str], tokenizer: Tokenizer, ctx: int):
        self.texts, self.tokenizer, self.ctx = texts, tokenizer, ctx

    def __call__(self, item: int, epoch: int = 0) -> list[int]:
        ids = window(self.tokenizer, self.texts(item), self.ctx - 2)
        return [self.tokenizer.start, *ids, self.tokenizer.end]


class Windows:
    """Files of words with tags, cut between words into windows of at most ctx tokens.

    `windows(i)` is (ids, targets) of window i, equally long: the target of a labelled word's first sub-token is
    its label's number, that of anything else IGNORE. Windows without a labelled word are left out, so each
    labelled word is in exactly one. A word is encoded with a space before it, and cut if it fills a window.

    Args:
        files: number -> (words, labels), the labels being strings or None.
        numbers: of the files.
        index: of each label; others are number 0, UNK.
    """

    def __init__(self, files: Callable[[int], tuple[list[str], list[str | None]]], numbers: Iterable[int],
                 tokenizer: Tokenizer, ctx: int, index: dict[str, int]):
        self.files, self.tokenizer, self.room, self.index = files, tokenizer, ctx - 2, index
        self.cache: dict[str, list[int]] = {}
        spans = array.array("q")  # file, first word, last word + 1
        for number in progress(numbers, desc="cutting into windows", unit=" files"):
            words, labels = files(int(number))
            first = filled = 0
            for i, length in enumerate([*map(len, self.encode(words)), self.room + 1]):
                if filled + length > self.room:
                    if any(label is not None for label in labels[first:i]):
                        spans.extend((number, first, i))
                    first, filled = i, 0
                filled += length
        self.spans = np.frombuffer(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.spans)

    def encode(self, words: list[str]) -> list[list[int]]:
        if len(self.cache) > 200_000:
            self.cache.clear()
        new = list({word for word in words if word not in self.cache})
        for word, ids in zip(new, self.tokenizer.encode_many([" " + word for word in new])):
            self.cache[word] = ids[:self.room] or [self.tokenizer.mask]
        return [self.cache[word] for word in words]

    def __call__(self, number: int, epoch: int = 0) -> tuple[list[int], list[int]]:
        file, first, last = self.spans[number].tolist()
        words, labels = self.files(file)
        ids, targets = [self.tokenizer.start], [IGNORE]
        for row, label in zip(self.encode(words[first:last]), labels[first:last]):
            targets += [IGNORE if label is None else self.index.get(label, 0)] + [IGNORE] * (len(row) - 1)
            ids += row
        return [*ids, self.tokenizer.end], [*targets, IGNORE]


class Split:
    """One split of a benchmark: items to encode, and examples that are made of one or two of them.

    texts       item -> its string; of tagging, file -> (words, labels)
    examples    (n, k) int64: the k = 1 or 2 items of each example; of tagging, the files
    labels      (n,) int64, of classification and pairs
    query       (n,) int64, of retrieval: which query, from 0, the example's text is; each of its examples is right
    candidates  of retrieval: the items that are ranked;  gold (n,) the place in them of each example's code
    index       of tagging: the number of each label
    row         example -> the JSON object that it is from;  candidate  of retrieval, a candidate's place -> its own
    bytes       about how much text it is (`size`)
    `prepare` adds `items`, and `distinct`: the items that evaluation encodes, each once.
    """

    def __init__(self, texts: Callable, examples: np.ndarray, labels: np.ndarray | None = None, *,
                 query: np.ndarray | None = None, candidates: np.ndarray | None = None, gold: np.ndarray | None = None,
                 index: dict[str, int] | None = None, row: Callable[[int], dict] | None = None,
                 candidate: Callable[[int], dict] | None = None, size: int = 0):
        self.texts, self.examples, self.labels, self.query, self.candidates = texts, examples, labels, query, candidates
        self.gold, self.index, self.row, self.candidate, self.bytes = gold, index, row, candidate, size

    def __len__(self) -> int:
        return len(self.examples)

    def prepare(self, tokenizer: Tokenizer, ctx: int) -> "Split":
        """Cut and tokenise with this tokenizer, at most ctx tokens a side."""
        self.pad = tokenizer.pad
        if self.index is None:
            self.items = Items(self.texts, tokenizer, ctx)
        else:
            self.items = Windows(self.texts, self.examples[:, 0], tokenizer, ctx, self.index)
            self.examples = np.arange(len(self.items))[:, None]
        parts = [self.examples.ravel()] + ([] if self.candidates is None else [self.candidates])
        self.distinct = np.unique(np.concatenate(parts))
        return self

    def sample(self, example: int, epoch: int = 0):
        """The one or two rows of ids of an example."""
        rows = [self.items(item) for item in self.examples[example].tolist()]
        if self.candidates is None:  # a pair has no order, and the longer side first pads less
            rows.sort(key=len, reverse=True)
        return tuple(rows) if len(rows) > 1 else rows[0]

    def training(self, batch: int, lengths: list[int], seed: int) -> Batches:
        """Shuffled batches of examples; of retrieval, an example's label is the item of its code."""
        labels = self.labels if self.candidates is None else self.examples[:, 1]
        return Batches(self.sample, np.arange(len(self.examples)), batch, lengths, self.pad, seed, labels=labels)

    def each(self, batch: int, lengths: list[int]) -> Batches:
        """Batches of the distinct items, each once."""
        return Batches(self.items, self.distinct, batch, lengths, self.pad)

    def strings(self, share: float) -> Iterator[str]:
        """A share of the split's strings, chosen by a hash."""
        items = self.examples.ravel() if self.index is not None else np.unique(self.examples)
        for item in progress(items, desc="reading for the tokenizer", unit=" items", disable=sys.stderr.isatty()):
            text = self.texts(int(item))
            text = text if isinstance(text, str) else " ".join(text[0])
            if share == 1 or zlib.crc32(text.encode()) < share * 2 ** 32:
                yield text


def unlabelled(name: str, records: Records, rows: np.ndarray) -> Split:
    """Of records to predict for, without labels."""
    if TASKS[name].kind == "tag":
        return Split(records.__getitem__, rows[:, None], index={})
    if TASKS[name].kind == "classify":
        return Split(Texts((records, 0)), rows[:, None])
    return Split(Texts((records, 0), (records, 1)), np.stack([rows, rows + len(records)], 1))


def prediction_task(name: str) -> Benchmark:
    """The task with all the names that a field with code or text may have."""
    task = TASKS[name]
    return task._replace(code=tuple(dict.fromkeys(task.code + CODE_FIELDS)),
                         text=tuple(dict.fromkeys(task.text + TEXT_FIELDS)))


def prediction_sources(paths: Iterable[str], name: str,
                       longest: int = MAX_LINE) -> Iterator[tuple[str, Source, set[str]]]:
    """(name, JSONL, fields not to print) of each thing to predict for; a source file becomes a line of JSONL."""
    kind = TASKS[name].kind
    for path in map(str, paths):
        language = LANGUAGES.get(os.path.splitext(path)[1].lower())
        folder = os.path.isdir(path) and any(source_files([path]))
        if path == "-" or language is None and not folder:
            for source in find_sources([path], longest):
                yield source.name, source, set()
            continue
        if kind in ("pair", "retrieval") or kind == "tag" and language not in ("python", None):
            raise Problem(f"{path}: a model for {name} needs JSONL with lines like {TASKS[kind].line}"
                          + ", or Python files" * (kind == "tag"))
        yield path, Source(path, spool_lines(file_rows(path, kind)), ""), {"code"}


# what Python's parser and tokenizer raise at source that is wrong or nested too deeply
UNPARSABLE = SyntaxError, ValueError, RecursionError, MemoryError, IndexError, tokenize.TokenError


def file_rows(path: str, kind: str) -> Iterator[dict]:
    """A record to predict for of each source file under `path`; says how many are empty, and so have none."""
    empty = 0
    for source, _language, relative in read_sources([path], ["python"] if kind == "tag" else ()):
        name = os.path.join(path, relative) if os.path.isdir(path) else path
        if kind == "tag":
            try:
                tokens = typed_tokens(source, always=True)[0]
            except UNPARSABLE as error:
                raise Problem(f"{name}: not Python that parses ({error or type(error).__name__})") from None
            row = {"path": name, "tokens": tokens} if tokens else None
        else:
            row = {"path": name, "code": source} if source.strip() else None
        if row:
            yield row
        empty += not row
    if empty:
        say(f"{path}: {empty:,} empty files have no prediction")


def digest(string: str) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(blake2b(string.encode(), digest_size=8).digest(), "big")


def seeded_split(key: str) -> str:
    """train, valid or test, 80/10/10, by a hash of what must stay together: the code, and so its copies too."""
    place = digest(f"split {key}") / 2 ** 64
    return "train" if place < 0.8 else "valid" if place < 0.9 else "test"


def what_it_is_of(kind: str, parsed: tuple) -> str:
    """The code of an example, whose copies must be in the same split; of a pair both, in no order."""
    if kind == "tag":
        return "\0".join(parsed[0])
    if kind == "pair":
        return "\0".join(sorted(parsed[:2]))
    return parsed[kind == "retrieval"]


def first_of(digests: np.ndarray) -> np.ndarray:
    """For each element the number of the first one equal to it."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse]


class Reader:
    """The files of a benchmark as `splits`, a dict of `Split`, read as published.

    Args:
        name, path: the task; a folder with its files, or its one file.
        wanted: the splits to read; `required` are those that must be there.
        labels: of the model, where there is one; else they are the task's or those of the training split.
        limit, skip_bad, longest: as for a corpus.
    `sources` are the files read, `labels` the labels in order, `bad` counts the lines passed over. Raises `Problem`.
    """

    def __init__(self, name: str, path: str, wanted: Iterable[str] = SPLITS, required: Iterable[str] = SPLITS[:2],
                 labels: list[str] | None = None, limit: int | None = None, skip_bad: bool = False,
                 longest: int = MAX_LINE):
        self.longest = longest
        self.name, self.path, self.task, self.limit, self.skip_bad = name, Path(path), TASKS[name], limit, skip_bad
        self.wanted, self.required, self.bad, self.notes = list(wanted), required, 0, ""
        self.sources: dict[str, Source] = {}
        self.splits: dict[str, Split] = {}
        self.labels = list(labels or self.task.labels)
        if not self.path.exists():
            raise self.expected(f"{path}: no such file or folder")
        has = set(os.listdir(path)) if self.path.is_dir() else set()
        if self.name == "clone":
            self.read_clone()
        elif self.name == "devign" and "function.json" in has:
            self.read_devign()
        elif self.name == "sqa" and {"corpus.jsonl", "queries.jsonl"} & has:
            self.read_beir()
        elif self.name == "sqa" and {"Questions.csv", "Answers.csv"} & has:
            self.read_rows([(None, self.spool_csv())])
        else:
            self.read_rows(self.find_rows(has))
        for split in required:
            if not len(self.splits.get(split, ())):
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

    def open(self, file: str | os.PathLike) -> Source:
        """A file of the benchmark, which is noted among the sources."""
        path = self.path / file if self.path.is_dir() else self.path
        if not path.exists():
            raise self.expected(f"{path}: no such file")
        if not path.is_file():
            raise Problem(f"{path} is no plain file: a benchmark is read more than once")
        source = open_source(str(path), self.longest)
        self.sources[source.name] = source
        return source

    def named(self, source: Source, fields: tuple[str, ...], what: str, name: str) -> tuple[Records, dict[str, int]]:
        """The records of a file and the number of each by its name, which the field `name` holds."""
        numbers: dict[str, int] = {}

        def note(_source: int, _line: bytes, parsed: tuple[str, str]) -> None:
            if parsed[1] in numbers:
                raise BadLine(f"the {name} {parsed[1][:80]} is there already")
            numbers[parsed[1]] = len(numbers)

        records = Records([source], partial(parse_named, fields, what, name), skip_bad=self.skip_bad, note=note)
        self.bad += records.bad
        return records, numbers

    def rows(self, file: str, parse: Callable[[int, list[str]], object]) -> list:
        """What `parse` makes of the fields of each line of a text file, if there is one; it raises `BadLine`."""
        if not (self.path / file).exists():
            return []
        source, found = self.open(file), []
        for number, _offset, line in lines(source.path, source.longest):
            if len(found) == self.limit:
                break
            try:
                check_length(line, source.longest)
                row = parse(number, line.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t"))
            except BadLine as error:
                self.bad_line(source, number, error)
                continue
            if row is not None:
                found.append(row)
        return found

    def bad_line(self, source: Source, number: int, what: object) -> None:
        """A bad line of a file that is no JSONL: the end, or passed over."""
        if not self.skip_bad:
            raise Problem(f"{source.name}:{number}: {what}")
        self.bad += 1

    # -- JSONL, an example a line

    def find_rows(self, has: set[str]) -> list[tuple[str | None, Source]]:
        """(split, file) of each file that is read; the split is None of one that holds all of them."""
        if not self.path.is_dir():
            return [(None, self.open(self.path))]
        has = {file for file in has if os.path.isfile(self.path / file)}
        ending = r"\.jsonl(\.gz)?"
        found = {split: sorted(f for f in has if re.fullmatch(split + r"\d*" * (split == "train") + ending, f))
                 for split in SPLITS}
        if not any(found.values()):
            one = sorted(f for f in has if re.search(r"\.jsonl?(\.gz)?$", f) and not is_log(str(self.path / f)))
            if len(one) != 1:
                raise self.expected(f"{self.path}: no train.jsonl there"
                                    + (f", and more than one other file: {listed(one)}" if one else ""))
            return [(None, self.open(one[0]))]
        for split in self.required:
            if not found[split]:
                raise self.no_split(split)
        return [(split, self.open(file)) for split, files in found.items() for file in files
                if split in self.wanted or self.task.whole]

    def read_rows(self, files: list[tuple[str | None, Source]]) -> None:
        kind, given = self.task.kind, bool(self.labels)
        if not files:
            return
        self.vocabulary()
        tags: Counter[str] = Counter()
        labels, digests, places = [], array.array("Q"), bytearray()
        known = set(self.labels)

        def note(source: int, line: bytes, parsed: tuple) -> None:
            split = files[source][0] or seeded_split(what_it_is_of(kind, parsed))
            if kind == "tag" and split == "train" and not self.labels:
                tags.update(label for label in parsed[1] if label is not None)
            if kind in ("classify", "pair"):
                # the training split comes first, and has all the labels there are
                if files[source][0] in SPLITS[1:] and not known:
                    known.update(labels)
                if known and parsed[-1] not in known:
                    raise BadLine(f'the label "{parsed[-1][:80]}" is none of those trained on, which are '
                                  f"{listed(sorted(known), 12)}")
                labels.append(parsed[-1])
            if kind in ("retrieval", "pair"):
                digests.extend(map(digest, parsed[:2]))
            places.append(SPLITS.index(split))

        records = Records([source for _, source in files], partial(parse_example, self.task), self.limit, self.skip_bad,
                          note)
        self.bad += records.bad
        if kind == "tag" and not self.labels:
            self.labels = [UNK] + ["any"] * (self.name == "typeinf")
            self.labels += [label for label, _ in tags.most_common(50_000) if label not in self.labels]
            if len(tags) < 2:
                raise Problem(f"{listed(s.name for s in records.sources)}: the training split has the label "
                              f"{listed(tags) or 'null'} alone: there is nothing to tell apart")
        elif kind == "classify" and not given:
            self.labels = sorted(set(labels), key=lambda x: (int(x) if x.isdecimal() and len(x) < 20 else math.inf, x))
            if len(self.labels) < 2:
                raise Problem(f"{listed(s.name for s in records.sources)}: all examples have the same label, "
                              f"{labels[0]}: there is nothing to tell apart")
        index = {label: i for i, label in enumerate(self.labels)}
        targets = np.array([index[label] for label in labels], np.int64)
        # the two strings of each record, the first of equal ones standing for all: (2n,) item -> item
        first = first_of(np.frombuffer(digests, np.uint64).reshape(-1, 2).T.ravel())
        n = len(records)
        for split in self.wanted:
            rows = np.flatnonzero(np.frombuffer(places, np.uint8) == SPLITS.index(split))
            if not len(rows):
                continue
            row, share = Row(records, rows), records.bytes * len(rows) // n
            if kind == "tag":
                found = Split(records.__getitem__, rows[:, None], row=row, size=share, index=index)
            elif kind == "classify":
                found = Split(Texts((records, 0)), rows[:, None], targets[rows], row=row, size=share)
            elif kind == "pair":
                found = Split(Texts((records, 0), (records, 1)), first.reshape(2, n).T[rows], targets[rows], row=row,
                              size=share)
            else:
                # each text is a query of its own; a code that comes twice is encoded once and ranked twice
                ranked = np.arange(n) if self.task.whole else rows
                found = Split(Texts((records, 0), (records, 1)), np.stack([rows, first[n + rows]], 1),
                              query=np.arange(len(rows)), candidates=first[n + ranked],
                              gold=rows if self.task.whole else np.arange(len(rows)), row=row,
                              candidate=Row(records, ranked), size=share)
            self.splits[split] = found

    def vocabulary(self) -> None:
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

    # -- Devign: functions in one JSON array, splits as positions in it

    def read_devign(self) -> None:
        source = self.open("function.json")
        try:
            functions = json.loads(read_text(source.path, source.name))
            if not isinstance(functions, list):
                raise ValueError(f"{JSON_KIND.get(type(functions), 'a number')}, not an array of functions")
            for i, function in enumerate(functions):
                if not isinstance(function, dict):
                    raise ValueError(f"element {i:,} is {JSON_KIND.get(type(function), 'a number')}, no function")
        except (ValueError, RecursionError) as error:
            raise Problem(f"{source.name}: not JSON as published: {error}") from None
        # a line an element, so that file:line tells which one
        path = spool_lines(function | {"idx": i} for i, function in enumerate(functions))
        records, numbers = self.named(Source(source.name, path, "", source.longest), self.task.code, "code", "idx")

        def parse(_number: int, fields: list[str]) -> tuple[int, int]:
            if fields[0].strip() not in numbers:
                raise BadLine(f'"{fields[0][:80]}" is no position in {source.name}, 0 to {len(functions) - 1:,}')
            function = functions[int(fields[0])]
            return numbers[fields[0].strip()], int(label_field(function, self.task.label, self.task.labels))

        for split in self.wanted:
            found = np.array(self.rows(f"{split}.txt", parse), np.int64).reshape(-1, 2)
            if len(found):
                self.splits[split] = Split(Texts((records, 0)), found[:, :1], found[:, 1],
                                           row=Row(records, found[:, 0]), size=records.bytes)

    # -- BigCloneBench: functions, and pairs of their idx

    def read_clone(self) -> None:
        if self.path.is_file():
            raise self.expected(f"{self.path} is a file, not a folder")
        records, numbers = self.named(self.open("data.jsonl"), self.task.code, "code", "idx")

        def parse(_number: int, fields: list[str]) -> tuple[int, int, int]:
            fields = " ".join(fields).split()
            if len(fields) != 3:
                raise BadLine(f"{len(fields)} fields, where idx1, idx2 and label are expected")
            for idx in fields[:2]:
                if idx not in numbers:
                    raise BadLine(f"no function in data.jsonl has the idx {idx[:80]}")
            if fields[2] not in self.task.labels:
                raise BadLine(f'the label "{fields[2][:80]}" is neither 0 nor 1')
            return numbers[fields[0]], numbers[fields[1]], int(fields[2])

        for split in self.wanted:
            found = np.array(self.rows(f"{split}.txt", parse), np.int64).reshape(-1, 3)
            if len(found):
                self.splits[split] = Split(Texts((records, 0)), found[:, :2], found[:, 2], size=records.bytes,
                                           row=PairRow(list(numbers), found[:, :2]))

    # -- StackOverflow questions and answers: CoIR's BEIR files, Kaggle's CSV

    def read_beir(self) -> None:
        queries, query_names = self.named(self.open("queries.jsonl"), ("title", "text"), "question", "_id")
        documents, names = self.named(self.open("corpus.jsonl"), ("title", "text"), "answer", "_id")

        def parse(number: int, fields: list[str]) -> tuple[str, int, int] | None:
            try:
                score = int(fields[2]) if len(fields) == 3 else None
            except ValueError:
                if number == 1:
                    return None  # the header
                score = None
            if score is None:
                raise BadLine("not query-id, tab, corpus-id, tab, score")
            if fields[0] not in query_names:
                raise BadLine(f"no query in queries.jsonl has the _id {fields[0][:80]}")
            if fields[1] not in names:
                raise BadLine(f"no text in corpus.jsonl has the _id {fields[1][:80]}")
            return (fields[0], query_names[fields[0]], names[fields[1]]) if score > 0 else None

        files = {split: f"qrels/{split}.tsv" for split in SPLITS}
        if not (self.path / files["valid"]).exists():
            files["valid"] = "qrels/dev.tsv"  # BEIR's own name
        published = (self.path / files["valid"]).exists()
        pairs = {split: self.rows(file, parse) for split, file in files.items()
                 if split in self.wanted or split == "train" and not published}
        if not published:
            self.notes = "the validation split is a tenth of the training queries, by a hash"
            pairs["valid"] = [pair for pair in pairs["train"] if seeded_split(pair[0]) == "valid"]
            pairs["train"] = [pair for pair in pairs["train"] if seeded_split(pair[0]) != "valid"]
        for split in self.wanted:
            if pairs[split]:
                found = np.unique([pair[1:] for pair in pairs[split]], axis=0)
                self.splits[split] = Split(
                    Texts((queries, 0), (documents, 0)), found + [0, len(queries)], gold=found[:, 1],
                    query=np.unique(found[:, 0], return_inverse=True)[1],
                    candidates=len(queries) + np.arange(len(documents)), row=Row(queries, found[:, 0]),
                    candidate=Row(documents, np.arange(len(documents))), size=queries.bytes + documents.bytes)

    def spool_csv(self) -> Source:
        """Questions.csv and Answers.csv (latin-1, bodies in HTML) as JSONL: each question with its best answer."""
        questions, answers = self.open("Questions.csv"), self.open("Answers.csv")
        best: dict[str, tuple[int, int]] = {}  # question -> score of its best answer, and where in `bodies` that is
        with tempfile.TemporaryFile() as bodies:
            for line, (parent, score, body) in self.csv_rows(answers, "ParentId", "Score", "Body"):
                if not re.fullmatch(r"-?\d{1,9}", score):
                    self.bad_line(answers, line, f'the score "{score[:80]}" is no number')
                elif int(score) > best.get(parent, (-math.inf, 0))[0]:
                    best[parent] = int(score), bodies.tell()
                    bodies.write(json.dumps(plain(body)).encode() + b"\n")

            def joined() -> Iterator[dict]:
                for line, (identity, title, body) in self.csv_rows(questions, "Id", "Title", "Body"):
                    question = f"{title}\n{plain(body)}".strip()
                    if not question:
                        self.bad_line(questions, line, "the question is empty")
                    elif identity in best:
                        bodies.seek(best[identity][1])
                        yield {"question": question, "answer": json.loads(bodies.readline()), "idx": identity}

            path = spool_lines(row for row in joined() if row["answer"])
        if not os.path.getsize(path):
            raise Problem(f"{questions.name}: none of its questions has an answer in {answers.name}")
        self.notes = "each question with its best-scored answer"
        return Source(questions.name, path, "", questions.longest)

    def csv_rows(self, source: Source, *columns: str) -> Iterator[tuple[int, list[str]]]:
        """(line number, those columns) of each row."""
        csv.field_size_limit(source.longest)
        with open(source.path, encoding="latin-1", newline="") as file:
            pieces = iter(partial(file.readline, source.longest + 1), "")
            rows = csv.reader(progress(pieces, desc=f"reading {source.name}", unit=" lines"), strict=True)
            try:
                header = next(rows, [])
                header[:1] = [column.removeprefix("\xef\xbb\xbf") for column in header[:1]]  # a byte order mark
                for column in columns:
                    if column not in header:
                        raise BadLine(f"no column {column}; the columns are {listed(header, 12) or 'none'}")
                for row in rows:
                    if len(row) == len(header):
                        yield rows.line_num, [row[header.index(column)] for column in columns]
                    elif row:
                        self.bad_line(source, rows.line_num,
                                      f"{len(row)} columns, where the header has {len(header)}")
            except (csv.Error, BadLine) as error:
                raise Problem(f"{source.name}:{rows.line_num}: {error}") from None


class Row:
    """example -> the JSON object of its line."""

    def __init__(self, records: Records, rows: np.ndarray):
        self.records, self.rows = records, rows

    def __call__(self, example: int) -> dict:
        return parse_json(self.records.line(self.rows[example]))


class PairRow:
    """example -> the idx of its two functions."""

    def __init__(self, names: list[str], examples: np.ndarray):
        self.names, self.examples = names, examples

    def __call__(self, example: int) -> dict:
        one, two = self.examples[example]
        return {"idx1": self.names[one], "idx2": self.names[two]}


def spool_lines(rows: Iterable[dict]) -> str:
    """A temporary JSONL file of the rows; returns its path."""
    path = spool_path()
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def plain(html_text: str) -> str:
    """The text of StackOverflow's HTML: tags out, a line end where a block ends, entities resolved, code as it was."""
    text = re.sub(r"<br ?/?>|</(?:p|li|td|th|tr|h\d|div|pre|blockquote)>", "\n", html_text)
    return html.unescape(re.sub(r"</?[A-Za-z][^<>]*>|<!--.*?-->", "", text, flags=re.DOTALL)).strip()


# ---- corpora of source trees ------------------------------------------------------------------------

LANGUAGES = {
    ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".hh": "cpp",
    ".cs": "csharp", ".cu": "cuda", ".dart": "dart", ".ex": "elixir", ".exs": "elixir", ".erl": "erlang",
    ".f90": "fortran", ".go": "go", ".hs": "haskell", ".java": "java", ".jl": "julia", ".js": "javascript",
    ".jsx": "javascript", ".mjs": "javascript", ".kt": "kotlin", ".lua": "lua", ".m": "objective-c",
    ".ml": "ocaml", ".php": "php", ".pl": "perl", ".pm": "perl", ".py": "python", ".pyw": "python", ".r": "r",
    ".rb": "ruby", ".rs": "rust", ".scala": "scala", ".sh": "shell", ".sql": "sql", ".swift": "swift",
    ".ts": "typescript", ".tsx": "typescript", ".zig": "zig",
}
NOT_SOURCES = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
LARGEST_SOURCE = 1 << 20  # bytes; above it a file is generated or minified


def source_files(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path, path in the tree or trees) of each source file, sorted, without hidden and installed folders."""
    paths = list(paths)
    for root in paths:
        if os.path.isfile(root):
            yield root, os.path.basename(root)
            continue
        above = os.path.dirname(os.path.realpath(root)) if len(paths) > 1 else root
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in NOT_SOURCES and not f.startswith(".")
                                and not os.path.exists(os.path.join(folder, f, "pyvenv.cfg")))
            for file in sorted(files):
                path = os.path.join(folder, file)
                if os.path.splitext(file)[1].lower() in LANGUAGES and os.path.isfile(path):
                    yield path, os.path.relpath(path, above)


def read_sources(paths: Iterable[str], languages: Iterable[str] = ()) -> Iterator[tuple[str, str, str]]:
    """(source, language, path in the tree) of each source file under `paths`; says what was passed over.

    Only of the given languages, where some are given. Raises `Problem` where there is nothing.
    """
    paths = list(paths)
    for path in paths:
        if not os.path.exists(path):
            raise Problem(f"{path}: no such file or folder")
    files = [(path, relative, LANGUAGES.get(os.path.splitext(path)[1].lower(), "unknown"))
             for path, relative in source_files(paths)]
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
    say(f"{len(files):,} source files"
        + "".join(f"; {count:,} left out: {reason}" for reason, count in sorted(skipped.items())))


def build_corpus(paths: Iterable[str], out: io.BufferedWriter) -> None:
    """Write the code under `paths` as JSONL: a record a Python function, a record a file otherwise.

    A record has `code`, `docstring` where there is one (it is then not in the code), `language`, `path`
    and, for a function, `name` and `line`. Code seen before is dropped. What was passed over is said.
    """
    seen: set[bytes] = set()
    records = duplicates = 0
    for source, language, path in read_sources(paths):
        for record in cut_source(source, language):
            record = {name: well_formed(v) if isinstance(v, str) else v for name, v in record.items()}
            if not add(seen, record["code"]):
                duplicates += 1
                continue
            line = json.dumps(record | {"language": language, "path": path}, ensure_ascii=False)
            out.write(line.encode() + b"\n")
            records += 1
    say(f"{records:,} records; {duplicates:,} exact duplicates dropped")
    if not records:
        raise Problem(f"{', '.join(paths)}: the source files hold no code to take")


def add(seen: set[bytes], string: str) -> bool:
    """Whether a string is new; it no longer is."""
    key = blake2b(string.encode(), digest_size=16).digest()
    return key not in seen and not seen.add(key)


def read_source(path: str, language: str) -> str:
    """The text of a source file, in the encoding that a Python file declares, otherwise UTF-8."""
    if os.path.getsize(path) > LARGEST_SOURCE:
        raise BadLine(f"over {size(LARGEST_SOURCE)}")
    try:
        with tokenize.open(path) if language == "python" else open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (SyntaxError, UnicodeError, LookupError):
        raise BadLine("not text in UTF-8 or its declared encoding") from None


def cut_source(source: str, language: str) -> Iterator[dict]:
    """The records of one file: its functions if it is Python that parses, else the whole of it."""
    if language == "python":
        try:
            yield from python_functions(source, parse_python(source))
            return
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    if source.strip():
        yield {"code": source}


def parse_python(source: str) -> ast.Module:
    """The tree of a source, without a word on the escapes that it spells wrongly; raises SyntaxError and others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def positions(source: str) -> tuple[list[str], list[int], Callable[[int, int], int]]:
    """The lines of a source, where each starts, and the index in it of an ast position."""
    rows = re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", source)  # what ends a line for ast
    starts = np.cumsum([0, *map(len, rows)]).tolist()

    def until(line: int, column: int) -> int:
        """Of a line from 1 and a column in bytes of UTF-8."""
        return starts[line - 1] + len(rows[line - 1].encode()[:column].decode())

    return rows, starts, until


def docstring_place(source: str, node: ast.stmt, starts: list[int], until: Callable) -> tuple[int, int, str]:
    """Where in the source a function's docstring begins and ends, and what is to stand there instead.

    `starts` and `until` are from `positions(source)`.
    """
    literal = node.body[0]
    begin, end = until(literal.lineno, literal.col_offset), until(literal.end_lineno, literal.end_col_offset)
    if len(node.body) == 1:
        return begin, end, "pass"
    rest = re.compile(r"[ \t]*").match(source, end).end()
    # the docstring's whole line goes, unless a statement or a comment shares it
    if source.startswith("\n", rest) and not source[starts[literal.lineno - 1]:begin].strip():
        return starts[literal.lineno - 1], rest + 1, ""
    return begin, re.compile(r"[ \t]*;?[ \t]*").match(source, end).end(), ""


def python_functions(source: str, tree: ast.Module) -> Iterator[dict]:
    """Each function and method, decorators included, with its docstring apart and its indent taken off.

    A function inside a function stays part of that one. A body that was only a docstring becomes `pass`.
    """
    def functions(body: list[ast.stmt], method: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node, method
            else:
                for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                    yield from functions(getattr(node, field, []), method or isinstance(node, ast.ClassDef))

    rows, starts, until = positions(source)
    for node, method in functions(tree.body):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        while node.decorator_list and not rows[first - 1].lstrip(" \t\f").startswith("@"):
            first -= 1  # a decorator in parentheses begins after its @
        begin, end = starts[first - 1], until(node.end_lineno, node.end_col_offset)
        record = {"name": node.name, "line": first} | ({"method": True} if method else {})
        code, docstring = source[begin:end], ast.get_docstring(node)
        if docstring is not None:
            a, b, instead = docstring_place(source, node, starts, until)
            code = source[begin:a] + instead + source[b:end]
            if docstring.strip():
                record["docstring"] = docstring.strip()
        indent = rows[first - 1][:len(rows[first - 1]) - len(rows[first - 1].lstrip(" \t\f"))]
        if indent:
            code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        yield {"code": code} | record


# ---- benchmarks of source trees ---------------------------------------------------------------------

class Scope:
    """A scope of Python: what it binds, and where it looks for what it does not (the reference's section 4.2)."""

    def __init__(self, kind: str, parent: "Scope | None" = None, comprehension: bool = False):
        self.kind, self.parent, self.comprehension = kind, parent, comprehension
        self.bound: set[str] = set()
        self.fixed: set[str] = set()      # bound by an import without `as`, whose name stays
        self.outer: set[str] = set()      # declared nonlocal
        self.globals: set[str] = set()

    def binds(self, name: str) -> bool:
        """Whether the name, used here, is a variable of the function (an attribute of a class is none)."""
        scope = self
        while scope:
            if name in scope.globals:
                return False
            if name in scope.bound and name not in scope.outer and (scope is self or scope.kind != "class"):
                return scope.kind == "function" and name not in scope.fixed
            scope = scope.parent
        return False


def variables(function: ast.stmt, method: bool) -> Iterator[tuple[Scope, str, str, ast.AST]]:
    """(scope, name, role, node) of each place in a function where a name may stand for a variable."""
    found: list[tuple[Scope, str, str, ast.AST]] = []

    def bind(scope: Scope, name: str, role: str, node: ast.AST) -> None:
        scope.bound.add(name)
        found.append((scope, name, role, node))

    def visit(node: ast.AST | None, scope: Scope) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner, a = Scope("function", scope), node.args
            decorators, returns = getattr(node, "decorator_list", []), getattr(node, "returns", None)
            for child in [*decorators, *a.defaults, *a.kw_defaults, returns]:
                visit(child, scope)
            if not isinstance(node, ast.Lambda):
                bind(scope, node.name, "func", node)
            for arg in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]:
                if arg:
                    visit(arg.annotation, scope)
                    bind(inner, arg.arg, "arg", arg)
            for child in node.body if isinstance(node.body, list) else [node.body]:
                visit(child, inner)
        elif isinstance(node, ast.ClassDef):
            for child in [*node.decorator_list, *node.bases, *node.keywords]:
                visit(child, scope)
            bind(scope, node.name, "var", node)
            inner = Scope("class", scope)
            for child in node.body:
                visit(child, inner)
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            inner = Scope("function", scope, comprehension=True)
            visit(node.generators[0].iter, scope)
            for i, generator in enumerate(node.generators):
                for child in [generator.target, *([generator.iter] if i else []), *generator.ifs]:
                    visit(child, inner)
            for field in ("elt", "key", "value"):
                visit(getattr(node, field, None), inner)
        elif isinstance(node, ast.NamedExpr):
            outside = scope
            while outside.comprehension:
                outside = outside.parent
            visit(node.target, outside)
            visit(node.value, scope)
        elif isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                found.append((scope, node.id, "var", node))
            else:
                bind(scope, node.id, "var", node)
        elif isinstance(node, ast.Global):
            scope.globals.update(node.names)
        elif isinstance(node, ast.Nonlocal):
            scope.outer.update(node.names)
            found.extend((scope, name, "var", node) for name in node.names)
        elif isinstance(node, ast.alias):
            if node.asname:
                bind(scope, node.asname, "var", node)
            else:
                scope.bound.add(node.name.split(".")[0])
                scope.fixed.add(node.name.split(".")[0])
        else:
            name = getattr(node, "rest" if isinstance(node, ast.MatchMapping) else "name", None)
            if name and isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar, ast.MatchMapping)):
                bind(scope, name, "var", node)
            for child in ast.iter_child_nodes(node) if node else ():
                visit(child, scope)

    visit(function, Scope("class" if method else "function"))
    return found


NAME_OF = {ast.Name: "id", ast.arg: "arg", ast.alias: "asname", ast.MatchMapping: "rest", ast.Nonlocal: "names"}


def obfuscate(code: str, method: bool = False) -> str | None:
    """A function with the names that it binds replaced by func, arg0, ..., var0, ..., the layout kept.

    These are its own, its parameters', locals' and nested functions', where they stand for variables; attributes,
    callees' keywords, globals, strings, and what an import without `as` binds stay. In a `method` its own name, used
    as a variable, is a global's. None where the result would not parse to the same tree up to these names, or an
    import binds a parameter's name.
    """
    tree = parse_python(code)
    if any(getattr(node, "type_params", None) for node in ast.walk(tree)):
        return None
    _, _, until = positions(code)

    def locate(node: ast.AST, name: str) -> int:
        begin = until(node.lineno, node.col_offset)
        if isinstance(node, (ast.Name, ast.arg)):
            return begin
        if isinstance(node, (ast.alias, ast.MatchAs, ast.MatchStar)):
            return until(node.end_lineno, node.end_col_offset) - len(name)
        if isinstance(node, ast.ExceptHandler):
            begin = until(node.type.end_lineno, node.type.end_col_offset)
            keyword = r"[\s)]*as\s+"
        elif isinstance(node, ast.Nonlocal):
            keyword = rf"nonlocal\b.*?\b(?={name}\b)"
        elif isinstance(node, ast.MatchMapping):
            keyword = rf".*\*\*\s*(?={name}\b)"
        else:
            keyword = r"(?:async\s+def|def|class)\s+"
        found = re.compile(keyword, re.DOTALL).match(code, begin)
        return found.end() if found else -1

    own = tree.body[0]
    places = list(variables(own, method))
    decorators = {id(node) for decorator in own.decorator_list for node in ast.walk(decorator)}
    bound, taken = [], set()
    for place in places:
        scope, name, role, node = place
        if node is own or scope.binds(name) or name == own.name and id(node) in decorators:  # @name.setter def name
            bound.append(place)
        elif role == "arg":
            return None
        else:
            taken.add(name)
    roles: dict[str, str] = {}
    for _, name, role, node in sorted(bound, key=lambda place: (place[3].lineno, place[3].col_offset)):
        roles[name] = role if roles.get(name, "var") == "var" else roles[name]
    new, numbers = {}, {role: map(str, itertools.count()) for role in ("func", "arg", "var")}
    numbers["func"] = itertools.chain([""], numbers["func"])
    for name, role in {own.name: "func", **roles}.items():
        new[name] = next(fresh for number in numbers[role] if (fresh := f"{role}{number}") not in taken)
    edits = set()
    for _, name, _, node in bound:
        start = locate(node, name)
        if not code.startswith(name, start):
            return None
        edits.add((start, name))
        field = NAME_OF.get(type(node), "name")
        value = getattr(node, field)
        setattr(node, field, [new[name] if v == name else v for v in value] if isinstance(value, list) else new[name])
    for start, name in sorted(edits, reverse=True):
        code = code[:start] + new[name] + code[start + len(name):]
    try:
        return code if ast.dump(parse_python(code)) == ast.dump(tree) else None
    except (SyntaxError, ValueError):
        return None


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
    paths = list(paths)
    seen: set[bytes] = set()
    found: list[tuple[str, int, int]] = []  # path of the source, and where its records are in the spool
    with tempfile.TemporaryFile() as spooled:
        for source, _language, path in read_sources(paths, ["python"]):
            begin = spooled.tell()
            for record in benchmark_records(task, source, path):
                same = (record["hidden"] or record["code"]) if task == "advtest" else "\0".join(record["tokens"])
                if add(seen, same):
                    spooled.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            if spooled.tell() > begin:
                found.append((path, begin, spooled.tell()))
        if len(found) < 3:
            raise Problem(f"{', '.join(paths)}: only {len(found)} files with something to learn "
                          f"({'functions with docstrings' if task == 'advtest' else 'annotations'}): "
                          "three splits need more")
        found.sort(key=lambda file: digest(file[0]))
        tenth = max(1, len(found) // 10)
        parts = {"test": found[:tenth], "valid": found[tenth:2 * tenth], "train": found[2 * tenth:]}
        os.makedirs(folder, exist_ok=True)
        types: Counter[str] = Counter()
        home: dict[int, str] = {}  # of the text of a function, the split that has it
        for split in SPLITS:
            written = dropped = 0
            with atomic(os.path.join(folder, f"{split}.jsonl")) as out:
                for _path, begin, end in progress(parts[split], desc=f"writing {split}", unit=" files"):
                    spooled.seek(begin)
                    for line in spooled.read(end - begin).splitlines():
                        record = json.loads(line)
                        if task == "advtest":
                            hidden = record.pop("hidden")
                            if split != "train" and not hidden:
                                dropped += 1
                                continue
                            record |= {"code": record["code"] if split == "train" else hidden, "idx": written}
                        else:
                            cut_functions(record, split, home)
                            if not any(record["labels"]):
                                dropped += 1
                                continue
                            if split == "train":
                                types.update(label for label in record["labels"] if label is not None)
                        out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                        written += 1
            say(f"{folder}/{split}.jsonl: {written:,} {'functions' if task == 'advtest' else 'files with types'} from "
                f"{len(parts[split]):,} source files"
                + (f"; {dropped:,} left out, " + ("whose names cannot be replaced" if task == "advtest" else
                                                  "all of whose functions with types another split has")
                   if dropped else ""))
        if task == "typeinf":
            names = [UNK, "Any"] + [name for name, _ in types.most_common() if name not in (UNK, "Any")]
            with atomic(os.path.join(folder, "vocab_50000.txt")) as out:
                out.write("".join(f"{name}\n" for name in names[:50_000]).encode())
            say(f"{len(types):,} types, {types.total():,} labels in train")


def cut_functions(record: dict, split: str, home: dict[int, str]) -> None:
    """Cut those functions out of a file's tokens and labels that another split has."""
    tokens, labels = record["tokens"], record["labels"]
    for begin, end in reversed(record.pop("functions")):
        if home.setdefault(digest("\0".join(tokens[begin:end])), split) != split:
            del tokens[begin:end], labels[begin:end]


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
            parse_python(code)  # a string over several lines may have lost its indent, and more
            yield {"docstring": well_formed(text), "code": well_formed(code), "url": f"{path}#L{function['line']}",
                   "hidden": obfuscate(well_formed(code), function.get("method", False))}
    except UNPARSABLE:
        return
