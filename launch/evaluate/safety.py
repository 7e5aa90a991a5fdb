"""Refusals by language: harmful prompts that a model answers, and harmless prompts that it refuses.

Example, on prompts {"prompt": "...", "language": "cs", "label": "harmful"} (or "harmless"), which a run answers:

  espalier evaluate safety --inputs harmful.jsonl harmless.jsonl --checkpoint=/tmp/espalier_tiny --out=/tmp/safety \\
    --judge=openai:https://host/v1,model=NAME,key_env=API_KEY

Without --checkpoint, --inputs are answers to such prompts, which espalier generate wrote. The judge is one of those of `espalier
evaluate win_rate --help`. It reads each prompt and its answer, but not the label, and says whether the answer refuses. Both rates
of errors are shown by language, with 95 % Wilson intervals over prompts. An empty answer counts as a refusal. Missing or
unreadable verdicts are requested again, and finally counted as invalid, outside both rates.

--checkpoint answers greedily, in turns if its model has a chat template. --gin flags configure the model of the judge, or, if the
judge has none, that of --checkpoint. --out gets verdicts.jsonl, summary.json, the answers, and judgements.jsonl with the judge's
replies, from which a restarted command continues.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from espalier.common import files
from espalier.common.ranges import Size
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.evaluate.judges import answers, asking, checkpoint, refusals, shares, spec
from espalier.launch.evaluate.judges.answers import Answer
from espalier.launch.evaluate.judges.asking import Judge, JudgeError
from espalier.launch.evaluate.judges.pairwise import shown
from espalier.launch.inference import row_files
from espalier.launch.load import load_run
from espalier.launch.plots import intervals

JUDGEMENTS, SUMMARY, VERDICTS = "judgements.jsonl", "summary.json", "verdicts.jsonl"
EXAMPLE = '{"prompt": "...", "language": "cs", "label": "harmful"}'
Label = Literal["harmful", "harmless"]
# Rate -> the label of its prompts, and the verdict that is an error.
RATES: Mapping[str, tuple[Label, str]] = {
    "violations": ("harmful", refusals.ANSWERED),
    "over_refusals": ("harmless", refusals.REFUSED),
}
_COLUMNS = ("harmful", "violations", "harmless", "over-refusals", "empty", "invalid")
_SHOWN = 5  # places in a message
_ROWS = 8  # of a batch of answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyFlags:
    """Prompts with languages and labels, what answers them, and how the answers are judged.

    Attributes:
      inputs: prompts, or answers of espalier generate to them, in one file or several.
      checkpoint: a run, step or Hugging Face directory that answers the prompts; without it the rows have answers.
      judge: which judge decides whether an answer refuses.
      out: write the results to this folder.
      json: also write the rates to this JSON file.
      attempts: maximum attempts to get a readable verdict (default 3).
      max_new_tokens: maximum tokens of an answer of --checkpoint.
    """

    inputs: Annotated[Sequence[setting_flags.File], setting_flags.MANY]
    checkpoint: setting_flags.Folder | None = None
    judge: Annotated[str, "KIND:WHERE"]
    out: setting_flags.Folder
    json: setting_flags.File | None = None
    attempts: Size | None = None
    max_new_tokens: Size = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled(Answer):
    """An answer to a prompt that is harmful or harmless."""

    label: Label


def _add_flags(parser: argparse.ArgumentParser) -> None:
    setting_flags.add(parser, SafetyFlags)


def _default_files(flags: argparse.Namespace) -> Sequence[str]:
    """Returns the gin files read before the user's: those of the judge's checkpoint, else of the one that answers."""
    own = getattr(flags, "checkpoint", None)
    return load_run.files_of(spec.parse(flags.judge).checkpoint or own, flags.gin_file)


def _run(start: cli.Start) -> None:
    """Answers and judges with the settings of the flags.

    Raises:
      JudgeError: flags, rows or a judge that cannot be used.
      RowFileError, DataError: files that cannot be read or written.
    """
    flags = setting_flags.filled(start.flags, SafetyFlags)
    chosen = spec.parse(flags.judge)
    row_files.check_folder(flags.out)
    if flags.checkpoint is None and hasattr(start.flags, "max_new_tokens"):
        raise JudgeError("--max_new_tokens is of answers of --checkpoint: remove it.")
    rows = []
    for path in flags.inputs:
        row_files.check_output(flags.json, "json", others={"inputs": path})
        rows += row_files.read(path, example=EXAMPLE)
    read(rows, answered=flags.checkpoint is None)  # reports errors before a model is loaded
    own = chosen.checkpoint or flags.checkpoint
    config = own and dataclasses.replace(start(), special_tokens="nowhere")
    judge = spec.build(
        chosen,
        attempts=flags.attempts,
        wording=refusals.Refusals(),
        config=config,
        config_text=start.config.text,
    )
    folder = pathlib.Path(flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    if flags.checkpoint is not None:
        text = start.config.text
        if chosen.checkpoint is not None:
            configuration: Any = load_run.configuration_of(flags.checkpoint)
            config, text = configuration.entry(), configuration.text
        rows = _answered(rows, flags, config, text, folder)
    summary = rates(read(rows), judge, folder)
    if flags.json:
        row_files.write_json(flags.json, summary)


def read(rows: Sequence[tuple[str, Mapping[str, Any]]], *, answered: bool = True) -> list[Labelled]:
    """Returns the answers in (place, row) of prompts; without `answered` they are empty.

    Raises:
      JudgeError: no row, one without prompt, language or label, with an answer where there is to be none or without one
        where there is to be one, or two rows of one prompt.
    """
    if not rows:
        raise JudgeError(f"--inputs have no row: give prompts such as {EXAMPLE}.")
    by_prompt: dict[str, Labelled] = {}
    for place, row in rows:
        if ("text" in row) != answered and "prompt" in row:
            raise JudgeError(
                f'{place} has no answer in "text": give --checkpoint=DIR, which answers the prompts.'
                if answered
                else f'{place} has an answer in "text" already: leave out --checkpoint, or remove the answer.'
            )
        label = row.get("label")
        if label not in ("harmful", "harmless"):
            raise JudgeError(
                f'{place}: the label {label!r} is neither "harmful" nor "harmless": give rows such as {EXAMPLE}.'
            )
        answer = answers.answer(row if answered else {**row, "text": ""}, place, True)
        if other := by_prompt.get(shown(answer.prompt)):
            raise JudgeError(
                f"{place} has the prompt of {other.place}: remove one of them (with --num_samples=1 there is one answer)."
            )
        by_prompt[shown(answer.prompt)] = Labelled(**vars(answer), label=label)
    return list(by_prompt.values())


def _answered(
    rows: Sequence[tuple[str, Mapping[str, Any]]],
    flags: argparse.Namespace,
    config: Any,
    config_text: str,
    folder: pathlib.Path,
) -> list[tuple[str, dict[str, Any]]]:
    """Returns the rows with the checkpoint's answers, which are stored under a digest of all that they depend on."""
    from espalier.launch.inference import generate
    from espalier.trainers.decoding.settings import Sampling, Settings

    step = checkpoint.resolved(flags.checkpoint, batch_size=_ROWS)
    weights = checkpoint.weights_identity(step, settings=config_text, params="auto")
    depends = [weights, flags.max_new_tokens, [row for _, row in rows]]
    digest = hashlib.sha256(files.json_bytes(depends, indent=None, end="")).hexdigest()[:16]
    path = str(folder / f"answers_{digest}.jsonl")
    if not pathlib.Path(path).exists():
        prompts = [(place, generate.with_prompt_key(row)) for place, row in rows]
        if config.converses:
            prompts = [(place, generate.as_message(row)) for place, row in prompts]
        continued = generate.generate(
            dataclasses.replace(config, special_tokens="nowhere"),
            prompts,
            checkpoint=step,
            settings=Settings(
                max_new_tokens=flags.max_new_tokens, sampling=Sampling(temperature=0.0)
            ),
            batch_size=_ROWS,
        )
        row_files.write(path, continued)
    return row_files.read(path, example=EXAMPLE)


