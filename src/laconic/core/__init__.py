"""The roles and values every part of laconic is written in: what a model is made of, what is seen, scored, held, paid and promised.

Nothing here knows a method, an architecture or a file format; this folder imports torch and the standard library only."""
