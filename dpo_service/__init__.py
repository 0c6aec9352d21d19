"""Preference training as a service, on Ray."""
