"""Plans from more than one measure of damage, each for its own layers."""
