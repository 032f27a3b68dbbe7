"""The comparison: tasks, protocols, one training loop for every method, records and reports."""
