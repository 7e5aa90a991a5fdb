"""Token caches from JSON lines, beside `datasets.map` and datatrove: tokens a second, processor time and peak memory.

All sides tokenise the same Python sources and prose of installed packages, from files of JSON lines to a folder that
did not exist, as commands in fresh processes that alternate: with one worker on one core, and with two on two. The time
is the command's, from its start to its end. The tokenisers are trained here: SentencePiece pieces, and a byte-level BPE of
Hugging Face's library with one thread in each process, which datatrove needs. `library` reads the texts and encodes them, and writes nothing.
All sides must give the same ids for every document.
"""

import glob
import hashlib
import json
import os
import pathlib
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil

from espalier.data.cache import store
from tests.benchmarks import case, compare
from tests.benchmarks.data import build_peers

KINDS = {"sentencepiece": 8192, "huggingface": 32_000}  # vocabulary -> its size
PEERS = {"sentencepiece": ("datasets",), "huggingface": ("datasets", "datatrove")}
_PROSE = (".md", ".rst", ".txt")
_LONGEST = 500_000  # bytes of a document
_SAMPLE = 10_000_000  # bytes that a tokeniser is trained on
_EVERY_S = 0.1  # between two looks at the memory


def run(
    *,
    rounds: int = 3,
    megabytes: float = 60.0,
    files: int = 8,
    workers: Sequence[int] = (1, 2),
    tiny: bool = False,
) -> dict[str, Any]:
    """Alternates all sides `rounds` times for either tokeniser, on `megabytes` of text in `files` files."""
    if tiny:
        rounds, megabytes = 1, 1.0
    with tempfile.TemporaryDirectory() as folder:
        wrote = compare.measured(compare.ours("data_build", folder, megabytes, files))
        return {
            "texts": {name: wrote[name] for name in ("documents", "megabytes", "python_share")},
            "files": files,
            **{kind: _one_kind(folder, kind, rounds, workers) for kind in KINDS},
        }


def _one_kind(folder: str, kind: str, rounds: int, workers: Sequence[int]) -> dict[str, Any]:
    sides = ("ours", *PEERS[kind])
    calls = {
        f"{side}_{count}": lambda side=side, count=count: _measure(folder, kind, side, count)
        for count in workers
        for side in sides
    }
    calls["library_1"] = lambda: _measure(folder, kind, "library", 1)
    reports = compare.alternate(calls, rounds)
    digests = {
        r["made"] for name, rs in reports.items() for r in rs if not name.startswith("library")
    }
    tokens = json.loads(next(iter(digests)))["tokens"]
    seconds, processor = (compare.each(reports, key) for key in ("wall_s", "process_cpu_s"))
    return {
        "vocabulary": KINDS[kind],
        "tokens": tokens,
        "same_tokens": len(digests) == 1,
        **{
            f"speed_over_{peer}_{count}": compare.ratio(
                seconds[f"{peer}_{count}"], seconds[f"ours_{count}"]
            )
            for peer in PEERS[kind]
            for count in workers
        },
        **{
            f"processor_time_of_{peer}_{count}": compare.ratio(
                processor[f"ours_{count}"], processor[f"{peer}_{count}"]
            )
            for peer in PEERS[kind]
            for count in workers
        },
        **{
            f"{side}_{many}_workers_over_{workers[0]}": compare.ratio(
                seconds[f"{side}_{workers[0]}"], seconds[f"{side}_{many}"]
            )
            for side in sides
            for many in workers[1:]
        },
        "million_tokens_per_s": {
            name: [tokens / 1e6 / s for s in values] for name, values in seconds.items()
        },
        "processor_s_per_million_tokens": {
            name: [s / (tokens / 1e6) for s in values] for name, values in processor.items()
        },
        "peak_memory_mb": compare.each(reports, "peak_mb"),
        "other_load": compare.each(reports, "other_load"),
        "contended": compare.contended(reports),
    }


def _measure(folder: str, kind: str, side: str, workers: int) -> compare.Report:
    """Runs a side; returns what it used, its peak memory in MB, and the digest of its tokens as JSON in 'made'."""
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words, env = command(folder, kind, side, workers, out)
        os.sched_setaffinity(0, set(sorted(cores)[:workers]))  # of this thread and its processes
        try:
            with PeakMemory() as memory:
                _, used = compare.timed(words, env={**env, "RAYON_NUM_THREADS": "1"})
        finally:
            os.sched_setaffinity(0, cores)
        return {**used, "peak_mb": memory.peak / 1e6, "made": json.dumps(made(side, out))}


