"""Prompts to a second model: to write one answer out of several (fusion), and to translate an English answer."""

import dataclasses
from collections.abc import Mapping

from espalier.data.aya_expanse.prompts import UNKNOWN, Prompt, same_language
from espalier.data.languages import table
from espalier.data.text.documents import DataError

ENGLISH = "english"  # the column with a prompt in English
_FUSION = """Below are a request in {language} and the answers of several writers. Write the best answer to the request, in {language}. Use what is right in their answers, correct what is wrong, and write nothing but the answer.

Request:
{request}

{answers}

Best answer:
"""
_TRANSLATION = """Translate this text from English into {language}. Write nothing but the translation.

{text}
"""


def fusion(prompt: Prompt, texts: Mapping[str, str]) -> Prompt:
    """Returns the prompt that asks for one answer made from the answers of several teachers.

    Args:
      prompt: the request.
      texts: its answers by teacher; their names are not shown.
    """
    listed = "\n\n".join(f"Answer {i}:\n{text}" for i, text in enumerate(texts.values(), 1))
    its_own = prompt.language == UNKNOWN
    language = "its own language" if its_own else table.name_of(prompt.language)
    asked = _FUSION.format(language=language, request=_request(prompt), answers=listed)
    return dataclasses.replace(prompt, prompt=asked)


def in_english(prompt: Prompt) -> Prompt:
    """Returns the prompt in English, which is in its row's column 'english'.

    Raises:
      DataError: there is none, or the prompt's language is unknown.
    """
    if prompt.language == UNKNOWN:
        raise DataError(
            f"{prompt.where}: no 'language', into which --routing=translated translates: add it, or give --language_of"
        )
    if same_language(prompt.language, "en"):
        return prompt
    text = prompt.columns.get(ENGLISH)
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{prompt.where}: no {ENGLISH!r}, the prompt in English, whose answer --routing=translated translates: add it"
        )
    return dataclasses.replace(prompt, prompt=text, language="en")


def translation(prompt: Prompt, text: str) -> Prompt:
    """Returns the prompt that asks for an English text in the language of a request."""
    asked = _TRANSLATION.format(language=table.name_of(prompt.language), text=text)
    return dataclasses.replace(prompt, prompt=asked)


def _request(prompt: Prompt) -> str:
    if isinstance(prompt.prompt, str):
        return prompt.prompt
    if len(prompt.messages) == 1:
        return str(prompt.messages[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt.messages)
