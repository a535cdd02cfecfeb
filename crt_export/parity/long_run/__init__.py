"""Long run: does the error of a target grow over twenty thousand tokens?

``long_run_tokens`` tokens of the held-out text are decoded one by one, teacher-forced, in two ways, and PyTorch FP32
decodes the same tokens in the very same way:

``single``
    One uninterrupted run, positions 0, 1, 2 and so on, in a cache with room for all of it. Most of it lies beyond the
    training length, where no model promises anything, so it is gated below that length and reported above it. Where
    the target's capacity or the model's ``max_position_embeddings`` is smaller, the run ends there and a note says so;
    a model with an attention window goes on by the runtime's rule of eviction (:mod:`crt_export.runtime.caches`)
    instead, while PyTorch goes on counting.

``chained``
    Windows of the training length, one after the other through the text. **The rule**: every window starts at position
    0 with an emptied cache, and the recurrent state h of the last token before it is carried over, so the run is one
    recurrence from its first token to its last while no position reaches the training length. A plain transformer has
    no state, so nothing is carried and its windows are independent. Where the training length is not known, windows
    have 256 tokens, or as many as positions or capacity allow. All of it is gated.

Gates: no NaN or infinity at any step (the first one is named: step, position, tensor); the norm of the state, block by
block; the relative error of the logits below the training length; by how much that error grows over the chained run;
and for targets that compute in FP16 the largest |value| of every tensor, gathered by layer.

The growth is a straight line through the errors of units of a window, or of a 32nd of the run where that is less
(:mod:`crt_export.parity.long_run.growth`). It is reported as a rate per 1,000 tokens and gated against the run's own
error: the upper end of the rate's 95 % interval, times the run's length, over the run's mean error. 0.5 is an error
that ends at 5/3 of where it began, 1 at three times that, and 2 is one that began at nothing. Text drifts too, and the
more so the shorter the run: stretches of the demo's text give an upper end of up to 0.50 over 4,000 tokens, 0.42 over
8,000 and 0.28 over 12,000, from which on it is gated. A plain transformer carries nothing from window to window: its
growth shows the text alone and is reported, not gated. What is not gated is a check without a verdict, and for the
chained run a note.

``data`` of the level::

    {"runs": [{"kind": "single" | "chained", "tokens", "capacity", "trained": n | null, "window": n | null,
      "blocks": [{"start", "stop", "nll", "reference_nll", "relative_error", "kl", "top1_agreement",
                  "state_norm", "reference_state_norm", "state_error", "gated": bool}],
      "growth": {"figure", "per_1000_tokens", "ci": [low, high], "limit", "gated": bool,
                 "mean_error", "over_run", "over_run_ci": [low, high], "over_run_limit",
                 "units", "unit_tokens", "autocorrelation"} | null,
      "non_finite": steps, "first_non_finite": text | null,
      "headroom": {tensor: largest |value|}, "headroom_by_layer": {"layers.0": value},
      "headroom_by_layer_trained": {"layers.0": value below the training length}}]}

``growth``: ``over_run`` and ``over_run_ci`` are the growth over the whole run in units of ``mean_error``; ``limit`` is
``over_run_limit`` in the units of ``ci``, per 1,000 tokens. Blocks have 1,000 tokens; the single run has finer ones
below the training length. ``nll``, ``kl``: nats per token. ``relative_error``: mean |logit difference| over the
standard deviation of the reference's logits. ``top1_agreement``: share of the tokens that are no near tie in the
reference. ``state_norm``: mean Euclidean norm of h; ``state_error``: mean norm of the difference over the mean norm of
the reference's. ``headroom`` has the sixteen largest tensors and is null where the target does not compute in FP16.
"""

from crt_export.parity.long_run.level import check_long_run

__all__ = ["check_long_run"]
