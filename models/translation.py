"""The task of translating with an encoder-decoder Transformer (`encoder_decoder`), with one vocabulary."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .attention import Pattern
from .beam_search import Translations, beam_search
from .encoder_decoder import KeysValues, Transformer, TransformerOptions
from .kernels import attention as kernels
from .layout import shard_batch
from .linen_task import Batch, BatchSpec, LinenTask, Metrics, check_options
from .vocabulary import real_targets, real_tokens, token_logits, token_losses

END = 0  # the token before and after a sentence


@dataclasses.dataclass(frozen=True)
class TranslationTask(TransformerOptions, LinenTask):
    """Translation of sentence pairs.

    A batch holds int32 arrays: source and source_segments, source_positions [B, S]; target, target_segments and
    target_positions [B, T + 1]. Segments number the pairs in a row, the same on both sides, and are 0 in padding;
    positions count from 0 in each. Inputs are target `[:, :-1]` and targets `[:, 1:]`; a target counts if its segment
    equals its input's and is not 0. Held-out rows must hold one pair each.
    """

    label_smoothing: float = 0.1  # probability spread over all tokens; in the training loss only
    loss_chunks: int = 0  # parts of the vocabulary whose logits are computed in turn, to save memory; 0: one
    beam_size: int = 4  # hypotheses kept per sentence; 1 is greedy decoding
    length_penalty: float = 0.6  # exponent of GNMT's length penalty: larger values prefer longer translations
    decode_length: int = 128  # most tokens of a translation, including its end

    def __post_init__(self):
        check_options(
            self,
            positive="encoder_layers decoder_layers embed_dim heads head_dim mlp_dim beam_size decode_length",
            not_negative="length_penalty loss_chunks",
            fractions="dropout label_smoothing",
            attention=kernels.KERNELS,
        )
        if self.vocab_size < 2:
            raise ValueError(f"task.vocab_size={self.vocab_size}: must be at least 2, because the end is a token")

    def boxed(self, key: jax.Array) -> Any:
        """See `LinenTask.boxed`. Axes: layers, embed, mlp, heads, kv_heads, kv (in a head), vocab, norm."""
        row = jnp.zeros((1, 2), jnp.int32)
        batch = {f"{side}{part}": row for side in ("source", "target") for part in ("", "_segments", "_positions")}
        # The row is too short for a kernel; parameters do not depend on it.
        return Transformer(dataclasses.replace(self, attention="xla"), train=False).init(key, batch)

    def check_batch(self, batch_spec: BatchSpec) -> None:
        """See `LinenTask.check_batch`."""
        if "source" not in batch_spec or "target" not in batch_spec:
            raise ValueError(
                f"the batch has {sorted(batch_spec)} and not both 'source' and 'target'; translation needs PairData"
            )
        self._kernels(batch_spec)

    def notes(self, batch_spec: BatchSpec) -> tuple[str, ...]:
        """Return which kernels compute attention in training, and why."""
        return tuple(f"{name} attention: {kernel} ({why})" for name, (kernel, why) in self._kernels(batch_spec).items())

    def _kernels(self, batch_spec: BatchSpec) -> dict[str, kernels.Choice]:
        rows, sources = batch_spec["source"].shape
        targets = batch_spec["target"].shape[1] - 1
        lengths = {
            "source": (sources, sources, Pattern(causal=False)),
            "target": (targets, targets, Pattern()),
            "source-to-target": (targets, sources, Pattern(causal=False)),
        }
        return {
            name: kernels.choose(
                self.attention,
                jax.ShapeDtypeStruct((rows, length, self.heads, self.head_dim), jnp.dtype(self.compute_dtype)),
                keys,
                self.heads,
                pattern,
            )
            for name, (length, keys, pattern) in lengths.items()
        }

    def loss(
        self, variables: dict[str, Any], batch: Batch, *, key: jax.Array, train: bool
    ) -> tuple[jax.Array, tuple[dict[str, Any], Metrics]]:
        """Return the mean over real targets (0 for an empty batch), no model state, and metrics as (total, weight).

        The training loss is the cross-entropy with smoothed labels, under dropout. Otherwise it is plain nats, so that
        the held-out "loss" equals "nats_per_token", which is never smoothed. "accuracy" is the share of targets that
        are the most probable token.
        """
        x_BxTxE, head_VxE = self._apply(variables, batch, key if train else None)
        real_BxT = real_targets(batch["target_segments"])
        losses = token_losses(x_BxTxE, head_VxE, batch["target"][:, 1:], real_BxT, self.loss_chunks)
        objective, targets = losses.nats, losses.count
        if train and self.label_smoothing:
            objective = (1 - self.label_smoothing) * losses.nats + self.label_smoothing * losses.uniform
        metrics = {
            "loss": (objective, targets),
            "nats_per_token": (losses.nats, targets),
            "accuracy": (losses.correct, targets),
        }
        if train:
            metrics["real_tokens"] = real_tokens(batch["target_segments"][:, 1:])
        return objective / jnp.maximum(targets, 1), ({}, metrics)

    def logits(self, variables: dict[str, Any], batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Return predictions for the inputs `target[:, :-1]`, float32 [B, T, V]; with a key, under dropout."""
        return token_logits(*self._apply(variables, batch, key))

    def _apply(
        self, variables: dict[str, Any], batch: Batch, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        inputs = {name: array[:, :-1] if name.startswith("target") else array for name, array in batch.items()}
        rngs = {} if key is None else {"dropout": key}
        result: Any = Transformer(self, train=key is not None).apply(variables, inputs, rngs=rngs)
        return result

    def translate(self, variables: dict[str, Any], source_BxS: jax.Array, segments_BxS: jax.Array) -> Translations:
        """Return the best translation of each source that beam search finds.

        Args:
          variables: variables of the model.
          source_BxS: tokens and the end, from the first slot on.
          segments_BxS: 1 for these, 0 for padding.
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
        """Return the tokens of the translation [B, decode_length] and reference [B, T] of rows with one pair each."""
        translations = self.translate(variables, batch["source"], batch["source_segments"])
        return {"translation": translations.tokens, "reference": batch["target"][:, 1:]}

    def judge(
        self, predictions: Mapping[str, np.ndarray], decode: Callable[[np.ndarray], str] | None
    ) -> tuple[dict[str, float], str]:
        """Return BLEU of the detokenized translations, by sacrebleu with its default tokenizer, and its signature."""
        from sacrebleu.metrics.bleu import BLEU  # only this method needs it

        if decode is None:
            raise ValueError("BLEU needs text, but the data set has no `decoder`; add one")
        translations, references = (
            [decode(tokens) for tokens in predictions[name]] for name in ("translation", "reference")
        )
        bleu = BLEU()
        score = bleu.corpus_score(translations, [references])
        line = (
            f"{score} (sacrebleu {bleu.get_signature()}; beam {self.beam_size}, length penalty {self.length_penalty})"
        )
        return {"bleu": float(score.score)}, line

    def flops(self, batch_spec: BatchSpec) -> float:
        """Return the training FLOPs of one batch: 6 per weight and slot, 12 H D per query and key of an attention.

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
