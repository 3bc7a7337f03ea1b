import contextlib
import functools
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampax.framework.base.errors import UserError
from shampax.framework.data.text import TextData
from shampax.framework.data.text.tokenizer import (
    END_OF_DOCUMENT,
    encode,
    load_tokenizer,
    spread,
    token_bytes,
    train_on,
    train_tokenizer,
)
from shampax.framework.data.text.wordpiece import train_wordpiece

TRAIN = """
import hashlib, itertools
from shampax.framework.data.text import TextData
from shampax.framework.data.text.tokenizer import train_tokenizer
tokenizer = train_tokenizer(itertools.islice(TextData().open_source().records("train"), 24), 600)
print(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(itertools.islice(TextData().open_source().records("train"), 24), 600)


def test_training_is_deterministic(tokenizer):
    """Fault: ids depend on hash seeds or thread counts, so that processes or reruns disagree."""
    hashes = {hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}
    for threads in ("1", "2"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hashes.add(done.stdout.strip())
    assert len(hashes) == 1


# UTF-8 cannot encode single surrogates.
@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=4))
def test_any_text_round_trips_and_its_bytes_are_counted(tokenizer, documents):
    """Faults: a normaliser, a prefix space or an unknown token changes text; characters or tokens are counted instead
    of bytes."""
    sizes = token_bytes(tokenizer, 600)
    encoded = list(encode(tokenizer, documents, 0, 0))
    assert [text for text, _ in encoded] == documents
    for text, ids in encoded:
        assert ids[0] == ids[-1] == 0
        assert 0 not in ids[1:-1]
        assert tokenizer.decode(ids[1:-1].tolist()) == text
        assert sizes[ids[1:-1]].sum() == len(text.encode())


def test_the_end_token_inside_a_document_is_text(tokenizer, tmp_path):
    """Fault: text that spells the end token ends the document, also after saving and loading a tokenizer."""
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_str())
    for each in (tokenizer, load_tokenizer(path, 600)):
        ((_, ids),) = encode(each, [f"a{END_OF_DOCUMENT}b"], 0, 0)
        assert 0 not in ids[1:-1]
        assert each.decode(ids.tolist(), skip_special_tokens=True) == f"a{END_OF_DOCUMENT}b"


def test_an_interrupt_is_not_a_tokenizer_error(tokenizer):
    """Fault: Ctrl-C during packing is reported as a document that cannot be read."""

    class Interrupted:
        def encode_batch_fast(self, documents, add_special_tokens):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(encode(Interrupted(), ["text"], 0, 0))


@pytest.mark.parametrize("train", [train_tokenizer, functools.partial(train_wordpiece, lower_case=True)])
@pytest.mark.parametrize("text", ["".join(map(chr, range(97, 123))) * 20_000, " \n" * 200_000])
def test_training_time_is_linear_in_the_longest_word(train, text):
    """Fault: a word of 500,000 letters, as in DNA or base64, takes minutes, and one of ten million hours."""
    began = time.monotonic()
    tokenizer = train(["ab ab abc " * 9 + text], 400)
    assert time.monotonic() - began < 20
    assert "ab" in tokenizer.get_vocab()


def test_words_of_ordinary_length_are_not_cut():
    """Fault: the bound changes the tokenizers of ordinary text."""
    texts, trained = ["a" * 999 + " b" * 9 + "x" * 5_000 + " y"], []

    class Fake:
        def train_from_iterator(self, texts, trainer):
            trained.extend(texts)

    train_on(Fake(), texts, None)
    assert "".join(trained) == texts[0]
    assert max(len(run) for part in trained for run in part.split()) == 1_000
    assert len(trained) == 6 and trained[0].startswith("a" * 999 + " b")


def test_training_can_be_interrupted():
    """Fault: Ctrl-C is not heard while the library trains, for hours in text without spaces."""
    stopped = threading.Event()

    class Slow:
        def train_from_iterator(self, texts, trainer):
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(InterruptedError):
                for _ in texts:
                    time.sleep(0.01)
            stopped.set()

    began = time.monotonic()
    # Shells ignore SIGINT in what they run in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_on(Slow(), itertools.repeat("text"), None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5 and stopped.wait(5)


def test_vocabulary_is_bytes_then_merges(tokenizer):
    """Faults: the end token is not id 0; bytes that do not occur in the text are missing."""
    vocabulary = tokenizer.get_vocab()
    assert vocabulary[END_OF_DOCUMENT] == 0
    assert sorted(vocabulary.values()) == list(range(600))
    assert sum(len(token) == 1 for token in vocabulary) == 256


def test_unusable_files_are_refused(tokenizer, tmp_path):
    """Fault: a tokenizer that is too large, or draws its tokens, is found after training."""
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(path, 600)
    path.write_text("{}")
    with pytest.raises(UserError, match="not a tokenizers JSON"):
        load_tokenizer(path, 600)
    path.write_text(tokenizer.to_str())
    with pytest.raises(UserError, match=r"vocab_size=599: .* has 600 tokens. Set data.vocab_size=600"):
        load_tokenizer(path, 599)
    assert load_tokenizer(path, 640).get_vocab_size() == 600
    parts = json.loads(tokenizer.to_str())
    parts["model"]["vocab"]["last"] = 700  # of 601 tokens one does not fit into a table of 640
    path.write_text(json.dumps(parts))
    with pytest.raises(UserError, match=r"vocab_size=640: .* has 701 tokens"):
        load_tokenizer(path, 640)
    path.write_text(json.dumps(parts | {"model": parts["model"] | {"dropout": 0.1}}))
    with pytest.raises(UserError, match=r"dropout 0\.1"):
        load_tokenizer(path, 701)


@given(st.integers(0, 10**9), st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_the_bytes_of_a_document_are_all_divided(count, weights):
    """Faults: bytes are lost by rounding, or where no token has a weight; exact weights are changed."""
    sizes = spread(count, np.array(weights))
    assert sizes.sum() == count and (sizes >= 0).all() and len(sizes) == len(weights)
    assert not any(weights) or (sizes[np.array(weights) == 0] == 0).all()
    assert spread(sum(weights), np.array(weights)).tolist() == weights
