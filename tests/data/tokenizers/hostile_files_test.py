"""Tokenizer files and chat templates of a hostile checkpoint: one error each, within limits, nothing from outside."""

import base64
import concurrent.futures
import json
import os
import pathlib
import random
import signal
import socket
import struct
import time

import pytest

from espalier.common import checkpoint_files
from espalier.common.checkpoint_files import CheckpointFileError
from espalier.data.tokenizers import (
    chat_sandbox,
    chat_template,
    hf_tokenizer,
    tokenizer_probe,
    vocabularies,
)
from espalier.data.tokenizers.chat_template import ChatTemplate, ChatTemplateError
from espalier.model.hf.files import safetensors_files

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(chat_sandbox, "CPU_SECONDS", 0.3)
    monkeypatch.setattr(hf_tokenizer, "CPU_SECONDS", 1.0)


def render(source):
    return ChatTemplate({"default": source}).render(USER)


@pytest.mark.parametrize(
    ("source", "limit"),
    [
        (
            "{% for i in [1] * 10000000 %}{% for j in [1] * 10000000 %}{% endfor %}{% endfor %}",
            "CPU",
        ),
        ("{{ 9 ** 99999999999 }}", "CPU"),
        (
            "{% set n = namespace(x='aaaaaaaa') %}"
            "{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "memory|CPU",
        ),
        ("{{ [1] | tojson(indent=2000000000) }}", "memory"),
        ("{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}", "RecursionError"),
        ("{{ 1 }}" * 3_000_000, "longer than 1,048,576"),
    ],
)
def test_a_template_ends_within_its_limits(short, source, limit):
    with pytest.raises(ChatTemplateError, match=f"^chat template: .*({limit})") as error:
        render(source)
    assert len(str(error.value)) < 300


def test_the_process_of_templates_is_started_again_and_is_each_processes_own(short):
    process = chat_sandbox._process
    memory = bytes(300 << 20)  # The parent's memory does not count for the child.
    process.close()
    assert render("{{ messages[0].content }}") == "hi"
    first = process._process
    assert render("{{ messages[0].content }}") == "hi" and process._process is first and memory
    os.kill(process._process.pid, signal.SIGKILL)
    assert render("{{ messages[0].content }}") == "hi"
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        texts = list(threads.map(lambda i: render(f"{{{{ {i} * {i} }}}}"), range(50)))
    assert texts == [str(i * i) for i in range(50)]
    # A forked process, here with the lock held by no thread of its own.
    with process._lock:
        if not (child := os.fork()):
            os._exit(0 if render("forked") == "forked" else 1)
    assert os.waitpid(child, 0)[1] == 0 and render("still") == "still"
    # It inherits nothing, and ends with its channel.
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.set_inheritable(server.fileno(), True)
        process.close()
        render("x")
        names = {
            os.readlink(f"/proc/{process._process.pid}/fd/{fd}")
            for fd in range(20)
            if _open(process, fd)
        }
        assert sum(name.startswith("socket") for name in names) == 1
    pid = process._process.pid
    process._channel.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + 20
    while process._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not pathlib.Path(f"/proc/{pid}/fd/0").exists() and render("again") == "again"


def _open(process, fd):
    return os.path.lexists(f"/proc/{process._process.pid}/fd/{fd}")


def test_templates_that_are_too_long_many_or_not_text(tmp_path):
    def read(config=None):
        return chat_template.read(tmp_path, config or {}, {})

    with pytest.raises(ChatTemplateError, match=r"'default' is longer than 1,048,576"):
        read({"chat_template": "x" * 2**21})
    for entry in (
        3,
        {},
        [{"name": 3, "template": "x"}],
        [{"name": "x", "template": 3}],
        [{"name": []}],
    ):
        if entry:
            with pytest.raises(ChatTemplateError, match="chat_template is neither"):
                read({"chat_template": entry})
    file = tmp_path / "chat_template.jinja"
    file.write_bytes(b"x" * 2**21)
    for call in (read, lambda: chat_template.named(str(file))):
        with pytest.raises(
            ChatTemplateError, match=r"chat_template.jinja is longer than 1,048,576"
        ):
            call()
    file.write_bytes(b"\xff")
    with pytest.raises(
        ChatTemplateError, match=r"chat_template.jinja is not UTF-8 at byte offset 0"
    ):
        read()
    file.unlink()
    (tmp_path / chat_template.FOLDER).mkdir()
    for number in range(101):
        (tmp_path / chat_template.FOLDER / f"{number}.jinja").touch()
    with pytest.raises(ChatTemplateError, match="more than 100 files"):
        read()


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's directory with a small tokenizer, and a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder)
    return folder


