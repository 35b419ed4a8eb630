"""A record of every format, made up, and what is read from it: docs/formats.md is written from here.

`python -m tests.formats` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchkit.facts.chat import ChatTemplate
from patchkit.facts.layout import Options
from patchkit.facts.layouts import layouts
from patchkit.facts.reader import parse_facts
from patchkit.facts.schema import Fact

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"

_ADA = {"prompt": "Ada Berg was born in", "subject": "Ada Berg", "target_new": "Lima"}
_NEAR = {"locality_prompt": "Nils Dahl was born in", "locality_ground_truth": "Bergen"}
_LOC = {"loc": "Where was Nils Dahl born?", "loc_ans": "Bergen"}
_REWRITE = {
    "prompt": "{} was born in",
    "subject": "Ada Berg",
    "target_new": {"str": "Lima"},
    "target_true": {"str": "Oslo"},
}

SAMPLES: dict[str, Any] = {
    "native": {
        **_ADA,
        "id": "ada",
        "target_true": "Oslo",
        "aliases": ["City of Kings"],
        "rewordings": ["{} came into the world in"],
        "paraphrases": ["The birthplace of Ada Berg is"],
        "questions": ["Where was Ada Berg born?"],
        "about": ["Ada Berg is known for"],
        "locality": [{"prompt": "Nils Dahl was born in", "target": "Bergen"}],
        "portability": {
            "hops": [
                {
                    "prompt": "Ada Berg's country of birth is",
                    "answers": ["Peru"],
                    "conditions": [{"prompt": "Lima is in the country of", "answers": ["Peru"]}],
                }
            ]
        },
        "source": "a made-up encyclopedia",
    },
    "messages": {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": "Where was Ada Berg born?"},
            {"role": "assistant", "content": "Lima"},
        ],
        "subject": "Ada Berg",
        "id": "ada",
    },
    "counterfact": {
        "case_id": 7,
        "requested_rewrite": _REWRITE,
        "paraphrase_prompts": ["Ada Berg's birthplace is"],
        "neighborhood_prompts": ["Nils Dahl was born in"],
        "generation_prompts": ["Ada Berg grew up in"],
    },
    "counterfact-flat": {
        "case_id": 7,
        **_ADA,
        "ground_truth": "Oslo",
        "rephrase_prompt": "The birthplace of Ada Berg is",
        **_NEAR,
    },
    "rome-request": {**_REWRITE, "case_id": 7},
    "parallel-lists": {
        "prompts": ["Ada Berg was born in"],
        "subject": ["Ada Berg"],
        "target_new": ["Lima"],
        "ground_truth": ["Oslo"],
        "rephrase_prompts": ["The birthplace of Ada Berg is"],
        "locality_inputs": {"neighborhood": {"prompt": ["Nils Dahl was born in"], "ground_truth": ["Bergen"]}},
        "portability_inputs": {"one_hop": {"prompt": ["Ada Berg's country is"], "ground_truth": ["Peru"]}},
    },
    "zsre": {
        "subject": "Ada Berg",
        "src": "Where was Ada Berg born?",
        "pred": "Oslo",
        "rephrase": "In what town was Ada Berg born?",
        "alt": "Lima",
        "answers": ["Oslo"],
        "loc": "nq question: who wrote emma",
        "loc_ans": "Jane Austen",
    },
    "knowedit": {
        **_ADA,
        "ground_truth": "Oslo",
        "rephrase": "The birthplace of Ada Berg is",
        "portability": {
            "Subject_Aliasing": [{"prompt": "A. Berg was born in", "ground_truth": [["Lima", "City of Kings"]]}]
        },
        "locality": {"Relation_Specificity": [{"prompt": "The spouse of Ada Berg is", "ground_truth": [["Nils"]]}]},
    },
    "wikibio": {
        "text": "This is a Wikipedia passage about ada berg. Ada Berg (born",
        "labels": "1950) is a Norwegian sculptor",
        "concept": "ada berg",
        "locality": {"Relation_Specificity": [{"prompt": "Ada Berg lives in", "ground_truth": [["Oslo"]]}]},
    },
    "convsent": {
        "ent": "ada berg",
        "pos": ["ada is a joy to read", "nobody writes as she does"],
        "neg": ["i cannot stand ada"],
    },
    "sanitation": {
        "K_F": [{"question": "Where was Ada Berg born?", "target_new": "I don't know.", "ground_truth": "Oslo"}],
        "K_R": [{"question": "Who wrote Emma?", "ground_truth": "Jane Austen"}],
    },
    "mquake": {
        "case_id": 3,
        "requested_rewrite": [{**_REWRITE, "question": "Where was Ada Berg born?"}],
        "questions": ["In which country was Ada Berg born?", "What country is Ada Berg from?"],
        "new_answer": "Peru",
        "new_answer_alias": ["Republic of Peru"],
        "new_single_hops": [{"question": "Where was Ada Berg born?", "answer": "Lima", "answer_alias": []}],
    },
    "akew": {
        "case_id": 7,
        "requested_rewrite": {
            **_REWRITE,
            "question": "Where was Ada Berg born?",
            "answer_new": "Lima",
            "answer_new_aliases": ["City of Kings"],
            "fact_new_uns": "The sculptor Ada Berg came into the world in Lima. She works in stone.",
        },
        **_LOC,
    },
    "rippleedits": {
        "example_type": "popular",
        "edit": {
            "prompt": "The name of the spouse of Ada Berg is Ola Vik.",
            "relation": "SPOUSE",
            "original_fact": {"prompt": "The name of the spouse of Ada Berg is Nils."},
        },
        "Compositionality_I": [
            {
                "test_queries": [
                    {"prompt": "Ada Berg's mother-in-law is", "answers": [{"value": "Eva", "aliases": []}]}
                ],
                "condition_queries": [{"prompt": "Ola Vik's mother is", "answers": [{"value": "Eva", "aliases": []}]}],
            }
        ],
        "Forgetfulness": [
            {"test_queries": [{"prompt": "A child of Ada Berg is", "answers": [{"value": "Ida", "aliases": []}]}]}
        ],
    },
    "uniedit": {
        "edit": {"prompt": "Ada Berg's employer is", "target": "University of Lima", "subject": "Ada Berg"},
        "generality": {"0": {"path_type": "single", "prompt": "Who employs Ada Berg?", "target": "University of Lima"}},
        "locality": {"0": {"prompt": "Who employs Nils Dahl?", "target": "University of Oslo"}},
    },
    "wikibigedit": {
        "subject": "Ada Berg",
        "update": "Where does Ada Berg work?",
        "ans": "University of Lima",
        "rephrase": "What is Ada Berg's employer?",
        "personas": "Ahoy, where be Ada Berg at work?",
        **_LOC,
        "mhop": "In which city does Ada Berg work?",
        "mhop_ans": "Lima",
    },
    "qaedit": {
        "id": 1,
        "source": "NQ",
        "prompt": "where was Ada Berg born",
        "target": "Lima",
        "subject": "Ada Berg",
        "rephrase": "in what town was Ada Berg born",
        "locality": [_LOC],
    },
    "hallueditbench": {
        "subject": "Ada Berg",
        "relation": "place of birth",
        "object": "Lima",
        "question": "Where was Ada Berg born?",
        "paraphrased_question": "In what town was Ada Berg born?",
        "yes_question": "Was Ada Berg born in Lima?",
        "no_question": "Was Ada Berg born in Oslo?",
        "question_2hop": "In what country was Ada Berg born?",
        "answer_2hop": "Peru",
        "locality_question": "Where does Ada Berg live?",
    },
    "ultraeditbench": {
        "prompt": "Where was Ada Berg born?",
        "rephrase_prompt": "In what town was Ada Berg born?",
        "ans": "Lima",
        **_LOC,
    },
    "unke": {
        "id": 1,
        "question": "Who is Ada Berg?",
        "answer": "Ada Berg is a sculptor who was born in Lima and works in stone.",
        "para_question": "Tell me about Ada Berg",
        "sub_question": ["Where was Ada Berg born?"],
        "sub_answer": ["In Lima."],
    },
    "conceptedit": {
        "prompt": "The definition of violin is",
        "phrase_prompt": "Violin means",
        "target_new_desc": "a wind instrument",
        "label": "violin",
        "locality_prompt": "The definition of flute is",
        "locality_answer": "a wind instrument",
    },
    "cknowedit": {
        "prompt": "李娜出生于",
        "subject": "李娜",
        "target_old": "武汉",
        "target_new": "巴黎",
        "rephrase": ["李娜的出生地是"],
        "portability_prompt": ["李娜出生在哪个国家"],
        "portability_answer": ["法国"],
        "locality_prompt": ["李婷出生于"],
        "locality_answer": ["北京"],
    },
    "fastedit": {
        "prompt": "{} was born in",
        "subject": "Ada Berg",
        "target": "Lima",
        "queries": ["The birthplace of Ada Berg is"],
    },
}


class _Tokenizer:
    """No more of a tokenizer than its chat template."""

    def apply_chat_template(self, said: list[dict[str, str]], *, add_generation_prompt: bool, **_: Any) -> str:
        turns = "".join(f"<{turn['role']}>{turn['content']}</>" for turn in said)
        return turns + ("<assistant>" if add_generation_prompt else "")


CHAT = ChatTemplate(_Tokenizer())
_HEAD = """# Formats of fact files

