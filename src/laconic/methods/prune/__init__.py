"""Things that go: scores that say which, cuts that say how."""
