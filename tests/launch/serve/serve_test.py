"""The server end to end, by the `openai` client: its texts are those of `generate`, and bad requests are errors."""

import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import threading
import time

import numpy as np
import openai
import pytest
import requests as http
import uvicorn

from espalier.data.tokenizers import vocabularies
from espalier.launch.inference.chat_endpoint import ChatEndpoint, EndpointError
from espalier.launch.inference.generate import generate
from espalier.launch.inference.texts import decoder_of
from espalier.launch.load import load_run
from espalier.launch.serve import __main__ as serve
from espalier.launch.serve import app as app_module
from espalier.launch.serve import connections, requests
from espalier.launch.serve.engine import BusyError, Completed, Engine, Job
from espalier.launch.serve.replies import Replies
from espalier.launch.serve.requests import Limits
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Draw, Settings

LIMITS = Limits(max_tokens=64, max_prompt_tokens=160, max_completions=6, max_body_bytes=5000)
LIMITS = dataclasses.replace(LIMITS, batch_size=4, max_queue=12, timeout=120.0)
KEY = "one-key"  # pragma: allowlist secret


@contextlib.contextmanager
def served(engine, limits=LIMITS, **options):
    """Yields the address of a server in a thread."""
    app = app_module.make_app(engine, model="tiny", limits=limits, **options)
    config = connections.config(app, host="127.0.0.1", port=0, log_level="warning")
    with config.bind_socket() as socket:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[socket]))
        thread.start()
        while thread.is_alive() and not server.started:  # until then, connections are refused
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def config(trained_run):
    config = load_run.config_of(trained_run.path)
    return dataclasses.replace(config, chat_template="command")


@pytest.fixture(scope="module")
def engine(config, trained_run):
    with Engine(config, checkpoint=trained_run.path, limits=LIMITS) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine):
    with served(engine, api_key=KEY) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def generated(config, trained_run):
    """Rows of `generate`."""

    def run(rows, *, tokens, seed=0, stops=(), samples=1, **sampling):
        settings = Settings(
            max_new_tokens=tokens, num_samples=samples, sampling=Sampling(**sampling)
        )
        options = {"settings": settings, "seed": seed, "stops": stops, "batch_size": 2}
        places = [(f"row {i}", row) for i, row in enumerate(rows)]
        return list(generate(config, places, checkpoint=trained_run.path, **options))

    return run


def user(text):
    return [{"role": "user", "content": text}]


def test_texts_are_those_of_generate_whatever_shares_the_batch(client, generated):
    prompts = ["import ", "x", "def f(", [5, 6, 7]]
    sampled = generated(
        [{"text": p} if isinstance(p, str) else {"tokens": p} for p in prompts],
        tokens=20,
        seed=3,
        temperature=1.0,
    )
    greedy = generated([{"text": "import "}], tokens=24, temperature=0.0)
    nucleus = generated([{"text": "y"}], tokens=12, seed=9, samples=2, temperature=0.7, top_p=0.8)
    chat = generated([{"messages": user("hello")}], tokens=16, seed=4, temperature=1.3)

    def texts(reply):
        return [choice.text for choice in reply.choices]

    complete = client.completions.create
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        one = pool.submit(complete, model="tiny", prompt=prompts[:3], max_tokens=20, seed=3)
        two = pool.submit(complete, model="tiny", prompt="import ", max_tokens=24, temperature=0)
        three = pool.submit(
            complete,
            model="tiny",
            prompt="y",
            max_tokens=12,
            seed=9,
            n=2,
            temperature=0.7,
            top_p=0.8,
        )
        four = pool.submit(
            client.chat.completions.create,
            **{"model": "tiny", "messages": user("hello"), "max_completion_tokens": 16},
            **{"seed": 4, "temperature": 1.3, "logprobs": True},
        )
    assert texts(one.result()) == [row["text"] for row in sampled[:3]]
    assert texts(two.result()) == [row["text"] for row in greedy]
    assert texts(three.result()) == [row["text"] for row in nucleus]
    (choice,) = four.result().choices
    assert choice.message.content == chat[0]["text"]
    assert choice.finish_reason == ("length" if chat[0]["ended"] == "length" else "stop")
    log_probs = [token.logprob for token in choice.logprobs.content]
    np.testing.assert_allclose(log_probs, chat[0]["logprobs"], atol=1e-4)
    # The fourth prompt has index 3 in the file, and index 0 in a request of its own.
    alone = complete(model="tiny", prompt=[5, 6, 7], max_tokens=20, seed=3, logprobs=0)
    want = generated([{"tokens": [5, 6, 7]}], tokens=20, seed=3, temperature=1.0)[0]
    assert texts(alone) == [want["text"]] and alone.usage.prompt_tokens == 4
    np.testing.assert_allclose(
        alone.choices[0].logprobs.token_logprobs, want["logprobs"], atol=1e-4
    )
    assert alone.usage.completion_tokens == len(want["tokens"])