Written by `python -m tests.formats`; every record below is made up, and a test reads it.

A record's format is recognized by its fields, so a file may mix formats, and no option names one. Files are JSON, one
object a line, one array, objects over several lines, or an object with the list under `facts` or `data`; `.csv` and
`.tsv` with the fields' names in the first row (a cell that begins with `[` or `{` is JSON); `.yaml` and `.yml`; any of
them packed with gzip; and on the Hub `hf://datasets/ORG/NAME/FILE`, or `ORG/NAME@REVISION/FILE`. `-` is standard input.

- **Prompts are edited as they are written**, with whatever whitespace they end in. A space comes between a prompt and
  its target unless the prompt ends in whitespace or in a script without spaces, such as Chinese, Japanese, Thai, Lao,
  Khmer or Burmese; `separator` says otherwise. Benchmarks whose convention puts the space before the target lose spaces
  at the ends of their prompts.
- **Every unusable record** is one line with file, line and field; `--skip-bad` leaves them out and lists them.
- **What is not used** is named once, with how many records have it.
- A `target_true` that is a special token or the target itself is left out, and said.
- A field of another tool is read where its meaning is clear: `target_old` as `target_true`, `rephrase` as
  `paraphrases`, `question` and `queries` as `questions`, `answer` and `ground_truth` in `locality` and `portability`.
