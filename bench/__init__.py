"""Measurements of the project itself: tables against other tools, and the size check. No part of the installed package."""
