"""Renderings of a parity report: one HTML file, JUnit XML, a comparison with an older report.

Everything here works on :class:`crt_export.parity.report.ParityReport`, which ``report.json`` holds, and imports
neither torch nor a runtime; the page and its plots need the extra ``report``.
"""
