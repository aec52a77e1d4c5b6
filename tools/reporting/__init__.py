"""The parts of tools/report.py; `evaluation` also serves tools/evaluate.py."""
