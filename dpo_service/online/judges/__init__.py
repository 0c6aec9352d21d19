"""Judges: what says which of a prompt's answers is better. All stand behind the port in `port.py`."""
