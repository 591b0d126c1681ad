"""Training: one loop for every model, and what it reads, keeps and shows."""
