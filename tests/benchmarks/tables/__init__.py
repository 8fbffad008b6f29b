"""Writes docs/results.md, its picture and a table of the README from the committed results.

``python -m tests.benchmarks.tables``; a section of the page is one file here.
"""