def test_a_stream_and_its_stop_are_those_of_the_whole_reply(client, generated):
    ask = {"model": "tiny", "messages": user("hello"), "max_tokens": 40, "seed": 5}
    whole = client.chat.completions.create(**ask).choices[0]
    stop = whole.message.content[6:8]
    assert len(stop) == 2
    for stops in ([], [stop]):
        want = generated(
            [{"messages": user("hello")}], tokens=40, seed=5, stops=stops, temperature=1
        )
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(**ask, stop=stops, stream=True, stream_options=options)
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert "".join(pieces) == want[0]["text"]
        assert len(pieces) > 3 or stops
        reason = "length" if want[0]["ended"] == "length" else "stop"
        assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == reason
        assert chunks[-1].usage.completion_tokens == len(want[0]["tokens"])
    texts = ["", ""]
    for chunk in client.completions.create(
        model="tiny", prompt="y", max_tokens=9, n=2, seed=2, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    rows = generated([{"text": "y"}], tokens=9, seed=2, samples=2, temperature=1)
    assert texts == [row["text"] for row in rows]


def test_the_models_are_listed(client, url):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert http.get(url.replace("/v1", "/health")).json() == {"status": "ok"}


def body(**changes):
    return {"model": "tiny", "prompt": "x", "max_tokens": 4, **changes}


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"model": "other"}, 404, "must be 'tiny'"),
        ({"temprature": 1}, 400, "did you mean 'temperature'"),
        ({"temperature": -1}, 400, "from 0 to 100"),
        ({"temperature": 0, "top_p": 0.5}, 400, "'top_p' has no effect with 'temperature': 0"),
        ({"temperature": float("nan")}, 400, "'temperature' is nan"),
        ({"top_p": 0}, 400, "'top_p' is 0"),
        ({"max_tokens": 65}, 400, "from 1 to 64"),
        ({"max_tokens": 10**400}, 400, "from 1 to 64"),
        ({"n": 7}, 400, "from 1 to 6"),
        ({"prompt": ["x"] * 4, "n": 2}, 400, "more than 6 completions"),
        ({"prompt": 3}, 400, "'prompt' must be"),
        ({"prompt": "\ud800"}, 400, "not valid Unicode"),
        ({"prompt": [[1, 999]]}, 400, "holds the id 999"),
        ({"prompt": "x" * 200}, 400, "has 201 tokens; 160 are the most"),
        ({"prompt": "x" * 6000}, 413, "more than 5,000 bytes"),
        ({"logprobs": 2}, 400, "must be 0"),
        ({"frequency_penalty": 1}, 400, "not supported"),
        ({"stop": ["", "x"]}, 400, "'stop' must be"),
        ({"seed": 1.5}, 400, "'seed' is 1.5"),
        ({"stream": 1}, 400, "true or false"),
        ({"stream_options": 1}, 400, "must be an object"),
        ({"stream_options": {"include_usage": True}}, 400, "no effect without 'stream'"),
        ({"stream": True, "stream_options": {"usage": True}}, 400, "'include_usage' alone"),
        ({"max_completion_tokens": 3}, 400, "is unknown"),
    ],
)
def test_a_bad_request_is_an_error_that_names_its_parameter(url, changes, status, message):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    content = json.dumps(body(**changes))
    reply = http.post(f"{url}/completions", data=content, headers=headers)
    assert reply.status_code == status
    assert message in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must be a list"),
        ([{"content": "x"}], "with a 'role'"),
        ([{"role": "user\n", "content": "x"}], "must be one of system, developer, user"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "not a text"),
        ([{"role": "user", "content": "x"}] * 2, "alternate"),
        ([{"role": "user", "content": "x", "name": "Ada"}], "has 'name', which"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], "'tool_calls'"),
    ],
)
def test_bad_messages_are_an_error(client, messages, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="tiny", messages=messages)


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"max_completion_tokens": None, "max_tokens": 5}, 5),
        ({"max_completion_tokens": 5}, 5),
        ({"max_completion_tokens": 5, "max_tokens": 5}, 5),
        ({}, None),
    ],
)
def test_both_names_of_the_number_of_new_tokens_are_read(given, tokens):
    message = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": []}
    content = json.dumps({"model": "tiny", "messages": [message], **given}).encode()
    assert requests.read(content, chat=True, model="tiny", limits=LIMITS).max_tokens == tokens


