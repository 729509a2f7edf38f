"""A cheap model drafts, the model itself judges."""
