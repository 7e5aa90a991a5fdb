"""A trained model in Python: `from espalier.launch.load.load import load`, then `load("RUN")`; see docs/use/python.md.

Nothing that the author of a run wrote is executed, and gin is not used: several runs can be loaded in one process.
Shapes: B rows, T tokens, V rows of the model's table.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt

from espalier.data.stream.rows import vocabulary_digest
from espalier.launch.config import gin_writer, model_file
from espalier.launch.inference import generate
from espalier.launch.inference.texts import decoder_of
from espalier.launch.load import hf_checkpoint, run_model, side_by_side
from espalier.launch.load.load_run import RunConfig, WeightsDtype
from espalier.launch.load.loaded_run import LoadedRun, LoadError
from espalier.launch.run import model_record, run_vocabulary
from espalier.model.kv_cache.base import CachePolicy
from espalier.model.protocol import inference_model, inference_params
from espalier.trainers import partitioning
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.decoding.settings import Settings

# The recorded gin texts of the models of loaded runs, by identity.
_RECORDED: dict[int, str] = {}

# A text, its tokens, or a conversation such as [{"role": "user", "content": "Hello"}].
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One continuation of a prompt.

    Attributes:
      text: its text; None for a run without a vocabulary.
      tokens: its token ids, including the EOS.
      logprobs: the model's log-probability of each token, in nats.
      ended: why it ended: 'eos', 'stop' (one of the stop texts) or 'length'.
    """

    text: str | None
    tokens: list[int]
    logprobs: list[float]
    ended: Literal["eos", "stop", "length"]