def spec(**changes):
    tokens = {"a": 0, "b": 1, "</s>": 2}
    model = {"type": "BPE", "vocab": tokens, "merges": [], "unk_token": None}
    return {
        "version": "1.0",
        "added_tokens": [],
        "model": model,
        "normalizer": None,
        "decoder": None,
        **changes,
    }


def write(folder, **changes):
    (folder / "tokenizer.json").write_text(json.dumps(spec(**changes)))


def read(folder, target):
    return hf_tokenizer.read(folder)


def copy(folder, target):
    return hf_tokenizer.copy(folder, target)


@pytest.mark.parametrize(
    ("name", "users"),
    [
        ("tokenizer.json", (read, copy)),
        ("tokenizer_config.json", (read, copy)),
        ("special_tokens_map.json", (read, copy)),
        ("generation_config.json", (read, copy)),
        ("chat_template.jinja", (read, copy)),
        ("additional_chat_templates/x.jinja", (read, copy)),
        ("config.json", (read,)),
        ("vocab.json", (copy,)),
        ("merges.txt", (copy,)),
        ("added_tokens.json", (copy,)),
        ("tokenizer.model", (copy,)),
    ],
)
def test_links_stay_in_the_checkpoint(folder, name, users, tmp_path):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    target = tmp_path / "copy"
    target.mkdir()

    def refused(problem):
        for use in users:
            with pytest.raises(CheckpointFileError, match=problem) as error:
                use(folder, target)
            assert name in str(error.value)
        path.unlink()

    for outside in (tmp_path / "secret", "/dev/zero", "../../secret"):
        path.symlink_to(outside)
        if not name.startswith("additional"):  # the same verdict as for weights
            with pytest.raises(CheckpointFileError, match="outside of the checkpoint"):
                safetensors_files.read_json(path)
        refused("outside of the checkpoint")
    os.mkfifo(path)
    refused("not a regular file")
    path.symlink_to(path.name)
    refused("cannot be read")
    assert not (target / name).exists()
    assert not any(file.read_text() == "secret" for file in target.rglob("*") if file.is_file())


def test_links_of_the_hub_are_followed(tmp_path):
    folder = tmp_path / "models--x" / "snapshots" / "0123"
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    write(folder)
    (folder / "tokenizer.json").rename(tmp_path / "models--x" / "blobs" / "f00")
    (folder / "tokenizer.json").symlink_to("../../blobs/f00")
    (tmp_path / "copy").mkdir()
    hf_tokenizer.copy(folder, tmp_path / "copy")
    for path in (folder, tmp_path / "copy"):
        assert hf_tokenizer.num_ids(hf_tokenizer.load(hf_tokenizer.read(path).content)) == 3


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


CHARSMAP = base64.b64encode(struct.pack("<I", 4) + b"\0" * 4 + b"x" * 5000 + b"\0").decode()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"normalizer": sequence(*[replace({"String": "a"}, "a" * 10)] * 12)}, "normalizer can make 1,000,000,000,000 bytes"),
        ({"normalizer": sequence(*[replace({"Regex": "x*"}, "xxxxxxxxx")] * 4)}, "normalizer can make 10,000 bytes"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 5000}}, "normalizer can make 5,001 bytes"),
        ({"decoder": replace({"String": ""}, "x" * 5000)}, "decoder can make 5,001 bytes"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "damaged"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "damaged"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 2**32 - 1}, "merges": []}}, "has the id 4,294,967,295"),
        ({"model": {"type": "BPE", "vocab": {"a" * 70_000: 0}, "merges": []}}, "a token has 70,000 characters"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "damaged"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
         "crashes on the text 'aaa|CPU time"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}}, "damaged"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                             "pair": [], "special_tokens": {}}}, "damaged|crashes"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_fails_or_explodes_is_one_error(short, folder, changes, words):
    write(folder, **changes)
    with pytest.raises(
        CheckpointFileError,
        match=f"tokenizer.json is damaged or not a tokenizer: .*({words})|({words})",
    ):
        hf_tokenizer.read(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"\xff\xfe{}", "not UTF-8 at byte offset 0"),
        ("tokenizer.json", b"[" * 100_000, "damaged"),
        ("tokenizer_config.json", b'{"a":' * 100_000, "nested too deeply"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is damaged"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token is 3, not the text of a token"),
        ("tokenizer_config.json", b'{"eos_token": {"content": []}}', "eos_token is .*not the text"),
        ("tokenizer_config.json", b'{"add_bos_token": "false"}', "add_bos_token is 'false'"),
        ("special_tokens_map.json", b'{"pad_token": ["x"]}', "special_tokens_map.json: pad_token is"),
        ("generation_config.json", b'{"eos_token_id": 99999999999}', "eos_token_id is '99999999999'"),
        ("config.json", b" " * (checkpoint_files.MAX_JSON + 1), "config.json is longer than 16,777,216 bytes"),
    ],
)  # fmt: skip
def test_damaged_settings_are_one_error(folder, name, content, words):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointFileError, match=words):
        hf_tokenizer.read(folder)


