"""Measures what Hako costs, as ratios within one run on one machine; ``scripts/bench`` runs it."""
