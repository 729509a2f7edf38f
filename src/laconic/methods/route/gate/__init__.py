"""Parts of a module of the model, and a small learned gate that says which of them run."""