def test_a_crash_on_a_later_text_is_one_error(folder, monkeypatch):
    """A regular expression that no text of the trial drives to its limit."""
    pattern = {"Regex": "(q+)+$"}
    write(
        folder,
        pre_tokenizer={
            "type": "Split",
            "pattern": pattern,
            "behavior": "Isolated",
            "invert": False,
        },
    )
    vocabulary = vocabularies.huggingface(path=folder)
    assert vocabulary.encode("ab") == [0, 1]
    with pytest.raises(
        CheckpointFileError, match="tokenizer.json fails on this text: .*retry-limit"
    ):
        vocabulary.encode("q" * 30 + "!")


def test_changed_settings_load_or_are_the_projects_error(folder):
    """Random changes of tokenizer_config.json and of tokenizer.json."""
    random_ = random.Random(0)
    config = {"bos_token": "a", "eos_token": {"content": "</s>"}, "add_bos_token": True,
              "chat_template": [{"name": "default", "template": "{{ bos_token }}"}]}  # fmt: skip
    tokenizer = spec(normalizer=sequence(replace({"String": " "}, "_"), {"type": "NFC"}),
                     post_processor=None, pre_tokenizer={"type": "Whitespace"})  # fmt: skip
    contents = {
        "tokenizer_config.json": json.dumps(config).encode(),
        "tokenizer.json": json.dumps(tokenizer).encode(),
    }
    loaded = 0
    started = time.monotonic()
    for number in range(200):
        name = "tokenizer.json" if number % 4 == 0 else "tokenizer_config.json"
        for other, content in contents.items():
            (folder / other).write_bytes(mutated(content, random_) if other == name else content)
        try:
            hf_tokenizer.read(folder)
            loaded += 1
        except CheckpointFileError as error:
            assert len(str(error)) < 1000
    assert 0 < loaded < 200 and time.monotonic() - started < 60


def mutated(content, random_):
    """Some bytes changed, removed, repeated, or replaced by JSON of another type."""
    content = bytearray(content)
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(content))
        part = content[at : at + random_.randint(1, 12)]
        content[at : at + len(part)] = random_.choice(
            [
                bytes([random_.randrange(256)]),
                b"",
                bytes(part) * 3,
                b"null",
                b"-1",
                b"[]",
                b'"x"',
                b"1e999",
            ]
        )
    return bytes(content)


def test_the_growth_of_a_real_normalizer_is_small():
    steps = sequence(replace({"String": " "}, "\u2581"), {"type": "NFKC"}, {"type": "Lowercase"})
    assert tokenizer_probe._growth(steps) == 3


def test_a_damaged_sentencepiece_model_is_one_error(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    model = folder / "tokenizer.model"
    for content in (b"x" * 1000, random.Random(0).randbytes(5000)):
        model.write_bytes(content)
        with pytest.raises(CheckpointFileError, match=r"tokenizer\.model is damaged or not a Sent"):
            vocabularies.huggingface(path=folder)
        with pytest.raises(ValueError, match=r"tokenizer\.model is damaged or not a Sent"):
            vocabularies.from_file(path=model)
    model.unlink()
    model.symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointFileError, match="outside of the checkpoint"):
        vocabularies.huggingface(path=folder)
