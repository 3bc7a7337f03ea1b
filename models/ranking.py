"""How well scores rank and predict what happened, over all examples; float64."""

import numpy as np


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive scores higher than a negative, a tie counting half.

    Exact, by the rank statistic of Mann and Whitney. NaN where one of the classes is missing, or a score is NaN.

    Args:
      scores: [examples], any order-preserving function of the predictions.
      labels: [examples], 1 for positives and 0 for negatives.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    positives = np.bincount(place, weights=labels, minlength=len(counts))
    negatives = counts - positives
    pairs = positives.sum() * negatives.sum()
    if not pairs or np.isnan(scores).any():
        return float("nan")
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs)


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p of what happened, in nats; p is the logistic function of the logit."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    return float(np.mean(np.logaddexp(0, logits) - labels * logits))


def calibration(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean prediction / mean label: 1 where as much happens as is predicted. NaN without a positive."""
    predicted = np.mean(np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64))))
    happened = np.mean(np.asarray(labels, np.float64))
    return float(predicted / happened) if happened else float("nan")
