"""Verifiers: what checks one answer by a rule, without a model. A `rules` judge is made of them."""
