"""Writes chat_templates.json: conversations as transformers renders them.

Run from the root with the reference implementations, after `make peers`:

  .venv-peers/bin/python tests/data/goldens/make_chat_templates.py

The templates in chat_templates/ are written for this test in the manner of those that are in use: each
has the jinja features by which its model's template is known. A conversation that a template refuses is
kept as the error's text.
"""

import itertools
import json
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import jinja2
import tokenizers
import transformers

HERE = pathlib.Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "  Be brief; <b>'quote'</b> & \"all\".\n"}
CALL = {"function": {"name": "add", "arguments": {"b": 2, "a": 1.5, "ü": None}}, "type": "function"}
CONVERSATIONS = {
    "one": [user(" Hello,\nworld! ")],
    "two": [user("a"), assistant(" b "), user("c\n\n")],
    "system": [SYSTEM, user("नमस्ते {{ 7 * 7 }}"), assistant("好"), user("<s> x </s>")],
    "ends with an answer": [SYSTEM, user("1+1?"), assistant("2")],
    "twice the user": [user("a"), user("b")],
    "the assistant first": [assistant("a"), user("b")],
    "system later": [user("a"), SYSTEM],
    "no values": [{**user("a"), "name": None}, assistant(None, tool_calls=[CALL]), user("b")],
    "call": [
        user("1.5 + 2?"),
        assistant(None, tool_calls=[CALL], reasoning="easy"),
        {"role": "tool", "name": "add", "content": '{"sum": 3.5, "note": "é"}'},
    ],
    "parts": [user([{"type": "text", "text": "part 1"}, {"type": "image"}]), assistant("ok")],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two> numbers & says 'é'",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
DOCUMENTS = [{"title": "T", "text": "x\ny"}, {"title": "Ü", "text": "z"}]


def main() -> None:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **TOKENS)
    sources = {
        path.stem: path.read_text("utf-8") for path in (HERE / "chat_templates").glob("*.jinja")
    }
    cases = []
    for name, conversation, prompt, extra in itertools.product(
        sorted(sources), CONVERSATIONS, (False, True), (False, True)
    ):
        case = {"template": name, "conversation": conversation, "prompt": prompt, "extra": extra}
        options = {"tools": TOOLS, "documents": DOCUMENTS} if extra else {}
        try:
            case["text"] = tokenizer.apply_chat_template(
                CONVERSATIONS[conversation],
                chat_template=sources[name],
                add_generation_prompt=prompt,
                tokenize=False,
                **options,
            )
        except (jinja2.TemplateError, TypeError) as error:
            case["error"] = str(error)
        cases.append(case)
    golden = {
        "transformers": transformers.__version__,
        "tokens": TOKENS,
        "conversations": CONVERSATIONS,
        "tools": TOOLS,
        "documents": DOCUMENTS,
        "cases": cases,
    }
    text = json.dumps(golden, ensure_ascii=False, indent=0)
    (HERE / "chat_templates.json").write_text(text + "\n", "utf-8")
    refused = sum("error" in case for case in cases)
    print(f"{len(cases)} cases, {refused} of them refused")


if __name__ == "__main__":
    main()
