"""Stages of :func:`crt_export.pipeline.build`, one per file."""
