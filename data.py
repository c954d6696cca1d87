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
import ctypes
import glob
import gzip
import heapq
import io
import json
import os
import re
import shutil
import signal
import stat
import sys
import sysconfig
import tempfile
import tokenize
import warnings
import zlib
from contextlib import closing, contextmanager
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import click
import numpy as np
import tokenizers
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CODE_FIELDS = ("code", "content", "func_code_string", "whole_func_string", "func", "function", "src",
               "original_string")
TEXT_FIELDS = ("docstring", "func_documentation_string", "nl", "doc", "query", "text")
STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]
STARCODER = re.compile(r"\A(?:<(?:reponame|filename|gh_stars)>[^<\n]*)+\n?")


# ---- errors, progress, files ------------------------------------------------------------------------

class Problem(click.ClickException):
    """What ends a command with one sentence and an exit code.

    2 is wrong usage or input, 1 a failure, 130 and 143 an interruption.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file=None):
        say(self.message if self.exit_code > 128 else f"Error: {self.message}")


def say(message: str) -> None:
    """One line for the person at the terminal, on standard error, clear of any progress bar."""
    tqdm.write(message, file=sys.stderr)


def progress(iterable: Iterable | None = None, **options) -> tqdm:
    """A bar on standard error, once the work has taken two seconds; rarely redrawn when that is a file."""
    options = dict(delay=2, mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True,
                   unit_scale=True, file=sys.stderr) | options
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


def listed(names: Iterable[str]) -> str:
    """At most three of the names, for a sentence."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


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