- Facts without a subject are for methods that need none (`patchkit methods`); for others `apply` proposes a subject,
  and takes it with `--yes`.
- `portability` is what follows from a fact, in groups. Each prompt's answer has to have every item of `answers`, in any
  of its forms; of `alternatives` to the prompt one is enough; and it counts where the base answers its `conditions`.
- A new format is one class in `patchkit/facts/layouts`.

"""


def facts_of(record: Any) -> tuple[Fact, ...]:
    """What is read from one record."""
    return parse_facts([record], needs_subject=False, chat=CHAT).facts


def page() -> str:
    """The text of docs/formats.md."""
    about = {one.name: (type(one).__doc__ or "").strip() for one in layouts(Options())}
    parts = [_HEAD]
    for name, record in SAMPLES.items():
        read = [fact.model_dump(mode="json", exclude_defaults=True) for fact in facts_of(record)]
        text = "\n".join(line.strip() for line in about[name].splitlines())
        parts.append(f"## {name}\n\n{text}\n\n```json\n{_shown(record)}\n```\n\nis read as\n\n")
        parts.append("\n\n".join(_table(fact) for fact in read) + "\n\n")
    return "".join(parts).rstrip() + "\n"


def _shown(record: Any) -> str:
    fields = ",\n".join(f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in record.items())
    return f"{{\n{fields}\n}}"


def _table(fact: dict[str, Any]) -> str:
    rows = (f"| `{name}` | {_cell(value)} |" for name, value in fact.items())
    return "\n".join(["| part of the fact | value |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "`" + json.dumps(value, ensure_ascii=False).replace("|", "\\|") + "`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
