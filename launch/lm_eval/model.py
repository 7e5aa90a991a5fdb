"""The model `--model espalier` of lm-evaluation-harness (launch/lm_eval/__main__.py): a run of this project.

Requests have the same tokens as in the harness's Hugging Face backend, so that a model and its export get the same
scores: context and continuation are encoded jointly with spaces moved into the continuation, BOS is where the tokenizer
puts it, long contexts are cut at their beginning, and texts are scored in the same windows. A model that was trained
with a start token reads it before every context. An encoder-decoder reads contexts as its inputs, which end with EOS, and
predicts continuations, which are encoded separately.
"""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval import utils as harness
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from espalier.data.stream import rows
from espalier.data.tokenizers import chat_template as chat
from espalier.launch.inference.score import row_of
from espalier.launch.lm_eval import arguments
from espalier.launch.lm_eval.arguments import Generator, options
from espalier.launch.load import side_by_side
from espalier.launch.load.load_run import LoadedRun, LoadError
from espalier.trainers.scoring.encoder_likelihoods import EncoderLikelihoods
from espalier.trainers.scoring.likelihoods import Likelihood, LikelihoodScorer

_LOG = logging.getLogger(__name__)


class EspalierLM(TemplateLM):
    """A run's model for the harness.

    Args:
      checkpoint: run or step directory.
      **given: others of `arguments.Arguments`, which are those of --model_args, and settings of the cache policy.

    Raises:
      LoadError: an unknown argument, a run without a vocabulary, or arguments that do not match the run.
    """

    def __init__(self, checkpoint: str | None = None, **given: Any):
        super().__init__()
        own, policy = arguments.parsed(checkpoint=checkpoint, **given)
        self._cut = arguments.cut_of(own.cut)
        if own.batch_tokens is not None and own.batch_tokens < 1:
            raise LoadError(f"--model_args: batch_tokens={own.batch_tokens} must be at least 1.")
        configuration = own.configuration()
        config = own.changed(configuration.entry())
        self._opened = contextlib.ExitStack()
        with configuration.in_use():  # an adapter's model may use what its files import
            ((_, run),) = self._opened.enter_context(
                side_by_side.load(
                    config,
                    own.checkpoint,
                    [] if own.adapter is None else [own.adapter],
                    params=own.params,
                    encoder_decoders=True,
                )
            )
        self._run: LoadedRun = run
        self.backend = "seq2seq" if run.encodes else "causal"  # how the harness divides texts
        if self._run.vocabulary_or_none is None:
            raise LoadError(
                f"The run of {checkpoint} has no vocabulary, which the harness needs. Import the model with "
                "its tokenizer files, or give a file that sets VOCABULARY: gin_file=FILE."
            )
        print(f"loaded {self._run.size:,} parameters of {checkpoint}", file=sys.stderr, flush=True)
        if not run.encodes:
            self._run.unroll()
        self.checkpoint, self.adapter = own.checkpoint, own.adapter
        self.max_gen_toks = own.max_gen_toks
        self.max_length = arguments.max_length(self._run, own.max_length)
        self._prefix_token_id = own.prefix_token_id
        self._template: str | None = None
        size = arguments.max_rows(own.batch_size, own.max_batch_size)
        scorer = EncoderLikelihoods if run.encodes else LikelihoodScorer
        self._scorer = scorer(
            self._run.model,
            self._run.params,
            batch_tokens=own.batch_tokens or arguments.default_batch_tokens(),
            batch_size=size,
            row_shards=self._run.row_shards,
            sharding=self._run.row_sharding,
        )
        eos = self._run.vocabulary.eos_id
        self._generator = Generator(
            self._run,
            ends=sorted({*self._run.eos_ids, *(() if eos in (None, -1) else (eos,))}),
            batch_tokens=own.batch_tokens or arguments.default_generation_tokens(),
            batch_size=size,
            policy=policy,
            cache_dtype=own.cache_dtype,
            prefill_chunk=own.prefill_chunk,
            seed=own.seed,
        )

    def close(self) -> None:
        """Leaves the mesh, which is active in this process until then."""
        self._opened.close()

    # Texts and tokens.

    @property
    def eot_token_id(self) -> int | None:
        return self._run.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The context token of a text without a context."""
        vocabulary = self._run.vocabulary
        start = self._run.context([])
        for id in (self._prefix_token_id, *start, vocabulary.bos_id, vocabulary.eos_id):
            if id not in (None, -1):
                return id
        raise LoadError("The vocabulary has neither BOS nor EOS: give prefix_token_id=ID.")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text, after the start token and BOS unless add_special_tokens is False."""
        vocabulary = self._run.vocabulary
        ids = list(vocabulary.encode(string))
        if self._run.encodes:
            ends = add_special_tokens is not False and vocabulary.eos_id not in (
                None,
                -1,
                *ids[-1:],
            )
            return [*ids, vocabulary.eos_id] if ends else ids
        return ids if add_special_tokens is False else self._run.context(self._run.after_bos(ids))

    @property
    def tokenizer_name(self) -> str:
        """A name of tokenizer and chat template, the harness's key for cached requests."""
        template = self.chat_template(self._template or True) or ""
        digest = rows.vocabulary_digest(self._run.vocabulary)[:16]
        return f"espalier_{digest}_{harness.hash_string(template)[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Sets the chat template for later calls, and returns its source; None for none.

        Raises:
          LoadError: the run has no template, or no template of this name.
        """
        if chat_template is False or chat_template is None:
            return None
        template = self._run.chat_template
        name = chat.DEFAULT if chat_template is True else chat_template
        if name not in template.templates:
            raise LoadError(
                f"--apply_chat_template={name}: the tokenizer has {', '.join(sorted(template.templates))}."
            )
        self._template = name
        return template.templates[name]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a conversation; without add_generation_prompt its last message stays open."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except chat.ChatTemplateError as error:
            turns = [message for message in chat_history if message["role"] != "system"]
            if len(turns) == len(chat_history):
                raise
            _LOG.warning("%s. The system message is removed.", error)
            return self._render(turns, add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if not getattr(self._run.vocabulary, "special_in_text", True):
            raise LoadError(
                "The harness encodes conversations as texts, in which the vocabulary has no special tokens: remove "
                "--apply_chat_template."
            )
        # As in the harness, special tokens that a benchmark's texts spell are special tokens.
        template = dataclasses.replace(self._run.chat_template, added={})
        text = template.render(
            messages, add_generation_prompt=add_generation_prompt, name=self._template
        )
        if add_generation_prompt:
            return text
        last = messages[-1]["content"]
        place = text.rfind(last.strip())
        if place < 0:
            raise LoadError(f"The chat template changes the message {last[:60]!r}.")
        # Templates may strip white space around messages.
        shown = last if text.startswith(last, place) else last.strip()
        return text[: place + len(shown)]

    # Requests.

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See the base class, which encodes the pairs."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        for text, _, continuation in requests:
            if not continuation:
                raise LoadError(
                    f"The continuation {text[1]!r} of ...{text[0][-60:]!r} has no token."
                )
        likelihoods: list[Any] = [None] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for i, likelihood in self._likelihoods(pairs, quiet=disable_tqdm):
            likelihoods[i] = tuple(likelihood)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], likelihoods[i])
        return likelihoods

    @property
    def _encoder_room(self) -> int:
        """The maximum tokens of an encoder's inputs beside the virtual tokens of prompt tuning."""
        return max(1, self.max_length - len(self._run.inputs_prefix))

    def _likelihoods(
        self, pairs: Sequence[tuple[list[int], list[int]]], *, quiet: bool
    ) -> Iterator[tuple[int, Likelihood]]:
        """Yields (index, likelihood) of each (context, continuation); long contexts are cut at their beginning."""
        cut = 0
        scored_rows = []
        for context, continuation in pairs:
            room = self.max_length + 1 - len(continuation)  # the last token is not an input
            if self._run.encodes:
                room, context = self._encoder_room, context or [self.prefix_token_id]
            if room < 1:
                raise LoadError(
                    f"A continuation has {len(continuation)} tokens, more than max_length="
                    f"{self.max_length}. Give a larger max_length=N, if the model allows it."
                )
            cut += len(context) > room
            context = context[-room:]
            inputs = self._run.prefixed(context) if self._run.encodes else context
            scored_rows.append(row_of(self._run, inputs, continuation))
        if cut:
            _LOG.warning(
                "%d of %d contexts with their continuations are longer than the model's %d tokens: "
                "their beginnings are cut.",
                *(cut, len(pairs), self.max_length),
            )
        return self._scorer.stream(scored_rows, quiet=quiet)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns log-likelihoods of whole texts, in windows of the model's maximum length.

        Raises:
          LoadError: the model is an encoder-decoder, for which they are not defined.
        """
        if self._run.encodes:
            raise LoadError(
                "loglikelihood_rolling is the likelihood of a whole text, and an encoder-decoder predicts targets of inputs: "
                "choose tasks with output_type loglikelihood, multiple_choice or generate_until."
            )
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            text = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = harness.get_rolling_token_windows(
                token_list=self._run.after_bos(text),  # predicted too, as in the harness
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(harness.make_disjoint_window(window))
                owners.append(i)
        likelihoods = dict(self._likelihoods(pairs, quiet=disable_tqdm))
        totals = [0.0] * len(requests)
        for k, owner in enumerate(owners):
            totals[owner] += likelihoods[k].log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns answers to contexts, each up to a text in `until` or EOS."""
        defaults = self._run.meta.get("hf", {}).get("generation_config", {})
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            chosen = options(
                request.args[1], max_gen_toks=self.max_gen_toks, model_defaults=defaults
            )
            groups.setdefault(chosen, []).append(i)
        texts: list[Any] = [None] * len(requests)
        for chosen, members in groups.items():
            # An encoder's inputs and the new tokens are two sequences.
            encodes = self._run.encodes
            room = self._encoder_room if encodes else self.max_length - chosen.max_gen_toks
            if room < 1:
                raise LoadError(
                    f"max_gen_toks={chosen.max_gen_toks} leaves no room for a context in "
                    f"max_length={self.max_length}: change one of them (--gen_kwargs, --model_args)."
                )
            contexts = [self._cut(self.tok_encode(requests[i].args[0]), room) for i in members]
            contexts = [context or [self.prefix_token_id] for context in contexts]
            contexts = [*map(self._run.prefixed, contexts)] if encodes else contexts
            for i, text in zip(members, self._generator.stream(contexts, chosen), strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """Returns facts about the model that the harness stores with its results."""
        import jax

        leaves = jax.tree.leaves(self._run.params)
        return {
            "checkpoint": self.checkpoint,
            "adapter": self.adapter,
            "model_num_parameters": self._run.size,
            "model_dtype": str(leaves[0].dtype),
            "max_length": self.max_length,
        }
