"""What a parity report is turned into: one HTML file, JUnit XML, a comparison with an older report.

Everything here works on the JSON document (``report.json``, ``validate/report.schema.json``) and imports neither torch
nor a runtime; plots need the extra ``report``.
"""
