"""Parity reports for readers and for CI systems: HTML, JUnit XML, and the comparison of two reports."""
