"""Serves a trained model to clients of the OpenAI API: completions of texts, and answers to messages.

Example, after a run in /tmp/espalier_tiny (see espalier train --help):

  espalier serve --checkpoint=/tmp/espalier_tiny --port=8000
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "espalier_tiny", "prompt": "def main(", "max_tokens": 32, "seed": 1}'

or, in Python, openai.OpenAI(base_url="http://127.0.0.1:8000/v1") with any key. Needs pip install -e .[serve].

POST /v1/completions and /v1/chat/completions (messages are rendered by the model's chat template), GET /v1/models and
/health. Parameters: max_tokens (max_completion_tokens), temperature, top_p, n, seed, stop, stream, stream_options and
logprobs (of the chosen tokens). A parameter that would be ignored is an error. The text is that of espalier generate with
the same settings and seed. Completions join a running batch while others are generated, and what a prompt has in common with the
beginning of an earlier one, such as a system message, is not read again.

Only programs of this computer reach the server unless --host is another address; then give --api_key_file, a file with
the key that clients must send, and --allowed_host, the name by which they reach it. SIGINT or SIGTERM ends it after the requests in progress.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence

from espalier.common import stages
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.load import load_run
from espalier.launch.serve.requests import Limits

_LOCAL = ("127.0.0.1", "::1", "localhost")


class ServeError(ValueError):
    """A server that cannot start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeFlags:
    """Where the server is, and who may use it.

    Attributes:
      host: address at which the server listens.
      port: its port; 0 for a free one.
      allowed_host: a name or address by which clients may reach the server, besides localhost and --host; repeatable.
      name: name of the model (default: of the run's directory).
      api_key_file: file with the key of the clients.
      cache_dtype: type of cached keys and values (default: the model's).
      prefix_cache_bytes: memory for keys and values of earlier prompts, whose beginnings are not read again; 0 for none
        (default: 1 GB, and none for an encoder-decoder, which reads each prompt whole).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_host: Sequence[setting_flags.Name] = ()
    name: str | None = None
    api_key_file: setting_flags.File | None = None
    cache_dtype: load_run.CacheDtype | None = None
    prefix_cache_bytes: int | None = None


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_weights_flag(load_run.add_flags(parser))
    setting_flags.add(parser.add_argument_group("server"), ServeFlags)
    setting_flags.add(parser.add_argument_group("limits"), Limits())


def _run(start: cli.Start) -> None:
    """Serves until a signal.

    Raises:
      ServeError: packages or the key are missing, several processes, or an address that cannot be used.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError:
        raise ServeError(
            "espalier serve needs starlette and uvicorn: pip install -e .[serve]"
        ) from None
    import jax

    from espalier.launch.serve import connections
    from espalier.launch.serve.app import make_app
    from espalier.launch.serve.engine import Engine

    flags = ServeFlags(**setting_flags.given(start.flags, ServeFlags))
    checkpoint, params = start.flags.checkpoint, start.flags.params
    if jax.process_count() > 1:
        raise ServeError("espalier serve runs in one process, on all devices of a host.")
    limits = Limits(**setting_flags.given(start.flags, Limits))
    api_key = None if flags.api_key_file is None else key_of(flags.api_key_file)
    if api_key is None and flags.host not in _LOCAL:
        print(
            f"warning: everyone who reaches {flags.host} can use the model: see --api_key_file.",
            file=sys.stderr,
        )
    name = flags.name or os.path.basename(os.path.abspath(checkpoint))
    config = connections.config(lambda: None, host=flags.host, port=flags.port)
    try:
        socket = config.bind_socket()  # before the model is loaded
    except SystemExit:  # uvicorn has printed the reason
        raise ServeError(
            f"--host={flags.host} --port={flags.port} cannot be served: choose another address or port."
        ) from None
    options = {"checkpoint": checkpoint, "params": params, "cache_dtype": flags.cache_dtype}
    options["prefix_bytes"] = flags.prefix_cache_bytes
    with socket, Engine(start(), limits=limits, **options) as engine:
        config.app = make_app(
            engine,
            model=name,
            limits=limits,
            api_key=api_key,
            allowed_hosts=[flags.host, *flags.allowed_host],
        )
        of_rows, of_prompt, of_prefixes = engine.batch.most_bytes
        print(
            f"keys and values take at most {of_rows / 1e9:,.2f} GB for {limits.batch_size} completions at a time, "
            f"{of_prompt / 1e9:,.2f} GB for the prompt that is read, and {of_prefixes / 1e9:,.2f} GB for earlier prompts: see --batch_size, --max_tokens, --max_prompt_tokens and "
            "--prefix_cache_bytes",
            file=sys.stderr,
        )
        print(
            f"serving {name} at http://{flags.host}:{socket.getsockname()[1]}/v1", file=sys.stderr
        )
        with stages.quiet():  # it waits for clients, and logs their requests
            uvicorn.Server(config).run(sockets=[socket])


def key_of(path: str) -> str:
    """Returns the API key in a file.

    Raises:
      ServeError: the file is empty, or has more than one line.
    """
    text = pathlib.Path(path).read_text("utf-8").strip()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ServeError(
            f"--api_key_file={path} must have one line with the key: letters, digits and signs, no spaces."
        )
    return text


main = load_run.command(__doc__, "serve", _run, _add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
