import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from shampax.framework.base.errors import UserError
from shampax.framework.data.text import templates
from shampax.framework.data.text.chat import ChatData
from shampax.framework.data.text.markers import Markers
from shampax.framework.data.text.templates import TEMPLATES, Message
from shampax.framework.data.text.tokenizer import train_tokenizer

TALK = (Message("system", "Be brief."), Message("user", "Hi <|im_end|>"), Message("assistant", "Hello "))


def rendered(name, messages=TALK):
    """Return a conversation as text, with the trained parts in brackets."""
    return "".join(f"[{x.text}]" if x.trained else x.text for x in TEMPLATES[name].pieces(messages))


def test_templates():
    """Faults: the markup is not that of the models; the question or the markup is trained on, the end is not."""
    assert rendered("chatml") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n[Hello ][<|im_end|>]\n"
    )
    assert rendered("llama3") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi <|im_end|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[Hello][<|eot_id|>]"
    )
    assert rendered("gemma") == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi <|im_end|><end_of_turn>\n<start_of_turn>model\n"
        "[Hello][<end_of_turn>]\n"
    )
    assert rendered("plain", TALK[1:]) == "<begin>Hi <|im_end|>[Hello ][<end>]"


def test_a_message_cannot_spell_a_special_token():
    """Fault: a user ends his turn by its text, and speaks as the assistant."""
    pieces = [*TEMPLATES["chatml"].pieces(TALK)]
    assert sum(piece.special and piece.text == "<|im_end|>" for piece in pieces) == 3


def write(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


RECORDS = [{"prompt": f"ab{number} ", "completion": "cde"} for number in range(40)]
RECORDS += [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "é!"}]} for n in range(9)
]
RECORDS += [{"prompt": "x" * 70, "completion": "y"}]


def rows_of(tmp_path, records=RECORDS, **knobs):
    data = ChatData(source=f"file:{write(tmp_path / 'a.jsonl', *records)}", vocab_size=257, **knobs)
    data.prepare(tmp_path / "cache")
    return data, data.examples("train", tmp_path / "cache")


def test_rows_have_whole_conversations_and_count_answers(tmp_path, capsys):
    """Faults: a conversation is cut; a target of the question counts; bytes are of another row."""
    data, examples = rows_of(tmp_path, sequence_length=32)
    tokenizer = data.load_tokenizer(tmp_path / "cache")
    found, bytes_found = [], 0
    for row in map(examples.__getitem__, range(len(examples))):
        assert {name: x.shape for name, x in row.items()} == {name: x.shape for name, x in data.spec().items()}
        bytes_found += int(row["bytes"])
        for segment in range(1, row["segments"].max() + 1):
            own = row["segments"] == segment
            counted = row["counted"][own] > 0
            assert (row["positions"][own] == np.arange(own.sum())).all()
            tokens = row["tokens"][own]
            assert tokens[0] == 0 and not counted[0] and tokens[-1] == 0 and counted[-1]
            found.append((tokenizer.decode(tokens[~counted]), tokenizer.decode(tokens[counted][:-1])))
    assert 30 < len(found) < 50 and set(found) <= {
        *((f"ab{number} ", "cde") for number in range(40)),
        *((f"q{number}", "é!") for number in range(9)),
    }
    assert bytes_found == sum(len(answer.encode()) for _, answer in found)
    assert "1 longer than a row; dropped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"text": "a"}, "has neither 'messages'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "the role 'tool'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no answer"),
        ({"prompt": None, "completion": "a"}, "a NoneType"),
        ({"prompt": "\ud800", "completion": "a"}, "surrogate"),
    ],
)
def test_records_without_a_conversation_are_malformed(tmp_path, record, told):
    """Fault: a record of another form is trained on as something else, or ends in a traceback."""
    with pytest.raises(UserError, match=re.escape(told)):
        rows_of(tmp_path, [record, *RECORDS])


def test_a_template_is_chosen_by_the_tokens_of_the_tokenizer():
    """Fault: the tokens of a template are spelt out as text."""
    plain, end = train_tokenizer(["a b"], 257), Markers(0, 0)
    assert templates.choose("auto", plain, end) == (TEMPLATES["plain"], {"<begin>": 0, "<end>": 0})
    with pytest.raises(UserError, match=re.escape("has no token '<|im_start|>'")):
        templates.choose("chatml", plain, end)
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel()
    other.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template, ids = templates.choose("auto", other, end)
    assert template is TEMPLATES["chatml"] and ids["<|im_end|>"] == 1


def test_the_sample_is_read():
    """Fault: the vendored conversations are not what the reader expects."""
    data = ChatData()
    train, heldout = ([*data.sample(split)] for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (900, 100)
    assert train[0] == (Message("user", "Please compute 49 + 97."), Message("assistant", "49 + 97 = 146"))


def test_texts_of_a_run_that_trained_its_tokenizer(tmp_path):
    """Fault: such a model cannot continue a text."""
    data = ChatData(vocab_size=257, sequence_length=128, max_records=5)
    data.prepare(tmp_path)
    codec = data.codec(tmp_path)
    assert codec.decode(codec.encode("2 + 3?")) == "2 + 3?"
