"""The peers' side of the benchmark `data_build`; runs under .venv-peers, never imported by the project.

  .venv-peers/bin/python -P tests/benchmarks/data/build_peers.py datasets|datatrove|encode TEXTS TOKENIZER OUT WORKERS
  .venv-peers/bin/python -P tests/benchmarks/data/build_peers.py read_datasets|read_datatrove OUT

The first form tokenises the JSON lines in the folder TEXTS with TOKENIZER, a tokenizer.json or a SentencePiece model, ends
each document with its end of text, and writes the folder OUT; `encode` writes nothing, and tells what the tokeniser's
library alone needs. The second form prints one line of JSON: the documents, the tokens and their digest.
"""

import functools
import glob
import hashlib
import json
import os
import sys

END = "<|endoftext|>"


@functools.cache
def encoder(tokenizer: str):
    """Returns the function from texts to lists of ids, each with the end of text."""
    if tokenizer.endswith(".json"):
        import tokenizers

        loaded = tokenizers.Tokenizer.from_file(tokenizer)
        end = loaded.token_to_id(END)
        encode = functools.partial(loaded.encode_batch, add_special_tokens=False)
        return lambda texts: [[*encoding.ids, end] for encoding in encode(texts)]
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    return lambda texts: model.encode(texts, add_eos=True, num_threads=1)


def _rows(batch: dict, tokenizer: str) -> dict:
    return {"input_ids": encoder(tokenizer)(batch["text"])}


def datasets(texts: str, tokenizer: str, out: str, workers: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    several = workers if workers > 1 else None
    rows = datasets.load_dataset(
        "json", data_files=_files(texts), split="train", cache_dir=out, num_proc=several
    )
    made = rows.map(
        functools.partial(_rows, tokenizer=tokenizer),
        batched=True,
        num_proc=several,
        remove_columns=rows.column_names,
    )
    with open(os.path.join(out, "made.json"), "w", encoding="utf-8") as file:
        json.dump([part["filename"] for part in made.cache_files], file)


def datatrove(texts: str, tokenizer: str, out: str, workers: int) -> None:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    write = DocumentTokenizer(
        os.path.join(out, "tokens"), tokenizer, eos_token=END, shuffle_documents=False
    )
    executor = LocalPipelineExecutor(
        [JsonlReader(texts), write],
        tasks=workers,
        workers=workers,
        logging_dir=os.path.join(out, "logs"),
    )
    executor.run()


def encode(texts: str, tokenizer: str, out: str, workers: int) -> None:
    del out, workers
    for path in _files(texts):
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line)["text"] for line in file]
        for begin in range(0, len(lines), 256):
            encoder(tokenizer)(lines[begin : begin + 256])


def _files(texts: str) -> list[str]:
    return sorted(glob.glob(os.path.join(texts, "*.jsonl")))


def digest(documents) -> dict:
    """Returns the number of documents and of tokens, and the hash of the sorted hashes of the documents' ids."""
    import numpy as np

    tokens, hashes = 0, []
    for ids in documents:
        tokens += len(ids)
        hashes.append(hashlib.sha256(np.asarray(ids, "<u4").tobytes()).digest())
    whole = hashlib.sha256(b"".join(sorted(hashes))).hexdigest()
    return {"documents": len(hashes), "tokens": tokens, "sha256": whole}


def read_datasets(out: str) -> dict:
    import datasets

    with open(os.path.join(out, "made.json"), encoding="utf-8") as file:
        parts = [datasets.Dataset.from_file(path) for path in json.load(file)]
    return digest(row for part in parts for row in part.with_format("numpy")["input_ids"])


def read_datatrove(out: str) -> dict:
    import numpy as np

    def documents():
        for path in sorted(glob.glob(os.path.join(out, "tokens", "*.ds"))):
            ids = np.fromfile(path, "<u2")
            ends = np.fromfile(f"{path}.index", "<u8")
            begin = 0
            for end in ends.tolist():
                yield ids[begin:end]
                begin = end

    return digest(documents())


READERS = {"read_datasets": read_datasets, "read_datatrove": read_datatrove}
SIDES = {"datasets": datasets, "datatrove": datatrove, "encode": encode}

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    name, *arguments = sys.argv[1:]
    if name in READERS:
        print(json.dumps(READERS[name](*arguments)))
    else:
        SIDES[name](*arguments[:3], int(arguments[3]))
