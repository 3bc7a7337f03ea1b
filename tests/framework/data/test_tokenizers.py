"""Tokenizers of every kind, made here as the models' own are."""

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from shampax.framework.base.errors import UserError
from shampax.framework.data.text import TextData, markers
from shampax.framework.data.text.tokenizer import load_tokenizer, token_bytes
from shampax.framework.dataset import SPLITS

WORDS = "naïve 漢字  text\r\n "
TEXTS = [f"Document {i} of many: {WORDS * (i % 5 + 1)}👩‍🚀 ﬁ e\u0301 <s> </s> [SEP]" for i in range(40)]
_LLAMA3 = [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"]
LLAMA3 = "|".join([*_LLAMA3, r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])


def trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level(specials, pre_tokenizer=None, normalizer=None):
    pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    parts = {"pre_tokenizer": pre_tokenizer, "decoder": decoders.ByteLevel()}
    tokenizer = trained(models.BPE(), trainer, **parts, **({"normalizer": normalizer} if normalizer else {}))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return tokenizer


def llama3():
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = byte_level(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], pre_tokenizers.Sequence([split, level])
    )
    begin = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return tokenizer


def qwen():
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], normalizer=normalizers.NFC())


def neox():
    tokenizer = byte_level(["<|endoftext|>", "<|padding|>"], normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken(" " * n, normalized=False) for n in range(2, 9)])
    return tokenizer


def gemma():
    """Return SentencePiece's BPE with byte fallback, as a tokenizers JSON file has it."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        trainer,
        normalizer=normalizers.Replace(" ", "▁"),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["content"].startswith("<0x")]
    for token in [token for token in parts["model"]["vocab"] if "字" in token]:  # must fall back to bytes
        parts["model"]["merges"] = [pair for pair in parts["model"]["merges"] if "字" not in "".join(pair)]
        parts["model"]["vocab"][f"unused{token}"] = parts["model"]["vocab"].pop(token)
    return Tokenizer.from_str(json.dumps(parts))


def unigram():
    """Return the tokenizer of T5: it normalizes text, and has no token that begins one."""
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    return trained(
        models.Unigram(),
        trainer,
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )


def wordpiece():
    trainer = trainers.WordPieceTrainer(
        vocab_size=200,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        limit_alphabet=30,
        show_progress=False,
    )
    return trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )


def sentencepiece_model(kind):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_writer=content,
        model_type=kind,
        vocab_size=320,
        byte_fallback=True,
        character_coverage=0.99,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return content.getvalue()


# Kind -> (its file, the tokens that begin and end its documents, whether text comes back unchanged).
KINDS = {
    "llama3": (llama3, "<|begin_of_text|>", "<|end_of_text|>", True),
    "qwen": (qwen, "<|endoftext|>", "<|endoftext|>", False),
    "neox": (neox, "<|endoftext|>", "<|endoftext|>", False),
    "gemma": (gemma, "<bos>", "<eos>", True),
    "unigram": (unigram, "</s>", "</s>", False),
    "wordpiece": (wordpiece, "[CLS]", "[SEP]", False),
    "sentencepiece bpe": (lambda: sentencepiece_model("bpe"), "<s>", "</s>", False),
    "sentencepiece unigram": (lambda: sentencepiece_model("unigram"), "<s>", "</s>", False),
}


@pytest.fixture(scope="module", params=KINDS)
def given(request, tmp_path_factory):
    """Return a kind, its file, and a data set with it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text("\f".join(TEXTS), newline="")
    made = KINDS[request.param][0]()
    path = folder / ("tokenizer.model" if isinstance(made, bytes) else "tokenizer.json")
    path.write_bytes(made if isinstance(made, bytes) else made.to_str().encode())
    data = TextData(
        source=f"file:{folder}/a.txt", tokenizer=str(folder), vocab_size=600, sequence_length=32, shard_size=9
    )
    return request.param, path, data


