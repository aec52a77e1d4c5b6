"""The page of training runs, part by part; tools/report.py puts them together."""