def check_writable(path: str | os.PathLike) -> None:
    """Raise a `Problem` unless a file could be written at `path` now."""
    folder = os.path.dirname(os.path.realpath(path))
    if not path or os.path.isdir(path):
        raise Problem(f"{path or 'an empty name'} is a folder: give -o the name of a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise Problem(f"{path} is no plain file: give -o another name")
    if not os.path.isdir(folder):
        raise Problem(f"cannot write {path}: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from None


# ---- corpora ----------------------------------------------------------------------------------------

class Source(NamedTuple):
    name: str    # as the user knows it
    path: str    # of a plain, seekable JSONL file
    mark: str    # changes when the content does


class BadLine(ValueError):
    """What is wrong with one line of a corpus."""


def spool_folder() -> str:
    """A folder of this process for decompressed and piped corpora, removed when it exits."""
    if not hasattr(spool_folder, "path"):
        spool_folder.path = tempfile.mkdtemp(prefix="codessm-")
        atexit.register(shutil.rmtree, spool_folder.path, ignore_errors=True)
    return spool_folder.path


def spool(name: str, stream: io.IOBase) -> str:
    """Copy a binary stream, decompressed if it is gzip, to a temporary file; returns its path."""
    path = os.path.join(spool_folder(), f"{len(os.listdir(spool_folder()))}.jsonl")
    Path(path).touch()
    raw = io.BufferedReader(stream) if not hasattr(stream, "peek") else stream
    compressed = raw.peek(2)[:2] == b"\x1f\x8b"
    plain = gzip.GzipFile(fileobj=raw) if compressed else raw
    with progress(desc=f"reading {name}", unit="B") as bar:
        while True:
            try:
                block = plain.read(1 << 20)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise Problem(f"{name}: not a whole gzip file ({error})") from None
            if not block:
                break
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


def find_sources(paths: Iterable[str]) -> list[Source]:
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
    return [open_source(name) for name in names.values()]


def open_source(name: str) -> Source:
    """The `Source` of one file or of standard input."""
    if name == "-":
        return Source("standard input", spool("standard input", sys.stdin.buffer), "-")
    try:
        with open(name, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return Source(name, spool(name, file), "-")
            mark = f"{status.st_size} bytes, {status.st_mtime_ns}"
            if file.peek(2)[:2] == b"\x1f\x8b":
                return Source(name, spool(name, file), mark)
            return Source(name, name, mark)
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


class Corpus:
    """JSONL files as a sequence of (text, code); in memory are 17 to 21 bytes a line, never the lines.

    Args:
        sources: from `find_sources` or `standard_library`.
        code_field, text_field: their names, where they are not among the known ones.
        limit: only the first so many records of each file.
        skip_bad: count bad lines and pass over them, where otherwise the first is a `Problem`.
    After the one pass over the files, `corpus[i]` reads record i; `train` and `held_out` are arrays of
    record numbers (uint32); `bytes` is the size of all. Held out is 1 % by a hash of the line; of fewer than
    3,200 records a tenth, 32 at most, with the lowest hashes. Raises `Problem`.
    """

    def __init__(self, sources: list[Source], code_field: str | None = None, text_field: str | None = None,
                 limit: int | None = None, skip_bad: bool = False):
        self.sources = sources
        self.code_fields = (code_field,) if code_field else CODE_FIELDS
        self.text_fields = (text_field,) if text_field else TEXT_FIELDS
        self.plain_text = not code_field and not text_field  # a record with `text` alone is code
        self.bad = self.bytes = self.texts = 0
        offsets, held, first = array.array("Q"), bytearray(), []
        lowest: list[tuple[int, int]] = []  # (-hash, record) of the 32 lowest hashes
        files = [os.path.getsize(source.path) for source in sources]
        with progress(total=sum(files), desc="reading corpus", unit="B") as bar:
            for source in sources:
                first.append(len(offsets))
                for number, offset, line in lines(source.path):
                    if limit is not None and len(offsets) - first[-1] == limit:
                        break
                    bar.update(len(line))
                    try:
                        self.parse(line)
                    except BadLine as error:
                        if not skip_bad:
                            raise Problem(f"{source.name}:{number}: {error}") from None
                        self.bad += 1
                        worst = f"{source.name}:{number}: {error}"
                        continue
                    checksum = zlib.crc32(line.strip())
                    (heapq.heappush if len(lowest) < 32 else heapq.heappushpop)(lowest, (-checksum, len(offsets)))
                    offsets.append(offset)
                    held.append(checksum % 100 == 0)
                    self.bytes += len(line)
        names = listed(source.name for source in sources)
        if not offsets:
            raise Problem(f"{names}: no records" + (f"; the last of {self.bad} bad lines is {worst}"
                                                    if self.bad else ": the corpus is empty"))
        if text_field and not self.texts:
            raise Problem(f'{names}: no record has the field "{text_field}" given with --text-field')
        self.offsets, self.first = np.frombuffer(offsets, np.uint64), np.array(first)
        flags = np.frombuffer(held, bool)
        least = min(32, max(1, len(flags) // 10), len(flags) - 1)
        if flags.sum() < least:
            for _, record in sorted(lowest, reverse=True)[:least]:
                held[record] = 1
        self.train = np.flatnonzero(~flags).astype(np.uint32)
        self.held_out = np.flatnonzero(flags).astype(np.uint32)

    def __len__(self) -> int:
        return len(self.offsets)

    def parse(self, line: bytes) -> tuple[str, str]:
        """(text, code) of one line, the text "" where there is none; raises `BadLine`."""
        record = parse_json(line)
        code, text = first_field(record, self.code_fields), None
        if code is None and self.plain_text and record.get("text") is not None:
            code, text = first_field(record, ["text"]), first_field(record, TEXT_FIELDS[:-1])
        elif code is not None:
            text = first_field(record, self.text_fields)
        if code is None:
            wanted = f'no field "{self.code_fields[0]}"' if len(self.code_fields) == 1 else "no code field"
            seen = ", ".join(map(str, list(record)[:12])) or "none"
            raise BadLine(f"{wanted}; the fields seen are: {seen} (--code-field names the one to read)")
        if code.startswith("<"):
            code = STARCODER.sub("", code)
        if not code.strip():
            raise BadLine("the code is empty")
        self.texts += text is not None
        return once(text or "", code)

    def line(self, record: int) -> bytes:
        """The raw line of a record."""
        with open(self.source(record).path, "rb") as file:
            file.seek(int(self.offsets[record]))
            return file.readline()

    def source(self, record: int) -> Source:
        """The file that a record is in."""
        return self.sources[np.searchsorted(self.first, record, side="right") - 1]

    def __getitem__(self, record: int) -> tuple[str, str]:
        """(text, code) of a record, read from its file; raises `Problem` if that has changed."""
        try:
            return self.parse(self.line(record))
        except (BadLine, OSError) as error:
            raise Problem(f"{self.source(record).name} changed while it was being read: at byte "
                          f"{self.offsets[record]} there is now {error}", 1) from None


def lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line) of each line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, offset, line
            offset += len(line)


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
        try:
            return self.model.encode_batch_fast([string], add_special_tokens=False)[0].ids
        except Exception as error:  # the library raises nothing narrower
            raise Problem(f"the tokenizer cannot encode this corpus: {error}") from None


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; raises `Problem`."""
    try:
        return Tokenizer(Path(path).read_text(encoding="utf-8-sig"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise Problem(f"{path}: {getattr(error, 'strerror', None) or 'not a tokenizer.json'}") from None


def train_tokenizer(corpus: Corpus, vocab: int, most: int = 200_000_000) -> Tokenizer:
    """A byte-level BPE of `vocab` entries trained on the training records, at most `most` bytes of them.

    Which ones is decided by a hash of the line, so it is the same in every run.
    """
    share = min(1.0, most / corpus.bytes)

    def chosen() -> Iterator[str]:
        for record in progress(corpus.train, desc="reading for the tokenizer", unit=" records"):
            if share == 1 or zlib.crc32(b"tokenizer" + corpus.line(record)) < share * 2 ** 32:
                yield from corpus[record]

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
    model.train_from_iterator(chosen(), trainer)
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
            ids += self.window(text, self.ctx // 2 - 2) + [tokenizer.end]
        place = draw(self.seed, epoch, record, 0, WINDOW).item() if epoch else 0.0
        return ids + self.window(code, self.ctx - len(ids) - 1, place) + [tokenizer.end]

    def window(self, string: str, room: int, place: float = 0.0) -> list[int]:
        """At most `room` ids from `place` in [0, 1) of a string; no more of it is tokenised than that needs."""
        length = 8 * room  # characters: about twice what fills the room
        while True:
            spare = max(0, len(string) - length)
            start = int(place * (spare + 1))
            ids = self.tokenizer.encode(string[start:start + length])
            if len(ids) >= room or not spare:
                start = int(place * (max(0, len(ids) - room) + 1))
                return ids[start:start + room]
            length *= 2


class Batch(NamedTuple):
    """Rows padded on the right to one static length L; `lengths` is 0 in rows that only fill up a batch."""
    ids: np.ndarray      # (B, L) int32
    lengths: np.ndarray  # (B,) int32
    records: np.ndarray  # (B,) int64
    epoch: int


def sample_lengths(samples: Samples, records: np.ndarray, most: int = 4096) -> np.ndarray:
    """Token counts, int64, of the epoch-0 samples of at most `most` of the records, evenly spaced."""
    chosen = records[np.linspace(0, len(records) - 1, min(most, len(records))).astype(int)]
    return np.array([len(samples(int(record))) for record in progress(chosen, desc="measuring samples")])


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


class Batches(Dataset):
    """Batches of samples in a reproducible order.

    Args:
        samples: any function (record, epoch) -> ids, as `Samples`.
        records: the record numbers to go through, once an epoch.
        batch: samples a batch, over all ranks.
        lengths: the static lengths, from `choose_lengths`.
        seed: of the order; None keeps that of `records`, as evaluation wants it.
        rank, world: this process takes rows rank, rank + world, ... of each batch.
    `len()` is the number of batches an epoch; the last is filled up with empty rows.
    """
    POOL = 50

    def __init__(self, samples: Callable[[int, int], list[int]], records: np.ndarray, batch: int,
                 lengths: list[int], pad: int, seed: int | None = None, rank: int = 0, world: int = 1):
        self.samples, self.records, self.batch, self.pad = samples, records, batch, pad
        self.lengths, self.seed, self.rank, self.world = np.array(lengths), seed, rank, world
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
        return self.order[1][pool * width:(pool + 1) * width]

    def __getitem__(self, key: tuple[int, int]) -> list[Batch] | Problem:
        """The batches of pool `key` = (epoch, pool). A `Problem` is returned: raised, it would lose its form."""
        epoch, pool = key
        try:
            records = self.records_of(epoch, pool).astype(np.int64)
            rows = [np.array(self.samples(int(record), epoch), np.int32) for record in records]
        except Problem as problem:
            return problem
        order = np.argsort([-len(row) for row in rows], kind="stable")
        groups = [order[i:i + self.batch] for i in range(0, len(order), self.batch)]
        if self.seed is not None:
            np.random.default_rng((self.seed, epoch, pool)).shuffle(groups)
        return [self.pad_rows([rows[i] for i in group], records[group], epoch) for group in groups]

    def pad_rows(self, rows: list[np.ndarray], records: np.ndarray, epoch: int) -> Batch:
        """One rank's share of a batch, at the static length that its longest row needs on any rank."""
        L = self.lengths[np.searchsorted(self.lengths, max(map(len, rows)))]
        ids = np.full((self.batch, L), self.pad, np.int32)
        lengths, numbers = np.zeros(self.batch, np.int32), np.zeros(self.batch, np.int64)
        for i, row in enumerate(rows):
            ids[i, :len(row)], lengths[i], numbers[i] = row, len(row), records[i]
        share = slice(self.rank, None, self.world)
        return Batch(ids[share], lengths[share], numbers[share], epoch)

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
                if isinstance(pool, Problem):
                    raise pool
                for batch in pool:
                    if start <= number and (stop is None or number < stop):
                        yield batch
                    number += 1
        finally:
            del pending  # ends the workers


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
    """(path, path relative to the tree) of each source file, sorted, without hidden and installed folders."""
    for root in paths:
        if os.path.isfile(root):
            yield root, os.path.basename(root)
            continue
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in NOT_SOURCES and not f.startswith(".")
                                and not os.path.exists(os.path.join(folder, f, "pyvenv.cfg")))
            for file in sorted(files):
                path = os.path.join(folder, file)
                if os.path.splitext(file)[1].lower() in LANGUAGES and os.path.isfile(path):
                    yield path, os.path.relpath(path, root)


def build_corpus(paths: Iterable[str], out: io.BufferedWriter) -> None:
    """Write the code under `paths` as JSONL: a record a Python function, a record a file otherwise.

    A record has `code`, `docstring` where there is one (it is then not in the code), `language`, `path`
    and, for a function, `name` and `line`. Code seen before is dropped. What was passed over is said.
    """
    for path in paths:
        if not os.path.exists(path):
            raise Problem(f"{path}: no such file or folder")
    files = list(source_files(paths))
    if not files:
        raise Problem(f"{', '.join(paths)}: no source files; known are {' '.join(LANGUAGES)}")
    seen: set[bytes] = set()
    records = duplicates = 0
    skipped: dict[str, int] = {}
    for path, relative in progress(files, desc="reading sources", unit=" files"):
        language = LANGUAGES.get(os.path.splitext(path)[1].lower(), "unknown")
        try:
            source = read_source(path, language)
        except (OSError, BadLine) as error:
            reason = getattr(error, "strerror", None) or str(error)
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        for record in cut_source(source, language):
            record = {name: well_formed(v) if isinstance(v, str) else v for name, v in record.items()}
            digest = blake2b(record["code"].encode(), digest_size=16).digest()
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            line = json.dumps(record | {"language": language, "path": well_formed(relative)}, ensure_ascii=False)
            out.write(line.encode() + b"\n")
            records += 1
    left_out = "".join(f"; {count:,} files left out: {reason}" for reason, count in sorted(skipped.items()))
    say(f"{records:,} records from {len(files):,} source files; {duplicates:,} exact duplicates dropped{left_out}")
    if not records:
        raise Problem(f"{', '.join(paths)}: the source files hold no code to take")


def read_source(path: str, language: str) -> str:
    """The text of a source file, in the encoding that a Python file declares, otherwise UTF-8."""
    if os.path.getsize(path) > LARGEST_SOURCE:
        raise BadLine(f"over {size(LARGEST_SOURCE)}")
    try:
        with tokenize.open(path) if language == "python" else open(path, encoding="utf-8-sig") as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, LookupError):
        raise BadLine("not text in UTF-8 or its declared encoding") from None


def cut_source(source: str, language: str) -> Iterator[dict]:
    """The records of one file: its functions if it is Python that parses, else the whole of it."""
    if language == "python":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
            yield from python_functions(source, tree)
            return
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    if source.strip():
        yield {"code": source}


def python_functions(source: str, tree: ast.Module) -> Iterator[dict]:
    """Each function and method, decorators included, with its docstring apart and its indent taken off.

    A function inside a function stays part of that one. A body that was only a docstring becomes `pass`.
    """
    rows = io.StringIO(source).readlines()

    def functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node
            else:
                for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                    yield from functions(getattr(node, field, []))

    def until(line: int, column: int) -> int:
        """The index in `source` of an ast position: lines from 1, columns in bytes of UTF-8."""
        return starts[line - 1] + len(rows[line - 1].encode()[:column].decode())

    starts = np.cumsum([0, *map(len, rows)]).tolist()
    for node in functions(tree.body):
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        while node.decorator_list and not rows[first - 1].lstrip(" \t\f").startswith("@"):
            first -= 1  # a decorator in parentheses begins after its @
        begin, end = starts[first - 1], until(node.end_lineno, node.end_col_offset)
        record = {"name": node.name, "line": first}
        code, docstring = source[begin:end], ast.get_docstring(node)
        if docstring is not None:
            literal = node.body[0]
            a, b = until(literal.lineno, literal.col_offset), until(literal.end_lineno, literal.end_col_offset)
            if len(node.body) == 1:
                code = source[begin:a] + "pass" + source[b:end]
            else:
                rest = source[b:end].lstrip(" \t")
                # the docstring's whole line goes, unless a statement or a comment shares it
                if rest.startswith("\n") and not source[starts[literal.lineno - 1]:a].strip():
                    code = source[begin:starts[literal.lineno - 1]] + rest[1:]
                else:
                    code = source[begin:a] + rest.removeprefix(";").lstrip(" \t")
            if docstring.strip():
                record["docstring"] = docstring.strip()
        indent = rows[first - 1][:len(rows[first - 1]) - len(rows[first - 1].lstrip(" \t\f"))]
        if indent:
            code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        yield {"code": code} | record
