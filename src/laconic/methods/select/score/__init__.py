"""What an example of a pool is worth: one number for each document, higher = keep."""