def targets_of(rows, begin):
    """Return the targets of rows; a segment inside a row begins a document."""
    targets = []
    for i in range(len(rows)):
        tokens, segments = rows[i]["tokens"], rows[i]["segments"]
        starts = np.flatnonzero(np.diff(segments, prepend=segments[0] - (i == 0)) > 0)
        assert (tokens[starts] == begin).all()
        targets.extend(tokens[1:][(segments[1:] == segments[:-1]) & (segments[1:] > 0)].tolist())
    return targets


def test_any_tokenizer_makes_rows(given, tmp_path):
    """Faults: a tokenizer of another kind is refused; its documents begin or end with another token; text that spells
    one is taken for it; bytes of the text are lost where the tokenizer changes it."""
    kind, path, data = given
    _, *names, lossless = KINDS[kind]
    tokenizer = load_tokenizer(path, 600)
    begin, end = map(tokenizer.token_to_id, names)
    data.prepare(tmp_path)
    for split in SPLITS:
        texts, rows = list(data.open_source().records(split)), data.examples(split, tmp_path)
        encoded = [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
        assert targets_of(rows, begin) == [token for ids in encoded for token in (*ids, end)]
        assert sum(int(rows[i]["bytes"]) for i in range(len(rows))) == sum(len(text.encode()) for text in texts)
        assert not lossless or [tokenizer.decode(ids) for ids in encoded] == texts
        # The library finds the name of a special token in text if it is a piece of a Unigram model.
        assert kind == "unigram" or not {begin, end} & {token for ids in encoded for token in ids}
    settings = data.settings()
    assert (settings["begin_token"], settings["end_token"]) == (begin, end)


def test_bytes_of_tokens(given):
    """Faults: a token counts in characters; a byte, a blank or a part of a word counts as its name."""
    kind, path, _ = given
    tokenizer = load_tokenizer(path, 600)
    sizes = token_bytes(tokenizer, 600)
    for text in TEXTS:
        share = sizes[tokenizer.encode(text, add_special_tokens=False).ids].sum() / len(text.encode())
        assert {"gemma": 1, "llama3": 1}.get(kind, 0.6) <= share <= {"gemma": 1, "llama3": 1}.get(kind, 1.1)


def test_markers_are_named(tmp_path):
    """Faults: a knob has no effect, or takes a number for a name; the model's own config is not read."""
    tokenizer = llama3()
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    ids = tokenizer.get_vocab()
    begin, end, turn = (ids[f"<|{name}|>"] for name in ("begin_of_text", "end_of_text", "eot_id"))
    assert markers.find(path, tokenizer, "", "") == (begin, end)
    assert markers.find(path, tokenizer, turn, "<|eot_id|>") == (turn, turn)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": None, "eos_token": {"content": "<|eot_id|>"}}))
    assert markers.find(path, tokenizer, "", "") == (turn, turn)
    config.write_text(json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}))
    assert markers.find(path, tokenizer, "", end) == (begin, end)
    config.write_text("[")
    assert markers.find(path, tokenizer, "", "") == (begin, end)
    for token in ("<|eot|>", 10**6, -1):
        with pytest.raises(UserError, match=r"data\.end_token=.*: the tokenizer has no such token"):
            markers.find(path, tokenizer, "", token)
    with pytest.raises(UserError, match=r"which token of .* ends a document.*'<\|im_end\|>'"):
        markers.find(path, byte_level(["<|im_end|>"]), "", "")


def test_markers_make_other_rows(given, tmp_path):
    """Fault: rows of another end of documents are used."""
    _, _, data = given
    other = dataclasses.replace(data, end_token=7)
    data.prepare(tmp_path)
    other.prepare(tmp_path)
    assert len(list(tmp_path.glob("rows-*"))) == 2
    rows = other.examples("train", tmp_path)
    assert any(7 in rows[i]["tokens"] for i in range(len(rows)))


def test_a_model_without_the_package_is_one_line(tmp_path, monkeypatch):
    """Fault: a traceback."""
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / "a.model").write_bytes(b"model")
    with pytest.raises(UserError, match="needs sentencepiece"):
        load_tokenizer(tmp_path / "a.model", 600)
    monkeypatch.undo()
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "a.model", 601)
