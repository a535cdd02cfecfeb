"""Long run: does the error of a target grow over twenty thousand tokens?

``long_run_tokens`` tokens of the held-out text are decoded one by one, teacher-forced, in two ways, and PyTorch FP32
decodes the same tokens in the very same way:

``single``
    One uninterrupted run, positions 0, 1, 2 and so on, in a cache with room for all of it. Most of it lies beyond the
    training length, where no model promises anything, so it is gated below that length and reported above it. Where
    the target's capacity or the model's ``max_position_embeddings`` is smaller, the run ends there and a note says so;
    a model with an attention window goes on by the runtime's slide rule (:mod:`crt_export.runtime.slide`) instead,
    while PyTorch goes on counting.

``chained``
    Windows of the training length, one after the other through the text. **The rule**: every window starts at position
    0 with an emptied cache, and the recurrent state h of the last token before it is carried over, so the run is one
    recurrence from its first token to its last while no position reaches the training length. A plain transformer has
    no state, so nothing is carried and its windows are independent. Where the training length is not known, windows
    have 256 tokens, or as many as positions or capacity allow. All of it is gated.

Gates: no NaN or infinity at any step (the first one is named: step, position, tensor); the norm of the state, block by
block; the relative error of the logits below the training length; how fast that error grows in the chained run, by the
upper end of the interval of :mod:`crt_export.parity.long_run.growth`, from 4,000 tokens on; and for targets that
compute in FP16 the largest |value| of every tensor, gathered by layer.

``data`` of the level::

    {"runs": [{"kind": "single" | "chained", "tokens", "capacity", "trained": n | null, "window": n | null,
      "blocks": [{"start", "stop", "nll", "reference_nll", "relative_error", "kl", "top1_agreement",
                  "state_norm", "reference_state_norm", "state_error", "gated": bool}],
      "growth": {"figure", "per_1000_tokens", "ci": [low, high], "limit", "gated": bool,
                 "units", "unit_tokens", "autocorrelation"} | null,
      "non_finite": steps, "first_non_finite": text | null,
      "headroom": {tensor: largest |value|}, "headroom_by_layer": {"layers.0": value},
      "headroom_by_layer_trained": {"layers.0": value below the training length}}]}

Blocks have 1,000 tokens; the single run has finer ones below the training length. ``nll``, ``kl``: nats per token.
``relative_error``: mean |logit difference| over the standard deviation of the reference's logits. ``top1_agreement``:
share of the tokens that are no near tie in the reference. ``state_norm``: mean Euclidean norm of h; ``state_error``:
mean norm of the difference over the mean norm of the reference's. ``headroom`` has the sixteen largest tensors and is
null where the target does not compute in FP16.
"""

from crt_export.parity.long_run.level import check_long_run

__all__ = ["check_long_run"]