def test_the_number_of_new_tokens_of_the_api_is_within_the_servers():
    content, least = b'{"model": "tiny", "prompt": "x"}', dataclasses.replace(LIMITS, max_tokens=3)
    for limits, tokens in ((LIMITS, 16), (least, 3)):
        asked = requests.read(content, chat=False, model="tiny", limits=limits)
        assert asked.max_tokens == tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [(("abc", 5), "'max_tokens' is 'abc'"), ((4, 5), "'max_tokens' is 4 and")],
)
def test_two_numbers_of_new_tokens_that_differ_are_an_error(given, message):
    names = dict(zip(("max_tokens", "max_completion_tokens"), given, strict=True))
    content = json.dumps({"model": "tiny", "messages": user("x"), **names}).encode()
    with pytest.raises(requests.RequestError, match=message):
        requests.read(content, chat=True, model="tiny", limits=LIMITS)


def test_what_is_no_request_is_an_error(url, client):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}

    def post(content, path="/completions", **changes):
        return http.post(url + path, data=content, headers={**headers, **changes})

    assert "not JSON" in post(b"{").json()["error"]["message"]
    assert "not JSON" in post(b"[" * 4000).json()["error"]["message"]
    assert "not a JSON object" in post(b"[]").json()["error"]["message"]
    assert "'messages' is missing" in post(b"{}", "/chat/completions").json()["error"]["message"]
    assert post(b"{}", **{"Content-Type": "text/plain"}).status_code == 415
    assert post(b"{}", **{"Authorization": "Bearer other"}).status_code == 401
    assert post(b"{}", "/embeddings").json()["error"]["message"].startswith("POST /v1/embeddings")
    assert http.get(f"{url}/completions", headers=headers).status_code == 405
    # A part of a text with content parts is a text.
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = {"model": "tiny", "max_tokens": 3, "seed": 1}
    create = client.chat.completions.create
    joined = create(**ask, messages=[{"role": "user", "content": parts}])
    assert (
        joined.choices[0].message.content
        == create(**ask, messages=user("ab")).choices[0].message.content
    )


@pytest.mark.parametrize(
    "change",
    [
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "\ud800", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a\udfff"}]}]},
        {"\ud800": 1},
        {"model": "\ud800"},
        {"stop": ["\ud800"]},
        {"user": "\ud800"},
        {"metadata": {"\ud800": {"a": ["\ud800"]}}},
    ],
)
@pytest.mark.parametrize("escaped", [True, False])
def test_half_of_a_surrogate_pair_is_a_bad_request_everywhere(url, change, escaped):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    row = {"model": "tiny", "messages": user("x"), "max_tokens": 1, **change}
    content = json.dumps(row, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    reply = http.post(f"{url}/chat/completions", data=content, headers=headers)
    assert reply.status_code == 400 and "surrogate pair" in reply.json()["error"]["message"]


def test_pages_of_other_sites_are_refused(engine):
    with served(engine, allowed_hosts=["Box.example"]) as url:

        def status(**headers):
            return http.get(f"{url}/models", headers=headers).status_code

        port = url.split(":")[2].split("/")[0]
        for host in ("localhost", f"127.0.0.1:{port}", f"[::1]:{port}", "box.example:80"):
            assert status(Host=host) == 200
        for origin in ("http://localhost:3000", "https://box.example", f"http://127.0.0.1:{port}"):
            assert status(Origin=origin) == 200
        hosts = ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "[", "")
        for host in (*hosts, "[::1].evil.example"):
            assert status(Host=host) == 403 and status(Origin=f"http://{host}") == 403
        assert status(Origin="null") == status(Origin="http://192.0.2.1") == 403
        reply = http.post(f"{url}/completions", json=body(), headers={"Host": "evil.example"})
        assert reply.status_code == 403 and "--allowed_host" in reply.json()["error"]["message"]


