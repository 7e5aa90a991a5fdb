"""Writes sft.json: rows as TRL's SFTTrainer tokenises and masks them, and its losses of a toy model.

Run from the root with the reference implementations, after `make peers`:

  .venv-peers/bin/python tests/data/goldens/make_sft.py

TRL learns the assistant's turns only by templates with `{% generation %}`, so each template of chat_templates/ is
used with its assistant's texts marked (MARKED). The tokenizer is a small byte-level one, and the model a Llama of
random weights (`weights`), which the test draws again. A row that TRL or the template refuses is recorded as an error.
"""

import json
import os
import pathlib
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
import jinja2
import tokenizers
import torch
import transformers
import trl
from sft_model import CONFIG, TOKENS, weights
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
SPECIAL = [
    *("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<start_of_turn>"),
    *("<end_of_turn>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
    *("<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "[INST]", "[/INST]"),
]
# Template -> (old, new) texts that mark what the assistant adds: its text and all that closes its turn.
MARKED = {
    "chatml": [
        (
            "{{ turn(message.role, message.content | default('')) -}}",
            "{% if message.role == 'assistant' %}\n<|im_start|>assistant\n{% generation %}"
            "{{ message.content | default('') + '<|im_end|>\n' }}{% endgeneration %}\n"
            "{% else %}\n{{ turn(message.role, message.content | default('')) -}}\n{% endif %}",
        )
    ],
    "cohere": [
        (
            "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}",
            "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% generation %}"
            "{{ content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endgeneration %}",
        )
    ],
    "gemma": [
        (
            "' + message['content'] | trim + '<end_of_turn>\n' }}",
            "' }}{% if role == 'model' %}{% generation %}"
            "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endgeneration %}"
            "{% else %}{{ message['content'] | trim + '<end_of_turn>\n' }}{% endif %}",
        )
    ],
    "llama2": [
        (
            "{{ ' ' + text.strip() + ' ' + eos_token }}",
            "{% generation %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endgeneration %}",
        )
    ],
    "llama3": [
        (
            "{{- message['content'] | trim }}",
            "{%- if message.role == 'assistant' %}{% generation %}"
            "{{- message['content'] | trim }}{{- '<|eot_id|>' }}{%- endgeneration %}"
            "{%- else %}{{- message['content'] | trim }}{%- endif %}",
        ),
        (
            "{%- for name, value in call.arguments | dictsort %}",
            "{%- generation %}{%- for name, value in call.arguments | dictsort %}",
        ),
        (
            "{%- set ns.seen = true %}",
            "{{- '<|eot_id|>' }}{%- endgeneration %}{%- set ns.seen = true %}",
        ),
        (
            "    {{- '<|eot_id|>' }}\n{%- endfor %}",
            "    {%- if message.role != 'assistant' %}{{- '<|eot_id|>' }}{%- endif %}\n{%- endfor %}",
        ),
    ],
    "mistral": [
        (
            '{{- " " + message["content"] | trim + eos_token }}',
            '{%- generation %}{{- " " + message["content"] | trim + eos_token }}{%- endgeneration %}',
        ),
        (
            '{{- "[TOOL_CALLS] " + message.tool_calls | map(attribute="function") | list | '
            'tojson(sort_keys=true, separators=(",", ":"), ensure_ascii=true) + eos_token }}',
            '{%- generation %}{{- "[TOOL_CALLS] " + message.tool_calls | map(attribute="function") | list | '
            'tojson(sort_keys=true, separators=(",", ":"), ensure_ascii=true) + eos_token }}{%- endgeneration %}',
        ),
    ],
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "  Be brief; <b>'quote'</b> & \"all\".\n"}
CALL = {"function": {"name": "add", "arguments": {"b": 2, "a": 1.5}}, "type": "function"}
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
CONVERSATIONS = {
    "one answer": [user("1+1?"), assistant("2")],
    "two answers": [user("a"), assistant(" b "), user("c\n\n"), assistant("दो, zwei 好")],
    "ends with the user": [user("a"), assistant("the answer"), user("c")],
    "system": [
        SYSTEM,
        user("नमस्ते {{ 7 * 7 }}"),
        assistant("好"),
        user("<s> x </s>"),
        assistant("y"),
    ],
    "empty answer": [user("a"), assistant(""), user("b"), assistant("c")],
    "line breaks": [user("a"), assistant("\n\nb"), user("c"), assistant("d\n")],
    "call": [
        user("1.5 + 2?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "name": "add", "content": '{"sum": 3.5, "note": "é"}'},
        assistant("It is 3.5."),
    ],
    "twice the user": [user("a"), user("b"), assistant("c")],
}
TEXTS = [
    {"prompt": "The sky is", "completion": " blue today."},
    {"prompt": "2 + 2 =", "completion": " 4, die Summe über alles"},
    {"text": "A text of its own: नमस्ते.\n\nAnd a second part."},
]


def tokenizer():
    """A byte-level tokenizer with some merges, which begins texts with BOS."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(
        [json.dumps([CONVERSATIONS, TOOLS, TEXTS]), "assistant\n\n\n" * 9], trainer
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def marked(name):
    source = (HERE / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    for old, new in MARKED[name]:
        assert source.count(old) == 1, (name, old)
        source = source.replace(old, new)
    return source


def trainer_of(rows, template, folder):
    """TRL's trainer on rows of one form."""
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **TOKENS)
    wrapped.chat_template = template
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).float()
    state = {name: torch.tensor(value) for name, value in weights(CONFIG).items()}
    assert set(model.load_state_dict(state, strict=False).missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    arguments = trl.SFTConfig(
        output_dir=folder,
        max_length=None,
        per_device_train_batch_size=len(rows),
        assistant_only_loss="messages" in rows[0],
        eos_token="</s>",
        bf16=False,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        dataset_num_proc=None,
    )
    return trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=wrapped,
    )


def tokenised(row, template):
    """A row as TRL tokenises it, with the mask of what is learnt; or the error."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            (made,) = trainer_of([row], template, folder).train_dataset
        except (jinja2.TemplateError, RuntimeError, TypeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"ids": made["input_ids"], "mask": [int(label != -100) for label in made["labels"]]}


def loss(rows, template):
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(rows, template, folder)
        batch = next(iter(trainer.get_train_dataloader()))
        return float(trainer.compute_loss(trainer.model.eval(), batch))


def main() -> None:
    datasets.disable_progress_bars()
    cases, losses = [], {}
    for name in sorted(MARKED):
        template, learnt = marked(name), []
        for conversation, messages in CONVERSATIONS.items():
            for tools in (False, True):
                row = {"messages": messages, **({"tools": TOOLS} if tools else {})}
                case = {"template": name, "conversation": conversation, "tools": tools}
                cases.append(case | {"form": "messages"} | tokenised(row, template))
            if "error" not in cases[-2] and conversation != "call":
                learnt.append({"messages": messages})
            if messages[-1]["role"] == "assistant":
                row = {"prompt": messages[:-1], "completion": messages[-1:]}
                case = {"template": name, "conversation": conversation, "tools": False}
                cases.append(case | {"form": "prompt"} | tokenised(row, template))
        losses[name] = {"rows": learnt, "loss": loss(learnt, template)}
    golden = {
        "versions": {m.__name__: m.__version__ for m in (trl, transformers, torch)},
        "tokenizer": json.loads(tokenizer().to_str()),
        "marked": {name: marked(name) for name in sorted(MARKED)},
        "conversations": CONVERSATIONS,
        "tools": TOOLS,
        "cases": cases,
        "texts": [{"row": row, **tokenised(row, None)} for row in TEXTS],
        "losses": losses | {"texts": {"rows": TEXTS[:2], "loss": loss(TEXTS[:2], None)}},
    }
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    (HERE / "sft.json").write_text(text + "\n", "utf-8")
    print(
        len(cases), "cases;", sum("error" in case for case in cases), "refused;", len(text), "bytes"
    )


if __name__ == "__main__":
    main()
