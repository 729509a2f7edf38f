"""What goes, round by round."""
