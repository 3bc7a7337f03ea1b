"""Masking for BERT: which tokens of a row are to be restored, and what stands in their place."""

import numpy as np

from ..text.wordpiece import Vocabulary

Row = dict[str, np.ndarray]


def masked_row(
    tokens: np.ndarray,
    segments: np.ndarray,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    *,
    rate: float,
    predictions: int,
) -> Row:
    """A row with `rate` of its real tokens to be restored, `predictions` at most and one at least.

    Of these, drawn without repetition, 80 % become [MASK], 10 % another token at random and 10 % stay as they are, each
    by a throw of its own. Special tokens, [UNK] among them, are neither drawn nor put in; but they count among the real
    tokens that the rate is of, as published.

    Args:
      tokens: ids, int32 [T].
      segments: 0 for padding, int32 [T].
      vocabulary: of the ids.
      rng: what everything random is drawn from.
      rate: 0.15 as published.
      predictions: P.

    Returns:
      tokens [T], masked_positions [P] in ascending order and then 0, masked_tokens [P], int32.
    """
    special = np.sort(vocabulary[1:])
    places = np.flatnonzero((segments > 0) & ~np.isin(tokens, special))
    wanted = min(predictions, max(1, round(rate * int((segments > 0).sum()))), len(places))
    chosen = np.sort(rng.permutation(places)[:wanted])
    others = rng.integers(vocabulary.size - len(special), size=wanted)
    for token in special:
        others += others >= token
    throws = rng.random(wanted)
    original = tokens[chosen]
    replaced = tokens.copy()
    replaced[chosen] = np.where(throws < 0.8, vocabulary.mask, np.where(throws < 0.9, others, original))
    fill = (0, predictions - wanted)
    return {
        "tokens": replaced.astype(np.int32),
        "masked_positions": np.pad(chosen, fill).astype(np.int32),
        "masked_tokens": np.pad(original, fill).astype(np.int32),
    }


def unigram_nats(train_counts: np.ndarray, heldout_counts: np.ndarray, vocabulary: Vocabulary) -> float:
    """Nats per token of one who knows how frequent tokens are in training and nothing of what stands around them.

    The cross-entropy of the held-out tokens under the training tokens' frequencies, with one added to each count so
    that no probability is 0. Special tokens, which are never masked, are left out of both.

    Args:
      train_counts: how often each token occurs in training, [V].
      heldout_counts: how often it is to be predicted, [V].
      vocabulary: of the ids.
    """
    maskable = np.setdiff1d(np.arange(vocabulary.size), vocabulary[1:])
    train, heldout = train_counts[maskable] + 1.0, heldout_counts[maskable]
    return float(-(heldout * np.log(train / train.sum())).sum() / max(heldout.sum(), 1))
