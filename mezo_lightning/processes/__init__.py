"""The processes of a job: what they tell one another, how they start, and how they end together."""