def command(
    folder: str, kind: str, side: str, workers: int, out: str
) -> tuple[list[str], dict[str, str]]:
    """Returns a side's command and variables."""
    texts, tokenizer = os.path.join(folder, "texts"), os.path.join(folder, kind)
    if side == "ours":
        words = [sys.executable, "-m", "espalier.launch", "prepare", "cache"]
        words += [f"--workers={workers}", "--gin_file=t5x_configs/data/hf_files.gin"]
        settings = {
            "MIXTURE_OR_TASK_NAME": "files",
            "FILES": f"{texts}/*.jsonl",
            "TOKENIZER": tokenizer,
            "VALIDATION_FRACTION": 0.0,
        }
        words += [f"--gin.{name}={value!r}" for name, value in settings.items()]
        return words, {"ESPALIER_CACHE": out}
    model = "tokenizer.json" if kind == "huggingface" else "tokenizer.model"
    script = ("data/build_peers.py", "encode" if side == "library" else side)
    return compare.peer(*script, texts, os.path.join(tokenizer, model), out, workers), {}


def made(side: str, out: str) -> dict[str, Any] | None:
    """Returns the documents, the tokens and their digest in the folder that a side wrote."""
    if side == "library":
        return None
    if side != "ours":
        report = compare.measured(compare.peer("data/build_peers.py", f"read_{side}", out))
        return {name: report[name] for name in ("documents", "tokens", "sha256")}
    (manifest,) = pathlib.Path(out, "tokens", "files", "train").glob(f"*/{store.MANIFEST}")
    cache = store.open_cache(manifest.parent)
    column = cache.columns["targets"]
    return build_peers.digest(column.values(record) for record in range(cache.num_records))


class PeakMemory:
    """Looks at the memory of this process's children in a thread; `peak` is their largest sum of bytes.

    It is memory that cannot be dropped: mapped files are not in it, and memory that processes share is counted once.
    """

    def __init__(self):
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            children = psutil.Process().children(recursive=True)
            self.peak = max(self.peak, sum(held(child.pid) for child in children))


def held(pid: int) -> int:
    """Returns the bytes of memory of a process that no file holds, its share of what it shares; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            lines = [line.split() for line in file]
    except (OSError, ValueError):
        return 0
    return sum(int(line[1]) << 10 for line in lines if line[0] in ("Pss_Anon:", "Pss_Shmem:"))


def side(folder: str, megabytes: str, files: str) -> dict[str, Any]:
    """Writes texts/*.jsonl, sentencepiece/tokenizer.model and huggingface/tokenizer.json; returns facts about the texts."""
    texts = pathlib.Path(folder, "texts")
    texts.mkdir()
    chosen = documents(float(megabytes) * 1e6)
    for i in range(int(files)):
        with open(texts / f"{i:02d}.jsonl", "w", encoding="utf-8") as file:
            for _, text in chosen[i :: int(files)]:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    sizes = [len(text.encode()) for _, text in chosen]
    python = sum(n for (suffix, _), n in zip(chosen, sizes, strict=True) if suffix == ".py")
    write_tokenizers(folder, [text for _, text in chosen])
    return {
        "documents": len(chosen),
        "megabytes": sum(sizes) / 1e6,
        "python_share": python / sum(sizes),
    }


def documents(num_bytes: float) -> list[tuple[str, str]]:
    """Returns (suffix, text) of a fixed choice of files of installed packages, a quarter of it prose, each text once."""
    roots = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    paths = [
        path
        for root in roots
        for path in glob.glob(f"{root}/**/*.*", recursive=True)
        if path.endswith((".py", *_PROSE))
    ]
    paths.sort(key=lambda path: hashlib.sha256(os.path.basename(path).encode()).digest())
    left = {True: num_bytes / 4, False: num_bytes * 3 / 4}  # by whether it is prose
    seen: set[str] = set()
    chosen = []
    for path in paths:
        suffix = pathlib.Path(path).suffix
        if left[suffix in _PROSE] <= 0:
            continue
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 0 < len(text) <= _LONGEST and text not in seen:
            seen.add(text)
            chosen.append((suffix, text))
            left[suffix in _PROSE] -= len(text.encode())
    return chosen


def write_tokenizers(folder: str, texts: Sequence[str], sizes: Mapping[str, int] = KINDS) -> None:
    """Trains both tokenisers on the first of the texts."""
    import sentencepiece

    for kind in KINDS:
        os.mkdir(os.path.join(folder, kind))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sample(texts),
        model_prefix=os.path.join(folder, "sentencepiece", "tokenizer"),
        model_type="bpe",
        vocab_size=sizes["sentencepiece"],
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        **dict(zip(("pad_id", "eos_id", "unk_id", "bos_id"), (0, 1, 2, -1), strict=True)),
        minloglevel=2,
    )
    huggingface = pathlib.Path(folder, "huggingface")
    tokenizer = case.byte_level_bpe(_sample(texts), sizes["huggingface"], build_peers.END)
    tokenizer.save(os.fspath(huggingface / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": build_peers.END}
    (huggingface / "tokenizer_config.json").write_text(json.dumps(settings))


def _sample(texts: Sequence[str]) -> Iterator[str]:
    left = _SAMPLE
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield from (line[:4000] for line in text.splitlines(keepends=True))
