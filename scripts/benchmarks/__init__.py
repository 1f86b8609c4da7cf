"""What Hako costs, as ratios that are measured in one run on one machine; ``scripts/bench`` runs it."""
