"""Translation by an encoder-decoder Transformer with one vocabulary for both languages: its task.

`encoder_decoder` has the module, and says how it differs from that of Vaswani et al.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .beam_search import Translations, beam_search
from .encoder_decoder import KeysValues, Transformer
from .layout import shard_batch
from .parameters import axis_names
from .stack import REMAT_POLICIES

Batch = Mapping[str, jax.Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]
Metrics = dict[str, tuple[jax.Array, jax.Array]]

END = 0  # the token before and after a sentence


@dataclasses.dataclass(frozen=True)
class TranslationTask:
    """Translation as the trainer sees it.

    A batch holds int32 arrays: source and source_segments, source_positions [B, S]; target, target_segments and
    target_positions [B, T + 1]. Segments number the pairs in a row, the same on both sides, and are 0 in padding;
    positions count from 0 in each. Inputs are target `[:, :-1]`, targets `[:, 1:]`, of which those count whose segment
    is their input's and is not 0. To be judged by, a row must hold one pair.
    """

    vocab_size: int = 2048  # of both languages; must be the data's
    encoder_layers: int = 2  # blocks of self-attention and MLP
    decoder_layers: int = 2  # blocks of self-attention, attention to the source, and MLP
    embed_dim: int = 128  # width of the residual stream
    heads: int = 4  # of each attention
    head_dim: int = 32  # per head; even, because rotary positions turn pairs
    mlp_dim: int = 512  # hidden width of the MLP
    dropout: float = 0.1  # share of what each part adds to the residual stream, and of embeddings, that is dropped
    label_smoothing: float = 0.1  # probability spread over all tokens in the training loss alone
    z_loss: float = 0.0  # weight of log(Z)^2 in the training loss (PaLM: 1e-4); keeps logits from drifting
    remat: str = "none"  # recompute in the backward pass: "none", "full" (least memory) or "dots"
    compute_dtype: str = "float32"  # of activations and matmuls; "bfloat16" on accelerators
    beam_size: int = 4  # hypotheses of a translation that are kept; 1 is greedy decoding
    length_penalty: float = 0.6  # exponent of GNMT's length penalty: larger values prefer longer translations
    decode_length: int = 128  # most tokens of a translation, its end included

    def __post_init__(self):
        counts = "vocab_size encoder_layers decoder_layers embed_dim heads head_dim mlp_dim beam_size decode_length"
        for name in counts.split():
            if getattr(self, name) < 1:
                raise ValueError(f"task.{name} is {getattr(self, name)}; it must be at least 1")
        if self.vocab_size < 2:
            raise ValueError(f"task.vocab_size is {self.vocab_size}; the end is a token, so it must be at least 2")
        if self.head_dim % 2:
            raise ValueError(f"task.head_dim is {self.head_dim}; rotary positions need it even: {self.head_dim + 1}")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"task.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"task.z_loss is {self.z_loss}; it must be at least 0 and finite, such as 1e-4")
        if not 0 <= self.length_penalty < math.inf:
            raise ValueError(f"task.length_penalty is {self.length_penalty}; it must be at least 0, and finite")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"task.remat is {self.remat!r}; use one of {', '.join(REMAT_POLICIES)}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"task.compute_dtype is {self.compute_dtype!r}; use 'float32' or 'bfloat16'")

    def init(self, key: jax.Array, batch_spec: BatchSpec) -> dict[str, Any]:
        """Parameters as plain nested dicts {"params": ...}, float32; pure, works under jax.eval_shape."""
        if "source" not in batch_spec or "target" not in batch_spec:
            raise ValueError(
                f"the batch has {sorted(batch_spec)} and not both 'source' and 'target'; translation needs PairData"
            )
        return nn.unbox(self._boxed_init(key))

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Mean over real targets (0 where there is none), no model state, and the metrics as (total, weight).

        While training it is the cross-entropy with smoothed labels, under dropout; otherwise plain nats, so that the
        held-out "loss" and "nats_per_token" are one number. "nats_per_token" is never smoothed; "accuracy" is the share
        of targets that are the most probable token. With z_loss the training loss has it, too, and "z_loss" is the mean
        of log(Z)^2 before its weight (PaLM, arXiv 2204.02311, section 5).
        """
        segments_BxT = batch["target_segments"][:, 1:]
        real_BxT = (segments_BxT == batch["target_segments"][:, :-1]) & (segments_BxT > 0)
        logits_BxTxV = self.logits(variables, batch, key if train else None)
        logsumexp_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
        chosen_BxT = jnp.take_along_axis(logits_BxTxV, batch["target"][:, 1:, None], axis=-1)[..., 0]
        nats_BxT = logsumexp_BxT - chosen_BxT

        def total(values_BxT: jax.Array) -> jax.Array:
            return jnp.where(real_BxT, values_BxT, 0).sum(dtype=jnp.float32)

        targets, nats = total(jnp.ones_like(nats_BxT)), total(nats_BxT)
        objective = nats
        if train and self.label_smoothing:
            spread = total(logsumexp_BxT - logits_BxTxV.mean(axis=-1))
            objective = (1 - self.label_smoothing) * nats + self.label_smoothing * spread
        z_metrics = {"z_loss": (total(jnp.square(logsumexp_BxT)), targets)} if self.z_loss else {}
        if train and z_metrics:
            objective += self.z_loss * z_metrics["z_loss"][0]
        metrics = {
            "loss": (objective, targets),
            "nats_per_token": (nats, targets),
            # As argmax == target, but the maximum is there already; a tie counts as right.
            "accuracy": (total(chosen_BxT >= logits_BxTxV.max(axis=-1)), targets),
            **z_metrics,
        }
        return objective / jnp.maximum(targets, 1), ({}, metrics)

    def logits(self, variables: dict[str, Any], batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Predictions for the inputs `target[:, :-1]`: float32 [B, T, V]; with a key under dropout."""
        inputs = {name: array[:, :-1] if name.startswith("target") else array for name, array in batch.items()}
        rngs = {} if key is None else {"dropout": key}
        logits: Any = Transformer(self, train=key is not None).apply(variables, inputs, rngs=rngs)
        return logits

    def translate(self, variables: dict[str, Any], source_BxS: jax.Array, segments_BxS: jax.Array) -> Translations:
        """The best translation of each source that beam search finds.

        Args:
          variables: of the model.
          source_BxS: tokens and the end, from the first slot on.
          segments_BxS: 1 for these, 0 for what is behind them.
        """

        def call(*inputs: Any, method: str) -> Any:
            return Transformer(self, train=False).apply(variables, *inputs, method=method)

        memory: KeysValues = call(source_BxS, segments_BxS, method="memory")

        def step(cache: KeysValues, parents_BxK: jax.Array, tokens_BxK: jax.Array, position: jax.Array) -> Any:
            logits_BxKxV, cache = call(tokens_BxK, parents_BxK, position, cache, memory, segments_BxS, method="step")
            return jax.nn.log_softmax(logits_BxKxV), cache

        batch = source_BxS.shape[0]
        shape = (batch, self.decoder_layers, self.beam_size, self.decode_length, self.heads, self.head_dim)
        empty = jnp.swapaxes(shard_batch(jnp.zeros(shape, self.compute_dtype)), 0, 1)
        return beam_search(
            step,
            (empty, empty),
            batch=batch,
            beams=self.beam_size,
            length=self.decode_length,
            start=END,
            end=END,
            penalty=self.length_penalty,
        )

    judged_metrics: ClassVar[tuple[str, ...]] = ("bleu",)

    def predict(self, variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """Of rows that hold one pair each the translation [B, decode_length] and the reference [B, T], as tokens."""
        translations = self.translate(variables, batch["source"], batch["source_segments"])
        return {"translation": translations.tokens, "reference": batch["target"][:, 1:]}

    def judge(
        self, predictions: Mapping[str, np.ndarray], decode: Callable[[np.ndarray], str] | None
    ) -> tuple[dict[str, float], str]:
        """BLEU of the detokenized translations, by sacrebleu with its default tokenizer, and its signature."""
        from sacrebleu.metrics.bleu import BLEU  # only those who judge need it

        if decode is None:
            raise ValueError("BLEU is of text, and the data do not decode their tokens; give them a `decoder`")
        translations, references = (
            [decode(tokens) for tokens in predictions[name]] for name in ("translation", "reference")
        )
        bleu = BLEU()
        score = bleu.corpus_score(translations, [references])
        line = (
            f"{score} (sacrebleu {bleu.get_signature()}; beam {self.beam_size}, length penalty {self.length_penalty})"
        )
        return {"bleu": float(score.score)}, line

    def logical_axes(self, variables: dict[str, Any]) -> dict[str, Any]:
        """A tuple of names per parameter, one for each dimension.

        Names: layers, embed, mlp, heads, kv (inside a head), vocab, norm (scales of norms).
        """
        return axis_names(variables, jax.eval_shape(lambda: self._boxed_init(jax.random.key(0))))

    def flops(self, batch_spec: BatchSpec) -> float:
        """Training FLOPs of one batch: 6 per weight of a matmul and slot, 12 H D per query and key of an attention.

        The whole square of attention counts, because the masked part is computed too. Recomputation by remat, norms and
        softmaxes are not counted, as is usual for MFU.
        """
        rows, sources = batch_spec["source"].shape
        targets = batch_spec["target"].shape[1] - 1
        projection, mlp = self.embed_dim * self.heads * self.head_dim, 2 * self.embed_dim * self.mlp_dim
        pair = 12 * self.heads * self.head_dim
        encoder = self.encoder_layers * sources * (6 * (4 * projection + mlp) + pair * sources)
        decoder = self.decoder_layers * targets * (6 * (6 * projection + mlp) + pair * (targets + sources))
        decoder += self.decoder_layers * sources * 6 * 2 * projection
        head = 6 * self.embed_dim * self.vocab_size * targets
        return float(rows * (encoder + decoder + head))

    def _boxed_init(self, key: jax.Array) -> Any:
        row = jnp.zeros((1, 2), jnp.int32)
        batch = {f"{side}{part}": row for side in ("source", "target") for part in ("", "_segments", "_positions")}
        return Transformer(self, train=False).init(key, batch)