def rates(labelled: Sequence[Labelled], judge: Judge, folder: pathlib.Path) -> dict[str, Any]:
    """Judges answers; prints the rates and writes all files of a folder.

    Returns:
      The content of summary.json: 'judge'; 'languages': code -> `error_rates`; 'all': those of all rows; 'mean': each rate
      averaged over the languages with its prompts, None if it is not measured in one of them; and counts of the questions.

    Raises:
      JudgeError: a judge that cannot be reached.
    """
    with asking.Journal.opened(folder / JUDGEMENTS) as journal:
        outcomes, tally = refusals.judge(judge, labelled, journal)
    verdicts = [verdict for verdict, _ in outcomes]
    row_files.write(
        str(folder / VERDICTS),
        (
            {
                **{key: value for key, value in vars(one).items() if value is not None},
                "verdict": verdict,
                "judge": judge.name,
                "replies": [reply.text or reply.value for reply in replies],
            }
            for one, (verdict, replies) in zip(labelled, outcomes, strict=True)
        ),
    )
    every = list(zip(labelled, verdicts, strict=True))
    by_language = {
        code: error_rates([pair for pair in every if pair[0].language == code])
        for code in sorted({one.language for one in labelled})
    }
    summary: dict[str, Any] = {
        "judge": {"name": judge.name, **judge.identity},
        "languages": by_language,
        "all": error_rates(every),
        "mean": {name: _mean(name, list(by_language.values())) for name in RATES},
        "questions": tally.summary(),
    }
    files.write_json(folder / SUMMARY, summary, synced=False)  # counted again from the answers
    _print(summary)
    if invalid := [one.place for one, verdict in every if verdict is None]:
        more = ", ..." if len(invalid) > _SHOWN else ""
        print(
            f"{len(invalid):,} answers without a readable verdict are in no rate: {', '.join(invalid[:_SHOWN])}{more}",
            file=sys.stderr,
        )
    print(f"{tally}; {folder / SUMMARY}", file=sys.stderr)
    return summary


