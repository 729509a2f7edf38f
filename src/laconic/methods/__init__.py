"""The methods, one file each: `methods/<family>/<kind>/<method>.py`; the path is the name."""
