"""From the FP32 model and real text to INT8 graphs.

``calibrate`` observes the model, ``plan_w8a8`` decides every range once, ``quantize_linears`` makes the INT8 weights
and ``quantize_w8a8`` puts them into each FP16 graph. ``quantize_w8`` needs neither text nor plan: it replaces the
weights of FP32 graphs.
"""