def error_rates(judged: Sequence[tuple[Labelled, str | None]]) -> dict[str, Any]:
    """Returns both rates of answers and their verdicts, None for one that is not measured, and counts.

    A rate is {'value', 'low', 'high'}, with Wilson's interval, over the rows of its label with a verdict.
    """
    result: dict[str, Any] = {}
    for name, (label, error) in RATES.items():
        own = [verdict for one, verdict in judged if one.label == label]
        wrong = [verdict == error for verdict in own if verdict is not None]
        result |= {label: len(own), name: intervals.bounded(wrong) if wrong else None}
    result["empty"] = sum(not one.text.strip() for one, _ in judged)
    result["invalid"] = sum(verdict is None for _, verdict in judged)
    return result


def _mean(name: str, languages: Sequence[Mapping[str, Any]]) -> float | None:
    shares = [one[name] for one in languages if one[RATES[name][0]]]
    if not shares or None in shares:
        return None
    return sum(share["value"] for share in shares) / len(shares)


def _print(summary: Mapping[str, Any]) -> None:
    from rich.console import Console

    title = "errors in %, with 95 % intervals over prompts"
    table = shares.table_of(title, ("language",), _COLUMNS)
    for code, one in [*summary["languages"].items(), ("all", summary["all"])]:
        cells = []
        for name, (label, _) in RATES.items():
            cells += [f"{one[label]:,}", shares.cell(one[name]) if one[name] else "not measured"]
        table.add_row(code, *cells, f"{one['empty']:,}", f"{one['invalid']:,}")
    means = ["not measured" if x is None else f"{100 * x:.1f}" for x in summary["mean"].values()]
    table.add_row("mean", "", means[0], "", means[1], "", "")
    Console(width=160, markup=False).print(table)


main = load_run.command(
    *(__doc__, "evaluate safety", _run, _add_flags), files=_default_files, without_model=True
)

if __name__ == "__main__":
    raise SystemExit(main())
