"""Explain measurements to readers of a report: a title, a sentence on what it means and one on what is healthy."""

from typing import NamedTuple


class Meaning(NamedTuple):
    """The words for one measurement; `healthy` says what to expect."""

    title: str
    told: str = ""
    healthy: str = ""


_MEANINGS = {
    "loss": Meaning("Loss", "Mean loss per target.", "Falls, fast at first; held-out close to training."),
    "bits_per_byte": Meaning(
        "Bits per byte", "Loss over the bytes of the original text.", "Falls. It compares runs with other tokenizers."
    ),
    "accuracy": Meaning("Accuracy", "Share of the targets that are predicted right.", "Rises."),
    "top5": Meaning("Top-5 accuracy", "Share of the targets among the five best guesses.", "Rises."),
    "learning_rate": Meaning("Learning rate", "The rate of the step.", "Follows the schedule of the config."),
    "gradient_norm": Meaning(
        "Gradient norm", "Norm of the whole gradient before clipping.", "Settles after the warm-up, with few spikes."
    ),
    "update_norm": Meaning("Update norm", "Norm of the change of all parameters.", "Follows the learning rate."),
    "skipped": Meaning(
        "Skipped steps", "Steps refused because loss, gradient or update was not finite.", "Stays at zero."
    ),
    "clipped": Meaning(
        "Clipped steps", "Steps whose gradient was longer than gradient_clip.", "Grows early, then rarely."
    ),
    "real_tokens": Meaning("Real tokens", "Share of the tokens that are not padding.", "Close to one."),
    "tokens_per_second": Meaning("Tokens per second", "Tokens trained on, over all devices.", "Level."),
    "examples_per_second": Meaning("Examples per second", "Examples trained on, over all devices.", "Level."),
    "steps_per_second": Meaning("Steps per second", "Optimizer steps.", "Level."),
    "mfu": Meaning(
        "MFU", "Model FLOP/s as a share of the devices' bfloat16 peak.", "Level; 0.3 to 0.6 for large models."
    ),
    "input_wait": Meaning("Waiting for input", "Share of the time without a batch to train on.", "Below 0.05."),
    "seconds": Meaning("Seconds to save", "Time to write a checkpoint in the background.", "Far below the interval."),
    "blocked_seconds": Meaning("Pause to save", "Time that training waited for a checkpoint.", "Below a second."),
    "bytes": Meaning("Checkpoint bytes", "Size of a checkpoint.", "Constant."),
    "load_imbalance": Meaning("Load imbalance", "Busiest expert over the mean.", "Falls towards one."),
    "dropped_tokens": Meaning("Dropped tokens", "Share of the tokens that found no room in an expert.", "Near zero."),
    "balance_loss": Meaning("Balance loss", "Penalty on uneven experts.", "Close to one."),
    "residual": Meaning(
        "Residual", "Largest error of a root, relative to the identity.", "Below residual_bound: larger are rejected."
    ),
    "condition": Meaning(
        "Condition",
        "Largest over smallest eigenvalue of the regularised statistics, the worst block of a layer.",
        "Below 1 / ridge after the first steps. A layer that stays at this bound sees few directions.",
    ),
    "effective_rank": Meaning(
        "Effective rank",
        "Trace over largest eigenvalue of the statistics: how many directions of a block the gradients use.",
        "Above one and slow to change. Near one, a single direction dominates.",
    ),
    "staleness": Meaning(
        "Staleness",
        "Steps since the roots of a layer were computed, mean over its blocks.",
        "A sawtooth up to the interval plus the delay. A layer that only grows has its refreshes rejected.",
    ),
    "graft_ratio": Meaning(
        "Graft ratio",
        "What a preconditioned direction is multiplied by to get the norm of the graft.",
        "Smooth in time, alike for layers of one kind. A jump means that roots no longer fit the gradients.",
    ),
    "fallbacks": Meaning(
        "Fallbacks",
        "Blocks that use the graft method, for lack of roots or after rejected refreshes.",
        "Zero after the first refreshes.",
    ),
    "failures": Meaning("Rejected refreshes", "Refreshes in a row whose roots were not accurate.", "Zero."),
    "refreshes": Meaning("Refreshes", "Roots accepted so far, over all blocks.", "A straight line."),
    "busy": Meaning("Host threads busy", "Share of the time that the threads for roots work.", "Below one."),
    "stalls": Meaning("Stalls", "Steps that waited for roots from the host.", "Near zero."),
    "stalled_seconds": Meaning("Stalled seconds", "Time that steps waited for roots from the host.", "Near zero."),
}


def of(name: str) -> Meaning:
    """Return the words for a measurement such as "train/loss", by the end of its name."""
    end = name.rpartition("/")[2]
    known = _MEANINGS.get(end)
    parents = [part for part in name.split("/")[:-1] if part not in ("train", "heldout", "throughput", "checkpoint")]
    where = f", {' '.join(part for part in parents if part != 'optimizer').replace('_', ' ')}".rstrip(", ")
    if known is None:
        return Meaning(end.replace("_", " ").capitalize() + where)
    return known._replace(title=known.title + where)