def test_a_request_whose_head_does_not_arrive_ends(engine, monkeypatch):
    monkeypatch.setattr(connections, "_HEAD_S", 0.5)
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    with served(engine) as url:
        address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        silent, half, again = (socket.create_connection(address, timeout=20) for _ in range(3))
        with silent, half, again:
            again.sendall(head + b"\r\n")
            assert b"200 OK" in again.recv(1 << 16)
            began = time.monotonic()
            again.sendall(head)
            half.sendall(head)
            for connection in (silent, half, again):
                connection.settimeout(20)
                assert connection.recv(1) == b""
            assert time.monotonic() - began < 15
        # The time of a body is another.
        slow = socket.create_connection(address, timeout=20)
        with slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
                b"Content-Type: application/json\r\nConnection: close\r\n\r\n{"
            )
            time.sleep(1.0)
            slow.sendall(b"}")
            assert b"400 Bad Request" in slow.recv(1 << 16)


def test_a_huge_prompt_is_refused_before_it_is_encoded(engine, monkeypatch):
    def encoded(*_):
        raise AssertionError("encoded")

    monkeypatch.setattr(app_module, "prompt_of", encoded)
    limits = dataclasses.replace(LIMITS, max_prompt_tokens=10)
    with served(engine, limits) as url:
        for path, row in (
            ("completions", body(prompt="y" * 321)),
            ("chat/completions", {"model": "tiny", "messages": user("x" * 100) * 4}),
        ):
            reply = http.post(f"{url}/{path}", json=row)
            assert reply.status_code == 400
            assert "320 are the most, 32 for each of 10" in reply.json()["error"]["message"]


class Recorder:
    """In place of an engine: it answers every prompt with nothing, and records the prompts."""

    longest_position = None

    def __init__(self, loaded):
        self.loaded, self.prompts = loaded, []

    def submit(self, jobs):
        for job in jobs:
            self.prompts.append(job.prompt)
            job.future.set_result(Completed(text="", ended="eos", tokens=[], log_probs=[]))


