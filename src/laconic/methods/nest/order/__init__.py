"""Which part of which matrix comes next."""