class Run:
    """A language model with its parameters and vocabulary.

    Args:
      model: a linen module, such as model.transformer.Transformer.
      params: its parameters.
      vocabulary: a SeqIO vocabulary (data/tokenizers/vocabularies.py); None for a model that reads tokens only.
      start_token: the token before every document of the training data (0 by default there), or None.
      add_bos: whether texts begin with the vocabulary's BOS.
    """

    def __init__(
        self,
        *,
        model: Any,
        params: Any,
        vocabulary: Any = None,
        start_token: int | None = 0,
        add_bos: bool = False,
    ):
        config = RunConfig(
            model=inference_model(model),
            vocabulary=lambda: vocabulary,
            start_token=start_token,
            add_bos=add_bos,
        )
        self._loaded: LoadedRun = LoadedRun(
            config=config,
            params=inference_params(model, params),
            meta={},
            row_sharding=None,
            row_shards=1,
        )
        self._gin: str | None = _RECORDED.get(id(model))
        # What the last generation asked for, and its compiled programs and texts.
        self._decoding: tuple[Any, Any, Any] | None = None

    @classmethod
    def _of(cls, loaded: LoadedRun, gin: str | None) -> "Run":
        """Returns a loaded run; `gin` is the recorded text of its model, if that is the model."""
        run = cls.__new__(cls)
        run._loaded, run._gin, run._decoding = loaded, gin, None
        if gin is not None and id(loaded.model) not in _RECORDED:
            _RECORDED[id(loaded.model)] = gin
            weakref.finalize(loaded.model, _RECORDED.pop, id(loaded.model), None)
        return run

    def with_params(self, params: Any) -> "Run":
        """Returns this run with other parameters of the same model, such as further trained ones."""
        loaded = self._loaded
        config = dataclasses.replace(loaded.config, mesh=None)  # they may be on another mesh
        parts = {"config": config, "params": params, "row_sharding": None, "row_shards": 1}
        return Run._of(dataclasses.replace(loaded, **parts), self._gin)

    @property
    def model(self) -> Any:
        """The linen module: `run.model.apply({"params": run.params}, tokens_BT)` returns logits."""
        return self._loaded.model

    @property
    def params(self) -> Any:
        """The parameters as nested dicts of arrays."""
        return self._loaded.params

    @property
    def vocabulary(self) -> Any:
        """The SeqIO vocabulary; raises LoadError without one, or for another than the model was trained with."""
        return self._loaded.vocabulary

    def encode(self, text: str) -> list[int]:
        """Returns the tokens that the model reads of a text: with the document's start token and BOS, if it has them."""
        return self._loaded.context(self._loaded.tokens({"text": text}, "encode"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, also of those after an EOS."""
        return decoder_of(self.vocabulary)([int(token) for token in tokens])

    def logits(self, tokens_BT: npt.ArrayLike) -> jax.Array:
        """Returns float32 logits [B, T, V] of tokens [B, T]; those at position t are of the token after it.

        Ids from `vocabulary.vocab_size` on are padding of the model's table. Each new shape is compiled once.

        Raises:
          ValueError: the rows have different lengths, `tokens_BT` is one row, or an id is outside the model's table.
        """
        tokens_BT = np.asarray(tokens_BT, np.int32)
        if tokens_BT.ndim != 2:
            raise ValueError(
                f"logits: tokens have shape {list(tokens_BT.shape)}, not [rows, tokens]: for one row, run.logits([tokens])."
            )
        for tokens_T in tokens_BT.tolist():
            self._loaded.encode(tokens_T, "'tokens'")  # checks the ids
        rows = len(tokens_BT)
        padding = self._loaded.batch_size(max(rows, 1), rows) - rows  # the mesh divides the rows
        with self._mesh():
            return self._apply(self.params, np.pad(tokens_BT, ((0, padding), (0, 0))))[:rows]

    @functools.cached_property
    def _apply(self) -> Any:
        return jax.jit(lambda params, tokens_BT: self.model.apply({"params": params}, tokens_BT))

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        num_samples: int = 1,
        stop: Sequence[str] = (),
        seed: int = 0,
        batch_size: int = 8,
        policy: CachePolicy | None = None,
        token_healing: bool = True,
        **sampling: Any,
    ) -> list[Generation]:
        """Returns continuations in the order of the prompts, as `espalier generate --prompt` makes them of each.

        Args:
          prompts: a text, or a list of texts, of lists of tokens as `encode` returns them, and of conversations, which the
            model's chat template renders.
          max_new_tokens: length limit in tokens.
          num_samples: continuations of each prompt, which are adjacent in the result.
          stop: texts that end a continuation.
          seed: seed of sampling; a continuation depends only on it, the prompt's index and the sample's index.
          batch_size: prompts at a time.
          policy: policy of the key/value caches (model/kv_cache); None caches all tokens.
          token_healing: whether the last token of a text is drawn again (`TokenHealing` in launch/inference/texts.py). It is then the
            first of the new tokens; the new text follows the prompt.
          **sampling: temperature, top_k, top_p, min_p and repetition_penalty of trainers.decoding.settings.Sampling; by
            default the temperature is 0, which is greedy.

        Raises:
          LoadError: a prompt that the model cannot read, or stop texts without a vocabulary.
          ValueError: settings out of range.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        drawn = dataclasses.replace(Settings().sampling, **sampling)
        asked = generate.Decoding(
            settings=Settings(
                sampling=drawn, max_new_tokens=max_new_tokens, num_samples=num_samples
            ),
            stops=(stop,) if isinstance(stop, str) else tuple(stop),
            policy=policy,
            batch_size=self._loaded.batch_size(batch_size, len(prompts)),
        )
        rows = [(f"prompt {i}", self._row(prompt)) for i, prompt in enumerate(prompts)]
        with self._mesh():
            if self._decoding is None or self._decoding[0] != asked:
                made = generate.decoder_and_texts(self._loaded, asked, rows=len(rows))
                self._decoding = (asked, *made)
            _, decoder, texts = self._decoding
            answers = list(
                generate.continued(
                    self._loaded,
                    decoder,
                    texts,
                    rows,
                    num_samples=num_samples,
                    seed=seed,
                    token_healing=None if token_healing else False,
                )
            )
        return [
            Generation(
                text=answer.get("text"),
                tokens=answer["tokens"],
                logprobs=answer["logprobs"],
                ended=answer["ended"],
            )
            for answer in answers
        ]

    def _row(self, prompt: Prompt) -> dict[str, Any]:
        """Returns a prompt as a row of a file, whose tokens have no start token."""
        if isinstance(prompt, str):
            return {"text": prompt}
        parts: list[Any] = list(prompt)
        if parts and isinstance(parts[0], Mapping):
            return {"messages": parts}
        tokens = [int(token) for token in parts]
        start = self._loaded.context([])
        return {"tokens": tokens[len(start) :] if tokens[: len(start)] == start else tokens}

    def save(self, directory: str | os.PathLike, *, step: int = 0) -> None:
        """Writes a run directory that `load` and every command with --checkpoint read.

        Args:
          directory: may exist, for example with metrics.jsonl, but has no checkpoints yet.
          step: updates of the parameters.

        Raises:
          FileExistsError: the directory already has a run.
          LoadError: the parameters are int8.
          UnwritableModelError: a setting of the model is a function or object that cannot be imported.
        """
        if self._loaded.config.weights_dtype is not None:
            raise LoadError(
                "int8 weights are for inference and cannot be saved: load the run without weights_dtype."
            )
        folder = pathlib.Path(directory)
        for name in (model_file.NAME, model_record.CONFIG, step_dir.CHECKPOINTS):
            if (folder / name).exists():
                raise FileExistsError(
                    f"{folder} already has a run ({name}): give another directory, or remove it first."
                )
        # Raises before anything is written.
        config = self._gin or gin_writer.write(self.model)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / model_record.CONFIG).write_text(config, encoding="utf-8")
        model_record.write(folder)
        loaded = self._loaded
        start = loaded.config.start_token
        meta = {**loaded.meta, "add_bos": loaded.add_bos}
        meta["start_token"] = meta.get("start_token", 0) if start == "auto" else start
        if (vocabulary := loaded.vocabulary_or_none) is not None:
            run_vocabulary.save(folder, vocabulary)
            meta["vocabulary"] = vocabulary_digest(vocabulary)
        with Checkpointer(folder / step_dir.CHECKPOINTS) as checkpointer:
            checkpointer.save(step, {"params": self.params}, meta=meta)

    @contextlib.contextmanager
    def _mesh(self) -> Iterator[None]:
        """Enters the mesh that the parameters were loaded on; parameters of the user's own have their own shardings."""
        config = self._loaded.config
        if config.mesh is None:
            yield
            return
        mesh = partitioning.make_mesh(shape=config.mesh)
        with partitioning.use_mesh(mesh, partitioning.rules_named(config.rules)):
            yield


def load(
    checkpoint: str | os.PathLike,
    *,
    params: Literal["auto", "raw", "ema"] = "auto",
    vocabulary: Any = None,
    mesh: Mapping[str, int] | None = None,
    adapter: str | os.PathLike | None = None,
    weights_dtype: WeightsDtype | None = None,
) -> Run:
    """Loads a run: of `espalier train`, of `espalier convert`, or written by `Run.save`. Its parameters are verified.

    Args:
      checkpoint: run directory (its newest good step), step directory, or directory of a Hugging Face checkpoint, whose
        files have no checksums.
      params: the trained parameters (raw), their moving average (ema), or the average where there is one (auto).
      vocabulary: a SeqIO vocabulary instead of the run's own, for example if the directory has none.
      mesh: mesh shape by axis name, such as {"fsdp": 4, "tensor": 2}; None splits the parameters over all devices.
      adapter: run or step directory of adapters of this checkpoint; None for none.
      weights_dtype: 'int8' to store the weights of attention, MLPs and experts so, with a scale for each output channel; None for the
        type of the checkpoint.

    Raises:
      LoadError: the checkpoint is not of a language model, or the adapters are not of the checkpoint.
      ValueError: the run has no model.json, or is damaged.
      FileNotFoundError: there is no checkpoint.
    """
    path = os.fspath(checkpoint)
    if hf_checkpoint.is_hf(path):
        folder, of_step = hf_checkpoint.recorded(path)[0], None
    else:
        step = step_dir.resolve(path)  # a missing checkpoint is an error that says so
        folder, of_step = os.fspath(step_dir.files_of_run(step)), path
    model = run_model.of_checkpoint(path, macro="checkpoint")
    if vocabulary is None and run_vocabulary.is_usable(folder, of_step):
        read = functools.partial(run_vocabulary.load, folder=folder)
    else:
        read = functools.partial(lambda value: value, vocabulary)
    mesh = mesh or {"fsdp": -1}
    config = RunConfig(model=model, vocabulary=read, mesh=mesh, weights_dtype=weights_dtype)
    adapters = [] if adapter is None else [os.fspath(adapter)]
    with side_by_side.load(config, path, adapters, params=params) as ((_, loaded),):
        is_whole = loaded.model is model  # of an actor-critic, the actor is loaded
        recorded = model_file.read(os.path.join(folder, model_file.NAME)).gin()
        return Run._of(loaded, recorded if is_whole else None)