def test_a_message_cannot_write_the_turns_of_others(hostile):
    """The tokens of a user's text are text, whatever it spells, and its role is one of the API."""
    engine = Recorder(hostile.loaded())
    with served(engine) as url:

        def ask(messages):
            row = {"model": "tiny", "messages": messages, "max_tokens": 1}
            reply = http.post(f"{url}/chat/completions", json=row)
            return reply.status_code, engine.prompts[-1:] and engine.prompts[-1]

        _, injected = ask(user(hostile.text))
        _, honest = ask([*user("x"), {"role": "system", "content": "obey"}])
        assert injected != honest and hostile.turns(honest) == 3
        assert hostile.turns(injected) == 2  # the user's and the assistant's
        assert hostile.vocabulary.decode_all(injected[1:]) == (
            f"<|im_start|>user\n{hostile.text}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert ask([{"role": f"user\n{hostile.text}", "content": "x"}])[0] == 400
    with served(Recorder(hostile.loaded(special_tokens="everywhere"))) as url:
        reply = http.post(
            f"{url}/chat/completions", json={"model": "tiny", "messages": user(hostile.text)}
        )
        assert reply.json()["usage"]["prompt_tokens"] == len(honest)


def test_a_model_without_a_chat_template_says_so_once(hostile):
    vocabulary = vocabularies.byte()
    with served(Recorder(hostile.loaded(vocabulary=lambda: vocabulary))) as url:
        reply = http.post(f"{url}/chat/completions", json={"model": "tiny", "messages": user("x")})
        assert reply.status_code == 501 and reply.json()["error"]["code"] == "no_chat_template"
        endpoint = ChatEndpoint(url, model="tiny", key=None, owner="the test")
        with pytest.raises(EndpointError, match="501 .*no chat template"):
            list(endpoint.ask_each([{"messages": user("x")}] * 3))
        assert http.post(f"{url}/completions", json=body()).status_code == 200


def test_offsets_of_parts_of_a_character():
    vocabulary = vocabularies.byte()
    text = "aé🙂b"
    tokens = vocabulary.encode(text)
    content = json.dumps(body(logprobs=0)).encode()
    chat = json.dumps({"model": "tiny", "messages": user("x"), "logprobs": True}).encode()
    one = Completed(text=text, ended="length", tokens=tokens, log_probs=[-1.0] * len(tokens))
    made = [
        Replies(
            requests.read(asked, chat=asked is chat, model="tiny", limits=LIMITS),
            model="tiny",
            prompt_tokens=1,
            decode=decoder_of(vocabulary),
        ).whole([one])["choices"][0]["logprobs"]
        for asked in (content, chat)
    ]
    assert made[0]["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3]
    parts = [token["bytes"] for token in made[1]["content"]]
    assert parts[0] == [97] and parts[-1] == [98]
    assert all(part is None or bytes(part).decode() in text for part in parts)


class Held:
    """Holds the engine at the first new token of a completion until `release`."""

    def __init__(self, monkeypatch):
        self.begun, self.free = threading.Event(), threading.Event()
        add = Job.add

        def slow(job, news):
            self.begun.set()
            self.free.wait(60)
            return add(job, news)

        monkeypatch.setattr(Job, "add", slow)


def test_a_full_queue_and_a_slow_engine_are_errors_and_the_server_goes_on(engine, monkeypatch):
    limits = dataclasses.replace(LIMITS, timeout=1.0)
    with (
        served(engine, limits) as url,
        openai.OpenAI(base_url=url, api_key="x", max_retries=0) as c,
    ):
        with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(16) as pool:
            held = Held(patch)
            first = pool.submit(c.completions.create, **body())
            assert held.begun.wait(60)
            late = [pool.submit(c.completions.create, **body(prompt=["x"] * 6)) for _ in range(2)]
            stream = pool.submit(lambda: list(c.completions.create(**body(), stream=True)))
            while len(engine._waiting) < 12 and not stream.done():
                time.sleep(0.01)
            errors = [f.exception() for f in (first, *late, stream)]
            held.free.set()
        # One of the three did not fit into the queue; the others waited too long.
        kinds = [type(e).__name__ for e in errors]
        assert kinds.count("RateLimitError") == 1, kinds
        assert all(e is not None for e in errors)
        assert isinstance(errors[0], openai.InternalServerError) and "time limit" in str(errors[0])
        deadline = time.monotonic() + 60
        while engine._waiting and time.monotonic() < deadline:
            time.sleep(0.01)
    with served(engine) as url, openai.OpenAI(base_url=url, api_key="x") as c:
        assert c.completions.create(**body(temperature=0)).usage.completion_tokens <= 4


def test_who_has_gone_leaves_the_queue_and_is_not_read(engine, monkeypatch):
    draw = Draw(seed=0, temperature=0.0)
    with monkeypatch.context() as patch:
        held = Held(patch)
        first = Job([1], max_tokens=1, draw=draw)
        engine.submit([first])
        assert held.begun.wait(60)
        gone = [Job([1] * 50, max_tokens=1, draw=draw) for _ in range(LIMITS.max_queue)]
        engine.submit(gone)
        last = Job([1], max_tokens=1, draw=draw)
        with pytest.raises(BusyError, match="are waiting"):
            engine.submit([last])
        for job in gone:
            job.cancel()
        engine.submit([last])
        read = engine.batch.prompt_tokens_read
        held.free.set()
        assert last.future.result(60).ended in ("length", "eos")
    assert engine.batch.prompt_tokens_read - read <= 1


def test_a_client_that_goes_ends_its_completion(engine, url, monkeypatch):
    with monkeypatch.context() as patch:
        held = Held(patch)
        headers = {"Authorization": f"Bearer {KEY}"}
        with pytest.raises(http.ReadTimeout):
            http.post(f"{url}/completions", json=body(max_tokens=60), headers=headers, timeout=0.5)
        assert held.begun.wait(60)
        (job,) = engine._jobs
        deadline = time.monotonic() + 60
        while not job.cancelled and time.monotonic() < deadline:
            time.sleep(0.01)
        held.free.set()
    assert job.cancelled and not job.future.done()


def test_a_shutdown_waits_for_the_requests_in_progress(engine, monkeypatch):
    with monkeypatch.context() as patch, concurrent.futures.ThreadPoolExecutor(2) as pool:
        held = Held(patch)
        with served(engine) as url:
            last = pool.submit(http.post, f"{url}/completions", json=body())
            assert held.begun.wait(60)
            pool.submit(lambda: (time.sleep(0.3), held.free.set()))
        assert last.result().json()["usage"]["completion_tokens"] >= 1


def test_an_error_of_a_batch_fails_its_requests_alone(engine, client, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(Job, "begin", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="model failed"):
            client.completions.create(**body())
        patch.setattr(Job, "begin", lambda *_: [].index("a fault of this program"))
        with pytest.raises(openai.InternalServerError, match="log says why") as failed:
            client.completions.create(**body())
    assert "not in list" not in str(failed.value) and "not in list" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr("espalier.trainers.decoding.prefill._memory_limit", lambda _: 10)
        with pytest.raises(openai.BadRequestError, match="give a shorter prompt"):
            client.completions.create(**body())
    assert client.completions.create(**body()).choices[0].index == 0


def test_a_closed_engine_fails_what_waits(config, trained_run):
    with Engine(config, checkpoint=trained_run.path, limits=LIMITS) as engine:
        pass
    with pytest.raises(BusyError, match="shutting down"):
        engine.submit([])


def test_a_request_without_a_length_may_use_all_learned_positions(engine, monkeypatch):
    monkeypatch.setattr(type(engine.loaded.model), "max_length", 100, raising=False)
    server = app_module._Server(engine, model="tiny", limits=LIMITS, api_key=None)
    content = json.dumps({"model": "tiny", "messages": user("x")}).encode()
    asked = requests.read(content, chat=True, model="tiny", limits=LIMITS)
    assert [server._room([1] * n, asked) for n in (1, 37, 60, 100)] == [64, 64, 41, 1]


def test_a_completion_joins_those_in_progress(engine, client, generated, monkeypatch):
    """The second request ends while the first is continued, and both are what they are by themselves."""
    order = []
    add = Job.add

    def noted(job, news):
        order.append(job.max_tokens)
        return add(job, news)

    long = {"model": "tiny", "prompt": "import ", "max_tokens": 64, "stream": True, "seed": 1}
    system = "You are a careful reader of long messages. "
    with monkeypatch.context() as patch:
        patch.setattr(Job, "add", noted)
        chunks = client.completions.create(**long)
        first = next(iter(chunks)).choices[0].text
        before = engine.batch.prompt_tokens_read
        short = client.completions.create(model="tiny", prompt=system, max_tokens=5, seed=2, n=2)
        read = engine.batch.prompt_tokens_read - before
        text = first + "".join(chunk.choices[0].text for chunk in chunks)
    assert order[0] == order[-1] == 64 and 5 in order
    assert read == short.usage.prompt_tokens  # once for both samples
    (want,) = generated([{"text": "import "}], tokens=64, seed=1)
    assert text == want["text"]
    rows = generated([{"text": system}], tokens=5, seed=2, samples=2)
    assert [choice.text for choice in short.choices] == [row["text"] for row in rows]


def test_a_bad_start_is_an_error(command, trained_run, tmp_path, capsys):
    run = f"--checkpoint={trained_run.path}"
    (tmp_path / "key").write_text("two words")
    for flags, message in (
        (["--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--timeout=0"], "--timeout=0.0 must be at least 0.001"),
        (["--max_queue=9"], "would never fit into --max_queue=9"),
        ([f"--api_key_file={tmp_path / 'key'}"], "must have one line"),
        ([f"--api_key_file={tmp_path / 'none'}"], "No such file"),
        (["--host=203.0.113.1", f"--port={2**14}"], "cannot be served"),
    ):
        assert command("serve", run, *flags) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "key").write_text("a-key\n")
    assert serve.key_of(str(tmp_path / "key")) == "a-key"


def test_a_seed_is_drawn_for_a_request_without_one():
    one, two = (
        requests.read(json.dumps(body()).encode(), chat=False, model="tiny", limits=LIMITS)
        for _ in range(2)
    )
    assert one.seed != two.seed and one.temperature == 1.0 and one.max_tokens == 4
