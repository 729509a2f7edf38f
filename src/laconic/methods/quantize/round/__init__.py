"""Which grid point a weight goes to."""
