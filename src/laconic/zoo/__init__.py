"""Small reference models and the texts they are measured on: the embedded default `nano` (its shipped folder and the
script that trains it) and the named standard-library modules that laconic calibrates, searches and certifies with when
the user brings no data."""
